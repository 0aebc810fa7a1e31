"""Laws of a run's folder: killed while it is begun, gone on with or extended, nothing is lost."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import metrics_of
from test_train import QUICK

from pipeline import shards
from pipeline.errors import ForgeError
from trainer import checkpoint, loop
from trainer import config as configs
from trainer.metrics import Metrics, read_metrics
from trainer.run import (
    Past,
    RunLock,
    check_room,
    make_folder,
    open_run,
    read_past,
    run_files,
    set_aside_decay,
)


def rows(*given: dict) -> str:
    return "".join(json.dumps({"tokens": 0, "seconds": 0.0} | row) + "\n" for row in given)


def make_checkpoint(run: Path, step: int, decayed: float) -> None:
    path = checkpoint.checkpoint_path(run, step)
    path.mkdir(parents=True)
    state = {"step": step, "tokens": 0, "seconds": float(step), "decayed": decayed}
    (path / checkpoint.STATE_FILE).write_text(json.dumps(state))


@pytest.mark.parametrize(
    "left",
    [
        ["config.toml.123.partial"],
        ["r50k_base.tiktoken", "data_index.json.123.partial"],
        ["r50k_base.tiktoken", "data_index.json", "metrics.jsonl"],
    ],
)
def test_a_start_that_was_killed_while_it_made_the_folder_is_started_again(
    left: list[str], small_shards: Path, tmp_path: Path, forge
) -> None:
    run = tmp_path / "a run"
    run.mkdir()
    for name in left:
        (run / name).write_text("")
    short = ["--set=schedule.max_steps=1", "--set=evaluate.num_tokens=64"]
    result = forge("train", "tiny", "--data", small_shards, "--out", run, *QUICK, *short)
    assert result.exit_code == 0, result.output
    assert checkpoint.steps(run) == [1]
    assert not list(run.glob("*.partial"))


def test_a_folder_with_other_things_is_no_place_for_a_run(
    small_shards: Path, tmp_path: Path, forge
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = forge("train", "tiny", "--data", small_shards, "--out", tmp_path, *QUICK)
    assert result.exit_code == 1
    assert "other things, and no run: mine.txt" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_has_a_config_has_the_row_of_its_start(
    small_shards: Path, tmp_path: Path, forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By that row torchrun's own restart knows a run that was killed before its first step."""
    from trainer import loop

    def killed(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "introduce", killed)
    run = tmp_path / "run"
    forge("train", "tiny", "--data", small_shards, "--out", run, *QUICK)
    assert (run / "config.toml").exists()
    assert len(metrics_of(run, "start")) == 1


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    good = rows({"kind": "step", "step": 1}, {"kind": "step", "step": 2})
    bad = b'\xff\xfe\x00\nnull\n5\n{"kind": "step"}\n{"kind": "step", "step": "x"}\n\0\0\n{"ki'
    (tmp_path / "metrics.jsonl").write_bytes(good.encode() + bad)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_what_a_start_did_not_repeat_is_repeated_by_no_later_one(tmp_path: Path) -> None:
    """Resumed in the decay, ended, extended from step 4, and killed there after step 6."""
    (tmp_path / "metrics.jsonl").write_text(
        rows(
            {"kind": "step", "step": 4, "decayed": 1.0, "loss": 3.0},
            {"kind": "start", "step": 4, "replay": [0.9, 0.8, 0.7, 0.6]},
            {"kind": "start", "step": 4},
            {"kind": "step", "step": 5, "decayed": 1.0, "loss": 3.0},
            {"kind": "step", "step": 6, "decayed": 1.0, "loss": 3.0},
        )
    )
    last = checkpoint.State(4, 0, 0.0)
    assert read_past(tmp_path, configs.load("tiny"), last, replay=True).replay == (1.0, 1.0)


