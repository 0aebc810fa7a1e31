"""The trainer's memory over a day of windows: python -m tests.benchmarks.memory_curve --data DIR

Everything that a rank does in a day but the model: reads and permutes the windows of each step,
makes micro-batches of them, writes the step's row. The resident set must stay flat.
"""

import os
import tempfile
import time
from pathlib import Path

import click
import torch

from pipeline import shards
from trainer import config_file
from trainer.ranks import Ranks
from trainer.report import Metrics
from trainer.windows import MicroBatches, Windows

POINTS = 24


def resident_mib() -> float:
    """This process's resident set: MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--config", default="gpt2", show_default=True)
@click.option("--hours", default=24.0, show_default=True)
@click.option("--tokens-per-second", default=221_000, show_default=True, help="Of all ranks.")
@click.option("--ranks", default=2, show_default=True)
@click.option("--micro-batch-size", default=24, show_default=True)
def main(
    data: Path, config: str, hours: float, tokens_per_second: int, ranks: int, micro_batch_size: int
) -> None:
    chosen = config_file.load(config)
    windows = Windows(shards.load_index(data), "train", chosen.model.context_length)
    per_step = chosen.windows_per_step()
    num_steps = int(hours * 3600 * tokens_per_second / chosen.batch.tokens_per_step)
    print(f"{num_steps:,} steps of {per_step} windows, this rank's {per_step // ranks} of each")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        metrics, first = Metrics(Path(folder), None), Ranks(world_size=ranks)
        cpu = torch.device("cpu")
        with MicroBatches(windows, chosen, 0, micro_batch_size, first, cpu) as batches:
            for step in range(num_steps + 1):
                if step % (num_steps // POINTS) == 0:
                    hour = step / num_steps * hours
                    print(
                        f"{hour:5.1f} h  {step * per_step // ranks:>12,} windows  "
                        f"{resident_mib():8.1f} MiB  after {time.monotonic() - started:5.0f} s",
                        flush=True,
                    )
                for _ in batches.of_step():
                    pass
                row = {"kind": "step", "step": step, "tokens": step * per_step, "seconds": 0.0}
                metrics(row | {"loss": 3.0, "lr": 1e-4, "norm": 1.0})


if __name__ == "__main__":
    main()
