"""Loss over time: what metrics.jsonl says of a run, and many runs as a table and a picture.

Before: recipe.py, which trains. After: people.

Time is that of training steps alone: the sum over metrics.jsonl of a step's tokens divided by its
tokens_per_second. Evaluations and checkpoints are not in it. Compilation is not, either: the first
step, and any other that took more than 10 times the median time per token (it compiles anew, or the
machine stalls), count as the median; excluded_seconds of results.jsonl is what that leaves out.
"""

import contextlib
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

TRAIN_LOSS_STEPS = 32  # up to an evaluation: their mean is the training loss beside it
COMPILES = 10  # times the median time per token
MISSED = 0.03  # of its planned seconds: then a run did not get the time that it was to have
PARTS = 1001  # of a run's time: the points of a curve
HIDDEN_SHARE = 0.08  # of a run's time: the steep beginning, which would flatten the picture

Row = dict[str, Any]  # a line of metrics.jsonl
Run = dict[str, Any]  # a line of results.jsonl
Groups = dict[tuple[str, float], list[Run]]  # the seeds of each (arm, planned seconds)


def training_seconds(rows: list[Row]) -> tuple[dict[int, float], float]:
    """(seconds of training from the start to each step's end, seconds that are left out)."""
    steps = [row for row in rows if row["kind"] == "step"]
    usual = statistics.median(1 / row["tokens_per_second"] for row in steps)
    ended, total, excluded, tokens = {0: 0.0}, 0.0, 0.0, 0
    for row in steps:
        took = 1 / row["tokens_per_second"]
        counted = usual if row is steps[0] or took > COMPILES * usual else took
        total += (row["tokens"] - tokens) * counted
        excluded += (row["tokens"] - tokens) * (took - counted)
        ended[row["step"]], tokens = total, row["tokens"]
    return ended, excluded


def curve_of(rows: list[Row]) -> list[Row]:
    """A point for each evaluation: seconds, step, tokens, loss, bits_per_byte, train_loss."""
    ended, _ = training_seconds(rows)
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}
    points = []
    for row in (row for row in rows if row["kind"] == "evaluate"):
        step = max(s for s in ended if s <= row["step"])
        near = [losses[s] for s in range(step - TRAIN_LOSS_STEPS + 1, step + 1) if s in losses]
        points.append(
            {"seconds": round(ended[step], 3)}
            | {key: row[key] for key in ("step", "tokens", "loss", "bits_per_byte")}
            | {"train_loss": statistics.mean(near) if near else None}
        )
    return points


def loss_at(run: Run, seconds: Any) -> Any:
    """Validation loss at a time, or an array of them: straight lines between the evaluations."""
    curve = run["curve"]
    return np.interp(seconds, [p["seconds"] for p in curve], [p["loss"] for p in curve])


