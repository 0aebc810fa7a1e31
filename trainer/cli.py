"""forge-train: the trainer's command line. Decorators, one call, one error handler."""

import os
import time
from functools import partial
from pathlib import Path

import click

from pipeline.command import ForgeCommand
from pipeline.errors import ForgeError
from trainer.signals import end_with_launcher


class TrainCommand(ForgeCommand):
    """Knows the keys of a config, which people try as options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from trainer.config_file import SECTIONS, similar

            name = error.option_name.lstrip("-").replace("-", "_")
            keys = [key for key in similar(name) if key not in SECTIONS]
            if not keys or (error.possibilities and not keys[0].endswith(name)):
                raise
            meant = " or ".join(f"--set {key}=..." for key in keys)
            raise click.UsageError(f"{error.message} Did you mean {meant}?", ctx) from None


@click.command(cls=TrainCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", required=False)
@click.option("--data", type=click.Path(path_type=Path), help="Folder of shards (forge-prep).")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder to make.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one key of the config, such as optimizer.peak_lr=3e-4; may be repeated.",
)
@click.option("--resume", is_flag=True, help="Continue the run in --out, or begin it.")
@click.option(
    "--from",
    "weights_from",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Begin with the weights of a run, a checkpoint, or a folder in transformers' layout.",
)
@click.option("--check", is_flag=True, help="Check config and data, print the plan, train nothing.")
@click.option(
    "--doctor", is_flag=True, help="Look at this machine: needs no CONFIG, trains nothing."
)
@click.version_option(package_name="llm-forge")
def main(
    config: str | None,
    data: Path | None,
    out: Path | None,
    settings: tuple[str, ...],
    resume: bool,
    weights_from: Path | None,
    check: bool,
    doctor: bool,
) -> None:
    """Train a model on a folder of shards: from scratch, or --from weights that exist.

    CONFIG is the name of a config (tiny, forge_tiny; forge_124m, forge_350m, forge_770m; gpt2,
    gpt2_medium, gpt2_large, gpt2_xl; chat) or a .toml path.

    \b
    On two GPUs (the options before forge-train are torchrun's):
      torchrun --standalone --nproc_per_node=2 --no-python forge-train gpt2 --data DIR --out RUN

    Ctrl-C saves a checkpoint and leaves; a second one leaves at once. The same command with
    --resume continues; exit code 0 also means that the run was complete already.
    schedule.budget_hours=24 ends a run by the clock.

    To train a finished run for longer, begin another with its weights: --from RUN --out RUN2.
    RUN/README.md names the best checkpoint for that. To talk to it, tune it on conversations
    (forge-prep chat makes DIR): forge-train chat --from RUN --data DIR --out RUN2.

    Before all that, --doctor [--data DIR] [--out RUN] tells what would spoil it here, and --check
    what a run will be.
    """
    end_with_launcher()  # before torch is imported, which takes seconds
    # torch reads these when it is imported; a user's own values win.
    # Segments that grow leave no gaps on a card that is nearly full; compiled kernels are kept.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or f"{os.environ.get('HOME', '/tmp')}/.cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "llm-forge" / "compiled"))
    started = time.perf_counter()  # importing torch is part of the time that a run takes
    from trainer import config_file
    from trainer.doctor import examine
    from trainer.run import Command
    from trainer.start import check as check_plan
    from trainer.start import model_to_tune
    from trainer.train import train

    try:
        if doctor:
            raise SystemExit(0 if examine(data, out) else 1)
        if config is None or data is None:
            raise click.UsageError("CONFIG and --data are needed, for all but --doctor")
        if out is None and not check:
            raise click.UsageError("--out is missing: the folder for the run (or add --check)")
        find_model = partial(model_to_tune, config, weights_from, data, out if resume else None)
        chosen, name = config_file.load(config, settings, find_model), Path(config).stem
        command = Command(chosen, name, data, out or Path(), resume, weights_from)
        if check:
            check_plan(command)
        else:
            train(command, started)
    except ForgeError as error:
        rank = os.environ.get("RANK", "0")
        raise click.ClickException(f"[rank {rank}] " * (rank != "0") + str(error)) from error


if __name__ == "__main__":
    main()
