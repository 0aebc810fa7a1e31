"""How good the model is in mid-run: a loss on held-out windows, and a text to look at.

Neither changes anything about training: they draw nothing from any shared generator.
"""

import math

import numpy as np
import torch

from pipeline import shards
from trainer.config import Config
from trainer.cross_entropy import IGNORED
from trainer.model import LanguageModel
from trainer.ranks import Ranks, on_all, sum_over_ranks
from trainer.windows import Data, to_device, windows_at

VALIDATION_SEED = 0  # one choice of validation windows for every run


@torch.no_grad()
def validation_loss(
    model: LanguageModel, data: Data, config: Config, micro_batch_size: int, ranks: Ranks
) -> tuple[float, float]:
    """Validation loss over the config's fixed tokens: (nats a token, bits a byte of text).

    The same windows whatever the batch and the number of ranks.
    """
    device = next(model.parameters()).device
    length = config.model.context_length
    count = config.evaluate.num_tokens // length
    chosen = windows_at(np.arange(count), data.val.num_windows, VALIDATION_SEED)
    mine = chosen[ranks.rank :: ranks.world_size]
    token_bytes = torch.tensor([len(token) for token in data.vocabulary], device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add_mine() -> None:
        for first in range(0, len(mine), micro_batch_size):
            batch = data.val.read(mine[first : first + micro_batch_size])
            # The last one is filled up: another shape would be compiled anew.
            full = np.resize(batch, (micro_batch_size, length + 1))
            inputs, targets = to_device(full, device)
            sums[1] += token_bytes[targets[: len(batch)]].sum()
            if len(batch) < micro_batch_size:
                targets = targets.clone()
                targets[len(batch) :] = IGNORED
            with torch.enable_grad():  # as in training: without, it would be compiled once more
                x = model.trunk(inputs).detach()  # at once, or two graphs would be kept
            sums[0] += model.loss(x, targets)

    on_all(ranks, add_mine)
    nats, num_bytes = sum_over_ranks(sums, ranks).tolist()
    return nats / (count * length), nats / math.log(2) / num_bytes


@torch.no_grad()
def sample_text(model: LanguageModel, vocabulary: list[bytes], num_tokens: int, step: int) -> str:
    """A short text from <|endoftext|> on, to look at; its own generator, at temperature 0.8."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(step)
    length = min(num_tokens, model.config.context_length - 1)
    tokens = torch.full((1, length + 1), shards.EOT_TOKEN, device=device)
    n = -1
    # Always the full length, which is causal all the same: new shapes cost a GPU more.
    for n in range(length):
        logits = model.logits(model.hidden(tokens)[:, n]).float().cpu() / 0.8
        logits[:, shards.VOCAB_SIZE :] = -math.inf  # rows that a config may have added
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens[0, n + 1] = drawn.item()
        if drawn.item() == shards.EOT_TOKEN:
            break
    text = b"".join(vocabulary[t] for t in tokens[0, 1 : n + 2].tolist())
    return text.decode("utf-8", "replace")
