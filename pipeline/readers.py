"""The text of a source file: parquet, JSON Lines (.gz, .zst) or .txt, as batches of documents.

Damage (a bad line, text, row group or file) goes to `on_damage`, which raises it or leaves it out.
"""

import gzip
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

from pipeline import sources
from pipeline.errors import KEPT, DamageError, refusals
from pipeline.sources import OnDamage, Options, Part, Source, check_score, damage, score_column
from pipeline.tokenizer import EOT_TEXT

BATCH_BYTES = 8 * 2**20
BATCH_ROWS = 1024
ARCHIVE_BYTES = 2**14  # read at a time
BOM = "\ufeff".encode()
SKIP = "or leave it out with --on-error skip"


def stop(found: DamageError) -> None:
    """The `on_damage` that leaves nothing out."""
    raise found


@dataclass
class Reading:
    """A file that is being read, what is wanted of it, and where the reader stands."""

    path: Path
    options: Options
    on_damage: OnDamage = stop
    skipped: Counter[str] = field(default_factory=Counter)
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
    num_low_scores: int = 0  # documents below min_score, or without a score: not among the texts


def read_texts(kind: str, at: Reading, part: Part) -> Iterator[Batch]:
    """Stream the text of one part. Raises ForgeError, naming the place, for all that fails."""
    readers = {"parquet": read_parquet, "jsonl": read_jsonl, "txt": read_txt}
    with at.leaves_out(), refusals("read a source file", at, KEPT):
        yield from readers[kind](at, part)


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
        yield Batch(texts.cast(pa.large_binary()).to_pylist(), size, num_read - len(batch))


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
    size = sources.columns_bytes(group, columns)
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES * group.num_rows / max(1, size))))


def read_jsonl(at: Reading, part: Part) -> Iterator[Batch]:
    at.unit, least = "line", at.options.min_score
    texts: list[bytes | None] = []
    size = read_before = num_low_scores = 0
    cut: DamageError | None = None
    with at.path.open("rb") as raw:
        lines = decompressed_lines(raw, at)
        while True:
            try:
                line = next(lines, b"")
            except DamageError as found:  # what came before is sound
                line, cut = b"", found
            at.number += 1
            if line and not line.isspace():
                size += len(line)
                try:
                    document, text = parse_line(line, at)
                    if least is None or score_of(document, at) >= least:
                        texts.append(text)
                    else:
                        num_low_scores += 1
                except DamageError as found:
                    at.on_damage(found)
            if size and (size >= BATCH_BYTES or not line):
                yield Batch(texts, raw.tell() - read_before, num_low_scores)
                texts, size, read_before, num_low_scores = [], 0, raw.tell(), 0
            if cut:
                raise cut
            if not line:
                return


def decompressed_lines(raw: io.BufferedReader, at: Reading) -> Iterator[bytes]:
    """Lines of a plain, .gz or .zst file; DamageError for one that is cut off."""
    name, number = at.path.name.lower(), 0
    try:
        with damage("cannot decompress a source file", at.path):
            stream: Any = raw
            if name.endswith((".gz", ".zst")):
                if not raw.peek(1):  # even an archive of nothing has a header
                    raise EOFError("the archive is empty: it was cut off")
                is_gzip = name.endswith(".gz")
                stream = (
                    gzip.GzipFile(fileobj=raw) if is_gzip else io.BufferedReader(ZstdFrames(raw))
                )
            for number, line in enumerate(stream, 1):  # noqa: B007
                yield line
    except DamageError as found:
        what = f"{found.what}; line {number:,} is the last that could be read"
        raise DamageError(what, where=found.where, fix=found.fix) from found


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
    column = next((column for column in sources.SCORE_COLUMNS if column in flat), "")
    score = flat.get(column)
    if score is None:
        return -math.inf
    check_score(isinstance(score, int | float), column, type(score).__name__, str(at))
    return float(score)


def read_txt(at: Reading, part: Part) -> Iterator[Batch]:
    """A .txt file is one document, or with split_on as many as cut_lines() makes."""
    if at.options.min_score is not None:
        score_column([], at)
    with at.path.open("rb") as raw:
        if raw.peek(len(BOM)).startswith(BOM):  # a byte order mark is no text
            raw.read(len(BOM))
        pieces: Iterable[bytes] = (raw.read() for _ in range(1))
        if at.options.split_on is not None:
            pieces, at.unit = cut_lines(raw, at.options.split_on.encode()), "document"
        texts: list[bytes | None] = []
        size = 0
        for piece in chain(pieces, [None]):
            if texts and (piece is None or size >= BATCH_BYTES):
                yield Batch(texts, size)
                texts, size = [], 0
            if piece is None:
                return
            at.number, size = at.number + 1, size + len(piece)
            try:
                piece.decode()
                texts.append(piece)
            except UnicodeDecodeError as error:
                what = f"invalid UTF-8: {error.reason} at byte {error.start:,}"
                fix = f"convert the file to UTF-8, for example with iconv, {SKIP}"
                at.on_damage(DamageError(what, where=str(at), fix=fix))


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


def with_marker(source: Source) -> str:
    """The name of the first text file that has <|endoftext|> near its beginning, or ""."""
    for number, file in enumerate(source.files):
        path = source.local_path(number)
        with refusals("read a source file", path), path.open("rb") as raw:
            if EOT_TEXT.encode() in raw.read(sources.TAIL_BYTES):
                return file.name
    return ""
