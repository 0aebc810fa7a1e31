"""A run's two folders: the shards that it reads, checked, and RUN/, which it writes.

Before: pipeline/shards.py's folder and an earlier run, if any. After: loop.py.

    RUN/README.md             what a person reads first
    RUN/config.toml           the resolved config
    RUN/metrics.jsonl         one object a line (metrics.py)
    RUN/data_index.json       index.json of the shards, as they were
    RUN/r50k_base.tiktoken    the vocabulary
    RUN/checkpoints/          weights and optimizer state (checkpoint.py)
"""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline import shards
from pipeline.errors import ForgeError
from pipeline.shards import Index, write_whole
from trainer import checkpoint
from trainer.config import Config, load
from trainer.metrics import Metrics, amount, duration
from trainer.windows import Windows

CONFIG_FILE = "config.toml"
DATA_FILE = "data_index.json"


@dataclass(frozen=True)
class Data:
    """The two splits, checked, and the bytes of each token (V,) for bits per byte."""

    index: Index
    train: Windows
    val: Windows
    vocabulary: list[bytes]


def open_data(config: Config, folder: Path) -> Data:
    """Open and check a folder of shards against what the config asks of it."""
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
    needs = [
        (train, config.windows_per_step(), "batch.tokens_per_step"),
        (val, config.evaluate.num_tokens // config.model.context_length, "evaluate.num_tokens"),
    ]
    for windows, wanted, key in needs:
        if windows.num_windows < wanted:
            most = windows.num_windows * config.model.context_length
            raise ForgeError(
                f"{key} asks for {wanted:,} windows, the {windows.split} split has "
                f"{windows.num_windows:,}",
                where=folder,
                fix=f"--set {key}={most} at most"
                if most
                else "tokenize more text, or with a larger --val-fraction",
            )
    return Data(index, train, val, vocabulary)


def open_run(config: Config, data: Data, run: Path, resume: bool) -> int | None:
    """Step of the checkpoint to go on from, None for a new run. ForgeError if it may not.

    Only looks, so that every rank sees the same: rank 0 makes the folder once all have looked.
    """
    nearest = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ForgeError("--out cannot be made or written there", where=nearest, fix="name another")
    if not run.exists() or not any(run.iterdir()):
        return None
    if not (run / CONFIG_FILE).is_file():
        raise ForgeError("--out is a folder with other things", where=run, fix="name another")
    if not resume:
        raise ForgeError(
            "--out holds a run already",
            where=run,
            fix="add --resume to go on, or name another --out",
        )
    before = load(str(run / CONFIG_FILE))
    fixed = ("model", "seed")
    changed = [key for key in fixed if getattr(before, key) != getattr(config, key)]
    if before.batch.tokens_per_step != config.batch.tokens_per_step:
        changed.append("batch.tokens_per_step")
    if changed:
        raise ForgeError(
            f"the run was made with another {' and '.join(changed)}",
            where=run / CONFIG_FILE,
            fix="use the same config, or start a new run with another --out",
        )
    index = data.index.folder / shards.INDEX_FILE
    if (run / DATA_FILE).exists() and (run / DATA_FILE).read_bytes() != index.read_bytes():
        raise ForgeError(
            "the run was trained on other shards: the index is another",
            where=data.index.folder,
            fix="give the folder that it was trained on, or start a new run",
        )
    found = checkpoint.steps(run)
    return found[-1] if found else None


def make_folder(run: Path, config: Config, index: Index) -> str | None:
    """Make RUN/ with everything that is known before the first step, and hold it.

    Returns what is wrong, if anything, so that rank 0 can tell the others.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        # Held until this process ends, and no longer: two trainers never write one run.
        fcntl.flock(os.open(run, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        write_whole(run / CONFIG_FILE, config.to_toml().encode())
        for name, copy in (
            (shards.VOCABULARY_FILE, shards.VOCABULARY_FILE),
            (shards.INDEX_FILE, DATA_FILE),
        ):
            write_whole(run / copy, (index.folder / name).read_bytes())
    except BlockingIOError:
        return "another forge-train is writing it"
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    return None


def write_readme(
    run: Path, config: Config, name: str, index: Index, metrics: Metrics, device: str
) -> None:
    """The page that a person reads first: what this run is and how far it came."""
    if not metrics.enabled:
        return
    step = metrics.last.get("step", {"step": 0, "tokens": 0, "seconds": 0.0, "loss": None})
    evaluated, first = metrics.last.get("evaluate"), metrics.first.get("evaluate")
    loss = f"{evaluated['loss']:.4f}" if evaluated else "-"
    train_loss = f"{step['loss']:.4f}" if step["loss"] is not None else "-"
    epochs = step["tokens"] / max(1, index.total("num_tokens", "train"))
    lines = [
        f"# {name}, trained from scratch",
        "",
        "| model | time | steps | tokens | parameters | loss |",
        "|---|---|---|---|---|---|",
        f"| {name} | {duration(step['seconds'])} | {step['step']:,} of {config.num_steps():,} | "
        f"{amount(step['tokens'])} | {amount(config.model.num_parameters())} | {loss} |",
        "",
        "Loss is the mean over the fixed validation tokens, in nats a token.",
        "",
    ]
    if evaluated and first:
        lines.append(
            f"- Validation loss {first['loss']:.4f} -> {evaluated['loss']:.4f}, "
            f"{evaluated['bits_per_byte']:.4f} bits a byte; training loss {train_loss}"
        )
    revision = (index.source.get("hub") or {}).get("revision")
    sample = metrics.last.get("sample")
    lines += [
        f"- Data: {index.source['name']}"
        + (f" at {revision}" if revision else "")
        + f", {epochs:.2f} epochs of {index.total('num_tokens', 'train'):,} training tokens",
        f"- Hardware: {device}; torch {torch.__version__}",
        "",
        "Files: `config.toml` (resolved), `metrics.jsonl`, `r50k_base.tiktoken` (vocabulary), "
        "`checkpoints/` (safetensors).",
        "",
        f"    forge-sample {run}",
        f"    forge-export {run} {run.name}-hf",
    ]
    if sample:
        lines += [
            "",
            "A sample at the last evaluation:",
            "",
            "> " + sample["text"].replace("\n", "\n> "),
        ]
    try:
        write_whole(run / "README.md", ("\n".join(lines) + "\n").encode())
    except OSError as error:  # a full disk must not end a day's training
        print(f"WARNING: {run / 'README.md'} not written: {error}", flush=True)
