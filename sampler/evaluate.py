"""forge-eval: compares models on the same tokens, by loss, bits per byte and multiple choice.

Losses come with a standard error over windows, and with that of the difference from the first model
over the same windows, which is much smaller: most of the noise is the text's, not the model's. On
conversations, the loss is over the assistant's words, as in training.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline import chatml, tokenizer
from pipeline.errors import ForgeError
from pipeline.shards import EOT_TOKEN, load_index
from sampler import core
from sampler.bundle import read_bundle
from sampler.lines import read_lines
from sampler.load import Loaded, open_model
from sampler.score import BATCH_TOKENS, Answer, score_items, table
from trainer.evaluate import VALIDATION_SEED
from trainer.ranks import Ranks, process_group, sum_over_ranks
from trainer.windows import Windows, windows_at

TIMEOUT_SECONDS = 600.0  # longest wait for another rank

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]


def evaluate(
    paths: tuple[Path, ...],
    step: int | None,
    data: Path | None,
    split: str,
    num_tokens: int,
    questions: Path | None,
    bundle: Path | None,
    max_per_task: int | None,
) -> Iterator[list[Row]]:
    """Yield a row per model for each of the shards, the questions and CORE, on rank 0 alone.

    Computes in float32, on the GPUs of all ranks. ForgeError for what cannot be read or measured.
    """
    torch.set_float32_matmul_precision("high")
    ranks = Ranks.from_environment()
    device = ranks.device()
    with process_group(ranks, device, TIMEOUT_SECONDS):
        asked = read_questions(questions) if questions else []
        tasks = read_bundle(bundle, max_per_task) if bundle else []
        models = [open_model(path, step, torch.device("cpu"), torch.float32) for path in paths]
        longest = min(loaded.model.config.context_length for loaded in models)
        measures: list[Callable[[Loaded], Row]] = []  # each for all models
        for windows, count in windows_of(data, split, longest, num_tokens) if data else ():
            measures.append(partial(on_shards, windows, count, [], ranks))
        if asked:
            measures.append(partial(on_questions, asked, ranks))
        if tasks:
            measures.append(partial(core.on_tasks, tasks, ranks))
        for measure in measures:
            rows = []
            for loaded in models:
                loaded.model.to(device)  # while it is used
                rows.append(measure(loaded))
                loaded.model.to("cpu")
            if ranks.is_first:
                yield rows


# ---------------------------------------------------------------------------------------------
# Shards


def windows_of(
    data: Path, split: str, longest: int, num_tokens: int
) -> Iterator[tuple[Windows, int]]:
    """The windows of each part of a mixture, or of any folder, and how many of them to measure on.

    They have `longest` tokens; a chat's have their own length, which is `longest` at most.
    """
    index = load_index(data)
    length = index.chat["context_length"] if index.chat else longest
    if length > longest:
        what = f"windows of {length} tokens, and a model reads {longest} at most"
        raise ForgeError(what, where=data, fix=f"leave out the model that reads {longest}")
    for part in index.parts:
        windows = Windows(index, split, length, part)
        windows.check()
        count = min(num_tokens // length, windows.num_windows)
        if count < 2 and (windows.num_windows or not part):  # a part may have no val
            what = f"{count} windows of {length} tokens, and a standard error needs at least 2"
            where = f"{data / (part or '')}, {split}"
            raise ForgeError(what, where=where, fix="more text, or more --num-tokens")
        if count:
            yield windows, count


def window_losses(
    windows: Windows, count: int, ranks: Ranks, loaded: Loaded
) -> tuple[Floats, Floats, Floats]:
    """The first `count` windows of the validation order, each array (count,).

    Their nats, targets and bytes of text; of a chat, only the assistant's.
    """
    token_bytes = np.array([len(token) for token in loaded.vocabulary])
    chosen = windows_at(np.arange(count), windows.num_windows, VALIDATION_SEED)
    num_bytes = np.zeros(count)

    def ask(numbers: Sequence[int]) -> list[list[Answer]]:
        batch = windows.read(chosen[numbers]).astype(np.int64)
        is_scored = chatml.trained(batch) if windows.is_chat else np.ones_like(batch, bool)
        is_scored[:, 0] = False
        num_bytes[numbers] = (token_bytes[batch] * is_scored).sum(1)
        return [[Answer(*each)] for each in zip(batch, is_scored, strict=True)]

    kind = loaded.model.wte.weight.device.type
    at_once = max(1, BATCH_TOKENS[kind] // windows.context_length) * ranks.world_size
    scores = [each for (each,) in score_items(loaded, ranks, "windows", count, ask, at_once)]
    sum_over_ranks(torch.from_numpy(num_bytes), ranks)
    nats, num_targets = np.array([(each.nats, each.num_tokens) for each in scores]).T
    return nats, num_targets, num_bytes


def on_shards(
    windows: Windows, count: int, before: list[Floats], ranks: Ranks, loaded: Loaded
) -> Row:
    """Loss and bits per byte of a model over the first `count` windows, as a row.

    `before` are the nats of the models before it, and are added to.
    """
    if windows.is_chat and not loaded.is_chat:
        loaded = loaded.with_markers()
    elif windows.num_ids > loaded.model.config.vocab_size:
        what = "the shards have token ids that the model does not have"
        fix = "leave it out: it was made with another vocabulary"
        raise ForgeError(what, where=loaded.path, fix=fix)
    nats, num_targets, num_bytes = window_losses(windows, count, ranks, loaded)
    loss, loss_error = ratio(nats, num_targets)
    bits, bits_error = ratio(nats / math.log(2), num_bytes)
    row = {
        **_describe(loaded),
        "loss": loss,
        "loss_error": loss_error,
        "bits_per_byte": bits,
        "bits_per_byte_error": bits_error,
        "num_tokens": int(num_targets.sum()),
        "context_length": windows.context_length,
        "split": windows.split,
    }
    if windows.part:
        row["part"] = windows.part
    if before:
        row["difference"], row["difference_error"] = ratio(nats - before[0], num_targets)
    before.append(nats)
    return row


def ratio(above: Floats, below: Floats) -> tuple[float, float | None]:
    """Ratio of two sums over windows, and its standard error, from the residual of each window."""
    result = float(above.sum() / below.sum())
    return result, standard_error((above - result * below) / below.mean())


def standard_error(values: Floats) -> float | None:
    """Of the mean of independent values; None for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


