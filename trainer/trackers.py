"""What a report.Tracker runs in a process of its own: TensorBoard, wandb or trackio is given rows.

Rows come as JSON, one a line, until the input ends. A library that hangs in its first or its last
call for PATIENCE_SECONDS is ended, even if the training process is gone.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

PATIENCE_SECONDS = 120
PREFIXES = {"step": "train", "evaluate": "validation"}  # of figures, by the kind of row
Row = dict[str, Any]


def rows() -> Iterator[Row]:
    signal.alarm(0)
    for line in sys.stdin.buffer:
        try:
            yield json.loads(line)
        except ValueError:  # empty, or cut because the pipe was full
            continue
    signal.alarm(PATIENCE_SECONDS)


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
        if library == "tensorboardX":
            write_events(**given)
        else:
            send(library, given["run"], given["name"], given["config"])
    except Exception as error:
        sys.exit(f"WARNING: {library}: {type(error).__name__}: {error}")
