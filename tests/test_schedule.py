"""Laws of the learning rate: where it ends when steps say so, and when the clock does."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer import config_file, schedule, train
from trainer import step as step_module
from trainer.checkpoint import State
from trainer.config import Config
from trainer.ranks import Ranks
from trainer.schedule import Clock, Plan, first_plan, learning_rate
from trainer.step import Inbox, Moment, StepResult, Votes


def wsd(**options: object) -> Config:
    base = config_file.load("gpt2")
    given = {"warmup_steps": 10, "max_tokens": None, "shape": "wsd"} | options
    return replace(base, schedule=replace(base.schedule, **given))  # type: ignore[arg-type]


def test_the_cosine_warms_up_peaks_and_ends_where_the_config_says() -> None:
    config = config_file.load("gpt2_medium")
    plan, peak, last = first_plan(config), config.optimizer.peak_lr, config.num_steps()
    assert plan.stop == last
    rates = [learning_rate(config, plan, step) for step in range(1, last + 1)]
    warm = config.schedule.warmup_steps
    assert rates[0] == pytest.approx(peak / warm)
    assert max(rates) == rates[warm - 1] == peak
    assert all(a > b for a, b in pairwise(rates[warm - 1 :]))
    assert rates[-1] == pytest.approx(0.1 * peak)


def test_by_steps_the_decay_is_a_straight_line_to_zero_over_its_fraction() -> None:
    config = wsd(max_steps=100, decay_fraction=0.2)
    plan, peak = first_plan(config), config.optimizer.peak_lr
    assert (plan.start, plan.stop) == (80, 100)
    rates = [learning_rate(config, plan, step) for step in range(1, 101)]
    assert rates[9:80] == [peak] * 71
    assert rates[79:] == pytest.approx([peak * (1 - k / 20) for k in range(21)], abs=1e-8)


# ------------------------------------------------------------ the loop itself, with planned seconds


class Day:
    """time.perf_counter() of a machine whose steps take what a test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class LateInbox(Inbox):
    """As on a GPU: a step's figures come when the next step has been queued."""

    def push(self, step: int, lr: float, figures: Tensor) -> list[StepResult]:
        before = self.flush()
        self.waiting = [(step, lr, figures, Moment(self.device))]
        return before


@pytest.fixture(params=[Inbox, LateInbox], ids=["cpu", "gpu"])
def simulate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(
        config: Config,
        seconds_of: list[float],
        evaluation: float,
        save: float,
        state: State | None = None,
    ) -> Any:
        day, rates, saves = Day(), [], []
        monkeypatch.setattr(schedule, "time", day)
        monkeypatch.setattr(step_module, "time", day)
        monkeypatch.setattr(train, "Inbox", request.param)
        state = state or State(config.model, "float32", "", {}, first_plan(config))
        clock = Clock(config, 0.0, state.seconds)

        def step(setup: object, lr: float, votes: Votes) -> Tensor:
            day.now += seconds_of[len(rates)]
            rates.append(lr)
            return torch.tensor([3.0, *map(float, votes), 1.0])

        def evaluates(*_: object) -> bool:
            day.now += evaluation
            clock.evaluation = evaluation
            return True

        def saved(setup: object, state: State, *_: object) -> None:
            day.now += save
            clock.save = save
            saves.append(state.step)

        monkeypatch.setattr(train, "train_step", step)
        monkeypatch.setattr(train, "evaluate", evaluates)
        monkeypatch.setattr(train, "save", saved)
        monkeypatch.setattr(train, "speeds", lambda *_: {})
        setup = SimpleNamespace(config=config, ranks=Ranks(), device=torch.device("cpu"))
        signals = SimpleNamespace(stop="", take_save=lambda: False)
        train.run_steps(setup, state, clock, signals, lambda *_, **__: None, None)  # type: ignore[arg-type]
        return SimpleNamespace(rates=rates, seconds=clock.used, saves=saves, plan=state.plan)

    return run


@pytest.mark.parametrize("decay_fraction", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    "seconds_of",
    [
        [1.0] * 9000,
        [1.0] * 2000 + [1.1] * 9000,  # the machine slows down in the middle,
        [1.0] * 3300 + [1.1] * 9000,  # or while the rate falls already,
        [1.0 + step / 36_000 for step in range(9000)],  # or bit by bit,
        [1.0] * 1500 + [0.9] * 9000,  # or speeds up,
        [1.0] * 1700 + [150.0] + [1.0] * 9000,  # or stands still for a while
        [1.0] * 3000 + [150.0] + [1.0] * 9000,
        [18.0] * 9000,  # 200 steps
        [17.0] * 150 + [18.7] * 9000,
        [17.0 + step / 140 for step in range(9000)],
    ],
)
def test_a_budget_is_kept_and_ends_at_two_percent_of_the_peak_or_less(
    seconds_of: list[float], decay_fraction: float, simulate: Any
) -> None:
    config = wsd(budget_hours=1.0, decay_fraction=decay_fraction)
    done = simulate(config, seconds_of, evaluation=4.0, save=1.0)
    peak = config.optimizer.peak_lr
    assert 0.97 * 3600 <= done.seconds <= 3600
    assert done.rates[-1] <= 0.02 * peak
    falling = done.rates[done.rates.index(max(done.rates)) :]
    assert all(a >= b for a, b in pairwise(falling))
    assert len(done.saves) < 25


