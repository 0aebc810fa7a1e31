"""What forge-prep prints: how far it is, what it made, what to do next."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import click


def report(outcome: Any, folder: Path, source: Any, as_json: bool) -> None:
    """Print what a prepare.Outcome of a sources.Source is, and what to do next."""
    from pipeline import info

    index, seconds = outcome.index, outcome.seconds
    train, val = (index.total("num_tokens", split) for split in ("train", "val"))
    documents, skipped = index.total("num_documents"), index.skipped
    if as_json:
        summary = {"folder": str(folder), "up_to_date": outcome.up_to_date}
        summary |= {"num_train_tokens": train, "num_val_tokens": val, "num_documents": documents}
        summary |= {"text_bytes": index.total("text_bytes"), "skipped": skipped}
        summary |= {"num_files_not_read": len(source.not_read), "seconds": round(seconds, 3)}
        click.echo(json.dumps(summary))
        return
    if outcome.up_to_date:
        click.echo(f"{folder} is up to date.")
    else:
        speeds = (count / 1e6 / seconds for count in (outcome.new_bytes, outcome.new_tokens))
        text = "{:.0f} MB/s of text, {:.1f} M tokens/s".format(*speeds)
        click.echo(f"Done in {seconds:.1f} s: {text}.")
    made = f"{train:,} train + {val:,} val tokens of {documents:,} "
    made += "conversations" if index.chat else "documents"
    if index.chat:
        click.echo(f"{made} in {len(index.shards):,} shards.")
        click.echo("\n".join(info.chat_lines(index)))
    else:
        num_blank = skipped["null_documents"] + skipped["empty_documents"]
        made += f" in {len(index.shards):,} shards; {num_blank:,} null or empty documents skipped."
        click.echo(made)
    if low := skipped.get("low_score_documents"):
        click.echo(f"{low:,} documents below --min-score, or without a score, dropped.")
    for place in skipped.get("damaged", []):
        click.echo(f"Left out, damaged: {place}")
    if (more := skipped.get("num_damaged", 0) - len(skipped.get("damaged", []))) > 0:
        click.echo(f"And {more:,} more.")
    if train < (wanted := index.options["max_tokens"] or 0):
        click.echo(f"The source has no more: fewer than --max-tokens, {wanted:,}.")
    click.echo(next_commands(folder, index))


def next_commands(folder: Path, index: Any) -> str:
    """What to type next, with a config that the shards are enough for."""
    if index.chat:
        name = shlex.quote(str(folder))
        look = f"Look:  forge-prep info {name}; forge-prep show {name} 0"
        return f"{look}\nTune:  forge-train chat --from RUN --data {name}"
    tokens = {split: index.total("num_tokens", split) for split in ("train", "val")}
    config = "gpt2" if min(tokens.values()) > 2**20 else "tiny"  # gpt2 validates on a million
    quoted, most = shlex.quote(str(folder)), max(0, tokens["val"] - 1) // 128 * 128
    train = f"Train: forge-train {config} --data {quoted} --check"
    if index.total("num_documents") == 1:
        train = (
            "Train: a document is never split, and forge-train needs two; --split-on cuts a .txt"
        )
    elif tokens["train"] <= 1_024 or not most:  # tiny's step, and its context
        split = "train" if most else "val"
        train = f"Train: too few {split} tokens, even for the config tiny: tokenize more text"
        train += ", or with a larger --val-fraction" * (split == "val")
    elif most < 8_192:  # tiny validates on as many
        train += f" --set evaluate.num_tokens={most}"
    return f"Look:  forge-prep info {quoted}\n{train}"


class ProgressBar:
    """tqdm by bytes on a terminal, silent elsewhere."""

    def __init__(self, total: int | None = None) -> None:
        from tqdm import tqdm

        self.first: Any = None  # the last prepare.Progress before any text was done
        width = min(110, shutil.get_terminal_size().columns)
        look = {"unit": "B", "unit_scale": True, "ncols": width, "smoothing": 0.1, "leave": False}
        self.bar = tqdm(total=total, disable=None, **look)
        self.add = self.bar.update

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, progress: Any) -> None:
        """Show a prepare.Progress. The clock starts with the first text."""
        if self.bar.disable:
            return
        if self.first is None or progress.done_bytes == self.first.done_bytes:
            self.first = progress
            self.bar.reset(progress.total_bytes)
            self.bar.initial = progress.done_bytes
        self.bar.n, self.bar.total = progress.done_bytes, progress.total_bytes
        new = (progress.num_tokens - self.first.num_tokens) / 1e6
        speed = new / max(1e-3, self.bar.format_dict["elapsed"])
        self.bar.set_postfix_str(f"{speed:.1f} M tokens/s", refresh=False)
        self.bar.refresh()
