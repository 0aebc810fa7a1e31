"""Does a killed run go on exactly, on this machine with this config? (forge-train --verify-resume)

Before: cli.py. After: a person, before a day is spent on it.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.errors import ForgeError
from trainer import checkpoint
from trainer.config import load
from trainer.metrics import METRICS_FILE, read_metrics
from trainer.run import writing

GPU_TOLERANCE = 1e-3  # of a loss: GPUs do not add up in the same order each time


def verify_resume(
    config: str, settings: tuple[str, ...], data: Path, scratch: Path | None, num_steps: int
) -> str:
    """Train twice for `num_steps`, the second time with a kill half way; say how they compare.

    Runs itself under torchrun on all GPUs (one process on a CPU), in a folder that is removed
    again. Raises ForgeError when the two differ.
    """
    chosen = load(config, settings)
    few_tokens = min(chosen.evaluate.num_tokens, 16 * chosen.model.context_length)
    short = [
        f"schedule.max_steps={num_steps}",
        f"checkpoint.every_steps={max(1, num_steps // 4)}",
        f"evaluate.every_steps={num_steps}",
        f"evaluate.num_tokens={few_tokens}",
        "evaluate.sample_tokens=0",
    ]
    short += ["schedule.budget_hours=1000"] if chosen.schedule.budget_hours else []
    if load(config, (*settings, *short)).num_steps() != num_steps:
        raise ForgeError(
            f"schedule.max_tokens ends the run before {num_steps} steps",
            fix="leave it out, or take fewer: --verify-resume 8",
        )
    if scratch:
        scratch = next(path for path in (scratch, *scratch.absolute().parents) if path.exists())
    ranks = max(1, torch.cuda.device_count())
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    command = [sys.executable, "-m", *launcher, "trainer.cli", config, "--data", str(data)]
    command += [f"--set={setting}" for setting in (*settings, *short)]
    with (
        _stopped_by_signals(),
        writing(),
        tempfile.TemporaryDirectory(prefix="forge-verify-", dir=scratch) as folder,
    ):
        straight, killed = Path(folder, "straight"), Path(folder, "killed")
        print(f"1 of 3: {num_steps} steps that nothing disturbs, on {ranks} rank(s)", flush=True)
        _run([*command, "--out", str(straight)])
        print(f"2 of 3: the same, killed after step {num_steps // 2 + 1}", flush=True)
        _kill_half_way([*command, "--out", str(killed)], killed, num_steps // 2 + 1)
        print("3 of 3: the same again, with --resume", flush=True)
        _run([*command, "--out", str(killed), "--resume"])
        return _compare(straight, killed, num_steps)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process by an exception, so that nothing is left behind."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    for each, handler in before.items():
        if handler != signal.SIG_IGN:  # as SIGHUP's is under nohup
            signal.signal(each, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun, killed at the end if it is still there; the kernel ends its ranks with it."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _run(command: list[str]) -> None:
    with _process(command) as process:
        if process.wait():
            raise ForgeError(
                "the run itself failed; its message is above", fix="mend that; --check helps"
            )


def _kill_half_way(command: list[str], run: Path, step: int) -> None:
    with _process(command) as process:
        while process.poll() is None:
            if _last_step(run) >= step and checkpoint.steps(run):
                return
            time.sleep(0.01)
        raise ForgeError(
            "the run ended before it could be killed",
            fix="take more steps: --verify-resume 100",
        )


def _last_step(run: Path) -> int:
    if not (run / METRICS_FILE).exists():
        return 0
    return max((row["step"] for row in read_metrics(run)), default=0)


def _compare(straight: Path, killed: Path, num_steps: int) -> str:
    losses = [
        {row["step"]: row["loss"] for row in read_metrics(run) if row["kind"] == "step"}
        for run in (straight, killed)
    ]
    path = checkpoint.checkpoint_path(straight, num_steps) / checkpoint.MODEL_FILE
    other = checkpoint.checkpoint_path(killed, num_steps) / checkpoint.MODEL_FILE
    if losses[0] == losses[1] and path.read_bytes() == other.read_bytes():
        return f"exact: all {num_steps} losses and every bit of the weights are the same"
    if losses[0].keys() != losses[1].keys():
        raise ForgeError(
            "the two runs do not have the same steps",
            where=", ".join(f"{len(steps)} steps" for steps in losses),
            fix="report this, with the config and the GPU",
        )
    largest = max(abs(losses[1][step] / loss - 1) for step, loss in losses[0].items())
    if not torch.cuda.is_available() or largest > GPU_TOLERANCE:
        raise ForgeError(
            f"a resumed run is not what it was: losses differ by up to {largest:.1e} of theirs",
            where=f"{num_steps} steps",
            fix="report this, with the config and the GPU",
        )
    return (
        f"the same, but for the order in which GPUs add: losses differ by up to {largest:.1e} of "
        "theirs"
    )
