"""One step: forward, backward, clip, update; and its figures, read when the next is queued."""

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config import Config
from trainer.cross_entropy import IGNORED
from trainer.memory import Cut
from trainer.model import LanguageModel
from trainer.optimizer import Optimizer
from trainer.ranks import Ranks, sum_over_ranks
from trainer.windows import Data, MicroBatches


@dataclass(frozen=True)
class Setup:
    """Everything that stays fixed from start to exit."""

    config: Config
    data: Data
    ranks: Ranks
    device: torch.device
    cut: Cut
    model: LanguageModel
    optimizer: Optimizer
    batches: MicroBatches


class Votes(NamedTuple):
    """One rank's requests; all ranks do what any of them asks for."""

    stop: bool = False
    save: bool = False
    time_is_up: bool = False


class StepResult(NamedTuple):
    """The outcome of a step; all but the seconds are the same on every rank."""

    step: int
    lr: float
    seconds: float
    loss: float  # mean nats per token, over all ranks
    norm: float  # of the gradient, before clipping
    votes: Votes

    @property
    def is_sound(self) -> bool:
        """Whether the weights were updated."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def train_step(setup: Setup, lr: float, votes: Votes) -> Tensor:
    """One update of the weights. Returns [loss, *votes, norm], on the device: nothing waits for it.

    A loss or a norm that is not finite leaves the weights as they were, on all ranks alike.
    ForgeError when this rank cannot read its windows.
    """
    model, optimizer = setup.model, setup.optimizer
    total, count = torch.zeros(2, device=setup.device)  # of losses, and of tokens with one
    for inputs, targets in setup.batches.of_step():
        loss = model(inputs, targets)  # a sum over tokens: the optimizer divides, in float32
        loss.backward()
        total += loss.detach()
        count += (targets != IGNORED).sum()
    mine = [total, count, *(torch.full_like(total, float(vote)) for vote in votes)]
    total, count, *heard = sum_over_ranks(torch.stack(mine), setup.ranks)
    loss = total / count
    norm = optimizer.update(lr, count, is_sound=torch.isfinite(loss))
    return torch.stack([loss, *heard, norm])


class Moment:
    """A point in the device's queue of work, which the host runs ahead of (a CPU: its clock)."""

    def __init__(self, device: torch.device) -> None:
        self.time = time.perf_counter()
        self.event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self.event.record()

    def seconds_since(self, earlier: "Moment") -> float:
        """Waits for the device to reach this point."""
        if self.event and earlier.event:
            self.event.synchronize()
            return float(earlier.event.elapsed_time(self.event)) / 1000
        return self.time - earlier.time


class Inbox:
    """Figures on their way from the GPU: a step's are read when the next one has been queued."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = Moment(device)  # of the step that is read next
        self.waiting: list[tuple[int, float, Tensor, Moment]] = []

    def push(self, step: int, lr: float, figures: Tensor) -> list[StepResult]:
        """Send a step's figures on their way; returns those of the one before (CPU: its own)."""
        if figures.is_cuda:  # reading it directly would also wait for all that is queued later
            figures = torch.empty(figures.shape, pin_memory=True).copy_(figures, non_blocking=True)
        arrived = Moment(self.device)
        before = self.flush()
        self.waiting = [(step, lr, figures, arrived)]
        return before if arrived.event else before + self.flush()

    def flush(self) -> list[StepResult]:
        """All that is still on its way; waits for it."""
        results = []
        for step, lr, figures, arrived in self.waiting:
            seconds, self.began = arrived.seconds_since(self.began), arrived
            loss, *votes, norm = figures.tolist()
            heard = Votes(*(vote > 0 for vote in votes))
            results.append(StepResult(step, lr, seconds, loss, norm, heard))
        self.waiting = []
        return results

    def restart(self) -> None:
        """What the device did since the last step was not a step."""
        self.began = Moment(self.device)
