"""What a second GPU brings: tokens/s on 1 and 2, with and without P2P, and exposed communication.

    python -m tests.benchmarks.two_gpus --data DIR

Each row is forge-train itself, for a few steps at the config's own tokens_per_step and at a
micro-batch that fits 24 GB. The losses of all rows are compared, step by step.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch

ROOT = Path(__file__).parent.parent.parent
# What --check gives for a card of 24 GB.
MICRO_BATCHES = {"gpt2": 60, "gpt2_medium": 16, "forge_124m": 48, "forge_350m": 16}
ROW_SECONDS = 120
NO_P2P = {"NCCL_P2P_DISABLE": "1"}
NO_SHM = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
ROWS = {
    "1 GPU": (1, {}, ()),
    "2 GPUs": (2, {}, ()),
    "2, no P2P": (2, NO_P2P, ()),
    "2, no P2P, bf16 gradients": (2, NO_P2P, ("--set=reduce_precision=bfloat16",)),
    "2, no P2P, no shared memory": (2, NO_SHM, ()),
    "2, neither, bf16 gradients": (2, NO_SHM, ("--set=reduce_precision=bfloat16",)),
}


def train(
    config: str,
    data: str,
    run: Path,
    ranks: int,
    steps: int,
    environment: dict[str, str],
    more: tuple[str, ...],
) -> list[dict]:
    """Rows of metrics.jsonl of a short run; its output on failure."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    settings = [
        f"--set=batch.micro_batch_size={MICRO_BATCHES[config]}",
        f"--set=schedule.max_steps={steps}",
        "--set=evaluate.every_steps=1000",
        "--set=evaluate.num_tokens=65536",
        "--set=evaluate.sample_tokens=0",
        "--set=checkpoint.every_steps=1000",
        *more,
    ]
    command = [sys.executable, *launcher, "-m", "trainer.cli", config, "--data", data]
    done = subprocess.run(
        [*command, "--out", str(run), *settings],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=ROW_SECONDS,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(done.stdout[-2000:] + done.stderr[-4000:])
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@click.command()
@click.option("--data", required=True)
@click.option("--configs", default="gpt2,gpt2_medium", show_default=True)
@click.option("--rows", default="", help="Only rows whose name matches this pattern.")
@click.option("--steps", default=14, show_default=True)
@click.option("--set", "settings", multiple=True)
def main(data: str, configs: str, rows: str, steps: int, settings: tuple[str, ...]) -> None:
    if torch.cuda.device_count() < 2:
        raise click.ClickException("this benchmark needs two GPUs")
    click.echo(f"{'config':14}{'row':30}{'tokens/s':>12}{'ratio':>8}{'loss differs by':>18}")
    for config in configs.split(","):
        single: float | None = None
        wanted: list[float] = []
        for name, (ranks, environment, more) in ROWS.items():
            if rows and not re.search(rows, name):
                continue
            more = (*more, *(f"--set={setting}" for setting in settings))
            with tempfile.TemporaryDirectory() as folder:
                try:
                    out = Path(folder) / "run"
                    found = train(config, data, out, ranks, steps, environment, more)
                except subprocess.TimeoutExpired:
                    click.echo(f"{config:14}{name:30} not done after {ROW_SECONDS} s")
                    continue
            taken = [row for row in found if row["kind"] == "step"]
            speed = statistics.median(row["tokens_per_second"] for row in taken[3:])
            losses = [row["loss"] for row in taken]
            single, wanted = single or speed, wanted or losses
            difference = max(abs(a / b - 1) for a, b in zip(losses, wanted, strict=True))
            click.echo(
                f"{config:14}{name:30}{speed:>12,.0f}{speed / single:>8.3f}{difference:>18.2e}"
            )


if __name__ == "__main__":
    main()
