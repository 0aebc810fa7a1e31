"""Linear layers by products of 8-bit integers, forward and backward: for GPUs that do many of them.

Each side of a product is rounded to the nearest of 255 steps, with a scale for each of its rows, so
the sum over the inner dimension is one of integers. As the three products of a layer have three
inner dimensions, an array is rounded once along its rows and once along its columns. The choice of
rows and of no random rounding is torchao's (its prototype of quantized training). Weights, sums,
attention and the head stay as they are, and validation and samples compute in bfloat16.
"""

# torch has no types for Function.apply.
# mypy: disable-error-code="no-untyped-call"

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer import fused
from trainer.config import Config
from trainer.cross_entropy import gpu_kernels
from trainer.memory import MOST_INT8_TOKENS
from trainer.model import LanguageModel, Linear

MULTIPLE = 128  # of all sizes
ROUND_TILE = 128, 64
# Rows, columns and depth of a product's tile: 64 KB of shared memory, of the 99 that Ada has.
TILE, GROUP = (128, 128, 128), 8


class Rounded(NamedTuple):
    """Integers (rows, size), and the largest |number| of each row before: 127 units."""

    integers: Tensor
    tops: Tensor


def round_both(x: Tensor) -> tuple[Rounded, Rounded]:
    """x (n, m), rounded along its rows, and transposed (m, n) along its columns."""
    x, (n, m) = x.contiguous(), x.shape
    rows, columns = (  # apart, because only the columns are kept for the way back
        Rounded(x.new_empty(shape, dtype=torch.int8), x.new_zeros(shape[0], dtype=torch.float32))
        for shape in ((n, m), (m, n))
    )
    grid, kernels = (n // ROUND_TILE[0], m // ROUND_TILE[1]), gpu_kernels()
    kernels.largest[grid](x, rows.tops, columns.tops, m, *ROUND_TILE, num_warps=4)
    kernels.round_both[grid](
        x, rows.tops, columns.tops, rows.integers, columns.integers, n, m, *ROUND_TILE, num_warps=4
    )
    return rows, columns


def multiply(a: Rounded, b: Rounded, dtype: torch.dtype) -> Tensor:
    """a (n, size) times b (m, size) transposed: (n, m)."""
    (n, size), m = a.integers.shape, len(b.integers)
    out = torch.empty(n, m, dtype=dtype, device=a.integers.device)
    gpu_kernels().multiply[(n // TILE[0] * (m // TILE[1]),)](
        a.integers, b.integers, a.tops, b.tops, out, n, m, size, *TILE, GROUP, num_warps=8
    )
    return out


class Product(torch.autograd.Function):
    """x (tokens, C) times weight (D, C) transposed: (tokens, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (x_rows, x_columns), (w_rows, w_columns) = round_both(x), round_both(weight)
        ctx.save_for_backward(*x_columns, *w_columns)
        return multiply(x_rows, w_rows, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        saved = ctx.saved_tensors  # once: what is recomputed can be had once
        x_columns, w_columns = Rounded(*saved[:2]), Rounded(*saved[2:])
        dy_rows, dy_columns = round_both(dy)
        dx, dw = multiply(dy_rows, w_columns, dy.dtype), multiply(dy_columns, x_columns, dy.dtype)
        return dx, dw


def linear(layer: Linear, x: Tensor) -> Tensor:
    """layer(x): (..., C) -> (..., D)."""
    flat: Tensor = Product.apply(x.reshape(-1, x.shape[-1]), layer.weight)
    return flat.view(*x.shape[:-1], -1)


def linear_layers(model: LanguageModel) -> list[Linear]:
    """Those of the blocks."""
    return [layer for layer in model.h.modules() if isinstance(layer, Linear)]


def use(model: LanguageModel, on: bool) -> None:
    """Compute the linear layers of the blocks by integers from now on, or as ever again."""
    for layer in linear_layers(model):
        layer.__dict__.pop("forward", None)
        if on:
            layer.forward = functools.partial(linear, layer)  # type: ignore[method-assign]


@contextmanager
def paused(model: LanguageModel) -> Iterator[None]:
    """As ever inside, for validation and samples."""
    is_on = any("forward" in layer.__dict__ for layer in linear_layers(model))
    use(model, False)
    try:
        yield
    finally:
        use(model, is_on)


def available(config: Config, device: torch.device, windows: int) -> bool:
    """Whether a micro-batch of `windows` of this model can be computed so here."""
    model = config.model
    heads = {count * model.head_dim() for count in (model.num_heads, model.kv_heads())}
    tokens = windows * model.context_length
    sizes = {tokens, model.embedding_size, model.mlp_dim(), *heads}
    fits = tokens <= MOST_INT8_TOKENS and all(size % MULTIPLE == 0 for size in sizes)
    return fits and fused.available(config, device)


def speedup(model: LanguageModel, windows: int) -> float:
    """The speed of a micro-batch by integers over that in bfloat16; leaves gradients behind.

    0 where this GPU lacks the memory for it, or cannot compile it.
    """
    size, device = model.config.context_length, model.wte.weight.device
    tokens = torch.arange(windows * size, device=device).view(windows, size)
    tokens %= model.config.vocab_size

    def fastest() -> float:
        seconds = []
        for _ in range(4):  # the first compiles
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            model(tokens, tokens).backward()
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    plain = fastest()
    try:
        use(model, True)
        return plain / fastest()
    except Exception:  # torch's and Triton's are of many types
        torch.cuda.empty_cache()
        return 0.0
    finally:
        use(model, False)
        torch.cuda.reset_peak_memory_stats(device)
