"""Mapped shards -> the order of the windows -> this rank's micro-batches.

A window is context_length + 1 tokens; windows start every context_length tokens of a shard, so that
each token is predicted once an epoch. Their order is a pure function of (seed, position): a keyed
permutation computed for the positions at hand, with no table in memory. Each step takes the next W
positions, where W is its number of windows, and the ranks share them out. So the step is the only
state, and the same step holds the same windows on 1, 2 or 8 ranks.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline import shards
from pipeline.errors import ForgeError
from pipeline.shards import Index
from trainer.config import Config
from trainer.ranks import Ranks

Ids = npt.NDArray[np.int64]
MicroBatch = tuple[torch.Tensor, torch.Tensor]  # inputs, targets: (B, T) int64

FEISTEL_ROUNDS = 6


class Windows:
    """All windows of one split, by number: 0 to num_windows - 1, in the order of the shards."""

    def __init__(self, index: Index, split: str, context_length: int) -> None:
        self.index, self.split, self.context_length = index, split, context_length
        self.shards = index.of(split)
        per_shard = [max(0, shard.num_tokens - 1) // context_length for shard in self.shards]
        self.ends = np.cumsum(per_shard, dtype=np.int64)  # windows up to and with each shard
        self.num_windows = int(self.ends[-1]) if per_shard else 0

    def check(self) -> None:
        """Look at the size and the first 4 KiB of every shard; ForgeError for the first bad one."""
        for number, shard in enumerate(self.shards):
            path = self.index.folder / shard.file
            self._map(number)
            if shard.head_checksum and shards.head_checksum(path) != shard.head_checksum:
                raise ForgeError(
                    "the shard has changed since the index was written: its first 4 KiB differ",
                    where=path,
                    fix="restore the file, or make the folder again with forge-prep tokenize",
                )

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
            vocab_size = self.index.tokenizer["vocab_size"]
            if out[in_shard == number].max() >= vocab_size:
                raise ForgeError(
                    f"a token is outside the vocabulary of {vocab_size:,}",
                    where=self.index.folder / self.shards[number].file,
                    fix="run forge-prep verify on its folder",
                )
        return out

    def _map(self, number: int) -> shards.Tokens:
        """The tokens of a shard, once its size and header are what the index says."""
        shard = self.shards[number]
        path = self.index.folder / shard.file
        if shards.check_header(path) != shard.num_tokens:
            raise ForgeError(
                f"the shard does not have the {shard.num_tokens:,} tokens of the index",
                where=path,
                fix="run forge-prep verify on its folder",
            )
        return shards.map_shard(path, shard.num_tokens)


@dataclass(frozen=True)
class Data:
    """The two splits, checked, and the bytes of each token (V,) for bits per byte."""

    index: Index
    train: Windows
    val: Windows
    vocabulary: list[bytes]


def open_data(config: Config, folder: Path) -> Data:
    """find_data(), with as much as the config asks for."""
    data = find_data(config, folder)
    check_amount(config, data)
    return data


def find_data(config: Config, folder: Path) -> Data:
    """Open and check a folder of shards. ForgeError if it cannot serve this model."""
    index = shards.load_index(folder)
    if index.tokenizer["vocab_size"] > config.model.vocab_size:
        raise ForgeError(
            f"the shards have {index.tokenizer['vocab_size']:,} token ids, the model "
            f"{config.model.vocab_size:,}",
            where=folder,
            fix="--set model.vocab_size=50257",
        )
    vocabulary = shards.read_vocabulary(folder / shards.VOCABULARY_FILE)
    train, val = (Windows(index, split, config.model.context_length) for split in shards.SPLITS)
    train.check()
    val.check()
    return Data(index, train, val, vocabulary)


def check_amount(config: Config, data: Data) -> None:
    """ForgeError unless there are windows for a step and for an evaluation."""
    per_evaluation = config.evaluate.num_tokens // config.model.context_length
    for windows, wanted, key in (
        (data.train, config.windows_per_step(), "batch.tokens_per_step"),
        (data.val, per_evaluation, "evaluate.num_tokens"),
    ):
        if windows.num_windows < wanted:
            most = windows.num_windows * config.model.context_length
            raise ForgeError(
                f"{key} asks for {wanted:,} windows, the {windows.split} split has "
                f"{windows.num_windows:,}",
                where=data.index.folder,
                fix=f"--set {key}={most} at most"
                if most
                else "tokenize more text, or with a "
                f"{'larger' if windows is data.val else 'smaller'} --val-fraction",
            )


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


def to_device(windows: npt.NDArray[np.uint16], device: torch.device) -> MicroBatch:
    """(B, T + 1) uint16 -> inputs and targets (B, T) int64 on the device, without waiting."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


class MicroBatches:
    """This rank's micro-batches of `size` windows, read ahead by a thread.

    The thread only looks ahead: what comes depends on the arguments alone.
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
        self.windows, self.device = windows, device
        self.positions = (config, size, ranks)
        self.step, self.seed = first_step, config.seed
        self.accumulation_steps = config.windows_per_step() // ranks.world_size // size
        self.seconds_waited = 0.0  # by the trainer, since take_seconds_waited()
        # A whole step ahead: the thread gets Python's lock when the trainer waits for the GPU.
        self.ready: queue.Queue[Any] = queue.Queue(self.accumulation_steps + 1)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._read_ahead, daemon=True)

    def __enter__(self) -> "MicroBatches":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join(timeout=5)  # unless the disk holds it

    def of_step(self) -> Iterator[MicroBatch]:
        """The micro-batches of the next step. ForgeError when a shard cannot be read."""
        for _ in range(self.accumulation_steps):
            started = time.perf_counter()
            item = self.ready.get()
            self.seconds_waited += time.perf_counter() - started
            if isinstance(item, BaseException):
                raise item
            yield item

    def take_seconds_waited(self) -> float:
        """Seconds that the trainer has waited for micro-batches since the last call."""
        waited, self.seconds_waited = self.seconds_waited, 0.0
        return waited

    def _read_ahead(self) -> None:
        try:
            while True:
                for positions in step_positions(self.step, *self.positions):
                    chosen = windows_at(positions, self.windows.num_windows, self.seed)
                    if not self._put(to_device(self.windows.read(chosen), self.device)):
                        return
                self.step += 1
        except BaseException as error:
            self._put(error)

    def _put(self, item: MicroBatch | BaseException) -> bool:
        """Whether it was taken; waits as long as the queue is full and someone reads."""
        while not self.stopping.is_set():
            with contextlib.suppress(queue.Full):
                self.ready.put(item, timeout=0.1)
                return True
        return False
