"""Does a run end on time? python -m tests.benchmarks.budget --data DIR [--minutes 6]

Runs forge-train with schedule.budget_hours and prints the learning rate over time, and its share of
the peak at the end. The time is taken from outside, from the start of the process to its end. With
--throttle 0.1 everything takes 10 % longer from the middle of the budget on: the process is stopped
again and again (a GPU works on what is queued). With --kill it is killed in the decay, and started
again with the same command; the seconds since the last checkpoint are then spent twice. Then what
evaluations, checkpoints and waiting for data cost.
"""

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from trainer import config_file
from trainer.config import Config
from trainer.report import duration, read_metrics

ROOT = Path(__file__).parents[2]
ROWS = 16


def steps_of(run: Path) -> list[dict]:
    return [row for row in read_metrics(run) if row["kind"] == "step"]


def lr_share(steps: list[dict]) -> float:
    """The last step's learning rate as a share of the highest."""
    return steps[-1]["lr"] / max(row["lr"] for row in steps) if steps else 1.0


def wait(process: subprocess.Popen[str], started: float, seconds: float, throttle: float) -> None:
    """Until the process ends; throttled from the middle of the budget on."""
    while process.poll() is None:
        time.sleep(1.0)
        if throttle and time.monotonic() - started > seconds / 2:
            process.send_signal(signal.SIGSTOP)
            time.sleep(throttle)
            process.send_signal(signal.SIGCONT)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--config", default="gpt2", show_default=True)
@click.option("--minutes", default=6.0, show_default=True)
@click.option("--throttle", default=0.0, help="0.1: everything takes 10 % longer.")
@click.option("--kill", is_flag=True)
@click.option("--set", "settings", multiple=True)
def main(
    data: Path, config: str, minutes: float, throttle: float, kill: bool, settings: tuple[str, ...]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "trainer.cli", config, "--data", data, "--out", run]
        command += ["--resume", f"--set=schedule.budget_hours={minutes / 60}"]
        command += [f"--set={setting}" for setting in settings]
        started = time.monotonic()
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True)
        if kill:
            while process.poll() is None and lr_share(steps_of(run)) > 0.5:
                time.sleep(0.1)
            process.kill()
            process.wait()
            click.echo(f"killed after step {steps_of(run)[-1]['step']}")
            process = subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True)
        wait(process, started, minutes * 60, throttle)
        seconds = time.monotonic() - started
        if process.returncode:
            sys.exit(process.returncode)
        rows = read_metrics(run)
    steps = [row for row in rows if row["kind"] == "step"]
    click.echo(f"\n{'time':>8}{'step':>8}{'tokens/s':>12}{'lr':>12}{'loss':>9}")
    for row in [*steps[:: max(1, len(steps) // ROWS)], steps[-1]]:
        click.echo(
            f"{duration(row['seconds']):>8}{row['step']:>8}{row['tokens_per_second']:>12,.0f}"
            f"{row['lr']:>12.3e}{row['loss']:>9.4f}"
        )
    highest = max(row["lr"] for row in steps)
    flat = [row for row in steps if row["lr"] == highest][-1]
    evaluated = [row for row in rows if row["kind"] == "evaluate"]
    click.echo(
        f"the learning rate fell after step {flat['step']}, {duration(flat['seconds'])}, to "
        f"{lr_share(steps):.2%} of its peak at the last step"
    )
    click.echo(f"validation loss {evaluated[0]['loss']:.4f} -> {evaluated[-1]['loss']:.4f}")
    click.echo(
        f"{seconds:.1f} s of {minutes * 60:.0f} s, {seconds / minutes / 60:.2%}, from the start of "
        "the process to its end"
    )
    show_costs(rows, config_file.load(config), config_file.load(config, settings))


def show_costs(rows: list[dict], own: Config, chosen: Config) -> None:
    """What is not training: evaluations, checkpoints and the steps after them, waits for data."""
    speeds = {row["step"]: row["tokens_per_second"] for row in rows if row["kind"] == "step"}
    usual = statistics.median(speeds.values())
    for row in [row for row in rows if row["kind"] == "checkpoint"]:
        after = [speeds[step] for step in range(row["step"] + 1, row["step"] + 4) if step in speeds]
        click.echo(
            f"checkpoint of step {row['step']}: training stood for {row['save_seconds']:.2f} s"
            + "; the next steps at " * bool(after)
            + " ".join(f"{speed / usual:.1%}" for speed in after)
            + " of the usual speed" * bool(after)
        )
    took = [row["evaluate_seconds"] for row in rows if row["kind"] == "evaluate" and row["step"]]
    waits = [row["data_wait"] for row in rows if row["kind"] == "step"]
    click.echo(
        f"usual speed {usual:,.0f} tokens/s; an evaluation took {statistics.median(took):.2f} s; "
        f"waits for data: median {statistics.median(waits):.3%}, most {max(waits[1:]):.3%}"
    )
    saves = [row["save_seconds"] for row in rows if row["kind"] == "checkpoint"]
    step_seconds = own.batch.tokens_per_step / usual
    evaluation = max(took) * own.evaluate.num_tokens / chosen.evaluate.num_tokens
    click.echo(
        f"as often as the config has them ({own.evaluate.num_tokens:,} tokens every "
        f"{own.evaluate.every_steps} steps, a checkpoint every {own.checkpoint.every_steps}): "
        f"evaluation {evaluation / step_seconds / own.evaluate.every_steps:.2%}, "
        f"checkpoints {max(saves) / step_seconds / own.checkpoint.every_steps:.3%} of the time"
    )


if __name__ == "__main__":
    main()
