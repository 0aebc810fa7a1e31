"""forge-train --doctor: every line is measured or says that it is not."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from conftest import ROOT

from pipeline.shards import load_index

NAMES = ["GPUs", "torch", "compiler", "speed", "P2P", "system", "--out", "--data", "ranks"]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")


def findings(text: str) -> dict[str, tuple[str, str]]:
    """By name: ok, note or problem, and what was found."""
    lines = re.findall(r"^(ok|note|problem) +(\S+) +(.*)$", text, re.MULTILINE)
    return {name: (kind, what) for kind, name, what in lines}


def test_disks_are_measured_and_nothing_is_left(
    small_shards: Path, tmp_path: Path, forge: Callable[..., Result]
) -> None:
    out = tmp_path / "new" / "run"
    result = forge("train", "--doctor", "--data", small_shards, "--out", out)
    assert result.exit_code == 0, result.output
    found = findings(result.output)
    assert list(found) == NAMES
    assert re.search(r"\d GB free, \d+ MB/s written", found["--out"][1])
    assert re.search(r"\d GB free, \d+ of 256 windows from the disk", found["--data"][1])
    assert not list(tmp_path.iterdir())


def test_shards_without_training_tokens_are_a_problem(
    small_shards: Path, tmp_path: Path, forge: Callable[..., Result]
) -> None:
    index = load_index(small_shards)
    val = replace(index, shards=index.of("val"))
    (tmp_path / "index.json").write_text(val.to_json())
    result = forge("train", "--doctor", "--data", tmp_path)
    assert result.exit_code == 1
    assert findings(result.output)["--data"] == ("problem", "no train tokens")


def test_a_missing_shard_is_named(
    small_shards: Path, tmp_path: Path, forge: Callable[..., Result]
) -> None:
    (tmp_path / "index.json").write_bytes((small_shards / "index.json").read_bytes())
    result = forge("train", "--doctor", "--data", tmp_path)
    assert result.exit_code == 1
    kind, what = findings(result.output)["--data"]
    assert (kind, what.endswith(".bin")) == ("problem", True)
    assert "restore the file" in result.output
    assert "\nmend 1 problem first; " in result.output


@without_gpu
def test_what_cannot_be_tested_says_so(forge: Callable[..., Result]) -> None:
    result = forge("train", "--doctor")
    assert result.exit_code == 0, result.output
    untested = {name for name, (_, what) in findings(result.output).items() if "not tested" in what}
    assert untested == {*NAMES} - {"compiler", "system"}
    assert all(findings(result.output)[name][0] == "note" for name in untested)


def test_a_problem_ends_with_1_and_the_rest_is_still_looked_at(
    tmp_path: Path, forge: Callable[..., Result]
) -> None:
    result = forge("train", "--doctor", "--data", tmp_path, "--out", "/proc/run")
    assert result.exit_code == 1
    found = findings(result.output)
    assert list(found) == NAMES
    assert [name for name in NAMES if found[name][0] == "problem"] == ["--out", "--data"]


@without_gpu
def test_a_driver_that_torch_cannot_use_is_a_problem(
    tmp_path: Path, forge: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nvidia-smi prints two cards, one with a display, beside a torch for CPUs."""
    script = tmp_path / "nvidia-smi"
    script.write_text("""#!/bin/sh
case "$1" in
*driver_version*) echo 550.54.14; echo 550.54.14 ;;
*compute-apps*) echo '1234, /usr/bin/python3' ;;
*) echo 'NVIDIA GeForce RTX 4090, 2301, 24564'; echo 'NVIDIA GeForce RTX 4090, 12, 24564' ;;
esac
""")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    result = forge("train", "--doctor")
    assert result.exit_code == 1
    found = findings(result.output)
    assert "RTX 4090, 2301 of 24564 MiB in use" in found["GPUs"][1]
    assert "in use by /usr/bin/python3 (1234)" in result.output
    assert found["torch"][0] == "problem"
    assert "pytorch.org" in result.output

    script.write_text("#!/bin/sh\necho 'Driver/library version mismatch'; exit 18\n")
    found = findings(forge("train", "--doctor").output)
    assert found["GPUs"] == ("problem", "nvidia-smi: Driver/library version mismatch")


def test_ranks_add_up_and_only_the_first_speaks(torchrun) -> None:
    done = torchrun(2, "--doctor")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("system") == 1
    found = findings(done.stdout)["ranks"][1]
    assert re.fullmatch(r"2 on 1 machine add up [\d.]+ GB/s; clocks 0.\d s apart", found)


def test_a_rank_that_never_answers_is_a_problem_and_no_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = "from trainer import doctor; doctor.LIMIT_SECONDS = 4.0; doctor.examine(None, None)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | group,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert findings(done.stdout)["ranks"] == ("problem", "no answer within 4 s")
    assert "NCCL_P2P_DISABLE=1" in done.stdout
