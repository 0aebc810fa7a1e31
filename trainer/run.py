"""A run's two folders: the shards that it reads, checked, and RUN/, which it writes.

Before: pipeline/shards.py's folder and an earlier run, if any. After: loop.py.

    RUN/README.md             what a person reads first
    RUN/config.toml           the resolved config
    RUN/metrics.jsonl         one object a line (metrics.py)
    RUN/data_index.json       index.json of the shards, as they were
    RUN/r50k_base.tiktoken    the vocabulary
    RUN/checkpoints/          weights and optimizer state (checkpoint.py)
    RUN/ended_at_step_N/      after an extension: the run folder as it was at its earlier end
"""

import fcntl
import itertools
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pipeline import shards
from pipeline.errors import ForgeError
from pipeline.files import write_whole
from pipeline.shards import Index
from trainer import checkpoint
from trainer.config import Config, differences, load
from trainer.metrics import (
    METRICS_FILE,
    Metrics,
    amount,
    duration,
    read_metrics,
    rows_until,
    say,
    write_rows,
)
from trainer.ranks import Ranks, gather, launch
from trainer.schedule import Schedule
from trainer.windows import Windows

CONFIG_FILE = "config.toml"
DATA_FILE = "data_index.json"
# What a run keeps for good, of its config: with another, its weights or its windows do not fit.
FIXED = ("model.", "seed:", "batch.tokens_per_step:", "batch.doubl")
ENDING_SECONDS = 5.0  # that a killed process may take to let go of its run
# What a start that was killed at once may leave: the config, which makes it a run, comes last.
BEFORE_CONFIG = {shards.VOCABULARY_FILE, DATA_FILE, METRICS_FILE}


@dataclass(frozen=True)
class Data:
    """The two splits, checked, and the bytes of each token (V,) for bits per byte."""

    index: Index
    train: Windows
    val: Windows
    vocabulary: list[bytes]


def open_data(config: Config, folder: Path) -> Data:
    """find_data(), with as much as the config asks for."""
    data = find_data(config, folder)
    check_amount(config, data)
    return data


def find_data(config: Config, folder: Path) -> Data:
    """Open and check a folder of shards. ForgeError if it is none, or of other tokens."""
    index = shards.load_index(folder)
    if index.tokenizer["vocab_size"] > config.model.vocab_size:
        raise ForgeError(
            f"the shards have {index.tokenizer['vocab_size']:,} token ids, the model "
            f"{config.model.vocab_size:,}",
            where=folder,
            fix="--set model.vocab_size=50257",
        )
    vocabulary = shards.read_vocabulary(folder / shards.VOCABULARY_FILE)
    train, val = (Windows(index, split, config.model.context_length) for split in shards.SPLITS)
    train.check()
    val.check()
    return Data(index, train, val, vocabulary)


def check_amount(config: Config, data: Data) -> None:
    """ForgeError unless there are windows for a step and for an evaluation."""
    wanted = config.evaluate.num_tokens // config.model.context_length
    needs = [
        (data.train, config.windows_per_step(), "batch.tokens_per_step"),
        (data.val, wanted, "evaluate.num_tokens"),
    ]
    for windows, wanted, key in needs:
        if windows.num_windows < wanted:
            most = windows.num_windows * config.model.context_length
            raise ForgeError(
                f"{key} asks for {wanted:,} windows, the {windows.split} split has "
                f"{windows.num_windows:,}",
                where=data.index.folder,
                fix=f"--set {key}={most} at most"
                if most
                else "tokenize more text, or with a "
                f"{'larger' if windows is data.val else 'smaller'} --val-fraction",
            )


@dataclass(frozen=True)
class Past:
    """What earlier starts left to go on from."""

    is_new: bool = False  # nothing: there was no run
    checkpoint: int | None = None  # its step
    seconds: float = 0.0  # of training so far, lost steps included
    started_at: int = field(default_factory=lambda: int(time.time()))  # of the first start
    replay: tuple[float, ...] = ()  # schedule.py's `decayed` of the steps after the checkpoint
    evaluate_seconds: float | None = None  # that the last evaluation took
    step_seconds: tuple[float, ...] = ()  # that a full step took before it
    hardware: str = ""  # that it took them on
    extends: bool = False  # what came after the checkpoint is to be set aside
    changes: tuple[str, ...] = ()  # of the config since then, for people
    by_clock: bool = False  # budget_hours was what the rate fell by


