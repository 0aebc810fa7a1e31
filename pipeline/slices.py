"""In a worker process: one slice of the source -> one train shard and one val piece.

Before: sources.py and tokenizer.py, which it calls. After: prepare.py, which runs many at a time.

A slice is an independent task: read, encode, write the shards, then a small record in `.work/`,
last. A slice is finished when its record is there and says that it was made of the same pieces of
the same files, so any number of kills gives the same bytes.
"""

import json
import math
import multiprocessing
import os
import threading
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline import files, shards, sources, tokenizer
from pipeline.errors import ForgeError
from pipeline.shards import WORK_FOLDER, DocumentLengths, Shard, ShardWriter
from pipeline.sources import Part, Slice, SourceFile

BUFFER_TOKENS = 2**19  # 1 MiB: it stays in the processor's cache
MOST_BAD = 20  # lines or texts of a file that are listed as damaged: the rest are counted


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the output, beside the source. All of it is recorded."""

    text_column: str = "text"
    val_fraction: float = 0.005
    max_tokens: int | None = None  # of the train split; documents stay whole
    shard_tokens: int = 100_000_000  # at most, about; sizes the slices
    min_score: float | None = None  # documents below it, or without a score, are dropped

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:  # NaN, too
            raise ForgeError(
                f"--val-fraction must be from 0 to below 1, not {self.val_fraction}",
                fix="0.005 holds out one document in 200",
            )
        if self.min_score is not None and math.isnan(self.min_score):
            raise ForgeError("--min-score is not a number", fix="write it as 3 or 2.5")

    def record(self) -> dict[str, Any]:
        rule = "val if xxh3_64(utf-8 text) < val_fraction * 2**64"
        return {**asdict(self), "split_rule": rule}


@dataclass(frozen=True)
class Job:
    """All that a worker needs to make one slice."""

    slice: Slice
    kind: str
    paths: tuple[Path, ...]  # one a part
    files: tuple[SourceFile, ...]  # what the source says of them
    folder: Path
    options: Options
    limit: int | None  # train tokens after which to stop
    skip_errors: bool = False  # leave out row groups, lines and rests of files that are damaged

    @property
    def pieces(self) -> tuple[str, ...]:
        """What the slice is made of, in words that change when any of it does."""
        return tuple(
            f"{file.name}, {file.bytes} bytes, {file.checksum}, of {file.modified} ns, "
            f"[{part.start}, {part.stop})"
            for file, part in zip(self.files, self.slice.parts, strict=True)
        )


@dataclass(frozen=True)
class Record:
    """What one finished slice says of itself, in `.work/000000.json`."""

    slice: int
    pieces: tuple[str, ...]  # Job.pieces
    limit: int | None
    shards: tuple[Shard, ...]
    document_tokens: dict[str, DocumentLengths]
    null_documents: int
    empty_documents: int
    low_score_documents: int
    damaged: tuple[str, ...]  # places that were left out, and why

    def num_tokens(self, split: str) -> int:
        return sum(shard.num_tokens for shard in self.shards if shard.split == split)

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    @staticmethod
    def from_json(data: bytes) -> "Record":
        raw = json.loads(data)
        raw["pieces"], raw["damaged"] = tuple(raw["pieces"]), tuple(raw["damaged"])
        raw["shards"] = tuple(Shard(**shard) for shard in raw["shards"])
        raw["document_tokens"] = {
            split: DocumentLengths(each["min"], each["max"], tuple(each["histogram"]))
            for split, each in raw["document_tokens"].items()
        }
        return Record(**raw)


_encoder: tokenizer.BulkEncoder
_done_bytes: Any
_done_tokens: Any


def start_worker(vocabulary_file: Path, done_bytes: Any, done_tokens: Any) -> None:
    global _encoder, _done_bytes, _done_tokens
    _encoder = tokenizer.BulkEncoder(vocabulary_file)
    _done_bytes, _done_tokens = done_bytes, done_tokens
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Side:
    """One split's share of a slice: its shard, opened at the first tokens, and its figures."""

    def __init__(self, folder: Path, split: str, number: int) -> None:
        self.split, self.number = split, number
        self.path = shards.shard_path(folder, split, number)
        self.writer: ShardWriter | None = None
        self.num_tokens = self.text_bytes = 0
        self.lengths = array("q")
        self._buffer, self._filled = np.empty(BUFFER_TOKENS, np.uint16), 0

    def add(self, document: bytes, tokens: npt.NDArray[np.uint32]) -> None:
        size = 1 + len(tokens)
        if self._filled + size > len(self._buffer):
            self._flush()
            capacity = max(size, BUFFER_TOKENS)
            if len(self._buffer) != capacity:  # a long document comes, or went
                self._buffer = np.empty(capacity, np.uint16)
        start, self._filled = self._filled, self._filled + size
        self._buffer[start] = shards.EOT_TOKEN
        self._buffer[start + 1 : self._filled] = tokens
        self.num_tokens += size
        self.text_bytes += len(document)
        self.lengths.append(len(tokens))

    def _flush(self) -> ShardWriter:
        self.writer = self.writer or ShardWriter(self.path)
        self.writer.write(self._buffer[: self._filled])
        self._filled = 0
        return self.writer

    def commit(self) -> tuple[list[Shard], DocumentLengths]:
        if not self.lengths:  # no document fell on this side
            self.path.unlink(missing_ok=True)
            return [], DocumentLengths()
        shard = Shard(
            file=self.path.name,
            split=self.split,
            num_tokens=self.num_tokens,
            num_documents=len(self.lengths),
            text_bytes=self.text_bytes,
            checksum=self._flush().commit(),
            slice=self.number,
        )
        return [shard], DocumentLengths.of(np.array(self.lengths))


