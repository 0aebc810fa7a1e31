"""forge-report: one page about one run or several, which opens without a network.

report.html is the page; its script draws the curves, which are put in as JSON. Texts and tables are
put in as HTML, and all that comes from a run is escaped.
"""

import html
import json
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ForgeError, refusals
from pipeline.files import write_whole
from pipeline.shards import SPLITS
from sampler.curves import Row, Run, curves, number, read_runs, within
from sampler.lines import read_lines
from trainer.config_file import model_from_dict
from trainer.report import amount, duration

MAX_SAMPLES = 6  # of a run
NUM_COLORS = 6  # --c0 to --c5 in report.html
UNKNOWN = "-"
FORGE_EVAL = "forge-eval MODEL... --data DIR --json > FILE"
Table = list[tuple[str, list[str]]]  # a label, and a text for each run


def write_report(paths: Sequence[Path], out: Path, against: Path | None) -> int:
    """Write the page, whole or not at all; returns its size in bytes. Raises ForgeError."""
    if out.suffix != ".html":  # a slip must not cost a run its log
        raise ForgeError("--out is a page", where=out, fix="give it a name that ends with .html")
    runs = read_runs(paths)
    references = read_references(against) if against else []
    known = [facts(run, references) for run in runs]
    data = {"runs": [curves(run) for run in runs], "references": references}
    parts = {
        "TITLE": html.escape(", ".join(run.name for run in runs)),
        "CARDS": cards(runs, known),
        "NOTES": "".join(f"<p>{html.escape(note)}</p>" for note in notes(runs, references)),
        "TABLES": "".join(sections(runs, known)),
        "TIME": date(time.time()),
        "DATA": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    template = files("sampler").joinpath("report.html").read_text("utf-8")
    page = re.sub(f"@({'|'.join(parts)})@", lambda found: parts[found[1]], template)
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
    windows = {
        tuple(run.settings.get(k) for k in ("evaluate.num_tokens", "model.context_length"))
        for run in runs
    }
    data = [run.index["shards"] for run in runs if "shards" in run.index]
    if any(each != data[0] for each in data):
        yield "The runs have different data: their losses do not compare."
    elif len(windows) > 1:
        yield "The runs were validated on different windows: compare their losses roughly."
    for num_tokens, length in sorted({row["windows"] for row in references}):
        rough = ", which are not the runs' own: compare roughly"
        is_same = windows == {(num_tokens, length)}
        yield (
            f"Dashed: the loss of other models, by forge-eval, on {num_tokens:,} tokens in windows "
            f"of {length:,}{'' if is_same else rough}."
        )


# ------------------------------------------------------------------------------------------- HTML


def sections(runs: list[Run], known: list[dict[str, str]]) -> Iterable[str]:
    """The page below the charts."""
    heads = [chip(place, run) for place, run in enumerate(runs)]
    settings = rows_of([{k: str(v) for k, v in run.settings.items()} for run in runs])
    differing = [row for row in settings if len(set(row[1])) > 1]
    same = [row for row in settings if len(set(row[1])) == 1]
    if differing:
        yield "<h2>Where the configs differ</h2>"
        yield f'<div class="differs">{table(heads, differing)}</div>'
    if any(run.of("sample") for run in runs):
        lists = (sample_list(run, head) for run, head in zip(runs, heads, strict=True))
        yield f'<h2>What it wrote</h2><div class="samples">{"".join(lists)}</div>'
    yield f"<h2>Run, data, hardware</h2>{table(heads, rows_of(known))}"
    summary = "The keys that are the same in all" if len(runs) > 1 else "All keys"
    yield f"<h2>Config</h2><details><summary>{summary}</summary>{table(heads, same)}</details>"


def chip(place: int, run: Run) -> str:
    """The run's name beside its colour."""
    color = f"--c: var(--c{place % NUM_COLORS})"
    return f'<span class="run" style="{color}">{html.escape(run.name)}</span>'


def cards(runs: list[Run], known: list[dict[str, str]]) -> str:
    """What a person wants to know of each run first."""
    found = []
    for place, (run, fact) in enumerate(zip(runs, known, strict=True)):
        loss = fact.get("validation loss", UNKNOWN)
        rest = f"{amount(run.rows[-1]['tokens'])} tokens · {fact['time']}"
        small = f"<small>validation loss<br>{html.escape(rest)}</small>"
        found.append(f'<div class="card">{chip(place, run)}<b>{loss}</b>{small}</div>')
    return "".join(found)


def table(heads: list[str], rows: Table) -> str:
    """The heads are HTML, all else is text."""
    lines = ["<tr><th></th>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for label, texts in rows:
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
        lines.append(f'<tr><th scope="row">{html.escape(label)}</th>{cells}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def rows_of(columns: list[dict[str, str]]) -> Table:
    """All labels, in order, with the text of each column."""
    labels = dict.fromkeys(label for column in columns for label in column)
    return [(label, [column.get(label, UNKNOWN) for column in columns]) for label in labels]


def sample_list(run: Run, head: str) -> str:
    """Some of the run's samples, from the first to the last, more of the early ones."""
    rows = [row for row in run.of("sample") if isinstance(row.get("text"), str)]
    losses = {row["step"]: number(row.get("loss")) for row in run.of("evaluate")}
    places = np.geomspace(1, max(1, len(rows)), MAX_SAMPLES).round().astype(int) - 1
    found = []
    for row in (rows[place] for place in np.unique(places) if rows):
        caption = f"step {row['step']:,} · {amount(row['tokens'])} tokens"
        if (loss := losses.get(row["step"])) is not None:
            caption += f" · loss {loss:.2f}"
        text = html.escape(re.sub(r"\n\s*\n", "\n\n", row["text"].strip()))
        found.append(f"<figure><figcaption>{caption}</figcaption><pre>{text}</pre></figure>")
    return f"<div><h3>{head}</h3>{''.join(found)}</div>"


# ------------------------------------------------------------------------------------------ facts


def facts(run: Run, references: list[Row]) -> dict[str, str]:
    """What was measured, and on what data and machine; without what is not known."""
    now, starts, losses = run.rows[-1], run.of("start"), run.numbers("evaluate", "loss")
    start: Row = starts[-1] if starts else {}
    train, val = (number(within(run.index, "splits", s, "num_tokens")) for s in SPLITS)
    found: dict[str, str] = {}

    def say(label: str, value: Any, form: str = "") -> None:
        if value:
            found[label] = f"{value:{form}}"

    say("steps", f"{now['step']:,}" + (f" of {run.stop:,.0f}" if run.stop else ""))
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
    cut = [start.get(key) for key in ("micro_batch_size", "accumulation_steps", "world_size")]
    say("micro-batch, accumulation, ranks", all(cut) and " x ".join(map(str, cut)))
    say("parameters", num_parameters(run), ",")
    say("weights from", run.weights_from)
    say("data", within(run.index, "source", "name"))
    say("revision of the data", within(run.index, "source", "hub", "revision"))
    say("training tokens", train, ",.0f")
    say("validation tokens", val, ",.0f")
    return found


def middle(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def num_parameters(run: Run) -> int | None:
    sizes = {k.removeprefix("model."): v for k, v in run.settings.items() if k.startswith("model.")}
    try:
        return model_from_dict(sizes, run.name).num_parameters()
    except ForgeError:
        return None


def date(seconds: float) -> str:
    """Of seconds since 1970; of a damaged line's, too."""
    return f"{datetime.fromtimestamp(min(abs(seconds), 1e11), UTC):%Y-%m-%d %H:%M} UTC"
