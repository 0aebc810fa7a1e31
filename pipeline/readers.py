"""The text of a source file: parquet, JSON Lines (.gz, .zst) or .txt, as batches of Arrow strings.

Before: sources.py, which says what to read. After: slices.py, in a worker process.

Damage (a bad line, text, row group or file) goes to `on_damage`, which raises it or leaves it out.
"""

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

from pipeline.errors import DamageError, refusals
from pipeline.sources import SCORE_COLUMNS, Options, Part, check_score, damage, score_column
from pipeline.tokenizer import EOT_TEXT

BATCH_BYTES = 8 * 2**20
BATCH_ROWS = 1024
ARCHIVE_BYTES = 2**14  # read at a time
KEPT = "run the same command again; finished slices are kept"
RESTORE = "restore the file and run the same command again, or leave it out with --on-error skip"
OnDamage = Callable[[DamageError], None]


def stop(found: DamageError) -> None:
    """The `on_damage` that leaves nothing out."""
    raise found


@dataclass
class Place:
    """Where a reader stands, for messages."""

    path: Path
    unit: str = ""  # line, row group or document
    number: int = 0

    def __str__(self) -> str:
        return f"{self.path}, {self.unit} {self.number}" if self.unit else str(self.path)


class Batch(NamedTuple):
    """Some documents: texts (n,) as they stand, nulls too, and the source bytes read for them."""

    texts: pa.LargeStringArray
    source_bytes: int
    num_low_scores: int = 0  # documents below min_score, or without a score: not among the texts


class _Rows(NamedTuple):
    texts: pa.LargeStringArray
    scores: pa.Array | None  # where min_score asks for them
    source_bytes: int


def read_texts(
    kind: str, place: Place, part: Part, options: Options, on_damage: OnDamage = stop
) -> Iterator[Batch]:
    """Stream the text of one part. Raises ForgeError, naming the place, for all that fails."""
    readers = {"parquet": read_parquet, "jsonl": read_jsonl, "txt": read_txt}
    try:
        with refusals("read a source file", place, KEPT):
            for texts, scores, size in readers[kind](place, part, options, on_damage):
                if scores is not None:
                    kept = texts.filter(pc.greater_equal(scores, options.min_score))
                    yield Batch(kept, size, len(texts) - len(kept))
                else:
                    yield Batch(texts, size)
    except DamageError as found:
        on_damage(found)


# ---------------------------------------------------------------------------------------------
# Parquet


def read_parquet(
    place: Place, part: Part, options: Options, on_damage: OnDamage
) -> Iterator[_Rows]:
    with damage("not a whole parquet file", place):
        file = pq.ParquetFile(place.path, memory_map=True, page_checksum_verification=True)
    columns = [options.text_column]
    if options.min_score is not None:
        names = [file.metadata.schema.column(c).path for c in range(file.metadata.num_columns)]
        columns.append(score_column(names, place))
    place.unit = "row group"
    with file:
        for place.number in range(part.start, part.stop):
            try:
                with damage("damaged row group", place):
                    yield from read_row_group(file, place, columns, on_damage)
            except DamageError as found:
                on_damage(found)


def read_row_group(
    file: pq.ParquetFile, place: Place, columns: list[str], on_damage: OnDamage
) -> Iterator[_Rows]:
    num_rows = batch_rows(file.metadata.row_group(place.number), columns[0])
    groups, first = [place.number], 0
    for batch in file.iter_batches(num_rows, row_groups=groups, columns=columns, use_threads=False):
        texts, scores = batch.column(columns[0]).cast(pa.large_string()), None
        if len(columns) > 1:
            is_flat = columns[1] in batch.schema.names
            outer, *inside = [columns[1]] if is_flat else columns[1].split(".")
            scores = batch.column(outer)
            scores = pc.struct_field(scores, inside) if inside else scores
        size = texts.nbytes
        if bad := invalid_texts(texts, f"{place}, text ", first, on_damage):
            sound = pa.array([n not in bad for n in range(len(texts))])
            texts, scores = texts.filter(sound), scores.filter(sound) if scores else None
        first += batch.num_rows
        yield _Rows(texts, scores, size)


