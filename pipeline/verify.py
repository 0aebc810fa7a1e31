"""Checks every byte of a folder of shards against its index, and counts a shard from its tokens."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline import chatml, shards, tokenizer
from pipeline.downloads import DOWNLOADS_FOLDER
from pipeline.errors import ForgeError, refusals
from pipeline.files import sync_folder, write_whole
from pipeline.shards import DocumentLengths, Index, Shard
from pipeline.sources import KINDS, Options

CHUNK_TOKENS = 2**21  # read at a time
PLAN_FILE = "plan.json"  # in .work/: what an unfinished run makes
ANEW = "choose another --out, or start again with --overwrite"


@cache
def token_lengths() -> npt.NDArray[np.int64]:
    """Length in bytes of each token; the markers of chat have none."""
    lengths = [len(token) for token in tokenizer.token_bytes()]
    return np.array(lengths + [0] * (chatml.VOCAB_SIZE - len(lengths)), np.int64)


class Measured(NamedTuple):
    """What the bytes of a shard say. `largest` is a token, -1 if it has none."""

    shard: Shard  # as an index lists it
    lengths: DocumentLengths
    starts_document: bool  # with its first token; an empty one, too
    largest: int


def measure(
    path: Path,
    split: str,
    on_bytes: Callable[[int], None] = lambda count: None,
    counts_text: bool = True,
    most: int | None = None,
) -> Measured:
    """Read a shard, or its first `most` tokens. Without `counts_text` (slow), text_bytes are 0."""
    num_tokens = shards.check_header(path)
    num_tokens = num_tokens if most is None else min(most, num_tokens)
    digest, largest, position, text_bytes = xxhash.xxh3_64(), -1, 0, 0
    starts = [np.empty(0, np.int64)]
    with refusals("read a shard", path), path.open("rb") as file:
        file.seek(shards.HEADER.size)
        while chunk := file.read(shards.TOKEN_BYTES * min(CHUNK_TOKENS, num_tokens - position)):
            tokens = np.frombuffer(chunk, "<u2")
            largest = max(largest, int(tokens.max()))
            starts.append(np.flatnonzero(tokens == shards.EOT_TOKEN) + position)
            digest.update(chunk)
            position += len(tokens)
            text_bytes += int(token_lengths()[tokens].sum()) if counts_text else 0
            on_bytes(len(chunk))
    bounds = np.concatenate([*starts, [num_tokens]])
    counts = (num_tokens, len(bounds) - 1, text_bytes, digest.hexdigest())
    shard = Shard(path.name, split, *counts, 0, shards.head_checksum(path))
    return Measured(shard, DocumentLengths.of(np.diff(bounds) - 1), bounds[0] == 0, largest)


def next_document(tokens: shards.Tokens, near: int) -> int:
    """The first position from `near` on that starts a document; the end, if there is none."""
    for start in range(max(0, near), len(tokens), CHUNK_TOKENS):
        found = np.flatnonzero(tokens[start : start + CHUNK_TOKENS] == shards.EOT_TOKEN)
        if found.size:
            return start + int(found[0])
    return len(tokens)


def check_shard(index: Index, shard: Shard, on_bytes: Callable[[int], None]) -> list[str]:
    """Read one shard whole and list what is wrong with it (nothing, when all is well)."""
    path, vocab_size = index.folder / shard.file, index.tokenizer["vocab_size"]
    # Other people's files may cut documents.
    whole_documents = index.source.get("kind") not in ("token files", shards.MIXTURE)
    context_length = index.chat["context_length"] if index.chat else 1
    try:
        most = shard.num_tokens if shard.folder else None  # a mixture may use less than the file
        found = measure(path, shard.split, on_bytes, counts_text=False, most=most)
    except ForgeError as error:
        return [f"{shard.file}: {error.what}"]
    problems = []
    for name in ("num_tokens", "num_documents", "checksum"):
        if (has := getattr(found.shard, name)) != (listed := getattr(shard, name)):
            problems.append(f"{name.removeprefix('num_')} {has}, the index says {listed}")
    if found.largest >= vocab_size:
        problems.append(f"token {found.largest} is outside the vocabulary of {vocab_size}")
    if (found.shard.num_tokens - 1) % context_length:
        problems.append(f"not windows of {context_length} tokens, and one token more")
    if whole_documents and not found.starts_document:
        problems.append("does not start with <|endoftext|>")
    if not problems and shard.head_checksum not in ("", found.shard.head_checksum):
        problems.append("the index has another checksum of its head")
    return [f"{shard.file}: {problem}" for problem in problems]


def require_sound(index: Index, shard: Shard) -> None:
    """ForgeError if anything is wrong with a shard, which is read whole."""
    if problems := check_shard(index, shard, lambda count: None):
        fix = "run forge-prep verify on its folder"
        raise ForgeError("; ".join(problems), where=index.folder, fix=fix)


def verify(index: Index, workers: int, on_bytes: Callable[[int], None]) -> list[str]:
    """Check every byte of a folder against its index; the list of problems, empty when sound.

    Hashing and counting release the interpreter's lock, so threads use all cores.
    """
    listed = json.loads((index.folder / shards.INDEX_FILE).read_bytes())["splits"]
    summed = json.loads(index.to_json())["splits"]
    problems = [
        f"{shards.INDEX_FILE}: the totals of {split} are not the sums over its shards"
        for split in shards.SPLITS
        if listed.get(split) != summed[split]
    ]
    known = {shard.file for shard in index.shards}
    known |= {file["name"] for file in index.source.get("files", [])}
    for path in sorted(index.folder.glob("*.bin")):
        if path.name not in known:
            problems.append(f"{path.name}: not in the index: move it elsewhere")
    try:
        vocabulary = (index.folder / shards.VOCABULARY_FILE).read_bytes()
        if hashlib.sha256(vocabulary).hexdigest() != index.tokenizer["sha256"]:
            problems.append(f"{shards.VOCABULARY_FILE}: changed")
    except OSError as error:
        problems.append(f"{shards.VOCABULARY_FILE}: cannot be read: {error.strerror}")
    listed_once = dict.fromkeys(index.shards)  # a mixture may repeat some
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda shard: check_shard(index, shard, on_bytes), listed_once)
        return problems + [problem for some in found for problem in some]


# ---------------------------------------------------------------------------------------------
# Whose folder it is, and what may be done with it


def look_at(
    folder: Path, wanted: dict[str, Any], overwrite: bool
) -> tuple[Index | None, tuple[str, ...]]:
    """What a folder already holds of what is wanted in it.

    Returns the index of a finished folder, unless it is overwritten, and the names of the source
    files whose order is fixed. ForgeError if the folder may not be used.
    """
    begun = read_plan(folder)
    finish_publishing(folder)
    check_ours(folder, begun)
    has_index = (folder / shards.INDEX_FILE).exists()
    if overwrite and (has_index or differences(begun, wanted)):
        return None, ()
    index = shards.load_index(folder) if has_index else None
    for shard in index.shards if index else ():
        shards.check_header(folder / shard.file)
    if not any((folder / shards.WORK_FOLDER).glob("[0-9]*.json")):
        begun = {}  # nothing is finished yet: any plan may follow
    if not index:
        refuse(differences(begun, wanted), folder)
    source = begun["source"] if begun else index.source if index else {"files": ()}
    return index, tuple(file["name"] for file in source["files"])


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of an unfinished run of this version; empty if there is none."""
    path = folder / shards.WORK_FOLDER / PLAN_FILE
    with suppress(ValueError):  # damaged
        return dict(json.loads(path.read_bytes())) if shards.is_ours(path) else {}
    return {}


