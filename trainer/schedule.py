"""The learning rate of each step, and when the run ends.

The rate is a pure function of the step and a Plan. Steps or tokens that end a run give its plan
before the first step. A budget of hours gives an estimate, which is revised only when a checkpoint
is written, and saved in it: so a resumed run repeats the rates, whatever the clock says.

Linear warm-up, then one of two shapes:

    cosine   half a cosine down to final_lr_fraction of the peak at the last step (Loshchilov and
             Hutter 2017, without restarts)
    wsd      warm-up, stable, decay (Hu et al. 2024): the peak, then over the last decay_fraction of
             all steps a straight line to zero (Hägele et al. 2024)
"""

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass

from trainer.config import Config

TIMED_STEPS = 64  # a step takes their median: one long pause does not change the plan
FIRST_STEPS = 24  # to be timed before a plan: the first ones after a start may be slow
SPARE_FRACTION = 0.002  # of the budget, for what nothing else accounts for
SPARE_SECONDS = 2.0  # that a process takes to end
SPARE_STEPS = 1.5  # that a plan leaves free, so that the clock rarely ends it early
HEARD_STEPS = 4  # that may still run after a vote to end: three are queued before it is heard
NEAR_FRACTION = 0.02  # of the steps: a decay that would begin within them begins at once
CUT_FACTOR = 0.02  # share of the peak at which the clock may cut a plan without a new one


@dataclass(frozen=True)
class Plan:
    """The rate is `height` of its peak up to step `start`, then falls to zero at step `stop`.

    A cosine, which falls all along, ends at `stop`.
    """

    start: float = math.inf
    stop: float = math.inf
    height: float = 1.0

    def factor(self, step: float) -> float:
        """Share of the peak at `step`, ignoring the warm-up."""
        if step <= self.start:
            return self.height
        return self.height * max(0.0, (self.stop - step) / (self.stop - self.start))


def first_plan(config: Config) -> Plan:
    """The plan before the first step; open-ended for a budget of hours."""
    stop = config.num_steps()
    return Plan() if stop is None else Plan(decay_start(config, stop), stop)


def decay_start(config: Config, stop: float) -> int:
    """The last step before the straight fall, of a run with `stop` steps."""
    if config.shape() == "cosine":
        return math.floor(stop)
    return math.floor((1 - config.schedule.decay_fraction) * stop)


def learning_rate(config: Config, plan: Plan, step: int) -> float:
    """Rate of the update that ends step `step` (from 1)."""
    schedule, peak = config.schedule, config.optimizer.peak_lr
    warmup = min(1.0, step / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if config.shape() == "wsd":
        return peak * min(warmup, plan.factor(step))
    progress = max(0, step - schedule.warmup_steps) / max(1, plan.stop - schedule.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    final = schedule.final_lr_fraction
    return peak * warmup * (final + (1 - final) * cosine)


class Clock:
    """Rank 0's watch over the budget: it plans when the run ends, and ends it when time is up."""

    def __init__(self, config: Config, began: float, used_seconds: float = 0.0) -> None:
        """`began` by time.perf_counter(); `used_seconds` of earlier starts."""
        self.config = config
        self.began = began - used_seconds
        self.steps: deque[float] = deque(maxlen=TIMED_STEPS)  # seconds
        self.evaluation: float | None = None  # seconds that the last one took
        self.save = 0.0  # seconds that the last checkpoint took
        self.has_asked = False  # for a checkpoint with a new plan

    @property
    def used(self) -> float:
        """Seconds of training, over all starts."""
        return time.perf_counter() - self.began

    def steps_left(self, step: int, saves: int = 1) -> float:
        """Steps after `step` that the budget has room for, besides a last evaluation.

        `saves` checkpoints will be written besides those of the config: the last one, say. Infinite
        without a budget, and before a step was timed.
        """
        config, hours = self.config, self.config.schedule.budget_hours
        if hours is None or not self.steps:
            return math.inf
        each, evaluation = statistics.median(self.steps), self.evaluation
        if evaluation is None:  # forward is a third of a step
            evaluation = each * config.evaluate.num_tokens / (3 * config.batch.tokens_per_step)
        left = hours * 3600 * (1 - SPARE_FRACTION) - SPARE_SECONDS - self.used
        left -= evaluation + saves * self.save
        each += evaluation / config.evaluate.every_steps + self.save / config.checkpoint.every_steps
        return max(0.0, left / each)

    def is_up(self, step: int, plan: Plan) -> bool:
        """Whether the run must end now, before its plan does; `step` is the last one queued."""
        left = self.steps_left(step)
        return left < HEARD_STEPS and step + left < plan.stop

    def wants_plan(self, step: int, plan: Plan) -> bool:
        """Whether the decay is to begin now, or would be cut short. Asks once for each plan."""
        if len(self.steps) < FIRST_STEPS or self.has_asked:
            return False
        if plan.height == 1 and step < plan.start:
            self.has_asked = self.plan_now(step, plan).start == step
        else:
            end = step + self.steps_left(step)
            self.has_asked = end < plan.stop and plan.factor(end - HEARD_STEPS) > CUT_FACTOR
        return self.has_asked

    def revise(self, step: int, plan: Plan) -> Plan:
        """plan_now(), which will be saved; allows the next request."""
        self.has_asked = False
        return self.plan_now(step, plan)

    def plan_now(self, step: int, plan: Plan) -> Plan:
        """The plan from `step` on, by what a step takes now."""
        left = self.steps_left(step, saves=2)  # this plan's own checkpoint, and the last
        if len(self.steps) < FIRST_STEPS or left == math.inf or step >= plan.stop:
            return plan
        stop = step + max(1, math.floor(left - SPARE_STEPS))
        stop = min(stop, self.config.num_steps() or stop)
        start, height = decay_start(self.config, stop), plan.factor(step)
        is_near = start - step < max(HEARD_STEPS, NEAR_FRACTION * step)
        return Plan(step if height < 1 or is_near else start, stop, height)