def test_one_slow_evaluation_does_not_end_a_run(simulate: Any) -> None:
    """At a checkpoint, and longer than all the steps between two evaluations."""
    config = wsd(budget_hours=0.1)
    often = replace(config.evaluate, every_steps=4), replace(config.checkpoint, every_steps=4)
    config = replace(config, evaluate=often[0], checkpoint=often[1])
    done = simulate(config, [0.25] * 9000, evaluation=1.6, save=0.05)
    assert 0.95 * 360 < done.seconds <= 360
    assert done.rates[-1] <= 0.02 * config.optimizer.peak_lr


def test_slow_steps_after_a_resume_begin_no_decay_and_end_no_run(simulate: Any) -> None:
    """A cold page cache, say; with a signal to save among them."""
    config = wsd(budget_hours=1.0, decay_fraction=0.5)
    slow = [10.0] * 8 + [1.0] * 9000
    flat = State(config.model, "float32", "", {}, Plan(), 1200, 0, 1210.0)
    done = simulate(config, slow, 4.0, 1.0, flat)
    falls = next(n for n, (a, b) in enumerate(pairwise(done.rates), 1) if b < a)
    assert 400 < falls < 650  # it is to begin at step 1,780 or so
    falling = State(config.model, "float32", "", {}, Plan(1750, 3500), 2398, 0, 2430.0)
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=600))
    done = simulate(config, slow, 4.0, 1.0, falling)  # a checkpoint after two steps
    assert 3500 < done.seconds <= 3600
    assert done.rates[-1] <= 0.02 * config.optimizer.peak_lr


@pytest.mark.parametrize(("hours", "each", "save"), [(0.1, 0.763, 5.0), (0.25, 0.763, 5.0)])
def test_plans_are_not_late_by_their_own_checkpoints(
    hours: float, each: float, save: float, simulate: Any
) -> None:
    """One of 4.3 GB takes several steps of a small budget."""
    noise = [each * (1 + 0.02 * (step * 7 % 11 - 5)) for step in range(9000)]
    config = wsd(budget_hours=hours, decay_fraction=0.5)
    done = simulate(config, noise, evaluation=2.0, save=save)
    assert done.seconds <= hours * 3600
    assert done.rates[-1] <= 0.02 * config.optimizer.peak_lr
    assert len(done.saves) * save < 0.1 * done.seconds


def test_the_last_checkpoint_before_the_decay_is_where_the_rate_is_still_high(
    simulate: Any,
) -> None:
    for config in (wsd(max_steps=100), wsd(budget_hours=0.1)):
        done = simulate(config, [1.0] * 999, evaluation=1.0, save=1.0)
        first_fall = next(n for n, (a, b) in enumerate(pairwise(done.rates), 1) if b < a)
        assert first_fall in done.saves  # steps count from 1: the rate falls in the one after


def test_time_that_is_up_ends_a_run_at_once(simulate: Any) -> None:
    """Too few steps for a plan; and a machine that becomes ten times slower at the end."""
    done = simulate(wsd(budget_hours=0.01), [3.0] * 99, evaluation=1.0, save=1.0)
    assert done.seconds <= 36
    assert len(done.rates) >= 5
    slow = simulate(wsd(budget_hours=1.0), [1.0] * 3550 + [10.0] * 99, evaluation=4.0, save=1.0)
    assert slow.seconds <= 3600
    assert slow.plan.stop == len(slow.rates)


def test_whichever_of_budget_and_steps_ends_first_sets_the_decay(simulate: Any) -> None:
    by_steps = simulate(wsd(budget_hours=1.0, max_steps=200), [1.0] * 999, 1.0, 1.0)
    assert len(by_steps.rates) == 200
    by_clock = simulate(wsd(budget_hours=0.1, max_steps=20_000), [1.0] * 999, 1.0, 1.0)
    for done in (by_steps, by_clock):
        assert done.rates[-1] == 0
        falls = sum(b < a for a, b in pairwise(done.rates))
        assert falls == pytest.approx(0.2 * len(done.rates), rel=0.1)


def test_a_plan_is_all_that_a_rate_needs() -> None:
    config, plan = wsd(budget_hours=1.0), Plan(100, 200, 0.5)
    rates = [learning_rate(config, plan, step) for step in (100, 150, 200)]
    assert rates == pytest.approx([0.5 * 6e-4, 0.25 * 6e-4, 0.0])
