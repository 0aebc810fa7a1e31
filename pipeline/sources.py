"""Where text comes from: a hub dataset or local files, in a fixed order. No text is read here."""

import glob
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from pipeline.chat import ChatOptions
from pipeline.errors import KEPT, ForgeError, refusals
from pipeline.files import check_utf8, files_in, for_training
from pipeline.hub import resolve_hub
from pipeline.shards import INDEX_FILE, is_ours
from pipeline.tokenizer import EOT_TEXT

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
BYTES_PER_TOKEN = 4.4  # English text under GPT-2's BPE; only sizes slices and estimates
TAIL_BYTES = 64 * 1024


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

    file: SourceFile
    start: int
    stop: int
    bytes: int  # as the plan counts them: uncompressed text column, or bytes of the file
    damage: str = ""  # what is wrong with a file that is left out


@dataclass(frozen=True)
class Slice:
    """A fixed piece of the source, and how it becomes one train shard and one piece of val."""

    number: int
    parts: tuple[Part, ...]
    options: Options

    @cached_property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @cached_property
    def made_of(self) -> str:
        """A hash that changes when any file, row group or option does, max_tokens apart."""
        described = repr((self.parts, replace(self.options, max_tokens=None)))
        return xxhash.xxh3_128_hexdigest(described.encode())


@dataclass(frozen=True)
class Source:
    """A resolved SOURCE: what it is called, and its files in a fixed order."""

    name: str
    kind: str  # parquet, jsonl or txt
    root: Path  # local folder of the files, or where those of a hub dataset are downloaded to
    files: tuple[SourceFile, ...]
    hub: dict[str, str] | None = None  # dataset, config, split, revision (a commit)
    not_read: tuple[str, ...] = ()  # files beside them of other kinds, or for tests

    def record(self) -> dict[str, Any]:
        """What index.json says of it."""
        files = [{"name": f.name, "bytes": f.bytes, "checksum": f.checksum} for f in self.files]
        return {"name": self.name, "kind": self.kind, "hub": self.hub, "files": files}

    def ordered(self, known: Sequence[str]) -> "Source":
        """The same with the `known` files first, in that order; new ones by a hash of their names.

        So the first files are a fair sample, and added ones move nothing.
        """
        places = {name: place for place, name in enumerate(known)}

        def order(file: SourceFile) -> tuple[int, int, str]:
            place = places.get(file.name, len(places))
            return place, xxhash.xxh3_64_intdigest(file.name.encode()), file.name

        return replace(self, files=tuple(sorted(self.files, key=order)))


def resolve(
    name: str, config: str | None = None, split: str = "train", revision: str | None = None
) -> Source:
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
        spark = [files_in(folder) for folder in folders if kind_of(folder.name)]
        found = sorted(named.difference(folders).union(*spark))
        # The folder in front of the first wildcard; escape() puts a bracket before each one.
        root = Path(glob.escape(name).split("[")[0] + "x").parent
        nothing = "no file matches"
    elif name.count("/") == 1 and not kind_of(name) and not name.startswith((".", "/", "~")):
        files, commit = resolve_hub(name, config, split, revision)
        kind, chosen, others = choose(list(files), name, "the split holds no text files", None)
        known = tuple(SourceFile(each, *files[each]) for each in chosen)
        return Source(name, kind, Path(), known, commit, others)
    else:
        fix = "give a path, or a hub dataset id of the form owner/name"
        raise ForgeError("no such file, folder or glob", where=name, fix=fix)
    names = [str(path.relative_to(root)) for path in found]
    kind, of_kind, others = choose(names, name, nothing, root)
    chosen = for_training(of_kind) if path.is_dir() else of_kind
    others = (*sorted(set(of_kind) - set(chosen)), *others)  # a message names the first ones
    for file in (root / each for each in chosen):
        if file.name == INDEX_FILE and is_ours(file):
            fix = f"train on it: forge-train CONFIG --data {file.parent}"
            raise ForgeError("SOURCE is a folder of shards, not of text", where=name, fix=fix)
    local = tuple(describe_file(root / each, each) for each in chosen)
    return Source(path.name or name, kind, root.resolve(), local, not_read=others)


def kind_of(name: str) -> str | None:
    """parquet, jsonl or txt by the ending of a file's name; None when it is none of these."""
    return next((kind for end, kind in KINDS.items() if name.lower().endswith(end)), None)


def choose(
    names: list[str], where: str, nothing: str, root: Path | None
) -> tuple[str, list[str], tuple[str, ...]]:
    """The kind of a source, its files of that kind, and the others.

    ForgeError, with `nothing` as its text, if there is no file of a known kind, or if kinds mix.
    """
    known = [name for name in names if kind_of(name)]
    known = [name for name in known if not name.lower().endswith(".json")] or known
    if not known:
        raise ForgeError(nothing, where=where, fix=f"known endings: {', '.join(KINDS)}")
    kinds = [str(kind_of(name)) for name in known]
    kind = max(kinds, key=kinds.count)
    if len(set(kinds)) > 1:
        what = f"the source mixes kinds of files: {', '.join(sorted(set(kinds)))}"
        fix = f"name one kind with a glob, such as '{root}/*.{kind}*'"
        fix = fix if root else "download the files of one kind, and name them with a glob"
        raise ForgeError(what, where=where, fix=fix)
    return kind, known, tuple(sorted(set(names) - set(known)))


def describe_file(path: Path, name: str) -> SourceFile:
    check_utf8(Path(name))
    with refusals("read a source file", path), path.open("rb") as file:
        modified = os.fstat(file.fileno()).st_mtime_ns
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        return SourceFile(name, size, xxhash.xxh3_64_hexdigest(file.read()), modified)


def with_marker(source: Source) -> str:
    """The name of the first text file that has <|endoftext|> near its beginning, or ""."""
    for file in source.files:
        path = source.root / file.name
        with refusals("read a source file", path), path.open("rb") as raw:
            if EOT_TEXT.encode() in raw.read(TAIL_BYTES):
                return file.name
    return ""
