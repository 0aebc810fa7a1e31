"""What a run's folder says, and its figures as curves of a bounded number of points.

Only small files are read, so a copied run, one that is still training and a damaged one will do.
"""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.errors import ForgeError, refusals
from trainer import checkpoint
from trainer.config_file import read_toml
from trainer.report import METRICS_FILE, read_metrics
from trainer.run import DATA_FILE

STEPS = ("step", "skip")  # kinds of rows
FIGURES = ("loss", "lr", "norm", "tokens_per_second", "mfu")  # of a step, a curve each
AXES = ("step", "tokens", "seconds")
MAX_BINS = 1000  # of a curve; each bin has a mean, a minimum and a maximum
LABEL_LENGTH = 16
MAX_BINS_OF_ALL = 8000  # of the curves of all runs: this bounds the page's size
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """`settings` is the config by section.key; a file that cannot be read gives an empty dict."""

    name: str
    rows: list[Row]  # of metrics.jsonl, each step once
    num_damaged: int  # lines of metrics.jsonl that were left out
    settings: Row
    index: Row  # index.json of the shards
    stop: float | None  # the last step, by the plan of the latest checkpoint
    weights_from: str  # "" for random ones
    checkpoint_bytes: int  # on the disk now

    def of(self, *kinds: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] in kinds]

    def numbers(self, kind: str, key: str) -> list[float]:
        """The finite values of a figure, in order."""
        found = (number(row.get(key)) for row in self.of(kind))
        return [value for value in found if value is not None]


def number(value: Any) -> float | None:
    """A finite number; None for whatever else a damaged line may have."""
    is_finite = isinstance(value, int | float) and abs(value) < 1e300
    return float(value) if is_finite else None


def within(found: Any, *keys: str) -> Any:
    """found[key][key]...; None if there is no such value."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Each folder once. ForgeError for one whose metrics.jsonl has no readable line."""
    folders = list({path.resolve(): None for path in paths})
    return [read_run(*each) for each in zip(folders, names(folders), strict=True)]


def names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the paths as tells them apart."""
    found, length = [path.name for path in folders], 1
    while len(set(found)) < len(found):
        length += 1
        found = ["/".join(path.parts[-length:]) for path in folders]
    return found


def short_names(full: list[str]) -> list[str]:
    """Long names without the words that all begin with."""
    if max(map(len, full)) <= LABEL_LENGTH:
        return full
    words = [re.split(r"(?<=[_/ ])", name) for name in full]
    while len(full) > 1 and all(len(each) > 1 for each in words):
        if len({each[0] for each in words}) > 1:
            break
        words = [each[1:] for each in words]
    return ["".join(each) for each in words]


def read_run(path: Path, name: str) -> Run:
    log = path / METRICS_FILE
    if not log.is_file():
        what = f"no run of forge-train: it has no {METRICS_FILE}"
        raise ForgeError(what, where=path, fix="give a run's folder, or wait until it begins")
    with refusals("read the run", log):
        num_lines = sum(1 for line in log.read_bytes().splitlines() if line.strip())
        found = read_metrics(path)
    rows = rows_that_count(found)
    if not rows:
        what = "the run has no readable line yet"
        raise ForgeError(what, where=log, fix="wait for its first step, or copy the run again")
    state: Row = {}
    if saved := checkpoint.steps(path):
        state = read_json(checkpoint.checkpoint_path(path, saved[-1]) / checkpoint.STATE_FILE)
    num_damaged = max(0, num_lines - len(found))  # a run may write between the two reads
    stop = number(within(state, "plan", "stop"))
    source = str(state.get("weights_from", ""))
    settings, index = read_settings(path), read_json(path / DATA_FILE)
    return Run(name, rows, num_damaged, settings, index, stop, source, checkpoint.num_bytes(path))


def read_settings(path: Path) -> Row:
    """The values of the run's config by section.key."""
    try:
        tables = read_toml(path / checkpoint.CONFIG_FILE)
    except ForgeError:
        return {}
    found: Row = {}
    for name, value in tables.items():
        is_table = isinstance(value, dict)
        found |= {f"{name}.{key}": v for key, v in value.items()} if is_table else {name: value}
    return found


def read_json(path: Path) -> Row:
    """The object in a file; an empty one if none can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def rows_that_count(rows: Iterable[Row]) -> list[Row]:
    """Each row once, without those that a restart overwrote.

    A row tells how many steps had been done before it. Rows of later steps, which an earlier start
    wrote, were trained again.
    """
    kept: list[Row] = []
    for row in rows:
        if all(number(row[axis]) is not None for axis in AXES):
            done = row["step"] - (row["kind"] in STEPS)
            while kept and kept[-1]["step"] > done:
                kept.pop()
            kept.append(row)
    return list({(row["kind"], row["step"]): row for row in kept}.values())


def curves(run: Run, num_runs: int) -> Row:
    """The run as the page's script reads it: columns of numbers, None where there is a gap."""
    bins = in_bins(run.of(*STEPS), min(MAX_BINS, MAX_BINS_OF_ALL // num_runs))
    evaluations = [[row] for row in run.of("evaluate") if number(row.get("loss")) is not None]
    starts = [ends([row]) | {"kind": "resumed"} for row in run.of("start") if row["step"]]
    skips = [[row for row in rows if row["kind"] == "skip"] for rows in bins]
    skipped = [ends(rows) | {"kind": "skipped", "count": len(rows)} for rows in skips if rows]
    return {
        "steps": axes(bins) | {key: summary(key, bins) for key in FIGURES},
        "evaluations": axes(evaluations) | {"loss": summary("loss", evaluations)},
        "marks": starts + skipped,
    }


def in_bins(rows: list[Row], num_bins: int) -> list[list[Row]]:
    """Rows of neighbouring steps together; an empty list where steps are missing."""
    if not rows:
        return []
    steps = [row["step"] for row in rows]
    apart = statistics.median_low([b - a for a, b in pairwise(steps)] or [1])
    width = max(apart, -(-(steps[-1] - steps[0] + 1) // num_bins))
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault((row["step"] - steps[0]) // width, []).append(row)
    bins: list[list[Row]] = []
    for at, together in found.items():
        if at - 1 not in found and bins:
            bins.append([])
        bins.append(together)
    return bins


def ends(rows: list[Row]) -> Row:
    """Where the rows end on each axis."""
    return {axis: rows[-1][axis] if rows else None for axis in AXES}


def axes(bins: list[list[Row]]) -> Row:
    return {axis: [ends(rows)[axis] for rows in bins] for axis in AXES}


def summary(key: str, bins: list[list[Row]]) -> Row:
    """Mean, minimum and maximum of each bin: a short spike shows in a long run, too."""
    values = [[v for row in rows if (v := number(row.get(key))) is not None] for rows in bins]
    found = {"mean": [brief(statistics.fmean(each)) if each else None for each in values]}
    if any(len(each) > 1 for each in values):
        found["low"] = [brief(min(each)) if each else None for each in values]
        found["high"] = [brief(max(each)) if each else None for each in values]
    return found


def brief(value: float) -> float:
    return float(f"{value:.5g}")
