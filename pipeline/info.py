"""What a person wants to know about a folder of shards before spending a day on it.

Before: a finished folder (shards.py). After: the terminal (cli.py).
"""

import math
import tomllib
from importlib.resources import files
from typing import Any

import numpy as np

from pipeline.errors import ForgeError
from pipeline.shards import (
    EOT_TOKEN,
    SPLITS,
    VOCAB_SIZE,
    DocumentLengths,
    Index,
    Shard,
    check_header,
    map_shard,
)

BAR_WIDTH = 40


def summarize(index: Index) -> dict[str, Any]:
    """The facts of `forge-prep info --json`."""
    splits = {}
    for split in SPLITS:
        lengths = index.document_tokens.get(split, DocumentLengths())
        shards = index.of(split)
        num_tokens, num_documents = (index.total(n, split) for n in ("num_tokens", "num_documents"))
        text_bytes = index.total("text_bytes", split)
        splits[split] = {
            "num_shards": len(shards),
            "num_tokens": num_tokens,
            "num_documents": num_documents,
            "text_bytes": text_bytes,
            "bytes_per_token": round(text_bytes / num_tokens, 4) if num_tokens else None,
            "shard_tokens_min": min((s.num_tokens for s in shards), default=0),
            "shard_tokens_max": max((s.num_tokens for s in shards), default=0),
            "document_tokens": {
                "min": lengths.min,
                "median": lengths.percentile(0.5),
                "p90": lengths.percentile(0.9),
                "p99": lengths.percentile(0.99),
                "max": lengths.max,
            },
        }
    return {
        "folder": str(index.folder),
        "source": {k: v for k, v in index.source.items() if k != "files"}
        | {"num_files": len(index.source.get("files", []))},
        "options": index.options,
        "tokenizer": index.tokenizer,
        "skipped": index.skipped,
        "splits": splits,
        "epochs": epochs(index.total("num_tokens", "train")),
        "index_sha256": index.sha256,
    }


def few(epochs: float) -> str:
    return f"{epochs:.2f}" if epochs >= 0.005 or not epochs else "< 0.01"


def epochs(train_tokens: int) -> dict[str, dict[str, Any]]:
    """For each config that is installed: its budget in tokens, and the epochs that makes."""
    budgets: dict[str, dict[str, Any]] = {}
    for file in sorted(files("configs").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            config = tomllib.loads(file.read_text(encoding="utf-8"))
            schedule, step = config["schedule"], config["batch"]["tokens_per_step"]
            limits = [schedule.get("max_tokens"), schedule.get("max_steps", 0) * step or None]
            tokens = min((limit for limit in limits if limit), default=0)
            if tokens:
                budgets[file.name.removesuffix(".toml")] = {
                    "tokens": tokens,
                    "epochs": round(tokens / train_tokens, 4) if train_tokens else None,
                }
    return dict(sorted(budgets.items(), key=lambda item: item[1]["tokens"]))


def render(index: Index) -> str:
    """The facts as text for a terminal."""
    facts = summarize(index)
    source, tokenizer, skipped = facts["source"], facts["tokenizer"], facts["skipped"]
    hub, fraction = source.get("hub") or {}, facts["options"].get("val_fraction")
    origin = f"{source['name']} ({source['kind']}, {source['num_files']} files)"
    if hub:
        config = f"config {hub['config']}, " if "config" in hub else ""
        origin += f"\n           {config}split {hub['split']}, revision {hub['revision']}"
    lines = [
        f"folder     {facts['folder']}",
        f"source     {origin}",
        f"tokenizer  {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens, "
        f"sha256 {tokenizer['sha256'][:16]}",
        f"split      {facts['options'].get('split_rule')}"
        + (f", val_fraction {fraction}" if fraction is not None else ""),
        f"skipped    {skipped['null_documents']:,} null and "
        f"{skipped['empty_documents']:,} empty documents, "
        f"{skipped.get('low_score_documents', 0):,} below min_score, "
        f"{len(skipped.get('damaged', [])):,} damaged places",
        "",
        f"{'':8}{'tokens':>16}{'documents':>13}{'text bytes':>18}{'bytes/token':>13}{'shards':>8}"
        f"   tokens a shard",
    ]
    for split, row in facts["splits"].items():
        sizes = f"{row['shard_tokens_min']:,} to {row['shard_tokens_max']:,}"
        per_token = f"{row['bytes_per_token']:.3f}" if row["bytes_per_token"] else "-"
        lines.append(
            f"{split:8}{row['num_tokens']:>16,}{row['num_documents']:>13,}{row['text_bytes']:>18,}"
            f"{per_token:>13}{row['num_shards']:>8,}   {sizes}"
        )
    train = index.document_tokens.get("train", DocumentLengths())
    figures = facts["splits"]["train"]["document_tokens"]
    lines += [
        "",
        "document length in tokens (train): "
        + ", ".join(f"{name} {value:,}" for name, value in figures.items()),
        *histogram(train),
    ]
    if facts["splits"]["train"]["num_tokens"]:
        lines += ["", "epochs that each config's budget makes of the train split:"]
        for name, row in facts["epochs"].items():
            lines.append(
                f"  {name:14}{row['tokens'] / 1e6:>10,.1f} M tokens {few(row['epochs']):>10} epochs"
            )
    return "\n".join(lines)


def histogram(lengths: DocumentLengths) -> list[str]:
    """One line an octave of document length: range, count, bar."""
    octaves: dict[int, int] = {}
    for k, count in enumerate(lengths.histogram):
        octaves[k // 4] = octaves.get(k // 4, 0) + count
    used = [k for k, count in octaves.items() if count]
    lines = []
    for k in range(min(used, default=0), max(used, default=-1) + 1):
        bar = "#" * math.ceil(BAR_WIDTH * octaves[k] / max(octaves.values()))
        lines.append(f"  {2**k:>9,} to {2 ** (k + 1) - 1:>9,} {octaves[k]:>11,}  {bar}".rstrip())
    return lines


def find_document(index: Index, split: str, number: int) -> tuple[Shard, int, np.ndarray]:
    """Document `number` (from 0) of a split: its shard, its first token there, its tokens.

    The tokens do not include the <|endoftext|> in front.
    """
    before = 0
    for shard in index.of(split):
        if number < before + shard.num_documents:
            path = index.folder / shard.file
            tokens = map_shard(path, check_header(path))
            starts = np.flatnonzero(tokens == EOT_TOKEN)
            if len(starts) != shard.num_documents:
                raise ForgeError("the shard is damaged", where=path, fix="run forge-prep verify")
            start = int(starts[number - before]) + 1
            end = int(starts[number - before + 1]) if number - before + 1 < len(starts) else None
            ids = np.array(tokens[start:end])
            if ids.size and ids.max() >= VOCAB_SIZE:
                raise ForgeError(
                    f"the shard is damaged: token {ids.max()} is none of GPT-2's",
                    where=path,
                    fix="run forge-prep verify",
                )
            return shard, start, ids
        before += shard.num_documents
    raise ForgeError(
        f"there is no {split} document {number:,}; the last is {before - 1:,}"
        if before
        else f"the {split} split is empty",
        where=index.folder,
        fix="count from 0, or look at the other --split",
    )
