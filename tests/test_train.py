"""forge-train end to end on the CPU: one rank and two, to the end, stopped, resumed, refused."""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import metrics_of
from safetensors.torch import load_file
from test_kept import copy_of

from pipeline.files import hold
from trainer import checkpoint, config_file, evaluate, train
from trainer import start as starting
from trainer.model import GPT2, LanguageModel
from trainer.ranks import Ranks
from trainer.run import Command
from trainer.windows import open_data

QUICK = [
    "--set=model.num_layers=2",
    "--set=model.embedding_size=32",
    "--set=model.context_length=64",
    "--set=batch.tokens_per_step=256",
    "--set=schedule.max_steps=8",
    "--set=schedule.warmup_steps=2",
    "--set=evaluate.every_steps=4",
    "--set=evaluate.num_tokens=640",
    "--set=evaluate.sample_tokens=4",
    "--set=checkpoint.every_steps=4",
    "--set=compile=off",
]


# What a step may depend on besides the weights and its windows: all of it at once.
MODERN = [
    "--set=model.family=qwen3",
    "--set=model.bias=false",
    "--set=optimizer.name=muon",
    "--set=optimizer.muon_warmup_steps=6",
]


def weights(run: Path) -> dict[str, torch.Tensor]:
    last = checkpoint.checkpoint_path(run, checkpoint.steps(run)[-1])
    return load_file(last / checkpoint.MODEL_FILE)


