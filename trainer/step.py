"""One step: forward, loss, backward, clip, update; and what all ranks learn of it.

Before: windows.py, model.py, optimizer.py. After: loop.py, which reads a step's figures when the
next step has been queued.
"""

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from trainer import memory
from trainer.model import LanguageModel
from trainer.optimizer import Optimizer
from trainer.ranks import Ranks, sum_over_ranks
from trainer.signals import Wishes
from trainer.windows import MicroBatches


class Shared(NamedTuple):
    """What all ranks know of a step once it is done, whoever it came from."""

    loss: float
    stops: float  # ranks that want to stop
    saves: float  # ranks that want a checkpoint
    failed: float  # ranks that could not read their windows
    out_of_memory: float  # ranks that ran out of GPU memory
    steps_left: float  # rank 0's clock: steps that fit, this one included
    norm: float
    suspects: list[float]  # 1 for each micro-batch, rank by rank, whose loss was not finite


class Moment:
    """A point in the device's queue of work, which the host runs ahead of (a CPU: its clock)."""

    def __init__(self, device: torch.device) -> None:
        self.time = time.perf_counter()
        self.event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self.event.record()

    def wait(self) -> None:
        if self.event:
            self.event.synchronize()

    def seconds_since(self, earlier: "Moment") -> float:
        """wait() for both first."""
        if self.event and earlier.event:
            return float(earlier.event.elapsed_time(self.event)) / 1000
        return self.time - earlier.time


class StepResult:
    """A step's figures on their way from the device to here."""

    def __init__(
        self,
        step: int,
        lr: float,
        decayed: tuple[float, float],
        figures: Tensor,
        plan: memory.Plan,
        seconds_waited: float,
    ) -> None:
        self.step, self.lr = step, lr
        self.decayed_before, self.decayed = decayed
        self.plan, self.seconds_waited = plan, seconds_waited
        self.figures = figures
        if figures.is_cuda:  # reading it directly would wait for all that is queued behind it, too
            self.figures = torch.empty(figures.shape, pin_memory=True)
            self.figures.copy_(figures, non_blocking=True)
        self.arrived = Moment(figures.device)

    def read(self) -> Shared:
        """Waits until this step is done."""
        self.arrived.wait()
        loss, stops, saves, failed, out_of_memory, steps_left, norm, *rest = self.figures.tolist()
        return Shared(loss, stops, saves, failed, out_of_memory, steps_left, norm, rest)


def train_step(
    model: LanguageModel,
    optimizer: Optimizer,
    batches: MicroBatches,
    accumulation_steps: int,
    tokens_per_step: int,
    lr: float,
    ranks: Ranks,
    wishes: Wishes,
    steps_left: float,
) -> Tensor:
    """One optimizer update: forward, loss, backward, clip, update.

    Returns a step's Shared figures, on the device. A loss or a
    norm that is not finite leaves the weights as they were, and so does a rank without windows or
    without memory.
    """
    total = torch.zeros((), device=optimizer.device)
    suspects = torch.zeros(ranks.world_size, accumulation_steps, device=optimizer.device)
    out_of_memory = False
    try:
        for micro_step in range(accumulation_steps):
            inputs, targets = next(batches)
            loss = model(inputs, targets)
            loss.backward()
            optimizer.collect()
            total += loss.detach()
            suspects[ranks.rank, micro_step] = ~torch.isfinite(loss.detach())
    except torch.OutOfMemoryError:
        out_of_memory = True
    if out_of_memory:  # out of the except clause, which holds the failed step's arrays
        inputs = targets = loss = None  # type: ignore[assignment]
        optimizer.discard()
        torch.cuda.empty_cache()
        total.fill_(math.nan)
        for _ in range(micro_step + 1, accumulation_steps):
            next(batches)  # the step after this one is queued already, and starts with its own
    optimizer.reduce()
    flags = (*wishes.take(), batches.error is not None, out_of_memory)
    votes = (*flags, steps_left if ranks.is_first else 0.0)
    mine = [total / tokens_per_step, *(torch.full_like(total, float(vote)) for vote in votes)]
    sums = sum_over_ranks(torch.cat([torch.stack(mine), suspects.flatten()]), ranks)
    is_sound = torch.isfinite(sums[0]) & (sums[3] == 0)
    norm = optimizer.update(lr, tokens_per_step, is_sound)
    return torch.cat([sums[:6], norm.reshape(1), sums[6:]])
