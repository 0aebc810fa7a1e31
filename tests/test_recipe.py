"""Laws of tests/benchmarks/recipe.py's arithmetic: the time axis, who passed whom, what is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from click import BadParameter, ClickException
from click.testing import CliRunner

from tests.benchmarks import curves, recipe

MEASURED = Path(recipe.__file__).parent / "measured"
TOKENS = 100  # a step


def metrics(seconds: list[float], every: int) -> list[dict[str, Any]]:
    """What a run logs whose steps took `seconds`; its loss falls by 0.1 a step, from 10."""
    rows = [{"kind": "evaluate", "step": 0, "tokens": 0, "loss": 10.0, "bits_per_byte": 5.0}]
    for step, took in enumerate(seconds, 1):
        at = {"step": step, "tokens": step * TOKENS, "loss": 10 - 0.1 * step}
        rows.append({"kind": "step", **at, "tokens_per_second": TOKENS / took})
        if step % every == 0 or step == len(seconds):
            rows.append({"kind": "evaluate", **at, "bits_per_byte": at["loss"] / 2})
    return rows


def a_run(seconds: list[float], arm: str = "a", seed: int = 1, **more: Any) -> curves.Run:
    rows = metrics(seconds, 10)
    return {
        "arm": arm,
        "planned_seconds": 50.0,
        "seed": seed,
        "config": {},
        "settings": [],
        "data": "0",
        "tokens": len(seconds) * TOKENS,
        "epochs": 0.5,
        "seconds": sum(seconds),
        "tokens_per_second": TOKENS / seconds[-1],
        "hardware": "none",
        "torch": "0",
        "curve": curves.curve_of(rows),
    } | more


def test_time_is_that_of_steps_without_compilation() -> None:
    seconds = [30.0] + [0.5] * 20 + [7.0] + [1.0] * 2 + [0.5] * 16
    ended, excluded = curves.training_seconds(metrics(seconds, 10))
    assert ended[0] == 0
    assert ended[1] == pytest.approx(0.5)  # the first compiles
    assert ended[22] == pytest.approx(11.0)  # so did this one
    assert ended[24] == pytest.approx(13.0)  # slow, but no compilation
    assert ended[40] + excluded == pytest.approx(sum(seconds))


def test_a_skipped_step_takes_time() -> None:
    rows = [row for row in metrics([1.0] * 10, 100) if row["step"] != 5]
    assert curves.training_seconds(rows)[0][10] == pytest.approx(10)


def test_the_training_loss_beside_an_evaluation_is_the_mean_before_it() -> None:
    first, *_, last = curves.curve_of(metrics([1.0] * 100, 10))
    assert first["train_loss"] is None
    assert last["train_loss"] == pytest.approx(10 - 0.1 * (69 + 100) / 2)
    assert (last["seconds"], last["tokens"]) == (100, 10_000)


def test_a_loss_is_passed_where_the_line_between_evaluations_crosses_it() -> None:
    run = a_run([0.5] * 100)
    assert curves.loss_at(run, 12.25) == pytest.approx(7.55)
    assert curves.passed_at([run], 7.55) == pytest.approx(12.25)
    assert curves.passed_at([run], curves.final(run)) == pytest.approx(50)
    assert curves.passed_at([run], -0.1) is None
    run["seconds"] = 49.9996  # a curve's are rounded
    assert curves.passed_at([run], curves.final(run)) == pytest.approx(50, abs=1e-3)
    slow = a_run([1.0] * 50)  # down to 5, where the other is down to 0
    assert curves.passed_at([slow], 7.5) == pytest.approx(25)
    assert curves.passed_at([run, slow], 7.5) == pytest.approx(50 / 3, abs=1e-3)


def test_the_report_says_who_came_how_far_in_which_part_of_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [a_run([1.0] * 50), a_run([0.5] * 100, "b"), a_run([0.5] * 90, "b", seed=2)]
    paths = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for path in paths:  # the second is a copy, cut off
        path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    with paths[1].open("a") as file:
        file.write('{"arm": "a", "curve": [')
    groups = curves.group(paths)
    assert [len(seeds) for seeds in groups.values()] == [1, 2]
    curves.report(groups, "a")
    said = capsys.readouterr().out
    both = next(line for line in said.splitlines() if "2 seeds" in line)
    assert "0.5000 ± 0.7071" in both
    assert both.endswith("|  50.0 % |")
    assert "b, done after 95.0% of that time, ends at 0.5000 ± 0.7071: 4.5000 lower" in said
    assert "b seed 2 took 45.0 s, planned were 50" in said
    pytest.importorskip("matplotlib")
    curves.draw(groups, "a", tmp_path / "new" / "curves.svg")
    assert "bits per byte" in (tmp_path / "new" / "curves.svg").read_text()


def test_runs_that_do_not_compare_are_not_averaged(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for other, why in (
        (a_run([1.0] * 50, seed=2, settings=["seed=3"]), "their settings differ"),
        (a_run([1.0] * 50, "b", data="1"), "different shards"),
    ):
        path.write_text("".join(json.dumps(run) + "\n" for run in (a_run([1.0] * 50), other)))
        with pytest.raises(ClickException, match=why):
            curves.group([path])


def test_an_arm_is_a_config_with_settings_and_a_rate_of_its_own() -> None:
    name, parts = recipe.parse_arm("x=tiny,optimizer.betas=[0.9,0.95],seed=3")
    assert (name, parts) == ("x", ("tiny", "optimizer.betas=[0.9,0.95]", "seed=3"))
    found = recipe.find_arm("x@3e-4", {name: parts})
    assert (found.name, found.config) == ("x@3e-4", "tiny")
    assert found.settings[-1] == "optimizer.peak_lr=3e-4"
    assert recipe.find_arm("x@muon_lr=1", {name: parts}).settings[-1] == "optimizer.muon_lr=1"
    two = ("optimizer.peak_lr=3e-4", "optimizer.muon_lr=1")
    assert recipe.find_arm("x@3e-4@muon_lr=1", {name: parts}).settings[-2:] == two
    with pytest.raises(BadParameter, match="no such arm"):
        recipe.find_arm("y", {name: parts})


def test_a_finished_run_is_left_out_and_a_name_stands_for_one_thing(
    small_shards: Path, tmp_path: Path
) -> None:
    bench = recipe.Bench(small_shards, [tmp_path / "new" / "results.jsonl"], (), 4)
    arm = recipe.Arm("a", "tiny", ("optimizer.peak_lr=1e-3",))
    wanted = bench.wanted(arm, 20.0, 1)
    assert not bench.is_done(wanted)
    bench.keep(wanted | {"curve": []})
    assert bench.is_done(wanted)
    assert not bench.is_done(bench.wanted(arm, 20.0, 2))
    assert not bench.is_done(bench.wanted(arm, 5.0, 1))
    with pytest.raises(ClickException, match="their settings differ"):
        bench.is_done(bench.wanted(recipe.Arm("a", "tiny", ()), 20.0, 1))


@pytest.mark.parametrize("path", sorted(MEASURED.glob("*.jsonl")), ids=lambda path: path.stem)
def test_runs_that_are_kept_are_of_the_arms_and_configs_of_today(path: Path) -> None:
    """But for those with a batch warm-up, which forge-train no longer has."""
    for run in (line for line in curves.read_lines(path) if "curve" in line):
        if any(setting.startswith("batch.doubl") for setting in run["settings"]):
            continue
        if run["arm"].partition("@")[0] in recipe.ARMS:
            arm = recipe.find_arm(run["arm"], recipe.ARMS)
            assert run["config"] == arm.values()
            assert run["settings"][2:] == [*arm.settings, "batch.micro_batch_size=64"]


def test_a_report_without_runs_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(recipe.main, ["--report", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "no finished run" in done.output