def check_ours(folder: Path, begun: dict[str, Any]) -> None:
    """ForgeError if the folder holds files that are not forge-prep's: only its own are removed."""
    path, work = folder / shards.INDEX_FILE, folder / shards.WORK_FOLDER
    index = None
    with suppress(ForgeError):  # no index, or a damaged one
        index = shards.load_index(folder)
    source = index.source if index else begun.get("source", {})
    names = {path.name for path in folder.iterdir()} - {DOWNLOADS_FOLDER, shards.WORK_FOLDER}
    others = path.exists() and not shards.is_ours(path)
    others |= not begun and work.exists() and any(p.suffix != ".partial" for p in work.iterdir())
    others |= bool(names) and not (begun or path.exists())
    if source.get("kind") == shards.MIXTURE:
        fix = "choose another --out, or remove the folder: it has no shards of its own"
        raise ForgeError("the folder holds a mixture of others", where=folder, fix=fix)
    if others or source.get("kind", "txt") not in KINDS.values():
        raise ForgeError(
            "the folder holds other files: neither shards nor an unfinished run of forge-prep",
            where=folder,
            fix="choose another --out; what an earlier version began, that version finishes",
        )
    listed = {shard.file for shard in index.shards} if index else set()
    if name := next(filter(shards.SHARD_NAME.fullmatch, names - listed), None):
        what = "a file that is not in the index has the name of a shard"
        fix = "move it elsewhere, or choose another --out"
        raise ForgeError(what, where=folder / name, fix=fix)


