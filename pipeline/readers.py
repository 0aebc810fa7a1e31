"""Reads the text of a parquet, JSON Lines (.gz, .zst) or .txt file, as batches of documents.

Damage (a bad line, text, row group or file) goes to `on_damage`, which raises it or leaves it out.
"""

import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

from pipeline.errors import KEPT, DamageError, ForgeError, refusals
from pipeline.sources import Options, Part
from pipeline.tokenizer import EOT_TEXT

BATCH_BYTES = 8 * 2**20
BATCH_ROWS = 1024
ARCHIVE_BYTES = 2**14  # read at a time
BOM = "\ufeff".encode()
# Where a document's educational score may stand, in order of preference.
SCORE_COLUMNS = ("metadata.int_score", "metadata.score", "int_score", "score")
NO_SCORES = "leave out --min-score, or take a source with scores"
REPAIR = "restore the file and run the same command again, or leave it out with --on-error skip"
SKIP = "or leave it out with --on-error skip"

OnDamage = Callable[[DamageError], None]


def stop(found: DamageError) -> None:
    """The `on_damage` that leaves nothing out."""
    raise found


@dataclass
class Reading:
    """A file that is being read, what is wanted of it, where the reader stands, what it skipped."""

    path: Path
    options: Options
    on_damage: OnDamage = stop
    skipped: Counter[str] = field(default_factory=Counter)  # low_score
    unit: str = ""  # line, row group or document
    number: int = 0

    def __str__(self) -> str:
        return f"{self.path}, {self.unit} {self.number}" if self.unit else str(self.path)

    @contextmanager
    def leaves_out(self) -> Iterator[None]:
        try:
            yield
        except DamageError as found:
            self.on_damage(found)


class Batch(NamedTuple):
    """Some texts in UTF-8, null (None) and empty ones too, and the source bytes read for them."""

    texts: list[bytes | None]
    source_bytes: int


def read_texts(kind: str, at: Reading, part: Part) -> Iterator[Batch]:
    """Stream the text of one part. Raises ForgeError, naming the place, for all that fails."""
    with at.leaves_out(), refusals("read a source file", at, KEPT):
        if kind == "parquet":
            yield from read_parquet(at, part)
        else:
            with at.path.open("rb") as raw:
                yield from batches(
                    read_jsonl(raw, at) if kind == "jsonl" else read_txt(raw, at), raw
                )


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


def read_parquet(at: Reading, part: Part) -> Iterator[Batch]:
    with damage("not a whole parquet file", at):
        file = pq.ParquetFile(at.path, memory_map=True, page_checksum_verification=True)
    columns, kept = [at.options.text_column], None
    if at.options.min_score is not None:
        names = [file.metadata.schema.column(c).path for c in range(file.metadata.num_columns)]
        columns.append(column := score_column(names, at))
        is_flat = column in file.schema_arrow.names
        kept = pc.field(column if is_flat else tuple(column.split("."))) >= at.options.min_score
    at.unit = "row group"
    with file:
        for at.number in range(part.start, part.stop):
            with at.leaves_out(), damage("damaged row group", at):
                yield from read_row_group(file, at, columns, kept)


def read_row_group(
    file: pq.ParquetFile, at: Reading, columns: list[str], kept: Any
) -> Iterator[Batch]:
    num_rows = batch_rows(file.metadata.row_group(at.number), columns[:1])
    groups, first = [at.number], 0
    for batch in file.iter_batches(num_rows, row_groups=groups, columns=columns, use_threads=False):
        texts = batch.column(columns[0]).cast(pa.large_string())
        bad = invalid_texts(texts, at, first)
        size, num_read, first = texts.nbytes, len(texts) - len(bad), first + len(texts)
        if bad:
            batch = batch.filter(pa.array([n not in bad for n in range(len(texts))]))
        if kept is not None:
            batch = batch.filter(kept)
        if len(batch) < len(texts):
            texts = batch.column(columns[0]).cast(pa.large_string())
        at.skipped["low_score"] += num_read - len(batch)
        yield Batch(texts.cast(pa.large_binary()).to_pylist(), size)


def invalid_texts(texts: pa.LargeStringArray, at: Reading, first: int) -> set[int]:
    """Which texts are not UTF-8, as parquet's are only by promise; the first is number `first`."""
    try:
        texts.validate(full=True)
        return set()
    except pa.ArrowInvalid:
        binary = texts.cast(pa.large_binary())
        binary.validate(full=True)  # or it is not the encoding that is wrong
    bad = set()
    for number, text in enumerate(binary.to_pylist()):
        try:
            (text or b"").decode()
        except UnicodeDecodeError as error:
            bad.add(number)
            what, fix = f"invalid UTF-8: {error.reason}", f"write it again in UTF-8, {SKIP}"
            at.on_damage(DamageError(what, where=f"{at}, text {first + number + 1}", fix=fix))
    return bad


def batch_rows(group: Any, columns: Sequence[str]) -> int:
    """Rows of a row group that hold some BATCH_BYTES of text: books are long."""
    size = max(1, columns_bytes(group, columns))
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES * group.num_rows / size)))


def columns_bytes(group: Any, columns: Sequence[str]) -> int:
    """Uncompressed bytes of some columns of a row group, with all that is nested in them."""
    leaves = [group.column(c) for c in range(group.num_columns)]
    inside = tuple(f"{column}." for column in columns)
    wanted = [leaf for leaf in leaves if f"{leaf.path_in_schema}.".startswith(inside)]
    return sum(leaf.total_uncompressed_size for leaf in wanted)


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


