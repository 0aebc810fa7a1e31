"""Laws of the whole offline stage: the same bytes always, and no byte of text lost."""

import contextlib
import errno
import fcntl
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from benchmarks import kill_prep
from conftest import HOSTILE, ROOT, files_up_to

from pipeline import foreign, merge, prepare, shards, sources, tokenizer, verify
from pipeline.engines import Processes
from pipeline.errors import ForgeError
from pipeline.plan import Plan
from pipeline.sources import Options


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice a row group or two, so that little text makes many slices."""
    monkeypatch.setattr(sources, "BYTES_PER_TOKEN", 0.004)


@pytest.fixture(scope="module")
def folder_of_text(tmp_path_factory: pytest.TempPathFactory, documents, make_parquet) -> Path:
    """Two files, 10 row groups, about a dozen small slices."""
    root = tmp_path_factory.mktemp("text")
    make_parquet(root / "a.parquet", documents[:40])
    make_parquet(root / "b.parquet", documents[40:])
    return root


def tokenize(
    source: Path, out: Path, options: Options, workers: int = 1, **more: Any
) -> prepare.Outcome:
    return prepare.tokenize(sources.resolve(str(source)), out, options, Processes(workers), **more)


def contents(folder: Path) -> dict[str, bytes]:
    """Every byte of a finished folder."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def texts_of(folder: Path, split: str) -> list[bytes]:
    """The documents of a split, decoded, in order."""
    texts: list[bytes] = []
    for shard in shards.load_index(folder).of(split):
        tokens = shards.map_shard(folder / shard.file, shard.num_tokens)
        pieces = np.split(tokens, np.flatnonzero(tokens == shards.EOT_TOKEN))
        assert len(pieces[0]) == 0, "a shard starts with <|endoftext|>"
        texts += [tokenizer.decode(piece[1:]) for piece in pieces[1:]]
    return texts


def is_val(text: str, fraction: float) -> bool:
    return xxhash.xxh3_64_intdigest(text.encode()) < fraction * 2**64


# ---------------------------------------------------------------------------------------------
# The same bytes


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(("most_workers", "max_tokens"), [(8, None), (3, 30_000)])
def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, folder_of_text: Path, make_shards, most_workers: int, max_tokens: int | None
) -> None:
    made = []
    for workers in (1, 2, most_workers):
        out = tmp_path / str(workers)
        index = make_shards(folder_of_text, out, workers=workers, max_tokens=max_tokens)
        made.append(contents(out))
    assert len(index.of("train")) > 3
    assert made[0] == made[1] == made[2]
    wanted = {"index.json", shards.VOCABULARY_FILE, *(shard.file for shard in index.shards)}
    assert set(made[0]) == wanted


@pytest.mark.usefixtures("small_slices")
def test_max_tokens_stops_at_the_first_document_that_reaches_it(
    tmp_path: Path, folder_of_text: Path, make_shards
) -> None:
    make_shards(folder_of_text, tmp_path / "all", max_tokens=10**9)
    index = make_shards(folder_of_text, tmp_path / "some", max_tokens=30_000)
    everything, some = (texts_of(tmp_path / name, "train") for name in ("all", "some"))
    assert some == everything[: len(some)]
    last = len(tokenizer.encode(some[-1].decode())) + 1
    assert index.total("num_tokens", "train") - last < 30_000 <= index.total("num_tokens", "train")


@pytest.mark.parametrize("max_tokens", [None, 20])
def test_files_are_taken_in_the_order_of_a_hash_of_their_names(
    tmp_path: Path, make_parquet, make_shards, max_tokens: int | None
) -> None:
    for n in range(8):
        make_parquet(tmp_path / "in" / f"{n}.parquet", [f"file {n} says something"])
    make_shards(tmp_path / "in", tmp_path / "out", max_tokens=max_tokens, val_fraction=0.0)
    taken = texts_of(tmp_path / "out", "train")
    assert len(taken) == 8 if max_tokens is None else 1 < len(taken) < 8
    assert taken == [f"file {n} says something".encode() for n in by_hash(range(8))[: len(taken)]]


def by_hash(names: Iterable[object], suffix: str = ".parquet") -> list[object]:
    return sorted(names, key=lambda name: xxhash.xxh3_64_intdigest(f"{name}{suffix}".encode()))


def test_an_error_keeps_finished_slices_and_the_next_run_resumes(
    tmp_path: Path, folder_of_text: Path, make_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BYTES_PER_TOKEN", 0.004)
    monkeypatch.setattr(sources, "TAIL_BYTES", 1000)  # the files are small
    source = Path(shutil.copytree(folder_of_text, tmp_path / "in"))
    path, out = source / f"{by_hash('ab')[1]}.parquet", tmp_path / "out"
    sound = path.read_bytes()
    column = pq.read_metadata(path).row_group(2).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    path.write_bytes(sound[:start] + b"\xff" * 40 + sound[start + 40 :])
    with pytest.raises(ForgeError, match="damaged row group") as caught:
        make_shards(source, out)
    assert str(caught.value.where) == f"{path}, row group 2"
    assert not (out / shards.INDEX_FILE).exists()
    assert not list(out.rglob("*.partial"))
    first = {n for n, each in pieces(source).items() if {part[0] for part in each} != {path.stem}}
    finished = {name: made for name, made in records(out).items() if int(name[:6]) in first}
    assert finished
    path.write_bytes(sound)
    before = all_but_the_index(source, out)
    assert finished.items() <= records(out).items()
    make_shards(source, out)
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("train_*.bin")} == before
    make_shards(source, tmp_path / "straight")
    assert contents(out) == contents(tmp_path / "straight")


def records(out: Path) -> dict[str, int]:
    """The records of finished slices, and when they were made."""
    return {p.name: p.stat().st_mtime_ns for p in out.glob(".work/[0-9]*.json")}


