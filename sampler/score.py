"""Scores parts of texts with a model: what every figure of forge-eval is made of."""

import math
from collections import ChainMap
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sampler.load import Loaded
from trainer.model import LanguageModel
from trainer.ranks import Ranks, on_all

ITEMS_AT_ONCE = 1024  # whose tokens are held
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


class Answer(NamedTuple):
    """A text (n,), and which of its tokens are scored (n,); the first never is."""

    tokens: Tokens
    is_scored: npt.NDArray[np.bool_]

    @staticmethod
    def ending(tokens: Tokens, start: int, most: int) -> "Answer":
        """The last `most` of the tokens; those from `start` on are scored."""
        return Answer(tokens[-most:], (np.arange(len(tokens)) >= start)[-most:])


def score_items(
    loaded: Loaded,
    ranks: Ranks,
    what: str,
    count: int,
    ask: Callable[[Sequence[int]], list[list[Answer]]],
    at_once: int = ITEMS_AT_ONCE,
) -> list[list[Score]]:
    """The scores of each item's answers, of items 0 to `count` - 1, which the ranks share.

    `ask` gives the answers of some items; those of `at_once` items are held at a time. Progress is
    of `what` they are.
    """
    mine: dict[int, list[Score]] = {}
    hidden = None if ranks.is_first else True  # None: hidden unless on a terminal
    label = f"{loaded.path}, {what}"
    with tqdm(total=count, desc=label, leave=False, disable=hidden) as progress:
        for first in range(0, count, at_once):
            some = range(count)[first : first + at_once]
            numbers = some[ranks.rank :: ranks.world_size]
            asked = ask(numbers)
            scored = iter(score(loaded.model, [*chain(*asked)]))
            mine |= {n: [*islice(scored, len(a))] for n, a in zip(numbers, asked, strict=True)}
            progress.update(len(some))
    found = ChainMap(*on_all(ranks, lambda: mine))
    return [found[number] for number in range(count)]


@torch.inference_mode()
def score(model: LanguageModel, asked: Sequence[Answer]) -> list[Score]:
    """The score of each answer. Answers that differ in their last token only share one row."""
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
                at = np.flatnonzero(answer.is_scored[1:])
                places.append(row * longest + at)
                targets.append(answer.tokens[at + 1])
                ends.append(ends[-1] + len(at))
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
    parts = torch.split(x, at_once), torch.split(targets, at_once)
    for part, right in zip(*parts, strict=True):
        logits = model.logits(part).float()
        losses.append(F.cross_entropy(logits, right, reduction="none"))
        hits.append(logits.argmax(-1) == right)
    return torch.cat(losses).cpu().numpy(), torch.cat(hits).cpu().numpy()


def table(lines: list[list[str]]) -> str:
    """Lines of cells in columns, the first one flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )
