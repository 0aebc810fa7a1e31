"""Where text comes from: hub dataset | parquet | jsonl(.gz|.zst) | txt -> slices -> Arrow batches.

Before: the user's SOURCE. After: tokenizer.py, called slice by slice from slices.py.

resolve() finds the files, plan() cuts them into slices from metadata alone (no text is read), and
read_texts() streams the text of one part of a slice.
"""

import glob
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from pipeline.errors import ForgeError

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".txt": "txt",
}
SUFFIXES = ", ".join(KINDS)
BATCH_BYTES = 8 * 2**20
BATCH_ROWS = 1024
BYTES_PER_TOKEN = 4.4  # English text under GPT-2's BPE; only sizes slices and estimates
# Where a document's educational score may stand, in order of preference.
SCORE_COLUMNS = ("metadata.int_score", "metadata.score", "int_score", "score")
TAIL_BYTES = 64 * 1024
ARCHIVE_BYTES = 2**14  # read at a time: so much is lost before the place where an archive is cut
MIN_SLICE_BYTES = 48 * 2**20  # each slice has a few ms of its own: to open, to commit
ENOUGH_SLICES = 256  # so that some 16 cores or more end at about the same time


@dataclass(frozen=True)
class SourceFile:
    """One file of the source.

    `checksum` notices a change: xxh3_64 of a local file's last 64 KiB, or the hub's own hash.
    `modified` does so as long as a run is not finished: a local file's time in ns, which a copy of
    the file does not have, and so no index.
    """

    name: str
    bytes: int
    checksum: str
    modified: int = field(default=0, compare=False)

    def record(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.bytes, "checksum": self.checksum}

    def check_unchanged(self, path: Path) -> None:
        """ForgeError if the local file at `path` is another than it was when it was found."""
        if not self.modified:
            return
        try:
            now = path.stat()
            is_same = (now.st_size, now.st_mtime_ns) == (self.bytes, self.modified)
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise ForgeError(
                "a source file has changed since this run began",
                where=path,
                fix="run the same command again; finished slices of other files are kept",
            )


@dataclass(frozen=True)
class Part:
    """A piece of one file: row groups [start, stop) of a parquet file, or a whole text file.

    `bytes` is its size as the plan counts it: uncompressed text column, or bytes of the file.
    """

    file: int
    start: int
    stop: int
    bytes: int


