"""Laws of several ranks: killed, stopped and poisoned. On a machine with two GPUs, over NCCL."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks import kill_train
from conftest import ROOT, metrics_of
from test_train import MODERN, QUICK, train_alone, weights

from pipeline import shards
from pipeline.errors import ForgeError
from trainer import checkpoint
from trainer.config import StepSizes
from trainer.ranks import Heartbeat, Ranks
from trainer.windows import Windows, step_positions, windows_at

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks on one GPU")
# One forward a step and rank, so that a planted fault is in the step that the test says.
STEPS = 24
TWO = [*QUICK, "--set=batch.micro_batch_size=2"]


def start(
    *arguments: object,
    ranks: int = 2,
    launcher: tuple[str, ...] = ("--standalone",),
    planted: str = "",
) -> subprocess.Popen[str]:
    torchrun = ["torch.distributed.run", *launcher, f"--nproc_per_node={ranks}"]
    script = "planted" if planted else "trainer.cli"
    command = [sys.executable, "-m", *torchrun, "-m", script, "tiny"]
    more = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "PLANTED": planted}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | more,
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


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children]


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
    return kill_train.undisturbed(tmp_path_factory.mktemp("ranks"), small_shards, STEPS)


def test_a_killed_rank_brings_the_group_back_by_itself(
    undisturbed: Path, small_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    tally = kill_train.torment(run, undisturbed, small_shards, STEPS, kills=1, restarts=1)
    assert (tally.kills.total(), tally.num_starts) == (1, 1)
    assert_same_run(run, undisturbed)


def test_restarts_are_no_way_around_resume(
    undisturbed: Path, small_shards: Path, tmp_path: Path
) -> None:
    """torchrun tries again, but the run that is there was not begun by it."""
    run = shutil.copytree(undisturbed, tmp_path / "run")
    arguments = ["--data", small_shards, "--out", run, *TWO, "--set=schedule.max_steps=80"]
    process = start(*arguments, launcher=("--standalone", "--max-restarts=1"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "add --resume" in output
    assert checkpoint.steps(run) == checkpoint.steps(undisturbed)


def test_a_killed_run_goes_on_with_the_same_command(
    undisturbed: Path, small_shards: Path, tmp_path: Path
) -> None:
    """A rank, all processes, and torchrun itself; once inside a checkpoint's writing."""
    run = tmp_path / "run"
    tally = kill_train.torment(run, undisturbed, small_shards, STEPS, kills=3)
    assert tally.kills.total() == 3
    assert_same_run(run, undisturbed)


def test_the_missing_rank_is_named(small_shards: Path, tmp_path: Path) -> None:
    """A rank that stands still, as a machine that lost its network would."""
    run = tmp_path / "run"
    arguments = ["--data", small_shards, "--out", run, *TWO, "--set=guard.timeout_seconds=30"]
    process = start(*arguments, "--set=schedule.max_steps=100000")
    wait_for(lambda: steps_done(run) >= 2)
    frozen = ranks_of(process)[1]
    os.kill(frozen, signal.SIGSTOP)
    assert process.stdout
    for line in process.stdout:
        if "missing" in line:
            break
    os.kill(frozen, signal.SIGKILL)
    process.communicate(timeout=60)
    assert "[rank 0] missing: rank 1 (silent for" in line


WARM = ["--set=schedule.warmup_steps=100", "--set=batch.micro_batch_size=1"]
GROWING = ["--set=batch.tokens_per_step=512", "--set=batch.doublings=1"]
GROWING += ["--set=batch.doubling_steps=6"]


def test_no_thread_is_left_in_torch_when_python_ends() -> None:
    """Python would end it there, and C++ then ends the process with SIGABRT."""
    entered = threading.Event()

    class SlowStore(torch.distributed.HashStore):
        def set(self, key: str, value: str) -> None:
            entered.set()
            time.sleep(0.5)
            super().set(key, value)

    heartbeat = Heartbeat(SlowStore(), Ranks(0, 0, 2), 60)
    assert entered.wait(10)
    heartbeat.end()
    assert not heartbeat.thread.is_alive()


@pytest.mark.parametrize(
    ("family", "moves"),
    [([], [(2, 8), (1, 12)]), ([*MODERN, *GROWING], [(2, 4), (1, 8), (4, 12)])],
    ids=["gpt2", "modern"],
)
def test_a_run_that_moves_between_1_2_and_4_ranks_learns_the_same(
    family: list[str], moves: list[tuple[int, int]], small_shards: Path, tmp_path: Path
) -> None:
    """In the warm-up, where the rate does not depend on the last step."""
    losses = []
    for number, starts in enumerate(([(1, 12)], moves)):
        run = tmp_path / f"run{number}"
        for ranks, steps in starts:
            settings = [*WARM, *family, f"--set=schedule.max_steps={steps}", "--resume"]
            if ranks == 1 and not torch.cuda.is_available():  # without starting anything
                train_alone(small_shards, run, *settings)
                continue
            process = start("--data", small_shards, "--out", run, *QUICK, *settings, ranks=ranks)
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
        for kind in ("step", "evaluate"):
            losses.append([row["loss"] for row in metrics_of(run, kind)])
    assert len(losses[0]) == 12
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] == pytest.approx(losses[3], rel=1e-5)


