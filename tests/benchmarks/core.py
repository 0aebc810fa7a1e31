"""forge-eval --core beside nanochat's own functions: whether the answers agree, and the speed.

    python -m tests.benchmarks.core MODEL --bundle DIR --nanochat nanochat/core_eval.py --items 2000

MODEL is anything that forge-eval opens; both compute with it, in float32. The items are the first
ones of every task, as many of each as make --items in all (all of a small task). Every item on
which the two differ is printed, with the scores of its answers: the winner's lead says how close it
was. core_eval.py is nanochat's file, as it is (it imports torch and jinja2 only).
"""

import importlib.util
import time
from pathlib import Path
from typing import Any

import click
import torch

from pipeline.shards import EOT_TOKEN
from pipeline.tokenizer import reference
from sampler import core, score
from sampler.bundle import read_bundle, texts
from sampler.load import best_device, open_model
from trainer.ranks import Ranks

FILE = click.Path(path_type=Path, exists=True)


class Tokenizer:
    """nanochat's interface."""

    def get_bos_token_id(self) -> int:
        return EOT_TOKEN

    def __call__(self, texts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *reference().encode_ordinary(text)] for text in texts]


def load_theirs(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("core_eval", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def share(sizes: list[int], total: int) -> list[int]:
    """How many items of each task make `total`: equally many, or all of a small one."""
    chosen = [0] * len(sizes)
    for place, number in enumerate(sorted(range(len(sizes)), key=lambda n: sizes[n])):
        left = total - sum(chosen)
        chosen[number] = min(sizes[number], -(-left // (len(sizes) - place)))
    return chosen


@click.command()
@click.argument("model", type=FILE)
@click.option("--bundle", type=FILE, required=True)
@click.option("--nanochat", type=FILE, required=True, help="nanochat's core_eval.py.")
@click.option("--items", type=int, default=2000, show_default=True)
def main(model: Path, bundle: Path, nanochat: Path, items: int) -> None:
    torch.set_float32_matmul_precision("high")
    theirs, device = load_theirs(nanochat), best_device()
    loaded = open_model(model, None, device, torch.float32)

    class Callable:
        max_seq_len = loaded.model.config.context_length

        def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
            return loaded.model.logits(loaded.model.hidden(tokens)).float()

    tasks = read_bundle(bundle, None)
    counts = share([len(task.items) for task in tasks], items)
    length = loaded.model.config.context_length
    warm = core.answers(tasks[0], core.encode(texts(tasks[0], 0)), length)
    score.score(loaded.model, warm)
    print(f"{'task':32} {'items':>6} {'right':>6} {'differ':>6} {'ours s':>8} {'theirs s':>8}")
    total, differ, ours_seconds, theirs_seconds = 0, 0, 0.0, 0.0
    for task, count in zip(tasks, counts, strict=True):
        began = time.perf_counter()
        scores = core.scores(loaded, task, count, Ranks())
        ours = [core.is_right(task, task.items[n], scores[n]) for n in range(count)]
        between = time.perf_counter()
        about = {
            "task_type": task.kind,
            "num_fewshot": task.num_shots,
            "continuation_delimiter": task.delimiter,
        }
        given = (Callable(), Tokenizer(), task.items, device, about)
        right = [bool(theirs.evaluate_example(n, *given)) for n in range(count)]
        ended = time.perf_counter()
        wrong = [n for n in range(count) if ours[n] != right[n]]
        seconds = between - began, ended - between
        print(f"{task.label:32} {count:6,} {sum(ours):6,} {len(wrong):6,} {seconds[0]:8.2f} "
              f"{seconds[1]:8.2f}", flush=True)  # fmt: skip
        for n in wrong:
            print(f"    item {n}: ours {ours[n]}, theirs {right[n]}; {scores[n]}")
        total, differ = total + count, differ + len(wrong)
        ours_seconds, theirs_seconds = ours_seconds + seconds[0], theirs_seconds + seconds[1]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    print(f"{total:,} items: {1 - differ / total:.3%} agree; {theirs_seconds / ours_seconds:.1f} "
          f"times as fast on {name}")  # fmt: skip


if __name__ == "__main__":
    main()
