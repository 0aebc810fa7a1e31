"""forge-eval: compares models on the same tokens, by loss, bits per byte and multiple choice.

Losses come with a standard error over windows, and with that of the difference from the first model
over the same windows, which is much smaller: most of the noise is the text's, not the model's. On
conversations, the loss is over the assistant's words, as in training.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pipeline import chatml, tokenizer
from pipeline.errors import ForgeError
from pipeline.shards import EOT_TOKEN, load_index
from sampler.core import ITEMS_AT_ONCE, Answer, score
from sampler.lines import read_lines
from sampler.load import Loaded, best_device, open_model
from trainer.evaluate import VALIDATION_SEED
from trainer.model import LanguageModel
from trainer.windows import Windows, to_device, windows_at

BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}  # through one forward
HEAD_TOKENS = {"cuda": 4096, "cpu": 64}  # whose logits exist at one time

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]


def evaluate(
    paths: tuple[Path, ...],
    step: int | None,
    data: Path | None,
    split: str,
    num_tokens: int,
    questions: Path | None,
) -> Iterator[list[Row]]:
    """Yield a row per model for the shards, then for the questions. Computes in float32."""
    asked = read_questions(questions) if questions else []
    torch.set_float32_matmul_precision("high")
    device = best_device()
    models = [open_model(path, step, torch.device("cpu"), torch.float32) for path in paths]
    if data is not None:
        index = load_index(data)
        longest = min(loaded.model.config.context_length for loaded in models)
        length = index.chat["context_length"] if index.chat else longest
        if length > longest:
            what = f"windows of {length} tokens, and a model reads {longest} at most"
            raise ForgeError(what, where=data, fix=f"leave out the model that reads {longest}")
        for part in index.parts:
            windows = Windows(index, split, length, part)
            if windows.num_windows or not part:  # a part of a mixture may have no val
                yield on_shards(_one_by_one(models, device), windows, num_tokens)
    if asked:
        yield on_questions(_one_by_one(models, device), asked)


def _one_by_one(models: list[Loaded], device: torch.device) -> Iterator[Loaded]:
    """Each model in turn, on the device while it is used."""
    for loaded in models:
        loaded.model.to(device)
        yield loaded
        loaded.model.to("cpu")


def token_losses(model: LanguageModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """-log p of every target in nats, in float32: (B, T) and (B, T) -> (B, T)."""
    x = model.hidden(inputs).flatten(0, 1)
    right, at_once = targets.flatten(), HEAD_TOKENS[x.device.type]
    losses = []
    for first in range(0, len(x), at_once):
        part = slice(first, first + at_once)
        logits = model.logits(x[part]).float()
        losses.append(F.cross_entropy(logits, right[part], reduction="none"))
    return torch.cat(losses).view(targets.shape)


# ---------------------------------------------------------------------------------------------
# Shards


@torch.inference_mode()
def window_losses(
    loaded: Loaded, windows: Windows, count: int, is_chat: bool = False
) -> tuple[Floats, Floats, Floats]:
    """The first `count` windows of the validation order, each array (count,).

    Their nats, targets and bytes of text; of a chat, only the assistant's.
    """
    model = loaded.model
    device = model.wte.weight.device
    token_bytes = np.array([len(token) for token in loaded.vocabulary])
    chosen = windows_at(np.arange(count), windows.num_windows, VALIDATION_SEED)
    at_once = max(1, BATCH_TOKENS[device.type] // windows.context_length)
    nats, num_targets, num_bytes = [], [], []
    with _progress(str(loaded.path), count * windows.context_length, "token") as progress:
        for first in range(0, count, at_once):
            batch = windows.read(chosen[first : first + at_once])
            counts = chatml.trained(batch)[:, 1:] if is_chat else np.ones_like(batch[:, 1:], bool)
            losses = token_losses(model, *to_device(batch, device)).double().cpu().numpy()
            nats.append((losses * counts).sum(1))
            num_targets.append(counts.sum(1, dtype=np.float64))
            num_bytes.append((token_bytes[batch[:, 1:]] * counts).sum(1))
            progress.update(batch[:, 1:].size)
    return np.concatenate(nats), np.concatenate(num_targets), np.concatenate(num_bytes)


def on_shards(models: Iterator[Loaded], windows: Windows, num_tokens: int) -> list[Row]:
    """Loss and bits per byte of each model over the same windows, as rows for show() or JSON."""
    index, context_length, split = windows.index, windows.context_length, windows.split
    folder = index.folder / (windows.part or "")
    windows.check()
    count = min(num_tokens // context_length, windows.num_windows)
    if count < 2:
        what = f"{count} windows of {context_length} tokens, and a standard error needs at least 2"
        raise ForgeError(what, where=f"{folder}, {split}", fix="more text, or more --num-tokens")
    is_chat = index.chat is not None
    rows: list[Row] = []
    first: Floats | None = None
    for loaded in models:
        if is_chat and not loaded.is_chat:
            loaded = loaded.with_markers()
        elif index.tokenizer["vocab_size"] > loaded.model.config.vocab_size:
            what = "the shards have token ids that the model does not have"
            fix = "leave it out: it was made with another vocabulary"
            raise ForgeError(what, where=loaded.path, fix=fix)
        nats, num_targets, num_bytes = window_losses(loaded, windows, count, is_chat)
        loss, loss_error = ratio(nats, num_targets)
        bits, bits_error = ratio(nats / math.log(2), num_bytes)
        row = {
            **_describe(loaded),
            "loss": loss,
            "loss_error": loss_error,
            "bits_per_byte": bits,
            "bits_per_byte_error": bits_error,
            "num_tokens": int(num_targets.sum()),
            "context_length": context_length,
            "split": split,
        }
        if windows.part:
            row["part"] = windows.part
        if first is None:
            first = nats
        else:
            row["difference"], row["difference_error"] = ratio(nats - first, num_targets)
        rows.append(row)
    return rows


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

    A row has `endings`, `label` and the context: either `ctx` (or `context`), or HellaSwag 1.0's
    `activity_label`, `ctx_a` and `ctx_b`, whose text is cleaned as lm-evaluation-harness does it.
    """
    questions = []
    for where, line in read_lines(path, "--questions", "question"):
        try:
            row = json.loads(line)
            endings = row["endings"]
            if not isinstance(endings, list) or not all(isinstance(e, str) for e in endings):
                raise TypeError("endings is not a list of strings")
            if "ctx_a" in row:
                title, first, then = (_text(row, k) for k in ("activity_label", "ctx_a", "ctx_b"))
                context = _clean(f"{title}: {first} {then.capitalize()}")
                endings = [_clean(ending) for ending in endings]
            else:
                context = _text(row, "ctx" if "ctx" in row else "context")
            question = Question(context, endings, int(row["label"]))
            if not 0 <= question.label < len(endings):
                raise ValueError(f"label {question.label} of {len(endings)} endings")
            if not all(endings):
                raise ValueError("an ending is empty")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            what = f"not a question in HellaSwag's format: {reason}"
            fix = '{"ctx": "...", "endings": ["...", "..."], "label": 0}'
            raise ForgeError(what, where=where, fix=fix) from error
        questions.append(question)
    return questions