def invalid_texts(
    texts: pa.LargeStringArray, where: str, first: int, on_damage: OnDamage
) -> set[int]:
    """Which texts are not UTF-8, as parquet's are only by promise. `first` is the first's number."""
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
            fix = "write the file again, from texts in UTF-8, or leave it out with --on-error skip"
            what = f"invalid UTF-8: {error.reason}"
            on_damage(DamageError(what, where=f"{where}{first + number + 1}", fix=fix))
    return bad


def batch_rows(group: Any, text_column: str) -> int:
    """Rows of a row group that hold some BATCH_BYTES of text: books are long."""
    columns = (group.column(c) for c in range(group.num_columns))
    size = sum(
        each.total_uncompressed_size for each in columns if each.path_in_schema == text_column
    )
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES * group.num_rows / max(1, size))))


# ---------------------------------------------------------------------------------------------
# JSON Lines


def read_jsonl(place: Place, part: Part, options: Options, on_damage: OnDamage) -> Iterator[_Rows]:
    place.unit = "line"
    texts: dict[int, str | None] = {}  # by line number
    scores: dict[int, float | None] = {}
    keys: list[str] = []  # of the documents without a score, if all are
    size = read_before = 0
    cut: DamageError | None = None
    has_scores = False

    def rows(read: int) -> _Rows:
        strings = large_strings(texts, scores, place, on_damage)
        values = None if options.min_score is None else pa.array(scores.values(), pa.float64())
        return _Rows(strings, values, read - read_before)

    with place.path.open("rb") as raw:
        lines = decompressed_lines(raw, place)
        while True:
            try:
                line = next(lines, b"")
            except DamageError as found:  # what came before is sound
                line, cut = b"", found
            place.number += 1
            if not line.isspace() and line:
                size += len(line)
                try:
                    document = parse_line(line, options.text_column, place)
                    if options.min_score is not None:
                        column, score = score_of(document, place)
                        scores[place.number] = score
                        has_scores, keys = has_scores or column is not None, list(document)
                    texts[place.number] = document[options.text_column]
                except DamageError as found:
                    on_damage(found)
            if size and (size >= BATCH_BYTES or not line):
                yield rows(raw.tell())
                read_before = raw.tell()
                texts, scores, size = {}, {}, 0
            if not line:
                break
    if cut:
        raise cut
    if keys and not has_scores:
        score_column(keys, place.path)


def decompressed_lines(raw: io.BufferedReader, place: Place) -> Iterator[bytes]:
    """Lines of a plain, .gz or .zst file; DamageError for one that is cut off."""
    name, number = place.path.name.lower(), 0
    try:
        with damage("cannot decompress a source file", place.path, RESTORE):
            stream = raw
            if name.endswith((".gz", ".zst")):
                if not raw.peek(1):  # even an archive of nothing has a header
                    raise EOFError("the archive is empty: it was cut off")
                is_gzip = name.endswith(".gz")
                frames: Any = gzip.GzipFile(fileobj=raw) if is_gzip else ZstdFrames(raw)
                stream = io.BufferedReader(frames, ARCHIVE_BYTES)
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
        self.raw = raw
        self.frame: Any = None
        self.left = memoryview(b"")
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=2**zstandard.WINDOWLOG_MAX)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left:
            ended = self.frame is None or self.frame.eof
            data = (self.frame.unused_data if self.frame and ended else b"") or self.raw.read(
                ARCHIVE_BYTES
            )
            if not data:
                if ended:
                    return 0
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


def parse_line(line: bytes, text_column: str, place: Place) -> dict[str, Any]:
    fix = f'each line must be a JSON object in UTF-8 with a string under "{text_column}"'
    document: Any = None
    try:
        document, what = json.loads(line), ""
    except UnicodeDecodeError as error:
        what = f"invalid UTF-8: {error.reason}"
    except (ValueError, RecursionError) as error:
        what = f"invalid JSON: {error}"
        fix += " (of a list, jq -c '.[]' makes such lines)"
    if not what and (not isinstance(document, dict) or text_column not in document):
        keys = ", ".join(document) if isinstance(document, dict) else type(document).__name__
        what = f"no column {text_column!r}; there are: {keys}"
        fix = "name the column of the text with --text-column"
    if not what and not isinstance(document[text_column], str | None):
        kind = type(document[text_column]).__name__
        what = f"column {text_column!r} holds {kind}, not a string"
    if what:
        raise DamageError(
            what, where=str(place), fix=f"{fix}; --on-error skip leaves such lines out"
        )
    parsed: dict[str, Any] = document
    return parsed


