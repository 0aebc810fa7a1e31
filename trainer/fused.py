"""The trunks for training on a GPU: the numbers of model.py's, with fewer walks through memory.

Before: model.py, whose modules and weights these are. After: backends.py, which puts hidden() in
the trunk's place, and compiles it for GPT-2, whose forward pass that makes a little faster.

Forward has kernels of our own, so that nothing waits for a compiler; for the compiler it is plain
torch. The backward pass is memory-bound between its matrix products, and every bias and gain needs
its gradient summed over all tokens. Here each kernel that writes such a gradient also sums it:
behind GELU, behind attention (where dq, dk and dv become one array, too; Qwen3's are normalized and
rotated there), and behind a norm with the addition before it. So a bias is added inside its matrix
product as a constant (detached), and the next Function, which takes it only for that, returns its
gradient.
"""

# torch has no types for Function.apply.
# mypy: disable-error-code="no-untyped-call"

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config
import torch.nn.functional as F
import xxhash
from torch import Tensor, library, nn
from torch._functorch import config as functorch_config

from trainer import cross_entropy
from trainer.config import Config
from trainer.model import GPT2, LAYER_NORM_EPS, RMS_NORM_EPS, Qwen3, attend, gelu
from trainer.optimizer import compute_dtype

ROWS, COLUMNS = 16, 256  # of a tile, with four warps
BLOCK = 4096  # numbers that a program takes where each stands alone
WARP_COLUMNS = 256  # of a row that a program takes as a whole: 16 bytes a thread


def available(config: Config, device: torch.device) -> bool:
    """Whether hidden() can train this model here, and is worth it: not for GPT-2 without biases."""
    is_ours = config.model.family == "qwen3" or config.model.bias
    is_half = compute_dtype(config, device) in (torch.bfloat16, torch.float16)
    on_gpu = device.type == "cuda" and cross_entropy.gpu_kernels() is not None
    return is_ours and is_half and on_gpu


def hidden(model: GPT2 | Qwen3, tokens: Tensor) -> Tensor:
    """model.hidden(tokens): tokens (B, T) -> (B, T, C)."""
    T = tokens.shape[1]
    blocks: list[Any] = list(model.h)
    x = model.wte(tokens)
    if isinstance(model, GPT2):
        x = x + model.wpe(torch.arange(T, device=tokens.device))
        layer = gpt2_layer
    else:
        layer = functools.partial(qwen3_layer, turns=model.turns[:, :T])
    n: Tensor = blocks[0].ln_1(x)
    norms = [*(block.ln_1 for block in blocks[1:]), model.ln_f]
    for block, norm in zip(blocks, norms, strict=True):
        x, n = layer(block, norm, x, n)
    return n


