"""In a worker: one slice of the source -> one train shard and one piece of val.

A slice is an independent task: read, encode, write into `.work/`, then a small record there, last.
A slice is finished when its record says that it was made of the same pieces of the same files, so
any number of kills gives the same bytes.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline import chat, chatml, files, readers, shards, tokenizer, verify
from pipeline.chat import ChatOptions, LeftOutError
from pipeline.errors import KEPT, DamageError, ForgeError, refusal, refusals
from pipeline.readers import Batch, Reading
from pipeline.shards import DocumentLengths, Shard
from pipeline.sides import Side
from pipeline.sources import Slice

Encoded = tuple[bytes, npt.NDArray[Any], int]  # text, tokens behind <|endoftext|>, text bytes

# One for all slices of a process: it is quicker with words that it has met.
_encoder = cache(tokenizer.BulkEncoder)


@dataclass(frozen=True)
class Job:
    """All that a worker needs to make one slice."""

    slice: Slice
    kind: str
    root: Path  # of the source's files
    work: Path  # the folder for what it makes
    limit: int | None = None  # train tokens after which to stop
    skip_errors: bool = False  # leave out what is damaged


@dataclass(frozen=True)
class Record:
    """What a finished slice says of itself, in `.work/000000.json`; in index.json, less of it."""

    first: tuple[str, int]  # file and row group that it begins with
    num_train_tokens: int
    num_val_tokens: int
    skipped: dict[str, int]  # counts: null, empty, low_score, damaged
    damaged: tuple[str, ...]  # the first places
    document_tokens: dict[str, DocumentLengths]
    chat: dict[str, dict[str, int]]  # chat.count(), by split; empty for text
    made_of: str = ""  # Slice.made_of
    limit: int | None = None
    shards: tuple[Shard, ...] = ()

    @staticmethod
    def from_json(raw: dict[str, Any]) -> "Record":
        lengths = {k: DocumentLengths.from_json(v) for k, v in raw["document_tokens"].items()}
        made = tuple(Shard(**shard) for shard in raw.get("shards", ()))
        plain = {"first": tuple(raw["first"]), "damaged": tuple(raw["damaged"])}
        return Record(**raw | plain | {"document_tokens": lengths, "shards": made})

    def row(self) -> dict[str, Any]:
        """What index.json keeps of it: nothing that another machine or another day would change."""
        own = asdict(self)
        return {key: own[key] for key in own if key not in ("made_of", "limit", "shards")}


def tokenize_slice(job: Job, on_batch: Callable[[int, int], None] | None = None) -> Record:
    """Make one slice: write its files, then its record.

    `on_batch` is told of the bytes of the source and the tokens of each batch of documents.
    """
    at = Reading(job.root, job.slice.options, job.skip_errors)
    record = record_path(job.work, job.slice.number)
    with ExitStack() as stack, refusals("write", job.work.parent, KEPT):
        record.unlink(missing_ok=True)  # of other files or another limit: its shards will change
        how = job.slice.options.chat
        where = (job.work, job.slice.number, how.context_length if how else None)
        sides = {split: Side(split, *where) for split in shards.SPLITS}
        for side in sides.values():
            stack.enter_context(side.writer)
        train, val = sides.values()
        for batch in _batches(job, at):
            before = train.num_tokens + val.num_tokens
            try:
                is_full = write_documents(batch, sides, job, at.skipped)
            except MemoryError as error:
                raise refusal(error, "tokenize a document", at, KEPT) from error
            if on_batch:
                on_batch(batch.source_bytes, train.num_tokens + val.num_tokens - before)
            if is_full:
                break
        made = (*train.commit(), *val.commit())
        files.sync_folder(job.work)
        first = job.slice.parts[0]
        finished = Record(
            first=(first.file.name, first.start),
            num_train_tokens=train.num_tokens,
            num_val_tokens=val.num_tokens,
            skipped=dict(at.skipped),
            damaged=tuple(place.replace(f"{job.root}/", "", 1) for place in at.damaged),
            document_tokens={
                split: DocumentLengths.of(np.array(side.lengths)) for split, side in sides.items()
            },
            chat={split: side.counts for split, side in sides.items()} if how else {},
            made_of=job.slice.made_of,
            limit=job.limit,
            shards=made,
        )
        # Not waited for: should a power cut take it, its slice is made again.
        files.write_whole(record, json.dumps(asdict(finished)).encode(), wait_for_disk=False)
        return finished


def _batches(job: Job, at: Reading) -> Iterator[Batch]:
    """The documents of a slice; `at` says where they are read."""
    for part in job.slice.parts:
        at.path, at.unit, at.number = job.root / part.file.name, "", 0
        if part.damage:
            at.leave_out(DamageError(part.damage, where=at.path, fix=""))
            continue
        part.file.check_unchanged(at.path)
        yield from readers.read_documents(job.kind, at, part)
        part.file.check_unchanged(at.path)


def write_documents(batch: Batch, sides: dict[str, Side], job: Job, skipped: Counter[str]) -> bool:
    """Encode what a batch holds and write each to its side; True at job.limit train tokens."""
    threshold = int(job.slice.options.val_fraction * 2**64)
    train, val = sides["train"], sides["val"]
    encoder = _encoder(job.work / shards.VOCABULARY_FILE)
    if options := job.slice.options.chat:
        encoded = _encoded_conversations(batch, options, skipped, encoder)
    else:
        encoded = _encoded_documents(batch, skipped, encoder)
    # One at a time: what was just made is still in the cache when the next step takes it up.
    for text, tokens, text_bytes in encoded:
        side = val if xxhash.xxh3_64_intdigest(text) < threshold else train
        side.add(tokens, text_bytes)
        if job.limit is not None and train.num_tokens >= job.limit:
            return True
    return False


def _encoded_documents(
    batch: Batch, skipped: Counter[str], encoder: tokenizer.BulkEncoder
) -> Iterator[Encoded]:
    documents = [text for text in batch.documents if text]
    nulls = batch.documents.count(None)
    skipped.update(null=nulls, empty=len(batch.documents) - nulls - len(documents))
    for text, tokens in zip(documents, encoder.encode(documents), strict=True):
        yield text, tokens, len(text)


def _encoded_conversations(
    batch: Batch, options: ChatOptions, skipped: Counter[str], encoder: tokenizer.BulkEncoder
) -> Iterator[Encoded]:
    encode = encoder.encode_one()
    for messages in batch.documents:
        rendered = chatml.render(messages, lambda text: encode(text.encode()).tolist())
        whole = np.array(rendered, np.uint16)
        try:
            tokens = chat.fit(whole, options)
        except LeftOutError as left_out:
            skipped[str(left_out)] += 1
            continue
        skipped["cut"] += len(tokens) < len(whole)
        text_bytes = int(verify.token_lengths()[tokens].sum())
        yield chatml.as_text(messages).encode(), tokens[1:], text_bytes


def record_path(work: Path, number: int) -> Path:
    return work / f"{number:06d}.json"


def read_record(work: Path, number: int) -> Record | None:
    """The record of a slice that is made, with whole shards; None if there is none."""
    try:
        record = Record.from_json(json.loads(record_path(work, number).read_bytes()))
        tokens = [shards.check_header(work / shard.file) for shard in record.shards]
    except (OSError, ValueError, KeyError, TypeError, ForgeError):
        return None
    return record if tokens == [shard.num_tokens for shard in record.shards] else None


def finished(work: Path, each: Slice) -> Record | None:
    """The record of a slice that an earlier run finished; None if it has to be made.

    It has to be when a file of it has changed since, when a shard of it is not whole, and when
    damaged places were left out of it: they may be sound by now.
    """
    record = read_record(work, each.number)
    is_same = record and record.made_of == each.made_of and not record.damaged
    return record if is_same else None