class RunLock:
    """Two trainers never write one run: a lock on RUN/, until release() or the process's end."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.descriptor: int | None = None

    def take(self) -> None:
        """ForgeError when another process has it; one that is just ending is waited for."""
        if self.descriptor is not None:
            return
        self.descriptor = os.open(self.run, os.O_RDONLY)
        deadline = time.monotonic() + ENDING_SECONDS
        while True:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self.release()
                    raise ForgeError(
                        "another forge-train is writing it",
                        where=self.run,
                        fix="let it finish, or stop it; or name another --out",
                    ) from None
                time.sleep(0.1)

    def renew(self) -> None:
        """Hold what is RUN/ now, should someone have put another folder in its place."""
        assert self.descriptor is not None
        if not os.path.samestat(os.fstat(self.descriptor), self.run.stat()):
            self.release()
            self.take()

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def open_run(config: Config, index: Index, run: Path, resume: bool, lock: RunLock) -> Past:
    """What there is to go on from. ForgeError if the run may not be made or gone on with.

    Writes nothing: what an extension sets aside, make_folder() does.
    """
    nearest = nearest_folder(run)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ForgeError("--out cannot be made or written there", where=nearest, fix="name another")
    if not run.exists() or not any(run.iterdir()):
        return Past(is_new=True)
    if not (run / CONFIG_FILE).is_file():
        others = (p for p in run.iterdir() if p.name not in BEFORE_CONFIG)
        if strange := next((p.name for p in others if p.suffix != ".partial"), None):
            raise ForgeError(
                f"--out is a folder with other things, and no run: {strange}",
                where=run,
                fix="name another, or move them",
            )
        return Past(is_new=True)
    if not (resume or is_ours(run)):
        raise ForgeError(
            "--out holds a run already",
            where=run,
            fix="add --resume to go on, or name another --out",
        )
    before = load(str(run / CONFIG_FILE))
    changes = differences(before, config)
    if fixed := [change for change in changes if change.startswith(FIXED)]:
        raise ForgeError(
            f"the run was made with another model or order of the text: {', '.join(fixed)}",
            where=run / CONFIG_FILE,
            fix="use the same config, or start a new run with another --out",
        )
    ours = index.folder / shards.INDEX_FILE
    if (run / DATA_FILE).exists() and (run / DATA_FILE).read_bytes() != ours.read_bytes():
        raise ForgeError(
            "the run was trained on other shards: the index is another",
            where=index.folder,
            fix="give the folder that it was trained on, or start a new run",
        )
    lock.take()
    found = checkpoint.steps(run)
    check_checkpoints(run, found)
    last = checkpoint.read_state(run, found[-1]) if found else None
    extends = last is not None and last.decayed < 1 and _is_longer(config, before, last)
    by_clock = last is not None and falls_by_clock(before, last.step, last.decayed)
    if extends:
        last = before_decay(run)
        check_one_disk(run)
    hours, clocked = before.schedule.budget_hours, config.schedule.budget_hours is not None
    problem = ""
    if last is not None and 0 < last.decayed < 1 and by_clock and not clocked:
        problem = "the learning rate was falling by the clock, and the config has no clock now"
    elif last is not None and last.decayed and config.shape() != before.shape():
        problem = f"the run's schedule.shape is {before.shape()}, the config's {config.shape()}"
    if problem:
        raise ForgeError(
            problem,
            where=run / CONFIG_FILE,
            fix=f"--set schedule.budget_hours={hours}, as before, or more"
            if hours and config.schedule.shape != "cosine"
            else "use the same schedule, or start a new run with another --out",
        )
    past = read_past(run, config, last, config.schedule == before.schedule, extends)
    if last is not None and config.shape() == "cosine":
        was, now = (Schedule(c).rate(last.step + 1, math.inf) for c in (before, config))
        if now > was:
            changes.append(f"learning rate of step {last.step + 1:,}: {was:.2e} -> {now:.2e}")
    return replace(past, changes=tuple(changes), by_clock=by_clock)


def check_checkpoints(run: Path, found: list[int]) -> None:
    """ForgeError when checkpoints that were written are not there: to begin anew loses the run."""
    folder = run / checkpoint.FOLDER
    try:
        any(folder.iterdir())
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ForgeError(
            f"cannot read the checkpoints: {error.strerror}", where=folder, fix="give access to it"
        ) from error
    saved = [row["step"] for row in _rows(run) if row["kind"] == "checkpoint"]
    if saved and not found:
        raise ForgeError(
            f"the checkpoints are gone: {METRICS_FILE} tells of one at step {saved[-1]:,}",
            where=folder,
            fix="bring the folder back; or begin anew with another --out",
        )


def nearest_folder(run: Path) -> Path:
    """RUN/, or what there is already of the way to it."""
    return next(path for path in (run, *run.absolute().parents) if path.exists())


def is_ours(run: Path) -> bool:
    """Whether the run was begun by the very torchrun that now starts its processes again."""
    starts = [row for row in _rows(run) if row["kind"] == "start"]
    return bool(starts) and launch() is not None and starts[-1].get("launch") == launch()


def _rows(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run) if (run / METRICS_FILE).exists() else []


def check_same_shards(data: Data, ranks: Ranks) -> None:
    """ForgeError unless all ranks' folders have the same index.json."""
    hashes = gather(ranks, data.index.sha256)
    differing = [str(rank) for rank, found in enumerate(hashes) if found != hashes[0]]
    if differing:
        raise ForgeError(
            f"the shards of rank {', '.join(differing)} are not those of rank 0: another index",
            where=f"{data.index.folder / shards.INDEX_FILE} on each machine",
            fix="copy one folder of shards to all machines",
        )


