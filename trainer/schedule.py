"""The learning rate of each step, and when the run is over.

Before: config.py; on resume, what an earlier start did. After: loop.py.

Linear warm-up, then one of two shapes:

    cosine   half a cosine down to final_lr_fraction of the peak at the last step (Loshchilov and
             Hutter 2017, without restarts)
    wsd      warm-up, stable, decay (Hu et al. 2024): the peak, then over the last decay_fraction of
             all steps a straight line to zero (Hägele et al. 2024)

Where the clock sets the end, nobody knows the number of steps. So wsd asks at each step how many
still fit (Clock), and goes on from where it stands on a straight line to zero over those: it never
jumps, and it is at zero when the time is up, whatever the machine did meanwhile.
"""

import math
import statistics
from collections import deque

from trainer.config import Config

UNKNOWN_STEPS = 1e9  # left, before the first has been timed
TIMED_STEPS = 64  # the median of so many is a step's time: one long pause does not move it
SPARE_FRACTION = 0.002  # of the budget: what nothing else accounts for
SPARE_SECONDS = 2.0  # that a process takes to end


class Schedule:
    """Gives each step its learning rate. The same on every rank: it reads no clock itself.

    `decayed` is what the decay has left of the peak (1 before it, 0 at the end of the run): the
    only state. `replay` is `decayed` after each of the next steps, as an earlier start has had it.
    """

    def __init__(
        self, config: Config, decayed: float = 1.0, replay: tuple[float, ...] = ()
    ) -> None:
        self.config, self.decayed, self.replay = config, decayed, list(replay)
        self.left = 0  # steps until the end, the last one that rate() was asked for included

    def is_over(self, steps_done: int) -> bool:
        num_steps = self.config.num_steps()
        return self.decayed == 0 or (num_steps is not None and steps_done >= num_steps)

    def rate(self, step: int, steps_left: float) -> float:
        """Learning rate of the update that ends step `step` (from 1).

        It moves the decay on: to be called once a step, in order. `steps_left` is how many steps
        the clock leaves room for, this one included.
        """
        schedule, peak = self.config.schedule, self.config.optimizer.peak_lr
        warmup = min(1.0, step / schedule.warmup_steps) if schedule.warmup_steps else 1.0
        num_steps = self.config.num_steps()
        if self.config.shape() == "cosine":
            assert num_steps is not None
            decay_steps = max(1, num_steps - schedule.warmup_steps)
            progress = min(1.0, max(0, step - schedule.warmup_steps) / decay_steps)
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            final = schedule.final_lr_fraction
            return peak * warmup * (final + (1 - final) * cosine)
        is_last = steps_left < 2  # by the clock, whatever decay_fraction is
        if num_steps is not None:
            steps_left = min(steps_left, num_steps - step + 1)
        left = self.left = max(1, math.floor(steps_left))
        if self.replay and left >= len(self.replay):
            self.decayed = self.replay.pop(0)
        else:  # nothing to repeat, or no time for it
            self.replay.clear()
            falls = left <= schedule.decay_fraction * (step - 1 + left)
            if self.decayed < 1 or falls or is_last:
                # As metrics.jsonl writes it, so that a later start can repeat it exactly.
                self.decayed = float(f"{self.decayed * (left - 1) / left:.6g}")
        return peak * min(warmup, self.decayed)


class Clock:
    """How many steps the budget still has room for, from what steps, evaluations, saves took."""

    def __init__(
        self,
        config: Config,
        evaluate_seconds: float | None = None,
        step_seconds: tuple[float, ...] = (),
    ) -> None:
        self.config = config
        self.step_seconds: deque[float] = deque(step_seconds, maxlen=TIMED_STEPS)
        self.evaluate_seconds = evaluate_seconds  # the last one's, unless it had to compile
        self.save_seconds = 0.0  # until the last checkpoint was on the disk
        self.stall_seconds = 0.0  # that it held up training

    def note_step(self, step: int, seconds: float) -> None:
        """What a step (from 1) took; a smaller one counts as what a full one would have taken."""
        sizes = self.config.step_sizes()
        self.step_seconds.append(seconds * sizes.windows / sizes.of(step - 1))

    def steps_left(self, used_seconds: float, step: int = 0) -> float:
        """Steps that fit after `used_seconds` of the budget, `step` of them done since the start.

        UNKNOWN_STEPS without a budget.
        """
        budget = self.config.schedule.budget_hours
        if budget is None or not self.step_seconds:
            return UNKNOWN_STEPS
        each = statistics.median(self.step_seconds)
        evaluation = self.evaluate_seconds
        if evaluation is None:  # forward is a third of a step
            evaluation = each * self.config.evaluate.num_tokens
            evaluation /= 3 * self.config.batch.tokens_per_step
        left = budget * 3600 * (1 - SPARE_FRACTION) - SPARE_SECONDS - used_seconds
        left -= evaluation + self.save_seconds  # the last ones
        each += evaluation / self.config.evaluate.every_steps
        each += self.stall_seconds / self.config.checkpoint.every_steps
        sizes = self.config.step_sizes()
        return min(UNKNOWN_STEPS, sizes.steps(step, sizes.windows * max(0.0, left / each)))
