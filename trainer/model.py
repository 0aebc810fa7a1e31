"""Two families of models, GPT-2 and Qwen3: tokens (B, T) -> logits (B, T, V).

    part        GPT2                   Qwen3                 why
    norms       LayerNorm              RMSNorm               mean and shift are not needed
    positions   learned, added once    rotary, in attention  only the distance counts
    q and k     not normalized         normalized            stable at higher rates
    k and v     for each head          shared by heads       a smaller cache
    MLP         GELU, two matrices     gated SiLU, three     a lower loss for equally many weights
    biases      everywhere             none                  not needed, and slower

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and openai/gpt-2
src/model.py; Yang et al. 2025, "Qwen3 Technical Report". Dimensions: B batch, T time, C embedding,
H heads, K heads of keys and values, D head size, V vocabulary.
"""

# Modules are called without types.
# mypy: disable-error-code="no-any-return"

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from xxhash import xxh32_intdigest

from trainer.config import ModelConfig
from trainer.cross_entropy import HeadLoss

LAYER_NORM_EPS, RMS_NORM_EPS = 1e-5, 1e-6


class Cache(Protocol):
    """Keys and values of earlier tokens (sampler/decode.py has one)."""

    positions: Tensor  # of the new tokens in their texts: (T,) or (B, T)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add k and v (B, K, T, D), and attend from q (B, H, T, D) over all."""


# ------------------------------------------------------------------------- both families


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: torch's own initialization takes seconds, and init_weights() follows."""


class Embedding(nn.Embedding):
    reset_parameters = Linear.reset_parameters


class Fused(Linear):
    """Several matrices of one input as one product, with their outputs side by side."""

    def __init__(self, size: int, sizes: tuple[int, ...], bias: bool) -> None:
        super().__init__(size, sum(sizes), bias=bias)
        self.sizes = sizes  # rows of each


