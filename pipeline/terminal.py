"""What forge-prep prints: how far it is, what it made, what to do next."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import click

from pipeline.errors import counted


def progress_bar(total: int | None = None) -> Any:
    """tqdm by bytes on a terminal, silent elsewhere."""
    from tqdm import tqdm

    width = min(110, shutil.get_terminal_size().columns)
    look = {"unit": "B", "unit_scale": True, "ncols": width, "smoothing": 0.1, "leave": False}
    return tqdm(total=total, disable=None, **look)


def show_progress(bar: Any, progress: Any) -> None:
    """Show a prepare.Progress. What earlier runs made does not count as speed."""
    bar.total = progress.total_bytes
    bar.set_postfix_str(f"{progress.num_tokens / 1e6:,.1f} M tokens", refresh=False)
    if bar.n == 0:
        bar.n = bar.initial = bar.last_print_n = progress.done_bytes
    bar.update(progress.done_bytes - bar.n)


def report(
    folder: Path, outcome: Any, as_json: bool, max_tokens: int | None = None, **more: Any
) -> None:
    """Say how a merge.Outcome ended; `more` facts are for JSON alone."""
    from pipeline import info

    facts, index, skipped = outcome.summary(), outcome.index, outcome.index.skipped
    if as_json:
        click.echo(json.dumps({"folder": str(folder)} | more | facts))
        return
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
    """What to type next: --check says whether the shards are enough for a config."""
    train, val = (index.total("num_tokens", split) for split in ("train", "val"))
    look, config = "info {}", "forge_124m" if min(train, val) > 2**20 else "forge_tiny"
    if index.chat:
        look, config = "show {} 0", "chat --from RUN"
    advice = f"forge-train {config} --data {{}} --check"
    if index.total("num_documents") == 1:
        advice = "forge-train needs two documents or more; a .txt file is one, unless "
        advice += "--split-on names how some of its lines begin"
    elif not (train and val):
        advice = "one split is empty: add text, or start again with another --val-fraction "
        advice += "and --overwrite"
    return f"Look:  forge-prep {look}\nTrain: {advice}".replace("{}", shlex.quote(str(folder)))