def _text(row: Row, key: str) -> str:
    text = row[key]
    if not isinstance(text, str):
        raise TypeError(f"{key} is not a string")
    return text


def _clean(text: str) -> str:
    """A HellaSwag text without WikiHow's marks."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def encode_pair(context: str, ending: str) -> Answer:
    """Context and ending with a space between, of which the ending is scored.

    They are encoded together; spaces at the context's end count as the ending's.
    """
    if not context:
        return Answer(np.array([EOT_TOKEN, *tokenizer.encode(" " + ending)]), 1)
    tokens = tokenizer.encode(f"{context} {ending}")
    return Answer(np.array(tokens), len(tokenizer.encode(context.rstrip())))


def ending_scores(loaded: Loaded, questions: list[Question]) -> list[list[float]]:
    """log p of each ending of each question, in nats."""
    length, found = loaded.model.config.context_length, list[list[float]]()
    with _progress(str(loaded.path), len(questions), "question") as progress:
        for first in range(0, len(questions), ITEMS_AT_ONCE):
            some = questions[first : first + ITEMS_AT_ONCE]
            pairs = [encode_pair(each.context, ending) for each in some for ending in each.endings]
            scored = iter(score(loaded.model, [pair.cropped(length + 1) for pair in pairs]))
            found += [[-next(scored).nats for _ in each.endings] for each in some]
            progress.update(len(some))
    return found


def on_questions(models: Iterator[Loaded], questions: list[Question]) -> list[Row]:
    """Accuracy by log p, and by log p per character of the ending, as the harness counts them."""
    rows = []
    for loaded in models:
        scores = ending_scores(loaded, questions)
        right, right_by_length = [], []
        for question, nats in zip(questions, scores, strict=True):
            lengths = [len(ending) for ending in question.endings]
            right.append(int(np.argmax(nats)) == question.label)
            right_by_length.append(int(np.argmax(np.divide(nats, lengths))) == question.label)
        rows.append(
            {
                **_describe(loaded),
                "acc": float(np.mean(right)),
                "acc_error": standard_error(np.array(right, np.float64)),
                "acc_norm": float(np.mean(right_by_length)),
                "acc_norm_error": standard_error(np.array(right_by_length, np.float64)),
                "num_questions": len(questions),
            }
        )
    return rows


def show(rows: list[Row]) -> str:
    """A table: a line per model, each figure with its standard error."""
    columns = {
        "loss": ("loss", ".4f"),
        "bits_per_byte": ("bits per byte", ".4f"),
        "difference": ("loss - first's", "+.4f"),
        "acc": ("acc", ".4f"),
        "acc_norm": ("acc_norm", ".4f"),
    }
    present = [key for key in columns if any(key in row for row in rows)]
    width = max(5, *(len(row["model"]) for row in rows))
    head = f"{'model':{width}}  {'parameters':>13}"
    lines = [head + "".join(f"  {columns[key][0]:>18}" for key in present)]
    for row in rows:
        line = f"{row['model']:{width}}  {row['num_parameters']:>13,}"
        for key in present:
            cell = ""
            if key in row:
                error = row[key + "_error"]
                cell = f"{row[key]:{columns[key][1]}} ± {'-' if error is None else f'{error:.4f}'}"
            line += f"  {cell:>18}"
        lines.append(line)
    if "split" in rows[0]:
        split = f"the {rows[0]['split']} split" + f" of {rows[0].get('part')}" * ("part" in rows[0])
        lines.append(
            f"Over {rows[0]['num_tokens']:,} tokens of {split}; the loss in a run's README.md is "
            "over evaluate.num_tokens of them."
        )
    return "\n".join(lines)


def _describe(loaded: Loaded) -> Row:
    step = {"step": loaded.state.step} if loaded.state else {}
    count = sum(weight.numel() for weight in loaded.model.parameters())
    return {"model": str(loaded.path), **step, "num_parameters": count}


def _progress(label: str, total: int, unit: str) -> "tqdm[Any]":
    return tqdm(total=total, unit=unit, unit_scale=True, desc=label, leave=False, disable=None)
