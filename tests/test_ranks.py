"""Laws of several ranks: killed, stopped and poisoned. On a machine with two GPUs, over NCCL."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics_of
from test_train import QUICK, weights

from trainer import checkpoint

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks on one GPU")
# One forward a step and rank, so that a planted fault is in the step that the test says.
TWO = [*QUICK, "--set=batch.micro_batch_size=2"]


def start(
    *arguments: object, script: str = "trainer.cli", restarts: int = 0
) -> subprocess.Popen[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, "-m", *launcher, "-m", script, "tiny"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def steps_done(run: Path) -> int:
    try:
        return len(metrics_of(run, "step"))
    except (OSError, ValueError):  # not there yet, or a line half written
        return 0


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """The same bits on CPUs. On GPUs sums are not always added in the same order."""
    tolerance = 1e-3 if torch.cuda.is_available() else 0.0
    losses = [[row["loss"] for row in metrics_of(r, "step")] for r in (run, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance, abs=0)
    ours, theirs = weights(run), weights(undisturbed)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=tolerance), name


@pytest.fixture(scope="module")
def undisturbed(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("ranks") / "undisturbed"
    process = start("--data", small_shards, "--out", run, *TWO, "--set=schedule.max_steps=40")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return run


def test_a_killed_group_goes_on_with_the_same_command(
    undisturbed: Path, small_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["--data", small_shards, "--out", run, "--resume", *TWO]
    arguments.append("--set=schedule.max_steps=40")
    process = start(*arguments)
    wait_for(lambda: steps_done(run) >= 6)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    again = start(*arguments)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert_same_run(run, undisturbed)


def test_sigterm_to_torchrun_saves_on_the_way_out(
    undisturbed: Path, small_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["--data", small_shards, "--out", run, "--resume", *TWO]
    process = start(*arguments, "--set=schedule.max_steps=100000")
    wait_for(lambda: steps_done(run) >= 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "--resume goes on" in output
    (stopped,) = metrics_of(run, "stop")
    assert checkpoint.steps(run)[-1] == stopped["step"]


def test_a_nan_on_one_rank_skips_the_step_on_all(small_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("--data", small_shards, "--out", run, *TWO, script="planted")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert [row["step"] for row in metrics_of(run, "skip")] == [3]
    assert [row["step"] for row in metrics_of(run, "step")] == [1, 2, 4, 5, 6, 7, 8]
    assert all(row["loss"] is not None for row in metrics_of(run, "step"))
    shutil.rmtree(run)
