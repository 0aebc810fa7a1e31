"""Reads the documents of a parquet, JSON Lines (.gz, .zst) or .txt file: texts or conversations.

Damage is a bad line, row, row group or file. It ends the reading, or is left out and counted.
"""

import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from zstandard import ZstdError

from pipeline import chat
from pipeline.errors import KEPT, DamageError, ForgeError, refusals
from pipeline.lines import cut_lines, lines_of
from pipeline.sources import Options, Part

BATCH_BYTES = 8 * 2**20
BATCH_ROWS = 1024
MOST_LISTED = 20  # damaged places of a slice: the others are only counted
BOM = "\ufeff".encode()
# Where a document's educational score may stand, in order of preference.
SCORE_COLUMNS = ("metadata.int_score", "metadata.score", "int_score", "score")
NO_SCORES = "leave out --min-score, or take a source with scores"
NAME_COLUMN = "name the column of the text with --text-column; conversations: forge-prep chat"
REPAIR = "restore the file and run the same command again, or leave it out with --on-error skip"

Document = Any  # a text in UTF-8, which may be None, or a conversation: chat.Messages


@dataclass
class Reading:
    """A file that is being read, what is wanted of it, where the reader stands, what it skipped."""

    path: Path
    options: Options
    skip_errors: bool = False  # leave out what is damaged
    skipped: Counter[str] = field(default_factory=Counter)  # low_score, damaged, chat.REASONS
    damaged: list[str] = field(default_factory=list)  # the first places
    unit: str = ""  # line, row group or document
    number: int = 0

    def __str__(self) -> str:
        return f"{self.path}, {self.unit} {self.number}" if self.unit else str(self.path)

    def leave_out(self, found: DamageError) -> None:
        if not self.skip_errors:
            raise found
        self.skipped["damaged"] += 1
        if len(self.damaged) < MOST_LISTED:
            self.damaged.append(f"{found.where}: {found.what}")

    @contextmanager
    def leaves_out(self) -> Iterator[None]:
        try:
            yield
        except DamageError as found:
            self.leave_out(found)


class Batch(NamedTuple):
    """Some documents, null and empty ones too, and the source bytes read for them."""

    documents: list[Document]
    source_bytes: int


def read_documents(kind: str, at: Reading, part: Part) -> Iterator[Batch]:
    """Stream the documents of one part. Raises ForgeError, naming the place, for all that fails."""
    with at.leaves_out(), refusals("read a source file", at, KEPT):
        if kind == "parquet":
            yield from read_parquet(at, part)
            return
        read = read_jsonl if kind == "jsonl" else read_txt
        with at.path.open("rb") as raw:
            yield from batches(read(raw, at), raw)


