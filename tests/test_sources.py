"""Every kind of source gives the same documents; every broken one is named with its place."""

import errno
import gzip
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline import plan, readers, sources
from pipeline.errors import DamageError, ForgeError
from pipeline.plan import Plan
from pipeline.readers import Reading
from pipeline.sources import Options, Part, Slice, SourceFile

TEXTS = ["one", None, "zwei — две", "", "a\nb", "quatre"]


def lines_of(texts: list[str | None], key: str = "text") -> bytes:
    return b"".join(
        json.dumps({key: text, "id": n}).encode() + b"\n" for n, text in enumerate(texts)
    )


def read(path: Path, column: str = "text", split_on: str | None = None) -> list[str | None]:
    """All texts of a source, slice by slice, as prepare.py reads them."""
    source = sources.resolve(str(path))
    options, texts = Options(column, split_on=split_on), []
    for each in planned(source, options):
        for part in each.parts:
            at = Reading(source.root / part.file.name, options)
            for batch in readers.read_documents(source.kind, at, part):
                texts += [None if text is None else text.decode() for text in batch.documents]
    return texts


def planned(source: sources.Source, options: Options) -> list[Slice]:
    plan = Plan(source, options)
    plan.reach(math.inf)
    return list(plan.slices.values())


def failure(action: Callable[..., object], *arguments: object) -> ForgeError:
    with pytest.raises(ForgeError) as caught:
        action(*arguments)
    return caught.value


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".jsonl", bytes),
        (".jsonl.gz", gzip.compress),
        (".jsonl.zst", zstandard.ZstdCompressor().compress),
        (".JSONL", bytes),
        (".json", bytes),
        (".json.gz", gzip.compress),
        (".json.zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_every_form_of_json_lines_gives_the_same_documents(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(lines_of(TEXTS)))
    assert read(path) == TEXTS


def test_members_of_a_joined_archive_are_all_read(tmp_path: Path) -> None:
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(pack(lines_of(["one", "two"])) + pack(lines_of(["three"])))
        assert read(path) == ["one", "two", "three"], suffix


def test_a_gzip_archive_may_be_padded_with_zeros(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    member = gzip.compress(lines_of(["one", "two"]))
    path.write_bytes(member + bytes(512) + member + bytes(3))
    assert read(path) == ["one", "two"] * 2
    path.write_bytes(member + b"garbage")
    assert "line 2 is the last that could be read" in failure(read, path).what


def test_zst_archives_with_long_windows_and_frames_to_skip_are_read(tmp_path: Path) -> None:
    longest = zstandard.ZstdCompressionParameters(window_log=zstandard.WINDOWLOG_MAX)
    compressor = zstandard.ZstdCompressor(compression_params=longest).compressobj()
    frame = compressor.compress(lines_of(["one"])) + compressor.flush()
    assert zstandard.get_frame_parameters(frame).window_size > 2**27
    skipped = struct.pack("<II", 0x184D2A50, 5) + b"12345"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skipped + frame + skipped + zstandard.compress(lines_of(["two"])) + skipped)
    assert read(path) == ["one", "two"]


def test_json_files_are_read_where_nothing_else_is_there(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "a.jsonl").write_bytes(lines_of(["a"]))
    assert read(tmp_path) == ["a"]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "dataset_info.json").write_text('[{"text": "a list"}]')
    error = failure(read, tmp_path)
    assert error.what == "invalid JSON: list, not an object"


