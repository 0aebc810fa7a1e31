"""One split's share of a slice, in a file: documents one after another, or packed conversations."""

from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline import chat, chatml, shards, verify
from pipeline.shards import Shard, ShardWriter

BUFFER_TOKENS = 2**19  # 1 MiB: it stays in the processor's cache
PACKED_TOKENS = 2**23  # of conversations that are packed together: 16 MiB


def slice_path(work: Path, split: str, number: int) -> Path:
    """Where a slice's share of a split lies; those of val are joined at the end."""
    return (
        shards.shard_path(work, split, number) if split == "train" else work / f"{number:06d}.val"
    )


class Side:
    """Documents of text: their file, opened at the first tokens, and its figures."""

    def __init__(self, work: Path, split: str, number: int) -> None:
        self.split, self.number = split, number
        self.path = slice_path(work, split, number)
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

    def _write(self, tokens: shards.Tokens) -> None:
        self.writer = self.writer or ShardWriter(self.path)
        self.writer.write(tokens)

    def _flush(self) -> None:
        self._write(self._buffer[: self._filled])
        self._filled = 0

    def commit(self) -> tuple[Shard, ...]:
        """Put the file in its place. Nothing, if no document fell on this side."""
        if not self.lengths:
            self.path.unlink(missing_ok=True)
            return ()
        self._flush()
        assert self.writer is not None
        checksum = self.writer.commit()
        counts = (self.writer.num_tokens, len(self.lengths), self.text_bytes, checksum)
        head = shards.head_checksum(self.path)
        return (Shard(self.path.name, self.split, *counts, self.number, head),)

    def discard(self) -> None:
        if self.writer is not None:
            self.writer.discard()


class ChatSide(Side):
    """Conversations, packed into windows some millions of tokens at a time.

    `num_tokens` counts whole windows, and the conversations that are not packed yet; the last
    <|im_end|> of the file is not among them. `counts` says what the windows hold.
    """

    def __init__(self, work: Path, split: str, number: int, context_length: int) -> None:
        super().__init__(work, split, number)
        self.context_length = context_length
        self.counts = Counter[str]()
        self._waiting: list[shards.Tokens] = []
        self._num_waiting = 0  # tokens

    def add_conversation(self, tokens: shards.Tokens) -> None:
        """Take a conversation, <|endoftext|> included, that fits into a window."""
        self._waiting.append(tokens)
        self._num_waiting += len(tokens)
        self.num_tokens += len(tokens)
        self.lengths.append(len(tokens) - 1)
        if self._num_waiting >= PACKED_TOKENS:
            self._pack()

    def _pack(self) -> None:
        windows = chat.lay_out(self._waiting, self.context_length)
        self.num_tokens += windows.size - self._num_waiting
        self.text_bytes += int(verify.token_lengths()[windows].sum())
        self.counts.update(chat.count(windows))
        self._write(windows.reshape(-1))
        self._waiting, self._num_waiting = [], 0

    def _flush(self) -> None:
        self._pack()
        self._write(np.array([chatml.IM_END], np.uint16))
