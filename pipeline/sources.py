"""Where text comes from: a hub dataset or local files, in a fixed order, cut into slices.

resolve() finds the files, and a Plan cuts them into slices from metadata alone: no text is read.
"""

import glob
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline import chat
from pipeline.chat import ChatOptions
from pipeline.errors import KEPT, DamageError, ForgeError, refusals
from pipeline.files import files_in
from pipeline.hub import open_on_hub, resolve_hub

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json.gz": "jsonl",
    ".json.zst": "jsonl",
    ".json": "jsonl",  # in a folder or glob only if no other kind is there: it may be anything
    ".txt": "txt",
}
SUFFIXES = ", ".join(KINDS)
BYTES_PER_TOKEN = 4.4  # English text under GPT-2's BPE; only sizes slices and estimates
# Where a document's educational score may stand, in order of preference.
SCORE_COLUMNS = ("metadata.int_score", "metadata.score", "int_score", "score")
NO_SCORES = "leave out --min-score, or take a source with scores"
TAIL_BYTES = 64 * 1024
FOOTERS_AT_ONCE = 16
REPAIR = "restore the file and run the same command again, or leave it out with --on-error skip"


OnDamage = Callable[[DamageError], None]
First = tuple[int, int, int]  # slice, file and row group that something begins with


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the output, beside the source. All of it is recorded."""

    text_column: str = "text"
    val_fraction: float = 0.005
    max_tokens: int | None = None  # of the train split; documents stay whole
    shard_tokens: int = 10_000_000  # of a slice, about
    min_score: float | None = None  # documents below it, or without a score, are dropped
    split_on: str | None = None  # starts a new document of a .txt file: see readers.py
    chat: ChatOptions | None = None  # how conversations are read; None for text

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:  # NaN, too
            what = f"--val-fraction must be from 0 to below 1, not {self.val_fraction}"
            raise ForgeError(what, fix="0.005 holds out one document in 200")
        if self.min_score is not None and math.isnan(self.min_score):
            raise ForgeError("--min-score is not a number", fix="write it as 3 or 2.5")

    def record(self) -> dict[str, Any]:
        text = "text" if self.chat is None else "conversation"
        rule = f"val if xxh3_64(utf-8 {text}) < val_fraction * 2**64"
        of_chat = self.chat.record() if self.chat else {}
        of_text = {key: value for key, value in asdict(self).items() if key != "chat"}
        return {**of_text, **of_chat, "split_rule": rule}


@dataclass(frozen=True)
class SourceFile:
    """One file of the source.

    `checksum` notices a change: xxh3_64 of a local file's last 64 KiB, or the hub's own hash. So
    does `modified` in an unfinished run: a local file's time in ns, which a copy does not have.
    """

    name: str
    bytes: int
    checksum: str
    modified: int = field(default=0, compare=False)

    def record(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.bytes, "checksum": self.checksum}

    def check_unchanged(self, path: Path) -> None:
        """ForgeError if the local file at `path` is not the one that was found."""
        with refusals("read a source file", path):
            now = path.stat()
        if self.modified and (now.st_size, now.st_mtime_ns) != (self.bytes, self.modified):
            what = "a source file has changed since this run began"
            raise ForgeError(what, where=path, fix=KEPT)


@dataclass(frozen=True)
class Part:
    """A piece of one file: row groups [start, stop) of a parquet file, or a whole text file."""

    file: int
    start: int
    stop: int
    bytes: int  # as the plan counts them: uncompressed text column, or bytes of the file
    damage: str = ""  # what is wrong with a file that is left out


@dataclass(frozen=True)
class Slice:
    """A fixed piece of the source; makes one train shard and one piece of val."""

    number: int
    parts: Sequence[Part]

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
        files = [file.record() for file in self.files]
        return {"name": self.name, "kind": self.kind, "hub": self.hub, "files": files}

    def local_path(self, file: int) -> Path:
        return Path(self.root) / self.files[file].name

    def ordered(self, known: Sequence[str]) -> "Source":
        """The same with the `known` files first, in that order; new ones by a hash of their names.

        So the first files are a fair sample, and added ones move nothing.
        """
        places = {name: place for place, name in enumerate(known)}

        def order(file: SourceFile) -> tuple[int, int, str]:
            place = places.get(file.name, len(places))
            return place, xxhash.xxh3_64_intdigest(file.name.encode()), file.name

        return replace(self, files=tuple(sorted(self.files, key=order)))


# ---------------------------------------------------------------------------------------------
# Finding the files


def resolve(name: str, config: str | None, split: str, revision: str | None) -> Source:
    """Find the files that SOURCE names. ForgeError when there are none."""
    path = Path(name)
    if not name:
        raise ForgeError("SOURCE is empty", fix="name a file, a folder or a hub dataset")
    with refusals("read the source", name), suppress(FileNotFoundError, NotADirectoryError):
        path.stat()  # or it is a glob, or of the hub
    if path.is_dir():
        found, root, nothing = sorted(files_in(path)), path, "the folder holds no text files"
    elif path.is_file():
        found, root, nothing = [path], path.parent, "unknown kind of file"
    elif glob.has_magic(name):
        named = {Path(path) for path in glob.glob(name, recursive=True)}  # ** may find one twice
        folders = {path for path in named if path.is_dir()}
        inside = {
            p for folder in folders if kind_of(folder.name) for p in files_in(folder)
        }  # Spark
        found = sorted(inside | (named - folders))
        # The folder in front of the first wildcard; escape() puts a bracket before each one.
        root = Path(glob.escape(name).split("[")[0] + "x").parent
        nothing = "no file matches"
    elif name.count("/") == 1 and not kind_of(name) and not name.startswith((".", "/", "~")):
        return of_hub(*resolve_hub(name, config, split, revision))
    else:
        fix = "give a path, or a hub dataset id of the form owner/name"
        raise ForgeError("no such file, folder or glob", where=name, fix=fix)
    paths = [path for path in found if kind_of(path.name)]
    paths = [path for path in paths if path.suffix.lower() != ".json"] or paths
    if not paths:
        raise ForgeError(nothing, where=name, fix=f"known endings: {', '.join(KINDS)}")
    kinds = [str(kind_of(path.name)) for path in paths]
    kind = max(kinds, key=kinds.count)
    if len(set(kinds)) > 1:
        what = f"the source mixes kinds of files: {', '.join(sorted(set(kinds)))}"
        fix = f"name one kind with a glob, such as '{root}/*.{kind}*'"
        raise ForgeError(what, where=name, fix=fix)
    files = tuple(describe_file(p, str(p.relative_to(root))) for p in paths)
    others = tuple(str(path.relative_to(root)) for path in sorted(set(found) - set(paths)))
    return Source(path.name or name, kind, str(root.resolve()), files, not_read=others)


def of_hub(found: list[tuple[str, int, str]], commit: dict[str, str]) -> Source:
    """The files of a hub dataset, all of one kind."""
    files = tuple(SourceFile(*each) for each in found)
    name, kinds = commit["dataset"], {kind_of(file.name) for file in files}
    if len(kinds) > 1 or None in kinds:
        endings = sorted({"".join(Path(file.name).suffixes[-2:]) for file in files})
        what = f"the split's files are not all of one known kind: {', '.join(endings)}"
        fix = f"download them and give a glob of one kind; known endings: {SUFFIXES}"
        raise ForgeError(what, where=name, fix=fix)
    return Source(name, str(kinds.pop()), "", files, commit)


def kind_of(name: str) -> str | None:
    """parquet, jsonl or txt by the ending of a file's name; None when it is none of these."""
    return next((kind for end, kind in KINDS.items() if name.lower().endswith(end)), None)


