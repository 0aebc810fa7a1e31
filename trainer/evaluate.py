"""Validation loss and a sampled text in mid-run, without effect on training's random numbers."""

import math

import numpy as np
import torch

from pipeline import chatml, shards
from trainer.config import Config
from trainer.cross_entropy import IGNORED
from trainer.model import LanguageModel
from trainer.ranks import Ranks, on_all, sum_over_ranks
from trainer.windows import Data, to_device, windows_at

VALIDATION_SEED = 0  # one choice of validation windows for every run
OPENINGS = 64  # conversations, of which the shortest question is asked


@torch.no_grad()
def validation_loss(
    model: LanguageModel, data: Data, config: Config, micro_batch_size: int, ranks: Ranks
) -> tuple[float, float, dict[str, float]]:
    """Loss over the same validation windows for any batch and number of ranks.

    In nats per token, in bits per byte of text, and in nats for each part of a mixture. Its parts
    share the windows equally, as far as they have some, and are weighted by their train tokens.
    """
    device, index = next(model.parameters()).device, data.index
    length, size = config.model.context_length, micro_batch_size
    share = max(1, config.evaluate.num_tokens // length // len(data.parts))
    counts = [min(share, part.num_windows) for part in data.parts]
    token_bytes = torch.tensor([len(token) for token in data.vocabulary], device=device)
    sums = torch.zeros(len(counts), 3, dtype=torch.float64, device=device)  # nats, tokens, bytes

    def add_mine() -> None:
        for part, count, of_part in zip(data.parts, counts, sums, strict=True):
            mine = np.arange(ranks.rank, count, ranks.world_size)
            mine = windows_at(mine, part.num_windows, VALIDATION_SEED)
            for first in range(0, len(mine), size):
                batch = part.read(mine[first : first + size])
                # The last one is filled up: torch.compile would compile another shape anew.
                full = np.resize(batch, (size, length + 1))
                inputs, targets = to_device(full, device, part.is_chat)
                is_real = torch.arange(size, device=device)[:, None] < len(batch)
                targets = torch.where(is_real, targets, IGNORED)
                scored = targets[targets != IGNORED]
                of_part[1] += len(scored)
                of_part[2] += token_bytes[scored].sum()
                with torch.enable_grad():  # as in training, or it would be compiled again
                    x = model.trunk(inputs).detach()  # frees the graph at once
                of_part[0] += model.loss(x, targets)

    on_all(ranks, add_mine)
    sums = sum_over_ranks(sums, ranks).cpu()
    trained = [sum(s.num_tokens for s in index.of("train", part.part)) for part in data.parts]
    weights = torch.tensor(trained, dtype=torch.float64) / torch.tensor(counts)
    nats, num_tokens, num_bytes = (weights / weights.sum() @ sums).tolist()
    losses = {str(p.part): float(row[0] / row[1]) for p, row in zip(data.parts, sums, strict=True)}
    return nats / num_tokens, nats / math.log(2) / num_bytes, losses


def opening(data: Data) -> list[int]:
    """What a sample begins with: <|endoftext|>, or a short question of the validation split."""
    if not data.val.is_chat:
        return [shards.EOT_TOKEN]
    windows = data.val.read(np.arange(min(OPENINGS, data.val.num_windows)))
    first: list[list[int]] = [w[: np.argmax(chatml.trained(w))].tolist() for w in windows]
    return min(first, key=len)


@torch.no_grad()
def sample_text(model: LanguageModel, data: Data, num_tokens: int, step: int) -> str:
    """A short text, of conversations an answer, at temperature 0.8."""
    device, begun = next(model.parameters()).device, opening(data)
    generator = torch.Generator().manual_seed(step)
    length = min(len(begun) + num_tokens, model.config.context_length)
    tokens = torch.full((1, length), shards.EOT_TOKEN, device=device)
    tokens[0, : len(begun)] = torch.tensor(begun)
    text = b"".join(data.vocabulary[token] for token in begun)
    # Always the full length, as attention is causal: new shapes would cost a GPU more.
    for n in range(len(begun), length):
        logits = model.logits(model.hidden(tokens)[:, n - 1]).float().cpu() / 0.8
        logits[:, len(data.vocabulary) :] = -math.inf  # rows that a config may have added
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator).item()
        tokens[0, n] = token
        text += data.vocabulary[int(token)]
        if token in (shards.EOT_TOKEN, chatml.IM_END):
            break
    return text.decode("utf-8", "replace")
