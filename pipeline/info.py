"""What a person wants to know about a folder of shards before spending a day on it."""

import tomllib
from importlib.resources import files
from typing import Any

import numpy as np

from pipeline import chat, chatml, mix, shards, tokenizer, verify
from pipeline.errors import ForgeError, counted
from pipeline.shards import DocumentLengths, Index, Shard


def summarize(index: Index) -> dict[str, Any]:
    """The facts of `forge-prep info --json`."""
    source = {key: value for key, value in index.source.items() if key != "files"}
    return {
        "folder": str(index.folder),
        "source": source | {"num_files": len(index.source.get("files", []))},
        "options": index.options,
        "tokenizer": index.tokenizer,
        "skipped": index.skipped,
        "chat": index.chat,
        "splits": {split: summarize_split(index, split) for split in shards.SPLITS},
        "epochs": {} if index.chat else epochs(index.total("num_tokens", "train")),
        "index_sha256": index.sha256,
    }


def summarize_split(index: Index, split: str) -> dict[str, Any]:
    lengths = index.document_tokens.get(split, DocumentLengths())
    sizes = [shard.num_tokens for shard in index.of(split)]
    percentiles = {"median": 0.5, "p90": 0.9, "p99": 0.99}
    counts = {name: index.total(name, split) for name in shards.COUNTS}
    per_token = counts["text_bytes"] / counts["num_tokens"] if counts["num_tokens"] else None
    return {
        "num_shards": len(sizes),
        **counts,
        "bytes_per_token": per_token and round(per_token, 4),
        "shard_tokens_min": min(sizes, default=0),
        "shard_tokens_max": max(sizes, default=0),
        "document_tokens": {
            "min": lengths.min,
            **{name: percentile(lengths, share) for name, share in percentiles.items()},
            "max": lengths.max,
        },
    }


def percentile(lengths: DocumentLengths, fraction: float) -> int:
    """Length that `fraction` of the documents do not exceed, good to a quarter octave."""
    wanted, seen = fraction * sum(lengths.histogram), 0
    for k, count in enumerate(lengths.histogram):
        if count and seen + count >= wanted:
            length = 2 ** ((k + (wanted - seen) / count) / 4)
            return round(min(lengths.max, max(lengths.min, length)))
        seen += count
    return lengths.max


def epochs(train_tokens: int) -> dict[str, dict[str, Any]]:
    """For each config that is installed: its budget in tokens, and the epochs that makes."""
    budgets: dict[str, dict[str, Any]] = {}
    for file in files("configs").iterdir():
        if file.name.endswith(".toml"):
            config = tomllib.loads(file.read_text(encoding="utf-8"))
            schedule, step = config["schedule"], config["batch"]["tokens_per_step"]
            limits = [schedule.get("max_tokens"), schedule.get("max_steps", 0) * step]
            if tokens := min(filter(None, limits), default=0):
                share = round(tokens / train_tokens, 4) if train_tokens else None
                budgets[file.name.removesuffix(".toml")] = {"tokens": tokens, "epochs": share}
    return dict(sorted(budgets.items(), key=lambda item: (item[1]["tokens"], item[0])))