def score_of(document: dict[str, Any], place: Place) -> tuple[str | None, float | None]:
    """A document's column of the score and the score, None where it has none."""
    flat = {k: v for k, v in document.items() if not isinstance(v, dict)}
    inner = document.get("metadata")
    if isinstance(inner, dict):
        flat |= {f"metadata.{key}": value for key, value in inner.items()}
    column = next((column for column in SCORE_COLUMNS if column in flat), None)
    score = flat[column] if column else None
    is_number = score is None or isinstance(score, int | float)
    check_score(is_number, str(column), type(score).__name__, str(place))
    return column, score


def large_strings(
    texts: dict[int, str | None],
    scores: dict[int, float | None],
    place: Place,
    on_damage: OnDamage,
) -> pa.LargeStringArray:
    """The texts as Arrow has them; those that are no Unicode text are taken out of both."""
    while True:
        try:
            return pa.array(texts.values(), pa.large_string())
        except UnicodeEncodeError as error:
            line = next(number for number, text in texts.items() if text == error.object)
            what = f"a lone surrogate ({error.object[error.start]!r}) is no text"
            fix = "repair the \\u escapes of this file, or leave the line out with --on-error skip"
            on_damage(DamageError(what, where=f"{place.path}, line {line}", fix=fix))
            del texts[line]
            scores.pop(line, None)


# ---------------------------------------------------------------------------------------------
# Text files


def read_txt(place: Place, part: Part, options: Options, on_damage: OnDamage) -> Iterator[_Rows]:
    """A .txt file is one document, or with split_on as many as cut_lines() makes."""
    if options.min_score is not None:
        score_column([], place)
    with place.path.open("rb") as raw:
        pieces: Iterable[bytes] = (raw.read() for _ in range(1))
        if options.split_on is not None:
            pieces = cut_lines(raw, options.split_on.encode())
            place.unit = "document"
        texts: list[str] = []
        size = 0
        for piece in chain(pieces, [None]):
            if texts and (piece is None or size >= BATCH_BYTES):
                yield _Rows(pa.array(texts, pa.large_string()), None, size)
                texts, size = [], 0
            if piece is None:
                break
            place.number += 1
            size += len(piece)
            try:
                texts.append(piece.decode("utf-8-sig" if place.number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                what = f"invalid UTF-8: {error.reason} at byte {error.start:,}"
                fix = "convert the file to UTF-8, for example with iconv"
                on_damage(DamageError(what, where=str(place), fix=fix))


def cut_lines(lines: Iterable[bytes], mark: bytes) -> Iterator[bytes]:
    """Documents of a text: each line that begins with `mark` begins one; "" means a blank line.

    A line that says nothing but the mark is left out, one that says more is the document's heading.
    <|endoftext|> ends a document wherever it stands. Line ends around a document are left out.
    """
    document: list[bytes] = []
    for line in lines:
        if mark == EOT_TEXT.encode():
            *ends, line = line.split(mark)
            for end in ends:
                yield from filter(None, [b"".join([*document, end]).strip(b"\r\n")])
                document = []
        elif line.startswith(mark) if mark else line.isspace():
            yield from filter(None, [b"".join(document).strip(b"\r\n")])
            document = [line] if line[len(mark) :].strip() else []
            continue
        document.append(line)
    yield from filter(None, [b"".join(document).strip(b"\r\n")])


def documents(texts: pa.LargeStringArray) -> tuple[list[bytes], int, int]:
    """Texts in UTF-8 without nulls and empty ones: (texts, number of nulls, number of empties)."""
    filled = [text for text in texts.cast(pa.large_binary()).to_pylist() if text]
    return filled, texts.null_count, len(texts) - texts.null_count - len(filled)