def same_weights(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture(scope="module")
def finished(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 8 steps in one process."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    train_alone(small_shards, run)
    return run


def train_alone(data: Path, run: Path, *more: str) -> None:
    from click.testing import CliRunner

    from trainer.cli import main

    result = CliRunner().invoke(
        main, ["tiny", "--data", str(data), "--out", str(run), *QUICK, *more]
    )
    assert result.exit_code == 0, result.output


def test_a_run_folder_is_complete(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "README.md",
        "config.toml",
        "metrics.jsonl",
        "data_index.json",
        "r50k_base.tiktoken",
        "checkpoints",
        "curves.svg",
        "tensorboard",
    }
    assert checkpoint.steps(finished) == [4, 8]
    readme = (finished / "README.md").read_text()
    assert "| model | time | steps | tokens | parameters | loss |" in readme
    evaluated = metrics_of(finished, "evaluate")
    assert f"{evaluated[-1]['loss']:.4f}" in readme


def test_metrics_tell_the_whole_story(finished: Path) -> None:
    steps = metrics_of(finished, "step")
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert all(row["tokens"] == 256 * row["step"] for row in steps)
    assert all(
        {"loss", "lr", "norm", "tokens_per_second", "mfu", "seconds"} <= {*row} for row in steps
    )
    assert [row["step"] for row in metrics_of(finished, "evaluate")] == [0, 4, 8]
    assert [row["step"] for row in metrics_of(finished, "checkpoint")] == [4, 8]
    assert all(row["text"] for row in metrics_of(finished, "sample"))
    first = metrics_of(finished, "evaluate")[0]
    assert abs(first["loss"] - math.log(50257)) < 0.1
    assert 0 < first["bits_per_byte"] < first["loss"] / math.log(2)


def test_a_complete_run_is_left_alone(finished: Path, small_shards: Path, forge) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    result = forge("train", "tiny", "--data", small_shards, "--out", finished, "--resume", *QUICK)
    assert result.exit_code == 0
    assert "complete" in result.output
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_is_not_overwritten(finished: Path, small_shards: Path, forge) -> None:
    result = forge("train", "tiny", "--data", small_shards, "--out", finished, *QUICK)
    assert result.exit_code == 1
    assert "add --resume" in result.output


def test_another_model_cannot_resume_a_run(finished: Path, small_shards: Path, forge) -> None:
    arguments = ["--data", small_shards, "--out", finished, "--resume", *QUICK]
    result = forge("train", "tiny", *arguments, "--set=model.num_layers=3")
    assert result.exit_code == 1
    assert "model.num_layers: 2 -> 3" in result.output


def test_other_shards_cannot_resume_a_run(
    finished: Path, tmp_path: Path, make_parquet, make_shards, documents, forge
) -> None:
    make_shards(make_parquet(tmp_path / "x.parquet", documents), tmp_path / "shards")
    result = forge(
        "train", "tiny", "--data", tmp_path / "shards", "--out", finished, "--resume", *QUICK
    )
    assert result.exit_code == 1
    assert "other shards" in result.output


def test_a_modern_run_cut_off_in_its_warm_ups_ends_with_the_same_bits(
    small_shards: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = (*MODERN, "--set=schedule.shape=wsd", "--set=schedule.decay_fraction=0.5")
    train_alone(small_shards, whole, *settings, "--set=checkpoint.every_steps=3")
    assert checkpoint.steps(whole) == [4, 6, 8]  # the rate falls after 4
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-25])  # the last line is cut in half
    train_alone(small_shards, run, *settings, "--resume")
    assert same_weights(run, whole)
    for kind in ("step", "evaluate"):
        ours, theirs = metrics_of(run, kind), metrics_of(whole, kind)
        assert [(r["step"], r["tokens"], r["loss"]) for r in ours] == [
            (r["step"], r["tokens"], r["loss"]) for r in theirs
        ]


def test_evaluation_changes_nothing_about_training(
    finished: Path, small_shards: Path, tmp_path: Path
) -> None:
    quiet = ["--set=evaluate.every_steps=100", "--set=evaluate.sample_tokens=0"]
    train_alone(small_shards, tmp_path / "run", *quiet)
    assert same_weights(tmp_path / "run", finished)


def test_validation_loss_does_not_depend_on_the_micro_batch(
    finished: Path, small_shards: Path, tmp_path: Path
) -> None:
    """10 windows of validation in micro-batches of 4 and of 1."""
    more = ["--set=batch.micro_batch_size=1", "--set=schedule.max_steps=1"]
    train_alone(small_shards, tmp_path / "run", *more)
    ours, theirs = (metrics_of(r, "evaluate")[0]["loss"] for r in (tmp_path / "run", finished))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_a_damaged_checkpoint_is_not_loaded(
    finished: Path, small_shards: Path, tmp_path: Path, forge
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    path = run / "checkpoints" / "step_00000008" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    result = forge("train", "tiny", "--data", small_shards, "--out", run, "--resume", *QUICK)
    assert result.exit_code == 1
    assert "checksum differs" in result.output
    assert "optimizer.safetensors" in result.output


def signal_at_start(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in this process gets the signal when it names itself: before its first step."""

    def say(text: str, **_: str) -> None:
        if text.startswith("Save now: kill -USR1"):
            os.kill(os.getpid(), number)

    if signal.getsignal(number) is signal.SIG_IGN:  # the tests themselves run under nohup
        signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr(starting, "say", say)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_leaves_cleanly(
    number: signal.Signals, small_shards: Path, tmp_path: Path, forge, monkeypatch
) -> None:
    run = tmp_path / "run"
    signal_at_start(number, monkeypatch)
    result = forge("train", "tiny", "--data", small_shards, "--out", run, *QUICK)
    assert result.exit_code == 0, result.output
    assert "with --resume continues" in result.output
    (stopped,) = metrics_of(run, "stop")
    assert stopped["signal"] == number.name
    assert checkpoint.steps(run) == [stopped["step"]]
    assert stopped["step"] < 4


def test_a_request_to_save_before_the_first_step_is_kept(
    small_shards: Path, tmp_path: Path, monkeypatch
) -> None:
    signal_at_start(signal.SIGUSR1, monkeypatch)
    train_alone(small_shards, tmp_path / "run", "--set=schedule.max_steps=2")
    assert [row["step"] for row in metrics_of(tmp_path / "run", "checkpoint")] == [1, 2]


WILD = ["--set=schedule.warmup_steps=0", "--set=optimizer.peak_lr=1e30"]


def test_ruined_weights_end_a_run_and_push_out_no_sound_ones(
    finished: Path, small_shards: Path, tmp_path: Path, forge
) -> None:
    """The update of step 5 is finite and ruins the weights; all that follow are skipped."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    more = ["--set=optimizer.peak_lr=1e30", "--set=checkpoint.every_steps=1"]
    arguments = ["--data", small_shards, "--out", run, "--resume", *QUICK, *more]
    result = forge("train", "tiny", *arguments, "--set=guard.max_skipped_steps=3")
    assert result.exit_code == 1
    assert "3 steps in a row not finite" in result.output
    assert [row["step"] for row in metrics_of(run, "skip")] == [6, 7, 8]
    assert checkpoint.steps(run) == [4, 5]  # 4 was sound, and nobody has shown that 5 is
    assert f"{checkpoint.checkpoint_path(run, 5)}; if it fails again, move that" in result.output


def test_a_run_that_ends_on_a_skipped_step_is_no_success(
    small_shards: Path, tmp_path: Path, forge
) -> None:
    run = tmp_path / "run"
    arguments = ["--data", small_shards, "--out", run, *QUICK, *WILD]
    result = forge("train", "tiny", *arguments, "--set=schedule.max_steps=4")
    assert result.exit_code == 1
    assert "the last step is not saved" in result.output
    assert checkpoint.steps(run) == []
    assert metrics_of(run, "evaluate")[-1]["loss"] is None
    assert "not finite" in (run / "README.md").read_text()


def test_a_full_disk_before_is_no_reason_of_a_skipped_step(
    small_shards: Path, tmp_path: Path, monkeypatch, forge
) -> None:
    """The disk refuses step 4, the update of step 7 ruins the weights, and step 8 is skipped."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr(train, "learning_rate", lambda *given: 1e30 if given[2] == 7 else 1e-4)
    result = forge("train", "tiny", "--data", small_shards, "--out", tmp_path / "run", *QUICK)
    assert result.exit_code == 1
    assert "WARNING: step 4: checkpoint not saved" in result.output
    assert "the last step is not saved: a loss or a norm is not finite" in result.output
    assert "lower optimizer.peak_lr" in result.output


def test_a_budget_of_hours_is_kept_by_the_real_clock(small_shards: Path, tmp_path: Path) -> None:
    """Twelve seconds; then it is complete."""
    run = tmp_path / "run"
    clocked = [f"--set=schedule.budget_hours={12 / 3600}", "--set=evaluate.every_steps=40"]
    settings = [s for s in QUICK if "max_steps" not in s] + clocked
    config = config_file.load("tiny", tuple(s.removeprefix("--set=") for s in settings))
    began = time.perf_counter()
    train.train(Command(config, "tiny", small_shards, run), began)
    assert 6 < time.perf_counter() - began <= 12
    steps = metrics_of(run, "step")
    if len(steps) >= 200:  # what is promised; a busy machine takes fewer
        assert steps[-1]["lr"] <= 0.02 * config.optimizer.peak_lr
    state = checkpoint.load_state(run, steps[-1]["step"])
    assert state.plan.stop == state.step
    train.train(Command(config, "tiny", small_shards, run, resume=True))
    assert metrics_of(run, "step") == steps  # it was complete


def test_weights_of_a_run_begin_another(
    finished: Path, small_shards: Path, tmp_path: Path, forge
) -> None:
    """From its latest checkpoint or a chosen one, with a schedule and an optimizer of its own."""
    again, first = tmp_path / "again", tmp_path / "first"
    path = checkpoint.checkpoint_path(finished, 4)
    for source, run in ((finished, again), (path, first)):
        arguments = ["--data", small_shards, "--out", run, "--from", source, "--resume"]
        result = forge("train", "tiny", *arguments, *QUICK, "--set=seed=7")
        assert result.exit_code == 0, result.output
        assert f"trained from {source}" in (run / "README.md").read_text()
    old, new = (
        {r["step"]: r["loss"] for r in metrics_of(x, "evaluate")} for x in (finished, again)
    )
    assert new[0] == pytest.approx(old[8], abs=1e-5)
    assert metrics_of(first, "evaluate")[0]["loss"] == pytest.approx(old[4], abs=1e-5)
    assert metrics_of(again, "step")[0]["lr"] == metrics_of(finished, "step")[0]["lr"]
    assert checkpoint.load_state(again, 8).weights_from == str(finished)


def test_a_run_from_weights_is_resumed_without_naming_them(
    finished: Path, small_shards: Path, tmp_path: Path, forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its first step; and with other weights it is refused."""
    arguments = ["train", "tiny", "--data", small_shards, "--out", tmp_path / "run", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(train, "run_steps", lambda *_: sys.exit(9))
        assert forge(*arguments, "--from", finished).exit_code == 9
    other = forge(*arguments, "--resume", "--from", tmp_path / "other")
    assert other.exit_code == 1
    assert f"--from: {finished} -> {tmp_path / 'other'}" in other.output
    result = forge(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    first, last = metrics_of(tmp_path / "run", "step")[0], metrics_of(finished, "step")[-1]
    assert first["loss"] == pytest.approx(last["loss"], abs=0.3)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_weights_that_an_edited_config_does_not_describe_are_refused(
    num_layers: int, small_shards: Path, tmp_path: Path, forge
) -> None:
    """Of a run of 1ed97cd, whose model stands in its config alone."""
    source = copy_of("run_gpt2_1ed97cd", tmp_path)
    path = source / "config.toml"
    path.write_text(path.read_text().replace("num_layers = 2", f"num_layers = {num_layers}"))
    arguments = ["--data", small_shards, "--out", tmp_path / "run", "--from", source]
    result = forge("train", path, *arguments)
    assert result.exit_code == 1
    assert "another model or optimizer" in result.output


def test_weights_in_transformers_layout_begin_a_run(
    either_run: Path, small_shards: Path, tmp_path: Path, forge
) -> None:
    exported, run = tmp_path / "exported", tmp_path / "run"
    done = forge("export", either_run, exported, "--dtype", "float32")
    assert done.exit_code == 0, done.output
    arguments = ["--data", small_shards, "--out", run, "--from", exported]
    result = forge("train", either_run / "config.toml", *arguments)
    assert result.exit_code == 0, result.output
    last = metrics_of(either_run, "evaluate")[-1]["loss"]
    assert metrics_of(run, "evaluate")[0]["loss"] == pytest.approx(last, abs=1e-5)


@pytest.mark.parametrize("source", ["another model", "no folder", "a run without checkpoints"])
def test_weights_that_do_not_fit_are_refused(
    source: str, finished: Path, small_shards: Path, tmp_path: Path, forge
) -> None:
    """By --check, too."""
    given, more = finished, ["--set=model.num_heads=2"]
    says = "num_heads: 4 -> 2"
    if source != "another model":
        given, more, says = tmp_path / "other", [], "no model there|no such folder"
    if source == "a run without checkpoints":
        given.mkdir()
        shutil.copy(finished / "config.toml", given)
        says = "no checkpoint yet"
    arguments = ["--data", small_shards, "--out", tmp_path / "run", "--from", given]
    for check in ([], ["--check"]):
        result = forge("train", "tiny", *arguments, *QUICK, *more, *check)
        assert result.exit_code == 1
        assert re.search(says, result.output), result.output
    assert not (tmp_path / "run").exists()


def test_check_shows_the_plan_and_then_what_the_shards_lack(small_shards: Path, forge) -> None:
    result = forge("train", "gpt2", "--data", small_shards, "--check")
    assert result.exit_code == 1
    plan, _, problem = result.output.partition("Error: ")
    assert "124,439,808" in plan
    assert "split has" in problem


def test_check_names_the_problems_of_machine_and_data_together(small_shards: Path, forge) -> None:
    given = "--set=batch.micro_batch_size=7"
    result = forge("train", "gpt2", "--data", small_shards, "--check", given)
    assert result.exit_code == 1
    for part in ("a micro-batch of 7", "the train split has"):
        assert part in result.output


def test_a_full_disk_in_mid_run_is_a_warning_and_at_the_end_an_error(
    small_shards: Path, tmp_path: Path, monkeypatch, forge
) -> None:
    calls = []

    def full(*arguments: object, **more: object) -> None:
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    result = forge("train", "tiny", "--data", small_shards, "--out", tmp_path / "run", *QUICK)
    assert len(calls) == 2
    assert "WARNING: step 4: checkpoint not saved" in result.output
    assert result.exit_code == 1
    assert "make room" in result.output


BAD_INPUT = {
    "no such folder": (["--data", "nowhere"], "no such folder of shards"),
    "unknown key": (["--set=optimizer.lr=1"], "optimizer.lr does not exist"),
    "one step too long": (
        ["--set=batch.tokens_per_step=64000000"],
        "lower batch.tokens_per_step to",
    ),
    "a seed below zero": (["--set=seed=-1"], "seed must be greater than or equal to 0"),
    "decay without end": (["--set=optimizer.weight_decay=nan"], "weight_decay must be"),
    "no memory for it": (["--set=model.embedding_size=4000000"], "out of memory"),
    "small vocabulary": (["--set=model.vocab_size=1000"], "the model 1,000"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_error(case: str, small_shards: Path, tmp_path: Path, forge) -> None:
    more, says = BAD_INPUT[case]
    result = forge("train", "tiny", "--data", small_shards, "--out", tmp_path / "r", *QUICK, *more)
    assert result.exit_code == 1
    assert says in result.output
    assert isinstance(result.exception, SystemExit)  # no traceback
    assert not (tmp_path / "r").exists()  # nothing half-written


def test_out_that_is_a_file_is_refused(small_shards: Path, tmp_path: Path, forge) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = forge("train", "tiny", "--data", small_shards, "--out", out, *QUICK)
        assert result.exit_code == 1
        assert "cannot make the folder" in result.output
    assert (tmp_path / "file").read_text() == "mine"


def test_rows_beyond_the_vocabulary_are_never_sampled(small_shards: Path, tmp_path: Path) -> None:
    """A model with many more ids than GPT-2 has: its samples still decode."""
    run = tmp_path / "run"
    more = ["--set=model.vocab_size=65536", "--set=evaluate.sample_tokens=40"]
    train_alone(small_shards, run, *more, "--set=schedule.max_steps=1")
    assert metrics_of(run, "sample")[0]["text"]


def test_two_trainers_do_not_write_one_run(
    finished: Path, small_shards: Path, forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "ENDING_SECONDS", 0.5)  # the patience with one that is ending
    with hold(finished, "forge-train"):
        result = forge(
            "train", "tiny", "--data", small_shards, "--out", finished, "--resume", *QUICK
        )
    assert result.exit_code == 1
    assert "another forge-train is writing this folder" in result.output


def test_check_prints_the_plan_and_trains_nothing(small_shards: Path, forge) -> None:
    quick = ["--set=evaluate.num_tokens=1024", "--set=batch.tokens_per_step=61440"]
    result = forge("train", "gpt2_medium", "--data", small_shards, "--check", *quick)
    assert result.exit_code == 0, result.output
    for part in (
        "354,823,168",
        "60 windows of 1,024, 61,440 tokens a step",
        "AdamW at 0.0003",
        "epochs",
        "checkpoints, GB",
    ):
        assert part in result.output


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (["schedule.max_steps=5", "schedule.warmup_steps=6"], "the rate never reaches its peak"),
        (["schedule.max_steps=5", "schedule.warmup_steps=5"], None),
        (["schedule.max_steps=20", "schedule.shape=wsd", "schedule.decay_fraction=0.6"], "never"),
        (["schedule.max_steps=100000"], "more than five epochs"),
    ],
)
def test_check_notes_likely_mistakes(
    small_shards: Path, forge, settings: list[str], note: str | None
) -> None:
    given = [f"--set={setting}" for setting in settings]
    result = forge("train", "tiny", "--data", small_shards, "--check", *given)
    assert note in result.output if note else "note: " not in result.output


def test_out_is_needed_to_train(small_shards: Path, forge) -> None:
    result = forge("train", "tiny", "--data", small_shards)
    assert result.exit_code == 2
    assert "--out is missing" in result.output


def test_every_line_of_metrics_is_one_json_object(finished: Path) -> None:
    for line in (finished / "metrics.jsonl").read_text().splitlines():
        assert {"kind", "step", "tokens", "seconds"} <= json.loads(line).keys()


ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="traced as in bfloat16")
# Enough to learn something; the evaluation's second micro-batch is not full.
FOUR = ["--set=schedule.max_steps=4", "--set=evaluate.num_tokens=320"]


@pytest.fixture(scope="module")
def in_float32(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "float32"
    train_alone(small_shards, run, *FOUR)
    return run


@pytest.mark.parametrize(
    ("compiled", "precision"),
    [
        ("off", "bfloat16"),
        pytest.param("full", "float32", marks=ON_A_GPU),
        ("full", "bfloat16"),
    ],
)
def test_every_fallback_learns_what_float32_learns(
    compiled: str,
    precision: str,
    in_float32: Path,
    small_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cards without bfloat16, and no compiler."""
    if compiled == "full" and not torch.cuda.is_available():
        # Traced and cut as on a GPU, without the compiler's C++, which takes long.
        traced = partial(torch.compile, backend="aot_eager_decomp_partition")
        monkeypatch.setattr(torch, "compile", traced)
    train_alone(
        small_shards,
        tmp_path / "run",
        *FOUR,
        f"--set=compile={compiled}",
        f"--set=precision={precision}",
    )
    runs = in_float32, tmp_path / "run"
    losses = [[row["loss"] for row in metrics_of(run, "evaluate")] for run in runs]
    assert losses[0][-1] < losses[0][0] - 0.01, losses
    assert losses[1] == pytest.approx(losses[0], abs=3e-3)
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path / "run").values())


@pytest.mark.parametrize(("gain", "chosen"), [(1.1, "int8"), (1.09, "float32")])
def test_integers_are_taken_where_they_gain_and_then_for_all_steps_of_the_run(
    gain: float, chosen: str, small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = tmp_path / "run", list[int]()

    def linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return F.linear(x, layer.weight, layer.bias)

    def speedup(model: LanguageModel, windows: int) -> float:
        tokens = torch.zeros(windows, 8, dtype=torch.long)
        model(tokens, tokens).backward()
        return gain

    monkeypatch.setattr("trainer.int8.available", lambda *_: True)
    monkeypatch.setattr("trainer.int8.speedup", speedup)
    monkeypatch.setattr("trainer.int8.linear", linear)
    options = ["--set=schedule.max_steps=4", "--set=checkpoint.every_steps=2"]
    train_alone(small_shards, run, *options)
    two_layers = 2 * 4  # linear ones
    per_step = metrics_of(run, "start")[0]["accumulation_steps"] * two_layers
    assert len(calls) == (4 * per_step if chosen == "int8" else 0)  # and none of an evaluation
    train_alone(small_shards, tmp_path / "plain", *options, "--set=precision=float32")
    losses = [
        [row["loss"] for row in metrics_of(each, "step")] for each in (run, tmp_path / "plain")
    ]
    assert losses[0] == losses[1]  # nothing of the measurement is left
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    monkeypatch.setattr("trainer.int8.speedup", lambda *_: 1 / gain)  # nobody asks again
    train_alone(small_shards, run, *options, "--resume")
    assert len(calls) == (6 * per_step if chosen == "int8" else 0)
    state = json.loads((run / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert state["precision"] == chosen
    assert [row["precision"] for row in metrics_of(run, "start")] == [chosen, chosen]


@pytest.mark.parametrize("check", [["--check"], []])
def test_integers_are_refused_where_nothing_can_multiply_them(
    check: list[str], small_shards: Path, tmp_path: Path, forge
) -> None:
    out, asked = tmp_path / "run", ["--set", "precision=int8"]
    result = forge("train", "forge_tiny", "--data", small_shards, "--out", out, *asked, *check)
    assert result.exit_code == 1
    assert "int8 is for a GPU" in result.output
    assert not (out / "metrics.jsonl").exists()


def test_an_evaluation_computes_no_gradients(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_file.load("tiny", tuple(option.removeprefix("--set=") for option in QUICK))
    products = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (products.append(1), multiply(*a, **k))[1])
    model = GPT2(config.model)
    model.init_weights(0)
    data = open_data(config, small_shards)
    evaluate.validation_loss(model, data, config, 4, Ranks())
    assert not products
    inputs = torch.zeros(1, 64, dtype=torch.int64)
    model(inputs, inputs).backward()
    assert products  # that is how the head's gradient is computed
