"""Tokens/s, MFU, metrics.jsonl, what the terminal shows.

Before: loop.py. After: people, and programs that read metrics.jsonl.

metrics.jsonl has one object a line: `kind` (start, step, evaluate, sample, checkpoint, decay, skip,
out_of_memory, stop), and always `step`, `tokens`, `seconds` (of training, over all starts).
"""

import contextlib
import json
import math
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.files import write_whole

METRICS_FILE = "metrics.jsonl"
ALWAYS = {"kind": str, "step": int, "tokens": int, "seconds": int | float}

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


def hardware(device: torch.device, world_size: int) -> str:
    if device.type == "cuda":
        return f"{world_size}x {torch.cuda.get_device_name(device)}"
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    return f"CPU ({os.cpu_count()} cores, {platform.machine()}), {processes}"


def say(text: str) -> None:
    """Print a line. A terminal that is gone or a log on a full disk ends no training."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # nor does what is left in the buffer, at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass


class Metrics:
    """Appends to metrics.jsonl and keeps what the README needs. Does nothing on other ranks."""

    def __init__(self, run: Path, enabled: bool) -> None:
        self.path = run / METRICS_FILE
        self.enabled = enabled
        self.cut = False  # whether the last line may have been written in part
        self.last: dict[str, dict[str, Any]] = {}
        self.first: dict[str, dict[str, Any]] = {}

    def start(self, resume_step: int | None, tokens: int, seconds: float, **values: Any) -> None:
        """The row of a start, behind the rows up to the checkpoint: the others happen again.

        Raises OSError. Both at once, or a kill in between would lose what is to be replayed.
        """
        if not self.enabled:
            return
        rows = rows_until(self.path.parent, resume_step)
        rows.append(_row("start", resume_step or 0, tokens, seconds, values))
        write_rows(self.path.parent, rows)
        for row in rows:
            self._note(row)

    def log(self, kind: str, step: int, tokens: int, seconds: float, **values: Any) -> None:
        if not self.enabled:
            return
        row = _row(kind, step, tokens, seconds, values)
        self._note(row)
        try:
            with self.path.open("a") as file:
                file.write("\n" * self.cut + json.dumps(row) + "\n")
            self.cut = False
        except OSError as error:  # a full disk must not end a day's training
            self.cut = True
            say(f"WARNING: step {step}: not written to {self.path}: {error}")

    def _note(self, row: dict[str, Any]) -> None:
        self.last[row["kind"]] = row
        self.first.setdefault(row["kind"], row)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without damaged ones: a kill cuts the last in half."""
    rows = []
    for line in (run / METRICS_FILE).read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and all(isinstance(row.get(k), ALWAYS[k]) for k in ALWAYS):
                rows.append(row)
    return rows


def rows_until(run: Path, step: int | None) -> list[dict[str, Any]]:
    """The rows up to a step; none before the first checkpoint or where there is no file."""
    if step is None or not (run / METRICS_FILE).exists():
        return []
    return [row for row in read_metrics(run) if row["step"] <= step]


def write_rows(run: Path, rows: list[dict[str, Any]]) -> None:
    """Put `rows` in the place of metrics.jsonl, whole or not at all."""
    write_whole(run / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _row(
    kind: str, step: int, tokens: int, seconds: float, values: dict[str, Any]
) -> dict[str, Any]:
    row = {"kind": kind, "step": step, "tokens": tokens, "seconds": round(seconds, 3)}
    return row | {k: _brief(v) for k, v in values.items()}


def _brief(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def step_line(row: dict[str, Any], num_steps: int | str, eta_seconds: float) -> str:
    shares = {"mfu": row["mfu"], "of matmul": row["matmul_utilization"]}
    mfu = "".join(f"  {name} {share:5.1%}" for name, share in shares.items() if share is not None)
    return (
        f"step {row['step']:>{len(str(num_steps))}}/{num_steps}  loss {row['loss']:7.4f}  "
        f"lr {row['lr']:.2e}  norm {row['norm']:7.3f}  "
        f"{row['tokens_per_second']:>9,.0f} tok/s{mfu}  eta {duration(eta_seconds)}"
    )


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