def test_two_machines_train_as_one_and_rank_0_alone_writes(
    small_shards: Path, tmp_path: Path
) -> None:
    """Two launchers on loopback, each with its own copy of the shards and its own --out."""
    for node in ("a", "b"):
        shutil.copytree(small_shards, tmp_path / node / "shards")
    processes = start_two_machines(tmp_path, 2)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (run,) = [tmp_path / n / "run" for n in ("a", "b") if (tmp_path / n / "run").exists()]
    assert checkpoint.steps(run) == [4]
    assert metrics_of(run, "start")[0]["world_size"] == 4
    assert sum("step 4/4" in output for output in outputs) == 1


def test_machines_whose_shards_differ_do_not_start(small_shards: Path, tmp_path: Path) -> None:
    for node in ("a", "b"):
        shutil.copytree(small_shards, tmp_path / node / "shards")
    index = tmp_path / "b" / "shards" / "index.json"
    index.write_text(index.read_text() + " ")
    processes = start_two_machines(tmp_path, 1)
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1
        assert "the shards of rank 1 are not those of rank 0: another index" in output
    assert not any((tmp_path / node / "run").exists() for node in ("a", "b"))


def start_two_machines(folder: Path, ranks: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    launcher = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=test", endpoint)
    processes = []
    for node in ("a", "b"):
        arguments = ["--data", folder / node / "shards", "--out", folder / node / "run", *QUICK]
        arguments += ["--set=batch.micro_batch_size=1", "--set=schedule.max_steps=4"]
        processes.append(start(*arguments, ranks=ranks, launcher=launcher))
    return processes


def test_sigterm_to_torchrun_saves_on_the_way_out(small_shards: Path, tmp_path: Path) -> None:
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
    """With Muon, beside which embeddings and gains are AdamW's."""
    run = tmp_path / "run"
    arguments = ["--data", small_shards, "--out", run, *TWO, "--set=optimizer.name=muon"]
    process = start(*arguments, "--set=optimizer.muon_warmup_steps=5", planted="nan")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    (skipped,) = metrics_of(run, "skip")
    assert (skipped["step"], skipped["reason"]) == (3, "not finite")
    train = Windows(shards.load_index(small_shards), "train", 64)
    theirs = step_positions(2, StepSizes(4), 2, 1, 2)[0]  # rank 1's windows of the third step
    found = [train.locate(int(w)) for w in windows_at(theirs, train.num_windows, 1337)]
    assert skipped["windows"] == [
        {"shard": shard.file, "offset": start, "slice": shard.slice} for shard, start in found
    ]
    assert [row["step"] for row in metrics_of(run, "step")] == [1, 2, 4, 5, 6, 7, 8]
    assert all(row["loss"] is not None for row in metrics_of(run, "step"))
    shutil.rmtree(run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the weights are a copy in bfloat16")
def test_ranks_whose_weights_differ_by_a_bit_do_not_go_on(
    small_shards: Path, tmp_path: Path
) -> None:
    process = start("--data", small_shards, "--out", tmp_path / "run", *TWO, planted="flip")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert "the weights are no longer the same on all ranks" in output
    assert checkpoint.steps(tmp_path / "run") == []  # it was to be the first


def test_a_shard_that_goes_away_stops_all_ranks_and_nothing_is_lost(
    small_shards: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(small_shards, tmp_path / "shards")
    run = tmp_path / "run"
    arguments = ["--data", data, "--out", run, *TWO, "--set=schedule.max_steps=100000"]
    process = start(*arguments, "--set=evaluate.every_steps=100000")
    wait_for(lambda: steps_done(run) >= 5)
    (data / "train_000000.bin").rename(data / "elsewhere")
    gone_at = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - gone_at < 30
    assert process.returncode == 1
    # Of both ranks, unless torchrun ends one while it says so.
    assert "cannot read a shard: No such file or directory" in output
    assert checkpoint.steps(run)[-1] == metrics_of(run, "step")[-1]["step"]


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "MASTER_PORT"])
def test_one_of_several_processes_does_not_train_alone(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks()
    for name, value in ({"WORLD_SIZE": "2"} | names).items():
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(1, 1, 2)
    monkeypatch.delenv(missing)
    with pytest.raises(ForgeError, match=f"{missing}' is not set"):
        Ranks.from_environment()
