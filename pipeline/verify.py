"""Every byte of a folder of shards against its index, and the figures of a shard from its tokens.

Before: a finished folder (shards.py), or token files of others (foreign.py). After: cli.py.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline import shards, tokenizer
from pipeline.downloads import DOWNLOADS_FOLDER
from pipeline.errors import ForgeError, refusals
from pipeline.shards import DocumentLengths, Index, Shard, ShardWriter
from pipeline.sources import KINDS, Options

CHUNK_BYTES = 2**22
VAL_SHARD_TOKENS = 100_000_000  # at most, about
ANEW = "choose another --out, or start anew with --overwrite"


@cache
def token_lengths() -> npt.NDArray[np.int64]:
    """Length in bytes of each token."""
    return np.array([len(token) for token in tokenizer.token_bytes()], np.int64)


@dataclass(frozen=True)
class Figures:
    """What the tokens of a shard say of it. `first` and `largest` are tokens, -1 if it has none."""

    num_tokens: int
    checksum: str
    first: int
    largest: int
    text_bytes: int  # 0 without `token_bytes`
    lengths: DocumentLengths
    num_documents: int


def measure(
    path: Path,
    token_bytes: npt.NDArray[np.int64] | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Figures:
    """Read one shard whole. `token_bytes` has the length in bytes of each token."""
    num_tokens = shards.check_header(path)
    digest, first, largest, position, text_bytes = xxhash.xxh3_64(), -1, -1, 0, 0
    starts = [np.empty(0, np.int64)]
    with refusals("read a shard", path), path.open("rb") as file:
        file.seek(shards.HEADER.size)
        while chunk := file.read(CHUNK_BYTES):
            tokens = np.frombuffer(chunk, "<u2")
            first = int(tokens[0]) if position == 0 else first
            largest = max(largest, int(tokens.max()))
            starts.append(np.flatnonzero(tokens == shards.EOT_TOKEN) + position)
            if token_bytes is not None and largest < len(token_bytes):
                text_bytes += int(token_bytes[tokens].sum())
            digest.update(chunk)
            position += len(tokens)
            on_bytes(len(chunk))
    bounds = np.concatenate([*starts, [num_tokens]])
    lengths = DocumentLengths.of(np.diff(bounds) - 1)
    figures = (digest.hexdigest(), first, largest, text_bytes, lengths, len(bounds) - 1)
    return Figures(num_tokens, *figures)


def describe(path: Path, split: str, figures: Figures) -> Shard:
    """A shard that was measured, as the index lists it."""
    return Shard(
        file=path.name,
        split=split,
        num_tokens=figures.num_tokens,
        num_documents=figures.num_documents,
        text_bytes=figures.text_bytes,
        checksum=figures.checksum,
        slice=0,
        head_checksum=shards.head_checksum(path),
    )


def join_val(
    folder: Path, kept: tuple[Shard, ...], kept_tokens: int, made: list[Shard]
) -> tuple[Shard, ...]:
    """Join val into few large shards in `.work/`: `kept_tokens` of the old ones, then the pieces.

    Others' trainers want procs * B * T + 1 tokens in each shard, so all are about as large.
    """
    work, pieces, left = folder / shards.WORK_FOLDER, [], kept_tokens
    for shard in kept:
        pieces.append((folder / shard.file, shard, min(left, shard.num_tokens)))
        left -= pieces[-1][2]
    pieces += [(work / each.file, each, each.num_tokens) for each in made if each.split == "val"]
    total = sum(num_tokens for _, _, num_tokens in pieces)
    count = math.ceil(total / VAL_SHARD_TOKENS)
    paths = [shards.shard_path(work, "val", number) for number in range(count)]
    position, rest, chunks = 0, np.empty(0, np.uint16), _first_tokens(pieces)
    ends: Any
    for number, path in enumerate(paths):
        writer, wanted = ShardWriter(path), total * (number + 1) // count
        try:
            for chunk in chain([rest], chunks):
                near = max(0, wanted - position)  # the next document from there on ends the shard
                ends = np.flatnonzero(chunk[near:] == shards.EOT_TOKEN) if wanted < total else []
                stop = near + int(ends[0]) if len(ends) else len(chunk)
                writer.write(chunk[:stop])
                position, rest = position + stop, chunk[stop:]
                if len(ends):
                    break
            writer.commit()
        finally:
            writer.discard()
    return tuple(describe(path, "val", measure(path, token_lengths())) for path in paths)


def _first_tokens(pieces: list[tuple[Path, Shard, int]]) -> Iterator[shards.Tokens]:
    """The first tokens of each shard, as many as the piece says; every byte is checked."""
    for path, shard, tokens_left in pieces:
        digest = xxhash.xxh3_64()
        with refusals("read a shard", path), path.open("rb") as file:
            file.seek(shards.HEADER.size)
            while data := file.read(CHUNK_BYTES):
                digest.update(data)
                tokens = np.frombuffer(data, "<u2")[:tokens_left]
                tokens_left -= len(tokens)
                yield tokens
        if digest.hexdigest() != shard.checksum:
            raise ForgeError(
                "the shard is damaged: its bytes are not those that were written",
                where=path,
                fix="run forge-prep verify on its folder",
            )


def check_shard(
    folder: Path, shard: Shard, whole_documents: bool, on_bytes: Callable[[int], None]
) -> list[str]:
    """Read one shard whole and list what is wrong with it (nothing, when all is well)."""
    path = folder / shard.file
    try:
        found = measure(path, on_bytes=on_bytes)
        head = shards.head_checksum(path)
    except ForgeError as error:
        return [f"{shard.file}: {error.what}"]
    if found.num_tokens != shard.num_tokens:
        return [f"{shard.file}: {found.num_tokens:,} tokens, the index says {shard.num_tokens:,}"]
    problems = []
    if found.checksum != shard.checksum:
        problems.append(f"checksum {found.checksum}, the index says {shard.checksum}")
    if found.largest >= shards.VOCAB_SIZE:
        problems.append(f"token {found.largest} is outside the vocabulary of {shards.VOCAB_SIZE}")
    if found.num_documents != shard.num_documents:
        problems.append(
            f"{found.num_documents:,} documents, the index says {shard.num_documents:,}"
        )
    if found.first not in (shards.EOT_TOKEN, -1) and whole_documents:
        problems.append("does not start with <|endoftext|>")
    if not problems and shard.head_checksum not in ("", head):
        problems.append("the index has another checksum of its head")
    return [f"{shard.file}: {problem}" for problem in problems]


def verify(index: Index, workers: int, on_bytes: Callable[[int], None]) -> list[str]:
    """Check every byte of a folder against its index; the list of problems, empty when sound.

    Hashing and counting release the interpreter's lock, so threads use all cores.
    """
    problems = []
    listed = json.loads((index.folder / shards.INDEX_FILE).read_bytes())["splits"]
    summed = json.loads(index.to_json())["splits"]
    for split in shards.SPLITS:
        if listed.get(split) != summed[split]:
            name = shards.INDEX_FILE
            problems.append(f"{name}: the totals of {split} are not the sums over its shards")
    known = {shard.file for shard in index.shards}
    known |= {file["name"] for file in index.source.get("files", [])}
    for path in sorted(index.folder.glob("*.bin")):
        if path.name not in known:
            problems.append(f"{path.name}: a stranger, not in the index: move it elsewhere")
    try:
        vocabulary = (index.folder / shards.VOCABULARY_FILE).read_bytes()
        if hashlib.sha256(vocabulary).hexdigest() != index.tokenizer["sha256"]:
            problems.append(f"{shards.VOCABULARY_FILE}: changed")
    except OSError as error:
        problems.append(f"{shards.VOCABULARY_FILE}: cannot be read: {error.strerror}")
    whole = index.source.get("kind") != "token files"  # other people's may cut documents
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(
            lambda each: check_shard(index.folder, each, whole, on_bytes), index.shards
        )
        problems += [problem for more in found for problem in more]
    return problems


# ---------------------------------------------------------------------------------------------
# Whose folder it is, and what may be done with it


@dataclass(frozen=True)
class State:
    """What a run finds in its folder."""

    index: Index | None = None  # of a finished folder that is not to be overwritten
    is_enough: bool = False  # it has all that is wanted
    is_resumed: bool = False  # finished slices of this very plan lie there
    known_files: tuple[str, ...] = ()  # of the source, in their order


def look_at(folder: Path, plan: dict[str, Any], overwrite: bool) -> State:
    """What lies in a folder that is to hold what `plan` says. ForgeError if it may not be used."""
    check_ours(folder, overwrite)
    shards.finish_publishing(folder)
    begun, index = read_plan(folder), None
    has_index = (folder / shards.INDEX_FILE).exists()
    if overwrite and (has_index or differences(begun, plan)):
        return State()
    if has_index:
        index = shards.load_index(folder)
        if is_enough(index, plan):
            for shard in index.shards:
                shards.check_header(folder / shard.file)
            return State(index, is_enough=True)
    if not any((folder / shards.WORK_FOLDER).glob("[0-9]*.json")):
        begun = {}  # nothing is finished yet: any plan may follow
    refuse(differences(begun, plan), folder)
    source = begun["source"] if begun else index.source if index else {"files": ()}
    known = tuple(file["name"] for file in source["files"])
    return State(index, is_resumed=bool(begun), known_files=known)


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of an unfinished run of this version or an older one; empty if there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        plan: dict[str, Any] = json.loads(
            (folder / shards.WORK_FOLDER / shards.PLAN_FILE).read_bytes()
        )
        if plan["tokenizer"]["sha256"] == shards.VOCABULARY_SHA256:
            return plan
    return {}


def check_ours(folder: Path, overwrite: bool) -> None:
    """ForgeError if something lies there that does not carry our format: only ours is removed."""
    begun, index, work = read_plan(folder), folder / shards.INDEX_FILE, folder / shards.WORK_FOLDER
    if begun and "format" not in begun and not overwrite:
        raise ForgeError(
            "an earlier version of forge-prep began this folder, and this one cannot finish it",
            where=folder,
            fix=f"finish it with that version, or {ANEW}",
        )
    other_index = index.exists() and not shards.is_ours(index)
    other_work = work.exists() and not begun and any(p.suffix != ".partial" for p in work.iterdir())
    names = {path.name for path in folder.iterdir()} - {DOWNLOADS_FOLDER, shards.WORK_FOLDER}
    if other_index or other_work or (names and not (begun or index.exists())):
        raise ForgeError(
            "the folder is not empty, and holds neither shards nor an unfinished run of forge-prep",
            where=folder,
            fix="choose another --out (--overwrite removes shards of forge-prep, nothing else)",
        )
    source = begun.get("source", {})
    with suppress(ForgeError):  # no index, or a damaged one
        source = shards.load_index(folder).source
    if source.get("kind", "txt") not in KINDS.values():
        raise ForgeError(
            "the folder holds token files that others made",
            where=folder,
            fix="choose another --out",
        )
    shards_of_ours = set(our_shards(folder))
    for path in folder.iterdir():
        if shards.SHARD_NAME.fullmatch(path.name) and path not in shards_of_ours:
            raise ForgeError(
                "a file that forge-prep did not make has the name of a shard",
                where=path,
                fix="move it elsewhere, or choose another --out",
            )


def our_shards(folder: Path) -> list[Path]:
    """Files that the index lists, and others that have the name and the header of a shard."""
    listed: set[str] = set()
    with suppress(ForgeError):
        listed = {shard.file for shard in shards.load_index(folder).shards}
    found = []
    for path in folder.iterdir():
        if shards.SHARD_NAME.fullmatch(path.name):
            with suppress(ForgeError):
                if path.name in listed or shards.check_header(path) >= 0:
                    found.append(path)
    return found


def clear(folder: Path, all_of_it: bool = False) -> None:
    """Remove an unfinished run, or all that forge-prep made. The index goes first."""
    if all_of_it:
        found = our_shards(folder)
        (folder / shards.INDEX_FILE).unlink(missing_ok=True)
        for path in [*found, folder / shards.VOCABULARY_FILE]:
            path.unlink(missing_ok=True)
    work = folder / shards.WORK_FOLDER
    if all(path.name in (DOWNLOADS_FOLDER, work.name) for path in folder.iterdir()):
        shutil.rmtree(work, ignore_errors=True)
        return
    for path in work.glob("[0-9]*"):  # the plan stays: it says that the folder is ours
        path.unlink()


def differences(made: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """In what a run differs from what is wanted now, but for its files and max_tokens."""
    found = []
    for section, key, now in [
        *(("options", key, value) for key, value in plan["options"].items()),
        *(("source", key, plan["source"][key]) for key in ("name", "kind", "hub")),
        ("tokenizer", "sha256", plan["tokenizer"]["sha256"]),
    ]:
        before = made[section].get(key, getattr(Options, key, None)) if made else now
        if key == "hub" and before and now:  # a newer commit may have more files
            before, now = before | {"revision": ""}, now | {"revision": ""}
        if key == "name" and not plan["source"]["hub"]:
            continue  # a local folder has many paths
        if before != now and key != "max_tokens":
            found.append(f"{section} {key}: {before!r}, now {now!r}")
    return found


def refuse(found: list[str], folder: Path) -> None:
    if found:
        what = f"the folder was made with other options: {'; '.join(found)}"
        raise ForgeError(what, where=folder, fix=ANEW)


def is_enough(index: Index, plan: dict[str, Any]) -> bool:
    """Whether a finished folder has all that is wanted. ForgeError if it cannot be extended to it.

    More is wanted when it stopped at a smaller max_tokens, or the source has more files.
    """
    made = {"source": index.source, "options": index.options, "tokenizer": index.tokenizer}
    found = differences(made, plan)
    if index.base is None:  # an older version's: its shards had sizes of their own
        found = [each for each in found if not each.startswith("options shard_tokens")]
    before, wanted = index.options["max_tokens"], plan["options"]["max_tokens"]
    old, now, has = before or math.inf, wanted or math.inf, index.total("num_tokens", "train")
    if now < old and now <= has:
        found.append(f"options max_tokens: {before!r}, now {wanted!r}")
    refuse(found, index.folder)
    files = {file["name"]: file for file in plan["source"]["files"]}
    for file in index.source["files"]:
        if files.pop(file["name"], None) != file:
            raise ForgeError(
                "a source file that the folder was made of is gone or changed",
                where=file["name"],
                fix=f"restore it (of a hub dataset, name the commit with --revision), or {ANEW}",
            )
    if has >= now or not (files or has >= old):
        return True
    if index.base is None:
        what = "an earlier version of forge-prep made the folder, and this one cannot extend it"
        raise ForgeError(what, where=index.folder, fix=ANEW)
    return False
