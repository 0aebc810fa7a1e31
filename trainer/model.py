"""GPT-2 as published: tokens (B, T) -> logits (B, T, V).

Before: windows.py. After: loop.py (loss) and sampler/generate.py (text).

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; code openai/gpt-2
src/model.py. Learned positions, pre-LayerNorm, tanh-approximated GELU, head tied to the token
embedding. Modules carry the names of transformers' GPT2LMHeadModel, so that export is a transpose.

Dimensions: B batch, T time, C embedding, H heads, D = C / H, V vocabulary.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.cross_entropy import HeadLoss


class Cache(Protocol):
    """Keys and values of the tokens before (sampler/decode.py has one)."""

    positions: Tensor  # of the tokens at hand in their texts: (T,) or (B, T)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take in k and v, and attend from q over all that is there: each (B, H, T, D)."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads = layer, config.num_heads
        size = config.embedding_size
        self.c_attn = nn.Linear(size, 3 * size, bias=config.bias)
        self.c_proj = nn.Linear(size, size, bias=config.bias)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        B, T, C = x.shape  # noqa: N806
        # (B, T, 3C) -> three of (B, H, T, D)
        q, k, v = self.c_attn(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = cache.attend(self.layer, q, k, v)
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return out


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.embedding_size
        self.c_fc = nn.Linear(size, 4 * size, bias=config.bias)
        self.c_proj = nn.Linear(4 * size, size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(gelu(self.c_fc(x)))
        return out


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks and Gimpel 2016), as GPT-2 has it."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # The same function: (1 + tanh u) / 2 = sigmoid(2u). A GPU takes far fewer instructions for it.
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.embedding_size, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.embedding_size, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT2(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.embedding_size)
        self.wpe = nn.Embedding(config.context_length, config.embedding_size)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.embedding_size, bias=config.bias)
        self.trunk = self.hidden  # what training runs; loop.py may put a compiled one here

    def init_weights(self, seed: int) -> None:
        """GPT-2's initialization, the same on every rank and device.

        Normal with 0.02 for weights and 0.01 for positions (openai/gpt-2 src/model.py), zero for
        biases, and projections into the residual stream scaled by 1/sqrt(2L) (the paper, 2.3).
        One number departs from it: the token embedding is at most 0.3/sqrt(C). It is the head too,
        and at 0.02 its logits start with a variance of C * 0.0004, which lifts the first loss
        0.15 (C = 768) to 0.4 (C = 1600) above ln V; this way every size starts at ln V.
        """
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / math.sqrt(2 * self.config.num_layers)
        embedding = min(0.02, 0.3 / math.sqrt(self.config.embedding_size))
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                deviation = residual if name.endswith("c_proj.weight") else 0.02
                deviation = {"wte.weight": embedding, "wpe.weight": 0.01}.get(name, deviation)
                drawn = torch.empty(weight.shape).normal_(0.0, deviation, generator=generator)
                with torch.no_grad():
                    weight.copy_(drawn)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The last layer's normalized output: tokens (B, T) -> (B, T, C)."""
        new = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(new if cache is None else cache.positions)
        for block in self.h:
            x = block(x, cache)
        out: Tensor = self.ln_f(x)
        return out

    def logits(self, x: Tensor) -> Tensor:
        """The tied head: (..., C) -> (..., V)."""
        return F.linear(x, self.wte.weight)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Sum of the losses in nats, over targets (B, T) that are not -100; x (B, T, C).

        A sum, so that nothing is rounded on the way back: the optimizer divides, in float32.
        """
        weight = self.wte.weight
        if not torch.is_grad_enabled():  # a Function sees requires_grad, not the grad mode
            weight = weight.detach()
        loss: Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, 1), weight, targets.flatten()
        )
        return loss

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """What training minimizes: the trunk, and the loss of what comes out of it."""
        return self.loss(self.trunk(tokens), targets)
