"""The run folder: whether a run may be made there or continued, and the files beside checkpoints.

RUN/README.md             what a person reads first
RUN/curves.svg            its picture (trackers.py)
RUN/config.toml           the resolved config
RUN/metrics.jsonl         one object a line (report.py)
RUN/data_index.json       index.json of the shards, as they were
RUN/r50k_base.tiktoken    the vocabulary
RUN/tensorboard/          event files, where tensorboardX is installed (trackers.py)
RUN/checkpoints/          weights and optimizer state (checkpoint.py)
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import chatml, shards
from pipeline.errors import ForgeError, refusals
from pipeline.files import write_whole
from pipeline.shards import Index
from trainer import checkpoint, layouts
from trainer.checkpoint import CONFIG_FILE, State
from trainer.config import Config
from trainer.config_file import differences, flat, to_toml
from trainer.ranks import Ranks, on_all
from trainer.report import METRICS_FILE, read_metrics, say

DATA_FILE = "data_index.json"
# Keys that cannot change: weights, windows and plan depend on them.
FIXED = ("--from:", "model.", "schedule.", "seed:", "precision:", "batch.tokens_per_step:")
# What a start that was killed at once may leave: the config, which makes it a run, comes last.
BEFORE_CONFIG = {shards.VOCABULARY_FILE, DATA_FILE, METRICS_FILE}


@dataclass(frozen=True)
class Command:
    """What the user asked for."""

    config: Config
    name: str  # of the config
    data: Path
    run: Path
    resume: bool = False
    weights_from: Path | None = None  # a run, a checkpoint, a folder of transformers


def knows_chat(folder: Path) -> bool:
    """Whether a run, or a folder in transformers' layout that we exported, was trained on chat."""
    for name, key in ((DATA_FILE, "chat"), (layouts.TOKENIZER_FILE, "chat_template")):
        if (folder / name).is_file() and (found := layouts.read_json(folder / name).get(key)):
            return found == chatml.TEMPLATE or name == DATA_FILE
    return False


def open_run(command: Command, index: Index) -> State | None:
    """Where the run stands; None for a new one. ForgeError if neither may be. Writes nothing."""
    run, source = command.run, command.weights_from
    if not (run / CONFIG_FILE).is_file():
        steps = checkpoint.steps(run)  # a start with --from saves the weights first
        is_begun = not steps or (steps == [0] and source is not None)
        left = BEFORE_CONFIG | ({checkpoint.FOLDER} if is_begun else set())
        others = (p for p in run.iterdir() if p.name not in left)
        if strange := next((p.name for p in others if p.suffix != ".partial"), None):
            what = f"--out contains other files and no run: {strange}"
            raise ForgeError(what, where=run, fix="name another, or move them")
        return None
    if not command.resume:
        fix = "add --resume to continue it, or name another --out"
        raise ForgeError("--out holds a run already", where=run, fix=fix)
    found = checkpoint.steps(run)
    if not found:
        if any(row["kind"] == "checkpoint" for row in read_metrics(run)):
            what = f"the checkpoints are gone: {METRICS_FILE} lists some"
            fix = "bring the folder back, or begin anew with another --out"
            raise ForgeError(what, where=run / checkpoint.FOLDER, fix=fix)
        return None
    state = checkpoint.load_state(run, found[-1], ())
    anew = f"start a new run from its weights: --from {run} --out ANOTHER"
    if not state.config:
        what = "an earlier version of forge-train made this run, and only that can resume it"
        raise ForgeError(what, where=run, fix=anew)
    checkpoint.load_state(run, found[-1])  # its tensors are whole, too
    with refusals("compare the shards with the run's", run, f"bring that file back, or {anew}"):
        ours, theirs = run / DATA_FILE, index.folder / shards.INDEX_FILE
        is_same = ours.read_bytes() == theirs.read_bytes()
    if not is_same:
        what = "the run was trained on other shards, or these were extended: index.json differs"
        raise ForgeError(what, where=index.folder, fix=f"give the same folder, or {anew}")
    changes = differences(state.config, flat(command.config))
    if source and source.resolve() != Path(state.weights_from).resolve():
        changes.append(f"--from: {state.weights_from or 'none'} -> {source}")
    if fixed := [change for change in changes if change.startswith(FIXED)]:
        what = f"a run keeps its model, its schedule and its order of the text: {', '.join(fixed)}"
        raise ForgeError(what, where=run, fix=f"use the same config, or {anew}")
    for change in changes:
        say(f"Changed since the last start: {change}")
    return replace(state, config=flat(command.config))


def check_machines(run: Path, index: Index, ranks: Ranks) -> None:
    """ForgeError unless all machines have the same shards, and rank 0's the run, if any has it.

    torchrun may number the machines anew at each start.
    """
    here = index.sha256, (run / CONFIG_FILE).is_file()
    hashes, has_run = zip(*on_all(ranks, lambda: here), strict=True)
    if differing := [str(rank) for rank, found in enumerate(hashes) if found != hashes[0]]:
        what = (
            f"the shards of rank {', '.join(differing)} differ from those of rank 0: another index"
        )
        where = f"{index.folder / shards.INDEX_FILE} on each machine"
        raise ForgeError(what, where=where, fix="copy one folder of shards to all machines")
    if any(has_run) and not has_run[0]:
        what = f"the run is on the machine of rank {has_run.index(True)}, not on that of rank 0"
        fix = "copy it to rank 0's machine, or use a folder that all machines share"
        raise ForgeError(what, where=run, fix=fix)


def check_room(run: Path, num_bytes: int, keep_last: int) -> None:
    """ForgeError unless the last checkpoints and one being written, of `num_bytes` each, fit.

    The checkpoints that RUN/ has already make room for the next ones.
    """
    there = checkpoint.num_bytes(run)
    needed, free = (keep_last + 1) * num_bytes - there, shutil.disk_usage(run).free
    if free < needed:
        what = f"{free / 1e9:.2f} GB of disk are left, and checkpoints take {needed / 1e9:.2f} more"
        raise ForgeError(what, where=run, fix="make room, or lower checkpoint.keep_last")


def write_files(run: Path, config: Config, index: Index, found: str) -> None:
    """All of RUN/ but checkpoints, log and README; the config last. Raises OSError.

    `found` says, above the config, what was chosen on this machine.
    """
    for left in run.glob("*.partial"):  # of a start that was killed
        left.unlink(missing_ok=True)
    for half in (run / checkpoint.FOLDER).glob("*.partial"):
        shutil.rmtree(half, ignore_errors=True)
    files = {
        shards.VOCABULARY_FILE: (index.folder / shards.VOCABULARY_FILE).read_bytes(),
        DATA_FILE: (index.folder / shards.INDEX_FILE).read_bytes(),
        CONFIG_FILE: (found + to_toml(config)).encode(),
    }
    for name, content in files.items():
        write_whole(run / name, content)
