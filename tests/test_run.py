"""Laws of a run's folder: killed while it is begun, gone on with or extended, nothing is lost."""

import json
from pathlib import Path

import pytest
from conftest import metrics_of
from test_train import QUICK

from trainer import checkpoint
from trainer import config as configs
from trainer.metrics import read_metrics
from trainer.run import read_past, set_aside_decay


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
    assert "other things" in result.output
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


def test_the_guard_gets_a_whole_window_of_earlier_losses(tmp_path: Path) -> None:
    steps = ({"kind": "step", "step": n, "loss": 3.0} for n in range(1, 6001))
    (tmp_path / "metrics.jsonl").write_text(rows(*steps))
    config = configs.load("tiny", ("guard.spike_window_steps=5000",))
    last = checkpoint.State(6000, 0, 0.0)
    assert len(read_past(tmp_path, config, last, replay=True).losses) == 5001