def check_same_folder(run: Path, ranks: Ranks) -> None:
    """ForgeError when another machine holds the run, and rank 0's does not.

    torchrun may number the machines anew at each start.
    """
    seen = gather(ranks, (run / CONFIG_FILE).is_file())
    if any(seen) and not seen[0]:
        raise ForgeError(
            f"the run is on the machine of rank {seen.index(True)}, not on that of rank 0",
            where=run,
            fix="copy it to rank 0's machine, or take a folder that all machines share",
        )


def read_past(
    run: Path,
    config: Config,
    last: checkpoint.State | None,
    replay: bool,
    extends: bool = False,
) -> Past:
    """From metrics.jsonl: what happened up to the checkpoint `last`, and after it."""
    step, seconds = (last.step, last.seconds) if last else (0, 0.0)
    rows = rows_until(run, step) if extends else _rows(run)
    timed = (r for r in rows if r["kind"] == "step" and r["step"] <= step)
    speeds = [row["tokens_per_second"] for row in timed if row.get("tokens_per_second")]
    each = statistics.median(config.batch.tokens_per_step / speed for speed in speeds[-64:] or [1])
    decayed: dict[int, float] = {}
    for row in rows:
        if row["kind"] == "start":  # with another schedule it has not repeated what was known
            decayed = {at: value for at, value in decayed.items() if at <= row["step"]}
        for number, value in enumerate(row.get("replay", ()), row["step"] + 1):
            decayed[number] = value
        if row.get("decayed") is not None:
            decayed[row["step"]] = row["decayed"]
    following: list[float] = []
    while replay and step + 1 + len(following) in decayed:
        following.append(decayed[step + 1 + len(following)])
    return Past(
        checkpoint=last.step if last else None,
        seconds=max(seconds, rows[-1]["seconds"]) if rows else seconds,
        started_at=next((r["started_at"] for r in rows if "started_at" in r), int(time.time())),
        replay=tuple(following),
        evaluate_seconds=next(
            (
                r["evaluate_seconds"]
                for r in reversed(rows)
                if r.get("evaluate_seconds") and r["step"]
            ),
            None,
        ),
        # Two, so that a single slow step is not the median, and the speed of today soon is.
        step_seconds=(each, each) if speeds else (),
        hardware=next((r["hardware"] for r in reversed(rows) if "hardware" in r), ""),
        extends=extends,
    )


