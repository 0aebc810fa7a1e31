"""Laws of a run's folder: killed while it is begun, resumed, full: nothing is lost."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_train import QUICK

from pipeline.errors import ForgeError
from trainer import checkpoint
from trainer.report import Metrics, read_metrics
from trainer.run import check_room


def rows(*given: dict) -> str:
    return "".join(json.dumps({"tokens": 0, "seconds": 0.0} | row) + "\n" for row in given)


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
    assert "contains other files and no run: mine.txt" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    good = rows({"kind": "step", "step": 1}, {"kind": "step", "step": 2})
    bad = b"[" * 100_000 + b"\n"
    bad += b'\xff\xfe\x00\nnull\n5\n{"kind": "step"}\n{"kind": "step", "step": "x"}\n\0\0\n{"ki'
    (tmp_path / "metrics.jsonl").write_bytes(good.encode() + bad)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_line_that_a_full_disk_has_cut_costs_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics(tmp_path, None)

    def log(step: int) -> None:
        metrics({"kind": "step", "step": step, "tokens": 10, "seconds": 0.0})

    log(1)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))  # the kernel refuses more
    try:
        log(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log(3)
    log(4)
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
    with pytest.raises(ForgeError, match="GB of disk are left"):
        check_room(tmp_path, (free + 10**6) // 3 + 10**7, 2)
    assert 3 * 12 * parameters == pytest.approx(0.06e9, abs=0.005e9)


def test_a_run_whose_index_is_gone_says_so(
    run: Path, small_shards: Path, tmp_path: Path, forge
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "data_index.json").unlink()
    result = forge("train", "tiny", "--data", small_shards, "--out", copy, "--resume", *QUICK)
    assert result.exit_code == 1
    assert "bring that file back, or start a new run from its weights" in result.output


def test_a_line_with_another_key_or_type_ends_neither_a_resume_nor_an_export(
    run: Path, small_shards: Path, tmp_path: Path, forge
) -> None:
    """As a bit that flipped leaves it: still JSON, and no figure that a reader looks for."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(checkpoint.checkpoint_path(copy, 8))
    log = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for flipped in ({"loss": "x"}, {"lr": None}, {"text": 5}, {"bits_per_byte": []}):
        lines += [row | flipped for row in lines[:9] if row.keys() & flipped]
    for missing in ("loss", "lr", "text", "bits_per_byte", "hardware", "world_size"):
        lines += [{k: v for k, v in row.items() if k != missing} for row in lines[:9]]
    log.write_text("".join(json.dumps(row) + "\n" for row in lines))
    (copy / "curves.svg").unlink()
    exported = forge("export", copy, tmp_path / "hf")
    assert exported.exit_code == 0, exported.output
    result = forge("train", "tiny", "--data", small_shards, "--out", copy, "--resume", *QUICK)
    assert result.exit_code == 0, result.output
    assert (copy / "curves.svg").exists()


def test_a_run_says_what_of_its_model_is_another(small_shards: Path, tmp_path: Path, forge) -> None:
    arguments = ["--data", small_shards, "--out", tmp_path / "run", *QUICK]
    assert forge("train", "tiny", *arguments, "--set=schedule.max_steps=1").exit_code == 0
    result = forge("train", "tiny", *arguments, "--resume", "--set=model.num_layers=3")
    assert result.exit_code == 1
    assert "model.num_layers: 2 -> 3" in result.output


@pytest.fixture
def finished(run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(run, tmp_path / "finished"))


@pytest.mark.parametrize("gone", ["removed", "on a disk that is not there"])
def test_a_run_does_not_begin_anew_where_its_checkpoints_are_gone(
    gone: str, finished: Path, small_shards: Path, tmp_path: Path, forge
) -> None:
    (finished / "checkpoints").rename(tmp_path / "elsewhere")
    if gone != "removed":
        (finished / "checkpoints").symlink_to(tmp_path / "nowhere")
    log = (finished / "metrics.jsonl").read_text()
    result = forge("train", "tiny", "--data", small_shards, "--out", finished, "--resume", *QUICK)
    assert result.exit_code == 1
    assert "the checkpoints are gone" in result.output
    assert (finished / "metrics.jsonl").read_text() == log