# ---------------------------------------------------------------------------------------------
# Multiple choice


@dataclass(frozen=True)
class Question:
    """Which of the endings follows: `label` counts from 0."""

    context: str
    endings: list[str]
    label: int


def read_questions(path: Path) -> list[Question]:
    """Questions of a .jsonl file in HellaSwag's format (Zellers et al. 2019).

    A row has `endings`, `label` and the context: either `ctx`, or HellaSwag 1.0's `activity_label`,
    `ctx_a` and `ctx_b`, whose text is cleaned as lm-evaluation-harness does it.
    """
    questions = []
    for where, line in read_lines(path, "--questions", "question"):
        try:
            row = json.loads(line)
            keys = ("activity_label", "ctx_a", "ctx_b") if "ctx_a" in row else ("ctx",)
            context, endings, label = [row[key] for key in keys], row["endings"], int(row["label"])
            if not isinstance(endings, list):
                raise TypeError("endings is not a list")
            if not all(isinstance(text, str) for text in context + endings):
                raise TypeError("a text is not a string")
            if "ctx_a" in row:
                title, first, then = context
                context = [_clean(f"{title}: {first} {then.capitalize()}")]
                endings = [_clean(ending) for ending in endings]
            if not 0 <= label < len(endings):
                raise ValueError(f"label {label} of {len(endings)} endings")
            if not all(endings):
                raise ValueError("an ending is empty")
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            what = f"not a question in HellaSwag's format: {reason}"
            fix = '{"ctx": "...", "endings": ["...", "..."], "label": 0}'
            raise ForgeError(what, where=where, fix=fix) from error
        questions.append(Question(context[0], endings, label))
    return questions


