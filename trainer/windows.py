"""Shards -> window order -> this rank's micro-batches.

Before: pipeline/shards.py, the folder on the disk. After: model.py, by way of step.py.

A window is context_length + 1 tokens; windows start every context_length tokens of a shard, so that
each token is predicted once an epoch. Their order is a pure function of (seed, position): a keyed
permutation computed for the positions at hand, with no table in memory. Each step takes the next W
positions, where W is its number of windows, and the ranks share them out. So the step is the only
state, and the same step holds the same windows on 1, 2 or 8 ranks.
"""

import contextlib
import math
import os
import queue
import threading
import time

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import ForgeError
from pipeline.shards import (
    VOCAB_SIZE,
    Index,
    Shard,
    check_header,
    head_checksum,
    shard_bytes,
)
from trainer.config import StepSizes

Ids = npt.NDArray[np.int64]
MicroBatch = tuple[torch.Tensor, torch.Tensor]  # inputs, targets: (B, T) int64

FEISTEL_ROUNDS = 6
SILENT_DISK_SECONDS = 60.0  # longest wait for a micro-batch


class Windows:
    """All windows of one split, by number: 0 to num_windows - 1, in the order of the shards."""

    def __init__(self, index: Index, split: str, context_length: int) -> None:
        self.index = index
        self.split = split
        self.context_length = context_length
        self.shards = index.of(split)
        per_shard = [max(0, shard.num_tokens - 1) // context_length for shard in self.shards]
        self.ends = np.cumsum(per_shard, dtype=np.int64)  # windows up to and with each shard
        self.num_windows = int(self.ends[-1]) if per_shard else 0

    def check(self) -> None:
        """Look at the size and the head of every shard; ForgeError for the first that is wrong."""
        for shard in self.shards:
            path = self.index.folder / shard.file
            if check_header(path) != shard.num_tokens:
                raise ForgeError(
                    f"the shard does not have the {shard.num_tokens:,} tokens of the index",
                    where=path,
                    fix="run forge-prep verify on its folder",
                )
            if shard.head_checksum and head_checksum(path) != shard.head_checksum:
                raise ForgeError(
                    "the shard has changed since the index was written: its first 4 KiB differ",
                    where=path,
                    fix="restore the file, or make the folder again with forge-prep tokenize",
                )

    def locate(self, window: int) -> tuple[Shard, int]:
        """(shard, its first token) of a window: where a person finds it."""
        shard = int(np.searchsorted(self.ends, window, side="right"))
        before = int(self.ends[shard - 1]) if shard else 0
        return self.shards[shard], (window - before) * self.context_length

    def read(self, windows: Ids) -> npt.NDArray[np.uint16]:
        """The tokens of n windows: (n, T + 1) uint16.

        Read, not mapped: a mapped page of a disk that fails or of a file that shrinks ends the
        process with a signal, and maps kept for days count as its memory. Both read the page cache.
        ForgeError when a shard cannot be read, ends early, or has a token outside the vocabulary.
        """
        out = np.empty((len(windows), self.context_length + 1), "<u2")
        in_shard = np.searchsorted(self.ends, windows, side="right")
        for number in np.unique(in_shard):
            shard = self.shards[number]
            path = self.index.folder / shard.file
            before = self.ends[number - 1] if number else 0
            try:
                with path.open("rb", buffering=0) as file:
                    if os.fstat(file.fileno()).st_size != shard_bytes(shard.num_tokens):
                        raise OSError(0, "its size is no longer that of the index")
                    for row in np.flatnonzero(in_shard == number):
                        start = (windows[row] - before) * self.context_length
                        count = os.preadv(file.fileno(), [out[row]], shard_bytes(int(start)))
                        if count != out[row].nbytes:
                            raise OSError(0, "it ends early")
            except OSError as error:
                raise ForgeError(
                    f"cannot read a shard: {error.strerror}",
                    where=path,
                    fix="bring it back; then the same command with --resume",
                ) from error
            if out[in_shard == number].max() >= VOCAB_SIZE:
                raise ForgeError(
                    f"a token is outside the vocabulary of {VOCAB_SIZE:,}",
                    where=path,
                    fix="run forge-prep verify on its folder",
                )
        return out


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


def step_positions(
    step: int, sizes: StepSizes, micro_batch_size: int, rank: int, world_size: int
) -> Ids:
    """This rank's positions in one step: (accumulation steps, windows in each)."""
    cut = sizes.cut(step, world_size, micro_batch_size)
    share = math.prod(cut)
    first = sizes.before(step) + rank * share
    return np.arange(first, first + share, dtype=np.int64).reshape(cut)


def to_device(windows: npt.NDArray[np.uint16], device: torch.device) -> MicroBatch:
    """(B, T + 1) uint16 -> inputs and targets (B, T) int64 on the device, without waiting."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


class MicroBatches:
    """This rank's endless micro-batches from `first_step` on, read ahead by a thread.

    The thread only looks ahead: what comes depends on the arguments alone. When reading fails,
    `error` says why and zeros come from then on: the step can go through on all ranks, which learn
    of it there and stop together (loop.py).
    """

    def __init__(
        self,
        windows: Windows,
        seed: int,
        first_step: int,
        sizes: StepSizes,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.windows, self.seed, self.first_step = windows, seed, first_step
        self.cut = (sizes, micro_batch_size, rank, world_size)
        self.device = device
        self.error: ForgeError | None = None
        self._seconds_waited = 0.0
        # A whole step ahead: the thread gets Python's lock when the trainer waits for the GPU.
        a_step = sizes.windows // world_size // micro_batch_size
        self.ready: queue.Queue[MicroBatch | BaseException] = queue.Queue(a_step + 1)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._read_ahead, daemon=True)

    def __enter__(self) -> "MicroBatches":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join(timeout=5)  # unless the disk holds it

    def __iter__(self) -> "MicroBatches":
        return self

    def __next__(self) -> MicroBatch:
        if self.error is None:
            started = time.perf_counter()
            try:
                item = self.ready.get(timeout=SILENT_DISK_SECONDS)
            except queue.Empty:
                item = ForgeError(
                    f"the shards' disk has not answered for {SILENT_DISK_SECONDS:.0f} s",
                    where=self.windows.index.folder,
                    fix="look at the disk; then the same command with --resume",
                )
            self._seconds_waited += time.perf_counter() - started
            if isinstance(item, tuple):
                return item
            if not isinstance(item, ForgeError):
                item = ForgeError(
                    f"cannot read windows: {item!r}",
                    where=self.windows.index.folder,
                    fix="look at the disk and the memory; then the same command with --resume",
                )
            self.error = item
        shape = (self.cut[1], self.windows.context_length)
        zeros = torch.zeros(shape, dtype=torch.int64, device=self.device)
        return zeros, zeros

    def take_seconds_waited(self) -> float:
        """Seconds that the trainer has waited for micro-batches since the last call."""
        waited, self._seconds_waited = self._seconds_waited, 0.0
        return waited

    def windows_of(self, step: int, rank: int, micro_step: int) -> Ids:
        """The windows of any rank's micro-batch: `step` counts from 0."""
        sizes, micro_batch_size, _, world_size = self.cut
        positions = step_positions(step, sizes, micro_batch_size, rank, world_size)
        return windows_at(positions[micro_step], self.windows.num_windows, self.seed)

    def _put(self, item: MicroBatch | BaseException) -> None:
        while not self.stopping.is_set():
            with contextlib.suppress(queue.Full):
                self.ready.put(item, timeout=0.1)
                return

    def _read_ahead(self) -> None:
        try:
            step = self.first_step
            while not self.stopping.is_set():
                for positions in step_positions(step, *self.cut):
                    if self.stopping.is_set():
                        return
                    chosen = windows_at(positions, self.windows.num_windows, self.seed)
                    self._put(to_device(self.windows.read(chosen), self.device))
                step += 1
        except BaseException as error:
            self._put(error)
