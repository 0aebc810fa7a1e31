"""Laws of parts: made by any processes in any order, they become the bytes of one run."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from benchmarks.kill_prep import contents
from click.testing import Result
from conftest import LEARNED, ROOT

from pipeline import merge, prepare, sources, verify
from pipeline.engines import Processes
from pipeline.errors import ForgeError
from pipeline.sources import Options

Part = Callable[..., Result]
OPTIONS = ("--val-fraction", 0.2, "--shard-tokens", 1, "--workers", 1)  # a slice a row group


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, documents, make_parquet) -> Path:
    """Two files, 7 slices."""
    root = tmp_path_factory.mktemp("text")
    for name, some in (("a", documents[:28]), ("b", documents[-20:])):
        make_parquet(root / f"{name}.parquet", some)
    return Path(root)


@pytest.fixture(scope="module")
def straight(source: Path, tmp_path_factory: pytest.TempPathFactory, make_shards) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "out"
    index = make_shards(source, folder, shard_tokens=1)
    assert len(index.slices) == 7
    return Path(folder)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def part(forge, source: Path, out: Path) -> Part:
    def run(which: str, *more: object) -> Result:
        command = ("prep", "tokenize", source, "--out", out, "--part", which, *OPTIONS, *more)
        return forge(*command)  # type: ignore[no-any-return]

    return run


def made(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in out.rglob("train_*.bin")}


def refused(result: Result, says: str) -> bool:
    return result.exit_code == 1 and says in result.stderr and "what to do:" in result.stderr


def test_parts_made_side_by_side_become_the_bytes_of_one_run(
    forge, source: Path, straight: Path, out: Path
) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "tokenize", source, "--out", out, *OPTIONS]
    processes = [
        subprocess.Popen([*map(str, command), "--part", f"{n}/2", "--json"], cwd=ROOT, stdout=-1)
        for n in (1, 2)
    ]
    facts = [json.loads(process.communicate()[0]) for process in processes]
    assert [each["num_slices"] for each in facts] == [3, 4]
    before = made(out)
    result = forge("prep", "merge", out)
    assert result.exit_code == 0, result.output
    assert f"forge-prep info {out}" in result.stdout
    assert made(out) == before
    assert contents(out) == contents(straight)
    assert not (out / ".work").exists()
    again = json.loads(forge("prep", "merge", out, "--json").stdout)
    assert (again["num_documents"], again["up_to_date"]) == (48, True)
    assert made(out) == before


def test_merge_names_the_parts_that_are_missing(
    forge, part: Part, straight: Path, out: Path
) -> None:
    """There are more parts than slices here: the first is empty."""
    assert refused(forge("prep", "merge", out), "nothing to merge")
    assert not out.exists()
    for number in (2, 3, 5, 6, 8):
        assert part(f"{number}/8").exit_code == 0
    assert refused(forge("prep", "merge", out), "parts are missing: 4/8, 7/8\n")
    for number in (1, 4, 7):
        assert part(f"{number}/8").exit_code == 0
    (out / ".work" / "000000.json").unlink()
    assert refused(forge("prep", "merge", out), "parts are missing: 2/8\n")
    assert part("2/8").exit_code == forge("prep", "merge", out).exit_code == 0
    assert contents(out) == contents(straight)


def test_a_part_that_stopped_resumes_and_touches_nothing_of_others(source: Path, out: Path) -> None:
    options = Options(val_fraction=0.2, shard_tokens=1)
    found = sources.resolve(str(source))

    def stop(progress: prepare.Progress) -> None:
        if len(made(out)) >= 2:
            raise KeyboardInterrupt

    (out / ".work").mkdir(parents=True)
    others = out / ".work" / "train_000005.bin.12345678.partial"
    others.write_bytes(b"written by another part at this moment")
    with pytest.raises(ForgeError, match="stopped by Ctrl-C"):
        prepare.tokenize_part(found, out, options, Processes(1), (1, 2), on_progress=stop)
    assert list(out.rglob("*.partial")) == [others]
    before = made(out)
    num_slices = prepare.tokenize_part(found, out, options, Processes(1), (1, 2))
    assert 2 <= len(before) < num_slices
    assert before.items() < made(out).items()
    assert others.exists()


def test_while_a_part_runs_only_parts_are_let_in(source: Path, straight: Path, out: Path) -> None:
    options, found = Options(val_fraction=0.2, shard_tokens=1), sources.resolve(str(source))
    busy = "another forge-prep is writing this folder"

    def meanwhile(progress: prepare.Progress) -> None:
        with pytest.raises(ForgeError, match=busy):
            merge.merge(out)
        with pytest.raises(ForgeError, match=busy):
            prepare.tokenize(found, out, options, Processes(1))
        with pytest.raises(ForgeError, match=busy):
            prepare.tokenize_part(found, out, options, Processes(1), (1, 2))
        if not (out / ".work" / "part-2-of-2").exists():
            prepare.tokenize_part(found, out, options, Processes(1), (2, 2))

    prepare.tokenize_part(found, out, options, Processes(1), (1, 2), on_progress=meanwhile)
    merge.merge(out)
    assert contents(out) == contents(straight)


def test_while_a_run_looks_at_its_source_no_part_begins(source: Path, out: Path) -> None:
    found = sources.resolve(str(source))

    class Meanwhile(Processes):
        def connect(self) -> None:
            with pytest.raises(ForgeError, match="another forge-prep is writing this folder"):
                prepare.tokenize_part(found, out, Options(), Processes(1), (1, 2))

    prepare.tokenize(found, out, Options(val_fraction=0.2), Meanwhile(1))


def test_parts_of_different_plans_are_refused(part: Part, out: Path) -> None:
    assert part("1/3").exit_code == 0
    before = contents(out / ".work") | contents(out / ".work" / "part-1-of-3")
    assert refused(part("2/3", "--val-fraction", 0.1), "options val_fraction: 0.2, now 0.1")
    assert refused(part("1/3", "--shard-tokens", 2), "options shard_tokens: 1, now 2")
    assert refused(part("2/4"), "differ in the number of parts")
    assert contents(out / ".work") | contents(out / ".work" / "part-1-of-3") == before


class Killed(BaseException):
    """Passes every handler, as a kill does."""


def test_a_merge_killed_at_any_moment_is_finished_by_the_next(
    part: Part, straight: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert part("1/1").exit_code == 0
    out.rename(tmp_path / "parts")
    for moment in itertools.count():
        shutil.copytree(tmp_path / "parts", out)
        with monkeypatch.context() as patch, suppress(Killed):
            kill_at(moment, patch)
            merge.merge(out)
            break
        merge.merge(out)
        assert contents(out) == contents(straight)
        assert {path.suffix for path in out.iterdir()} == {".bin", ".json", ".tiktoken"}
        shutil.rmtree(out)
    assert moment > 40


def kill_at(moment: int, patch: pytest.MonkeyPatch) -> None:
    """Let `moment` changes to the disk happen, and fail the next one."""
    done = itertools.count()

    def change(real: Callable[..., Any], *args: Any, **how: Any) -> Any:
        if next(done) >= moment:
            raise Killed
        return real(*args, **how)

    for name in ("replace", "unlink", "rmdir", "mkdir", "fsync"):
        patch.setattr(os, name, partial(change, getattr(os, name)))


def test_parts_of_a_source_that_changed_are_refused_even_if_they_began_at_one_time(
    forge, part: Part, out: Path
) -> None:
    assert part("1/2").exit_code == part("2/2").exit_code == 0
    plan = out / ".work" / "part-2-of-2" / verify.PLAN_FILE
    raw = json.loads(plan.read_bytes())
    raw["source"]["files"][0]["bytes"] += 1
    plan.write_text(json.dumps(raw))
    assert refused(forge("prep", "merge", out), "differ in the files of the source")


def test_an_edit_between_two_parts_is_noticed_whatever_its_size(
    source: Path, tmp_path: Path, forge, out: Path
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "in"))
    command = ("prep", "tokenize", copy, "--out", out, *OPTIONS)
    assert forge(*command, "--part", "1/2").exit_code == 0
    os.utime(copy / "b.parquet", (1, 1))
    says = "differ in the times when the files of the source were written"
    for which in ("1/2", "2/2"):
        assert refused(forge(*command, "--part", which), says)


def test_a_part_takes_no_limit_and_removes_nothing(part: Part, out: Path) -> None:
    for option, reason in (
        (("--max-tokens", "1k"), "depends on the parts before it"),
        (("--overwrite",), "what the other parts made"),
    ):
        result = part("1/2", *option)
        assert result.exit_code == 2
        assert reason in result.stderr
    for wrong in ("0/2", "3/2", "1", "a/b"):
        assert part(wrong).exit_code == 2
    assert not out.exists()


def test_one_folder_is_made_in_parts_or_at_once(
    forge, part: Part, source: Path, straight: Path, out: Path
) -> None:
    shutil.copytree(straight, out)
    assert refused(part("1/2"), "a folder of their own; this one has index.json")
    assert contents(out) == contents(straight)
    assert not (out / ".work").exists()
    shutil.rmtree(out)
    assert part("1/2").exit_code == 0
    whole = forge("prep", "tokenize", source, "--out", out, *OPTIONS, "--overwrite")
    assert refused(whole, "this folder is made in parts")
    assert part("2/2").exit_code == 0
    (out / "train_000001.bin").write_bytes(b"another program's")
    assert refused(forge("prep", "merge", out), "has the name of a shard")
    (out / "train_000001.bin").unlink()
    assert forge("prep", "merge", out).exit_code == 0


def test_conversations_are_made_in_parts_too(forge, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in "ab":
        rows: list[dict[str, Any]] = [{"messages": each} for each in LEARNED * 9]
        text = "".join(json.dumps(row | {"n": name}) + "\n" for row in rows)
        (source / f"{name}.jsonl").write_text(text)
    command = ("prep", "chat", source, "--context-length", 64, "--val-fraction", 0.3)
    assert forge(*command, "--out", tmp_path / "straight").exit_code == 0
    for number in (1, 2):
        assert forge(*command, "--out", out, "--part", f"{number}/2").exit_code == 0
    assert forge("prep", "merge", out).exit_code == 0
    assert contents(out) == contents(tmp_path / "straight")


def test_the_parts_of_a_plan_are_all_of_it_once() -> None:
    for num_slices in range(40):
        for count in (1, 3, 16):
            parts = [merge.numbers_of((k, count), num_slices) for k in range(1, count + 1)]
            assert [n for each in parts for n in each] == list(range(num_slices))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