def all_but_the_index(source: Path, out: Path, **options: object) -> dict[str, int]:
    """Make `out` as if the last moment had been missing; when each train shard was made."""
    chosen = Options(**{"val_fraction": 0.2} | options)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "make_index", None)
        with pytest.raises(TypeError, match="not callable"):
            tokenize(source, out, chosen)
    return {p.name: p.stat().st_mtime_ns for p in out.glob(".work/train_*.bin")}


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(
    ("change", "kept"), [("b replaced", "a"), ("a replaced", "b"), ("c", "ab")]
)
def test_the_next_run_keeps_the_slices_of_unchanged_files_and_makes_all_others_again(
    tmp_path: Path, make_shards, make_parquet, documents, change: str, kept: str
) -> None:
    """The source changes between an unfinished run and the next, whose bytes are its own."""
    source, out, rows = tmp_path / "in", tmp_path / "out", 10
    texts = {"a": documents[:30], "b": documents[30:60]}
    for name in texts:
        make_parquet(source / f"{name}.parquet", texts[name], rows)
    before = all_but_the_index(source, out)
    plan, name = pieces(source), change[0]
    make_parquet(source / f"{name}.parquet", [t.upper() for t in texts.get(name, "xyz")], rows)
    make_shards(source, out)
    straight = tmp_path / "straight"
    if change == "c":  # a new file goes behind the others
        (source / "c.parquet").rename(tmp_path / "c.parquet")
        make_shards(source, straight)
        (tmp_path / "c.parquet").rename(source / "c.parquet")
    make_shards(source, straight)
    assert contents(out) == contents(straight)
    same = {p.name for p in out.glob("train_*.bin") if before.get(p.name) == p.stat().st_mtime_ns}
    now = pieces(source, ("a", "b") if change == "c" else ()).items() & plan.items()
    assert same == {f"train_{n:06}.bin" for n, each in now if all(p[0] in kept for p in each)}
    assert same
    assert same < set(before)


def pieces(source: Path, first: Iterable[str] = ()) -> dict[int, tuple[tuple[str, int, int], ...]]:
    """What each slice is made of: one letter for a file, and row groups."""
    found = sources.resolve(str(source))
    found = found.ordered([f"{name}.parquet" for name in by_hash(first)])
    plan = Plan(found, Options())
    plan.reach(math.inf)
    return {
        each.number: tuple((p.file.name[0], p.start, p.stop) for p in each.parts)
        for each in plan.slices.values()
    }


@pytest.fixture
def shuffled(tmp_path: Path) -> list[Path]:
    """Files to be made, in the order in which a run takes them."""
    return [tmp_path / "in" / f"{n}.parquet" for n in by_hash(range(4))]