def _clean(text: str) -> str:
    """A HellaSwag text without WikiHow's marks."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def encode_pair(context: str, ending: str, length: int) -> Answer:
    """Context and ending with a space between, of which the ending is scored.

    They are encoded together; spaces at the context's end count as the ending's. A model that reads
    `length` tokens gets the last ones.
    """
    start, tokens = 1, [EOT_TOKEN, *tokenizer.encode(" " + ending)]
    if context:
        start = len(tokenizer.encode(context.rstrip()))
        tokens = tokenizer.encode(f"{context} {ending}")
    return Answer.ending(np.array(tokens), start, length + 1)


def ending_scores(
    questions: list[Question], ranks: Ranks, loaded: Loaded
) -> Iterator[tuple[Question, list[float]]]:
    """Each question, and log p of each of its endings in nats."""
    length = loaded.model.config.context_length

    def ask(numbers: Sequence[int]) -> list[list[Answer]]:
        some = (questions[number] for number in numbers)
        return [[encode_pair(q.context, ending, length) for ending in q.endings] for q in some]

    scores = score_items(loaded, ranks, "questions", len(questions), ask)
    for question, each in zip(questions, scores, strict=True):
        yield question, [-ending.nats for ending in each]


def on_questions(questions: list[Question], ranks: Ranks, loaded: Loaded) -> Row:
    """Accuracy by log p, and by log p per character of the ending, as the harness counts them."""
    right, right_by_length = [], []
    for question, nats in ending_scores(questions, ranks, loaded):
        lengths = [len(ending) for ending in question.endings]
        right.append(int(np.argmax(nats)) == question.label)
        right_by_length.append(int(np.argmax(np.divide(nats, lengths))) == question.label)
    return {
        **_describe(loaded),
        "acc": float(np.mean(right)),
        "acc_error": standard_error(np.array(right, np.float64)),
        "acc_norm": float(np.mean(right_by_length)),
        "acc_norm_error": standard_error(np.array(right_by_length, np.float64)),
        "num_questions": len(questions),
    }


def show(rows: list[Row]) -> str:
    """A table: a line per model, each figure with its standard error. CORE has one of its own."""
    if "core" in rows[0]:
        return core.show(rows)
    columns = {
        "loss": ("loss", ".4f"),
        "bits_per_byte": ("bits per byte", ".4f"),
        "difference": ("loss - first's", "+.4f"),
        "acc": ("acc", ".4f"),
        "acc_norm": ("acc_norm", ".4f"),
    }
    present = [key for key in columns if any(key in row for row in rows)]
    lines = [["model", "parameters", *(columns[key][0] for key in present)]]
    for row in rows:
        line = [row["model"], f"{row['num_parameters']:,}"]
        for key in present:
            value, error = row.get(key), row.get(key + "_error")
            shown = "" if value is None else f"{value:{columns[key][1]}} ± "
            line.append(shown and shown + ("-" if error is None else f"{error:.4f}"))
        lines.append(line)
    shown = table(lines)
    if "split" in rows[0]:
        split = f"the {rows[0]['split']} split" + f" of {rows[0].get('part')}" * ("part" in rows[0])
        shown += (
            f"\nOver {rows[0]['num_tokens']:,} tokens of {split}; the loss in a run's README.md is "
            "over evaluate.num_tokens of them."
        )
    return shown


def _describe(loaded: Loaded) -> Row:
    step = {"step": loaded.state.step} if loaded.state else {}
    count = sum(weight.numel() for weight in loaded.model.parameters())
    return {"model": str(loaded.path), **step, "num_parameters": count}