def gpt2_layer(block: Any, norm: Any, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """A block, and `norm` behind it: x and its norm n (B, T, C) -> those of the next block."""
    attn, mlp = block.attn, block.mlp
    q, k, v = Split.apply(product(n, attn.c_attn), attn.c_attn.bias, attn.num_heads)
    y = product(attend(attn, None, q, k, v), attn.c_proj)
    x, n = AddNorm.apply(x, y, attn.c_proj.bias, block.ln_2.weight, block.ln_2.bias)
    y = product(Gelu.apply(product(n, mlp.c_fc), mlp.c_fc.bias), mlp.c_proj)
    out: tuple[Tensor, Tensor] = AddNorm.apply(x, y, mlp.c_proj.bias, norm.weight, norm.bias)
    return out


def qwen3_layer(
    block: Any, norm: Any, x: Tensor, n: Tensor, turns: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, of a Qwen3; turns (2, T, 1, D) of model.rotary_table()."""
    attn, mlp = block.attn, block.mlp
    q, k, v = Rotate.apply(
        attn.qkv_proj(n), attn.q_norm.weight, attn.k_norm.weight, turns, attn.sizes
    )
    y = attn.o_proj(attend(attn, None, q, k, v))
    x, n = AddRMSNorm.apply(x, y, block.ln_2.weight)
    y = mlp.down_proj(Gate.apply(mlp.gate_up_proj(n)))
    out: tuple[Tensor, Tensor] = AddRMSNorm.apply(x, y, norm.weight)
    return out


def use_compile_cache() -> None:
    """Have torch keep these graphs between runs, too, for as long as this file is the same.

    It passes over custom functions unless it is told; and a graph holds the sizes of what the
    operators below return, which torch does not see change.
    """
    functorch_config.autograd_cache_allow_custom_autograd_functions = True
    torch.compiler.config.cache_key_tag = xxhash.xxh3_64_hexdigest(Path(__file__).read_bytes())


def product(x: Tensor, linear: nn.Linear) -> Tensor:
    """linear(x), whose bias has its gradient from elsewhere."""
    return F.linear(x, linear.weight, linear.bias.detach())


class Gelu(torch.autograd.Function):
    """gelu(h), h (B, T, F) with the bias (F) in it."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return gelu(h) if torch.compiler.is_compiling() else gelu_forward(h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        (h,) = ctx.saved_tensors
        dh, partial = gelu_backward(dy.contiguous(), h)
        return dh, partial.sum(0).to(h.dtype)


class Split(torch.autograd.Function):
    """x (B, T, 3C) with the bias (3C) in it -> queries, keys, values: three of (B, H, T, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, ...]:
        B, T, _ = x.shape
        q, k, v = x.view(B, T, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, partial = pack(dq, dk, dv)
        return dx, partial.sum(0).to(dq.dtype), None


class AddNorm(torch.autograd.Function):
    """x + y, and its LayerNorm; x and y (B, T, C), y with y_bias (C) in it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, y_bias: Tensor, gain: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            x = x + y
            n, means, scales = torch.native_layer_norm(x, gain.shape, gain, bias, LAYER_NORM_EPS)
        else:
            x, n, means, scales = add_norm_forward(x, y, gain, bias)
        ctx.save_for_backward(x, means, scales, gain)
        return x, n

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dn: Tensor) -> tuple[Tensor, ...]:
        x, means, scales, gain = ctx.saved_tensors
        d, partial = norm_backward(dx.contiguous(), dn.contiguous(), x, means, scales, gain)
        dgain, dbias, dy_bias = partial.sum(0).to(gain.dtype).chunk(3)
        return d, d, dy_bias, dgain, dbias


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
        x, n, _, scales = add_norm_forward(x, y, gain, None)
        ctx.save_for_backward(x, scales, gain)
        return x, n

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scales, gain = ctx.saved_tensors
        d, partial = norm_backward(dx.contiguous(), dn.contiguous(), x, None, scales, gain)
        return d, d, partial.sum(0).to(gain.dtype)


# --------------------------------------------------------- the kernels of forward, as they are


def gelu_forward(h: Tensor) -> Tensor:
    from trainer import kernels

    y = torch.empty_like(h)
    kernels.gelu[(-(-h.numel() // BLOCK),)](h, y, h.numel(), BLOCK, num_warps=4)
    return y


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


def add_norm_forward(x: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """x and y (..., C) -> x + y, its norm, its means and 1 / deviations (..., 1).

    The norm is LayerNorm's, or without a bias RMSNorm's, whose means are left as they come.
    """
    from trainer import kernels

    size = x.shape[-1]
    out, n = torch.empty_like(x), torch.empty_like(x)
    means, scales = x.new_empty(2, *x.shape[:-1], 1, dtype=torch.float32)
    warps, centers = norm_warps(size), bias is not None
    kernels.add_and_norm[(x.numel() // size,)](
        x, y, gain, gain if bias is None else bias, out, n, means, scales, size,
        LAYER_NORM_EPS if centers else RMS_NORM_EPS, WARP_COLUMNS * warps, centers, num_warps=warps,
    )  # fmt: skip
    return out, n, means, scales


# ------------ the kernels of backward, which torch.compile must not look into where it is GPT-2's
#
# Programs share the tokens out; each leaves a row of `partial`, float32 sums over its tokens.


def operator(outputs: Callable[..., Any]) -> Callable[..., Any]:
    """The function below as an operator to the compiler, with outputs such as outputs() makes.

    Without one it is called as it is: an operator would import the compiler.
    """

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        opaque = library.custom_op(f"fused::{function.__name__}", function, mutates_args=())
        opaque.register_fake(outputs)

        @functools.wraps(function)
        def called(*tensors: Tensor | None) -> Any:
            return (opaque if torch.compiler.is_compiling() else function)(*tensors)

        return called

    return made


def gelu_outputs(dy: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    size = h.shape[-1]
    chunks = programs(h.device, 4) * COLUMNS // size
    return torch.empty_like(h), empty_sums(h, h.numel() // size, chunks, ROWS, size)


@operator(gelu_outputs)
def gelu_backward(dy: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """dy and h (..., F) -> dh (..., F), and its partial sums (chunks, F)."""
    from trainer import kernels

    dh, partial = gelu_outputs(dy, h)
    size, chunks = h.shape[-1], len(partial)
    num_rows = h.numel() // size
    kernels.gelu_and_sum[(-(-size // COLUMNS), chunks)](
        dy, h, dh, partial, num_rows, size, share(num_rows, chunks, ROWS), ROWS, COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return dh, partial


def pack_outputs(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, D = dq.shape
    chunks = programs(dq.device, 6) * COLUMNS // (H * D)
    partial = empty_sums(dq, B * T, chunks, ROWS, 3 * H * D)
    return dq.new_empty(B, T, 3 * H * D), partial


@operator(pack_outputs)
def pack(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """Three of (B, H, T, D) -> (B, T, 3 * H * D), and its partial sums (chunks, 3 * H * D)."""
    from trainer import kernels

    packed, partial = pack_outputs(dq, dk, dv)
    B, H, T, D = dq.shape
    size, chunks = H * D, len(partial)
    for number, part in enumerate((dq, dk, dv)):
        kernels.pack_and_sum[(-(-size // COLUMNS), chunks)](
            part, packed[..., number * size :], partial[:, number * size :], *part.stride(), T,
            B * T, size, 3 * size, share(B * T, chunks, ROWS), D, ROWS, COLUMNS, num_warps=4,
        )  # fmt: skip
    return packed, partial


def norm_outputs(
    dx: Tensor, dn: Tensor, x: Tensor, means: Tensor | None, scales: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    chunks = programs(x.device, max(1, 24 // norm_warps(size)))
    width = size if means is None else 3 * size
    return torch.empty_like(x), empty_sums(x, x.numel() // size, chunks, 1, width)


@operator(norm_outputs)
def norm_backward(
    dx: Tensor, dn: Tensor, x: Tensor, means: Tensor | None, scales: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """dx, dn, x (..., C), means and 1 / deviations (..., 1) -> d (..., C) and partial sums
    (chunks, 3 * C): for the gradients of gain and bias, and of d itself. Without means it is an
    RMSNorm, and the sums (chunks, C) are the gain's."""
    from trainer import kernels

    d, partial = norm_outputs(dx, dn, x, means, scales, gain)
    size, chunks, centers = x.shape[-1], len(partial), means is not None
    num_rows, warps = x.numel() // size, norm_warps(size)
    kernels.norm_and_sum[(chunks,)](
        dx, dn, x, scales if means is None else means, scales, gain, d, partial, num_rows, size,
        share(num_rows, chunks, 1), WARP_COLUMNS * warps, centers, num_warps=warps,
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
    size, chunks = width - start, len(sums[0])
    unused = x.new_empty(chunks, width, dtype=torch.float32)  # values have no gain
    kernels.pack_and_sum[(-(-size // COLUMNS), chunks)](
        dv, dx[..., start:], unused, *dv.stride(), T, num_rows, size, width,
        share(num_rows, chunks, ROWS), D, ROWS, COLUMNS, num_warps=4,
    )  # fmt: skip
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
