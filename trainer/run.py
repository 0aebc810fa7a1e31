"""The run folder: whether a run may be made there or continued, and the files beside checkpoints.

RUN/README.md             what a person reads first
RUN/config.toml           the resolved config
RUN/metrics.jsonl         one object a line (report.py)
RUN/data_index.json       index.json of the shards, as they were
RUN/r50k_base.tiktoken    the vocabulary
RUN/checkpoints/          weights and optimizer state (checkpoint.py)
"""

import json
import os
import shutil
from pathlib import Path

import xxhash

from pipeline import shards
from pipeline.errors import ForgeError
from pipeline.files import check_utf8, write_whole
from pipeline.shards import Index
from trainer import checkpoint
from trainer.checkpoint import CONFIG_FILE
from trainer.config import Config
from trainer.config_file import differences, flat, to_toml
from trainer.config_file import load as load_config
from trainer.ranks import Ranks, gather
from trainer.report import METRICS_FILE, read_metrics, say

DATA_FILE = "data_index.json"
# Keys that cannot change: weights, windows and plan depend on them.
FIXED = ("model.", "schedule.", "seed:", "precision:", "batch.tokens_per_step:")
# What a start that was killed at once may leave: the config, which makes it a run, comes last.
BEFORE_CONFIG = {shards.VOCABULARY_FILE, DATA_FILE, METRICS_FILE}


def check_out(run: Path) -> None:
    """ForgeError when --out cannot hold a run."""
    check_utf8(run)
    nearest = nearest_folder(run)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ForgeError("--out cannot be made or written there", where=nearest, fix="name another")


def open_run(config: Config, index: Index, run: Path, resume: bool) -> int | None:
    """The step to resume from; None for a new run. ForgeError if neither may be. Writes nothing."""
    if not (run / CONFIG_FILE).is_file():
        others = (p for p in run.iterdir() if p.name not in BEFORE_CONFIG)
        if strange := next((p.name for p in others if p.suffix != ".partial"), None):
            raise ForgeError(
                f"--out contains other files and no run: {strange}",
                where=run,
                fix="name another, or move them",
            )
        return None
    if not resume:
        raise ForgeError(
            "--out holds a run already",
            where=run,
            fix="add --resume to continue it, or name another --out",
        )
    found = checkpoint.steps(run)
    log = read_metrics(run) if (run / METRICS_FILE).exists() else []
    if not found and any(row["kind"] == "checkpoint" for row in log):
        raise ForgeError(
            f"the checkpoints are gone: {METRICS_FILE} lists some",
            where=run / checkpoint.FOLDER,
            fix="bring the folder back; or begin anew with another --out",
        )
    state = checkpoint.load_state(run, found[-1], ()) if found else None
    if state and not state.fixed:
        raise ForgeError(
            "an earlier version of forge-train made this run, and only that can resume it",
            where=run,
            fix=f"start a new run from its weights: --from {run} --out ANOTHER",
        )
    before = load_config(str(run / CONFIG_FILE))
    changes = differences(before, config)
    fixed = [change for change in changes if change.startswith(FIXED)]
    if state and state.fixed != fixed_checksum(config) and not fixed:
        fixed = [f"{run / CONFIG_FILE} was edited"]
    if fixed:
        raise ForgeError(
            f"a run keeps its model, its schedule and its order of the text: {', '.join(fixed)}",
            where=run / CONFIG_FILE,
            fix="use the same config; or start a new run, with --from for its weights: "
            f"--from {run} --out ANOTHER",
        )
    ours = index.folder / shards.INDEX_FILE
    if (run / DATA_FILE).exists() and (run / DATA_FILE).read_bytes() != ours.read_bytes():
        raise ForgeError(
            "the run was trained on other shards, or the folder was extended: index.json differs",
            where=index.folder,
            fix=f"give the folder that it was trained on, or start a new run: --from {run} "
            "--out ANOTHER",
        )
    for change in changes:
        say(f"Changed since the last start: {change}")
    return state.step if state else None


def fixed_checksum(config: Config) -> str:
    """Of the keys that a run keeps for good."""
    kept = {key: value for key, value in flat(config).items() if f"{key}:".startswith(FIXED)}
    return xxhash.xxh3_64(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def nearest_folder(run: Path) -> Path:
    """RUN/, or the nearest folder above it that exists."""
    return next(path for path in (run, *run.absolute().parents) if path.exists())


def check_same_shards(index: Index, ranks: Ranks) -> None:
    """ForgeError unless all ranks' folders have the same index.json."""
    hashes = gather(ranks, index.sha256)
    differing = [str(rank) for rank, found in enumerate(hashes) if found != hashes[0]]
    if differing:
        raise ForgeError(
            f"the shards of rank {', '.join(differing)} differ from those of rank 0: another index",
            where=f"{index.folder / shards.INDEX_FILE} on each machine",
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
            fix="copy it to rank 0's machine, or use a folder that all machines share",
        )


def check_room(run: Path, num_bytes: int, keep_last: int) -> None:
    """ForgeError unless the last checkpoints and one being written, of `num_bytes` each, fit.

    The checkpoints that RUN/ has already make room for the next ones.
    """
    needed = (keep_last + 1) * num_bytes
    folder = run / checkpoint.FOLDER
    needed -= sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free < needed:
        raise ForgeError(
            f"the disk has {free / 1e9:.2f} GB left, and checkpoints take {needed / 1e9:.2f} more",
            where=run,
            fix="make room, or lower checkpoint.keep_last",
        )


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
