"""Draws the next tokens from logits, by temperature, top-k, top-p, min-p and repetition penalty."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import ForgeError

MIN_TEMPERATURE = 1e-3  # below it, the likeliest token is taken
MAX_STEPS = 32  # between two looks at the tokens: waiting for a GPU costs as much as a step


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the filters apply in this order. Temperature 0 is greedy."""

    repetition_penalty: float = 1.0  # Keskar et al. 2019, "CTRL", section 4.1
    temperature: float = 0.8
    top_k: int | None = None  # from this many of the likeliest tokens
    top_p: float | None = None  # from the likeliest that together reach this probability
    min_p: float | None = None  # from those with this share of the likeliest one's probability

    def __post_init__(self) -> None:
        for name in ("repetition_penalty", "temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                what = f"--{name.replace('_', '-')} must be a finite number, not {value}"
                raise ForgeError(what, fix="give it one, or leave it out")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1


class Steps:
    """Up to MAX_STEPS steps of B rows on the device: what they draw from, and what they drew."""

    def __init__(self, num_rows: int, device: torch.device, log: bool) -> None:
        shape = (MAX_STEPS, num_rows)
        self.noise = torch.zeros(shape, dtype=torch.float64, device=device)  # uniform in [0, 1)
        self.drawn = torch.zeros(shape, dtype=torch.long, device=device)
        self.logs = torch.zeros(shape, device=device) if log else None  # log-probabilities
        self.number = torch.zeros(num_rows, dtype=torch.long, device=device)  # of the next step
        self.last = torch.zeros(num_rows, dtype=torch.long, device=device)  # each row's last token


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with those of the tokens in `seen` (B, V) lowered."""
    less = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, less, logits)


def draw(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """Next tokens (B,) from logits (B, V), by the inverse of the cumulative distribution.

    `noise` (B,) is float64, uniform in [0, 1). Logits may be bfloat16, in which the likeliest are
    found faster; the rest is computed in float32. Nothing here may touch the host, not even to copy
    a number: a CUDA graph records it. fast.draw_top() chooses the same tokens.
    """
    if sampling.is_greedy:
        return logits.argmax(-1)
    order = None
    if sampling.top_k is not None:
        logits, order = logits.topk(min(sampling.top_k, logits.shape[-1]))
    elif sampling.top_p is not None:
        logits, order = logits.sort(descending=True)
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # 0 for the first, which always stays
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    if sampling.min_p is not None:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    # In float64, so that the order in which a GPU adds cannot change the choice.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    chosen = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)
    chosen = chosen.clamp(max=logits.shape[-1] - 1)
    return (chosen if order is None else order.gather(1, chosen))[:, 0]