def tokenize_slice(job: Job) -> Record:
    """Make one slice: write its shards, then its record. Runs in a worker process."""
    sides = {split: _Side(job.folder, split, job.slice.number) for split in shards.SPLITS}
    num_nulls = num_empty = num_low_scores = 0
    damaged: list[str] = []
    try:
        for texts, source_bytes, low_scores in _texts(job, damaged):
            documents, nulls, empty = sources.documents(texts)
            num_nulls, num_empty = num_nulls + nulls, num_empty + empty
            num_low_scores += low_scores
            before = sides["train"].num_tokens + sides["val"].num_tokens
            full = _write_documents(documents, sides, job)
            with _done_bytes.get_lock():
                _done_bytes.value += source_bytes
                _done_tokens.value += sides["train"].num_tokens + sides["val"].num_tokens - before
            if full:
                break
        committed = {split: side.commit() for split, side in sides.items()}
        files.sync_folder(job.folder)
        record = Record(
            slice=job.slice.number,
            pieces=job.pieces,
            limit=job.limit,
            shards=tuple(shard for made, _ in committed.values() for shard in made),
            document_tokens={split: lengths for split, (_, lengths) in committed.items()},
            null_documents=num_nulls,
            empty_documents=num_empty,
            low_score_documents=num_low_scores,
            damaged=tuple(damaged),
        )
        # Not waited for: should a power cut take it, its slice is made again.
        path = record_path(job.folder, job.slice.number)
        files.write_whole(path, record.to_json(), wait_for_disk=False)
        return record
    except OSError as error:
        raise cannot_write(error, job.folder) from error
    finally:
        for side in sides.values():
            if side.writer is not None:
                side.writer.discard()


def _texts(job: Job, damaged: list[str]) -> Iterator[sources.Batch]:
    """The text of a slice; places that cannot be read go to `damaged` if the job skips errors."""
    for part, path, file in zip(job.slice.parts, job.paths, job.files, strict=True):
        file.check_unchanged(path)
        if job.skip_errors:
            yield from _readable(job, part, path, file.name, damaged)
        else:
            columns = (job.options.text_column, job.options.min_score)
            yield from sources.read_texts(job.kind, path, part, *columns)
        file.check_unchanged(path)


def _readable(
    job: Job, part: Part, path: Path, name: str, damaged: list[str]
) -> Iterator[sources.Batch]:
    """What can be read of a file's part, called `name`."""
    num_bad, place, one = 0, 0, "line" if job.kind == "jsonl" else "text"

    def leave_out(error: ForgeError) -> None:
        damaged.append(f"{error.where}: {error.what}".replace(str(path), name))

    def leave_out_one(error: ForgeError) -> None:
        nonlocal num_bad, place
        num_bad += 1
        if num_bad <= MOST_BAD:
            leave_out(error)
        elif num_bad == MOST_BAD + 1:
            place = len(damaged)
            damaged.append(f"{name}: 1 more {one}")
        else:
            damaged[place] = f"{name}: {num_bad - MOST_BAD:,} more {one}s"

    columns = (job.options.text_column, job.options.min_score)
    for group in range(part.start, part.stop):
        each = replace(part, start=group, stop=group + 1)
        try:
            yield from sources.read_texts(job.kind, path, each, *columns, leave_out_one)
        except ForgeError as error:
            leave_out(error)


def _write_documents(documents: list[bytes], sides: dict[str, _Side], job: Job) -> bool:
    """Encode documents and write each to its side; True once train has job.limit tokens."""
    # One at a time: what was just made is still in the cache when the next step takes it up.
    threshold = int(job.options.val_fraction * 2**64)
    train, val = sides["train"], sides["val"]
    for document, tokens in zip(documents, _encoder.encode(documents), strict=True):
        side = val if xxhash.xxh3_64_intdigest(document) < threshold else train
        side.add(document, tokens)
        if job.limit is not None and train.num_tokens >= job.limit:
            return True
    return False


def finished(job: Job) -> Record | None:
    """The record of a slice that an earlier run finished; None if it has to be made.

    It has to be when a file of it has changed since, when a shard of it is not whole, and when
    damaged places were left out of it: they may be sound by now.
    """
    try:
        record = Record.from_json(record_path(job.folder, job.slice.number).read_bytes())
        sound = all(
            shards.check_header(job.folder / shard.file) == shard.num_tokens
            for shard in record.shards
        )
    except (OSError, ValueError, KeyError, TypeError, ForgeError):
        return None
    return record if sound and record.pieces == job.pieces and not record.damaged else None


def cannot_write(error: OSError, folder: Path) -> ForgeError:
    return ForgeError(
        f"cannot write: {error.strerror or error}",
        where=error.filename or folder,
        fix="make room (or give write permission) and run the same command again; "
        "finished slices are kept",
    )


def record_path(folder: Path, number: int) -> Path:
    return folder / WORK_FOLDER / f"{number:06d}.json"
