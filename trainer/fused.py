"""The Qwen3 trunk for training on a GPU: model.py's numbers, with fewer walks through memory.

Before: model.py, whose modules and weights these are. After: backends.py, which puts hidden() in
the trunk's place.

Forward has kernels of our own, so that nothing waits for a compiler. The backward pass is
memory-bound between its matrix products, and every gain needs its gradient summed over all tokens.
Each kernel here that writes such a gradient also sums it: behind attention, where dq, dk and dv
become one array and are normalized and rotated back, and behind a norm with the addition before it.
"""

# torch has no types for Function.apply.
# mypy: disable-error-code="no-untyped-call"

import functools
from typing import Any

import torch
from torch import Tensor

from trainer import cross_entropy
from trainer.config import Config
from trainer.model import RMS_NORM_EPS, Qwen3, attend
from trainer.optimizer import compute_dtype

ROWS, COLUMNS = 16, 256  # of a tile, with four warps
WARP_COLUMNS = 256  # of a row that a program takes as a whole: 16 bytes a thread


def available(config: Config, device: torch.device) -> bool:
    """Whether hidden() can train this model here."""
    on_gpu = device.type == "cuda" and cross_entropy.gpu_kernels() is not None
    is_half = compute_dtype(config, device) == torch.bfloat16
    return config.model.family == "qwen3" and is_half and on_gpu


def hidden(model: Qwen3, tokens: Tensor) -> Tensor:
    """model.hidden(tokens): tokens (B, T) -> (B, T, C)."""
    blocks: list[Any] = list(model.h)
    x, turns = model.wte(tokens), model.turns[:, : tokens.shape[1]]
    n: Tensor = blocks[0].ln_1(x)
    norms = [*(block.ln_1 for block in blocks[1:]), model.ln_f]
    for block, norm in zip(blocks, norms, strict=True):
        x, n = layer(block, norm, x, n, turns)
    return n


