"""CORE, the figure that the field quotes for base models: 22 tasks, asked with examples.

Li et al. 2024, "DataComp-LM" (arXiv:2406.11794), as nanochat computes it. An item is right when

    multiple_choice     of several endings of one text, the right one has the lowest mean loss
    schema              of several beginnings of one ending, the right one gives it the lowest
    language_modeling   greedy decoding would write the continuation

A task's centred accuracy is 0 for guessing and 1 for all right; CORE is its mean over the tasks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tqdm import tqdm

from pipeline import tokenizer
from pipeline.shards import EOT_TOKEN
from sampler.bundle import Item, Task, read_bundle, texts
from sampler.load import Loaded, open_model
from trainer.model import LanguageModel
from trainer.ranks import Ranks, on_all, process_group

TASKS = (  # in full
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa",
    "commonsense_qa", "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd",
    "winogrande", "bigbench_dyck_languages", "agi_eval_lsat_ar", "bigbench_cs_algorithms",
    "bigbench_operators", "bigbench_repeat_copy_logic", "squad", "coqa", "boolq",
    "bigbench_language_identification",
)  # fmt: skip
ITEMS_AT_ONCE = 1024  # whose tokens are held
TIMEOUT_SECONDS = 600.0  # longest wait for another rank
BATCH_TOKENS = {"cuda": 65536, "cpu": 4096}  # through one forward
HEAD_TOKENS = {"cuda": 8192, "cpu": 256}  # whose logits exist at one time

Tokens = npt.NDArray[np.int64]


class Score(NamedTuple):
    """Of the scored tokens of one answer."""

    nats: float  # sum of their losses
    num_tokens: int
    is_likeliest: bool  # each of them, after those before it

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return self.nats / self.num_tokens


@dataclass(frozen=True)
class Answer:
    """A text (n,) that begins with <|endoftext|>; the tokens from `start` on are scored."""

    tokens: Tokens
    start: int

    def cropped(self, length: int) -> "Answer":
        """The last `length` tokens."""
        over = max(0, len(self.tokens) - length)
        # A scored token needs at least one before it.
        return Answer(self.tokens[over:], max(1, self.start - over))


# ---------------------------------------------------------------------------------------------
# Scores


def answers(task: Task, encoded: list[Tokens]) -> list[Answer]:
    """What of an item's encoded texts is scored: where they differ, or the common ending."""
    if task.kind == "schema":
        ending = _common_length([tokens[::-1] for tokens in encoded])
        return [Answer(tokens, len(tokens) - ending) for tokens in encoded]
    start = _common_length(encoded)
    if task.kind == "language_modeling":
        return [Answer(encoded[1], start)]
    # At least the last token: one choice may begin with another.
    return [Answer(tokens, min(start, len(tokens) - 1)) for tokens in encoded]


def _common_length(sequences: list[Tokens]) -> int:
    """Number of tokens that all sequences have in common from their start."""
    shortest = min(map(len, sequences))
    stacked = np.stack([tokens[:shortest] for tokens in sequences])
    differs = np.flatnonzero((stacked != stacked[0]).any(0))
    return int(differs[0]) if len(differs) else shortest


def encode(batch: list[str]) -> list[Tokens]:
    """Token ids of texts, <|endoftext|> in front."""
    encoded = tokenizer.reference().encode_ordinary_batch(batch)
    return [np.array([EOT_TOKEN, *ids], np.int64) for ids in encoded]