def describe_file(path: Path, name: str) -> SourceFile:
    if name.encode("utf-8", "ignore").decode() != name:
        raise ForgeError("a file's name is not UTF-8", where=repr(name), fix="rename the file")
    with refusals("read a source file", path), path.open("rb") as file:
        modified = os.fstat(file.fileno()).st_mtime_ns
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        return SourceFile(name, size, xxhash.xxh3_64_hexdigest(file.read()), modified)


# ---------------------------------------------------------------------------------------------
# Cutting it into slices


@contextmanager
def damage(what: str, where: object) -> Iterator[None]:
    """Make a DamageError of what a parser says of its input; the machine's errors pass."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise  # the machine said it, not a parser
        if re.search(r"not enough memory|allocat|\bError -4\b", str(error), re.IGNORECASE):
            raise MemoryError(str(error)) from error  # as a decompressor reports it
        reason = str(error).strip().splitlines()[0]
        raise DamageError(f"{what}: {reason}", where=str(where), fix=REPAIR) from error


class Plan:
    """The slices of a source, cut as far as needed; the last may grow while not `whole`."""

    def __init__(
        self, source: Source, options: Options, on_damage: OnDamage, first: First = (0, 0, 0)
    ) -> None:
        self.source, self.options, self.on_damage = source, options, on_damage
        self.number, self.first_file, self.first_group = first
        self.file = self.first_file  # the next to cut
        self.slices: list[Slice] = []
        self.bytes = 0
        self._room = 0.0  # in the last slice

    @property
    def whole(self) -> bool:
        return self.file == len(self.source.files)

    def reach(self, wanted_bytes: float) -> None:
        """Cut slices until they have that many bytes; reads the metadata of no more files."""
        while not self.whole and self.bytes < wanted_bytes:
            count = len(self.source.files) - self.file
            if wanted_bytes < math.inf:  # as many as it takes, if they are like those before
                per_file = self.bytes / max(1, self.file - self.first_file)
                guess = math.ceil((wanted_bytes - self.bytes) / per_file) if per_file else 1
                count = min(count, guess, FOOTERS_AT_ONCE)
            with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
                for parts in pool.map(self._parts, range(self.file, self.file + count)):
                    self._add(parts)
                    self.file += 1

    def _add(self, parts: list[Part]) -> None:
        full = self.options.shard_tokens * BYTES_PER_TOKEN
        for part in parts:
            if not self.slices or part.bytes > self._room < full:
                self.slices.append(Slice(self.number + len(self.slices), []))
                self._room = full
            self._room -= part.bytes
            self.bytes += part.bytes
            last = self.slices[-1].parts
            assert isinstance(last, list)
            if last and last[-1].file == part.file:
                before = last.pop()
                part = replace(part, start=before.start, bytes=before.bytes + part.bytes)
            last.append(part)

    def _parts(self, file: int) -> list[Part]:
        if self.source.kind != "parquet":
            return [Part(file, 0, 1, self.source.files[file].bytes)]
        try:
            parts = row_groups(self.source, file, self.options)
        except DamageError as found:
            self.on_damage(found)
            return [Part(file, 0, 0, 0, found.what)]
        return parts[self.first_group :] if file == self.first_file else parts


def row_groups(source: Source, file: int, options: Options) -> list[Part]:
    """One part per row group of a parquet file; checks that its columns are there."""
    if source.hub:
        where = f"datasets/{source.hub['dataset']}@{source.hub['revision']}/"
        where += source.files[file].name
        with damage("not a whole parquet file", where), open_on_hub(where) as remote:
            metadata = pq.read_metadata(remote)
    else:
        where = str(source.local_path(file))
        with refusals("read a source file", where), damage("not a whole parquet file", where):
            metadata = pq.read_metadata(where)
    wanted = text_columns(metadata.schema.to_arrow_schema(), options, where)
    columns = {metadata.schema.column(c).path: c for c in range(metadata.num_columns)}
    if options.min_score is not None:
        score = score_column(list(columns), where)
        kind = metadata.schema.column(columns[score]).physical_type
        check_score(kind in ("INT32", "INT64", "FLOAT", "DOUBLE"), score, kind, where)
    sizes = [columns_bytes(metadata.row_group(g), wanted) for g in range(metadata.num_row_groups)]
    return [Part(file, g, g + 1, size) for g, size in enumerate(sizes)]


def columns_bytes(group: Any, columns: Sequence[str]) -> int:
    """Uncompressed bytes of some columns of a row group, with all that is nested in them."""
    leaves = [group.column(c) for c in range(group.num_columns)]
    inside = tuple(f"{column}." for column in columns)
    wanted = [leaf for leaf in leaves if f"{leaf.path_in_schema}.".startswith(inside)]
    return sum(leaf.total_uncompressed_size for leaf in wanted)


def text_columns(schema: pa.Schema, options: Options, where: str) -> tuple[str, ...]:
    """The columns to read: that of the text, or those of conversations. ForgeError if unfit."""
    if options.chat is None:
        check_column(schema, options.text_column, where)
        return (options.text_column,)
    columns = chat.find_columns(schema.names, options.chat.columns, where)
    chat.check_types({name: str(schema.field(name).type) for name in columns}, where)
    return columns


def check_column(schema: pa.Schema, text_column: str, where: str) -> None:
    """ForgeError unless the schema has one column of that name, and it holds strings."""
    kinds = [field.type for field in schema if field.name == text_column]
    plain = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
    if not kinds:
        what = f"no column {text_column!r}; there are: {', '.join(schema.names)}"
    elif len(kinds) > 1:
        what = f"{len(kinds)} columns are called {text_column!r}"
    elif plain[0] in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):  # null: all are
        return
    else:
        what = f"column {text_column!r} holds {kinds[0]}, not strings"
    raise ForgeError(what, where=where, fix="name the column of the text with --text-column")


def check_score(is_number: bool, column: str, kind: str, where: object) -> None:
    if not is_number:
        what = f"the score {column!r} holds {kind}, not a number"
        raise ForgeError(what, where=where, fix=NO_SCORES)


def score_column(columns: Sequence[str], where: object) -> str:
    """The column of the score, by its full path."""
    for column in SCORE_COLUMNS:
        if column in columns:
            return column
    what = f"no score: none of {', '.join(SCORE_COLUMNS)}; there are: {', '.join(columns)}"
    raise ForgeError(what, where=where, fix=NO_SCORES)
