"""What a second GPU brings: tokens/s on 1 and 2, with and without P2P, and exposed communication.

    python -m tests.benchmarks.two_gpus --data DIR
    python -m tests.benchmarks.two_gpus --data DIR --configs gpt2_medium --against CHECKOUT

Each row is forge-train itself, for a few steps at the config's own tokens_per_step and at a
micro-batch that fits 24 GB. The losses of all rows are compared, step by step. With --against two
GPUs train with another checkout of this project and with this one, in turn.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import click
import torch

from tests.benchmarks.train_speed import CHECKOUT, python_path

ROOT = Path(__file__).parent.parent.parent
# What --check gives for a card of 24 GB.
MICRO_BATCHES = {"gpt2": 60, "gpt2_medium": 16, "forge_124m": 48, "forge_350m": 16}
ROW_SECONDS = 180
NO_P2P = {"NCCL_P2P_DISABLE": "1"}
NO_SHM = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
BF16 = ("--set=reduce_precision=bfloat16",)


class Row(NamedTuple):
    name: str
    ranks: int
    environment: dict[str, str]
    settings: tuple[str, ...] = ()
    tree: Path = ROOT


ROWS = [
    Row("1 GPU", 1, {}),
    Row("2 GPUs", 2, {}),
    Row("2, no P2P", 2, NO_P2P),
    Row("2, no P2P, bf16 gradients", 2, NO_P2P, BF16),
    Row("2, no P2P, no shared memory", 2, NO_SHM),
    Row("2, neither, bf16 gradients", 2, NO_SHM, BF16),
]


def train(row: Row, config: str, data: Path, run: Path, steps: int, more: list[str]) -> list[dict]:
    """Rows of metrics.jsonl of a short run; its output on failure."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={row.ranks}"]
    settings = [
        f"--set=batch.micro_batch_size={MICRO_BATCHES.get(config, 'auto')}",
        f"--set=schedule.max_steps={steps}",
        "--set=evaluate.every_steps=1000",
        "--set=evaluate.num_tokens=65536",
        "--set=evaluate.sample_tokens=0",
        "--set=checkpoint.every_steps=1000",
        *row.settings,
        *more,
    ]
    command = [sys.executable, *launcher, "-m", "trainer.cli", config, "--data", str(data)]
    done = subprocess.run(
        [*command, "--out", str(run), *settings],
        cwd=row.tree,
        env=os.environ | python_path(row.tree) | row.environment,
        capture_output=True,
        text=True,
        timeout=ROW_SECONDS,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(done.stdout[-2000:] + done.stderr[-4000:])
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@click.command()
@click.option("--data", type=click.Path(path_type=Path, resolve_path=True), required=True)
@click.option("--configs", default="gpt2,gpt2_medium", show_default=True)
@click.option("--rows", "pattern", default="", help="Only rows whose name matches this pattern.")
@click.option("--against", type=CHECKOUT, help="A folder with another version of this project.")
@click.option("--steps", default=14, show_default=True)
@click.option("--set", "settings", multiple=True)
def main(
    data: Path,
    configs: str,
    pattern: str,
    against: Path | None,
    steps: int,
    settings: tuple[str, ...],
) -> None:
    if torch.cuda.device_count() < 2:
        raise click.ClickException("this benchmark needs two GPUs")
    rows = (
        [Row("2 GPUs, against", 2, {}, (), against), Row("2 GPUs", 2, {})] * 2 if against else ROWS
    )
    more = [f"--set={setting}" for setting in settings]
    click.echo(f"{'config':14}{'row':30}{'tokens/s':>12}{'ratio':>8}{'loss differs by':>18}")
    for config in configs.split(","):
        single: float | None = None
        wanted: list[float] = []
        for row in rows:
            if not re.search(pattern, row.name):
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = train(row, config, data, Path(folder) / "run", steps, more)
                except subprocess.TimeoutExpired:
                    click.echo(f"{config:14}{row.name:30} not done after {ROW_SECONDS} s")
                    continue
            taken = [each for each in found if each["kind"] == "step"]
            speed = statistics.median(each["tokens_per_second"] for each in taken[3:])
            losses = [each["loss"] for each in taken]
            single, wanted = single or speed, wanted or losses
            difference = max(abs(a / b - 1) for a, b in zip(losses, wanted, strict=True))
            click.echo(
                f"{config:14}{row.name:30}{speed:>12,.0f}{speed / single:>8.3f}{difference:>18.2e}"
            )


if __name__ == "__main__":
    main()