def render(index: Index) -> str:
    """The facts as text for a terminal."""
    facts = summarize(index)
    source, tokens, skipped = facts["source"], facts["tokenizer"], facts["skipped"]
    hub, fraction = source.get("hub") or {}, facts["options"].get("val_fraction")
    parts = source.get("parts", [])
    made_of = counted(len(parts), "folder") if parts else counted(source["num_files"], "file")
    origin = f"{source['name']} ({source['kind']}, {made_of})"
    if hub:
        config = f"config {hub['config']}, " if "config" in hub else ""
        origin += f"\n           {config}split {hub['split']}, revision {hub['revision']}"
    rule = f", val_fraction {fraction}" if fraction is not None else ""
    num_damaged = skipped.get("num_damaged", len(skipped.get("damaged", [])))
    num_low = skipped.get("low_score_documents", 0)
    blank = f"{skipped['null_documents']:,} null and {skipped['empty_documents']:,} empty documents"
    of_text = "" if index.chat else f"{blank}, {num_low:,} below min_score, "
    of_one_source = [
        f"split      {facts['options'].get('split_rule')}{rule}",
        f"skipped    {of_text}{num_damaged:,} damaged places",
        *chat_lines(index),
    ]
    lines = [
        f"folder     {facts['folder']}",
        f"source     {origin}",
        f"tokenizer  {tokens['name']}, {tokens['vocab_size']:,} tokens, "
        f"sha256 {tokens['sha256'][:16]}",
        *([*chat_lines(index)[:1], "", *mix.table(index)] if parts else of_one_source),
        "",
        f"{'':8}{'tokens':>16}{'documents':>13}{'text bytes':>18}{'bytes/token':>13}{'shards':>8}"
        "   tokens a shard",
    ]
    for split, row in facts["splits"].items():
        lines.append(
            f"{split:8}{row['num_tokens']:>16,}{row['num_documents']:>13,}{row['text_bytes']:>18,}"
            f"{str(row['bytes_per_token'] or '-')[:5]:>13}{row['num_shards']:>8,}"
            f"   {row['shard_tokens_min']:,} to {row['shard_tokens_max']:,}"
        )
    if index.document_tokens["train"].histogram:
        figures = facts["splits"]["train"]["document_tokens"]
        described = ", ".join(f"{name} {value:,}" for name, value in figures.items())
        lines += ["", f"document length in tokens (train): {described}"]
    if facts["epochs"] and facts["splits"]["train"]["num_tokens"]:
        lines += ["", "epochs that each config's budget makes of the train split:"]
        for name, row in facts["epochs"].items():
            many = "> 100" if row["epochs"] > 100 else f"{row['epochs']:.2f}"
            many = "< 0.01" if row["epochs"] < 0.005 else many
            lines.append(f"  {name:14}{row['tokens'] / 1e6:>10,.1f} M tokens {many:>10} epochs")
    return "\n".join(lines)


def chat_lines(index: Index) -> list[str]:
    """What the windows of a folder of chat hold, and what was left out."""
    if index.chat is None:
        return []
    counts = {name.removesuffix("_documents"): n for name, n in index.skipped.items()}
    left_out = chat.describe_skipped(counts) or ["nothing"]
    lines = [
        f"chat       {index.chat['template']}, windows of {index.chat['context_length']:,} tokens",
        "left out   " + "\n           ".join(left_out),
    ]
    if num_cut := index.chat["num_cut"]:
        lines.append(f"cut        {num_cut:,} longer than the context, behind an answer that fits")
    lines += ["", f"{'':8}{'conversations':>16}{'turns':>13}{'trained tokens':>22}{'padding':>22}"]
    for split, row in index.chat["splits"].items():
        total = max(1, index.total("num_tokens", split))
        num_conversations = index.total("num_documents", split)
        line = f"{split:8}{num_conversations:>16,}{row['num_turns']:>13,}"
        for name in ("num_trained_tokens", "num_padding_tokens"):
            line += f"{f'{row[name]:,} ({row[name] / total:.2%})':>22}"
        lines.append(line)
    return lines


def marked(conversation: np.ndarray) -> bytes:
    """A conversation's text: lines that are trained on begin with "> ", the others with blanks."""
    mask, texts = chatml.trained(conversation), tokenizer.token_bytes()
    starts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist()]
    lines = []
    # A run of trained tokens fills whole lines: the header ends one, <|im_end|> the last.
    for start, stop in zip(starts, [*starts[1:], len(mask)], strict=True):
        pieces = [
            chatml.MARKERS[token].encode() if token in chatml.MARKERS else texts[token]
            for token in conversation[start:stop].tolist()
        ]
        mark = b"> " if mask[start] else b"  "
        lines += [mark + line for line in b"".join(pieces).strip(b"\n").split(b"\n")]
    return b"\n".join(lines).rstrip()


def find_document(index: Index, split: str, number: int) -> tuple[Shard, int, np.ndarray]:
    """Document `number` (from 0) of a split: its shard, its first token there, its tokens.

    The tokens do not include the <|endoftext|> in front. ForgeError if the shard is damaged.
    """
    before = 0
    for shard in index.of(split):
        if number < before + shard.num_documents:
            verify.require_sound(index, shard)
            tokens = shards.map_shard(index.folder / shard.file, shard.num_tokens)
            bounds = [*np.flatnonzero(tokens == shards.EOT_TOKEN).tolist(), len(tokens)]
            start, stop = bounds[number - before] + 1, bounds[number - before + 1]
            ids = np.array(tokens[start:stop])
            if index.chat:  # what follows the last line's end is padding
                ids = ids[: 1 + np.flatnonzero(ids != chatml.IM_END).max(initial=-1)]
            return shard, start, ids
        before += shard.num_documents
    what = f"there is no {split} document {number:,}; the last is {before - 1:,}"
    what = what if before else f"the {split} split is empty"
    raise ForgeError(what, where=index.folder, fix="count from 0, or look at the other --split")