@pytest.mark.usefixtures("small_slices")
def test_max_tokens_counts_no_finished_slice_behind_a_missing_one(
    shuffled: list[Path], tmp_path: Path, make_parquet, make_shards
) -> None:
    """Those behind may hold enough alone; still the slices are taken in their order."""
    out = tmp_path / "out"
    for path, texts in zip(shuffled, (["a few"], [" 9" * 25_000], ["b"], ["c"]), strict=True):
        make_parquet(path, texts)
    all_but_the_index(tmp_path / "in", out, max_tokens=10_000)
    (out / ".work" / "000000.json").unlink()
    source = sources.resolve(str(tmp_path / "in"))
    reports = itertools.count()

    def be_quick(progress: prepare.Progress) -> None:
        assert next(reports) < 200

    options = Options(val_fraction=0.2, max_tokens=10_000)
    prepare.tokenize(source, out, options, Processes(1), on_progress=be_quick)
    make_shards(tmp_path / "in", tmp_path / "straight", max_tokens=10_000)
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.usefixtures("small_slices")
def test_the_slice_that_max_tokens_cut_is_made_whole_when_files_before_it_shrink(
    shuffled: list[Path], tmp_path: Path, make_parquet, make_shards
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for n, path in enumerate(shuffled):
        make_parquet(path, [f"{n}{row}" + " 7" * 300 for row in range(40)], 20)
    sources.BYTES_PER_TOKEN = 0.0001  # a slice a row group; the fixture restores it
    all_but_the_index(source, out, max_tokens=15_000)
    make_parquet(shuffled[0], [f"{row}" + " 7" * 30 for row in range(40)], 20)
    make_shards(source, out, max_tokens=15_000)
    make_shards(source, tmp_path / "straight", max_tokens=15_000)
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("damage", ["shard lost", "shard cut", "record cut"])
def test_a_slice_whose_files_are_not_whole_is_made_again(
    tmp_path: Path, folder_of_text: Path, make_shards, damage: str
) -> None:
    out = tmp_path / "out"
    before = all_but_the_index(folder_of_text, out)
    shard, record = out / ".work" / "train_000003.bin", out / ".work" / "000003.json"
    if damage == "shard lost":
        shard.unlink()
    else:
        path = shard if damage == "shard cut" else record
        path.write_bytes(path.read_bytes()[:-10])
    make_shards(folder_of_text, out)
    make_shards(folder_of_text, tmp_path / "straight")
    assert contents(out) == contents(tmp_path / "straight")
    changed = {name for name, at in before.items() if (out / name).stat().st_mtime_ns != at}
    assert changed == {"train_000003.bin"}


# ---------------------------------------------------------------------------------------------
# No byte lost


def test_every_document_comes_back_byte_for_byte_on_its_side(
    tmp_path: Path, documents, make_parquet, make_shards
) -> None:
    ten_megabytes = (" ".join(documents) * 100)[:10_000_000]
    texts = [*documents, ten_megabytes, *HOSTILE]
    make_parquet(tmp_path / "a.parquet", texts)
    index = make_shards(tmp_path / "a.parquet", tmp_path / "out", val_fraction=0.3)
    sides = {
        split: [text.encode() for text in texts if is_val(text, 0.3) == (split == "val")]
        for split in shards.SPLITS
    }
    for split, wanted in sides.items():
        assert texts_of(tmp_path / "out", split) == wanted
        assert index.total("text_bytes", split) == sum(map(len, wanted))
        assert index.total("num_documents", split) == len(wanted) > 5
        lengths = [len(tokenizer.encode(text.decode())) for text in wanted]
        assert index.document_tokens[split].min == min(lengths)
        assert index.document_tokens[split].max == max(lengths)
        assert index.total("num_tokens", split) == sum(lengths) + len(lengths)


def test_the_same_text_is_never_on_both_sides(tmp_path: Path, make_parquet, make_shards) -> None:
    texts = [f"text number {n % 50}" for n in range(200)]
    for name, part in (("b", texts[:100]), ("a", texts[100:])):
        make_parquet(tmp_path / "in" / f"{name}.parquet", part)
    make_shards(tmp_path / "in", tmp_path / "out", val_fraction=0.4)
    train, val = (set(texts_of(tmp_path / "out", split)) for split in shards.SPLITS)
    assert train
    assert val
    assert not train & val
    assert len(train | val) == 50


def test_val_fraction_zero_holds_nothing_out(tmp_path: Path, documents, make_parquet, make_shards):
    make_parquet(tmp_path / "a.parquet", documents)
    index = make_shards(tmp_path / "a.parquet", tmp_path / "out", val_fraction=0.0)
    assert index.of("val") == ()
    assert index.total("num_documents", "train") == len(documents)


def test_null_and_empty_documents_are_skipped_and_counted(
    tmp_path: Path, make_parquet, make_shards
) -> None:
    make_parquet(tmp_path / "a.parquet", ["one", None, "", "two", "", None, None, "three"] * 3)
    index = make_shards(tmp_path / "a.parquet", tmp_path / "out", val_fraction=0.0)
    assert (index.skipped["null_documents"], index.skipped["empty_documents"]) == (9, 6)
    assert texts_of(tmp_path / "out", "train") == [b"one", b"two", b"three"] * 3


@pytest.mark.parametrize("inside", [True, False], ids=["metadata.int_score", "int_score"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_documents_below_min_score_or_without_one_are_dropped_and_counted(
    tmp_path: Path, make_shards, kind: str, inside: bool
) -> None:
    """smollm-corpus has the score in a struct, fineweb-edu as a column."""
    rows: list[dict[str, object]] = []
    for n, score in enumerate([3, 2, None, 5, 1, 4]):
        scores = {"score": 9.9, "int_score": score}
        rows.append({"text": f"text {n}"} | ({"metadata": scores} if inside else scores))
    if kind == "parquet":
        rows.append({"text": "text 6", "metadata" if inside else "int_score": None})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = make_shards(path, tmp_path / "out", val_fraction=0.0, min_score=3)
    assert texts_of(tmp_path / "out", "train") == [b"text 0", b"text 3", b"text 5"]
    assert index.skipped["low_score_documents"] == (4 if kind == "parquet" else 3)
    assert index.options["min_score"] == 3


def test_a_line_without_a_score_is_dropped_as_a_row_without_one_is(
    tmp_path: Path, make_shards
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "a", "metadata": None}, {"text": "b"}, {"text": "c", "score": 4}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = make_shards(path, tmp_path / "out", val_fraction=0.0, min_score=3)
    assert texts_of(tmp_path / "out", "train") == [b"c"]
    assert index.skipped["low_score_documents"] == 2
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(ForgeError, match="holds no text"):
        make_shards(path, tmp_path / "out2", min_score=3)
    path.write_text('{"text": "a", "score": null}')
    with pytest.raises(ForgeError, match="holds no text"):
        make_shards(path, tmp_path / "out2", min_score=3)


def test_a_score_column_may_have_a_dot_in_its_name(tmp_path: Path, make_shards) -> None:
    rows = [{"text": text, "metadata.int_score": n} for n, text in enumerate("abcd")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    make_shards(tmp_path / "a.parquet", tmp_path / "out", val_fraction=0.0, min_score=2)
    assert texts_of(tmp_path / "out", "train") == [b"c", b"d"]


def test_min_score_needs_scores(tmp_path: Path, make_parquet, make_shards) -> None:
    source = make_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(ForgeError, match=r"no score: none of metadata\.int_score"):
        make_shards(source, tmp_path / "out", min_score=3)
    row = {"text": "a", "score": "3"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "b.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps(row))
    for name, kind in (("b.parquet", "BYTE_ARRAY"), ("b.jsonl", "str")):
        with pytest.raises(ForgeError, match=f"the score 'score' holds {kind}, not a number"):
            make_shards(tmp_path / name, tmp_path / "out", min_score=3)
    with pytest.raises(ForgeError, match="not a number"):
        Options(min_score=float("nan"))


def test_skip_errors_leaves_out_damaged_places_and_lists_them(
    tmp_path: Path, make_parquet, documents
) -> None:
    for name in "abc":
        make_parquet(tmp_path / "in" / f"{name}.parquet", documents, rows=20)
    a, b = tmp_path / "in" / "a.parquet", tmp_path / "in" / "b.parquet"
    a.write_bytes(a.read_bytes()[:-10])
    column = pq.read_metadata(b).row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = b.read_bytes()
    b.write_bytes(data[:start] + b"\xff" * 40 + data[start + 40 :])
    made = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        outcome = tokenize(
            tmp_path / "in", out, Options(val_fraction=0.0), workers=workers, skip_errors=True
        )
        made.append(contents(out))
    assert made[0] == made[1]
    kept = {"a": [], "b": documents[:20] + documents[40:], "c": documents}
    assert texts_of(tmp_path / "1", "train") == [
        t.encode() for n in by_hash("abc") for t in kept[n]
    ]
    damaged = sorted(outcome.index.skipped["damaged"])
    assert len(damaged) == outcome.index.skipped["num_damaged"] == 2
    assert damaged[0].startswith("a.parquet: not a whole parquet file")
    assert damaged[1].startswith("b.parquet, row group 1: damaged row group")


def test_damaged_lines_are_left_out_and_no_others(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {n}"}).encode() for n in range(100)]
    lines[7], lines[50], lines[51] = b"[", json.dumps({"text": "\ud800"}).encode(), b"\xff"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    many = [b"[]" for _ in range(30)]
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([*many, *lines[:3]]))
    options = Options(val_fraction=0.0)
    outcome = tokenize(tmp_path / "*.jsonl", tmp_path / "out", options, skip_errors=True)
    kept = [f"text {n}".encode() for n in range(100) if n not in (7, 50, 51)]
    assert sorted(texts_of(tmp_path / "out", "train")) == sorted([*kept, *kept[:3]])
    skipped = outcome.index.skipped
    assert skipped["num_damaged"] == 33
    listed = sorted(place.split(": ")[0] for place in skipped["damaged"])
    assert len(listed) == 20, "the first places of each slice"
    assert {place.split(", ")[0] for place in listed} <= {"a.jsonl", "b.jsonl"}
    assert "b.jsonl, line 1" in listed or "a.jsonl, line 8" in listed


@pytest.mark.parametrize("min_score", [None, 3])
def test_a_text_of_parquet_that_is_not_utf8_is_left_out_alone(
    tmp_path: Path, min_score: int | None
) -> None:
    texts: list[bytes | None] = [b"text %d" % n for n in range(3000)]
    texts[2], texts[5], texts[2500] = None, b"caf\xe9", b"\xff"
    column = pa.Array.from_buffers(
        pa.string(), len(texts), pa.array(texts, pa.binary()).buffers(), null_count=1
    )
    scores = [n % 5 for n in range(3000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column, "score": scores}), path, row_group_size=2000)
    options = Options(val_fraction=0.0, min_score=min_score)
    with pytest.raises(ForgeError, match="invalid UTF-8") as caught:
        tokenize(path, tmp_path / "stops", options)
    assert str(caught.value.where) == f"{path}, row group 0, row 6"
    outcome = tokenize(path, tmp_path / "out", options, skip_errors=True)
    kept = [
        text
        for n, text in enumerate(texts)
        if n not in (2, 5, 2500) and (min_score is None or scores[n] >= min_score)
    ]
    assert texts_of(tmp_path / "out", "train") == kept
    assert outcome.index.skipped["damaged"] == [
        "a.parquet, row group 0, row 6: invalid UTF-8: unexpected end of data",
        "a.parquet, row group 1, row 501: invalid UTF-8: invalid start byte",
    ]


def test_a_damaged_row_group_is_counted_among_many_bad_texts(tmp_path: Path) -> None:
    texts = [b"\xff"] * 25 + [b"sound %d" % n for n in range(25)] + [b"\xff"] + [b"end"] * 24
    column = pa.Array.from_buffers(pa.string(), 75, pa.array(texts, pa.binary()).buffers())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path, 25, use_dictionary=False, compression="none")
    data = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data[start : start + 12] = b"\xff" * 12
    path.write_bytes(data)
    options = Options(val_fraction=0.0)
    outcome = tokenize(path, tmp_path / "out", options, skip_errors=True)
    damaged = outcome.index.skipped["damaged"]
    assert outcome.index.skipped["num_damaged"] == 27
    assert len(damaged) == 20
    assert all(place.endswith("invalid UTF-8: invalid start byte") for place in damaged)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_text_before_the_cut_of_an_archive_is_kept(tmp_path: Path, suffix: str) -> None:
    text = random.Random(0)
    lines = "".join(json.dumps({"text": text.randbytes(30).hex()}) + "\n" for _ in range(60_000))
    path = tmp_path / f"a.jsonl{suffix}"
    with pa.output_stream(str(path), compression="detect") as stream:
        stream.write(lines.encode())
    path.write_bytes(path.read_bytes()[:-9])
    options = Options(val_fraction=0.0)
    outcome = tokenize(path, tmp_path / "out", options, skip_errors=True)
    num_kept = len(texts_of(tmp_path / "out", "train"))
    assert 58_000 < num_kept <= 60_000  # all but the last block (zstd's have 128 KiB) of 4.4 MB
    (damaged,) = outcome.index.skipped["damaged"]
    assert damaged.startswith(path.name)
    assert damaged.endswith(f"; line {num_kept:,} is the last that could be read")


def test_a_source_without_text_is_an_error(tmp_path: Path, make_parquet, make_shards) -> None:
    make_parquet(tmp_path / "a.parquet", [None, "", ""])
    with pytest.raises(ForgeError, match="every document is null, empty"):
        make_shards(tmp_path / "a.parquet", tmp_path / "out")
    assert not (tmp_path / "out" / shards.INDEX_FILE).exists()


# ---------------------------------------------------------------------------------------------
# The folder


@pytest.fixture
def finished(tmp_path: Path, make_parquet, make_shards) -> Path:
    make_parquet(tmp_path / "a.parquet", [f"document {n}" for n in range(30)])
    make_shards(tmp_path / "a.parquet", tmp_path / "out")
    return tmp_path / "out"


def stamps(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_a_finished_folder_is_left_alone(finished: Path) -> None:
    before = stamps(finished)
    outcome = tokenize(
        finished.parent / "a.parquet", finished, Options(val_fraction=0.2), workers=2
    )
    assert outcome.up_to_date
    assert outcome.index == shards.load_index(finished)
    assert stamps(finished) == before


@pytest.mark.parametrize(
    ("option", "value", "old"),
    [
        ("val_fraction", 0.1, "0.2"),
        ("max_tokens", 10, "None"),
        ("shard_tokens", 1000, "10000000"),
        ("text_column", "id", "'text'"),
    ],
)
def test_other_options_are_refused_and_named(
    finished: Path, make_shards, option: str, value: object, old: str
) -> None:
    before = stamps(finished)
    with pytest.raises(ForgeError) as caught:
        make_shards(finished.parent / "a.parquet", finished, **{option: value})
    assert f"{option}: {old}, now {value!r}" in caught.value.what
    assert stamps(finished) == before


def test_another_source_is_refused_and_named(finished: Path, make_parquet, make_shards) -> None:
    source = finished.parent / "a.jsonl"
    source.write_text('{"text": "other"}')
    with pytest.raises(ForgeError, match="source kind: 'parquet', now 'jsonl'"):
        make_shards(source, finished)
    source.unlink()
    make_shards(finished.parent, finished)  # the same file by another path


def tokens_of(folder: Path, split: str) -> list[int]:
    index = shards.load_index(folder)
    maps = [shards.map_shard(folder / s.file, s.num_tokens) for s in index.of(split)]
    return list(itertools.chain.from_iterable(each.tolist() for each in maps))


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("limits", [(10_000, 30_000), (10_000, None), (30_000, 36_000)])
def test_a_larger_max_tokens_extends_a_finished_folder_to_the_bytes_of_one_run(
    tmp_path: Path, folder_of_text: Path, make_shards, limits: tuple[int, int | None]
) -> None:
    out, straight = tmp_path / "out", tmp_path / "straight"
    make_shards(folder_of_text, out, max_tokens=limits[0])
    train, val = stamps(out), tokens_of(out, "val")
    kept = sorted(path for path in train if path.name.startswith("train"))[:-1]
    make_shards(folder_of_text, out, workers=2, max_tokens=limits[1])
    make_shards(folder_of_text, straight, max_tokens=limits[1])
    assert contents(out) == contents(straight)
    assert {p: p.stat().st_mtime_ns for p in kept} == {p: train[p] for p in kept}
    assert tokens_of(out, "val")[: len(val)] == val
    with pytest.raises(ForgeError, match=f"max_tokens: {limits[1]}, now 5000"):
        make_shards(folder_of_text, out, max_tokens=5_000)


@pytest.mark.usefixtures("small_slices")
def test_more_files_extend_a_finished_folder_behind_what_it_has(
    tmp_path: Path, documents, make_parquet, make_shards
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    make_parquet(source / "b.parquet", [*documents[:30], None])
    make_shards(source, out)
    old, val = stamps(out), tokens_of(out, "val")
    kept = sorted(path for path in old if path.name.startswith("train"))[:-1]
    assert kept
    make_parquet(source / "a.parquet", [*documents[30:], None])
    make_parquet(source / "c.parquet", ["more text"])
    index = make_shards(source, out)
    assert {p: p.stat().st_mtime_ns for p in kept} == {p: old[p] for p in kept}
    assert tokens_of(out, "val")[: len(val)] == val
    assert verify.verify(index, 1, lambda count: None) == []
    names = [file["name"] for file in index.source["files"]]
    assert names == ["b.parquet", *(f"{name}.parquet" for name in by_hash("ac"))]
    assert index.skipped["null_documents"] == 2
    every = [text.encode() for text in [*documents, "more text"]]
    assert sorted(texts_of(out, "train") + texts_of(out, "val")) == sorted(every)
    assert sum(sum(each.histogram) for each in index.document_tokens.values()) == len(every)
    before = stamps(out)
    make_shards(source, out)
    assert stamps(out) == before, "up to date"


def test_a_folder_of_one_slice_is_extended_and_no_document_comes_twice(
    tmp_path: Path, make_parquet, make_shards
) -> None:
    texts = [f"document {n}" for n in range(80)]
    for name, some in (("b", texts[:40]), ("a", texts[40:])):
        make_parquet(tmp_path / "in" / f"{name}.parquet", some)
        index = make_shards(tmp_path / "in", tmp_path / "out", val_fraction=0.5)
        assert len(index.slices) == 1
    found = texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")
    assert sorted(found) == sorted(text.encode() for text in texts)


@pytest.mark.usefixtures("small_slices")
def test_an_extension_that_is_killed_leaves_the_folder_whole_and_resumes(
    tmp_path: Path, documents, make_parquet, make_shards
) -> None:
    source, outs = tmp_path / "in", [tmp_path / name for name in ("killed", "straight", "plain")]
    make_parquet(source / "b.parquet", documents[:30])
    for out in outs:
        old = make_shards(source, out)
    make_parquet(source / "a.parquet", documents[30:])
    before = all_but_the_index(source, outs[0])
    assert verify.verify(shards.load_index(outs[0]), 1, lambda count: None) == []
    for out in outs[:2]:
        make_shards(source, out, workers=2)
    assert contents(outs[0]) == contents(outs[1])
    made = {p.name: p.stat().st_mtime_ns for p in outs[0].glob("train_*.bin")}
    assert before.items() < made.items()
    # The old source asks for no more than there is, and takes nothing from the killed run.
    all_but_the_index(source, outs[2])
    (source / "a.parquet").rename(tmp_path / "a.parquet")
    assert replace(make_shards(source, outs[2]), folder=old.folder) == old
    (tmp_path / "a.parquet").rename(source / "a.parquet")
    make_shards(source, outs[2])
    assert contents(outs[2]) == contents(outs[1])


@pytest.mark.parametrize("moves", range(4))
def test_a_kill_while_a_folder_is_published_is_mended_by_the_next_run(
    tmp_path: Path, make_parquet, make_shards, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    source, out, straight = tmp_path / "in", tmp_path / "out", tmp_path / "straight"
    make_parquet(source / "a.parquet", [f"document {n}" for n in range(30)])
    make_shards(source, out)
    make_parquet(source / "b.parquet", [f"text {n}" for n in range(30)])
    shutil.copytree(out, straight)
    make_shards(source, straight)
    replaces, plain = itertools.count(), Path.replace

    def die(path: Path, target: Path) -> Path:
        if path.parent.name == ".work" and path.suffix in (".bin", ".tiktoken", ".json"):
            assert next(replaces) < moves, "killed"
        return plain(path, target)

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(AssertionError, match="killed"):
        make_shards(source, out)
    monkeypatch.undo()
    make_shards(source, out)
    assert contents(out) == contents(straight)


def test_a_source_file_that_is_gone_or_changed_is_not_extended(
    finished: Path, make_parquet, make_shards
) -> None:
    make_parquet(finished.parent / "b.parquet", ["another"])
    for source in (finished.parent / "b.parquet", finished.parent):
        if source.is_dir():
            make_parquet(finished.parent / "a.parquet", ["changed"])
        with pytest.raises(ForgeError, match="gone or changed"):
            make_shards(source, finished)


def test_an_earlier_versions_unfinished_folder_is_refused_and_its_finished_one_left_alone(
    finished: Path, make_parquet, make_shards
) -> None:
    source, index = finished.parent / "a.parquet", finished / "index.json"
    raw = json.loads(index.read_text())
    del raw["slices"], raw["options"]["split_on"]
    raw["options"]["shard_tokens"] = 100_000_000
    raw["base"] = {"num_slices": 0}  # as a version between the two had it
    index.write_text(json.dumps(raw))
    before = stamps(finished)
    make_shards(source, finished)
    make_parquet(finished.parent / "b.parquet", ["more"])
    with pytest.raises(ForgeError, match="earlier version of forge-prep made the folder"):
        make_shards(finished.parent, finished)
    assert stamps(finished) == before
    index.unlink()
    (finished / ".work").mkdir()
    record = {"shards": raw["shards"]}
    (finished / ".work" / "000000.json").write_text(json.dumps(record))
    plan = {key: raw[key] for key in ("source", "options", "tokenizer")}
    (finished / ".work" / "plan.json").write_text(json.dumps(plan))
    before = stamps(finished)
    for overwrite in (False, True):
        with pytest.raises(ForgeError, match="what an earlier version began"):
            tokenize(source, finished, Options(), overwrite=overwrite)
    assert stamps(finished) == before


def test_val_is_few_shards_of_one_size_cut_between_documents(
    tmp_path: Path, make_parquet, make_shards, documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BYTES_PER_TOKEN", 0.004)
    make_parquet(tmp_path / "a.parquet", documents)
    one = make_shards(tmp_path / "a.parquet", tmp_path / "one", val_fraction=0.5)
    assert len(one.of("train")) > 3
    assert len(one.of("val")) == 1
    monkeypatch.setattr(merge, "VAL_SHARD_TOKENS", one.total("num_tokens", "val") // 3)
    some = make_shards(tmp_path / "a.parquet", tmp_path / "some", val_fraction=0.5)
    sizes = [shard.num_tokens for shard in some.of("val")]
    assert len(sizes) == 4
    assert min(sizes) > max(sizes) / 2
    assert texts_of(tmp_path / "some", "val") == texts_of(tmp_path / "one", "val")
    assert some.total("text_bytes", "val") == one.total("text_bytes", "val")
    assert verify.verify(some, 1, lambda count: None) == []


def test_an_unfinished_run_with_other_options_is_refused_and_named(
    tmp_path: Path, make_parquet, make_shards
) -> None:
    source = make_parquet(tmp_path / "a.parquet", ["text"])
    all_but_the_index(source, tmp_path / "out")
    with pytest.raises(ForgeError, match=r"val_fraction: 0\.2, now 0\.5"):
        make_shards(source, tmp_path / "out", val_fraction=0.5)


def test_a_run_without_text_leaves_the_options_free(tmp_path: Path, make_shards) -> None:
    """The error says to name another column, and that must work."""
    path, out = tmp_path / "a.parquet", tmp_path / "out"
    pq.write_table(pa.table({"text": ["", ""], "body": ["some", "text"]}), path)
    with pytest.raises(ForgeError, match="no text"):
        make_shards(path, out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(ForgeError, match="no text"):
        make_shards(path, out)
    assert make_shards(path, out, text_column="body").total("num_documents") == 2
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ForgeError, match="no text"):
        tokenize(path, out, Options(), overwrite=True)
    assert make_shards(path, out, text_column="body").total("num_documents") == 2


def test_a_folder_of_other_peoples_shards_is_not_overwritten(
    finished: Path, make_parquet, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for split in shards.SPLITS:
        shutil.copy(finished / f"{split}_000000.bin", theirs / f"fineweb_{split}_000001.bin")
    foreign.index_folder(theirs, raw=False)
    before = stamps(theirs)
    with pytest.raises(ForgeError, match="other files"):
        tokenize(tmp_path / "a.parquet", theirs, Options(), overwrite=True)
    assert stamps(theirs) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("index.json", '{"chunks": [], "config": {"data_format": ["no_header_tensor:16"]}}'),
        ("index.json", '{"version": 2, "shards": []}'),
        (".work/plan.json", '{"plan": "of another program"}'),
        (".work/notes.txt", "years of work"),
        ("train_000000.bin", "another program's"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_without_our_format_are_never_touched(
    tmp_path: Path, make_parquet, name: str, content: str, overwrite: bool
) -> None:
    out = tmp_path / "out"
    (out / ".work").mkdir(parents=True)
    (out / name).write_text(content)
    before = stamps(out)
    source = make_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(ForgeError, match=r"other files|name of a shard"):
        tokenize(source, out, Options(), overwrite=overwrite)
    assert stamps(out) == before


def test_another_file_with_a_shards_name_is_neither_removed_nor_replaced(finished: Path) -> None:
    stranger = finished / "train_000001.bin"
    stranger.write_bytes(b"another program's")
    for overwrite in (False, True):
        with pytest.raises(ForgeError, match="has the name of a shard") as caught:
            tokenize(finished.parent / "a.parquet", finished, Options(), overwrite=overwrite)
        assert caught.value.where == stranger
    assert stranger.read_bytes() == b"another program's"


def test_a_folder_in_a_place_that_cannot_be_looked_at_is_an_error(
    finished: Path, make_shards
) -> None:
    with pytest.raises(ForgeError, match="File name too long"):
        make_shards(finished.parent / "a.parquet", finished.parent / ("x" * 300))


def test_a_folder_of_other_files_is_refused_and_untouched(
    tmp_path: Path, make_parquet, make_shards
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    before = stamps(out)
    source = make_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(ForgeError, match=r"neither shards nor an unfinished run|name of a shard"):
        make_shards(source, out)
    (out / "train_000001.bin").write_text("years of somebody's work")  # and no index
    before = stamps(out)
    with pytest.raises(ForgeError, match=r"neither shards nor an unfinished run|name of a shard"):
        tokenize(source, out, Options(), overwrite=True)
    assert stamps(out) == before


def test_overwrite_removes_shards_and_nothing_else(finished: Path) -> None:
    mine = {finished / name for name in ("notes.md", "train_000000.bin.bak")}
    for path in mine:
        path.write_text("mine")
    outcome = tokenize(finished.parent / "a.parquet", finished, Options(), overwrite=True)
    assert {path.read_text() for path in mine} == {"mine"}
    for path in mine:
        path.unlink()
    assert verify.verify(outcome.index, 1, lambda count: None) == []


@pytest.mark.usefixtures("small_slices")
def test_overwrite_resumes_after_a_kill(tmp_path: Path, folder_of_text: Path, make_shards) -> None:
    """It begins a plan once: what that has made is not in its own way."""
    out, straight = tmp_path / "out", tmp_path / "straight"
    make_shards(folder_of_text, out, val_fraction=0.0)
    made = {}
    for run in range(3):
        with pytest.MonkeyPatch.context() as patch:
            if run < 2:
                patch.setattr(merge, "make_index", None)
            with pytest.raises(TypeError) if run < 2 else contextlib.nullcontext():
                options = Options(val_fraction=0.2)
                tokenize(folder_of_text, out, options, overwrite=True)
        made[run] = {p.name: p.stat().st_mtime_ns for p in out.rglob("train_*.bin")}
    assert made[0] == made[1] == made[2]
    make_shards(folder_of_text, straight)
    assert contents(out) == contents(straight)


def test_a_finished_folder_whose_shard_is_damaged_is_not_up_to_date(finished: Path) -> None:
    shard = finished / "train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    source = sources.resolve(str(finished.parent / "a.parquet"))
    with pytest.raises(ForgeError, match="shorter than its header says") as caught:
        prepare.tokenize(source, finished, Options(val_fraction=0.2), Processes(1))
    assert "--overwrite" in str(caught.value.fix)
    shutil.copy(finished.parent / "a.parquet", finished.parent / "b.parquet")
    source = sources.resolve(str(finished.parent))
    with pytest.raises(ForgeError, match="shorter than its header says"):  # nor is it extended
        prepare.tokenize(source, finished, Options(val_fraction=0.2), Processes(1))


def test_an_edit_between_two_runs_is_noticed_whatever_its_size(
    tmp_path: Path, make_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksum of a file is of its end alone; an unfinished run has its time, too."""
    monkeypatch.setattr(sources, "TAIL_BYTES", 10)
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    path = source / "a.jsonl"
    path.write_text('{"text": "old"}\n{"text": "the end"}\n')
    all_but_the_index(source, out)
    path.write_text('{"text": "new"}\n{"text": "the end"}\n')
    make_shards(source, out, val_fraction=0.2)
    assert sorted(texts_of(out, "train") + texts_of(out, "val")) == [b"new", b"the end"]


def test_a_file_that_is_replaced_during_the_run_is_an_error(tmp_path: Path, make_parquet) -> None:
    path = make_parquet(tmp_path / "a.parquet", ["a", "b"])
    found = sources.resolve(str(path))
    make_parquet(path, ["another", "text"], column="body")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ForgeError, match=r"has changed since this run began|no column"):
        prepare.tokenize(found, tmp_path / "out", Options(), Processes(1))
    make_parquet(path, ["a", "c"])
    os.utime(path, ns=(1, 1))
    out = tmp_path / "out"
    for skips in (False, True):
        with pytest.raises(ForgeError, match="has changed since this run began"):
            prepare.tokenize(found, out, Options(), Processes(1), skip_errors=skips)


def test_an_out_that_cannot_be_written_is_an_error(
    tmp_path: Path, make_parquet, make_shards
) -> None:
    source = make_parquet(tmp_path / "a.parquet", ["a"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ForgeError, match=r"cannot (write|make the folder)"):
        make_shards(source, tmp_path / "file" / "out")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if not os.access(closed, os.W_OK):  # root may write anywhere
        with pytest.raises(ForgeError, match=r"cannot (write|make the folder)"):
            make_shards(source, closed / "out")


def test_two_runs_do_not_write_one_folder(tmp_path: Path, make_parquet, make_shards) -> None:
    out = tmp_path / "out"
    index = make_shards(make_parquet(tmp_path / "a.parquet", ["a"]), out)
    with holding(out):
        for overwrite in (False, True):
            with pytest.raises(ForgeError, match="another forge-prep"):
                tokenize(tmp_path / "a.parquet", out, Options(), overwrite=overwrite)
    assert verify.verify(index, 1, lambda count: None) == []


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_overwrite_keeps_the_shards_until_the_new_source_is_known_to_be_good(
    tmp_path: Path, make_parquet, make_shards
) -> None:
    out = tmp_path / "out"
    index = make_shards(make_parquet(tmp_path / "a.parquet", ["a", "b"]), out)
    other = make_parquet(tmp_path / "b.parquet", ["c"], column="body")
    with pytest.raises(ForgeError, match="no column 'text'"):
        tokenize(other, out, Options(), overwrite=True)
    assert shards.load_index(out) == index
    assert verify.verify(index, 1, lambda count: None) == []


def test_a_first_run_that_failed_leaves_nothing_and_does_not_bind_the_second(
    tmp_path: Path, make_parquet, make_shards
) -> None:
    """The error says to name the column, and then naming it works."""
    source, out = make_parquet(tmp_path / "a.parquet", ["a"], column="body"), tmp_path / "out"
    with pytest.raises(ForgeError, match="no column 'text'"):
        make_shards(source, out)
    assert not out.exists()
    (tmp_path / "x.jsonl").write_text('{"body": "one"}\n{"body": 2}\n')
    with pytest.raises(ForgeError, match="not a string"):
        make_shards(tmp_path / "x.jsonl", out, text_column="body")
    assert not out.exists()
    assert make_shards(source, out, text_column="body").total("num_documents") == 1


# ---------------------------------------------------------------------------------------------
# The machine


def test_a_write_that_fails_in_a_worker_is_an_error_and_leaves_nothing_half_done(
    tmp_path: Path, documents, make_shards
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"text": " ".join(documents) * 15}) + "\n")
    said = pytest.raises(ForgeError, match="cannot write: File too large")
    with files_up_to(1_500_000), said as caught:
        make_shards(source, tmp_path / "out", val_fraction=0.0)
    assert "finished slices are kept" in str(caught.value.fix)
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize(
    ("number", "where", "advice"),
    [
        (errno.ENOSPC, "/dev/shm", "--shm-size"),
        (errno.EROFS, "/dev/shm", "--shm-size"),
    ],
)
def test_shared_memory_that_is_full_is_not_a_full_disk(
    tmp_path: Path,
    make_parquet,
    make_shards,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    where: str,
    advice: str,
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(multiprocessing.get_context("spawn").__class__, "Array", fail)
    with pytest.raises(ForgeError, match="cannot make shared memory") as caught:
        make_shards(make_parquet(tmp_path / "a.parquet", ["a"]), tmp_path / "out")
    assert caught.value.where == where
    assert advice in str(caught.value.fix)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOLCK, "has locks"), (errno.EOPNOTSUPP, "has locks"), (errno.EIO, "check the disk")],
)
def test_a_folder_that_cannot_be_locked_is_an_error_with_advice_that_fits(
    tmp_path: Path,
    make_parquet,
    make_shards,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    advice: str,
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(ForgeError, match="cannot lock the folder") as caught:
        make_shards(make_parquet(tmp_path / "a.parquet", ["a"]), tmp_path / "out")
    assert advice in str(caught.value.fix)
    assert "make room" not in str(caught.value.fix)


def test_want_of_memory_is_an_error_even_where_damage_is_left_out(
    tmp_path: Path, make_parquet
) -> None:
    """A worker of its own with little memory: nothing is left out, and the next run continues."""
    make_parquet(tmp_path / "in" / "a.parquet", ["small one", "small two"])
    large = ["before", "word and text " * 10**7, "after"]
    make_parquet(tmp_path / "in" / "b.parquet", large)
    command = [sys.executable, "-m", "pipeline.cli", "tokenize", str(tmp_path / "in")]
    command += ["--out", str(tmp_path / "out"), "--workers", "1", "--on-error", "skip"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (550_000_000,) * 2)  # noqa: E731
    run = functools.partial(subprocess.run, command, cwd=ROOT, capture_output=True, text=True)
    short = run(preexec_fn=limit)
    assert short.returncode == 1, short.stdout
    assert "memory" in short.stderr
    assert "fewer --workers" in short.stderr
    assert "Traceback" not in short.stderr
    assert not (tmp_path / "out" / shards.INDEX_FILE).exists()
    assert run().returncode == 0
    assert shards.load_index(tmp_path / "out").total("num_documents") == 5


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own of 12 MB, as far as this machine lets one mount it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.usefixtures("small_slices")
def test_a_full_disk_is_an_error_and_the_next_run_resumes(
    disk: Path, tmp_path: Path, documents, make_parquet, make_shards
) -> None:
    """Somebody else fills the disk while we are at work; then there is room again."""
    source = make_parquet(tmp_path / "a.parquet", documents * 8)
    options, out = Options(val_fraction=0.2), disk / "out"

    def fill(progress: prepare.Progress) -> None:
        if len(records(out)) >= 3:
            with suppress(OSError), (disk / "film").open("ab", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)

    with pytest.raises(ForgeError, match="cannot write: No space left on device") as caught:
        tokenize(source, out, options, workers=2, on_progress=fill)
    assert "make room" in str(caught.value.fix)
    assert not list(out.rglob("*.partial"))
    finished = {p.name: p.stat().st_mtime_ns for p in out.rglob("train_*.bin")}
    assert len(finished) >= 3
    (disk / "film").unlink()
    tokenize(source, out, options, workers=2)
    recorded = {p.name: p.stat().st_mtime_ns for p in out.glob("train_*.bin")}
    assert len(recorded.items() & finished.items()) >= 3
    tokenize(source, tmp_path / "straight", options)
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_read_only_disk_is_an_error_with_a_cure(
    disk: Path, tmp_path: Path, make_parquet, overwrite: bool
) -> None:
    source = make_parquet(tmp_path / "a.parquet", ["a", "b"])
    tokenize(source, disk / "made", Options())
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name in ("made", "new"):
        options = Options(val_fraction=0.0 if overwrite else 0.005)
        if name == "made" and not overwrite:
            assert tokenize(source, disk / name, options).up_to_date
            continue
        with pytest.raises(ForgeError, match="Read-only file system") as caught:
            tokenize(source, disk / name, options, overwrite=overwrite)
        assert caught.value.fix


@pytest.mark.usefixtures("small_slices")
def test_a_worker_killed_by_the_kernel_is_an_error_and_the_next_run_resumes(
    tmp_path: Path, folder_of_text: Path, make_shards
) -> None:
    options, out = Options(val_fraction=0.2), tmp_path / "out"

    def kill(progress: prepare.Progress) -> None:
        if any(out.glob(".work/[0-9]*.json")):
            for worker in multiprocessing.active_children()[:1]:
                os.kill(worker.pid or 0, signal.SIGKILL)

    with pytest.raises(ForgeError, match="a worker process was killed") as caught:
        tokenize(folder_of_text, out, options, workers=2, on_progress=kill)
    assert "fewer --workers" in str(caught.value.fix)
    assert multiprocessing.active_children() == []
    assert not list(out.rglob("*.partial"))
    tokenize(folder_of_text, out, options, workers=2)
    make_shards(folder_of_text, tmp_path / "straight")
    assert contents(out) == contents(tmp_path / "straight")


def test_progress_ends_at_the_whole_of_the_plan(
    tmp_path: Path, folder_of_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BYTES_PER_TOKEN", 0.004)
    seen: list[prepare.Progress] = []
    outcome = tokenize(
        folder_of_text, tmp_path / "out", Options(), workers=2, on_progress=seen.append
    )
    done = [each.done_bytes for each in seen]
    assert done == sorted(done)
    assert {each.total_bytes for each in seen} == {seen[0].total_bytes}
    assert 0.9 < done[-1] / seen[0].total_bytes <= 1
    assert seen[-1].num_tokens == outcome.index.total("num_tokens")


@pytest.mark.parametrize("compressed", [False, True])
def test_progress_up_to_a_limit_goes_by_tokens(
    tmp_path: Path, documents, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    """Few documents with a good score make the way longer; a dense archive makes it shorter."""
    monkeypatch.setattr(sources, "BYTES_PER_TOKEN", 0.002)
    texts = [text for text in documents if len(text) > 500] * 3
    options = Options(val_fraction=0.0, max_tokens=12_000, min_score=None if compressed else 3)
    if compressed:
        path = tmp_path / "in"
        path.mkdir()
        for number, text in enumerate(texts):
            with pa.output_stream(str(path / f"{number:03}.jsonl.zst"), compression="zstd") as out:
                out.write(json.dumps({"text": text}, ensure_ascii=False).encode())
    else:
        path = tmp_path / "a.parquet"
        scores = [3 if number % 8 == 0 else 1 for number in range(len(texts))]
        pq.write_table(pa.table({"text": texts, "score": scores}), path, 8)
    seen: list[prepare.Progress] = []
    tokenize(path, tmp_path / "out", options, on_progress=seen.append)
    for each in seen:
        wanted = min(1.0, each.num_tokens / 12_000)
        assert each.done_bytes / each.total_bytes == pytest.approx(wanted, abs=0.2)
    assert seen[-1].done_bytes / seen[-1].total_bytes > 0.9


def test_kills_change_no_byte_and_redo_no_finished_slice(tmp_path: Path) -> None:
    tally = kill_prep.torment(tmp_path, kills=4, workers=2, num_slices=32)
    assert tally.kills.total() == 4
    assert tally.redone_slices == 0
    assert tally.half_written == 0
    assert tally.identical
