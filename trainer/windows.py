"""Mapped shards -> window order -> this rank's micro-batches.

Before: pipeline/shards.py, the folder on the disk. After: model.py, by way of loop.py.

A window is context_length + 1 tokens; windows start every context_length tokens of a shard, so that
each token is predicted once an epoch. Their order is a pure function of (seed, position): a keyed
permutation computed for the positions at hand, with no table in memory. Step s takes positions
s*W to (s+1)*W - 1, where W is the number of windows a step, and the ranks share them out. So the
position is the only state, and the same step holds the same windows on 1, 2 or 8 ranks.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import ForgeError
from pipeline.shards import VOCAB_SIZE, Index, check_header, map_shard

Ids = npt.NDArray[np.int64]
MicroBatch = tuple[torch.Tensor, torch.Tensor]  # inputs, targets: (B, T) int64

FEISTEL_ROUNDS = 6


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
        """Look at the header and size of every shard; ForgeError for the first that is wrong."""
        for shard in self.shards:
            path = self.index.folder / shard.file
            if check_header(path) != shard.num_tokens:
                raise ForgeError(
                    f"the shard does not have the {shard.num_tokens:,} tokens of the index",
                    where=path,
                    fix="run forge-prep verify on its folder",
                )

    def locate(self, window: int) -> tuple[str, int]:
        """(shard file, first token) of a window: where a person finds it."""
        shard = int(np.searchsorted(self.ends, window, side="right"))
        before = int(self.ends[shard - 1]) if shard else 0
        return self.shards[shard].file, (window - before) * self.context_length

    def read(self, windows: Ids) -> npt.NDArray[np.uint16]:
        """The tokens of n windows: (n, T + 1) uint16.

        Shards are mapped for this call only: maps kept for days count every page they ever touched
        as this process's memory, and thousands of them exhaust the file descriptors.
        """
        out = np.empty((len(windows), self.context_length + 1), np.uint16)
        in_shard = np.searchsorted(self.ends, windows, side="right")
        for number in np.unique(in_shard):
            shard = self.shards[number]
            tokens = map_shard(self.index.folder / shard.file, shard.num_tokens)
            before = self.ends[number - 1] if number else 0
            for row in np.flatnonzero(in_shard == number):
                start = (windows[row] - before) * self.context_length
                out[row] = tokens[start : start + self.context_length + 1]
            if out[in_shard == number].max() >= VOCAB_SIZE:
                raise ForgeError(
                    f"a token is outside the vocabulary of {VOCAB_SIZE:,}",
                    where=self.index.folder / shard.file,
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
    step: int, windows_per_step: int, micro_batch_size: int, rank: int, world_size: int
) -> Ids:
    """This rank's positions in one step: (accumulation_steps, micro_batch_size)."""
    share = windows_per_step // world_size
    first = step * windows_per_step + rank * share
    return np.arange(first, first + share, dtype=np.int64).reshape(-1, micro_batch_size)


def to_device(windows: npt.NDArray[np.uint16], device: torch.device) -> MicroBatch:
    """(B, T + 1) uint16 -> inputs and targets (B, T) int64 on the device, without waiting."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


class MicroBatches:
    """What the reading thread has ready, and how long the trainer had to wait for it."""

    def __init__(self, ready: queue.Queue[MicroBatch | BaseException]) -> None:
        self._ready, self._seconds_waited = ready, 0.0

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        started = time.perf_counter()
        item = self._ready.get()
        self._seconds_waited += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        return item

    def take_seconds_waited(self) -> float:
        """Seconds since the last call."""
        waited, self._seconds_waited = self._seconds_waited, 0.0
        return waited


@contextlib.contextmanager
def prefetch(
    windows: Windows,
    seed: int,
    first_step: int,
    windows_per_step: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[MicroBatches]:
    """This rank's endless micro-batches from `first_step` on, read ahead by a thread.

    The thread only looks ahead: what it yields depends on the arguments alone. Its errors are
    raised where the micro-batch is asked for.
    """
    # A whole step is read ahead: the thread gets Python's lock when the trainer waits for the GPU.
    a_step = windows_per_step // world_size // micro_batch_size
    ready: queue.Queue[MicroBatch | BaseException] = queue.Queue(a_step + 1)
    stopping = threading.Event()

    def put(item: MicroBatch | BaseException) -> None:
        while not stopping.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def read_ahead() -> None:
        try:
            step = first_step
            while not stopping.is_set():
                for positions in step_positions(
                    step, windows_per_step, micro_batch_size, rank, world_size
                ):
                    chosen = windows_at(positions, windows.num_windows, seed)
                    put(to_device(windows.read(chosen), device))
                step += 1
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read_ahead, daemon=True)
    thread.start()
    try:
        yield MicroBatches(ready)
    finally:
        stopping.set()
        thread.join()