@dataclass(frozen=True)
class Slice:
    """A fixed piece of the source, at least one part; makes one train shard and one val piece."""

    number: int
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Source:
    """A resolved SOURCE: what it is called, and its files in a fixed order."""

    name: str
    kind: str  # parquet, jsonl or txt
    root: str  # local folder of the files, or "" for a hub dataset
    files: tuple[SourceFile, ...]
    hub: dict[str, str] | None = None  # dataset, config, split, revision (a commit)
    not_read: tuple[str, ...] = ()  # files beside them whose ending is not known

    def record(self) -> dict[str, Any]:
        """What index.json says of it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "hub": self.hub,
            "files": [file.record() for file in self.files],
        }

    def local_path(self, file: int) -> Path:
        return Path(self.root) / self.files[file].name


# ---------------------------------------------------------------------------------------------
# Finding the files


def resolve(name: str, config: str | None, split: str, revision: str | None) -> Source:
    """Find the files that SOURCE names. ForgeError when there are none."""
    path = Path(name)
    if not name:
        raise ForgeError("SOURCE is empty", fix="name a file, a folder or a hub dataset")
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # a glob, or of the hub
    except OSError as error:
        raise ForgeError(
            f"cannot read the source: {error.strerror}",
            where=name,
            fix="give read permission, or name another source",
        ) from error
    others: list[Path] = []
    if path.is_dir():
        found = sorted(files_in(path))
        paths, others = (
            [p for p in found if kind_of(p.name)],
            [p for p in found if not kind_of(p.name)],
        )
        root = path
        if not paths:
            raise ForgeError(
                "the folder holds no text files", where=path, fix=f"known endings: {SUFFIXES}"
            )
    elif path.is_file():
        paths, root = [path], path.parent
        if not kind_of(path.name):
            raise ForgeError("unknown kind of file", where=path, fix=f"known endings: {SUFFIXES}")
    elif glob.has_magic(name):
        named = {Path(path) for path in glob.glob(name, recursive=True)}  # ** may find one twice
        of_kind = {path for path in named if kind_of(path.name)}
        each = (files_in(path) if path.is_dir() else [path] for path in of_kind)  # Spark's are
        inside = {path for found in each for path in found}
        paths = sorted(path for path in inside if kind_of(path.name))
        others = sorted({p for p in named - of_kind if p.is_file()} | (inside - set(paths)))
        if not paths:
            raise ForgeError("no file matches", where=name, fix=f"known endings: {SUFFIXES}")
        # The folder in front of the first wildcard; escape() puts a bracket before each one.
        root = Path(glob.escape(name).split("[")[0] + "x").parent
    elif name.count("/") == 1 and not kind_of(name) and not name.startswith((".", "/", "~")):
        return resolve_hub(name, config, split, revision)
    else:
        raise ForgeError(
            "no such file, folder or glob",
            where=name,
            fix="give a path, or a hub dataset id of the form owner/name",
        )
    kinds = Counter(str(kind_of(p.name)) for p in paths)
    kind = kinds.most_common(1)[0][0]
    if len(kinds) > 1:
        raise ForgeError(
            f"the source mixes kinds of files: {', '.join(sorted(kinds))}",
            where=name,
            fix=f"name one kind with a glob, such as '{root}/*.{kind}*'",
        )
    files = tuple(describe_file(p, str(p.relative_to(root))) for p in paths)
    not_read = tuple(str(p.relative_to(root)) for p in others)
    return Source(Path(name).name or name, kind, str(root.resolve()), files, not_read=not_read)


def files_in(folder: Path) -> Iterator[Path]:
    """All files below `folder`, through links, too, but no hidden ones (editors keep copies there).

    What cannot be read is an error, not empty.
    """

    def fail(error: OSError) -> None:
        raise ForgeError(
            f"cannot read a folder of the source: {error.strerror}",
            where=error.filename,
            fix="give read permission",
        ) from error

    seen: dict[Path, str] = {}
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        before = seen.setdefault(Path(root).resolve(), root)
        if before != root:
            raise ForgeError(
                f"two ways through the source lead to one folder, the other is {before}",
                where=root,
                fix="remove the link, or name the files with a glob",
            )
        paths = (Path(root, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file() or not path.exists())  # broken links


def kind_of(name: str) -> str | None:
    """parquet, jsonl or txt by the ending of a file's name; None when it is none of these."""
    lower = name.lower()
    return next((kind for suffix, kind in KINDS.items() if lower.endswith(suffix)), None)


def describe_file(path: Path, name: str) -> SourceFile:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        fix = "rename the file"
        raise ForgeError("a file's name is not UTF-8", where=repr(name), fix=fix) from error
    try:
        with path.open("rb") as file:
            modified = os.fstat(file.fileno()).st_mtime_ns
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            return SourceFile(name, size, xxhash.xxh3_64_hexdigest(file.read()), modified)
    except OSError as error:
        raise ForgeError(
            f"cannot read a source file: {error.strerror}",
            where=path,
            fix="remove the link" if path.is_symlink() else "give read permission",
        ) from error


