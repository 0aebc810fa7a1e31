"""forge-train: the trainer's command line. Decorators, one call, one error handler."""

import os
from pathlib import Path

import click

from pipeline.errors import ForgeError


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
    config: str, data: Path, out: Path | None, settings: tuple[str, ...], resume: bool, check: bool
) -> None:
    """Train a model from scratch on a folder of shards.

    CONFIG is the name of a config (tiny, gpt2, gpt2_medium, gpt2_large, gpt2_xl) or a .toml path.

    \b
    On two GPUs (the dashes before forge-train are torchrun's):
      torchrun --standalone --nproc_per_node=2 --no-python forge-train gpt2 --data DIR --out RUN
    On one GPU or CPU:
      forge-train gpt2 --data DIR --out RUN

    Ctrl-C saves a checkpoint and leaves; the same command with --resume goes on. Exit code 0 also
    means that the run was complete already.
    """
    # Settings of torch that it reads when it is imported, and that a user may have set otherwise.
    # Segments that grow leave no gaps on a card that is nearly full; compiled kernels are kept.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or f"{os.environ.get('HOME', '/tmp')}/.cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "llm-forge" / "compiled"))
    from trainer import check as checking
    from trainer import config as configs
    from trainer import loop

    try:
        chosen = configs.load(config, settings)
        name = Path(config).stem
        if check:
            click.echo(checking.report(chosen, name, data))
        elif out is None:
            raise click.UsageError("--out is missing: the folder for the run (or add --check)")
        else:
            loop.train(chosen, name, data, out, resume)
    except ForgeError as error:
        rank = os.environ.get("RANK")
        prefix = f"[rank {rank}] " if rank not in (None, "0") else ""
        raise click.ClickException(prefix + str(error)) from error


if __name__ == "__main__":
    main()
