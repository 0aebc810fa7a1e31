"""What forge-prep prints: how far it is, what it made, what to do next."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import click

from pipeline.command import counted

CHAT_TOKENS = 65_536  # of a step and of an evaluation, in configs/chat.toml


class ProgressBar:
    """tqdm by bytes on a terminal, silent elsewhere."""

    def __init__(self, total: int | None = None) -> None:
        from tqdm import tqdm

        self.start_bytes = -1
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
        if self.start_bytes in (-1, progress.done_bytes):
            self.start_bytes = self.bar.initial = progress.done_bytes
            self.bar.reset(progress.total_bytes)
        self.bar.n, self.bar.total = progress.done_bytes, progress.total_bytes
        self.bar.set_postfix_str(f"{progress.num_tokens / 1e6:,.1f} M tokens", refresh=False)
        self.bar.refresh()


def report(folder: Path, outcome: Any, max_tokens: int | None) -> None:
    """Say how a prepare.Outcome ended."""
    from pipeline import info

    facts, index, skipped = outcome.summary(), outcome.index, outcome.index.skipped
    if outcome.up_to_date:
        click.echo(f"{folder} is up to date.")
    elif outcome.new_bytes:
        speeds = (n / 1e6 / outcome.seconds for n in (outcome.new_bytes, outcome.new_tokens))
        text = "{:.0f} MB/s of text, {:.1f} M tokens/s".format(*speeds)
        click.echo(f"Done in {outcome.seconds:.1f} s: {text}.")
    tokens = "{:,} train + {:,} val tokens of {} in {}".format(
        facts["num_train_tokens"],
        facts["num_val_tokens"],
        counted(facts["num_documents"], "conversation" if index.chat else "document"),
        counted(len(index.shards), "shard"),
    )
    if index.chat:
        click.echo("\n".join([f"{tokens}.", *info.chat_lines(index)]))
    else:
        num_blank = skipped["null_documents"] + skipped["empty_documents"]
        click.echo(f"{tokens}; {counted(num_blank, 'null or empty document')} skipped.")
    if low := skipped.get("low_score_documents"):
        click.echo(f"{counted(low, 'document')} below --min-score, or without a score, dropped.")
    for place in skipped.get("damaged", []):
        click.echo(f"Left out, damaged: {place}")
    if (more := skipped.get("num_damaged", 0) - len(skipped.get("damaged", []))) > 0:
        click.echo(f"And {more:,} more.")
    if facts["num_train_tokens"] < (max_tokens or 0):
        click.echo(f"The source has no more: fewer than --max-tokens, {max_tokens:,}.")
    click.echo(next_commands(folder, index))


def next_commands(folder: Path, index: Any) -> str:
    """What to type next, with a config that the shards are enough for."""
    quoted = shlex.quote(str(folder))
    if index.chat:
        length, advice = (
            index.chat["context_length"],
            f"forge-train chat --from RUN --data {quoted}",
        )
        for split, key in (("train", "batch.tokens_per_step"), ("val", "evaluate.num_tokens")):
            most = sum((shard.num_tokens - 1) // length for shard in index.of(split)) * length
            if not most:
                advice = f"too few {split} conversations: add some, or start again with another "
                advice += "--val-fraction and --overwrite"
                break
            if most < CHAT_TOKENS:
                advice += f" --set {key}={most}"
        return f"Look:  forge-prep show {quoted} 0\nTune:  {advice}"
    train, val = (index.total("num_tokens", split) for split in ("train", "val"))
    config = "gpt2" if min(train, val) > 2**20 else "tiny"  # gpt2 validates on a million
    most = max(0, val - 1) // 128 * 128  # tiny's context
    advice = f"forge-train {config} --data {quoted} --check"
    if index.total("num_documents") == 1:
        advice = "a document is never split, and forge-train needs two; --split-on cuts a .txt"
    elif not most:
        advice = "too few val tokens, even for the config tiny: tokenize more text, "
        advice += "or start again with a larger --val-fraction and --overwrite"
    elif train <= 1_024:  # tiny's step
        advice = "too few train tokens, even for the config tiny: tokenize more text"
    elif most < 8_192:  # tiny validates on as many
        advice += f" --set evaluate.num_tokens={most}"
    return f"Look:  forge-prep info {quoted}\nTrain: {advice}"