def test_an_extension_that_is_killed_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder has all of the earlier end, and the time of its decay does not count."""
    for step, decayed in ((4, 1.0), (8, 0.5), (12, 0.2), (16, 0.0)):
        make_checkpoint(tmp_path, step, decayed)
    steps = ({"kind": "step", "step": n, "seconds": float(n), "loss": 3.0} for n in range(1, 17))
    text = rows(*steps)
    (tmp_path / "metrics.jsonl").write_text(text)
    rename = Path.rename

    def killed_at_second(self: Path, target: Path) -> Path:
        if self.name == "step_00000012":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed_at_second)
    with pytest.raises(KeyboardInterrupt):
        set_aside_decay(tmp_path)
    monkeypatch.undo()
    last = set_aside_decay(tmp_path)
    assert (last.step, checkpoint.steps(tmp_path)) == (4, [4])
    (aside,) = tmp_path.glob("ended_at_step_*")
    assert checkpoint.steps(aside) == [8, 12, 16]
    assert (aside / "metrics.jsonl").read_text() == text
    past = read_past(tmp_path, configs.load("tiny"), last, replay=True)
    assert (past.seconds, past.replay) == (4.0, ())


def reopened(
    data: Path, run: Path, before: list[str], ends: list[tuple[int, float]], now: list[str]
) -> Past:
    """open_run() with `now` of a run that `before` made, with checkpoints (step, decayed)."""
    small = ("model.context_length=64", "batch.tokens_per_step=256")
    run.mkdir(exist_ok=True)
    (run / "config.toml").write_text(configs.load("tiny", (*small, *before)).to_toml())
    for step, decayed in ends:
        make_checkpoint(run, step, decayed)
    index, hold = shards.load_index(data), RunLock(run)
    try:
        return open_run(configs.load("tiny", (*small, *now)), index, run, True, hold)
    finally:
        hold.release()


CLOCK, STEPS = "schedule.budget_hours=", "schedule.max_steps="
BOTH = ["schedule.shape=wsd", "schedule.decay_fraction=0.2", STEPS + "80", CLOCK + "1"]


@pytest.mark.parametrize(
    ("ends", "now", "extends"),
    [
        ([(40, 1.0), (80, 0.0)], [CLOCK + "2"], False),  # ended by its steps,
        ([(40, 1.0), (72, 0.5)], [CLOCK + "2"], False),  # or would be,
        ([(40, 1.0), (80, 0.0)], [STEPS + "99"], True),
        ([(40, 1.0), (72, 0.5)], [STEPS + "99"], True),
        ([(40, 1.0), (60, 0.0)], [CLOCK + "2"], True),  # ended by the clock,
        ([(40, 1.0), (60, 0.4)], [CLOCK + "2"], True),  # or would be
        ([(40, 1.0), (60, 0.0)], [STEPS + "99"], False),
        ([(40, 1.0), (72, 0.5)], [STEPS + "99", CLOCK + "0.5"], False),
        ([(40, 1.0), (60, 0.0)], [CLOCK + "2", STEPS + "70"], False),
    ],
)
def test_a_run_is_extended_by_more_of_what_would_end_it(
    ends: list[tuple[int, float]], now: list[str], extends: bool, small_shards: Path, tmp_path: Path
) -> None:
    past = reopened(small_shards, tmp_path, BOTH, ends, [*BOTH, *now])
    assert (past.extends, past.checkpoint) == (extends, 40 if extends else ends[-1][0])


def test_a_run_does_not_begin_anew_where_its_checkpoints_are_gone(
    small_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    reopened(small_shards, run, [STEPS + "80"], [(40, 1.0)], [STEPS + "80"])
    row = {"kind": "checkpoint", "step": 40, "seconds": 1.0, "tokens": 0}
    (run / "metrics.jsonl").write_text(rows(row))
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    for _ in range(2):  # gone; then a link to a disk that is not there
        with pytest.raises(ForgeError, match=r"gone: metrics\.jsonl tells of one at step 40"):
            reopened(small_shards, run, [STEPS + "80"], [], [STEPS + "80"])
        if not (run / "checkpoints").is_symlink():
            (run / "checkpoints").symlink_to(tmp_path / "nowhere")
    assert (run / "metrics.jsonl").read_text() == rows(row)


def test_what_ended_a_run_is_judged_by_the_config_that_it_had(
    small_shards: Path, tmp_path: Path
) -> None:
    now = ["schedule.shape=wsd", STEPS + "80"]
    ended = reopened(small_shards, tmp_path / "run", BOTH, [(40, 1.0), (50, 0.0)], now)
    assert ended.by_clock


@pytest.mark.parametrize(
    ("before", "decayed", "now", "problem"),
    [
        (["schedule.shape=cosine"], 1.0, [CLOCK + "1"], "shape is cosine"),
        ([CLOCK + "1"], 1.0, [], "shape is wsd"),
        ([CLOCK + "1", "schedule.shape=wsd"], 0.4, ["schedule.shape=wsd"], "falling by the clock"),
    ],
)
def test_a_learning_rate_does_not_change_its_shape(
    before: list[str],
    decayed: float,
    now: list[str],
    problem: str,
    small_shards: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(ForgeError, match=problem):
        reopened(small_shards, tmp_path, before, [(40, decayed)], now)


def test_a_longer_cosine_says_where_the_rate_jumps(small_shards: Path, tmp_path: Path) -> None:
    before = ["schedule.shape=cosine", STEPS + "70", "schedule.warmup_steps=5"]
    assert reopened(small_shards, tmp_path, before, [(70, 1.0)], before).changes == ()
    longer = [*before, STEPS + "140"]
    changes = reopened(small_shards, tmp_path, before, [], longer).changes
    assert "learning rate of step 71: 3.00e-04 -> 1.70e-03" in changes


def test_of_two_first_starts_at_once_the_second_leaves_the_run_alone(
    small_shards: Path, tmp_path: Path
) -> None:
    config, index, run = configs.load("tiny"), shards.load_index(small_shards), tmp_path / "run"
    first, second = RunLock(run), RunLock(run)
    pasts = [open_run(config, index, run, False, hold) for hold in (first, second)]
    make_folder(run, pasts[0], first, lambda: None, run_files(config, index, ""))
    first.release()
    with pytest.raises(ForgeError, match="another start has made a run"):
        make_folder(run, pasts[1], second, lambda: None, run_files(config, index, "# other\n"))
    second.release()
    assert not (run / "config.toml").read_text().startswith("# other")


def test_a_line_that_a_full_disk_has_cut_costs_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics(tmp_path, True)
    metrics.log("step", 1, 10, 0.0)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))  # the kernel refuses more
    try:
        metrics.log("step", 2, 20, 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    metrics.log("step", 3, 30, 0.0)
    metrics.log("step", 4, 40, 0.0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3, 4]
    assert "step 2: not written" in capsys.readouterr().out


def test_a_disk_without_room_is_an_error_before_anything_is_made(
    small_shards: Path, tmp_path: Path, forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 bytes a parameter, for two checkpoints and one being written; what is there counts."""
    arguments = ["--data", small_shards, "--out", tmp_path / "run", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
        result = forge("train", "tiny", *arguments)
    assert result.exit_code == 1
    assert "checkpoints take 0.06 more" in result.output
    assert not (tmp_path / "run").exists()
    parameters = 50257 * 32 + 64 * 32 + 2 * (12 * 32**2 + 13 * 32) + 64
    half = checkpoint.checkpoint_path(tmp_path, 4).with_suffix(".partial")
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(bytes(10**6))
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path, (free + 10**6) // 3 - 10**7, 2)
    with pytest.raises(ForgeError, match="GB left"):
        check_room(tmp_path, (free + 10**6) // 3 + 10**7, 2)
    assert 3 * 12 * parameters == pytest.approx(0.06e9, abs=0.005e9)


def test_files_of_a_run_that_are_removed_meanwhile_are_written_again(
    small_shards: Path, tmp_path: Path, forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, begin = tmp_path / "run", loop.Trainer.loop

    def removed(self: loop.Trainer, *arguments: object) -> None:
        shutil.rmtree(run)
        begin(self, *arguments)
        with pytest.raises(ForgeError, match="another forge-train is writing it"):
            RunLock(run).take()

    arguments = ["--data", small_shards, "--out", run, *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "loop", removed)
        result = forge("train", "tiny", *arguments)
    assert result.exit_code == 0, result.output
    assert "data_index.json, config.toml of" in result.output
    again = forge("train", "tiny", *arguments, "--resume")
    assert "The run is complete" in again.output


def test_a_run_says_what_of_its_model_is_another(small_shards: Path, tmp_path: Path, forge) -> None:
    arguments = ["--data", small_shards, "--out", tmp_path / "run", *QUICK]
    assert forge("train", "tiny", *arguments, "--set=schedule.max_steps=1").exit_code == 0
    result = forge("train", "tiny", *arguments, "--resume", "--set=model.num_layers=3")
    assert result.exit_code == 1
    assert "model.num_layers: 2 -> 3" in result.output


def test_a_run_without_a_clock_may_be_extended_with_one(small_shards: Path, tmp_path: Path) -> None:
    before = [setting for setting in BOTH if CLOCK not in setting]
    ends = [(40, 1.0), (80, 0.0)]
    past = reopened(small_shards, tmp_path, before, ends, [*before, STEPS + "99", CLOCK + "1"])
    assert past.extends


@pytest.mark.parametrize("stdout", ["/dev/full", "closed pipe"])
def test_a_log_that_cannot_be_written_ends_no_run(
    stdout: str, small_shards: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "trainer.cli", "tiny", "--data", str(small_shards)]
    command += ["--out", str(tmp_path / "run"), *QUICK]
    reading, writing = os.pipe()
    os.close(reading)
    with Path("/dev/full").open("w") as full:
        into = full if stdout == "/dev/full" else writing
        ran = subprocess.run(command, stdout=into, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert ran.stderr.count("Error") == 0, ran.stderr
    assert checkpoint.steps(tmp_path / "run") == [4, 8]
