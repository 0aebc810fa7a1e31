"""What a tracker takes in a day from the training process: python -m tests.benchmarks.watch

Seconds of this process's CPU time, for a million steps in a day.
"""

import random
import tempfile
import time
from collections.abc import Callable

import click

from trainer.report import PRINT_SECONDS, Tracker, close

STEPS, DAY = 1_000_000, 86_400


def seconds_of(action: Callable[[], object], times: int = 1) -> float:
    began = time.process_time()
    for _ in range(times):
        action()
    return (time.process_time() - began) / times


@click.command()
@click.option("--library", default="tensorboardX", help="Or matplotlib, wandb, trackio.")
def main(library: str) -> None:
    def row(step: int) -> dict[str, object]:
        return {
            **{"kind": "step", "step": step, "tokens": step * 491_520, "seconds": step * 0.0864},
            **{"loss": 3 + 50 / (step + 9) + random.gauss(0, 0.03), "lr": 1e-3, "norm": 0.3},
            **{"tokens_per_second": 5.7e6, "mfu": 0.45, "data_wait": 0.0},
        }

    rows = [row(step) for step in range(1, STEPS + 1)]
    with tempfile.TemporaryDirectory() as folder:
        given = {"run": folder, "name": "benchmark", "config": {}, "step": -1}
        tracker = Tracker(library, given)
        time.sleep(5.0)  # until it reads
        sent = [row | {"seconds": n * PRINT_SECONDS} for n, row in enumerate(rows[:200])]
        sending = seconds_of(lambda: [tracker(row) for row in sent]) / len(sent) * DAY
        skipping = seconds_of(lambda: [tracker(sent[0] | {"seconds": 0}) for _ in rows])
        close([tracker])
    seconds = sending + skipping
    click.echo(f"{library:20}{seconds:8.2f} s a day {seconds / DAY:10.5%}")


if __name__ == "__main__":
    main()
