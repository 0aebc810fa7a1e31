"""Mapped shards -> the order of the windows -> this rank's micro-batches.

A window is context_length + 1 tokens; windows start every context_length tokens of a shard, so that
each token is predicted once an epoch. Their order is a pure function of (seed, position): a keyed
permutation computed for the positions at hand, with no table in memory. Each step takes the next W
positions, where W is its number of windows, and the ranks share them out. So the step is the only
state, and the same step holds the same windows on 1, 2 or 8 ranks.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipeline import chatml, shards
from pipeline.errors import ForgeError, counted
from pipeline.shards import Index
from trainer.config import Config
from trainer.cross_entropy import IGNORED
from trainer.ranks import Ranks

Ids = npt.NDArray[np.int64]
MicroBatch = tuple[torch.Tensor, torch.Tensor]  # inputs, targets: (B, T) int64

FEISTEL_ROUNDS = 6
VERIFY = "run forge-prep verify on its folder; if it was extended, mix it again"


class Windows:
    """All windows of one split, or of a part of it, by number, in the order of the shards."""

    def __init__(
        self, index: Index, split: str, context_length: int, part: str | None = None
    ) -> None:
        self.index, self.split, self.context_length, self.part = index, split, context_length, part
        self.shards, self.num_ids = index.of(split, part), index.tokenizer["vocab_size"]
        self.is_chat = index.chat is not None
        per_shard = [max(0, shard.num_tokens - 1) // context_length for shard in self.shards]
        self.ends = np.cumsum(per_shard, dtype=np.int64)  # windows up to and with each shard
        self.num_windows = int(self.ends[-1]) if per_shard else 0

    def check(self) -> None:
        """Look at the size and the first 4 KiB of every shard; ForgeError for the first bad one."""
        for number, shard in enumerate(self.shards):
            path = self.index.folder / shard.file
            self._map(number)
            if shard.head_checksum and shards.head_checksum(path) != shard.head_checksum:
                what = "the shard has changed since the index was written: its first 4 KiB differ"
                raise ForgeError(what, where=path, fix=VERIFY)

    def read(self, windows: Ids) -> npt.NDArray[np.uint16]:
        """The tokens of n windows: (n, T + 1) uint16.

        Shards are mapped anew for each call, so that maps never count as the process's memory.
        ForgeError when a shard is gone, has another size, or has a token outside the vocabulary.
        """
        out = np.empty((len(windows), self.context_length + 1), np.uint16)
        in_shard = np.searchsorted(self.ends, windows, side="right")
        for number in np.unique(in_shard):
            tokens = self._map(number)
            before = self.ends[number - 1] if number else 0
            for row in np.flatnonzero(in_shard == number):
                start = (windows[row] - before) * self.context_length
                out[row] = tokens[start : start + self.context_length + 1]
            if out[in_shard == number].max() >= self.num_ids:
                what = f"a token is outside the vocabulary of {self.num_ids:,}"
                path = self.index.folder / self.shards[number].file
                raise ForgeError(what, where=path, fix=VERIFY)
        return out

    def _map(self, number: int) -> shards.Tokens:
        """The tokens of a shard, once its size and header are what the index says."""
        shard = self.shards[number]
        path = self.index.folder / shard.file
        if shards.check_header(path) != shard.num_tokens and (  # a mixture may use less of it
            not shard.folder or shards.head_checksum(path) != shard.head_checksum
        ):
            what = f"the shard does not have the {shard.num_tokens:,} tokens of the index"
            raise ForgeError(what, where=path, fix=VERIFY)
        return shards.map_shard(path, shard.num_tokens)


@dataclass(frozen=True)
class Data:
    """The two splits, checked, and each token's bytes (V,), for bits per byte."""

    index: Index
    train: Windows
    val: Windows
    parts: list[Windows]  # val by the folders of a mixture, as far as they have a window of it
    vocabulary: list[bytes]


def open_data(config: Config, folder: Path) -> Data:
    """Open and check a folder of shards. ForgeError if it cannot serve this model."""
    index = shards.load_index(folder)
    num_ids, vocab_size = index.tokenizer["vocab_size"], config.model.vocab_size
    if num_ids > vocab_size:
        what = f"the shards have {num_ids:,} token ids, the model {vocab_size:,}"
        fix = "forge-train chat --from RUN" if index.chat else f"--set model.vocab_size={num_ids}"
        raise ForgeError(what, where=folder, fix=fix)
    context_length = config.model.context_length
    if index.chat and index.chat["context_length"] != context_length:
        what = f"conversations packed for {index.chat['context_length']:,} tokens of context, "
        fix = (
            f"pack them again: forge-prep chat SOURCE --context-length {context_length} --overwrite"
        )
        raise ForgeError(f"{what}and the model has {context_length:,}", where=folder, fix=fix)
    vocabulary = shards.read_vocabulary(folder / shards.VOCABULARY_FILE)
    vocabulary += [b""] * (num_ids - len(vocabulary))  # chat's markers
    train, val = (Windows(index, split, context_length) for split in shards.SPLITS)
    train.check()
    val.check()
    parts = [Windows(index, "val", context_length, part) for part in index.parts]
    return Data(index, train, val, [part for part in parts if part.num_windows], vocabulary)


