"""Laws of several ranks: killed, stopped and poisoned. On a machine with two GPUs, over NCCL."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import kill_train
from conftest import ROOT, metrics_of
from test_train import MODERN, QUICK, train_alone, weights

from pipeline.errors import ForgeError
from trainer import checkpoint
from trainer import run as run_folder
from trainer.ranks import OWN_STORE, Ranks, check_own_store, on_all

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
    more[OWN_STORE] = "1"
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


def test_a_killed_run_goes_on_with_the_same_command(
    undisturbed: Path, small_shards: Path, tmp_path: Path
) -> None:
    """A rank, all processes, and torchrun itself; once inside a checkpoint's writing."""
    run = tmp_path / "run"
    tally = kill_train.torment(run, undisturbed, small_shards, STEPS, kills=3)
    assert tally.kills.total() == 3
    assert_same_run(run, undisturbed)


WARM = ["--set=schedule.warmup_steps=4", "--set=batch.micro_batch_size=1"]
WARM += ["--set=checkpoint.keep_last=9"]


def test_a_run_that_moves_between_1_2_and_4_ranks_learns_the_same(
    small_shards: Path, tmp_path: Path
) -> None:
    """Moved as a kill would: what comes after a checkpoint is gone. Muon, and AdamW beside it."""
    losses = []
    for number, starts in enumerate(([(1, 12)], [(2, 4), (1, 8), (4, 12)])):
        run = tmp_path / f"run{number}"
        for ranks, steps in starts:
            settings = [*MODERN, "--set=schedule.max_steps=12", *WARM, "--resume"]
            if ranks == 1 and not torch.cuda.is_available():  # without starting anything
                train_alone(small_shards, run, *settings)
            else:
                process = start(
                    "--data", small_shards, "--out", run, *QUICK, *settings, ranks=ranks
                )
                output, _ = process.communicate(timeout=300)
                assert process.returncode == 0, output
            for step in checkpoint.steps(run):
                if step > steps:
                    shutil.rmtree(checkpoint.checkpoint_path(run, step))
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
    assert sum("step 4/4  loss" in output for output in outputs) == 1


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (("another hash", False), "the shards of rank 1 differ from those of rank 0"),
        (("this hash", True), "the run is on the machine of rank 1"),
    ],
)
def test_machines_whose_shards_or_runs_differ_do_not_start(
    other: tuple[str, bool], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = SimpleNamespace(sha256="this hash", folder=tmp_path)
    monkeypatch.setattr(run_folder, "on_all", lambda ranks, action: [action(), other])
    with pytest.raises(ForgeError, match=says):
        run_folder.check_machines(tmp_path, index, Ranks(0, 0, 2))  # type: ignore[arg-type]


def start_two_machines(
    folder: Path, ranks: int, more: Sequence[str] = (), restarts: int = 0
) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    launcher = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=test", endpoint)
    launcher += (f"--max-restarts={restarts}",)
    processes = []
    for node in ("a", "b"):
        arguments = ["--data", folder / node / "shards", "--out", folder / node / "run", *QUICK]
        arguments += ["--set=batch.micro_batch_size=1", "--set=schedule.max_steps=4", *more]
        processes.append(start(*arguments, ranks=ranks, launcher=launcher))
    return processes


def test_sigterm_to_torchrun_saves_on_the_way_out(small_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["--data", small_shards, "--out", run, "--resume", *TWO]
    process = start(*arguments, "--set=schedule.max_steps=100000")
    wait_for(lambda: steps_done(run) >= 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "with --resume continues" in output
    (stopped,) = metrics_of(run, "stop")
    assert checkpoint.steps(run)[-1] == stopped["step"]


def test_a_nan_on_one_rank_skips_the_step_on_all(small_shards: Path, tmp_path: Path) -> None:
    """With Muon, beside which embeddings and gains are AdamW's, and all that travels rounded."""
    run = tmp_path / "run"
    arguments = ["--data", small_shards, "--out", run, *TWO, "--set=optimizer.name=muon"]
    arguments += ["--set=precision=bfloat16", "--set=reduce_precision=bfloat16"]
    process = start(*arguments, "--set=optimizer.muon_warmup_steps=5", planted="nan")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    (skipped,) = metrics_of(run, "skip")
    assert skipped["step"] == 3
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
    assert "SIGABRT" not in output  # as of threads that outlive the interpreter, now and then
    assert checkpoint.steps(tmp_path / "run") == []  # it was to be the first


def test_a_full_disk_on_rank_0_is_a_warning_and_the_ranks_stay_together(
    small_shards: Path, tmp_path: Path
) -> None:
    """The others send their shares of a file that cannot be written."""
    run = tmp_path / "run"
    process = start("--data", small_shards, "--out", run, *TWO, planted="full")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "WARNING: step 4: checkpoint not saved: No space left on device" in output
    assert checkpoint.steps(run) == [8]


def test_a_shard_that_goes_away_ends_all_ranks_with_a_message(
    small_shards: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(small_shards, tmp_path / "shards")
    run = tmp_path / "run"
    arguments = ["--data", data, "--out", run, *TWO, "--set=schedule.max_steps=100000"]
    process = start(*arguments, "--set=evaluate.every_steps=100000")
    wait_for(lambda: steps_done(run) >= 5)
    shard = data / "train_000000.bin"
    shard.rename(data / "elsewhere")
    gone_at = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - gone_at < 30
    assert process.returncode == 1
    assert "cannot read a shard: No such file or directory" in output


def test_ranks_that_torchrun_may_restart_need_a_store_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else those of the second start would wait for the first ones: said before that happens."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_own_store()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ForgeError, match="could not meet again") as caught:
        check_own_store()
    assert OWN_STORE in str(caught.value.fix)


def test_two_machines_meet_again_after_a_rank_was_killed(
    small_shards: Path, tmp_path: Path
) -> None:
    """Two launchers, one folder of shards and one --out that both can see."""
    run = tmp_path / "run"
    for node in ("a", "b"):
        (tmp_path / node).mkdir()
        (tmp_path / node / "shards").symlink_to(small_shards)
        (tmp_path / node / "run").symlink_to(run)
    run.mkdir()
    more = ["--resume", "--set=schedule.max_steps=40", "--set=checkpoint.every_steps=2"]
    processes = start_two_machines(tmp_path, 1, more, restarts=3)
    wait_for(lambda: steps_done(run) >= 5)
    os.kill(ranks_of(processes[1])[0], signal.SIGKILL)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert checkpoint.steps(run)[-1] == 40
    assert any("Resuming from step" in output for output in outputs)


def test_what_the_machine_of_one_rank_refuses_is_raised_on_all(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="No such file or directory") as caught:
        on_all(Ranks(), (tmp_path / "gone").read_bytes)
    assert caught.value.where == str(tmp_path / "gone")


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
