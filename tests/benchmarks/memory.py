"""Which micro-batch is chosen for a card of 24 GB, what it takes, and how fast it trains.

    python -m tests.benchmarks.memory --data DIR [--configs gpt2,gpt2_medium,gpt2_large]

Each row is forge-train for a few steps in a process that may take 23.0 GiB of the GPU. For gpt2_xl,
which does not fit, the row says so.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch

from pipeline.errors import ForgeError
from trainer import config_file
from trainer import train as trainer
from trainer.report import read_metrics
from trainer.run import Command

ROOT = Path(__file__).parent.parent.parent


def train(name: str, data: Path, run: Path, gib: float, settings: tuple[str, ...]) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
    try:
        trainer.train(Command(config_file.load(name, settings), name, data, run))
    except ForgeError as error:
        sys.exit(f"{error.what} ({error.where})")


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--configs", "names", default="gpt2,gpt2_medium,gpt2_large", show_default=True)
@click.option("--gib", default=23.0, show_default=True)
@click.option("--steps", default=6, show_default=True)
@click.option("--set", "settings", multiple=True)
@click.option("--run", type=click.Path(path_type=Path), hidden=True)
def main(
    data: Path, names: str, gib: float, steps: int, settings: tuple[str, ...], run: Path | None
) -> None:
    if run:
        train(names, data, run, gib, settings)
        return
    if not torch.cuda.is_available():
        raise click.ClickException("this benchmark needs a GPU")
    click.echo(f"{torch.cuda.get_device_name()}, at most {gib} GiB; torch {torch.__version__}")
    click.echo(
        f"{'config':14}{'micro-batch':>14}{'estimated':>11}{'peak':>8} GiB{'ratio':>7}"
        f"{'tokens/s':>10}{'data wait':>11}"
    )
    more = (
        f"schedule.max_steps={steps}",
        "evaluate.num_tokens=65536",
        "evaluate.sample_tokens=0",
        "checkpoint.every_steps=100000",
        *settings,
    )
    for name in names.split(","):
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["--data", str(data), "--configs", name, "--gib", str(gib)]
            arguments += ["--run", f"{folder}/run", *(f"--set={setting}" for setting in more)]
            command = [sys.executable, "-m", "tests.benchmarks.memory", *arguments]
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                click.echo(f"{name:14}{done.stderr.strip().splitlines()[-1]}")
                continue
            rows = read_metrics(Path(folder, "run"))
        start = next(row for row in rows if row["kind"] == "start")
        taken = [row for row in rows if row["kind"] == "step"][2:]
        speed = sorted(row["tokens_per_second"] for row in taken)[len(taken) // 2]
        peak = max(row["peak_memory_bytes"] for row in rows if row["kind"] == "evaluate")
        size, estimated = start["micro_batch_size"], start["estimated_bytes"]
        click.echo(
            f"{name:14}{size:>9} x {start['accumulation_steps']:<3}"
            f"{estimated / 2**30:>10.2f}{peak / 2**30:>8.2f}    {estimated / peak:>7.3f}"
            f"{speed:>10,.0f}{max(row['data_wait'] for row in taken):>11.2%}"
        )


if __name__ == "__main__":
    main()
