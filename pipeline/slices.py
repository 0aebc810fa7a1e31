"""In a worker process: one slice of the source -> one train shard and one piece of val.

A slice is an independent task: read, encode, write into `.work/`, then a small record there, last.
A slice is finished when its record says that it was made of the same pieces of the same files, so
any number of kills gives the same bytes.
"""

import json
import math
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline import chat, chatml, files, readers, rows, shards, tokenizer, verify
from pipeline.chat import LeftOutError, Messages
from pipeline.errors import KEPT, DamageError, ForgeError, refusal, refusals
from pipeline.readers import Batch, Reading
from pipeline.rows import Conversations
from pipeline.shards import DocumentLengths, Shard, ShardWriter
from pipeline.sides import ChatSide, Side
from pipeline.sources import Options, Slice, SourceFile

MOST_LISTED = 20  # damaged places of a slice: the others are only counted
# Reasons for which something is skipped, and how many conversations were cut.
REASONS = tuple(dict.fromkeys(["null", "empty", "low_score", "damaged", *chat.REASONS, "cut"]))
VAL_SHARD_TOKENS = 100_000_000  # at most, about


@dataclass(frozen=True)
class Job:
    """All that a worker needs to make one slice."""

    slice: Slice
    kind: str
    paths: tuple[Path, ...]  # one a part
    files: tuple[SourceFile, ...]  # what the source says of them
    work: Path  # the folder for what it makes
    options: Options
    limit: int | None  # train tokens after which to stop
    skip_errors: bool = False  # leave out what is damaged

    @property
    def pieces(self) -> tuple[str, ...]:
        """What the slice is made of, in words that change when any of it does."""
        return tuple(
            f"{file.name}, {file.bytes} bytes, {file.checksum}, of {file.modified} ns, "
            f"[{part.start}, {part.stop})"
            for file, part in zip(self.files, self.slice.parts, strict=True)
        )


@dataclass(frozen=True)
class Figures:
    """What slices say of their documents, beside their shards; they add up."""

    num_val_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # counts, by REASONS
    damaged: tuple[str, ...] = ()  # the first places of each slice
    document_tokens: dict[str, DocumentLengths] = field(default_factory=dict)
    chat: dict[str, dict[str, int]] = field(default_factory=dict)  # chat.count(), by split

    @staticmethod
    def from_json(raw: dict[str, Any]) -> "Figures":
        lengths = {k: DocumentLengths.from_json(v) for k, v in raw["document_tokens"].items()}
        return Figures(**raw | {"damaged": tuple(raw["damaged"]), "document_tokens": lengths})

    def __add__(self, other: "Figures") -> "Figures":
        none, mine, theirs = DocumentLengths(), self.document_tokens, other.document_tokens
        return Figures(
            self.num_val_tokens + other.num_val_tokens,
            {why: self.skipped.get(why, 0) + other.skipped.get(why, 0) for why in REASONS},
            self.damaged + other.damaged,
            {k: mine.get(k, none) + theirs.get(k, none) for k in shards.SPLITS},
            {k: chat.add(self.chat.get(k, {}), other.chat.get(k, {})) for k in shards.SPLITS},
        )


@dataclass(frozen=True)
class Record:
    """What one finished slice says of itself, in `.work/000000.json`."""

    slice: int
    pieces: tuple[str, ...]  # Job.pieces
    limit: int | None
    shards: tuple[Shard, ...]
    figures: Figures

    @property
    def train_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards if shard.split == "train")

    @staticmethod
    def from_json(data: bytes) -> "Record":
        raw = json.loads(data)
        made = tuple(Shard(**shard) for shard in raw["shards"])
        figures = Figures.from_json(raw["figures"])
        return Record(raw["slice"], tuple(raw["pieces"]), raw["limit"], made, figures)


_encoder: tokenizer.BulkEncoder
_done_bytes: Any
_done_tokens: Any


def start_worker(vocabulary_file: Path, done_bytes: Any, done_tokens: Any) -> None:
    global _encoder, _done_bytes, _done_tokens
    _encoder = tokenizer.BulkEncoder(vocabulary_file)
    _done_bytes, _done_tokens = done_bytes, done_tokens
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def tokenize_slice(job: Job) -> Record:
    """Make one slice: write its files, then its record. Runs in a worker process."""
    sides = {split: _side(job, split) for split in shards.SPLITS}
    skipped, damaged = Counter(dict.fromkeys(REASONS, 0)), list[str]()
    at, name = Reading(job.work.parent, job.options), ""

    def leave_out(found: DamageError) -> None:
        skipped["damaged"] += 1
        if len(damaged) < MOST_LISTED:
            damaged.append(f"{found.where}: {found.what}".replace(str(at.path), name, 1))

    on_damage = leave_out if job.skip_errors else readers.stop
    try:
        for part, path, file in zip(job.slice.parts, job.paths, job.files, strict=True):
            at, name = Reading(path, job.options, on_damage, skipped), file.name
            if part.damage:
                on_damage(DamageError(part.damage, where=path, fix=""))
                continue
            file.check_unchanged(path)
            read = readers.read_texts if job.options.chat is None else rows.read_conversations
            for batch in read(job.kind, at, part):
                before = sides["train"].num_tokens + sides["val"].num_tokens
                full = _write(batch, sides, job, skipped)
                now = sides["train"].num_tokens + sides["val"].num_tokens
                with _done_bytes.get_lock():
                    _done_bytes.value += batch.source_bytes
                    _done_tokens.value += now - before
                if full:
                    return _commit(job, sides, dict(skipped), tuple(damaged))
            file.check_unchanged(path)
        return _commit(job, sides, dict(skipped), tuple(damaged))
    except MemoryError as error:
        raise refusal(error, "tokenize a document", at, KEPT) from error
    except OSError as error:
        raise refusal(error, "write", job.work.parent, KEPT) from error
    finally:
        for side in sides.values():
            side.discard()