def _is_longer(config: Config, before: Config, last: checkpoint.State) -> bool:
    """Whether `config` lets a run go on for longer than `before`, which let it come to `last`.

    What counts is the limit by which the rate was falling; the other may not be lower. To leave
    that out does not make a run longer: it may have been forgotten.
    """
    old_hours, old_steps = before.schedule.budget_hours or 0, before.num_steps() or 0
    hours, steps = config.schedule.budget_hours or old_hours, config.num_steps() or old_steps
    by_clock = falls_by_clock(before, last.step, last.decayed)
    grows = hours > old_hours if by_clock else steps > old_steps
    return grows and hours >= old_hours and steps >= old_steps


def falls_by_clock(config: Config, step: int, decayed: float) -> bool:
    """Whether the rate falls by the clock, not by the number of steps, `decayed` after `step`."""
    num_steps = config.num_steps()
    if config.schedule.budget_hours is None or num_steps is None:
        return num_steps is None
    # By the clock it is lower, at any step, than by the number of steps: up to rounding.
    decay_steps = config.schedule.decay_fraction * num_steps
    return decayed < (num_steps - step - 2) / decay_steps


def before_decay(run: Path) -> checkpoint.State:
    """The last checkpoint before the decay began; ForgeError if there is none."""
    states = [checkpoint.read_state(run, step) for step in checkpoint.steps(run)]
    flat = [state for state in states if state.decayed == 1]
    if not flat:
        raise ForgeError(
            "no checkpoint from before the decay is left to extend the run from",
            where=run / checkpoint.FOLDER,
            fix="start a new run with the longer schedule",
        )
    return flat[-1]


