"""Validation loss and a sampled text in mid-run, without effect on training's random numbers."""

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
    """Loss over the same validation windows for any batch and number of ranks.

    In nats per token and in bits per byte of text.
    """
    device = next(model.parameters()).device
    length = config.model.context_length
    count = config.evaluate.num_tokens // length
    mine = np.arange(ranks.rank, count, ranks.world_size)
    mine = windows_at(mine, data.val.num_windows, VALIDATION_SEED)
    token_bytes = torch.tensor([len(token) for token in data.vocabulary], device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add_mine() -> None:
        for first in range(0, len(mine), micro_batch_size):
            batch = data.val.read(mine[first : first + micro_batch_size])
            # The last one is filled up: torch.compile would compile another shape anew.
            full = np.resize(batch, (micro_batch_size, length + 1))
            inputs, targets = to_device(full, device)
            sums[1] += token_bytes[targets[: len(batch)]].sum()
            is_real = torch.arange(micro_batch_size, device=device)[:, None] < len(batch)
            targets = torch.where(is_real, targets, IGNORED)
            with torch.enable_grad():  # as in training, or it would be compiled again
                x = model.trunk(inputs).detach()  # frees the graph at once
            sums[0] += model.loss(x, targets)

    on_all(ranks, add_mine)
    nats, num_bytes = sum_over_ranks(sums, ranks).tolist()
    return nats / (count * length), nats / math.log(2) / num_bytes


@torch.no_grad()
def sample_text(model: LanguageModel, vocabulary: list[bytes], num_tokens: int, step: int) -> str:
    """A short text after <|endoftext|>, at temperature 0.8."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(step)
    length = min(num_tokens, model.config.context_length - 1)
    tokens = torch.full((1, length + 1), shards.EOT_TOKEN, device=device)
    text = b""
    # Always the full length, as attention is causal: new shapes would cost a GPU more.
    for n in range(length):
        logits = model.logits(model.hidden(tokens)[:, n]).float().cpu() / 0.8
        logits[:, shards.VOCAB_SIZE :] = -math.inf  # rows that a config may have added
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator).item()
        tokens[0, n + 1] = token
        text += vocabulary[int(token)]
        if token == shards.EOT_TOKEN:
            break
    return text.decode("utf-8", "replace")