class Block(nn.Module):
    def __init__(self, norms: tuple[nn.Module, nn.Module], attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn = norms[0], attn
        self.ln_2, self.mlp = norms[1], mlp

    def forward(self, x: Tensor, cache: Cache | None, *turn: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C); `turn` is Qwen3's rotary table."""
        x = x + self.attn(self.ln_1(x), cache, *turn)
        return x + self.mlp(self.ln_2(x))


def attend(
    attention: "Attention | GroupedAttention", cache: Cache | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Causal attention: q (B, H, T, D), k and v (B, K, T, D) -> (B, T, H * D).

    Training does not read attention.layer, which would make torch.compile compile every block.
    """
    if cache is None:
        shared = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    else:
        y = cache.attend(attention.layer, q, k, v)
    return y.transpose(1, 2).flatten(2)


class LanguageModel(nn.Module, ABC):
    def __init__(
        self, config: ModelConfig, norm: Callable[[], nn.Module], attention: Any, mlp: Any
    ) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.embedding_size)
        if config.family == "gpt2":
            self.wpe = Embedding(config.context_length, config.embedding_size)
        self.h = nn.ModuleList(
            Block((norm(), norm()), attention(config, layer), mlp(config))
            for layer in range(config.num_layers)
        )
        self.ln_f = norm()
        self.trunk = self.hidden  # for training; backends.py puts a faster one here

    def init_weights(self, seed: int) -> None:
        """Matrices normal, biases 0, gains 1: the same on every rank. The model is on the CPU."""

        def fill(name: str, weight: Tensor) -> None:
            if weight.ndim == 2:  # each from its own stream, whatever the order of the threads
                number = xxh32_intdigest(f"{seed} {name}".encode())
                generator = torch.Generator().manual_seed(number)
                nn.init.normal_(weight, 0.0, self.init_std(name, weight), generator)
            else:
                nn.init.constant_(weight, 0.0 if name.endswith("bias") else 1.0)

        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, *zip(*self.named_parameters(), strict=True)))

    @abstractmethod
    def init_std(self, name: str, weight: Tensor) -> float: ...

    @abstractmethod
    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The last layer's normalized output: tokens (B, T) -> (B, T, C)."""

    def logits(self, x: Tensor) -> Tensor:
        """The tied head: (..., C) -> (..., V)."""
        return F.linear(x, self.wte.weight)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Sum of the losses in nats, over targets (B, T) that are not -100; x (B, T, C).

        A sum rounds nothing in backward: the optimizer divides, in float32.
        """
        weight = self.wte.weight
        if not torch.is_grad_enabled():  # a Function sees requires_grad, not the grad mode
            weight = weight.detach()
        x, targets = x.flatten(0, 1), targets.flatten()
        return HeadLoss.apply(x, weight, targets)  # type: ignore[no-untyped-call]

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss that training minimizes."""
        return self.loss(self.trunk(tokens), targets)


def build_model(config: ModelConfig) -> "GPT2 | Qwen3":
    """A model whose matrices are not filled: init_weights() or a loaded state does that."""
    return Qwen3(config) if config.family == "qwen3" else GPT2(config)


# -------------------------------------------------------------------------------- GPT-2


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads = layer, config.num_heads
        size = config.embedding_size
        self.c_attn = Fused(size, (size, size, size), config.bias)
        self.c_proj = Linear(size, size, bias=config.bias)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, _ = x.shape
        # (B, T, 3C) -> three of (B, H, T, D)
        q, k, v = self.c_attn(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.c_proj(attend(self, cache, q, k, v))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.embedding_size
        self.c_fc = Linear(size, 4 * size, bias=config.bias)
        self.c_proj = Linear(4 * size, size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(gelu(self.c_fc(x)))


def gelu(x: Tensor) -> Tensor:
    """GPT-2's tanh approximation of GELU (Hendrycks and Gimpel 2016)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # The same function, as (1 + tanh u) / 2 = sigmoid(2u), in far fewer instructions of a GPU.
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


class GPT2(LanguageModel):
    ln_f: nn.LayerNorm

    def __init__(self, config: ModelConfig) -> None:
        norm = partial(nn.LayerNorm, config.embedding_size, bias=config.bias)
        super().__init__(config, norm, Attention, MLP)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        new = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(new if cache is None else cache.positions)
        for block in self.h:
            x = block(x, cache)
        return self.ln_f(x)

    def init_std(self, name: str, weight: Tensor) -> float:
        """GPT-2's: 0.02, for positions 0.01 (openai/gpt-2 src/model.py), and for projections into
        the residual stream 0.02/sqrt(2L) (the paper, 2.3).

        Except the token embedding: at most 0.3/sqrt(C). It is also the head, and 0.02 would start
        with logits of variance C * 0.0004 and a loss 0.15 (C = 768) to 0.4 (C = 1600) above ln V.
        """
        small = {"wte.weight": 0.3 / math.sqrt(self.config.embedding_size), "wpe.weight": 0.01}
        adds = name.endswith("c_proj.weight")
        usual = 0.02 / math.sqrt(2 * self.config.num_layers) if adds else 0.02
        return min(usual, small.get(name, usual))


# -------------------------------------------------------------------------------- Qwen3


def rotary_table(config: ModelConfig) -> Tensor:
    """Cosines and sines of the angles of every position: (2, T, 1, D) in float32.

    Number n of a head's first half and number n of its second are a pair, rotated at position t by
    t * theta^(-2n/D) (Su et al. 2021, "RoFormer"). The sines have the signs that rotate() needs.
    """
    size = config.head_dim()
    frequencies = config.rope_theta ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(config.context_length)[:, None] * frequencies  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)])[:, :, None]


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the pairs of x (B, T, heads, D) by `turn`, rows of rotary_table()."""
    cos, sin = turn
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([second, first], -1) * sin).to(x.dtype)


class GroupedAttention(nn.Module):
    """H heads of queries over K of keys and values (Ainslie et al. 2023, "GQA")."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size = layer, config.head_dim()
        size, queries = config.embedding_size, config.num_heads * self.head_size
        keys = config.kv_heads() * self.head_size
        self.sizes = (queries, keys, keys)
        self.qkv_proj = Fused(size, self.sizes, bias=False)
        # Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters".
        self.q_norm = nn.RMSNorm(self.head_size, eps=RMS_NORM_EPS)
        self.k_norm = nn.RMSNorm(self.head_size, eps=RMS_NORM_EPS)
        self.o_proj = Linear(queries, size, bias=False)

    def forward(self, x: Tensor, cache: Cache | None, turn: Tensor) -> Tensor:
        parts = self.qkv_proj(x).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in parts)  # (B, T, heads, D)
        q, k = rotate(self.q_norm(q), turn), rotate(self.k_norm(k), turn)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return self.o_proj(attend(self, cache, q, k, v))


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, inside = config.embedding_size, config.mlp_dim()
        self.gate_up_proj = Fused(size, (inside, inside), bias=False)
        self.down_proj = Linear(inside, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Qwen3(LanguageModel):
    ln_f: nn.RMSNorm

    def __init__(self, config: ModelConfig) -> None:
        norm = partial(nn.RMSNorm, config.embedding_size, eps=RMS_NORM_EPS)
        super().__init__(config, norm, GroupedAttention, GatedMLP)
        self.turns = rotary_table(config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """For to(): the table moves to the device but stays float32, unlike a buffer."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.turns = self.turns.to(self.wte.weight.device)
        return self

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        x = self.wte(tokens)
        turn = self.turns[:, : tokens.shape[1]] if cache is None else self.turns[:, cache.positions]
        for block in self.h:
            x = block(x, cache, turn)
        return self.ln_f(x)

    def init_std(self, name: str, weight: Tensor) -> float:
        """As usual with Muon: 0 for projections into the residual stream, so that blocks add
        nothing at first, and an output deviation of 1/2 for other matrices, whatever C.

        At first the head sees the normalized token embedding alone, so a token's own logit is C
        times the embedding's deviation: 0.005 keeps the first loss at ln V.
        """
        if name == "wte.weight":
            return 0.005
        adds = name.endswith(("o_proj.weight", "down_proj.weight"))
        return 0.0 if adds else 0.5 / math.sqrt(weight.shape[1])