@pytest.mark.parametrize(
    ("error", "says", "advice"),
    [
        (OSError(errno.EIO, "Input/output error"), "cannot read a source file", "check the disk"),
        (OSError(errno.ESTALE, "Stale file handle"), "cannot read a source file", "check the disk"),
        (OSError(errno.EMFILE, "Too many open files"), "cannot read a source file", "ulimit -n"),
        (MemoryError(), "not enough memory", "fewer --workers"),
        (pa.ArrowMemoryError("malloc of size 9 failed"), "not enough memory", "fewer --workers"),
        (OSError("ZSTD: Allocation error : not enough memory"), "not enough memory", "--workers"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
def test_errors_of_the_machine_are_never_damage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    error: Exception,
    says: str,
    advice: str,
) -> None:
    path = tmp_path / f"a{suffix}"
    kind = str(sources.kind_of(path.name))
    is_plain = suffix in (".jsonl", ".txt")
    if is_plain and not getattr(error, "errno", 1):
        pytest.skip("a parser's words, and there is no parser")

    def fail(*arguments: object, **named: object) -> object:
        raise error

    def fail_in_a_stream(*arguments: object, **named: object) -> object:
        with readers.damage("cannot decompress a source file", path):
            raise error

    path.write_bytes(b"not empty")
    if suffix == ".parquet":
        monkeypatch.setattr(pq, "ParquetFile", fail)
    elif is_plain:
        monkeypatch.setattr(Path, "open", fail)
    else:
        monkeypatch.setattr(readers, "decompressed_lines", fail_in_a_stream)
    at = Reading(path, Options(), skip_errors=True)
    texts = readers.read_documents(kind, at, Part(SourceFile("a", 0, ""), 0, 1, 9))
    caught = failure(list, texts)
    assert at.skipped["damaged"] == 0
    assert not isinstance(caught, DamageError)
    assert says in caught.what
    assert advice in str(caught.fix)
    assert str(path) in str(caught.where)


@pytest.mark.parametrize(
    ("mark", "text", "documents"),
    [
        ("<|endoftext|>", "A.\n<|endoftext|>\nB\nb.\n<|endoftext|>\nC.\n", ["A.", "B\nb.", "C."]),
        ("<|endoftext|>", "A.<|endoftext|>B<|endoftext|>\n", ["A.", "B"]),
        ("", "one\none\n\n \t\r\n\ntwo\n\n", ["one\none", "two"]),
        (
            "CHAPTER",
            "Front\nCHAPTER I\none CHAPTER\nCHAPTER II\n",
            ["Front", "CHAPTER I\none CHAPTER", "CHAPTER II"],
        ),
        ("***", "\ufeff***\n\none\n***", ["one"]),
        ("%", "one\r\n%\r\ntwo", ["one", "two"]),
    ],
)
def test_a_text_file_is_cut_where_lines_begin_with_a_mark(
    tmp_path: Path, mark: str, text: str, documents: list[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert read(path) == [text.removeprefix("\ufeff")]
    assert read(path, split_on=mark) == documents


def test_blank_lines_and_a_missing_last_newline_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n   \n{"text": "two"}')
    assert read(path) == ["one", "two"]


def test_parquet_gives_its_documents_in_order(tmp_path: Path, make_parquet) -> None:
    assert read(make_parquet(tmp_path / "a.parquet", TEXTS, rows=2)) == TEXTS
    assert read(make_parquet(tmp_path / "b.parquet", TEXTS, column="body"), "body") == TEXTS


def test_all_types_of_strings_read_alike(tmp_path: Path) -> None:
    categories = pa.dictionary(pa.int32(), pa.string())  # pandas' categories
    for kind in (pa.string(), pa.large_string(), pa.string_view(), categories):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": pa.array(TEXTS, kind)}), path)
        assert read(path) == TEXTS
    pq.write_table(pa.table({"text": pa.nulls(3)}), path)  # as of a file in which all happen to be
    assert read(path) == [None] * 3


def test_a_txt_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("naïve\r\nline\n\n".encode())
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst")  # a byte order mark is no text
    assert read(tmp_path) == ["first", "naïve\r\nline\n\n"]


def test_a_folder_is_read_in_the_order_of_names_at_any_depth(tmp_path: Path) -> None:
    for name in ("b/x.jsonl", "a.jsonl", "b/a/z.jsonl", "README.md", "b/.cache.lock"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines_of([name]))
    assert read(tmp_path) == ["a.jsonl", "b/a/z.jsonl", "b/x.jsonl"]
    assert read(tmp_path / "**" / "z*.jsonl") == ["b/a/z.jsonl"]
    (tmp_path / "b").rename(tmp_path / "b.jsonl")  # a folder, as Spark makes them
    assert read(tmp_path / "*.jsonl") == ["a.jsonl", "b/a/z.jsonl", "b/x.jsonl"]
    (tmp_path / "b.jsonl" / "part-0.json").write_text("{}")
    found = sources.resolve(str(tmp_path / "*.jsonl"))
    assert found.not_read == ("b.jsonl/part-0.json",)


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (["train-00000.parquet", "test-00000.parquet"], ["test-00000.parquet"]),
        (
            ["test/0.parquet", "train/0.parquet", "val/0.parquet"],
            ["test/0.parquet", "val/0.parquet"],
        ),
        (["train/test-driving.parquet", "latest.parquet", "train.parquet"], []),
        (["tests.parquet", "notes.parquet"], []),
    ],
)
def test_files_for_tests_are_left_out_beside_files_for_training(
    names: list[str], left_out: list[str], tmp_path: Path, make_parquet
) -> None:
    for name in names:
        make_parquet(tmp_path / name, ["text"])
    found = sources.resolve(str(tmp_path))
    assert list(found.not_read) == left_out
    assert {file.name for file in found.files} == {*names} - {*left_out}
    assert len(sources.resolve(f"{tmp_path}/**/*.parquet").files) == len(names)  # asked for


@pytest.mark.parametrize(
    ("make", "name", "says"),
    [
        (lambda d: None, "nowhere.parquet", "no such file, folder or glob"),
        (lambda d: None, "*.parquet", "no file matches"),
        (lambda d: (d / "x.csv").write_text("a"), "x.csv", "unknown kind of file"),
        (lambda d: (d / "sub").mkdir(), "sub", "holds no text files"),
    ],
)
def test_a_source_that_is_not_there_is_an_error_with_a_cure(
    tmp_path: Path, make, name: str, says: str
) -> None:
    make(tmp_path)
    error = failure(sources.resolve, str(tmp_path / name))
    assert says in error.what
    assert error.where is not None
    assert error.fix


def test_a_name_that_no_file_can_have_is_an_error(tmp_path: Path) -> None:
    error = failure(sources.resolve, str(tmp_path / ("x" * 300)))
    assert error.what == "cannot read the source: File name too long"


def test_a_folder_in_the_source_that_cannot_be_read_is_an_error_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_bytes(lines_of([name]))
    scandir = os.scandir

    def refuse(path: str) -> object:  # root may read everything, so chmod would not do
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    error = failure(sources.resolve, str(tmp_path))
    assert error.what == "cannot read a folder of the source: Permission denied"
    assert str(error.where) == str(tmp_path / "b")


def test_links_are_followed_once(tmp_path: Path, make_parquet) -> None:
    source = tmp_path / "in"
    make_parquet(source / "a.parquet", ["a"])
    make_parquet(tmp_path / "other" / "b.parquet", ["b"])
    (source / "link").symlink_to(tmp_path / "other")
    found = sources.resolve(str(source))
    assert [file.name for file in found.files] == ["a.parquet", "link/b.parquet"]
    again = sources.resolve(f"{source}/**/**/*.parquet")
    assert [file.name for file in again.files] == ["a.parquet", "link/b.parquet"]
    (tmp_path / "other" / "back").symlink_to(source)
    with pytest.raises(ForgeError, match="two ways"):
        sources.resolve(str(source))
    (tmp_path / "other" / "back").unlink()
    (source / "gone.parquet").symlink_to("nowhere")
    with pytest.raises(ForgeError, match="cannot read a source file"):
        sources.resolve(str(source))


def test_a_name_that_is_not_utf8_is_an_error(tmp_path: Path, make_parquet) -> None:
    path = make_parquet(tmp_path / "a.parquet", ["a"])
    path.rename(tmp_path / b"caf\xe9.parquet".decode("utf-8", "surrogateescape"))
    with pytest.raises(ForgeError, match="not valid UTF-8"):
        sources.resolve(str(tmp_path))


def test_batches_of_long_documents_have_few_rows(tmp_path: Path, make_parquet) -> None:
    """Or their text would take gigabytes."""
    texts = [f"{n} " * 100_000 for n in range(200)]
    path = make_parquet(tmp_path / "a.parquet", texts, rows=200)
    part = Part(SourceFile("a", 0, ""), 0, 1, 0)
    batches = list(readers.read_documents("parquet", Reading(path, Options()), part))
    assert [text.decode() for batch in batches for text in batch.documents] == texts
    assert max(sum(map(len, batch.documents)) for batch in batches) < 3 * readers.BATCH_BYTES


def test_kinds_are_not_mixed(tmp_path: Path, make_parquet) -> None:
    make_parquet(tmp_path / "a.parquet", ["a"])
    (tmp_path / "b.jsonl").write_bytes(lines_of(["b"]))
    error = failure(sources.resolve, str(tmp_path))
    assert "mixes kinds of files: jsonl, parquet" in error.what
    (tmp_path / "c.jsonl.gz").write_bytes(b"")
    error = failure(sources.resolve, str(tmp_path))
    assert f"'{tmp_path}/*.jsonl*'" in str(error.fix)


def test_a_missing_column_is_an_error_that_lists_the_columns(tmp_path: Path, make_parquet) -> None:
    parquet = make_parquet(tmp_path / "a.parquet", ["a"], column="body")
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_bytes(lines_of(["a"], key="body"))
    for path, where in ((parquet, "a.parquet"), (jsonl, "a.jsonl, line 1")):
        error = failure(read, path)
        assert error.what == "no column 'text'; there are: body, id"
        assert str(error.where).endswith(where)
        assert "--text-column" in str(error.fix)


def test_a_column_of_another_type_is_named(tmp_path: Path, make_parquet) -> None:
    parquet = make_parquet(tmp_path / "a.parquet", ["a"])
    assert "column 'id' holds int64, not strings" in failure(read, parquet, "id").what
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_bytes(b'{"text": "fine"}\n{"text": ["no"]}\n')
    error = failure(read, jsonl)
    assert error.what == "column 'text' holds list, not a string"
    assert str(error.where).endswith("line 2")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "caf\xe9"}', "invalid UTF-8"),
        (b'{"text": "a"', "invalid JSON"),
        (b"[1, 2]", "invalid JSON: list, not an object"),
        (b'{"text": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(["fine", "fine"]) + line + b"\n" + lines_of(["fine"]))
    error = failure(read, path)
    assert says in error.what
    assert str(error.where) == f"{path}, line 3"


def test_invalid_utf8_in_a_txt_file_is_named_with_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xff")
    error = failure(read, path)
    assert "invalid UTF-8" in error.what
    assert "byte 3" in error.what


def test_invalid_utf8_in_a_parquet_file_is_named_with_its_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    offsets, data = pa.py_buffer(b"\0\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")
    array = pa.StringArray.from_buffers(1, offsets, data)
    pq.write_table(pa.table({"text": array}), path)
    error = failure(read, path)
    assert str(error.where) == f"{path}, row group 0, row 1"
    assert "invalid UTF-8" in error.what


def test_a_truncated_parquet_file_is_named(tmp_path: Path, make_parquet) -> None:
    path = make_parquet(tmp_path / "a.parquet", ["some text"] * 100)
    path.write_bytes(path.read_bytes()[:-40])
    error = failure(read, path)
    assert "not a whole parquet file" in error.what
    assert str(error.where) == str(path)


@pytest.mark.parametrize("damage", [b"\xff" * 20, b"\0"], ids=["20 bytes", "1 byte"])
def test_a_corrupt_row_group_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.table({"text": [f"document {n} " * 50 for n in range(40)]})
    pq.write_table(texts, path, row_group_size=10, use_dictionary=False, write_page_checksum=True)
    column = pq.read_metadata(path).row_group(2).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset + column.total_compressed_size - 100  # behind the page header
    data[start : start + len(damage)] = damage
    path.write_bytes(data)
    error = failure(read, path)
    assert "damaged row group" in error.what
    assert str(error.where) == f"{path}, row group 2"


def test_two_columns_of_the_text_are_an_error(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert failure(read, tmp_path / "a.parquet").what == "2 columns are called 'text'"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_archive_cut_off_at_any_byte_is_an_error(tmp_path: Path, suffix: str) -> None:
    packers = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path = tmp_path / f"a.jsonl{suffix}"
    data = packers[suffix](lines_of([f"text {n}" for n in range(20)]))
    for size in range(len(data)):
        path.write_bytes(data[:size])
        assert "cannot decompress a source file" in failure(read, path).what, size


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_is_an_error_not_an_end(tmp_path: Path, suffix: str) -> None:
    packers = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packers[suffix](lines_of([str(n) * 50 for n in range(3000)]))[:-30])
    error = failure(read, path)
    assert "cannot decompress a source file" in error.what
    assert str(error.where) == str(path)


def test_a_plan_covers_every_row_group_once_in_order(tmp_path: Path, make_parquet) -> None:
    for name in "abc":
        make_parquet(
            tmp_path / f"{name}.parquet", [f"{name} {n} " * 500 for n in range(60)], rows=10
        )
    source = sources.resolve(str(tmp_path))
    whole = planned(source, Options(shard_tokens=10**9))
    assert [each.number for each in whole] == [0]
    assert [(part.start, part.stop) for part in whole[0].parts] == [(0, 6)] * 3
    most = max(part.bytes for part in whole[0].parts) // 2
    cut = planned(source, Options(shard_tokens=round(most / sources.BYTES_PER_TOKEN)))
    covered = [
        (part.file.name, group)
        for each in cut
        for part in each.parts
        for group in range(part.start, part.stop)
    ]
    assert covered == [(f"{name}.parquet", group) for name in "abc" for group in range(6)]
    assert sum(each.bytes for each in cut) == whole[0].bytes
    assert all(each.bytes <= most for each in cut)


def test_a_plan_is_the_same_from_any_slice_on(tmp_path: Path, make_parquet) -> None:
    """So a finished folder can be extended from its last slice."""
    for name, count in (("a", 40), ("b", 1), ("c", 70)):
        make_parquet(tmp_path / f"{name}.parquet", [f"{name} {n} " * n for n in range(count)], 3)
    source = sources.resolve(str(tmp_path))
    options = Options(shard_tokens=1000)
    whole = planned(source, options)
    assert len(whole) > 5
    for number, each in enumerate(whole):
        first = each.parts[0]
        rest = Plan(source, options, False, number, (first.file.name, first.start))
        rest.reach(math.inf)
        assert list(rest.slices.values()) == whole[number:]


def test_a_plan_reads_the_footers_of_no_more_files_than_it_needs(
    tmp_path: Path, make_parquet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(30):
        make_parquet(tmp_path / f"{n:02}.parquet", [f"{n} some words"] * 100)
    source = sources.resolve(str(tmp_path))
    row_groups, read = plan.row_groups, []
    monkeypatch.setattr(
        plan, "row_groups", lambda *three: read.append(three[1].name) or row_groups(*three)
    )
    cut = Plan(source, Options())
    cut.reach(1)
    assert read == ["00.parquet"]
    per_file = cut.bytes
    cut.reach(10.5 * per_file)
    assert len(read) in (11, 12)
    assert not cut.whole
    cut.reach(math.inf)
    assert sorted(read) == [file.name for file in source.files]
    assert cut.whole


def test_new_files_go_behind_the_known_ones_in_the_order_of_a_hash(tmp_path: Path) -> None:
    for n in range(12):
        (tmp_path / f"{n:02}.jsonl").write_bytes(lines_of([f"text {n}"]))
    source = sources.resolve(str(tmp_path))
    names = [file.name for file in source.ordered([]).files]
    assert sorted(names) == [file.name for file in source.files] != names
    known = ["11.jsonl", "gone.jsonl", "03.jsonl"]
    later = [file.name for file in source.ordered(known).files]
    assert later == ["11.jsonl", "03.jsonl", *(name for name in names if name not in known)]


def test_a_file_that_vanishes_is_an_error_with_its_name(tmp_path: Path) -> None:
    part = Part(SourceFile("a", 0, ""), 0, 1, 10)
    for kind in ("jsonl", "txt", "parquet"):
        path = tmp_path / f"gone.{kind}"
        error = failure(list, readers.read_documents(kind, Reading(path, Options()), part))
        assert "cannot read a source file" in error.what
        assert str(error.where) == str(path)


@pytest.mark.parametrize("named", ["", "index.json", "*.json"])
def test_a_folder_of_shards_is_no_source_and_stays_as_it_is(
    named: str, small_shards: Path, tmp_path: Path, forge
) -> None:
    """Neither its --overwrite into itself nor a new folder."""
    made = Path(shutil.copytree(small_shards, tmp_path / "made"))
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    for out in (made, tmp_path / "other"):
        result = forge("prep", "tokenize", str(made / named), "--out", out, "--overwrite")
        assert result.exit_code == 1
        assert "SOURCE is a folder of shards" in result.output
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