def batches(texts: Iterable[bytes | None], raw: io.BufferedReader) -> Iterator[Batch]:
    """The texts of an open file, in batches of limited size."""
    batch: list[bytes | None] = []
    size = read_before = 0
    for text in texts:
        batch.append(text)
        size += len(text or b"")
        if size >= BATCH_BYTES or len(batch) == BATCH_ROWS:
            yield Batch(batch, raw.tell() - read_before)
            batch, size, read_before = [], 0, raw.tell()
    yield Batch(batch, raw.tell() - read_before)


def read_jsonl(raw: io.BufferedReader, at: Reading) -> Iterator[bytes | None]:
    """The text of each line whose score is high enough."""
    at.unit, least = "line", at.options.min_score
    for line in decompressed_lines(raw, at):
        at.number += 1
        if line.isspace():
            continue
        try:
            document, text = parse_line(line, at)
            is_low = least is not None and score_of(document, at) < least
        except DamageError as found:
            at.on_damage(found)
            continue
        if is_low:
            at.skipped["low_score"] += 1
        else:
            yield text


def decompressed_lines(raw: io.BufferedReader, at: Reading) -> Iterator[bytes]:
    """Lines of a plain, .gz or .zst file. Damage ends them: what came before is sound."""
    name, stream = at.path.name.lower(), cast("Iterable[bytes]", raw)
    try:
        with damage("cannot decompress a source file", at.path):
            if name.endswith((".gz", ".zst")) and not raw.peek(1):
                raise EOFError("the archive is empty: it was cut off")  # even of nothing: a header
            if name.endswith(".gz"):
                stream = gzip.GzipFile(fileobj=raw)
            elif name.endswith(".zst"):
                stream = io.BufferedReader(ZstdFrames(raw))
            yield from stream
    except DamageError as found:
        what = f"{found.what}; line {at.number:,} is the last that could be read"
        at.on_damage(DamageError(what, where=found.where, fix=found.fix))


class ZstdFrames(io.RawIOBase):
    """The frames of a .zst file, one after the other, with windows of any length.

    EOFError for a frame that is cut off, which zstandard's own reader takes for an end.
    """

    def __init__(self, raw: io.BufferedReader) -> None:
        self.raw, self.left = raw, memoryview(b"")
        self.frame: Any = None
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=2**zstandard.WINDOWLOG_MAX)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left:
            ended = self.frame is None or self.frame.eof
            unused = self.frame.unused_data if self.frame and ended else b""
            data = unused or self.raw.read(ARCHIVE_BYTES)
            if not data and ended:
                return 0
            if not data:
                raise EOFError("the archive was cut off")
            if ended:
                self.frame = self.decompressor.decompressobj()
            try:
                self.left = memoryview(self.frame.decompress(data))
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        return count


def parse_line(line: bytes, at: Reading) -> tuple[dict[str, Any], bytes | None]:
    """A line's document and its text."""
    column = at.options.text_column
    fix = f'each line must be a JSON object in UTF-8 with a string under "{column}"'
    document: Any = None
    try:
        document = json.loads(line)
        text = document[column]
        return document, None if text is None else text.encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        what = f"invalid UTF-8: {error.reason}"
    except (ValueError, RecursionError) as error:
        what = f"invalid JSON: {error}"
        fix += " (of a list, jq -c '.[]' makes such lines)"
    except (KeyError, TypeError, IndexError):
        keys = ", ".join(document) if isinstance(document, dict) else type(document).__name__
        what = f"no column {column!r}; there are: {keys}"
        fix = "name the column of the text with --text-column"
    except AttributeError:
        what = f"column {column!r} holds {type(document[column]).__name__}, not a string"
    raise DamageError(what, where=str(at), fix=f"{fix}; --on-error skip leaves such lines out")


def score_of(document: dict[str, Any], at: Reading) -> float:
    """A document's score, below all others where it has none."""
    inner = document.get("metadata")
    inner = inner if isinstance(inner, dict) else {}
    flat = document | {f"metadata.{key}": value for key, value in inner.items()}
    column = next((column for column in SCORE_COLUMNS if column in flat), "")
    score = flat.get(column)
    if score is None:
        return -math.inf
    check_score(isinstance(score, int | float), column, type(score).__name__, str(at))
    return float(score)


def read_txt(raw: io.BufferedReader, at: Reading) -> Iterator[bytes]:
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
            fix = f"convert the file to UTF-8, for example with iconv, {SKIP}"
            at.on_damage(DamageError(what, where=str(at), fix=fix))
        else:
            yield piece


def cut_lines(lines: Iterable[bytes], mark: bytes) -> Iterator[bytes]:
    """Documents of a text: each line that begins with `mark` begins one; "" means a blank line.

    A line that says nothing but the mark is left out, one that says more is the document's heading.
    <|endoftext|> ends a document wherever it stands. Line ends around a document are left out.
    """
    document: list[bytes] = []
    for line in lines:
        ends: list[bytes] = []
        if mark == EOT_TEXT.encode():
            *ends, line = line.split(mark)
        elif line.startswith(mark) if mark else line.isspace():
            ends, line = [b""], line if line[len(mark) :].strip() else b""
        for end in ends:
            if text := b"".join([*document, end]).strip(b"\r\n"):
                yield text
            document = []
        document.append(line)
    if text := b"".join(document).strip(b"\r\n"):
        yield text