def set_aside_decay(run: Path) -> checkpoint.State:
    """Go back to the last checkpoint before the decay; returns its state.

    What came after it moves to RUN/ended_at_step_N/, which is a run folder of its own.
    """
    flat, steps = before_decay(run), checkpoint.steps(run)
    end = f"ended_at_step_{steps[-1]:08d}"
    asides = (run / (f"{end}_{n}" if n > 1 else end) for n in itertools.count(1))
    aside = next(
        each for each in asides if not checkpoint.checkpoint_path(each, steps[-1]).exists()
    )
    names = (CONFIG_FILE, DATA_FILE, shards.VOCABULARY_FILE, METRICS_FILE, "README.md")
    with writing():
        (aside / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
        for name in names:
            if (run / name).exists() and not (aside / name).exists():
                write_whole(aside / name, (run / name).read_bytes())
        write_rows(run, rows_until(run, flat.step))  # its seconds are not those of the decay
        # The last one last: killed before that, the next start finds the same end and goes on.
        for step in steps:
            if step > flat.step:
                path = checkpoint.checkpoint_path(run, step)
                path.rename(aside / checkpoint.FOLDER / path.name)
    return flat


def check_one_disk(run: Path) -> None:
    """ForgeError unless RUN/checkpoints is on RUN's disk: what an extension sets aside is moved."""
    folder = run / checkpoint.FOLDER
    if folder.stat().st_dev != run.stat().st_dev:
        raise ForgeError(
            "a finished run is extended on one disk only, and its checkpoints are on another",
            where=folder.resolve(),
            fix=f"put the folder itself in the place of the link {folder}, or start a new run",
        )


@contextmanager
def writing() -> Iterator[None]:
    """ForgeError when the run folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise ForgeError(
            f"cannot write the run folder: {error.strerror}",
            where=error.filename,
            fix="name another --out, or make it writable",
        ) from error


def make_folder(
    run: Path,
    past: Past,
    lock: RunLock,
    start_metrics: Callable[[], None],
    files: dict[str, bytes],
) -> None:
    """Make RUN/ with everything that is known before the first step, and hold it.

    An extension sets aside what came after the decay began: not before all else is found to be
    good. The config comes last: where it is, the row of this start is, too. Raises ForgeError when
    it cannot be done, or when another start has made a run there meanwhile.
    """
    with writing():
        run.mkdir(parents=True, exist_ok=True)
        lock.take()
        if past.is_new and (run / CONFIG_FILE).exists():
            raise ForgeError(
                "another start has made a run there just now",
                where=run,
                fix="the same command with --resume goes on with it; or name another --out",
            )
        if past.extends:
            set_aside_decay(run)
        for left in run.glob("*.partial"):  # of a start that was killed
            left.unlink(missing_ok=True)
        start_metrics()
        for name, content in files.items():
            write_whole(run / name, content)


def run_files(config: Config, index: Index, found: str) -> dict[str, bytes]:
    """What RUN/ has beside checkpoints and metrics, by name; the config last.

    `found` says, above the config, what was chosen on this machine.
    """
    return {
        shards.VOCABULARY_FILE: (index.folder / shards.VOCABULARY_FILE).read_bytes(),
        DATA_FILE: (index.folder / shards.INDEX_FILE).read_bytes(),
        CONFIG_FILE: (found + config.to_toml()).encode(),
    }


def check_room(run: Path, num_bytes: int, keep_last: int) -> None:
    """ForgeError unless the last checkpoints and one being written, of so many bytes each, fit.

    What RUN/ has of them already makes room for the next ones.
    """
    needed = (keep_last + 1) * num_bytes
    needed -= sum(p.stat().st_size for p in (run / checkpoint.FOLDER).rglob("*") if p.is_file())
    free = shutil.disk_usage(nearest_folder(run / checkpoint.FOLDER)).free
    if free < needed:
        raise ForgeError(
            f"the disk has {free / 1e9:.2f} GB left, and checkpoints take {needed / 1e9:.2f} more",
            where=run,
            fix="make room, or lower checkpoint.keep_last",
        )


def write_readme(
    run: Path, config: Config, name: str, index: Index, metrics: Metrics, device: str
) -> None:
    """The page that a person reads first: what this run is and how far it came."""
    if not metrics.enabled:
        return
    step = metrics.last.get("step", {"step": 0, "tokens": 0, "seconds": 0.0, "loss": None})
    evaluated, first = metrics.last.get("evaluate"), metrics.first.get("evaluate")

    def number(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.4f}"

    loss = number(evaluated["loss"]) if evaluated else "-"
    train_loss = number(step["loss"]) if step["step"] else "-"
    num_steps = config.num_steps()
    by_steps = num_steps is not None and config.schedule.budget_hours is None
    of = f" of {num_steps:,}" if by_steps else ""
    epochs = step["tokens"] / max(1, index.total("num_tokens", "train"))
    lines = [
        f"# {name}, trained from scratch",
        "",
        "| model | time | steps | tokens | parameters | loss |",
        "|---|---|---|---|---|---|",
        f"| {name} | {duration(step['seconds'])} | {step['step']:,}{of} | "
        f"{amount(step['tokens'])} | {amount(config.model.num_parameters())} | {loss} |",
        "",
        "Loss is the mean over the fixed validation tokens, in nats a token.",
        "",
    ]
    if evaluated and first and evaluated["step"] > first["step"]:
        lines.append(
            f"- Validation loss {number(first['loss'])} -> {loss}, "
            f"{number(evaluated['bits_per_byte'])} bits a byte; training loss {train_loss}"
        )
    revision = (index.source.get("hub") or {}).get("revision")
    sample = metrics.last.get("sample")
    lines += [
        f"- Data: {index.source['name']}"
        + (f" at {revision}" if revision else "")
        + f", {epochs:.2f} epochs of {index.total('num_tokens', 'train'):,} training tokens",
        f"- Optimizer: {config.optimizer.describe()}",
        f"- Hardware: {device}; torch {torch.__version__}",
        "",
        "Files: `config.toml` (resolved), `metrics.jsonl`, `r50k_base.tiktoken` (vocabulary), "
        "`checkpoints/` (safetensors).",
        "",
        f"    forge-sample {run}",
        f"    forge-export {run} {run if run.name else run.absolute().name}-hf",
    ]
    if sample:
        lines += [
            "",
            "A sample at the last evaluation:",
            "",
            "> " + sample["text"].replace("\n", "\n> "),
        ]
    try:
        write_whole(run / "README.md", ("\n".join(lines) + "\n").encode("utf-8", "replace"))
    except OSError as error:  # a full disk must not end a day's training
        say(f"WARNING: {run / 'README.md'} not written: {error}")