@contextmanager
def damage(what: str, where: object) -> Iterator[None]:
    """Make a DamageError of what a parser says of its input; the machine's errors pass."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error, ZstdError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise  # the machine said it, not a parser
        if re.search(r"not enough memory|allocat|\bError -4\b", str(error), re.IGNORECASE):
            raise MemoryError(str(error)) from error  # as a decompressor reports it
        reason = str(error).strip().splitlines()[0]
        raise DamageError(f"{what}: {reason}", where=str(where), fix=REPAIR) from error


def conversations(
    rows: Iterable[dict[str, Any]], columns: tuple[str, ...], at: Reading
) -> Iterator[chat.Messages]:
    """The rows that are conversations to train on; the others are counted by their reason."""
    for row in rows:
        try:
            yield chat.read_messages(row, columns)
        except chat.LeftOutError as left_out:
            at.skipped[str(left_out)] += 1


# ---------------------------------------------------------------------------------------------
# Parquet


def read_parquet(at: Reading, part: Part) -> Iterator[Batch]:
    with damage("not a whole parquet file", at):
        file = pq.ParquetFile(at.path, memory_map=True, page_checksum_verification=True)
    columns = find_columns(file.schema_arrow, at.options, at)
    score, kept = [], None
    if at.options.min_score is not None:
        name = find_score(file.metadata, at)
        path = name if name in file.schema_arrow.names else tuple(name.split("."))
        score, kept = [name], pc.field(path) >= at.options.min_score
    at.unit = "row group"
    with file:
        for at.number in range(part.start, part.stop):
            with at.leaves_out(), damage("damaged row group", at):
                yield from read_row_group(file, at, columns, score, kept)


def read_row_group(
    file: pq.ParquetFile, at: Reading, columns: tuple[str, ...], score: list[str], kept: Any
) -> Iterator[Batch]:
    group, first = file.metadata.row_group(at.number), 0
    size = columns_bytes(group, columns)
    # Rows that hold some BATCH_BYTES: books are long.
    num_rows = max(1, min(BATCH_ROWS, int(BATCH_BYTES * group.num_rows / max(1, size))))
    wanted: Any = {"row_groups": [at.number], "columns": [*columns, *score], "use_threads": False}
    for batch in file.iter_batches(num_rows, **wanted):
        sound = sound_rows(batch, at, first)
        if at.options.chat:
            documents = list(conversations(sound.to_pylist(), columns, at))
        else:
            rows = sound if kept is None else sound.filter(kept)
            at.skipped["low_score"] += len(sound) - len(rows)
            texts = rows.column(columns[0]).cast(pa.large_string())
            documents = texts.cast(pa.large_binary()).to_pylist()
        yield Batch(documents, size * len(batch) // group.num_rows)
        first += len(batch)


def sound_rows(batch: pa.RecordBatch, at: Reading, first: int) -> pa.RecordBatch:
    """The rows that are UTF-8, as parquet's are only by promise; the first is number `first`."""
    try:
        batch.validate(full=True)
        return batch
    except pa.ArrowInvalid:
        is_sound = []
    for number in range(len(batch)):
        try:
            batch.slice(number, 1).to_pylist()
            is_sound.append(True)
        except UnicodeDecodeError as error:
            is_sound.append(False)
            what, where = f"invalid UTF-8: {error.reason}", f"{at}, row {first + number + 1}"
            fix = "write it again in UTF-8, or leave it out with --on-error skip"
            at.leave_out(DamageError(what, where=where, fix=fix))
    return batch.filter(pa.array(is_sound))


def columns_bytes(group: Any, columns: Sequence[str]) -> int:
    """Uncompressed bytes of some columns of a row group, with all that is nested in them."""
    leaves = [group.column(c) for c in range(group.num_columns)]
    inside = tuple(f"{column}." for column in columns)
    wanted = [leaf for leaf in leaves if f"{leaf.path_in_schema}.".startswith(inside)]
    return sum(leaf.total_uncompressed_size for leaf in wanted)


def find_columns(schema: pa.Schema, options: Options, where: object) -> tuple[str, ...]:
    """The columns of the text, or of conversations. ForgeError unless each is there, once."""
    columns: tuple[str, ...] = (options.text_column,)
    if options.chat:
        columns = chat.find_columns(schema.names, options.chat.columns, where)
    wanted, says = r"(large_)?string(_view)?|null", "strings"  # null: as all rows are
    if options.chat and len(columns) == 1:
        wanted, says = r"(large_)?list<.*|null", "lists of messages"
    for name in columns:
        kinds = [field.type for field in schema if field.name == name]
        plain = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
        if not kinds:
            what = f"no column {name!r}; there are: {', '.join(schema.names)}"
        elif len(kinds) > 1:
            what = f"{len(kinds)} columns are called {name!r}"
        elif not re.fullmatch(wanted, str(plain[0])):
            what = f"column {name!r} holds {kinds[0]}, not {says}"
        else:
            continue
        fix = chat.NAME_COLUMNS if options.chat else NAME_COLUMN
        raise ForgeError(what, where=where, fix=fix)
    return columns


def find_score(metadata: pq.FileMetaData, where: object) -> str:
    """The column of the score of a parquet file, by its full path. ForgeError unless numbers."""
    leaves = map(metadata.schema.column, range(metadata.num_columns))
    kinds = {leaf.path: leaf.physical_type for leaf in leaves}
    score = score_column(list(kinds), where)
    check_score(kinds[score] in ("INT32", "INT64", "FLOAT", "DOUBLE"), score, kinds[score], where)
    return score


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


# ---------------------------------------------------------------------------------------------
# Lines


