"""Reads a bundle of CORE's tasks, and writes each item's prompts as that evaluation writes them.

A bundle is a folder or a .zip as people download it: core.yaml (the tasks), eval_meta_data.csv
(what guessing reaches) and eval_data/ (an item a line). Source: nanochat's scripts/base_eval.py and
nanochat/core_eval.py, for which items, which examples, and every space between them.
"""

import csv
import json
import random
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ForgeError

ORDER_SEED, SHOTS_SEED = 1337, 1234  # of the items, and of an item's examples
MISFITS = (ValueError, LookupError, TypeError, AttributeError)  # of values in a damaged file
UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, yaml.YAMLError)

Item = dict[str, Any]
BundleFolder = Path | zipfile.Path


@dataclass(frozen=True)
class Task:
    """One task of a bundle. `chance` is the accuracy of guessing, between 0 and 1."""

    label: str
    kind: str
    num_shots: int
    delimiter: str  # between a question and its answer
    chance: float
    items: list[Item]

    def shots(self, number: int) -> list[Item]:
        """The examples in front of item `number`: others of the same task."""
        others = [n for n in range(len(self.items)) if n != number]
        chosen = random.Random(SHOTS_SEED + number).sample(others, self.num_shots)
        return [self.items[n] for n in chosen]

    def answered(self, item: Item) -> list[str]:
        """An item with each of its answers; of language modelling, without one and with it."""
        match self.kind, item:
            case "language_modeling", {"context": context, "continuation": ending}:
                pairs = [(context.strip(), ""), (context.strip(), ending)]
            case "schema", {"context_options": [*contexts], "continuation": ending}:
                pairs = [(context, ending) for context in contexts]
            case "multiple_choice", {"query": query, "choices": [*choices]}:
                pairs = [(query, choice) for choice in choices]
            case _:
                raise ValueError(f"{self.label}: no {self.kind} item: {str(item)[:80]}")
        return [self.delimiter.join(pair) for pair in pairs]

    def right(self, item: Item) -> int:
        """Which of answered() is right."""
        return 1 if self.kind == "language_modeling" else int(item["gold"])


def read_bundle(path: Path, max_per_task: int | None) -> list[Task]:
    """The tasks of a bundle, a folder or a .zip; those whose file is missing are left out.

    `max_per_task` items of each, always the same. ForgeError if the bundle cannot be used.
    """
    try:
        root = _root(path)
        listed = yaml.safe_load((root / "core.yaml").read_text("utf-8"))["icl_tasks"]
        rows = csv.DictReader((root / "eval_meta_data.csv").read_text("utf-8").splitlines())
        chances = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
        tasks = [_read_task(root, entry, chances, max_per_task) for entry in listed]
    except (*UNREADABLE, *MISFITS) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        what = f"cannot read the evaluation bundle: {reason}"
        raise ForgeError(what, where=path, fix="download and unpack it again") from error
    if not (found := [task for task in tasks if task is not None]):
        raise ForgeError("no task of the bundle has its file", where=path, fix="unpack it again")
    return found


def _root(path: Path) -> BundleFolder:
    """The folder that holds core.yaml: the bundle itself, or the one folder in it."""
    given = zipfile.Path(path) if path.is_file() else path
    for folder in (given, given / "eval_bundle"):
        if (folder / "core.yaml").is_file():
            return folder
    fix = "give the folder or .zip with core.yaml, eval_meta_data.csv and eval_data/"
    what = "not an evaluation bundle: no core.yaml" if path.exists() else "no such file or folder"
    raise ForgeError(what, where=path, fix=fix)


def _read_task(
    root: BundleFolder, entry: dict[str, Any], chances: dict[str, float], max_per_task: int | None
) -> Task | None:
    label, kind, num_shots = entry["label"], entry["icl_task_type"], int(entry["num_fewshot"][0])
    file = root / "eval_data" / entry["dataset_uri"]
    if not file.is_file():
        return None
    items = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line.strip()]
    random.Random(ORDER_SEED).shuffle(items)
    items = items[:max_per_task]
    if len(items) <= num_shots:
        what = f"{len(items)} items are too few for {num_shots} examples in front of each"
        raise ForgeError(what, where=label, fix=f"--max-per-task {num_shots + 1} at least")
    delimiter = entry.get("continuation_delimiter", " ")
    task = Task(label, kind, num_shots, delimiter, chances[label], items)
    for number, item in enumerate(items):
        texts, right = task.answered(item), task.right(item)
        if not 0 <= right < len(texts):
            raise ValueError(f"{label}, item {number}: gold {right} of {len(texts)}")
    return task


def texts(task: Task, number: int) -> list[str]:
    """An item's texts, examples included: one for each of its answers."""
    shots = task.shots(number)
    front = "".join(f"{task.answered(shot)[task.right(shot)]}\n\n" for shot in shots)
    found = [front + text for text in task.answered(task.items[number])]
    if task.kind == "language_modeling":
        found[0] = found[0].strip()
    return found