def _side(job: Job, split: str) -> Side:
    if job.options.chat is None:
        return Side(job.work, split, job.slice.number)
    return ChatSide(job.work, split, job.slice.number, job.options.chat.context_length)


def _commit(
    job: Job, sides: dict[str, Side], skipped: dict[str, int], damaged: tuple[str, ...]
) -> Record:
    made = tuple(shard for side in sides.values() for shard in side.commit())
    files.sync_folder(job.work)
    lengths = {split: DocumentLengths.of(np.array(side.lengths)) for split, side in sides.items()}
    counts = {k: dict(side.counts) for k, side in sides.items() if isinstance(side, ChatSide)}
    figures = Figures(sides["val"].num_tokens, skipped, damaged, lengths, counts)
    record = Record(job.slice.number, job.pieces, job.limit, made, figures)
    # Not waited for: should a power cut take it, its slice is made again.
    data = (json.dumps(asdict(record)) + "\n").encode()
    files.write_whole(record_path(job.work, job.slice.number), data, wait_for_disk=False)
    return record


def _write(
    batch: Batch | Conversations, sides: dict[str, Side], job: Job, skipped: Counter[str]
) -> bool:
    """Write what a batch holds, each to its side; True once train has job.limit tokens."""
    if isinstance(batch, Conversations):
        return _write_conversations(batch.conversations, sides, job, skipped)
    documents = [text for text in batch.texts if text]
    nulls = batch.texts.count(None)
    empty = len(batch.texts) - nulls - len(documents)
    skipped.update(null=nulls, empty=empty, low_score=batch.num_low_scores)
    return _write_documents(documents, sides, job)


def _write_conversations(
    conversations: list[Messages], sides: dict[str, Side], job: Job, skipped: Counter[str]
) -> bool:
    options, encode = job.options.chat, _encoder.encode_one()
    threshold = int(job.options.val_fraction * 2**64)
    train, val = sides["train"], sides["val"]
    assert options is not None
    assert isinstance(train, ChatSide)
    assert isinstance(val, ChatSide)
    for messages in conversations:
        try:
            whole = chat.encode(messages, lambda text: encode(text.encode()).tolist())
            tokens = chat.fit(whole, options)
        except LeftOutError as left_out:
            skipped[left_out.reason] += 1
            continue
        skipped["cut"] += len(tokens) < len(whole)
        text = chatml.as_text(messages).encode()
        side = val if xxhash.xxh3_64_intdigest(text) < threshold else train
        side.add_conversation(tokens)
        if job.limit is not None and train.num_tokens >= job.limit:
            return True
    return False


def _write_documents(documents: list[bytes], sides: dict[str, Side], job: Job) -> bool:
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
        record = Record.from_json(record_path(job.work, job.slice.number).read_bytes())
        sound = all(
            shards.check_header(job.work / shard.file) == shard.num_tokens
            for shard in record.shards
        )
    except (OSError, ValueError, KeyError, TypeError, ForgeError):
        return None
    return record if sound and record.pieces == job.pieces and not record.figures.damaged else None


def record_path(work: Path, number: int) -> Path:
    return work / f"{number:06d}.json"


# ---------------------------------------------------------------------------------------------
# Once all are finished


def join_val(
    folder: Path,
    kept: tuple[Shard, ...],
    kept_tokens: int,
    made: list[Shard],
    context_length: int | None = None,
) -> tuple[Shard, ...]:
    """Join val into few large shards in `.work/`: `kept_tokens` of the old ones, then the pieces.

    Others' trainers want procs * B * T + 1 tokens in each shard, so all are about as large. Shards
    of chat, which has a context_length, are whole windows and one more <|im_end|>.
    """
    work, pieces, left = folder / shards.WORK_FOLDER, [], kept_tokens
    last = np.array([chatml.IM_END] if context_length else [], np.uint16)
    for shard in kept:
        pieces.append((folder / shard.file, shard, min(left, shard.num_tokens - len(last))))
        left -= pieces[-1][2]
    new = [each for each in made if each.split == "val"]
    pieces += [(work / each.file, each, each.num_tokens - len(last)) for each in new]
    total = sum(num_tokens for _, _, num_tokens in pieces)
    count = math.ceil(total / VAL_SHARD_TOKENS)
    paths = [shards.shard_path(work, "val", number) for number in range(count)]
    position, rest, chunks = 0, np.empty(0, np.uint16), _first_tokens(pieces)
    ends: Any
    for number, path in enumerate(paths):
        writer, wanted = ShardWriter(path), total * (number + 1) // count
        wanted -= wanted % (context_length or 1)  # a window begins with a conversation
        try:
            for chunk in chain([rest], chunks):
                near = max(0, wanted - position)  # the next document from there on ends the shard
                ends = np.flatnonzero(chunk[near:] == shards.EOT_TOKEN) if wanted < total else []
                stop = near + int(ends[0]) if len(ends) else len(chunk)
                writer.write(chunk[:stop])
                position, rest = position + stop, chunk[stop:]
                if len(ends):
                    break
            writer.write(last)
            writer.commit()
        finally:
            writer.discard()
    return tuple(verify.describe(path, "val")[0] for path in paths)


def _first_tokens(pieces: list[tuple[Path, Shard, int]]) -> Iterator[shards.Tokens]:
    """The first tokens of each shard, as many as the piece says; every byte is checked."""
    for path, shard, tokens_left in pieces:
        digest = xxhash.xxh3_64()
        with refusals("read a shard", path), path.open("rb") as file:
            file.seek(shards.HEADER.size)
            while data := file.read(verify.CHUNK_BYTES):
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
