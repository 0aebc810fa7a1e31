"""--check: before a run it says what forge-report says after it, in the same words."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from test_train import QUICK

from trainer import config_file
from trainer.check import extent


def table(text: str) -> dict[str, str]:
    """The rows of --check, in order."""
    rows = (re.fullmatch(r"([a-z].{32}\S?) +(\S.*)", line) for line in text.splitlines())
    return {row[1].strip(): row[2] for row in rows if row}


def test_check_and_report_tell_one_run_in_the_same_words_and_order(
    small_shards: Path, run: Path, tmp_path: Path, forge: Callable[..., Result]
) -> None:
    before = forge("train", "tiny", "--data", small_shards, "--check", *QUICK)
    page = tmp_path / "page.html"
    assert forge("report", run, "--out", page).exit_code == 0
    facts = page.read_text().split("Run, data, hardware")[1].split("</table>")[0]
    after = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', facts))
    planned = table(before.output)
    assert list(planned) == [label for label in after if label in planned]
    assert len(planned) == 11
    assert after["steps"] == f"{planned['steps']} of {planned['steps']}"
    for label in ("tokens", "epochs", "hardware", "parameters", "training tokens"):
        assert planned[label] == after[label]
    assert planned["data"].startswith(after["data"])
    cut = "micro-batch, accumulation, ranks"
    assert planned[cut].startswith(f"{after[cut]} = ")
    assert 0 < float(after["checkpoints, GB"]) <= float(planned["checkpoints, GB"].split()[-1])


def test_what_is_not_sure_before_a_run_is_told_from_least_to_most() -> None:
    """By the speed of a step, unless the clock or the config ends the run for certain."""
    config = config_file.load("forge_350m", ("schedule.max_tokens=491520000",))  # 1,000 steps
    speeds = [491_520.0, 983_040.0]  # 1 and 2 steps a second
    sure = {"steps": "1,000", "tokens": "491,520,000", "epochs": "0.50"}
    epoch = 983_040_000
    assert extent(config, epoch, []) == sure
    assert extent(config, epoch, speeds) == sure | {"time": "0:08:20 to 0:16:40"}

    timed = replace(config.schedule, budget_hours=0.25)  # 900 seconds
    found = extent(replace(config, schedule=timed), epoch, speeds)
    assert (found["steps"], found["time"]) == ("900 to 1,000", "0:08:20 to 0:15:00")
    only_timed = replace(config, schedule=replace(timed, max_tokens=None))
    found = extent(only_timed, epoch, speeds)
    assert (found["steps"], found["epochs"], found["time"]) == (
        "900 to 1,800",
        "0.45 to 0.90",
        "0:15:00",
    )
    assert extent(only_timed, epoch, []) == {
        "steps": "as many as the time allows",
        "time": "0:15:00",
    }


def test_what_is_known_of_gpus_alone_is_not_said_of_a_cpu(
    small_shards: Path, forge: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    planned = table(forge("train", "tiny", "--data", small_shards, "--check", *QUICK).output)
    assert planned["time"] == "not estimated on a CPU"
    assert not [label for label in planned if "GPU" in label]
