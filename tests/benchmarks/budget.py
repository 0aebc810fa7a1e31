"""Does a run end on time? python -m tests.benchmarks.budget --data DIR [--minutes 6]

Runs forge-train with schedule.budget_hours and prints what the schedule did. The time is taken from
outside, from the start of the process to its end. With --throttle the machine is twice as slow
from the middle of the budget on: the process stands still every other half second. With --kill it
is killed in the decay, and started again with the same command. Then what evaluations, checkpoints
and waiting for data cost of it.
"""

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from trainer import config as configs
from trainer.metrics import METRICS_FILE, duration, read_metrics

ROOT = Path(__file__).parents[2]
ROWS = 16


def last_row(run: Path) -> dict:
    rows = read_metrics(run) if (run / METRICS_FILE).exists() else []
    return next((row for row in reversed(rows) if row["kind"] == "step"), {"step": 0})


def wait(process: subprocess.Popen[str], started: float, seconds: float, throttle: bool) -> None:
    """Until the process ends; throttled from the middle of the budget on."""
    while process.poll() is None:
        time.sleep(0.5)
        if throttle and time.monotonic() - started > seconds / 2:
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.5)
            process.send_signal(signal.SIGCONT)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--config", default="gpt2", show_default=True)
@click.option("--minutes", default=6.0, show_default=True)
@click.option("--throttle", is_flag=True)
@click.option("--kill", is_flag=True)
@click.option("--set", "settings", multiple=True)
def main(
    data: Path, config: str, minutes: float, throttle: bool, kill: bool, settings: tuple[str, ...]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "trainer.cli", config, "--data", data, "--out", run]
        command += ["--resume", f"--set=schedule.budget_hours={minutes / 60}"]
        command += [f"--set={setting}" for setting in settings]
        started = time.monotonic()
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True)
        if kill:
            while process.poll() is None and last_row(run).get("decayed", 1) > 0.5:
                time.sleep(0.1)
            process.kill()
            process.wait()
            click.echo(f"killed after step {last_row(run)['step']}")
            process = subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True)
        wait(process, started, minutes * 60, throttle)
        seconds = time.monotonic() - started
        if process.returncode:
            sys.exit(process.returncode)
        rows = read_metrics(run)
    steps = [row for row in rows if row["kind"] == "step"]
    click.echo(f"\n{'time':>8}{'step':>8}{'tokens/s':>12}{'lr':>12}{'decayed':>10}{'loss':>9}")
    for row in [*steps[:: max(1, len(steps) // ROWS)], steps[-1]]:
        click.echo(
            f"{duration(row['seconds']):>8}{row['step']:>8}{row['tokens_per_second']:>12,.0f}"
            f"{row['lr']:>12.3e}{row['decayed']:>10.4f}{row['loss']:>9.4f}"
        )
    (decay,) = [row for row in rows if row["kind"] == "decay"]
    evaluated = [row for row in rows if row["kind"] == "evaluate"]
    click.echo(f"the rate fell from step {decay['step']} on, {duration(decay['seconds'])}")
    click.echo(f"validation loss {evaluated[0]['loss']:.4f} -> {evaluated[-1]['loss']:.4f}")
    click.echo(
        f"{seconds:.1f} s of {minutes * 60:.0f} s, {seconds / minutes / 60:.2%}, from the start of "
        "the process to its end"
    )
    show_costs(rows, configs.load(config), configs.load(config, settings))


def show_costs(rows: list[dict], own: configs.Config, chosen: configs.Config) -> None:
    """What is not training: evaluations, checkpoints and the steps after them, waits for data."""
    speeds = {row["step"]: row["tokens_per_second"] for row in rows if row["kind"] == "step"}
    usual = statistics.median(speeds.values())
    for row in [row for row in rows if row["kind"] == "checkpoint"]:
        after = [speeds[step] for step in range(row["step"] + 1, row["step"] + 4) if step in speeds]
        click.echo(
            f"checkpoint of step {row['step']}: training stood for {row['stall_seconds']:.2f} s, "
            f"written in {row['save_seconds']:.1f} s; the next steps at "
            + " ".join(f"{speed / usual:.1%}" for speed in after)
            + " of the usual speed"
        )
    took = [row["evaluate_seconds"] for row in rows if row["kind"] == "evaluate" and row["step"]]
    waits = [row["data_wait"] for row in rows if row["kind"] == "step"]
    click.echo(
        f"usual speed {usual:,.0f} tokens/s; an evaluation took {statistics.median(took):.2f} s; "
        f"waits for data: median {statistics.median(waits):.3%}, most {max(waits[1:]):.3%}"
    )
    stalls = [row["stall_seconds"] for row in rows if row["kind"] == "checkpoint"]
    step_seconds = own.batch.tokens_per_step / usual
    evaluation = max(took) * own.evaluate.num_tokens / chosen.evaluate.num_tokens
    click.echo(
        f"as often as the config has them ({own.evaluate.num_tokens:,} tokens every "
        f"{own.evaluate.every_steps} steps, a checkpoint every {own.checkpoint.every_steps}): "
        f"evaluation {evaluation / step_seconds / own.evaluate.every_steps:.2%}, "
        f"checkpoints {max(stalls) / step_seconds / own.checkpoint.every_steps:.3%} of the time"
    )


if __name__ == "__main__":
    main()
