"""One step: forward, backward, clip, update; and its figures, read when the next is queued."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config import Config
from trainer.memory import Cut
from trainer.model import LanguageModel
from trainer.optimizer import Optimizer
from trainer.ranks import Ranks, sum_over_ranks
from trainer.windows import Data, MicroBatches


@dataclass(frozen=True)
class Setup:
    """What a start of a run works with, from its first step to its last."""

    config: Config
    data: Data
    ranks: Ranks
    device: torch.device
    cut: Cut
    model: LanguageModel
    optimizer: Optimizer
    batches: MicroBatches


class Votes(NamedTuple):
    """What one rank wants; what any of them wants, all do."""

    stop: bool = False
    save: bool = False
    time_is_up: bool = False


class StepResult(NamedTuple):
    """What a step came to, the same on every rank."""

    step: int
    lr: float
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
    num_tokens = setup.config.batch.tokens_per_step
    total = torch.zeros((), device=setup.device)
    for inputs, targets in setup.batches.of_step():
        loss = model(inputs, targets)  # a sum over tokens: the optimizer divides, in float32
        loss.backward()
        optimizer.collect()
        total += loss.detach()
    optimizer.reduce()
    mine = [total / num_tokens, *(torch.full_like(total, float(vote)) for vote in votes)]
    shared = sum_over_ranks(torch.stack(mine), setup.ranks)
    norm = optimizer.update(lr, num_tokens, is_sound=torch.isfinite(shared[0]))
    return torch.cat([shared, norm.reshape(1)])


class Inbox:
    """Figures on their way from the GPU: a step's are read when the next one has been queued."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, float, Tensor, torch.cuda.Event | None]] = []

    def push(self, step: int, lr: float, figures: Tensor) -> list[StepResult]:
        """Send a step's figures on their way; returns those of the one before (CPU: its own)."""
        arrived = None
        if figures.is_cuda:  # reading it directly would wait for all that is queued behind it, too
            sent = torch.empty(figures.shape, pin_memory=True)
            figures = sent.copy_(figures, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        before = self.flush()
        self.waiting = [(step, lr, figures, arrived)]
        return before if arrived else before + self.flush()

    def flush(self) -> list[StepResult]:
        """All that is still on its way; waits for it."""
        results = []
        for step, lr, figures, arrived in self.waiting:
            if arrived:
                arrived.synchronize()
            loss, *votes, norm = figures.tolist()
            results.append(StepResult(step, lr, loss, norm, Votes(*(n > 0 for n in votes))))
        self.waiting = []
        return results
