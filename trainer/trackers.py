"""What a report.Tracker runs in a process of its own: a library is given the rows of a run.

matplotlib draws RUN/curves.svg, which RUN/README.md shows; TensorBoard, wandb and trackio have
pages of their own. Rows come as JSON, one a line, until the input ends. A library that hangs in its
first or its last call for PATIENCE_SECONDS is ended, even if the training process is gone.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

PATIENCE_SECONDS = 120
PREFIXES = {"step": "train", "evaluate": "validation"}  # of figures, by the kind of row
CURVES = (  # axes, label, style, kind of row, key
    (0, "training loss {:.3f}", "C0-", "step", "loss"),
    (0, "validation loss {:.3f}", "C1.-", "evaluate", "loss"),
    (1, "learning rate {:.2g}", "C2-", "step", "lr"),
)
MAX_POINTS = 600  # of a curve, each the mean of its neighbours
START_FRACTION = 0.02  # of the tokens: the first losses, of 11 nats, would flatten all that follows
Row = dict[str, Any]


def rows() -> Iterator[Row]:
    signal.alarm(0)
    yield from parsed(sys.stdin.buffer)
    signal.alarm(PATIENCE_SECONDS)


def parsed(file: BinaryIO) -> Iterator[Row]:
    for line in file:
        try:
            yield json.loads(line)
        except ValueError:  # empty, or cut: the pipe or the disk was full
            continue


def draw_curves(run: str) -> None:
    """RUN/curves.svg, at each evaluation anew from all of metrics.jsonl."""
    half, whole = Path(run, "curves.svg.partial"), Path(run, "curves.svg")
    for row in rows():
        if row["kind"] == "evaluate":
            with Path(run, "metrics.jsonl").open("rb") as file:
                figure = picture(list(parsed(file)))
            with suppress(OSError):  # a full disk: README.md, written at the same time, warns
                figure.savefig(half, format="svg", metadata={"Date": None})
                half.replace(whole)


def picture(metrics: list[Row]) -> Any:
    """A matplotlib Figure: losses and learning rate over tokens, all axes linear."""
    import numpy as np
    from matplotlib import rc
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rc("svg", fonttype="none", hashsalt="curves")  # small, and the same bytes each time
    figure, shown = Figure(figsize=(9, 5), layout="constrained"), list[float]()
    axes = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for place, label, style, kind, key in CURVES:
        rows_of = (row for row in metrics if row["kind"] == kind)
        found = [(r["tokens"], r[key]) for r in rows_of if isinstance(r.get(key), float)]
        if not found:
            continue
        neighbours: list[Any] = np.array_split(np.array(found), min(len(found), MAX_POINTS))
        tokens, values = np.array([each.mean(0) for each in neighbours]).T
        axes[place].plot(tokens, values, style, label=label.format(found[-1][1]))
        if key == "loss":
            shown += values[tokens >= START_FRACTION * tokens[-1]].tolist()
    low, high = min(shown, default=0), max(shown, default=1)
    margin = 0.04 * (high - low) or 0.5
    axes[0].set(ylabel="nats a token", ylim=(low - margin, high + margin))
    axes[1].set(xlabel="tokens")
    axes[1].xaxis.set_major_formatter(EngFormatter())
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    for each in axes:
        each.grid(alpha=0.3)
    return figure


def figures(row: Row) -> dict[str, float]:
    """The numbers of a step or an evaluation, by the names of their charts."""
    prefix = PREFIXES.get(row["kind"])
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
    kept = numbers.keys() - {"step", "seconds"} if prefix else ()
    return {f"{prefix}/{key}": numbers[key] for key in sorted(kept)}


def write_events(run: str, name: str, config: Row, step: int) -> None:
    """RUN/tensorboard. What an earlier start wrote of steps after `step` no longer counts."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # tensorboardX would load all of it
    from tensorboardX import SummaryWriter

    given = {"flush_secs": 10, "filename_suffix": f".{os.getpid()}"}
    with SummaryWriter(f"{run}/tensorboard", purge_step=step + 1, **given) as writer:
        text = "".join(f"    {key} = {json.dumps(value)}\n" for key, value in config.items())
        writer.add_text("config", text, max(step, 0))
        for row in rows():
            for key, value in figures(row).items():
                writer.add_scalar(key, value, row["step"])
            if row["kind"] == "sample":
                writer.add_text("sample", "    " + row["text"].replace("\n", "\n    "), row["step"])


def send(library: str, run: str, name: str, config: Row) -> None:
    """To wandb or trackio, whose calls are the same; a resumed run has the same name."""
    module, project = importlib.import_module(library), os.environ.get("WANDB_PROJECT", "llm-forge")
    own = {"id": name, "dir": run} if library == "wandb" else {}
    begun = module.init(project=project, name=name, config=config, resume="allow", **own)
    sent = getattr(begun, "step", 0)  # wandb refuses earlier steps, which are repeated
    for row in rows():
        if row["step"] >= sent and (found := figures(row)):
            module.log(found, step=row["step"])
    module.finish()


if __name__ == "__main__":
    signal.alarm(PATIENCE_SECONDS)
    library, given = sys.argv[1], json.loads(sys.argv[2])
    try:
        if library == "matplotlib":
            draw_curves(given["run"])
        elif library == "tensorboardX":
            write_events(**given)
        else:
            send(library, given["run"], given["name"], given["config"])
    except Exception as error:
        sys.exit(f"WARNING: {library}: {type(error).__name__}: {error}")
