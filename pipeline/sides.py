"""One split's share of a slice, in a file: documents one after another, or packed conversations."""

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import chat, chatml, shards
from pipeline.shards import Shard, ShardWriter

BUFFER_TOKENS = 2**18  # 1 MiB of uint32: it stays in the processor's cache
PACKED_TOKENS = 2**23  # of conversations that are packed together: 16 MiB


class Side:
    """One split's share of a slice: its file and its figures.

    With a `context_length`, conversations are packed into windows, some millions of tokens at a
    time. `num_tokens` counts whole windows, and the conversations that are not packed yet; not the
    last <|im_end|> of the file. `counts` says what the windows hold.
    """

    def __init__(self, split: str, work: Path, number: int, context_length: int | None) -> None:
        self.split, self.number, self.context_length = split, number, context_length
        is_train = split == "train"  # the pieces of val are joined at the end
        name = shards.shard_name(split, number) if is_train else f"{number:06d}.val"
        self.writer = ShardWriter(work / name)
        self.num_tokens = self.text_bytes = 0
        self.lengths = array("q")
        self.counts = chat.total([])
        self._waiting: list[npt.NDArray[Any]] = []
        self._num_waiting = 0  # tokens

    def add(self, tokens: npt.NDArray[Any], text_bytes: int) -> None:
        """Write a document: its tokens, behind <|endoftext|>. It has to fit into a window."""
        size = 1 + len(tokens)
        self._waiting.append(tokens)
        self._num_waiting += size
        self.num_tokens += size
        self.text_bytes += text_bytes
        self.lengths.append(len(tokens))
        if self._num_waiting >= (PACKED_TOKENS if self.context_length else BUFFER_TOKENS):
            self._flush()

    def _flush(self) -> None:
        if self.context_length:
            windows = chat.lay_out(self._waiting, self.context_length)
            self.num_tokens += windows.size - self._num_waiting
            self.counts = chat.total([self.counts, chat.count(windows)])
            self.writer.write(windows.reshape(-1))
        elif self._waiting:
            self.writer.write(chat.join(self._waiting))
        self._waiting, self._num_waiting = [], 0

    def commit(self) -> tuple[Shard, ...]:
        """Put the file in its place. Nothing, if no document fell on this side."""
        path = self.writer.path
        if not self.lengths:
            path.unlink(missing_ok=True)
            return ()
        self._flush()
        if self.context_length:
            self.writer.write(np.array([chatml.IM_END], np.uint16))
        checksum = self.writer.commit()
        counts = (self.writer.num_tokens, len(self.lengths), self.text_bytes, checksum)
        return (Shard(path.name, self.split, *counts, self.number, shards.head_checksum(path)),)
