"""One split's share of a slice, in a file: documents one after another, or packed conversations."""

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import chat, chatml, shards
from pipeline.shards import Shard, ShardWriter

BUFFER_TOKENS = 2**19  # 1 MiB: it stays in the processor's cache
PACKED_TOKENS = 2**23  # of conversations that are packed together: 16 MiB


class Side:
    """One split's share of a slice: its file and its figures."""

    def __init__(self, work: Path, split: str, number: int) -> None:
        self.split, self.number = split, number
        is_train = split == "train"  # the pieces of val are joined at the end
        name = shards.shard_name(split, number) if is_train else f"{number:06d}.val"
        self.writer = ShardWriter(work / name)
        self.num_tokens = self.text_bytes = 0
        self.lengths = array("q")
        self._buffer, self._filled = np.empty(BUFFER_TOKENS, np.uint16), 0

    def add(self, tokens: npt.NDArray[Any], text_bytes: int) -> None:
        """Write a document: its tokens, behind <|endoftext|>."""
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
        self.text_bytes += text_bytes
        self.lengths.append(len(tokens))

    def _flush(self) -> None:
        self.writer.write(self._buffer[: self._filled])
        self._filled = 0

    def commit(self) -> tuple[Shard, ...]:
        """Put the file in its place. Nothing, if no document fell on this side."""
        path = self.writer.path
        if not self.lengths:
            path.unlink(missing_ok=True)
            return ()
        self._flush()
        checksum = self.writer.commit()
        counts = (self.writer.num_tokens, len(self.lengths), self.text_bytes, checksum)
        return (Shard(path.name, self.split, *counts, self.number, shards.head_checksum(path)),)


class ChatSide(Side):
    """The same of conversations, which are packed into windows some millions of tokens at a time.

    `num_tokens` counts whole windows, and the conversations that are not packed yet; not the last
    <|im_end|> of the file. `counts` says what the windows hold.
    """

    def __init__(self, work: Path, split: str, number: int, context_length: int) -> None:
        super().__init__(work, split, number)
        self.context_length = context_length
        self.counts = chat.total([])
        self._waiting: list[shards.Tokens] = []
        self._num_waiting = 0  # tokens

    def add(self, tokens: npt.NDArray[Any], text_bytes: int) -> None:
        """Take a conversation: its tokens, behind <|endoftext|>. It has to fit into a window."""
        conversation = np.empty(1 + len(tokens), np.uint16)
        conversation[0], conversation[1:] = shards.EOT_TOKEN, tokens
        self._waiting.append(conversation)
        self._num_waiting += 1 + len(tokens)
        self.num_tokens += 1 + len(tokens)
        self.text_bytes += text_bytes
        self.lengths.append(len(tokens))
        if self._num_waiting >= PACKED_TOKENS:
            self._pack()

    def _pack(self) -> None:
        windows = chat.lay_out(self._waiting, self.context_length)
        self.num_tokens += windows.size - self._num_waiting
        self.counts = chat.total([self.counts, chat.count(windows)])
        self.writer.write(windows.reshape(-1))
        self._waiting, self._num_waiting = [], 0

    def _flush(self) -> None:
        self._pack()
        self.writer.write(np.array([chatml.IM_END], np.uint16))
