"""Watchers: metrics.jsonl, the terminal, RUN/README.md, trackers. They look and never steer.

Whatever happens is a row, which every watcher is called with:

    kind      start, step, skip, evaluate, sample, checkpoint, stop
    step      how many steps were done, for `step` and `skip` this one included
    tokens    that those steps have trained on
    seconds   of training, over all starts

and more by its kind. metrics.jsonl has one row a line. To add a watcher: write a class with
__call__(row), and name it in start.py.
"""

import contextlib
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from pipeline.files import own_names, write_whole
from pipeline.shards import Index
from trainer import checkpoint
from trainer.checkpoint import State
from trainer.config import Config
from trainer.schedule import Clock

METRICS_FILE = "metrics.jsonl"
ALWAYS = {"kind": str, "step": int, "tokens": int, "seconds": int | float}
PRINT_SECONDS = 1.0  # at most one step line in this time
CLOSE_SECONDS = 20.0  # longest wait for a tracker's last rows
Row = dict[str, Any]

# Dense bfloat16 tensor-core peak with float32 accumulation, in FLOP/s, by a part of the card's
# name; the first match counts. NVIDIA's datasheets (H200, H100, A100, L40S, L4) and the appendices
# of its Ada (RTX 4090 and 4080) and GA102 (RTX 3090 and 3080) architecture papers.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 4080": 97.5e12,
    "RTX 3090": 71e12,
    "RTX 3080": 59.5e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Published peak of one card, None for one that is not in the table (or a CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{part}\b(?! Ti| SUPER| Laptop| D\b)", name):
            return peak
    return None


def product_flops(device: torch.device, seconds: float = 1.0) -> float:
    """FLOP/s of 8192^3 bfloat16 products on one GPU: what it sustains once it is warm."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = a @ b
    torch.cuda.synchronize(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(20):
            torch.mm(a, b, out=out)
        torch.cuda.synchronize(device)
        count += 20
    return 2 * size**3 * count / (time.perf_counter() - started)


def hardware(device: torch.device, world_size: int) -> str:
    if device.type == "cuda":
        return f"{world_size}x {torch.cuda.get_device_name(device)}"
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    return f"CPU ({os.cpu_count()} cores, {platform.machine()}), {processes}"


def say(text: str, end: str = "\n") -> None:
    """Print a line. A terminal that is gone or a log on a full disk ends no training."""
    try:
        erase = "\r\x1b[K" if sys.stdout.isatty() else ""  # the line that renews itself
        print(f"{erase}{text}", end=end, flush=True)
    except BrokenPipeError:  # nor does the rest of the buffer, at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, UnicodeError):  # the latter: text that the terminal has no letters for
        pass


class Report:
    """Makes a row of what happened, for every watcher. Other ranks than 0 have no watchers."""

    def __init__(
        self, watchers: Sequence[Callable[[Row], None]], config: Config, clock: Clock
    ) -> None:
        self.watchers, self.clock = watchers, clock
        self.tokens_per_step = config.batch.tokens_per_step

    def __call__(self, kind: str, step: int, **values: Any) -> None:
        seconds = round(self.clock.used, 3)
        row = {"kind": kind, "step": step, "tokens": step * self.tokens_per_step}
        for watcher in self.watchers:
            watcher(row | {"seconds": seconds} | values)


class Metrics:
    """Appends to metrics.jsonl. On resume, drops rows after `step`: those steps are repeated."""

    def __init__(self, run: Path, step: int | None) -> None:
        """Raises OSError."""
        self.path = run / METRICS_FILE
        self.cut = False  # whether the last line may be incomplete
        rows = read_metrics(run) if step is not None else []
        kept = [row for row in rows if row["step"] <= (step or 0)]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def __call__(self, row: Row) -> None:
        try:
            with self.path.open("a") as file:
                file.write("\n" * self.cut + json.dumps(_brief(row)) + "\n")
            self.cut = False
        except OSError as error:  # a full disk must not end a day's training
            self.cut = True
            say(f"WARNING: step {row['step']}: not written to {self.path}: {error}")


def read_metrics(run: Path) -> list[Row]:
    """The rows of a run's metrics.jsonl, without damaged ones: a kill cuts the last in half."""
    rows, path = list[Row](), run / METRICS_FILE
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and all(isinstance(row.get(k), ALWAYS[k]) for k in ALWAYS):
                rows.append(row)
    return rows


def _brief(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _brief(each) for key, each in value.items()}
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


class Terminal:
    """Prints what a person waits for: a step line a second at most, and all else."""

    def __init__(self, config: Config, state: State, clock: Clock) -> None:
        self.config, self.state, self.clock = config, state, clock
        self.printed_at = 0.0

    def __call__(self, row: Row) -> None:
        kind, at = row["kind"], f"step {row['step']}/{self.num_steps(row['step'])}"
        if kind == "step":
            self.step(row)
        elif kind == "skip":
            say(f"{at}  loss {row['loss']}, norm {row['norm']}: not finite, update skipped")
        elif kind == "evaluate":
            bits = f"bits per byte {row['bits_per_byte']:.4f}"
            say(f"{at}  validation loss {row['loss']:.4f}  {bits}  {of_parts(row)}".rstrip())
        elif kind == "sample":
            say("  | " + re.sub(r"\s*\n\s*", "\n  | ", row["text"].strip()))
        elif kind == "checkpoint":
            say(f"{at}  checkpoint saved in {row['save_seconds']:.1f} s")

    def step(self, row: Row) -> None:
        now, stop = time.perf_counter(), self.state.plan.stop
        if now - self.printed_at < PRINT_SECONDS and row["step"] != stop:
            return None
        self.printed_at = now
        used, left = self.clock.used, self.seconds_left(row["step"])
        num_steps = self.num_steps(row["step"])
        at = f"{row['step']:>{len(num_steps)}}/{num_steps}"
        eta = f"eta {'?' if left == math.inf else duration(left)}"
        mfu = "" if row["mfu"] is None else f"  mfu {row['mfu']:5.1%}"
        speed = f"{row['tokens_per_second']:>9,.0f} tok/s{mfu}"
        loss, rate = f"loss {row['loss']:7.4f}", f"lr {row['lr']:.2e}  norm {row['norm']:7.3f}"
        if not sys.stdout.isatty():
            return say(f"step {at}  {loss}  {rate}  {speed}  {eta}")
        bar = "=" * round(12 * used / (used + left))  # by time
        line = f"[{bar:12}]  {at}  {eta}  {loss}  {speed}"
        if torch.cuda.is_available():
            line += f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        columns = shutil.get_terminal_size().columns  # now; a line that fills them would wrap
        return say(line[: columns - 1], end="")

    def num_steps(self, step: int) -> str:
        """Of the whole run; about, to tens, where the clock will end it before its plan does."""
        stop, by_clock = self.state.plan.stop, step + self.clock.steps_left(step)
        if by_clock < stop:
            return f"~{round(by_clock, -1):.0f}"
        return "?" if stop == math.inf else f"{stop:.0f}"

    def seconds_left(self, step: int) -> float:
        hours, timed = self.config.schedule.budget_hours, self.clock.steps
        by_clock = math.inf if hours is None else hours * 3600 - self.clock.used
        by_plan = (self.state.plan.stop - step) * statistics.median(timed) if timed else math.inf
        return max(0.0, min(by_clock, by_plan))


class Tracker:
    """Passes rows to a library in a process of its own (trackers.py), a step a second at most.

    Training neither waits for it nor ends with it: a row that finds the pipe full is left out.
    """

    def __init__(self, library: str, given: Row) -> None:
        self.name, self.sent_at, self.is_said = library, -math.inf, False
        file = Path(__file__).with_name("trackers.py")
        command = [sys.executable, "-P", str(file), library, json.dumps(given)]
        stdin, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        self.child = subprocess.Popen(command, stdin=stdin, start_new_session=True)
        os.close(stdin)

    def __call__(self, row: Row) -> None:
        if row["kind"] == "step" and row["seconds"] - self.sent_at < PRINT_SECONDS:
            return
        self.sent_at = row["seconds"]
        try:
            os.write(self.pipe, f"\n{json.dumps(row)}\n".encode())  # \n: the last may be cut
        except OSError as error:
            reason = "does not keep up" if isinstance(error, BlockingIOError) else "has ended"
            if not self.is_said:
                say(f"WARNING: {self.name} {reason}: rows are left out; training continues")
            self.is_said = True


def close(trackers: Sequence[Tracker]) -> None:
    """Let all libraries finish, side by side, and end those that take too long."""
    for tracker in trackers:
        os.close(tracker.pipe)
    deadline = time.monotonic() + CLOSE_SECONDS
    for tracker in trackers:
        try:
            tracker.child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            say(f"WARNING: {tracker.name} was ended: it took longer than {CLOSE_SECONDS:.0f} s")
            os.killpg(tracker.child.pid, signal.SIGKILL)


class Readme:
    """Keeps RUN/README.md, which a person reads first: what the run is and how far it is."""

    def __init__(
        self, run: Path, name: str, config: Config, index: Index, state: State, past: list[Row]
    ) -> None:
        self.run, self.name, self.config, self.index, self.state = run, name, config, index, state
        self.first: Row | None = None  # the first evaluation
        self.last: dict[str, Row] = {}  # the last row of each kind
        for row in past:
            self.note(row)

    def note(self, row: Row) -> None:
        self.last[row["kind"]] = row
        self.first = self.first or self.last.get("evaluate")

    def __call__(self, row: Row) -> None:
        self.note(row)
        if row["kind"] not in ("evaluate", "sample", "checkpoint", "stop"):
            return
        text = self.text().encode("utf-8", "replace")
        try:
            write_whole(self.run / "README.md", text, wait_for_disk=False)
        except OSError as error:  # a full disk must not end a day's training
            say(f"WARNING: README.md not written: {error}")

    def text(self) -> str:
        config, index, run, last, state = self.config, self.index, self.run, self.last, self.state
        now = max(last.values(), key=lambda row: int(row["step"]))
        evaluated, taken, stop = last.get("evaluate"), last.get("step"), state.plan.stop
        steps = f"{now['step']:,}" + ("" if stop == math.inf else f" of {stop:,.0f}")
        loss, num_tokens = _number(evaluated, "loss"), index.total("num_tokens", "train")
        at = f"{evaluated['step']:,}" if evaluated else "-"
        revision = (index.source.get("hub") or {}).get("revision")
        sample = str(last.get("sample", {}).get("text", "")).replace("\n", "\n> ")
        more = ""
        if parts := of_parts(evaluated or {}):
            more = f"- Validation loss of each part: {parts}; in all weighted by train tokens\n"
        if now["step"] < stop:
            more += "- Not complete: the same command with `--resume` continues it\n"
        if (flat := checkpoint.before_decay(run)) is not None and not state.is_before_decay:
            path = quote(str(checkpoint.checkpoint_path(run, flat)))
            more += f"""\
- To train it for longer: `--from {path}`, the last checkpoint before the learning rate fell, with
  another --out, and --set seed=2 for another order
"""
        return f"""\
# {self.name}, trained from {state.weights_from or "scratch"}

| model | time | steps | tokens | parameters | loss |
|---|---|---|---|---|---|
| {self.name} | {duration(now["seconds"])} | {steps} | {amount(now["tokens"])} \
| {amount(config.model.num_parameters())} | {loss} |

Loss is the mean over the same {config.evaluate.num_tokens:,} validation tokens, in nats a token.

![Training loss, validation loss and learning rate over tokens](curves.svg)

- Validation loss {_number(self.first, "loss")} -> {loss} at step {at}, \
{_number(evaluated, "bits_per_byte")} bits a byte; training loss {_number(taken, "loss")}
- Data: {index.source["name"]}{f" at {revision}" if revision else ""}, \
{now["tokens"] / max(1, num_tokens):.2f} epochs of {num_tokens:,} tokens
- Optimizer: {config.optimizer.describe()}
- Hardware: {last.get("start", {}).get("hardware")}; torch {torch.__version__}, {state.precision}
{more}
Files: `config.toml` (resolved), `metrics.jsonl`, `data_index.json` (of the shards),
`r50k_base.tiktoken` (vocabulary), `checkpoints/` (safetensors).

    forge-sample {quote(str(run))}
    forge-export {quote(str(run))} {quote(f"{run if run.name else run.absolute().name}-hf")}

> {sample}
"""


def of_parts(row: Row) -> str:
    """The loss of each part, if the data are a mixture."""
    names = own_names(row.get("parts", ())).items()
    return ", ".join(f"{name} {_number(row['parts'], part)}" for part, name in names)


def _number(row: Row | None, key: str) -> str:
    if row is None:
        return "-"
    value = row.get(key)  # of any type, in a damaged line
    return f"{value:.4f}" if isinstance(value, float) and math.isfinite(value) else "not finite"


def amount(count: int) -> str:
    """A count for people: 7.2 M, 1.25 B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return str(count)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