def batches(documents: Iterable[tuple[Document, int]], raw: io.BufferedReader) -> Iterator[Batch]:
    """The documents of an open file, each with its size in bytes, in batches of limited size."""
    batch: list[Document] = []
    size = read_before = 0
    for document, num_bytes in documents:
        batch.append(document)
        size += num_bytes
        if size >= BATCH_BYTES or len(batch) == BATCH_ROWS:
            yield Batch(batch, raw.tell() - read_before)
            batch, size, read_before = [], 0, raw.tell()
    yield Batch(batch, raw.tell() - read_before)


def read_jsonl(raw: io.BufferedReader, at: Reading) -> Iterator[tuple[Document, int]]:
    """The document of each line whose score is high enough, and the line's size."""
    at.unit = "line"
    for line in decompressed_lines(raw, at):
        at.number += 1
        if line.isspace():
            continue
        try:
            documents = documents_of(parse_line(line), at)
        except ForgeError as error:
            fix = f"{error.fix}; --on-error skip leaves such lines out"
            at.leave_out(DamageError(error.what, where=str(at), fix=fix))
        else:
            for document in documents:
                yield document, len(line)


def decompressed_lines(raw: io.BufferedReader, at: Reading) -> Iterator[bytes]:
    """Lines of a plain, .gz or .zst file. Damage ends them: what came before is sound."""
    try:
        with damage("cannot decompress a source file", at.path):
            yield from lines_of(raw, at.path.name)
    except DamageError as found:
        what = f"{found.what}; line {at.number:,} is the last that could be read"
        at.leave_out(DamageError(what, where=found.where, fix=found.fix))


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            return row
        what = f"invalid JSON: {type(row).__name__}, not an object"
    except UnicodeDecodeError as error:
        what = f"invalid UTF-8: {error.reason}"
    except (ValueError, RecursionError) as error:
        what = f"invalid JSON: {error}"
    fix = "each line must be a JSON object in UTF-8 (of a list, jq -c '.[]' makes such lines)"
    raise ForgeError(what, fix=fix)


def documents_of(row: dict[str, Any], at: Reading) -> list[Document]:
    """The text of a line's object, or its conversation; none if it is not to be trained on."""
    if how := at.options.chat:
        return [*conversations([row], chat.find_columns(row, how.columns, at), at)]
    column = at.options.text_column
    if column not in row:
        what = f"no column {column!r}; there are: {', '.join(row)}"
        raise ForgeError(what, fix=NAME_COLUMN)
    text = row[column]
    if not isinstance(text, str | None):
        what = f"column {column!r} holds {type(text).__name__}, not a string"
        raise ForgeError(what, fix=NAME_COLUMN)
    try:
        document = None if text is None else text.encode()
    except UnicodeEncodeError as error:  # half a character, escaped
        what = f"invalid UTF-8: {error.reason}"
        raise ForgeError(what, fix="write it again in UTF-8") from error
    least = at.options.min_score
    if least is not None and score_of(row, at) < least:
        at.skipped["low_score"] += 1
        return []
    return [document]


def score_of(row: dict[str, Any], at: Reading) -> float:
    """A document's score, below all others where it has none."""
    if isinstance(inner := row.get("metadata"), dict):
        row = row | {f"metadata.{key}": value for key, value in inner.items()}
    column = next((column for column in SCORE_COLUMNS if column in row), "")
    score = row.get(column)
    if score is None:
        return -math.inf
    check_score(isinstance(score, int | float), column, type(score).__name__, at)
    return float(score)


def read_txt(raw: io.BufferedReader, at: Reading) -> Iterator[tuple[Document, int]]:
    """The whole file, which is one document, or with split_on as many as cut_lines() makes."""
    if at.options.min_score is not None:
        score_column([], at)
    if raw.peek(len(BOM)).startswith(BOM):  # a byte order mark is no text
        raw.read(len(BOM))
    pieces: Iterable[bytes] = (raw.read() for _ in range(1))
    if at.options.split_on is not None:
        pieces, at.unit = cut_lines(raw, at.options.split_on.encode()), "document"
    for piece in pieces:
        at.number += 1
        try:
            piece.decode()
        except UnicodeDecodeError as error:
            what = f"invalid UTF-8: {error.reason} at byte {error.start:,}"
            fix = "convert the file to UTF-8, for example with iconv, "
            fix += "or leave it out with --on-error skip"
            at.leave_out(DamageError(what, where=str(at), fix=fix))
        else:
            yield piece, len(piece)