def resolve_hub(name: str, config: str | None, split: str, revision: str | None) -> Source:
    """Resolve a hub dataset to its data files, at one commit, with the `datasets` library."""
    import datasets
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        by_split = builder.config.data_files
    except Exception as error:  # the library raises a dozen unrelated types, network's included
        raise ForgeError(
            f"cannot resolve the hub dataset: {type(error).__name__}: {error}",
            where=name + (f", config {config}" if config else ""),
            fix="check the id, --config and the network, and run it again; a local path must "
            "exist. Without a network: copy its parquet files here, and give their folder",
        ) from error
    if not by_split or split not in by_split:
        raise ForgeError(
            f"the dataset has no split {split!r} (it has {', '.join(by_split or [])})",
            where=name,
            fix="name one of them with --split",
        )
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem()
    paths = [str(path) for path in by_split[split]]
    if any(not path.startswith("hf://") for path in paths):
        raise ForgeError(
            "the dataset's files do not lie on the hub",
            where=name,
            fix="download them and give their folder",
        )
    with on_the_hub(name):
        infos = {path: hub.info(path) for path in paths}
        parsed: list[Any] = [hub.resolve_path(path) for path in paths]
    files = tuple(
        SourceFile(p.path_in_repo, int(infos[path]["size"]), hub_checksum(infos[path]))
        for p, path in zip(parsed, paths, strict=True)
    )
    kinds = {kind_of(file.name) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise ForgeError(
            f"the split's files are not all of one known kind: {kinds}",
            where=name,
            fix=f"download them and give a glob of one kind; known endings: {SUFFIXES}",
        )
    commit = {"dataset": name, "split": split, "revision": parsed[0].revision}
    commit |= {"config": config} if config else {}
    return Source(name, str(kinds.pop()), "", files, commit)


@contextmanager
def on_the_hub(where: str) -> Iterator[None]:
    """Makes trouble with the network a ForgeError; Arrow's errors are the file's, and pass."""
    try:
        yield
    except pa.ArrowException:
        raise
    except Exception as error:  # a dozen unrelated types
        if type(error) is OSError:  # Arrow's as well; the network's are subclasses, or none
            raise
        raise ForgeError(
            f"cannot read from the hub: {type(error).__name__}: {error}",
            where=where,
            fix="check the network and HF_TOKEN and run the same command again",
        ) from error


def hub_checksum(info: dict[str, Any]) -> str:
    """sha256 of a large file, git's sha1 of a small one, as the hub lists them."""
    lfs = info.get("lfs")
    return str(lfs["sha256"] if lfs else info.get("blob_id") or "")


# ---------------------------------------------------------------------------------------------
# Cutting it into slices


def plan(
    source: Source,
    text_column: str,
    max_slice_bytes: int,
    shuffle_seed: int | None,
    min_score: float | None = None,
    on_error: Callable[[ForgeError, str], None] | None = None,
) -> list[Slice]:
    """Cut the source into slices of at most about `max_slice_bytes`, from metadata alone.

    A small source gets smaller slices, so that there are enough of them for all cores.
    With a seed, files are taken in a shuffled order, so that the first tokens are a fair sample.
    `on_error` is told of a file that cannot be planned, which is then left out; None: it is raised.
    """
    order = list(range(len(source.files)))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    if source.kind == "parquet":
        with ThreadPoolExecutor(16) as pool:
            groups = list(
                pool.map(lambda f: row_groups(source, f, text_column, min_score, on_error), order)
            )
    else:
        groups = [[Part(f, 0, 1, source.files[f].bytes)] for f in order]
    total = sum(part.bytes for file_parts in groups for part in file_parts)
    slice_bytes = min(max_slice_bytes, max(MIN_SLICE_BYTES, total // ENOUGH_SLICES))
    slices: list[Slice] = []
    parts: list[Part] = []
    size = 0
    for part in (part for file_parts in groups for part in file_parts):
        if parts and size + part.bytes > slice_bytes:
            slices.append(Slice(len(slices), tuple(parts)))
            parts, size = [], 0
        if parts and parts[-1].file == part.file and source.kind == "parquet":
            last = parts.pop()
            part = Part(part.file, last.start, part.stop, last.bytes + part.bytes)
            size -= last.bytes
        parts.append(part)
        size += part.bytes
    if parts:
        slices.append(Slice(len(slices), tuple(parts)))
    return slices


def row_groups(
    source: Source,
    file: int,
    text_column: str,
    min_score: float | None,
    on_error: Callable[[ForgeError, str], None] | None,
) -> list[Part]:
    """One part per row group of a parquet file; checks that its columns are there."""
    name = source.files[file].name
    try:
        if source.hub:
            from huggingface_hub import HfFileSystem

            where = f"datasets/{source.hub['dataset']}@{source.hub['revision']}/{name}"
            with (
                on_the_hub(where),
                HfFileSystem().open(where, "rb", block_size=2**20) as remote,
            ):
                metadata = pq.read_metadata(remote)
        else:
            where = str(source.local_path(file))
            metadata = pq.read_metadata(where)
    except (OSError, pa.ArrowException) as error:
        damaged = ForgeError(
            f"not a whole parquet file: {str(error).strip().splitlines()[0]}",
            where=where,
            fix="fetch or copy the file again, or leave it out with --on-error skip",
        )
        if on_error is None:
            raise damaged from error
        on_error(damaged, name)
        return []
    schema = metadata.schema.to_arrow_schema()
    check_column(schema, text_column, where)
    columns = {metadata.schema.column(c).path: c for c in range(metadata.num_columns)}
    if min_score is not None:
        score = score_column(list(columns), where)
        kind = metadata.schema.column(columns[score]).physical_type
        check_score(kind in ("INT32", "INT64", "FLOAT", "DOUBLE"), score, kind, where)
    column = columns[text_column]
    return [
        Part(file, g, g + 1, metadata.row_group(g).column(column).total_uncompressed_size)
        for g in range(metadata.num_row_groups)
    ]


def check_column(schema: pa.Schema, text_column: str, where: str) -> None:
    if text_column not in schema.names:
        raise ForgeError(
            f"no column {text_column!r}; there are: {', '.join(schema.names)}",
            where=where,
            fix="name the column of the text with --text-column",
        )
    if schema.names.count(text_column) > 1:
        raise ForgeError(
            f"{schema.names.count(text_column)} columns are called {text_column!r}",
            where=where,
            fix="rename one of them, or name another column with --text-column",
        )
    kind = schema.field(text_column).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if plain not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):  # null: all are
        raise ForgeError(
            f"column {text_column!r} holds {kind}, not strings",
            where=where,
            fix="name the column of the text with --text-column",
        )


def check_score(is_number: bool, column: str, kind: str, where: object) -> None:
    if not is_number:
        raise ForgeError(
            f"the score {column!r} holds {kind}, not a number",
            where=where,
            fix="leave out --min-score, or take a source with scores",
        )


def score_column(columns: Sequence[str], where: object) -> str:
    """The column of the score, by its full path."""
    found = [column for column in SCORE_COLUMNS if column in columns]
    if not found:
        raise ForgeError(
            f"no score: none of {', '.join(SCORE_COLUMNS)}; there are: {', '.join(columns)}",
            where=where,
            fix="leave out --min-score, or take a source with scores",
        )
    return found[0]


# ---------------------------------------------------------------------------------------------
# Reading the text


class Batch(NamedTuple):
    """Some documents: texts (n,) as they stand, nulls too, and the source bytes read for them."""

    texts: pa.LargeStringArray
    source_bytes: int
    num_low_scores: int = 0  # documents below min_score, or without a score: not among the texts


def read_texts(
    kind: str,
    path: Path,
    part: Part,
    text_column: str,
    min_score: float | None = None,
    on_bad: Callable[[ForgeError], None] | None = None,
) -> Iterator[Batch]:
    """Stream the text of one part.

    Raises ForgeError, naming the place, for anything that cannot be read as UTF-8 text; but
    `on_bad` is told of a line of JSON Lines or a text of parquet, which is then left out.
    """
    try:
        if kind == "jsonl":
            yield from read_jsonl(path, text_column, min_score, on_bad)
        elif kind == "parquet":
            yield from read_parquet(path, part, text_column, min_score, on_bad)
        else:
            yield from read_txt(path, min_score)
    except OSError as error:
        raise ForgeError(
            f"cannot read a source file: {error.strerror or error}",
            where=path,
            fix="restore the file and run the same command again; finished slices are kept",
        ) from error


def read_parquet(
    path: Path,
    part: Part,
    text_column: str,
    min_score: float | None,
    on_bad: Callable[[ForgeError], None] | None = None,
) -> Iterator[Batch]:
    fix = (
        "fetch or copy the file again and run the same command (finished slices are kept), or "
        "leave it out with --on-error skip"
    )
    try:
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except pa.ArrowException as error:
        raise ForgeError(f"not a whole parquet file: {error}", where=path, fix=fix) from error
    columns = [text_column]
    if min_score is not None:
        names = [file.metadata.schema.column(c).path for c in range(file.metadata.num_columns)]
        columns.append(score_column(names, path))
    with file:
        for group in range(part.start, part.stop):
            where, row = f"{path}, row group {group}", 0
            try:
                batches = file.iter_batches(
                    batch_rows(file.metadata.row_group(group), text_column),
                    row_groups=[group],
                    columns=columns,
                    use_threads=False,
                )
                for batch in batches:
                    texts = batch.column(text_column).cast(pa.large_string())
                    size = texts.nbytes
                    if bad := invalid_texts(texts, where, row, on_bad):
                        sound = pa.array([n not in bad for n in range(len(texts))])
                        batch, texts = batch.filter(sound), texts.filter(sound)
                    row += batch.num_rows + len(bad)
                    if min_score is None:
                        yield Batch(texts, size)
                        continue
                    is_flat = columns[1] in batch.schema.names
                    first, *inside = [columns[1]] if is_flat else columns[1].split(".")
                    scores = batch.column(first)
                    scores = pc.struct_field(scores, inside) if inside else scores
                    kept = texts.filter(pc.fill_null(pc.greater_equal(scores, min_score), False))
                    yield Batch(kept, size, len(texts) - len(kept))
            except (pa.ArrowException, OSError) as error:
                raise ForgeError(
                    f"damaged row group: {str(error).strip().splitlines()[0]}", where=where, fix=fix
                ) from error


def invalid_texts(
    texts: pa.LargeStringArray,
    where: str,
    first: int,
    on_bad: Callable[[ForgeError], None] | None,
) -> set[int]:
    """Which texts are not UTF-8, as parquet's are only by promise; `on_bad` is told of each.

    Without it, pa.ArrowException. `first` is the number of the first text, in `where`.
    """
    try:
        texts.validate(full=True)
        return set()
    except pa.ArrowInvalid:
        if on_bad is None:
            raise
    binary = texts.cast(pa.large_binary())
    binary.validate(full=True)  # or it is not the encoding that is wrong
    bad = set()
    for number, text in enumerate(binary.to_pylist()):
        try:
            (text or b"").decode()
        except UnicodeDecodeError as error:
            bad.add(number)
            place = f"{where}, text {first + number + 1}"
            fix = "write the file again, from texts in UTF-8"
            on_bad(ForgeError(f"invalid UTF-8: {error.reason}", where=place, fix=fix))
    return bad


def batch_rows(group: Any, text_column: str) -> int:
    """Rows of a row group that hold some BATCH_BYTES of text: books are long."""
    columns = (group.column(c) for c in range(group.num_columns))
    size = sum(
        each.total_uncompressed_size for each in columns if each.path_in_schema == text_column
    )
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES * group.num_rows / max(1, size))))