def seeds_curves(runs: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """(seconds (PARTS), losses (seeds, PARTS)), at equal parts of the seeds' own times.

    These times differ a little; the seconds are their mean.
    """
    parts = np.linspace(0, 1, PARTS)
    losses = np.stack([loss_at(run, parts * run["curve"][-1]["seconds"]) for run in runs])
    return parts * mean([run["seconds"] for run in runs]), losses


def passed_at(runs: list[Run], loss: float) -> float | None:
    """Seconds after which the seeds' mean loss was first down to `loss`; None if it never was."""
    seconds, losses = seeds_curves(runs)
    means = losses.mean(0)
    (down,) = np.nonzero(means <= loss + 1e-9)
    if not len(down):
        return None
    two = slice(max(0, down[0] - 1), down[0] + 1)  # between these it is down to `loss`
    return float(np.interp(-loss, -means[two], seconds[two]))


def final(run: Run) -> float:
    return float(run["curve"][-1]["loss"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # of a file that was copied half way
            lines.append(json.loads(line))
    return lines


def check_same(run: Run, other: Run) -> None:
    """ClickException unless two runs of one arm's name are runs of one thing."""
    for key in ("config", "settings", "data"):
        if run[key] != other[key]:
            raise click.ClickException(
                f"two runs are called {run['arm']}, and their {key} differ: {run[key]} and "
                f"{other[key]}; name one arm otherwise, and keep it in another --out"
            )


def group(paths: list[Path]) -> Groups:
    """The runs of all files, in their order; a run that is in two of them counts once.

    ClickException when an arm is not the same everywhere, or the shards are not.
    """
    groups: Groups = {}
    first: dict[str, Run] = {}
    for run in (line for path in paths for line in read_lines(path) if "curve" in line):
        check_same(first.setdefault(run["arm"], run), run)
        seeds = groups.setdefault((run["arm"], run["planned_seconds"]), [])
        if run not in seeds:
            seeds.append(run)
    if len({run["data"] for run in first.values()}) > 1:
        raise click.ClickException("these runs were on different shards: they do not compare")
    return groups


def baseline_runs(groups: Groups, name: str) -> list[Run]:
    """The arm's runs of its longest plan."""
    plans = [planned for arm, planned in groups if arm == name]
    return groups[name, max(plans)] if plans else []


def mean(values: list[float]) -> float:
    return statistics.mean(values) if values else math.nan


def figure(values: list[float], digits: int = 4, spreads: bool = True) -> str:
    """The mean, with the standard deviation where there are several seeds."""
    shown = spreads and len(values) > 1
    spread = f" ± {statistics.stdev(values):,.{digits}f}" if shown else ""
    return f"{mean(values):,.{digits}f}{spread}"


# What, with how many digits, and whether the seeds' spread is shown.
COLUMNS: dict[str, tuple[Callable[[Run], float], int, bool]] = {
    "tokens/s": (lambda run: run["tokens_per_second"], 0, False),
    "M tokens": (lambda run: run["tokens"] / 1e6, 2, False),
    "epochs": (lambda run: run["epochs"], 2, False),
    "at 25 %": (lambda run: loss_at(run, 0.25 * run["seconds"]), 4, False),
    "at 50 %": (lambda run: loss_at(run, 0.50 * run["seconds"]), 4, False),
    "at 75 %": (lambda run: loss_at(run, 0.75 * run["seconds"]), 4, False),
    "final": (final, 4, True),
    "bits/byte": (lambda run: run["curve"][-1]["bits_per_byte"], 4, True),
    "gap": (lambda run: final(run) - run["curve"][-1]["train_loss"], 4, True),
}


def report(groups: Groups, baseline: str) -> None:
    """Print a table in Markdown, and what became of the baseline's final loss."""
    against = baseline_runs(groups, baseline)
    goal, its_seconds = mean([final(r) for r in against]), mean([r["seconds"] for r in against])

    def cells(runs: list[Run], seed: str) -> list[str]:
        figures = [figure([of(run) for run in runs], *how) for of, *how in COLUMNS.values()]
        passed = passed_at(runs, goal)
        last = "-" if passed is None else f"{100 * passed / its_seconds:.1f} %"
        return [runs[0]["arm"], f"{runs[0]['planned_seconds']:g} s", seed, *figures, last]

    lines = [["arm", "planned", "seed", *COLUMNS, "passed"]]
    for runs in groups.values():
        lines += [cells([run], str(run["seed"])) for run in runs]
        lines += [cells(runs, f"{len(runs)} seeds")] if len(runs) > 1 else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    for line in lines:
        padded = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo(f"| {' | '.join(padded)} |")

    runs = [run for seeds in groups.values() for run in seeds]
    machines = sorted({f"{run['hardware']}, torch {run['torch']}" for run in runs})
    click.echo(
        f"\n{'; '.join(machines)}. Losses at parts of a run's own time; gap: validation loss less "
        "training loss at the end; after ±, the seeds' standard deviation."
    )
    for run in runs:
        if abs(run["seconds"] / run["planned_seconds"] - 1) > MISSED:
            click.echo(
                f"WARNING: {run['arm']} seed {run['seed']} took {run['seconds']:.1f} s, planned "
                f"were {run['planned_seconds']:g}: its speed was not the calibrated one"
            )
    if not against:
        click.echo(f"There is no run of {baseline}: name another with --baseline.")
        return
    click.echo(
        f"passed: the part of {baseline}'s {its_seconds:.1f} s after which the loss, the mean of "
        f"the seeds', was down to {goal:.4f}, where {baseline} ended."
    )
    for (name, _), seeds in groups.items():
        if name.partition("@")[0] != baseline.partition("@")[0]:
            losses = [final(run) for run in seeds]
            share = mean([run["seconds"] for run in seeds]) / its_seconds
            verdict = "lower" if mean(losses) <= goal else "HIGHER"
            click.echo(
                f"{name}, done after {share:.1%} of that time, ends at {figure(losses)}: "
                f"{abs(goal - mean(losses)):.4f} {verdict}"
            )


def draw(groups: Groups, baseline: str, path: Path) -> None:
    """Validation loss and bits per byte over time: the seeds' mean, from the least to the most."""
    try:
        from matplotlib import pyplot
    except ImportError:
        click.echo("matplotlib is not installed: no picture; --report draws it elsewhere.")
        return
    pyplot.switch_backend("agg")
    picture, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    highest = 0.0
    for (name, planned), runs in groups.items():
        seconds, losses = seeds_curves(runs)
        label = f"{name}, {planned:g} s: {figure([final(run) for run in runs], 3)}"
        (line,) = axes.plot(seconds, losses.mean(0), label=label)
        axes.fill_between(seconds, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.2)
        highest = max(highest, losses[:, seconds >= HIDDEN_SHARE * seconds[-1]].max())
    if against := baseline_runs(groups, baseline):
        axes.axhline(mean([final(run) for run in against]), color="gray", linestyle=":")
    axes.set(xlabel="seconds of training", ylabel="validation loss (nats a token)")
    axes.set_ylim(top=highest)
    last = next(iter(groups.values()))[0]["curve"][-1]
    bits = last["bits_per_byte"] / last["loss"]  # the same tokens, so the same bytes, for all
    other = axes.secondary_yaxis("right", functions=(lambda x: x * bits, lambda x: x / bits))
    other.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path)
    pyplot.close(picture)
    click.echo(f"Curves: {path}")
