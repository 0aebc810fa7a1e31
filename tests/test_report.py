"""Watchers: what a run shows of itself, and that nothing which it is shown with can hold it up."""

import fcntl
import json
import os
import pty
import shutil
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import metrics_of, trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import QUICK

from trainer import config_file, report, trackers
from trainer.checkpoint import State
from trainer.report import Terminal, Tracker, say
from trainer.schedule import Clock, first_plan

HANGS = "import time\ndef init(**given): time.sleep(1000)\n"
# Writes down what it is called with.
RECORDS = """
import json, os, time
def note(*call): print(json.dumps(call), file=open(os.environ["CALLS"], "a"))
def init(**given): note("init", given)
def log(figures, step): note("log", step, figures)
def finish(): note("finish")
"""


def step_row(step: int, **values: Any) -> dict[str, Any]:
    row = {"kind": "step", "step": step, "tokens": step * 100, "seconds": 2.0 * step}
    figures = {"loss": 5 - step / 1e4, "lr": 1e-3, "norm": 1.0, "tokens_per_second": 1e5}
    return row | figures | {"mfu": None} | values


def library(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name, for this process and those that it starts."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize(
    ("steps", "losses"),
    [(0, [10.8]), (1, [10.8, None]), (9, [10.8, 9.0]), (20_000, [10.8, 5.0, 3.0])],
)
def test_the_picture_is_small_however_long_the_run_and_leaves_out_what_is_not_finite(
    steps: int, losses: list[float | None], tmp_path: Path
) -> None:
    rows = [step_row(step, lr=0.0 if steps == 1 else 1e-3) for step in range(1, steps + 1)]
    for n, loss in enumerate(losses):
        rows.append(step_row(n * steps) | {"kind": "evaluate", "loss": loss})
    drawn = trackers.picture(rows)
    drawn.savefig(tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size < 60_000
    *training, validation = drawn.axes[0].lines
    assert [len(line.get_xdata()) for line in training] == [min(steps, 600)] * (steps > 0)
    assert list(validation.get_ydata()) == [loss for loss in losses if loss is not None]


def test_a_picture_that_cannot_be_written_is_drawn_at_the_next_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = step_row(1) | {"kind": "evaluate"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(evaluated) + "\n")
    (tmp_path / "curves.svg.partial").mkdir()  # in the way, as a full disk is

    def rows() -> Iterator[dict[str, Any]]:
        yield evaluated
        (tmp_path / "curves.svg.partial").rmdir()
        yield evaluated

    monkeypatch.setattr(trackers, "rows", rows)
    trackers.draw_curves(str(tmp_path))
    assert (tmp_path / "curves.svg").is_file()


def test_a_resumed_run_continues_its_curves_in_tensorboard(tmp_path: Path) -> None:
    for done, last in ((-1, 8), (5, 9)):  # steps 6 to 8 are lost, and trained again
        given = {"run": str(tmp_path), "name": "run", "config": {"seed": 7}, "step": done}
        tracker = Tracker("tensorboardX", given)
        for step in range(max(done, 0) + 1, last + 1):
            tracker(step_row(step, loss=step + max(done, 0)))
        tracker({"kind": "sample", "step": last, "text": "A *text*\nof two lines", "seconds": 0.0})
        report.close([tracker])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(n, n) for n in range(1, 6)] + [(n, n + 5) for n in range(6, 10)]
    for tag, text in (("config", b"    seed = 7\n"), ("sample", b"    A *text*\n    of two lines")):
        assert events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val == [text]


def test_a_tracker_that_hangs_neither_slows_a_run_nor_outlives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    library(tmp_path, "wandb", HANGS, monkeypatch)
    monkeypatch.setattr(report, "CLOSE_SECONDS", 0.2)
    tracker = Tracker("wandb", {"run": str(tmp_path), "name": "run", "config": {}, "step": -1})
    for step in range(2000):
        tracker(step_row(step))
    report.close([tracker])
    assert tracker.child.wait(10) == -9
    said = capfd.readouterr().out.splitlines()
    assert [line.split(":")[1] for line in said] == [" wandb does not keep up", " wandb was ended"]


def test_a_run_is_tracked_under_one_name_and_shows_its_curves(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path, "trackio", RECORDS, monkeypatch)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    run = trained(small_shards, tmp_path / "a run", "--set=report.to=trackio")
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    trained(small_shards, run, "--set=report.to=trackio", "--resume")
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    begun = [given for call, *given in calls if call == "init"]
    assert begun[0] == begun[1]
    assert begun[0][0]["name"] == f"a-run-{metrics_of(run, 'start')[0]['started_at']}"
    assert begun[0][0]["resume"] == "allow"
    logged = [
        (given[0], given[1]["validation/loss"])
        for call, *given in calls
        if call == "log" and "validation/loss" in given[1]
    ]
    evaluated = {row["step"]: row["loss"] for row in metrics_of(run, "evaluate")}
    assert [step for step, _ in logged] == [0, 4, 8, 8]
    assert all(evaluated[step] == pytest.approx(loss, rel=1e-4) for step, loss in logged)
    assert sum(call == ["finish"] for call in calls) == 2
    assert "(curves.svg)" in (run / "README.md").read_text()
    assert "validation loss" in (run / "curves.svg").read_text()


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_made(
    small_shards: Path, tmp_path: Path, forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = ("tiny", "--data", small_shards, "--out", tmp_path / "run", *QUICK)
    result = forge("train", *arguments, "--set=report.to=wandb")
    assert result.exit_code == 1
    assert "pip install wandb" in result.output
    assert not (tmp_path / "run").exists()


def test_steps_are_counted_to_the_end_that_the_clock_will_make(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_file.load(
        "forge_tiny", ("schedule.budget_hours=0.1", "evaluate.every_steps=60")
    )
    state = State(config.model, "float32", "", {}, first_plan(config))
    clock = Clock(config, time.perf_counter() - 100)
    watch = Terminal(config, state, clock)
    watch(step_row(50))
    clock.steps.extend([2.0] * 20)  # 260 seconds are left for 130 steps, or fewer
    watch({"kind": "checkpoint", "step": 50, "save_seconds": 0.5})
    unknown, known = (line.split()[1] for line in capsys.readouterr().out.splitlines())
    assert unknown == "50/330"
    assert 140 <= int(known.removeprefix("50/~")) <= 180


def test_on_a_terminal_a_line_renews_itself_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_file.load("tiny")
    state = State(config.model, "float32", "", {}, first_plan(config))
    clock = Clock(config, time.perf_counter() - 10)
    clock.steps.append(1.0)
    controller, terminal = pty.openpty()
    monkeypatch.delenv("COLUMNS", raising=False)
    with os.fdopen(terminal, "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "__stdout__", file)
        monkeypatch.setattr(report, "PRINT_SECONDS", 0.0)
        watch = Terminal(config, state, clock)
        for columns in (100, 30):
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            watch(step_row(3, mfu=0.45))
        watch({"kind": "checkpoint", "step": 3, "save_seconds": 0.5})
        say("", end="")
        raw = ""
        while raw.count("\r\x1b[K") < 4:  # it comes in pieces
            raw += os.read(controller, 10_000).decode()
    wide, narrow, saved, rest = raw.split("\r\x1b[K")[1:]
    assert "eta 0:" in wide
    assert wide.endswith("mfu 45.0%")
    assert len(narrow) == 29
    assert wide.startswith(narrow)
    assert saved.endswith("checkpoint saved in 0.5 s\r\n")
    assert rest == ""
