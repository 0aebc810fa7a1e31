"""CORE, the figure that the field quotes for base models: 22 tasks, asked with examples.

Li et al. 2024, "DataComp-LM" (arXiv:2406.11794), as nanochat computes it. An item is right when

    multiple_choice     of several endings of one text, the right one has the lowest mean loss
    schema              of several beginnings of one ending, the right one gives it the lowest
    language_modeling   greedy decoding would write the continuation

A task's centred accuracy is 0 for guessing and 1 for all right; CORE is its mean over the tasks.
"""

import math
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from pipeline import tokenizer
from pipeline.shards import EOT_TOKEN
from sampler.bundle import Item, Task, texts
from sampler.load import Loaded
from sampler.score import Answer, Score, Tokens, score_items, table
from trainer.ranks import Ranks

TASKS = (  # in full
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa",
    "commonsense_qa", "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd",
    "winogrande", "bigbench_dyck_languages", "agi_eval_lsat_ar", "bigbench_cs_algorithms",
    "bigbench_operators", "bigbench_repeat_copy_logic", "squad", "coqa", "boolq",
    "bigbench_language_identification",
)  # fmt: skip


def answers(task: Task, encoded: list[Tokens], length: int) -> list[Answer]:
    """What of an item's encoded texts is scored: where they differ, or the common ending.

    Of each text, its last `length` tokens.
    """
    if task.kind == "schema":
        ending = _common_length([tokens[::-1] for tokens in encoded])
        return [Answer.ending(tokens, len(tokens) - ending, length) for tokens in encoded]
    start = _common_length(encoded)
    if task.kind == "language_modeling":
        return [Answer.ending(encoded[1], start, length)]
    # At least the last token: one choice may begin with another.
    return [Answer.ending(tokens, min(start, len(tokens) - 1), length) for tokens in encoded]


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


def is_right(task: Task, item: Item, scores: list[Score]) -> bool:
    """Whether the model solves an item, by the scores of its answers()."""
    if task.kind == "language_modeling":
        return scores[0].is_likeliest
    losses = [each.loss for each in scores]
    return losses.index(min(losses)) == task.right(item)


def scores(loaded: Loaded, task: Task, count: int, ranks: Ranks) -> list[list[Score]]:
    """Scores of the answers() to the first `count` items of a task. The ranks share the items."""
    length = loaded.model.config.context_length

    def ask(numbers: Sequence[int]) -> list[list[Answer]]:
        prompts = [texts(task, number) for number in numbers]
        encoded = iter(encode([*chain(*prompts)]))
        return [answers(task, [*islice(encoded, len(each))], length) for each in prompts]

    return score_items(loaded, ranks, task.label, count, ask)


def on_tasks(tasks: list[Task], ranks: Ranks, loaded: Loaded) -> dict[str, Any]:
    """A model's row: accuracy of each task, its standard error, and CORE."""
    made = {}
    for task in tasks:
        found = zip(task.items, scores(loaded, task, len(task.items), ranks), strict=True)
        made[task.label] = figures(task, [is_right(task, item, each) for item, each in found])
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
    lines = [["task", "shots", "items", *(row["model"] for row in rows)]]
    for label, one in rows[0]["tasks"].items():
        line = [label, str(one["num_shots"]), f"{one['num_items']:,}"]
        for each in (row["tasks"][label] for row in rows):
            accuracy = f"{each['accuracy']:.4f} ± {each['accuracy_error']:.4f}"
            line.append(f"{accuracy} ({each['centered']:+.3f})")
        lines.append(line)
    cores = [f"{row['core']:.4f} ± {row['core_error']:.4f}" for row in rows]
    shown = table([*lines, ["CORE", "", "", *cores]])
    shown += "\naccuracy ± standard error (centred: 0 is guessing, 1 is all right)"
    if missing := rows[0]["missing_tasks"]:
        count = f"{rows[0]['num_tasks']} of CORE's {len(TASKS)} tasks"
        shown += f"\nThis is over {count}; the bundle lacks {', '.join(missing)}"
    return shown
