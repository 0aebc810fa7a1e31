"""What a run's folder says, and its figures as curves of a bounded number of points.

Only small files are read, so a copied run, one that is still training and a damaged one will do.
"""

import os
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ForgeError, refusals
from trainer import checkpoint, layouts
from trainer.config_file import read_toml
from trainer.report import METRICS_FILE, read_metrics
from trainer.run import DATA_FILE

STEPS = ("step", "skip")  # kinds of rows
FIGURES = ("loss", "lr", "norm", "tokens_per_second", "mfu")  # of a step, a curve each
AXES = ("step", "tokens", "seconds")
MAX_BINS = 1000  # of a curve; each bin has a mean, a minimum and a maximum
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """`settings` is the config by section.key; a file that cannot be read gives an empty dict."""

    name: str
    rows: list[Row]  # of metrics.jsonl
    num_damaged: int  # lines of metrics.jsonl that were left out
    settings: Row
    index: Row  # index.json of the shards
    state: checkpoint.State | None  # of the latest checkpoint
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
    """Each folder once, by the part of its path that not all share.

    ForgeError for one whose metrics.jsonl has no readable line.
    """
    folders = list({path.resolve(): None for path in paths})
    shared = os.path.commonpath([folder.parent for folder in folders])
    return [read_run(folder, str(folder.relative_to(shared))) for folder in folders]


def read_run(path: Path, name: str) -> Run:
    log = path / METRICS_FILE
    if not log.is_file():
        what = f"no run of forge-train: it has no {METRICS_FILE}"
        raise ForgeError(what, where=path, fix="give the --out of a forge-train that has begun")
    with refusals("read the run", log):
        num_lines = sum(1 for line in log.read_bytes().splitlines() if line.strip())
        found = read_metrics(path)
    rows = [row for row in found if all(number(row[axis]) is not None for axis in AXES)]
    if not rows:
        what = "the run has no readable line yet"
        raise ForgeError(what, where=log, fix="wait for its first step, or copy the run again")
    num_damaged = max(0, num_lines - len(found))  # a run may write between the two reads
    state = next(reversed(checkpoint.known_states(path)), None)
    settings, index = Row(), Row()
    with suppress(ForgeError):
        for key, value in read_toml(path / checkpoint.CONFIG_FILE).items():
            is_table = isinstance(value, dict)
            settings |= {f"{key}.{k}": v for k, v in value.items()} if is_table else {key: value}
    with suppress(ForgeError):
        index = layouts.read_json(path / DATA_FILE)
    return Run(name, rows, num_damaged, settings, index, state, checkpoint.num_bytes(path))


def curves(run: Run) -> Row:
    """The run as the page's script reads it: columns of numbers, None where there is a gap."""
    steps = run.of(*STEPS)
    width = max(1, -(-len(steps) // MAX_BINS))
    bins = [steps[first : first + width] for first in range(0, len(steps), width)]
    evaluations = [[row] for row in run.of("evaluate") if number(row.get("loss")) is not None]
    marks = [("resumed", row) for row in run.of("start") if row["step"]]
    marks += [("skipped", row) for row in run.of("skip")]
    return {
        "label": run.name,
        "steps": axes(bins) | {key: summary(key, bins) for key in FIGURES},
        "evaluations": axes(evaluations) | {"loss": summary("loss", evaluations)},
        "marks": [{"kind": kind} | {axis: row[axis] for axis in AXES} for kind, row in marks],
    }


def axes(bins: list[list[Row]]) -> Row:
    """Where each bin ends."""
    return {axis: [rows[-1][axis] for rows in bins] for axis in AXES}


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