def layer(block: Any, norm: Any, x: Tensor, n: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """A block, and `norm` behind it: x and its norm n (B, T, C) -> those of the next block.

    turns (2, T, 1, D) of model.rotary_table().
    """
    attn, mlp = block.attn, block.mlp
    q, k, v = Rotate.apply(
        attn.qkv_proj(n), attn.q_norm.weight, attn.k_norm.weight, turns, attn.sizes
    )
    y = attn.o_proj(attend(attn, None, q, k, v))
    x, n = AddRMSNorm.apply(x, y, block.ln_2.weight)
    y = mlp.down_proj(Gate.apply(mlp.gate_up_proj(n)))
    out: tuple[Tensor, Tensor] = AddRMSNorm.apply(x, y, norm.weight)
    return out


class Gate(torch.autograd.Function):
    """silu(left half) * right half of h (B, T, 2F) -> (B, T, F)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return gate_forward(h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return gate_backward(dy.contiguous(), *ctx.saved_tensors)


class Rotate(torch.autograd.Function):
    """x (B, T, (H + 2K) * D) -> queries (B, H, T, D), keys and values (B, K, T, D).

    Queries and keys are normalized, with a gain (D) each, and rotated by turns (2, T, 1, D).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, q_gain: Tensor, k_gain: Tensor, turns: Tensor, sizes: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, q_gain, k_gain, turns)
        *rotated, v = x.split(sizes, -1)
        q, k = (
            rotated_heads(part, gain, turns)
            for part, gain in zip(rotated, (q_gain, k_gain), strict=True)
        )
        return q, k, v.unflatten(-1, (-1, len(q_gain))).transpose(1, 2)

    @staticmethod
    def backward(
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        dx, q_partial, k_partial = rotate_backward(dq, dk, dv, *ctx.saved_tensors)
        return dx, q_partial.sum(0).to(dq.dtype), k_partial.sum(0).to(dk.dtype), None, None


class AddRMSNorm(torch.autograd.Function):
    """x + y, and its RMSNorm; x and y (B, T, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        x, n, scales = add_norm_forward(x, y, gain)
        ctx.save_for_backward(x, scales, gain)
        return x, n

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scales, gain = ctx.saved_tensors
        d, partial = norm_backward(dx.contiguous(), dn.contiguous(), x, scales, gain)
        return d, d, partial.sum(0).to(gain.dtype)


def gate_forward(h: Tensor) -> Tensor:
    """h (..., 2F) -> (..., F)."""
    from trainer import kernels

    size = h.shape[-1] // 2
    y = h.new_empty(*h.shape[:-1], size)
    num_rows = y.numel() // size
    grid = -(-num_rows // ROWS), -(-size // COLUMNS)
    kernels.gate[grid](h, y, num_rows, size, ROWS, COLUMNS, num_warps=4)
    return y


def rotated_heads(x: Tensor, gain: Tensor, turns: Tensor) -> Tensor:
    """Heads side by side in x (B, T, H * D), normalized and rotated: (B, H, T, D)."""
    from trainer import kernels

    D, (B, T, width) = len(gain), x.shape
    out = x.new_empty(B, T, width // D, D)
    kernels.rotate_heads[(-(-B * T // ROWS),)](
        x, gain, turns, out, x.stride(1), T, turns.stride(0), B * T, width // D, RMS_NORM_EPS,
        D, ROWS, half_columns(D), num_warps=4,
    )  # fmt: skip
    return out.transpose(1, 2)


def half_columns(size: int) -> int:
    """Columns of a tile that takes half a head: a power of two."""
    return 1 << (size // 2 - 1).bit_length()


def add_norm_forward(x: Tensor, y: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
    """x and y (..., C) -> x + y, its RMSNorm, and 1 / root of its mean square (..., 1)."""
    from trainer import kernels

    size = x.shape[-1]
    out, n = torch.empty_like(x), torch.empty_like(x)
    scales = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    warps = norm_warps(size)
    kernels.add_and_norm[(x.numel() // size,)](
        x, y, gain, out, n, scales, size, RMS_NORM_EPS, WARP_COLUMNS * warps, num_warps=warps
    )
    return out, n, scales


# Backward: programs share the tokens out; each leaves a row of `partial`, float32 sums over its
# tokens.


def norm_backward(
    dx: Tensor, dn: Tensor, x: Tensor, scales: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """dx, dn, x (..., C) and scales (..., 1) -> d (..., C), and partial sums (chunks, C) for the
    gradient of the gain."""
    from trainer import kernels

    d, size = torch.empty_like(x), x.shape[-1]
    num_rows, warps = x.numel() // size, norm_warps(size)
    partial = empty_sums(x, num_rows, programs(x.device, max(1, 24 // warps)), 1, size)
    chunks = len(partial)
    kernels.norm_and_sum[(chunks,)](
        dx, dn, x, scales, gain, d, partial, num_rows, size, share(num_rows, chunks, 1),
        WARP_COLUMNS * warps, num_warps=warps,
    )  # fmt: skip
    return d, partial


def gate_backward(dy: Tensor, h: Tensor) -> Tensor:
    """dy (..., F) and h (..., 2F) -> dh (..., 2F)."""
    from trainer import kernels

    dh, size = torch.empty_like(h), dy.shape[-1]
    num_rows = dy.numel() // size
    grid = -(-num_rows // ROWS), -(-size // COLUMNS)
    kernels.gate_backward[grid](dy, h, dh, num_rows, size, ROWS, COLUMNS, num_warps=4)
    return dh


def rotate_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor, q_gain: Tensor, k_gain: Tensor, turns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, H, T, D), dk and dv (B, K, T, D) -> dx, as x (B, T, (H + 2K) * D) was, and partial
    sums (chunks, D) for the gradients of both gains."""
    from trainer import kernels

    B, T, width = x.shape
    dx, D, num_rows, start = torch.empty_like(x), len(q_gain), B * T, 0
    sums = [empty_sums(x, num_rows, programs(x.device, 4), ROWS, D) for _ in range(2)]
    for part, gain, partial in zip((dq, dk), (q_gain, k_gain), sums, strict=True):
        kernels.rotate_back_and_sum[(len(partial),)](
            part, x[..., start:], gain, turns, dx[..., start:], partial, *part.stride(), width, T,
            turns.stride(0), num_rows, part.shape[1], share(num_rows, len(partial), ROWS),
            RMS_NORM_EPS, D, ROWS, half_columns(D), num_warps=4,
        )  # fmt: skip
        start += part.shape[1] * D
    size = width - start  # values have no gain
    kernels.pack[(-(-num_rows // ROWS), -(-size // COLUMNS))](
        dv, dx[..., start:], *dv.stride(), T, num_rows, size, width, D, ROWS, COLUMNS, num_warps=4
    )
    return dx, sums[0], sums[1]


def norm_warps(size: int) -> int:
    """Warps for a row, which a program takes at once: a power of two."""
    return 1 << (-(-size // WARP_COLUMNS) - 1).bit_length()


@functools.cache
def programs(device: torch.device, each: int) -> int:
    """As many as fill a GPU: `each` on every multiprocessor, as their registers allow."""
    is_gpu = device.type == "cuda"
    count = torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else 1
    return int(count) * each


def empty_sums(like: Tensor, num_rows: int, chunks: int, multiple: int, size: int) -> Tensor:
    """(chunks, size), or fewer chunks where there are not `multiple` rows for each."""
    chunks = max(1, min(chunks, -(-num_rows // multiple)))
    return like.new_empty(chunks, size, dtype=torch.float32)


def share(num_rows: int, chunks: int, multiple: int) -> int:
    """Rows of a chunk: a multiple of `multiple`."""
    return -(-num_rows // (chunks * multiple)) * multiple