def clear(folder: Path) -> None:
    """Remove the shards of a finished folder. The index goes last: it says that they are ours."""
    if (folder / shards.INDEX_FILE).exists():
        made = [path for path in folder.iterdir() if shards.SHARD_NAME.fullmatch(path.name)]
        for path in (*made, folder / shards.VOCABULARY_FILE, folder / shards.INDEX_FILE):
            path.unlink(missing_ok=True)


def forget(folder: Path) -> None:
    """Remove what an unfinished run has made; its plan only where nothing else needs the mark."""
    work = folder / shards.WORK_FOLDER
    for path in work.glob("[0-9]*"):
        path.unlink()
    if {path.name for path in folder.iterdir()} <= {DOWNLOADS_FOLDER, work.name}:
        shutil.rmtree(work, ignore_errors=True)


def begin(folder: Path, plan: dict[str, Any]) -> Path:
    """Make `.work/` in a folder, with the plan of what is made there, and return it."""
    work = folder / shards.WORK_FOLDER
    work.mkdir(exist_ok=True)
    marked = {"format": shards.INDEX_FORMAT, "version": shards.INDEX_VERSION} | plan
    write_whole(work / PLAN_FILE, (json.dumps(marked) + "\n").encode())
    return work


def publish(index: Index) -> Index:
    """Finish a folder: write the index of what `.work/` holds, and move all of it to its place."""
    sync_folder(index.folder / shards.WORK_FOLDER)
    write_whole(index.folder / shards.WORK_FOLDER / shards.INDEX_FILE, index.to_json().encode())
    finish_publishing(index.folder)
    return shards.load_index(index.folder)


def finish_publishing(folder: Path) -> None:
    """Move what `.work/` has ready to its place, and copy the index there, last.

    The index in `.work/` says that all else is there. So a kill at any moment leaves a folder that
    the next call finishes.
    """
    work, done = folder / shards.WORK_FOLDER, folder / f"{shards.WORK_FOLDER}.partial"
    shutil.rmtree(done, ignore_errors=True)
    if not (work / shards.INDEX_FILE).exists():
        return
    made = shards.load_index(work)
    (folder / shards.INDEX_FILE).unlink(missing_ok=True)
    for name in [shards.VOCABULARY_FILE, *(shard.file for shard in made.shards)]:
        if (work / name).exists():
            (work / name).replace(folder / name)
    sync_folder(folder)
    copy = work / f"copy_{shards.INDEX_FILE}"
    write_whole(copy, (work / shards.INDEX_FILE).read_bytes())
    copy.replace(folder / shards.INDEX_FILE)
    sync_folder(folder)
    work.replace(done)  # at once: what is left of it would look like an unfinished run
    shutil.rmtree(done, ignore_errors=True)


def differences(made: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """The options in which a run differs from what is wanted now; files and max_tokens apart."""
    if not made:
        return []
    holds = ["chat" if "context_length" in each["options"] else "text" for each in (made, plan)]
    if len(set(holds)) > 1:
        return ["it holds {}, now {}".format(*holds)]
    wanted = [("options", key, now) for key, now in plan["options"].items() if key != "max_tokens"]
    wanted += [("source", key, plan["source"][key]) for key in ("kind", "hub")]
    wanted += [("tokenizer", "sha256", plan["tokenizer"]["sha256"])]
    found = []
    for section, key, now in wanted:
        before = made[section].get(key, getattr(Options, key, None))
        if key == "hub" and before and now:  # a newer commit may have more files
            before, now = before | {"revision": ""}, now | {"revision": ""}
        if before != now:
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
    if not index.slices:  # an older version's: its shards had sizes of their own
        made["options"] = index.options | {"shard_tokens": plan["options"]["shard_tokens"]}
    found = differences(made, plan)
    before, wanted = index.options["max_tokens"], plan["options"]["max_tokens"]
    old, now = before or math.inf, wanted or math.inf
    # The slices say it, as a shard of chat has one token more; an older version has none.
    has = sum(row["num_train_tokens"] for row in index.slices)
    has = has or index.total("num_tokens", "train")
    if now < old and now <= has:
        found.append(f"options max_tokens: {before!r}, now {wanted!r}")
    refuse(found, index.folder)
    files = {file["name"]: file for file in plan["source"]["files"]}
    for file in index.source["files"]:
        if files.pop(file["name"], None) != file:
            what = "a source file that the folder was made of is gone or changed"
            fix = f"restore it (of a hub dataset, name the commit with --revision), or {ANEW}"
            raise ForgeError(what, where=file["name"], fix=fix)
    if has >= now or not (files or has >= old):
        return True
    if not index.slices:
        what = "an earlier version of forge-prep made the folder, and this one cannot extend it"
        raise ForgeError(what, where=index.folder, fix=ANEW)
    return False
