"""What users and other programs rely on, whatever the code inside looks like.

The folders in tests/fixtures/ were made by the programs of commit 1ed97cd, with the commands in
make_1ed97cd.sh there. The same programs gave the figures that they are compared with.
"""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from conftest import ROOT, metrics_of

from pipeline import tokenizer

Forge = Callable[..., Result]

FIXTURES = ROOT / "tests" / "fixtures"
VOCABULARY = "r50k_base.tiktoken"
GPT2, QWEN3 = "run_gpt2_1ed97cd", "run_qwen3_muon_1ed97cd"
OLD_RUNS = [GPT2, QWEN3]
# forge-eval --num-tokens 7552 on the val split, and on the train split: nats a token.
LOSSES = {GPT2: (7.152118, 5.353293), QWEN3: (6.980555, 4.839942)}
# forge-sample --temperature 0 --repetition-penalty 1.3 --max-tokens 16. The likeliest token's logit
# is always at least 0.02 above the next one's: much more than rounding moves it.
TEXTS = {
    GPT2: {
        "Raise": '.\nReturn the list is a "x, and be same object of the',
        "This method": '.\nReturn the list is a "x, and be same object of the',
    },
    QWEN3: {
        "Raise": ' "__" is the file, and a class.\n\nReturn an string',
        "This method": '.\n\nReturn a "__" is the file, and used to be',
    },
}
# A run of 8 steps, with checkpoints at 4 and 8.
SMALL = [
    "--set=model.num_layers=1",
    "--set=model.num_heads=2",
    "--set=model.embedding_size=16",
    "--set=model.context_length=32",
    "--set=batch.tokens_per_step=128",
    "--set=schedule.max_steps=8",
    "--set=schedule.warmup_steps=2",
    "--set=evaluate.every_steps=4",
    "--set=evaluate.num_tokens=320",
    "--set=evaluate.sample_tokens=4",
    "--set=checkpoint.every_steps=4",
]


def copy_of(name: str, folder: Path) -> Path:
    """A fixture with its vocabulary, which is left out of git."""
    copy = Path(shutil.copytree(FIXTURES / name, folder / name))
    (copy / VOCABULARY).write_bytes(tokenizer.vocabulary())
    return copy


