"""Which losses are too high to learn from.

Before: the losses of earlier steps, the same numbers on every rank. After: loop.py.
"""

import math
import statistics
from collections import deque

import numpy as np

from trainer.config import GuardConfig


class Guard:
    """Finds loss spikes: guard.spike_zscore standard deviations above the mean of recent losses.

    The limit of a step comes from steps up to the one before the last, so that no GPU is waited
    for, and from losses as metrics.jsonl has them, so that a resumed run decides the same.
    """

    def __init__(self, options: GuardConfig, losses: tuple[tuple[int, float], ...] = ()) -> None:
        self.options = options
        self.losses = deque(losses, maxlen=options.spike_window_steps + 1)  # (step, loss)

    def note(self, step: int, loss: float) -> None:
        self.losses.append((step, float(f"{loss:.6g}")))

    def limit(self, step: int) -> float:
        """The highest loss that `step` may have; infinite until a whole window has been seen."""
        zscore, window = self.options.spike_zscore, self.options.spike_window_steps
        known = [loss for at, loss in self.losses if at <= step - 2][-window:]
        if zscore is None or len(known) < window:
            return math.inf
        limit = statistics.fmean(known) + zscore * statistics.pstdev(known)
        return float(np.float32(limit))  # as exact as the loss that it is compared with
