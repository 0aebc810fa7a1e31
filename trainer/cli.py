"""forge-train: the trainer's command line. Decorators, one call, one error handler."""

import contextlib
import io
import os
import sys
import time
from pathlib import Path

import click

from pipeline.errors import ForgeError
from trainer.signals import end_with_launcher


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Folder of shards (forge-prep)."
)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder to make.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one key of the config, such as optimizer.peak_lr=3e-4; may be repeated.",
)
@click.option("--resume", is_flag=True, help="Go on from the latest checkpoint in --out, if any.")
@click.option("--check", is_flag=True, help="Check config and data, print the plan, train nothing.")
@click.version_option(package_name="llm-forge")
def main(
    config: str,
    data: Path,
    out: Path | None,
    settings: tuple[str, ...],
    resume: bool,
    check: bool,
) -> None:
    """Train a model from scratch on a folder of shards.

    CONFIG is the name of a config (tiny; forge_124m, forge_350m, forge_770m; gpt2, gpt2_medium,
    gpt2_large, gpt2_xl) or a .toml path.

    \b
    On two GPUs (the dashes before forge-train are torchrun's):
      torchrun --standalone --nproc_per_node=2 --no-python forge-train gpt2 --data DIR --out RUN
    On one GPU or CPU:
      forge-train gpt2 --data DIR --out RUN

    Ctrl-C saves a checkpoint and leaves; a second one leaves at once. The same command with
    --resume goes on. Exit code 0 also means that the run was complete already.

    schedule.budget_hours=24 ends a run by the clock. A finished one goes on from before its
    learning rate fell with --resume --set schedule.budget_hours=30.
    """
    end_with_launcher()  # before torch is imported, which takes seconds
    # Settings of torch that it reads when it is imported, and that a user may have set otherwise.
    # Segments that grow leave no gaps on a card that is nearly full; compiled kernels are kept.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or f"{os.environ.get('HOME', '/tmp')}/.cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "llm-forge" / "compiled"))
    started = time.perf_counter()  # importing torch is part of the time that a run takes
    if isinstance(sys.stdout, io.TextIOWrapper):  # a sample may have what a terminal cannot show
        sys.stdout.reconfigure(errors="replace")
    from trainer import check as checking
    from trainer import config as configs
    from trainer import loop
    from trainer.ranks import Ranks
    from trainer.run import check_amount, find_data

    try:
        chosen = configs.load(config, settings)
        name = Path(config).stem
        if check:
            found = find_data(chosen, data)
            text = checking.report(chosen, name, found)
            if Ranks.from_environment().is_first:
                click.echo(text)
            check_amount(chosen, found)
        elif out is None:
            raise click.UsageError("--out is missing: the folder for the run (or add --check)")
        else:
            loop.train(chosen, name, data, out, resume, started)
            if "TORCHELASTIC_RUN_ID" in os.environ:
                # All is written, and the process group is left. A rank was seen to end with SIGABRT
                # after that, on a loaded machine (why is not known: threads of torch are still
                # there while Python ends), and torchrun then calls the run failed.
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(OSError):
                        stream.flush()
                os._exit(0)
    except ForgeError as error:
        rank = os.environ.get("RANK")
        prefix = f"[rank {rank}] " if rank not in (None, "0") else ""
        raise click.ClickException(prefix + str(error)) from error
    except OSError as error:
        if error.filename is None:  # of no file: the network's, a pipe's
            raise
        failure = ForgeError(
            f"cannot read or write: {error.strerror}",
            where=error.filename,
            fix="make room or give access; then the same command, with --resume if it trained",
        )
        raise click.ClickException(str(failure)) from error


if __name__ == "__main__":
    main()