@torch.inference_mode()
def score(model: LanguageModel, asked: Sequence[Answer]) -> list[Score]:
    """The score of each answer's scored tokens.

    Answers that differ in their last token only share one row of the batch.
    """
    device = model.wte.weight.device
    rows: dict[bytes, list[int]] = {}  # the answers of each row of inputs
    for number, answer in enumerate(asked):
        rows.setdefault(answer.tokens[:-1].tobytes(), []).append(number)
    by_length = sorted(rows.values(), key=lambda numbers: len(asked[numbers[0]].tokens))
    found = [Score(math.nan, 0, False)] * len(asked)
    while by_length:
        longest = len(asked[by_length[-1][0]].tokens) - 1
        count = max(1, BATCH_TOKENS[device.type] // longest)
        batch, by_length = by_length[-count:], by_length[:-count]
        inputs = np.zeros((len(batch), longest), np.int64)
        places, targets, ends = [], [], [0]
        for row, numbers in enumerate(batch):
            tokens = asked[numbers[0]].tokens[:-1]
            inputs[row, : len(tokens)] = tokens
            for answer in (asked[number] for number in numbers):
                places.append(row * longest + np.arange(answer.start - 1, len(answer.tokens) - 1))
                targets.append(answer.tokens[answer.start :])
                ends.append(ends[-1] + len(targets[-1]))
        x = model.hidden(torch.from_numpy(inputs).to(device)).flatten(0, 1)
        x = x[torch.from_numpy(np.concatenate(places)).to(device)]
        losses, hits = _at_targets(model, x, torch.from_numpy(np.concatenate(targets)).to(device))
        for number, first, end in zip(chain(*batch), ends, ends[1:], strict=False):
            nats, is_likeliest = float(losses[first:end].sum()), bool(hits[first:end].all())
            found[number] = Score(nats, end - first, is_likeliest)
    return found


def _at_targets(
    model: LanguageModel, x: torch.Tensor, targets: torch.Tensor
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Loss, and whether it is the likeliest, of each target: (N, C) and (N,) -> (N,), (N,)."""
    losses, hits = [], []
    at_once = HEAD_TOKENS[x.device.type]
    for first in range(0, len(x), at_once):
        part, right = x[first : first + at_once], targets[first : first + at_once]
        logits = model.logits(part).float()
        losses.append(F.cross_entropy(logits, right, reduction="none"))
        hits.append(logits.argmax(-1) == right)
    return torch.cat(losses).cpu().numpy(), torch.cat(hits).cpu().numpy()


def is_right(task: Task, item: Item, scores: list[Score]) -> bool:
    """Whether the model solves an item, by the scores of its answers()."""
    if task.kind == "language_modeling":
        return scores[0].is_likeliest
    losses = [each.loss for each in scores]
    return losses.index(min(losses)) == int(item["gold"])


def scores(model: LanguageModel, task: Task, numbers: Sequence[int]) -> dict[int, list[Score]]:
    """Scores of the answers() of some items of a task, by the item's number."""
    prompts = [texts(task, number) for number in numbers]
    encoded = iter(encode([*chain(*prompts)]))
    length = model.config.context_length
    asked = [
        [answer.cropped(length) for answer in answers(task, [*islice(encoded, len(each))])]
        for each in prompts
    ]
    scored = iter(score(model, [*chain(*asked)]))
    return {n: [*islice(scored, len(each))] for n, each in zip(numbers, asked, strict=True)}


# ---------------------------------------------------------------------------------------------
# Figures


def evaluate(
    paths: tuple[Path, ...], bundle: Path, max_per_task: int | None, step: int | None
) -> list[dict[str, Any]]:
    """A row for each model, on rank 0: accuracy of each task, its standard error, and CORE.

    Computes in float32, on the GPUs of all ranks. ForgeError for a bundle or a model that cannot
    be read.
    """
    torch.set_float32_matmul_precision("high")
    ranks = Ranks.from_environment()
    device = ranks.device()
    with process_group(ranks, device, TIMEOUT_SECONDS):
        tasks: list[Task] = []
        on_all(ranks, lambda: tasks.extend(read_bundle(bundle, max_per_task)))
        models = (open_here(path, step, device, ranks) for path in paths)
        rows = [on_tasks(loaded, tasks, ranks) for loaded in models]
    return rows if ranks.is_first else []


def open_here(path: Path, step: int | None, device: torch.device, ranks: Ranks) -> Loaded:
    """open_model() on this rank. A ForgeError of one is raised on all."""
    opened: list[Loaded] = []  # which does not travel between the ranks
    on_all(ranks, lambda: opened.append(open_model(path, step, device, torch.float32)))
    return opened[0]


def on_tasks(loaded: Loaded, tasks: list[Task], ranks: Ranks) -> dict[str, Any]:
    """A model's row. The ranks share the items."""
    made, total = {}, sum(len(task.items) for task in tasks)
    hidden = None if ranks.is_first else True  # None: hidden unless on a terminal
    bar = tqdm(total=total, unit="item", desc=str(loaded.path), leave=False, disable=hidden)
    with bar as progress:
        for task in tasks:
            right: list[bool] = []
            for first in range(0, len(task.items), ITEMS_AT_ONCE):
                some = range(len(task.items))[first : first + ITEMS_AT_ONCE]
                found = scores(loaded.model, task, some[ranks.rank :: ranks.world_size])
                right += [is_right(task, task.items[n], each) for n, each in found.items()]
                progress.update(len(some))
            made[task.label] = figures(task, [*chain(*on_all(ranks, right.copy))])
    errors = [each["centered_error"] for each in made.values()]
    return {
        "model": str(loaded.path),
        "core": float(np.mean([each["centered"] for each in made.values()])),
        "core_error": math.sqrt(sum(error**2 for error in errors)) / len(errors),
        "num_tasks": len(tasks),
        "missing_tasks": [label for label in TASKS if label not in made],
        "tasks": made,
    }


def figures(task: Task, right: list[bool]) -> dict[str, float]:
    """Of one task; the errors are standard errors."""
    accuracy, count = float(np.mean(right)), len(right)
    error, scale = math.sqrt(accuracy * (1 - accuracy) / count), 1 / (1 - task.chance)
    return {
        "accuracy": accuracy,
        "accuracy_error": error,
        "centered": (accuracy - task.chance) * scale,
        "centered_error": error * scale,
        "num_items": count,
        "num_shots": task.num_shots,
    }


def show(rows: list[dict[str, Any]]) -> str:
    """A table with a line for each task and a column for each model; CORE is the last line."""
    names = [row["model"] for row in rows]
    widths = [max(24, len(name)) for name in names]
    columns = "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines = [f"{'task':32}  {'shots':>5}  {'items':>6}  {columns}"]
    for label, one in rows[0]["tasks"].items():
        cells = []
        for row, width in zip(rows, widths, strict=True):
            each = row["tasks"][label]
            cell = (
                f"{each['accuracy']:.4f} ± {each['accuracy_error']:.4f} ({each['centered']:+.3f})"
            )
            cells.append(f"{cell:>{width}}")
        lines.append(
            f"{label:32}  {one['num_shots']:>5}  {one['num_items']:>6,}  {'  '.join(cells)}"
        )
    cores = [f"{row['core']:.4f} ± {row['core_error']:.4f}" for row in rows]
    cells = [f"{core:>{width}}" for core, width in zip(cores, widths, strict=True)]
    lines.append(f"{'CORE':47}  {'  '.join(cells)}")
    lines.append("accuracy ± standard error (centred: 0 is guessing, 1 is all right)")
    if missing := rows[0]["missing_tasks"]:
        count = f"{rows[0]['num_tasks']} of CORE's {len(TASKS)} tasks"
        lines.append(f"This is over {count}; the bundle lacks {', '.join(missing)}")
    return "\n".join(lines)