def for_data(config: Config, data: Data) -> Config:
    """The config with schedule.max_epochs as max_steps, unless that is smaller.

    And with an evaluation on all of the val split, where that has less than was asked for.
    """
    schedule, num_tokens = config.schedule, data.val.num_windows * config.model.context_length
    if schedule.max_epochs is not None:
        steps = math.ceil(schedule.max_epochs * data.train.num_windows / config.windows_per_step())
        steps = max(1, min(steps, schedule.max_steps or steps))
        schedule = replace(schedule, max_steps=steps)
    num_tokens = min(num_tokens, config.evaluate.num_tokens)
    evaluation = replace(config.evaluate, num_tokens=num_tokens)
    return replace(config, schedule=schedule, evaluate=evaluation)


def check_amount(config: Config, data: Data) -> None:
    """ForgeError unless there are windows for a step and for an evaluation."""
    for windows, wanted in ((data.train, config.windows_per_step()), (data.val, 1)):
        if windows.num_windows < wanted:
            most = windows.num_windows * config.model.context_length
            what = f"{counted(wanted, 'window')} of {config.model.context_length:,} tokens are "
            what += f"needed, and the {windows.split} split has {windows.num_windows:,}"
            fix = "make shards of more text, or with another --val-fraction"
            fix = f"lower batch.tokens_per_step to {most:,} or less; or {fix}" if most else fix
            raise ForgeError(what, where=data.index.folder, fix=fix)


def permute(numbers: Ids, size: int, key: tuple[int, int]) -> Ids:
    """Keyed pseudo-random permutation of [0, size), for each of `numbers`.

    A balanced Feistel network over the next even power of two, walked until it lands inside:
    Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains".
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)

    def encrypt(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = x >> half, x & mask
        for round_key in keys:
            # SplitMix64's finalizer as the round function (Steele, Lea and Flood 2014).
            z = right ^ round_key
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
        return (left << half) | right

    x = encrypt(numbers.astype(np.uint64))
    while (outside := x >= size).any():
        x[outside] = encrypt(x[outside])
    return x.astype(np.int64)


def windows_at(positions: Ids, num_windows: int, seed: int) -> Ids:
    """The windows at n positions of the endless order: epoch after epoch, each its own shuffle."""
    windows = np.empty_like(positions)
    epochs = positions // num_windows
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        windows[chosen] = permute(positions[chosen] % num_windows, num_windows, (seed, int(epoch)))
    return windows


def step_positions(step: int, config: Config, size: int, ranks: Ranks) -> Ids:
    """This rank's positions in `step` (from 0): (accumulation steps, `size` windows in each)."""
    share = config.windows_per_step() // ranks.world_size
    first = step * config.windows_per_step() + ranks.rank * share
    return np.arange(first, first + share, dtype=np.int64).reshape(-1, size)


def to_device(
    windows: npt.NDArray[np.uint16], device: torch.device, is_chat: bool = False
) -> MicroBatch:
    """(B, T + 1) uint16 -> inputs and targets (B, T) int64 on the device, without waiting.

    In conversations, targets that are not the assistant's words are IGNORED.
    """

    def sent(array: npt.NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return (
            tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
        )

    tokens = sent(windows.astype(np.int64))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if is_chat:
        targets = targets.where(sent(chatml.trained(windows)[:, 1:].copy()), IGNORED)
    return inputs, targets


class MicroBatches:
    """This rank's micro-batches of `size` windows, read ahead by a thread.

    The thread only looks ahead: which windows come depends on the arguments alone.
    """

    def __init__(
        self,
        windows: Windows,
        config: Config,
        first_step: int,
        size: int,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.windows, self.config, self.device = windows, config, device
        self.size, self.ranks = size, ranks
        self.accumulation_steps = config.windows_per_step() // ranks.world_size // size
        self.next = first_step * self.accumulation_steps  # micro-batch that is read next
        self.thread = ThreadPoolExecutor(1)
        self.ahead = deque[Future[MicroBatch]]()
        self.seconds_waited = 0.0  # by the trainer, since take_seconds_waited()

    def __enter__(self) -> "MicroBatches":
        self._read_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)

    def of_step(self) -> Iterator[MicroBatch]:
        """The micro-batches of the next step. ForgeError when a shard cannot be read."""
        for _ in range(self.accumulation_steps):
            started = time.perf_counter()
            micro_batch = self.ahead.popleft().result()
            self.seconds_waited += time.perf_counter() - started
            self._read_ahead()
            yield micro_batch

    def take_seconds_waited(self) -> float:
        """Seconds that the trainer has waited for micro-batches since the last call."""
        waited, self.seconds_waited = self.seconds_waited, 0.0
        return waited

    def _read_ahead(self) -> None:
        """A step and one more: the thread gets Python's lock when the trainer waits for the GPU."""
        while len(self.ahead) < self.accumulation_steps + 2:
            self.ahead.append(self.thread.submit(self._read, self.next))
            self.next += 1

    def _read(self, number: int) -> MicroBatch:
        step, part = divmod(number, self.accumulation_steps)
        positions = step_positions(step, self.config, self.size, self.ranks)[part]
        chosen = windows_at(positions, self.windows.num_windows, self.config.seed)
        return to_device(self.windows.read(chosen), self.device, self.windows.is_chat)