@pytest.mark.parametrize(
    "setting",
    ["schedule.max_steps=12", "schedule.budget_hours=1", "model.num_layers=3", "seed=7"],
)
def test_a_run_keeps_its_model_its_schedule_and_its_order(
    setting: str, finished: Path, small_shards: Path, forge
) -> None:
    arguments = ["--data", small_shards, "--out", finished, "--resume", *QUICK]
    result = forge("train", "tiny", *arguments, f"--set={setting}")
    assert result.exit_code == 1
    assert setting.partition("=")[0] in result.output
    assert "--from" in result.output


@pytest.mark.parametrize("edit", ["num_heads = 2", "max_steps = 16", "seed = 7"])
def test_a_config_edited_in_the_run_is_not_trained(
    edit: str, finished: Path, small_shards: Path, forge
) -> None:
    """Other heads keep every shape: nothing else would notice."""
    shutil.rmtree(finished / "checkpoints" / "step_00000008")
    path = finished / "config.toml"
    key = edit.partition(" = ")[0]
    path.write_text(re.sub(rf"\b{key} = .*", edit, path.read_text()))
    result = forge("train", path, "--data", small_shards, "--out", finished, "--resume")
    assert result.exit_code == 1
    assert f"{key}: " in result.output


def test_a_folder_whose_name_is_not_utf_8_is_refused(
    small_shards: Path, tmp_path: Path, forge
) -> None:
    run = tmp_path / os.fsdecode(b"run-\xe9")
    result = forge("train", "tiny", "--data", small_shards, "--out", run, *QUICK)
    assert result.exit_code == 1
    assert "not valid UTF-8" in result.output
    assert not run.exists()


def test_a_checkpoint_is_all_that_a_resume_needs(
    finished: Path, run: Path, small_shards: Path, forge
) -> None:
    shutil.rmtree(finished / "checkpoints" / "step_00000008")
    (finished / "metrics.jsonl").unlink()
    (finished / "README.md").unlink()
    result = forge("train", "tiny", "--data", small_shards, "--out", finished, "--resume", *QUICK)
    assert result.exit_code == 0, result.output
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [checkpoint.checkpoint_path(each, 8) / name for each in (finished, run)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_checkpoint_of_a_later_version_is_not_called_damaged(
    finished: Path, small_shards: Path, forge
) -> None:
    path = checkpoint.checkpoint_path(finished, 8) / "state.json"
    raw = json.loads(path.read_text()) | {"version": 4, "news": 1}
    raw["checksums"]["state.json"] = checkpoint._own_checksum(raw)
    path.write_text(json.dumps(raw))
    result = forge("train", "tiny", "--data", small_shards, "--out", finished, "--resume", *QUICK)
    assert result.exit_code == 1
    assert "a later version" in result.output


def test_what_a_kill_left_half_written_is_swept_away(
    finished: Path, small_shards: Path, forge
) -> None:
    half = checkpoint.checkpoint_path(finished, 8).rename(
        finished / "checkpoints" / "step_00000008.partial"
    )
    result = forge("train", "tiny", "--data", small_shards, "--out", finished, "--resume", *QUICK)
    assert result.exit_code == 0, result.output
    assert "Resuming from step 4," in result.output
    assert not half.exists()


@pytest.mark.parametrize("stdout", ["/dev/full", "closed pipe"])
def test_a_log_that_cannot_be_written_ends_no_run(
    stdout: str, small_shards: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "trainer.cli", "tiny", "--data", str(small_shards)]
    command += ["--out", str(tmp_path / "run"), *QUICK, "--set=schedule.max_steps=1"]
    reading, writing = os.pipe()
    os.close(reading)
    with Path("/dev/full").open("w") as full:
        into = full if stdout == "/dev/full" else writing
        ran = subprocess.run(command, stdout=into, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert ran.stderr.count("Error") == 0, ran.stderr
    assert checkpoint.steps(tmp_path / "run") == [1]
