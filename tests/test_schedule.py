"""Laws of the learning rate: where it ends when steps say so, and when the clock does."""

from dataclasses import replace
from itertools import pairwise

import pytest

from trainer import config as configs
from trainer.config import Config
from trainer.schedule import UNKNOWN_STEPS, Clock, Schedule


def wsd(**options: object) -> Config:
    base = configs.load("gpt2")
    given = {"warmup_steps": 10, "max_tokens": None, "shape": "wsd"} | options
    schedule = replace(base.schedule, **given)  # type: ignore[arg-type]
    return replace(base, schedule=schedule)


def test_the_cosine_warms_up_peaks_and_ends_where_the_config_says() -> None:
    config = configs.load("gpt2_medium")
    schedule, peak, last = Schedule(config), config.optimizer.peak_lr, config.num_steps()
    assert last is not None
    rates = [schedule.rate(step, UNKNOWN_STEPS) for step in range(1, last + 1)]
    warm = config.schedule.warmup_steps
    assert rates[0] == pytest.approx(peak / warm)
    assert max(rates) == rates[warm - 1] == peak
    assert all(a > b for a, b in zip(rates[warm - 1 :], rates[warm:], strict=False))
    assert rates[-1] == pytest.approx(0.1 * peak)
    assert schedule.is_over(last)


def test_by_steps_the_decay_is_a_straight_line_to_zero_over_its_fraction() -> None:
    config = wsd(max_steps=100, decay_fraction=0.2)
    schedule, peak = Schedule(config), config.optimizer.peak_lr
    rates = [schedule.rate(step, UNKNOWN_STEPS) for step in range(1, 101)]
    assert rates[9:80] == [peak] * 71
    assert rates[79:] == pytest.approx([peak * (1 - k / 20) for k in range(21)], abs=1e-8)
    assert schedule.is_over(100)


def simulate(config: Config, seconds_of: list[float], evaluation: float = 0.0) -> tuple:
    """Run Schedule and Clock over steps that take so long; (rates, seconds in all)."""
    schedule, clock, now, rates = Schedule(config), Clock(config), 0.0, []
    clock.evaluate_seconds = evaluation
    while not schedule.is_over(len(rates)):
        step = len(rates) + 1
        rates.append(schedule.rate(step, clock.steps_left(now, step - 1)))
        sizes = config.step_sizes()
        took = seconds_of[step - 1] * sizes.of(step - 1) / sizes.windows
        now += took
        clock.note_step(step, took)
        if step % config.evaluate.every_steps == 0:
            now += evaluation
    return rates, now + evaluation


@pytest.mark.parametrize(
    "seconds_of",
    [
        [1.0] * 9000,
        [1.0] * 2000 + [2.5] * 9000,  # the machine slows down in the middle,
        [1.0] * 3300 + [3.0] * 9000,  # or while the rate falls already,
        [1.0] * 1500 + [0.5] * 9000,  # or speeds up,
        [1.0] * 1800 + [400.0] + [1.0] * 9000,  # or stands still for a while
        [1.0] * 3400 + [100.0] + [1.0] * 9000,
    ],
)
def test_the_decay_ends_at_zero_within_one_percent_of_the_budget(seconds_of: list[float]) -> None:
    config = wsd(budget_hours=1.0)
    rates, seconds = simulate(config, seconds_of, evaluation=5.0)
    assert 0.99 * 3600 <= seconds <= 3600
    assert rates[-1] == 0
    peak = config.optimizer.peak_lr
    falling = rates[rates.index(peak) :]
    assert all(a >= b for a, b in pairwise(falling))
    assert max(a - b for a, b in pairwise(falling)) < 0.05 * peak  # no jumps


def test_a_budget_ends_a_run_whose_decay_is_less_than_a_step() -> None:
    rates, seconds = simulate(wsd(budget_hours=0.02, decay_fraction=1e-4), [1.5] * 1000)
    assert seconds <= 72
    assert rates[-1] == 0


def test_a_clock_knows_that_the_first_steps_are_smaller() -> None:
    config = wsd(budget_hours=1.0)
    config = replace(config, batch=replace(config.batch, doublings=3, doubling_steps=200))
    rates, seconds = simulate(config, [1.0] * 9000)
    assert 0.99 * 3600 <= seconds <= 3600
    assert rates[-1] == 0
    steps, decays = len(rates), len(rates) - rates.index(max(rates)) - rates.count(max(rates))
    assert steps == pytest.approx(3600 + 200 * (7 + 6 + 4) / 8, rel=0.01)
    assert decays == pytest.approx(config.schedule.decay_fraction * steps, rel=0.02)


@pytest.mark.parametrize("hours", [0.1, 0.03, 0.01])
def test_a_budget_may_end_in_the_batch_warm_up(hours: float) -> None:
    config = wsd(budget_hours=hours)
    config = replace(config, batch=replace(config.batch, doublings=3, doubling_steps=2000))
    rates, seconds = simulate(config, [1.0] * 9000)
    assert 0.9 * 3600 * hours <= seconds <= 3600 * hours
    assert rates[-1] == 0


def test_whichever_of_budget_and_steps_ends_first_sets_the_decay() -> None:
    config = wsd(budget_hours=1.0, max_steps=500)
    rates, seconds = simulate(config, [1.0] * 5000)
    assert (len(rates), seconds) == (500, 500)
    assert rates[399] > rates[400]


def test_a_replay_repeats_what_an_earlier_start_did_and_goes_on_from_there() -> None:
    config = wsd(budget_hours=1.0)
    schedule = Schedule(config)
    first = [schedule.rate(step, 3000.0 - step) for step in range(1, 2700)]
    values = []
    again = Schedule(config)
    for step in range(1, 2700):
        again.rate(step, 3000.0 - step)
        values.append(again.decayed)
    assert values[2000] == 1
    assert values[-1] < 1
    other = Schedule(config, values[2500], tuple(values[2501:]))
    slow = [other.rate(step, 600.0 + 2600 - step) for step in range(2502, 2700)]
    assert slow == first[2501:]  # whatever the clock says now
    assert other.rate(2700, 100.0) == pytest.approx(slow[-1] * 99 / 100, rel=1e-5)


def test_a_replay_that_no_longer_fits_the_budget_is_left() -> None:
    schedule = Schedule(wsd(budget_hours=1.0), 0.5, (0.5,) * 100)
    rates = [schedule.rate(step, 1010.0 - step) for step in range(1000, 1010)]
    assert rates[-1] == 0


def test_one_slow_step_after_a_resume_begins_no_decay() -> None:
    clock = Clock(wsd(budget_hours=1.0), None, (1.0, 1.0))
    before = clock.steps_left(1800.0)
    clock.note_step(1801, 5.0)
    assert clock.steps_left(1800.0) == pytest.approx(before)
    for step in (1802, 1803, 1804):  # but what is slow today soon counts
        clock.note_step(step, 5.0)
    assert clock.steps_left(1800.0) < before / 4