def read_jsonl(
    path: Path,
    text_column: str,
    min_score: float | None,
    on_bad: Callable[[ForgeError], None] | None = None,
) -> Iterator[Batch]:
    with path.open("rb") as raw, _decompressed(raw, path) as lines:
        texts: dict[int, str | None] = {}  # by line number
        size = read_before = num_low_scores = number = 0
        without: list[str] | None = None  # keys of a document without a score, if none has one
        cut: OSError | None = None
        while True:
            try:
                line = next(lines, b"")
            except OSError as error:  # what came before is sound
                line, cut = b"", error
            number += 1
            if line.strip():
                size += len(line)
                try:
                    document = parse_line(line, text_column, f"{path}, line {number}")
                    score = None
                    if min_score is not None:
                        column, score = score_of(document, f"{path}, line {number}")
                        if column:
                            without = []
                        elif without is None:
                            without = list(document)
                    if min_score is None or (score is not None and score >= min_score):
                        texts[number] = document[text_column]
                    else:
                        num_low_scores += 1
                except ForgeError as error:
                    if on_bad is None:
                        raise
                    on_bad(error)
            if size and (size >= BATCH_BYTES or not line):
                strings = large_strings(texts, path, on_bad)
                yield Batch(strings, raw.tell() - read_before, num_low_scores)
                read_before = raw.tell()
                texts, size, num_low_scores = {}, 0, 0
            if not line:
                break
        if cut:
            raise OSError(f"{cut}; line {number - 1:,} is the last that could be read") from cut
        if without:
            score_column(without, path)


