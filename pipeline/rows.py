"""The conversations of a source file: rows of parquet or lines of JSON Lines, as batches.

A row that is not a conversation to train on is counted in `skipped`, by its reason. Damage (a bad
line or row group, invalid UTF-8) goes to `on_damage`, as that of text does.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import chat, readers
from pipeline.chat import LeftOutError, Messages
from pipeline.errors import KEPT, DamageError, ForgeError, refusals
from pipeline.readers import SKIP, Reading, damage
from pipeline.sources import Part


class Conversations(NamedTuple):
    """Some conversations, and the source bytes read for them."""

    conversations: list[Messages]
    source_bytes: int


def read_conversations(kind: str, at: Reading, part: Part) -> Iterator[Conversations]:
    """Stream the conversations of one part. Raises ForgeError, naming the place, for what fails."""
    with at.leaves_out(), refusals("read a source file", at, KEPT):
        yield from read_parquet(at, part) if kind == "parquet" else read_jsonl(at)


def read_parquet(at: Reading, part: Part) -> Iterator[Conversations]:
    with damage("not a whole parquet file", at):
        file = pq.ParquetFile(at.path, memory_map=True, page_checksum_verification=True)
    assert at.options.chat is not None
    columns = chat.columns_of(file.schema_arrow, at.options.chat, at.path)
    at.unit = "row group"
    with file:
        for at.number in range(part.start, part.stop):
            with at.leaves_out(), damage("damaged row group", at):
                yield from read_row_group(file, at, columns)


def read_row_group(
    file: pq.ParquetFile, at: Reading, columns: tuple[str, ...]
) -> Iterator[Conversations]:
    group, first = file.metadata.row_group(at.number), 0
    num_rows, size = readers.batch_rows(group, columns), readers.columns_bytes(group, columns)
    wanted: Any = {"row_groups": [at.number], "columns": list(columns), "use_threads": False}
    for batch in file.iter_batches(num_rows, **wanted):
        rows = decoded_rows(batch, at, first)
        kept = [messages for row in rows if (messages := keep(row, columns, at))]
        yield Conversations(kept, size * len(batch) // group.num_rows)
        first += len(batch)


def decoded_rows(batch: pa.RecordBatch, at: Reading, first: int) -> Iterator[dict[str, Any]]:
    """The rows of a batch; the first is number `first` of its row group."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass  # parquet's strings are UTF-8 only by promise: find the row
    for number in range(len(batch)):
        try:
            yield from batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            what, fix = f"invalid UTF-8: {error.reason}", f"write it again in UTF-8, {SKIP}"
            at.on_damage(DamageError(what, where=f"{at}, row {first + number + 1}", fix=fix))


def read_jsonl(at: Reading) -> Iterator[Conversations]:
    at.unit = "line"
    kept: list[Messages] = []
    size = read_before = 0
    with at.path.open("rb") as raw:
        for line in readers.decompressed_lines(raw, at):
            at.number += 1
            if line.isspace():
                continue
            size += len(line)
            with at.leaves_out():
                row, columns = parse_row(line, at)
                if messages := keep(row, columns, at):
                    kept.append(messages)
            if size >= readers.BATCH_BYTES:
                yield Conversations(kept, raw.tell() - read_before)
                kept, size, read_before = [], 0, raw.tell()
        yield Conversations(kept, raw.tell() - read_before)


def parse_row(line: bytes, at: Reading) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The object of a line, and the layout of its columns."""
    assert at.options.chat is not None
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"{type(row).__name__}, not an object")
        return row, chat.find_columns(row, at.options.chat.columns, at)
    except UnicodeDecodeError as error:
        what, fix = f"invalid UTF-8: {error.reason}", "write it again in UTF-8"
    except (ValueError, RecursionError) as error:
        what = f"invalid JSON: {error}"
        fix = "each line must be a JSON object (of a list, jq -c '.[]' makes such lines)"
    except ForgeError as error:
        what, fix = error.what, str(error.fix)
    raise DamageError(what, where=str(at), fix=f"{fix}; --on-error skip leaves such lines out")


def keep(row: dict[str, Any], columns: tuple[str, ...], at: Reading) -> Messages | None:
    """The messages of a row; None, and counted, if it is left out."""
    try:
        return chat.read_messages(row, columns)
    except LeftOutError as left_out:
        at.skipped[left_out.reason] += 1
        return None
