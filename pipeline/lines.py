"""The lines of plain and compressed files, and how a text is cut into documents at some of them."""

import gzip
import io
from collections.abc import Iterable, Iterator

import zstandard

from pipeline.tokenizer import EOT_TEXT

ARCHIVE_BYTES = 2**14  # read at a time


def lines_of(raw: io.BufferedReader, name: str) -> Iterable[bytes]:
    """Lines of an open file: .gz, .zst or plain, by its name. EOFError for one that is cut off."""
    name = name.lower()
    if name.endswith((".gz", ".zst")) and not raw.peek(1):
        raise EOFError("the archive is empty: it was cut off")  # even of nothing: a header
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    return zst_lines(raw) if name.endswith(".zst") else raw


def zst_lines(raw: io.BufferedReader) -> Iterator[bytes]:
    """Lines of the frames of a .zst file, with windows of any length.

    EOFError for a frame that is cut off, which zstandard's own reader takes for an end.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**zstandard.WINDOWLOG_MAX)
    frame = decompressor.decompressobj()
    line: list[bytes] = []  # its pieces
    while data := frame.unused_data or raw.read(ARCHIVE_BYTES):
        if frame.eof:
            frame = decompressor.decompressobj()
        *ends, rest = frame.decompress(data).split(b"\n")
        for end in ends:
            yield b"".join([*line, end, b"\n"])
            line = []
        line.append(rest)
    if not frame.eof:
        raise EOFError("the archive was cut off")
    if any(line):
        yield b"".join(line)


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
