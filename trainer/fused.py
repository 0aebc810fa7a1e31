"""The Qwen3 trunk for training on a GPU: model.py's numbers with less memory traffic, no compiler.

The backward pass is memory-bound between its matrix products, and every gain needs its gradient
summed over all tokens. Here the kernel that writes a gradient also sums it: after attention, where
dq, dk and dv become one array and are normalized and rotated back, and after an addition's norm.
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
WARP_COLUMNS = 256  # of a row that one program takes: 16 bytes a thread


def available(config: Config, device: torch.device) -> bool:
    """Whether hidden() can train this model here."""
    on_gpu = device.type == "cuda" and cross_entropy.gpu_kernels() is not None
    is_half = compute_dtype(config, device) == torch.bfloat16
    return config.model.family == "qwen3" and is_half and on_gpu


def layer(block: Any, norm: Any, x: Tensor, n: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """A block and the next `norm`: x and its norm n (B, T, C) -> those of the next block.

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


def hidden(model: Qwen3, tokens: Tensor, layer: Any = layer) -> Tensor:
    """model.hidden(tokens): tokens (B, T) -> (B, T, C). `layer` may be recomputed."""
    blocks: list[Any] = list(model.h)
    x, turns = model.wte(tokens), model.turns[:, : tokens.shape[1]]
    n: Tensor = blocks[0].ln_1(x)
    norms = [*(block.ln_1 for block in blocks[1:]), model.ln_f]
    for block, norm in zip(blocks, norms, strict=True):
        x, n = layer(block, norm, x, n, turns)
    return n


class Gate(torch.autograd.Function):
    """silu(left half) * right half of h (B, T, 2F) -> (B, T, F)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        size = h.shape[-1] // 2
        y = h.new_empty(*h.shape[:-1], size)
        num_rows = y.numel() // size
        kernels().gate[tiles(num_rows, size)](h, y, num_rows, size, ROWS, COLUMNS, num_warps=4)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        dh, size = torch.empty_like(h), dy.shape[-1]
        num_rows = dy.numel() // size
        kernels().gate_backward[tiles(num_rows, size)](
            dy.contiguous(), h, dh, num_rows, size, ROWS, COLUMNS, num_warps=4
        )
        return dh


class Rotate(torch.autograd.Function):
    """x (B, T, (H + 2K) * D) -> queries (B, H, T, D), keys and values (B, K, T, D).

    Queries and keys are normalized, with a gain (D) each, and rotated by turns (2, T, 1, D).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, q_gain: Tensor, k_gain: Tensor, turns: Tensor, sizes: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, q_gain, k_gain, turns)
        D, (B, T, _), found = len(q_gain), x.shape, []
        *rotated, v = x.split(sizes, -1)
        for part, gain in zip(rotated, (q_gain, k_gain), strict=True):
            num_heads = part.shape[-1] // D
            out = x.new_empty(B, T, num_heads, D)
            kernels().rotate_heads[(-(-B * T // ROWS),)](
                part, gain, turns, out, part.stride(1), T, turns.stride(0), B * T, num_heads,
                RMS_NORM_EPS, D, ROWS, half_columns(D), num_warps=4,
            )  # fmt: skip
            found.append(out.transpose(1, 2))
        return *found, v.unflatten(-1, (-1, D)).transpose(1, 2)

    @staticmethod
    def backward(
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, q_gain, k_gain, turns = ctx.saved_tensors
        D, (B, T, width), start, sums = len(q_gain), x.shape, 0, []
        dx, num_rows = torch.empty_like(x), B * T
        for part, gain in ((dq, q_gain), (dk, k_gain)):
            partial, share = partial_sums(x, num_rows, programs(x.device, 4), ROWS, D)
            kernels().rotate_back_and_sum[(len(partial),)](
                part, x[..., start:], gain, turns, dx[..., start:], partial, *part.stride(), width,
                T, turns.stride(0), num_rows, part.shape[1], share, RMS_NORM_EPS, D, ROWS,
                half_columns(D), num_warps=4,
            )  # fmt: skip
            start += part.shape[1] * D
            sums.append(partial)
        size = width - start  # values have no gain
        kernels().pack[tiles(num_rows, size)](
            dv, dx[..., start:], *dv.stride(), T, num_rows, size, width, D, ROWS, COLUMNS,
            num_warps=4,
        )  # fmt: skip
        dq_gain, dk_gain = (partial.sum(0).to(x.dtype) for partial in sums)
        return dx, dq_gain, dk_gain, None, None


class AddRMSNorm(torch.autograd.Function):
    """x + y, and its RMSNorm; x and y (B, T, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        size, warps = x.shape[-1], norm_warps(x.shape[-1])
        out, n = torch.empty_like(x), torch.empty_like(x)
        scales = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)  # 1 / root mean square
        kernels().add_and_norm[(x.numel() // size,)](
            x, y, gain, out, n, scales, size, RMS_NORM_EPS, WARP_COLUMNS * warps, num_warps=warps
        )
        ctx.save_for_backward(out, scales, gain)
        return out, n

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scales, gain = ctx.saved_tensors
        d, size = torch.empty_like(x), x.shape[-1]
        num_rows, warps = x.numel() // size, norm_warps(size)
        count = programs(x.device, max(1, 24 // warps))
        partial, share = partial_sums(x, num_rows, count, 1, size)
        kernels().norm_and_sum[(len(partial),)](
            dx.contiguous(), dn.contiguous(), x, scales, gain, d, partial, num_rows, size, share,
            WARP_COLUMNS * warps, num_warps=warps,
        )  # fmt: skip
        return d, d, partial.sum(0).to(gain.dtype)


def kernels() -> Any:
    return cross_entropy.gpu_kernels()


def tiles(num_rows: int, size: int) -> tuple[int, int]:
    """The grid of an array of rows with `size` columns."""
    return -(-num_rows // ROWS), -(-size // COLUMNS)


def half_columns(size: int) -> int:
    """Columns of a tile for half a head: a power of two."""
    return 1 << (size // 2 - 1).bit_length()


def norm_warps(size: int) -> int:
    """Warps for a whole row: a power of two."""
    return 1 << (-(-size // WARP_COLUMNS) - 1).bit_length()


@functools.cache
def programs(device: torch.device, each: int) -> int:
    """The number that fills a GPU: `each` on every multiprocessor, as their registers allow."""
    is_gpu = device.type == "cuda"
    count = torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else 1
    return int(count) * each


def partial_sums(
    like: Tensor, num_rows: int, chunks: int, multiple: int, size: int
) -> tuple[Tensor, int]:
    """A row (size) for each program's sum over its share of the tokens, and the rows of a share.

    A share is a multiple of `multiple`; with few rows there are fewer chunks.
    """
    chunks = min(chunks, -(-num_rows // multiple))
    share = -(-num_rows // (chunks * multiple)) * multiple
    return like.new_empty(chunks, size, dtype=torch.float32), share