def json_lines(result: Result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def is_refused(result: Result, word: str) -> bool:
    """Whether it ended with one message, exit code 1 and no traceback."""
    ended = result.exception is None or isinstance(result.exception, SystemExit)
    return ended and result.exit_code == 1 and word in result.output.lower()


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the old shards and the old runs. Not to be written to."""
    folder = tmp_path_factory.mktemp("old")
    for name in ("shards_1ed97cd", *OLD_RUNS):
        copy_of(name, folder)
    return folder


@pytest.fixture(scope="module")
def old_shards(old: Path) -> Path:
    return old / "shards_1ed97cd"


@pytest.fixture(scope="module")
def fresh(old_shards: Path, tmp_path_factory: pytest.TempPathFactory, forge: Forge) -> Path:
    """A run of today, on the old shards. Not to be written to."""
    run = tmp_path_factory.mktemp("fresh") / "run"
    result = forge("train", "tiny", "--data", old_shards, "--out", run, *SMALL)
    assert result.exit_code == 0, result.output
    return run


# ---------------------------------------------------------------------------------------------
# Runs of 1ed97cd


@pytest.mark.parametrize(("split", "place"), [("val", 0), ("train", 1)])
def test_old_runs_have_their_losses(
    split: str, place: int, old: Path, old_shards: Path, forge: Forge
) -> None:
    """Named as a run, and by the checkpoint's own folder."""
    runs = [old / name for name in OLD_RUNS]
    models = runs if split == "val" else [checkpoint_of(run, 320) for run in runs]
    arguments = ("--data", old_shards, "--split", split, "--num-tokens", 7552, "--json")
    rows = json_lines(forge("eval", *models, *arguments))
    for name, row in zip(OLD_RUNS, rows, strict=True):
        assert row["loss"] == pytest.approx(LOSSES[name][place], abs=1e-4)
        assert row["step"] == 320
        assert row["split"] == split


@pytest.mark.parametrize("name", OLD_RUNS)
def test_old_runs_write_the_same_greedy_text(name: str, old: Path, forge: Forge) -> None:
    options = ("--temperature", 0, "--repetition-penalty", 1.3, "--max-tokens", 16)
    for prompt, text in TEXTS[name].items():
        result = forge("sample", old / name, "--prompt", prompt, *options)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{prompt}{text}\n"


@pytest.mark.parametrize("name", OLD_RUNS)
def test_an_export_of_an_old_run_is_the_same_model(
    name: str, old: Path, old_shards: Path, tmp_path: Path, forge: Forge
) -> None:
    out = tmp_path / "hf"
    result = forge("export", old / name, out, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    (row,) = json_lines(forge("eval", out, "--data", old_shards, "--json"))
    assert row["loss"] == pytest.approx(LOSSES[name][0], abs=1e-4)


@pytest.mark.parametrize("name", OLD_RUNS)
def test_an_old_run_is_not_resumed_but_named_in_from(
    name: str, old_shards: Path, tmp_path: Path, forge: Forge
) -> None:
    run = copy_of(name, tmp_path)
    config = run / "config.toml"
    result = forge("train", config, "--data", old_shards, "--out", run, "--resume")
    assert is_refused(result, "--from")


@pytest.mark.parametrize("name", OLD_RUNS)
def test_a_new_run_begins_from_the_weights_of_an_old_one(
    name: str, old: Path, old_shards: Path, tmp_path: Path, forge: Forge
) -> None:
    """With the old run's own config, which has keys that are gone since, at their defaults."""
    run = tmp_path / "run"
    arguments = ("--from", old / name, "--data", old_shards, "--out", run)
    short = "--set=schedule.max_steps=2"
    result = forge("train", old / name / "config.toml", *arguments, short)
    assert result.exit_code == 0, result.output
    steps = metrics_of(run, "step")
    assert [row["step"] for row in steps] == [1, 2]
    assert steps[0]["loss"] == pytest.approx(LOSSES[name][1], abs=0.5)
    assert name in (run / "README.md").read_text()
    assert checkpoint_of(run, 2).is_dir()


# ---------------------------------------------------------------------------------------------
# Shards of 1ed97cd


def test_old_shards_are_sound(old_shards: Path, forge: Forge) -> None:
    assert forge("prep", "verify", old_shards).exit_code == 0
    (found,) = json_lines(forge("prep", "verify", old_shards, "--json"))
    assert {"folder", "num_shards", "num_bytes", "problems"} <= {*found}
    assert found["problems"] == []


def test_info_has_its_keys_and_the_figures_of_the_old_shards(
    old_shards: Path, forge: Forge
) -> None:
    result = forge("prep", "info", old_shards, "--json")
    assert result.exit_code == 0, result.output
    info = json.loads(result.stdout)
    assert {*info} >= {
        "folder",
        "source",
        "options",
        "tokenizer",
        "skipped",
        "splits",
        "epochs",
        "index_sha256",
    }
    assert {"name", "kind", "hub", "num_files"} <= {*info["source"]}
    assert {"name", "vocab_size", "eot_token", "sha256"} <= {*info["tokenizer"]}
    wanted = {
        "train": {"num_tokens": 33144, "num_documents": 189, "text_bytes": 137929},
        "val": {"num_tokens": 7557, "num_documents": 44, "text_bytes": 31634},
    }
    for split, figures in wanted.items():
        row = info["splits"][split]
        assert row.items() >= {"num_shards": 1, **figures}.items()
        assert {"bytes_per_token", "shard_tokens_min", "shard_tokens_max"} <= {*row}
        assert {"min", "median", "p90", "p99", "max"} <= {*row["document_tokens"]}
    assert {"tokens", "epochs"} <= {*info["epochs"]["forge_124m"]}


def test_the_text_of_the_old_shards_makes_the_same_shards(
    old_shards: Path, tmp_path: Path, forge: Forge
) -> None:
    source, out = tmp_path / "text.jsonl", tmp_path / "shards"
    with source.open("w") as file:
        for path in sorted(old_shards.glob("*.bin")):
            tokens = np.fromfile(path, "<u2", offset=1024)
            ends = np.flatnonzero(tokens == 50256)[1:]
            for document in np.split(tokens, ends):
                text = tokenizer.decode(document[1:]).decode()
                file.write(json.dumps({"text": text}) + "\n")
    arguments = ("--out", out, "--val-fraction", 0.2, "--workers", 1)
    (summary,) = json_lines(forge("prep", "tokenize", source, *arguments, "--json"))
    assert {*summary} >= {
        "folder",
        "up_to_date",
        "num_train_tokens",
        "num_val_tokens",
        "num_documents",
        "text_bytes",
        "skipped",
        "seconds",
    }
    for name in ("train_000000.bin", "val_000000.bin", VOCABULARY):
        assert (out / name).read_bytes() == (old_shards / name).read_bytes()


# ---------------------------------------------------------------------------------------------
# What a run leaves, and what the programs print for other programs


def test_a_run_folder_has_its_files(fresh: Path) -> None:
    names = {path.name for path in fresh.iterdir()}
    assert names >= {
        "README.md",
        "config.toml",
        "metrics.jsonl",
        "data_index.json",
        VOCABULARY,
        "checkpoints",
    }
    assert {path.name for path in (fresh / "checkpoints").iterdir()} == {
        "step_00000004",
        "step_00000008",
    }
    files = {path.name for path in checkpoint_of(fresh, 8).iterdir()}
    assert files >= {"model.safetensors", "optimizer.safetensors", "state.json"}
    state = json.loads((checkpoint_of(fresh, 8) / "state.json").read_text())
    assert state["step"] == 8
    assert state["tokens"] == 8 * 128
    assert state["seconds"] > 0


def test_metrics_have_their_kinds_and_keys(fresh: Path) -> None:
    lines = (fresh / "metrics.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert {"kind", "step", "tokens", "seconds"} <= {*row}
        assert row["tokens"] == 128 * row["step"]
    wanted = {
        "start": ([0], {"world_size", "hardware"}),
        "step": (
            [*range(1, 9)],
            {"loss", "lr", "norm", "tokens_per_second", "mfu", "data_wait"},
        ),
        "evaluate": (
            [0, 4, 8],
            {"loss", "bits_per_byte", "peak_memory_bytes", "evaluate_seconds"},
        ),
        "sample": ([4, 8], {"text"}),
        "checkpoint": ([4, 8], {"save_seconds"}),
    }
    for kind, (steps, keys) in wanted.items():
        rows = metrics_of(fresh, kind)
        assert [row["step"] for row in rows] == steps, kind
        assert all(keys <= {*row} for row in rows), kind
    assert metrics_of(fresh, "evaluate")[0]["loss"] == pytest.approx(math.log(50257), abs=0.1)


def test_samples_as_json_have_their_keys(fresh: Path, tmp_path: Path, forge: Forge) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The", "id": 7}\n{"prompt": "A list", "id": 8}\n')
    options = ("--max-tokens", 5, "--num-samples", 2, "--seed", 3)
    rows = json_lines(forge("sample", fresh, "--prompts-file", prompts, *options))
    keys = {"step", "seed", "prompt", "text", "finish", "tokens", "logprobs"}
    assert all(keys <= {*row} for row in rows)
    assert [row["id"] for row in rows] == [7, 7, 8, 8]  # the object's other keys are kept
    assert [row["seed"] for row in rows] == [3, 4, 3, 4]
    assert all(len(row["tokens"]) == len(row["logprobs"]) for row in rows)
    (row,) = json_lines(forge("sample", fresh, "--prompt", "The", "--max-tokens", 5, "--json"))
    assert keys <= {*row}


def test_evaluations_as_json_have_their_keys(
    fresh: Path, old_shards: Path, tmp_path: Path, forge: Forge
) -> None:
    questions = tmp_path / "questions.jsonl"
    question = {"ctx": "The function returns", "endings": ["a list.", "green rain."], "label": 0}
    questions.write_text(json.dumps(question) + "\n")
    arguments = ("--data", old_shards, "--num-tokens", 320, "--questions", questions, "--json")
    rows = json_lines(forge("eval", fresh, checkpoint_of(fresh, 4), *arguments))
    always = {"model", "step", "num_parameters"}
    on_shards = {
        *("loss", "loss_error", "bits_per_byte", "bits_per_byte_error"),
        *("num_tokens", "context_length", "split"),
    }
    on_questions = {"acc", "acc_error", "acc_norm", "acc_norm_error", "num_questions"}
    assert [row["step"] for row in rows] == [8, 4, 8, 4]
    assert all(always | on_shards <= {*row} for row in rows[:2])
    assert {"difference", "difference_error"} <= {*rows[1]}
    assert all(always | on_questions <= {*row} for row in rows[2:])


# ---------------------------------------------------------------------------------------------
# Exit codes


def test_a_complete_run_is_left_as_it_is(fresh: Path, old_shards: Path, forge: Forge) -> None:
    before = (fresh / "metrics.jsonl").read_bytes()
    result = forge("train", "tiny", "--data", old_shards, "--out", fresh, "--resume", *SMALL)
    assert result.exit_code == 0, result.output
    assert "complete" in result.output
    assert (fresh / "metrics.jsonl").read_bytes() == before


def test_a_run_cut_off_is_resumed_and_one_not_there_is_begun(
    fresh: Path, old_shards: Path, tmp_path: Path, forge: Forge
) -> None:
    cut = Path(shutil.copytree(fresh, tmp_path / "cut"))
    shutil.rmtree(checkpoint_of(cut, 8))
    for run in (cut, tmp_path / "new"):
        result = forge("train", "tiny", "--data", old_shards, "--out", run, "--resume", *SMALL)
        assert result.exit_code == 0, result.output
        weights = [checkpoint_of(each, 8) / "model.safetensors" for each in (run, fresh)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_damaged_checkpoint_is_refused(
    fresh: Path, old_shards: Path, tmp_path: Path, forge: Forge
) -> None:
    run = Path(shutil.copytree(fresh, tmp_path / "run"))
    flip_a_byte(checkpoint_of(run, 8) / "model.safetensors")
    sample = ("sample", run, "--prompt", "The", "--max-tokens", 2)
    evaluate = ("eval", run, "--data", old_shards, "--num-tokens", 320)
    for command in (sample, evaluate, ("export", run, tmp_path / "hf")):
        assert is_refused(forge(*command), "damaged"), command
    assert not (tmp_path / "hf").exists()
    assert forge(*sample, "--checkpoint", 4).exit_code == 0

    shutil.rmtree(checkpoint_of(run, 8))
    flip_a_byte(checkpoint_of(run, 4) / "model.safetensors")
    again = ("--data", old_shards, "--out", run, "--resume", *SMALL)
    assert is_refused(forge("train", "tiny", *again), "damaged")
    assert not checkpoint_of(run, 8).exists()


def test_a_checkpoint_that_is_gone_is_missed(
    fresh: Path, old_shards: Path, tmp_path: Path, forge: Forge
) -> None:
    """One of them, and all: then --resume does not begin anew over what is left of the run."""
    run = Path(shutil.copytree(fresh, tmp_path / "run"))
    shutil.rmtree(checkpoint_of(run, 4))
    sample = ("sample", run, "--prompt", "The", "--max-tokens", 2)
    assert is_refused(forge(*sample, "--checkpoint", 4), "no checkpoint")
    assert forge(*sample).exit_code == 0

    shutil.rmtree(checkpoint_of(run, 8))
    before = (run / "metrics.jsonl").read_bytes()
    assert is_refused(forge(*sample), "no checkpoint")
    again = ("--data", old_shards, "--out", run, "--resume", *SMALL)
    assert is_refused(forge("train", "tiny", *again), "gone")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_token_outside_the_vocabulary_is_refused(
    fresh: Path, tmp_path: Path, forge: Forge
) -> None:
    """Behind the first 4 KiB of each shard, which have a checksum of their own."""
    folder = copy_of("shards_1ed97cd", tmp_path)
    for path in folder.glob("*.bin"):
        data = path.read_bytes()
        path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    train = ("train", "tiny", "--data", folder, "--out", tmp_path / "run", *SMALL)
    evaluate = ("eval", fresh, "--data", folder, "--num-tokens", 6400)
    for command in (train, evaluate, ("prep", "verify", folder)):
        assert is_refused(forge(*command), "vocabulary"), command


def test_a_run_that_trains_keeps_others_out_and_saves_when_it_is_stopped(
    old_shards: Path, tmp_path: Path, forge: Forge
) -> None:
    run = tmp_path / "run"
    arguments = ["tiny", "--data", str(old_shards), "--out", str(run), *SMALL]
    arguments += ["--set=schedule.max_steps=100000", "--set=evaluate.every_steps=100000"]
    command = [sys.executable, "-m", "trainer.cli", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while not ((run / "metrics.jsonl").exists() and metrics_of(run, "step")):
            assert process.poll() is None
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.1)
        assert is_refused(forge("train", *arguments, "--resume"), "another")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    last = metrics_of(run, "step")[-1]["step"]
    assert checkpoint_of(run, last).is_dir()


def test_out_that_holds_another_thing_is_refused_and_left_alone(
    fresh: Path, old_shards: Path, tmp_path: Path, forge: Forge
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    file = tmp_path / "notes.txt"
    for out in (tmp_path, file, fresh):  # fresh: a run, and no --resume
        result = forge("train", "tiny", "--data", old_shards, "--out", out, *SMALL)
        assert is_refused(result, "--out"), out
    result = forge("train", "tiny", "--data", old_shards, "--out", tmp_path, "--resume", *SMALL)
    assert is_refused(result, "notes.txt")
    assert is_refused(forge("export", fresh, tmp_path), "not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (("train", "tiny", "--data", "SHARDS", "--out", "NEW", "--set=seeds=1"), "seed"),
        (("train", "tinny", "--data", "SHARDS", "--out", "NEW"), "tiny"),
        (("train", "tiny", "--data", "NEW", "--out", "NEW"), "shards"),
        (("sample", "NEW", "--prompt", "x"), "no such"),
        (("export", "NEW", "NEW"), "no such"),
        (("eval", "RUN", "--data", "NEW"), "shards"),
        (("prep", "info", "NEW"), "shards"),
        (("prep", "verify", "RUN"), "shards"),
    ],
)
def test_what_is_not_there_is_said_with_exit_code_1(
    command: tuple[str, ...], word: str, fresh: Path, old_shards: Path, tmp_path: Path, forge: Forge
) -> None:
    places = {"SHARDS": old_shards, "RUN": fresh, "NEW": tmp_path / "new"}
    result = forge(*(places.get(argument, argument) for argument in command))
    assert is_refused(result, word), result.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("train",),
        ("train", "tiny"),  # no --data
        ("train", "tiny", "--data", "SHARDS"),  # no --out
        ("train", "tiny", "--data", "SHARDS", "--out", "NEW", "--no-such-option"),
        ("sample",),
        ("sample", "RUN", "--prompt", "x", "--prompts-file", "x.txt"),
        ("sample", "RUN", "--prompt", "x", "--temperature", "-1"),
        ("export", "RUN"),  # no OUT
        ("eval", "RUN"),  # on what?
        ("prep", "no-such-command"),
        ("prep", "tokenize"),
        ("prep", "tokenize", "RUN", "--append", "--overwrite"),
    ],
)
def test_wrong_usage_has_exit_code_2(
    command: tuple[str, ...], fresh: Path, old_shards: Path, tmp_path: Path, forge: Forge
) -> None:
    places = {"SHARDS": old_shards, "RUN": fresh, "NEW": tmp_path / "new"}
    result = forge(*(places.get(argument, argument) for argument in command))
    assert result.exit_code == 2
    assert "Usage:" in result.output
    assert not (tmp_path / "new").exists()
