"""forge-report: one page about one run or several, which opens without a network.

report.html is the page, as a template; its script draws the curves, which are put in as JSON. Jinja
escapes all that comes from a run.
"""

import json
import statistics
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from pipeline.errors import ForgeError, refusals
from pipeline.files import write_whole
from pipeline.shards import SPLITS
from sampler.curves import Row, Run, curves, number, read_runs, within
from sampler.lines import read_lines
from trainer.report import amount, duration

MAX_SAMPLES = 6  # of a run
FORGE_EVAL = "forge-eval MODEL... --data DIR --json > FILE"
Table = list[tuple[str, list[str]]]  # a label, and a text for each run: "-" where it is not known


def write_report(paths: Sequence[Path], out: Path, against: Path | None) -> int:
    """Write the page, whole or not at all; returns its size in bytes. Raises ForgeError."""
    if out.suffix != ".html":  # a slip must not cost a run its log
        raise ForgeError("--out is a page", where=out, fix="give it a name that ends with .html")
    runs = read_runs(paths)
    references = read_references(against) if against else []
    known = [facts(run, references) for run in runs]
    settings = rows_of([{k: str(v) for k, v in run.settings.items()} for run in runs])
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    template = files("sampler").joinpath("report.html").read_text("utf-8")
    page = environment.from_string(template).render(
        data={"runs": [curves(run) for run in runs], "references": references},
        runs=[
            {"name": run.name, "tokens": amount(run.rows[-1]["tokens"]), "samples": samples(run)}
            | {"loss": fact.get("validation loss", "-"), "time": fact["time"]}
            for run, fact in zip(runs, known, strict=True)
        ],
        notes=notes(runs, references),
        known=rows_of(known),
        differing=[row for row in settings if len(set(row[1])) > 1],
        same=[row for row in settings if len(set(row[1])) == 1],
        time=date(time.time()),
    )
    content = page.encode("utf-8", "replace")
    with refusals("write the page", out):
        write_whole(out, content, wait_for_disk=False)
    return len(content)


def read_references(path: Path) -> list[Row]:
    """The models with a loss in what `forge-eval --json` printed. ForgeError if there are none."""
    references = []
    for where, line in read_lines(path, "--against", "row"):
        try:
            row = json.loads(line)
            if "loss" not in row:  # multiple choice
                continue
            if (loss := number(row["loss"])) is None:
                raise ValueError(f"a loss of {row['loss']}")
            name = Path(row["model"]).name or row["model"]
            name += f" on {row['part']}" if "part" in row else ""  # of a mixture
            windows = int(row["num_tokens"]), int(row["context_length"])
        except (ValueError, KeyError, TypeError) as error:
            what = f"not a row of forge-eval --json: {error!r}"
            raise ForgeError(what, where=where, fix=FORGE_EVAL) from error
        references.append({"name": name, "loss": loss, "windows": windows})
    if not references:
        raise ForgeError("the file has no row with a loss", where=path, fix=FORGE_EVAL)
    return references


def notes(runs: list[Run], references: list[Row]) -> Iterable[str]:
    """What a reader must know before comparing lines."""
    keys = "evaluate.num_tokens", "model.context_length"
    measured = [(run.index.get("shards"), *map(run.settings.get, keys)) for run in runs]
    if any(each != measured[0] for each in measured):
        yield "The runs were validated on different tokens: their losses do not compare exactly."
    for num_tokens, length in sorted({row["windows"] for row in references}):
        yield (
            f"Dashed: the loss of other models, by forge-eval, on {num_tokens:,} tokens in windows "
            f"of {length:,}."
        )


def rows_of(columns: list[dict[str, str]]) -> Table:
    """All labels, in order, with the text of each column."""
    labels = dict.fromkeys(label for column in columns for label in column)
    return [(label, [column.get(label, "-") for column in columns]) for label in labels]


def samples(run: Run) -> list[tuple[str, str]]:
    """Some of the run's samples, from the first to the last, more of the early ones.

    A caption and a text each.
    """
    rows = [row for row in run.of("sample") if isinstance(row.get("text"), str)]
    losses = {row["step"]: number(row.get("loss")) for row in run.of("evaluate")}
    places = np.geomspace(1, max(1, len(rows)), MAX_SAMPLES).round().astype(int) - 1
    found = []
    for row in (rows[place] for place in np.unique(places) if rows):
        caption = f"step {row['step']:,} · {amount(row['tokens'])} tokens"
        if (loss := losses.get(row["step"])) is not None:
            caption += f" · loss {loss:.2f}"
        found.append((caption, row["text"].strip()))
    return found


def facts(run: Run, references: list[Row]) -> dict[str, str]:
    """What was measured, and on what data and machine; without what is not known."""
    now, starts, losses = run.rows[-1], run.of("start"), run.numbers("evaluate", "loss")
    start: Row = starts[-1] if starts else {}
    train, val = (number(within(run.index, "splits", s, "num_tokens")) for s in SPLITS)
    found: dict[str, str] = {}

    def say(label: str, value: Any, form: str = "") -> None:
        if value:
            found[label] = f"{value:{form}}"

    stop = run.state and number(run.state.plan.stop)
    say("steps", f"{now['step']:,}" + (f" of {stop:,.0f}" if stop else ""))
    say("tokens", now["tokens"], ",")
    say("epochs", train and now["tokens"] / train, ".2f")
    say("time", duration(now["seconds"]))
    say("checkpoints, GB", run.checkpoint_bytes / 1e9, ".2f")
    if losses:
        say("validation loss", losses[-1], ".4f")
        say("validation loss, at first", losses[0], ".4f")
        say("validation loss, lowest", min(losses), ".4f")
        say("bits per byte", [None, *run.numbers("evaluate", "bits_per_byte")][-1], ".4f")
        for row in references:
            say(f"validation loss, less {row['name']}'s", losses[-1] - row["loss"], "+.4f")
    say("training loss, median of the last 100", middle(run.numbers("step", "loss")[-100:]), ".4f")
    say("tokens per second, median", middle(run.numbers("step", "tokens_per_second")), ",.0f")
    say("MFU, median", middle(run.numbers("step", "mfu")), ".1%")
    say("time that waited for data", middle(run.numbers("step", "data_wait")), ".2%")
    peak = max(run.numbers("evaluate", "peak_memory_bytes"), default=0)
    say("peak memory of a GPU, GB", peak / 1e9, ".1f")
    say("skipped steps", len(run.of("skip")))
    say("resumed at step", ", ".join(f"{row['step']:,}" for row in starts if row["step"]))
    say("damaged lines left out", run.num_damaged)
    if starts and (begun := number(starts[0].get("started_at"))):
        say("begun", date(begun))
    say("hardware", start.get("hardware"))
    say("precision", run.state and run.state.precision)
    cut = [start.get(key) for key in ("micro_batch_size", "accumulation_steps", "world_size")]
    say("micro-batch, accumulation, ranks", all(cut) and " x ".join(map(str, cut)))
    say("parameters", run.state and run.state.model.num_parameters(), ",")
    say("weights from", run.state and run.state.weights_from)
    say("data", within(run.index, "source", "name"))
    say("revision of the data", within(run.index, "source", "hub", "revision"))
    say("training tokens", train, ",.0f")
    say("validation tokens", val, ",.0f")
    return found


def middle(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def date(seconds: float) -> str:
    """Of seconds since 1970; of a damaged line's, too."""
    return f"{datetime.fromtimestamp(min(abs(seconds), 1e11), UTC):%Y-%m-%d %H:%M} UTC"