def _decompressed(raw: io.BufferedReader, path: Path) -> Any:
    """Lines of a plain, .gz or .zst file; Arrow's streams notice a truncated one."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    if compression is None:
        return raw
    if not raw.peek(1):  # even an archive of nothing has a header
        raise OSError("the archive is empty: it was cut off")
    stream = pa.CompressedInputStream(pa.PythonFile(raw), compression)
    return io.BufferedReader(stream, ARCHIVE_BYTES)


def score_of(document: dict[str, Any], where: str) -> tuple[str | None, float | None]:
    """A document's column of the score and the score, None where it has none."""
    flat = {k: v for k, v in document.items() if not isinstance(v, dict)}
    inner = document.get("metadata")
    if isinstance(inner, dict):
        flat |= {f"metadata.{key}": value for key, value in inner.items()}
    column = next((column for column in SCORE_COLUMNS if column in flat), None)
    score = flat[column] if column else None
    is_number = score is None or isinstance(score, int | float)
    check_score(is_number, str(column), type(score).__name__, where)
    return column, score


def parse_line(line: bytes, text_column: str, where: str) -> dict[str, Any]:
    fix = (
        f'each line must be a JSON object in UTF-8 with a string under "{text_column}"; '
        "--on-error skip leaves such lines out"
    )
    try:
        document = json.loads(line)
    except UnicodeDecodeError as error:
        raise ForgeError(f"invalid UTF-8: {error.reason}", where=where, fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise ForgeError(f"invalid JSON: {error}", where=where, fix=fix) from error
    if not isinstance(document, dict) or text_column not in document:
        keys = ", ".join(document) if isinstance(document, dict) else type(document).__name__
        raise ForgeError(
            f"no column {text_column!r}; there are: {keys}",
            where=where,
            fix="name the column of the text with --text-column",
        )
    text = document[text_column]
    if text is not None and not isinstance(text, str):
        raise ForgeError(
            f"column {text_column!r} holds {type(text).__name__}, not a string",
            where=where,
            fix=fix,
        )
    return document


def large_strings(
    texts: dict[int, str | None],
    path: Path,
    on_bad: Callable[[ForgeError], None] | None = None,
) -> pa.LargeStringArray:
    while True:
        try:
            return pa.array(texts.values(), pa.large_string())
        except UnicodeEncodeError as error:
            line = next(number for number, text in texts.items() if text == error.object)
            bad = ForgeError(
                f"a lone surrogate ({error.object[error.start]!r}) is no text",
                where=f"{path}, line {line}",
                fix="repair the \\u escapes of this file",
            )
            if on_bad is None:
                raise bad from error
            on_bad(bad)
            del texts[line]


def read_txt(path: Path, min_score: float | None) -> Iterator[Batch]:
    """A .txt file is one document."""
    if min_score is not None:
        score_column([], path)
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ForgeError(
            f"invalid UTF-8: {error.reason} at byte {error.start:,}",
            where=path,
            fix="convert the file to UTF-8, for example with iconv",
        ) from error
    yield Batch(pa.array([text], pa.large_string()), len(data))


def documents(texts: pa.LargeStringArray) -> tuple[list[bytes], int, int]:
    """Texts in UTF-8 without nulls and empty ones: (texts, number of nulls, number of empties)."""
    filled = [text for text in texts.cast(pa.large_binary()).to_pylist() if text]
    return filled, texts.null_count, len(texts) - texts.null_count - len(filled)
