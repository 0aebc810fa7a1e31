"""Matrices, norms and embeddings of a decode step, as Triton kernels that sum in float32.

From Hopper on, a kernel starts while the one before it ends (NVIDIA's programmatic dependent
launch): before wait() it must not read anything that another kernel of the same step writes. So
the weights of a matrix are on their way while the vector to multiply is still being computed. The
first kernel of a step waits for everything before it.
"""

# ruff: noqa: N803  (Triton writes constants in capitals)

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MOST_SUMS = 16384  # of a program of linear(): more would not fit its registers


def early_start(after_ours: bool = True) -> dict[str, bool]:
    """Launch options: whether a kernel may start before the previous one has ended.

    Not after a library's kernel: it may let ours start so early that they slow it down.
    """
    return {"EARLY": is_hopper(), **({"launch_pdl": True} if is_hopper() and after_ours else {})}


@functools.cache
def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@triton.jit
def wait(EARLY: tl.constexpr):
    """Wait for the kernels before this one, and let the next one start."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _joined(
    parts, log_weights,
    H: tl.constexpr, PADDED_H: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The mean of attend_parts()' results: head by head, each padded."""
    h, d = tl.arange(0, PADDED_H), tl.arange(0, PADDED)
    highest = tl.full((PADDED_H,), -1e30, tl.float32)
    for part in tl.static_range(PARTS):
        log_weight = tl.load(log_weights + part * H + h, mask=h < H, other=-1e30)
        highest = tl.maximum(highest, log_weight)
    total = tl.zeros((PADDED_H,), tl.float32)
    mixed = tl.zeros((PADDED_H, PADDED), tl.float32)
    for part in tl.static_range(PARTS):
        log_weight = tl.load(log_weights + part * H + h, mask=h < H, other=-1e30)
        weight = tl.exp(log_weight - highest)
        total += weight
        at = (part * H + h)[:, None] * D + d[None, :]
        counts = ((h < H) & (weight > 0))[:, None] & (d < D)[None, :]
        mixed += weight[:, None] * tl.load(parts + at, mask=counts, other=0).to(tl.float32)
    return tl.reshape(mixed / total[:, None], (PADDED_H * PADDED,))


@triton.jit
def _linear(
    x, log_weights, gain, shift, weight, bias, out, num_outputs, epsilon,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    PADDED: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, CENTER: tl.constexpr,
    SHIFT: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, GATE: tl.constexpr,
    ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of a matrix times a vector: a norm before, and GELU, a gate or a sum after."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_n = n < num_outputs
    result = tl.zeros((ROWS,), tl.float32)
    if BIAS:
        result += tl.load(bias + n, mask=is_n, other=0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    if GATE:
        gated = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for first in tl.static_range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        is_k = k < K
        if PARTS:  # head by head, each padded; BLOCK_K covers all of them
            k = k // PADDED * D + k % PADDED
            is_k = (k < K) & (tl.arange(0, BLOCK_K) % PADDED < D)
        at = n.to(tl.int64)[:, None] * K + k[None, :]
        # Loaded first, so that it is under way while x is computed and normalized.
        part = tl.load(weight + at, mask=is_n[:, None] & is_k[None, :], other=0).to(tl.float32)
        if GATE:
            at = (n.to(tl.int64) + num_outputs)[:, None] * K + k[None, :]
            other = tl.load(weight + at, mask=is_n[:, None] & is_k[None, :], other=0)
        if NORM:  # BLOCK_K covers all of K then
            gains = tl.load(gain + k, mask=is_k, other=0).to(tl.float32)
            if SHIFT:
                shifts = tl.load(shift + k, mask=is_k, other=0).to(tl.float32)
        if first == 0:
            wait(EARLY)
            if ADD:
                before = tl.load(out + n, mask=is_n, other=0)
        if PARTS:
            value = _joined(x, log_weights, K // D, BLOCK_K // PADDED, D, PADDED, PARTS)
        else:
            value = tl.load(x + k, mask=is_k, other=0).to(tl.float32)
        if NORM:
            if CENTER:
                value = tl.where(is_k, value - tl.sum(value, 0) / K, 0.0)
            value = value * tl.rsqrt(tl.sum(value * value, 0) / K + epsilon) * gains
            if SHIFT:
                value = value + shifts
        total += part * value[None, :]
        if GATE:
            gated += other.to(tl.float32) * value[None, :]
    result += tl.sum(total, 1)
    if GELU:  # tanh-approximated: x * (1 + tanh(z)) / 2 = x * sigmoid(2z)
        cubed = result * result * result
        result = result * tl.sigmoid(1.5957691216057308 * (result + 0.044715 * cubed))
    if GATE:
        result = result * tl.sigmoid(result) * tl.sum(gated, 1)
    if ADD:
        result += before
    tl.store(out + n, result, mask=is_n)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: nn.LayerNorm | nn.RMSNorm | None = None,
    gelu: bool = False,
    gate: bool = False,
    add_to: Tensor | None = None,
    log_weights: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """gelu(weight @ norm(x) + bias) for one row: x of K numbers, weight (N, K) -> (1, N).

    With `add_to` (1, N) the result is added to it in place. With `log_weights`, x and these are
    the results of attend_parts(). With `gate`, weight is (2N, K), and the result is
    silu(first) * second of its two halves.
    """
    num_outputs, size = weight.shape
    if gate:
        num_outputs //= 2
    parts = 0 if log_weights is None else len(log_weights)
    assert x.numel() == size * max(parts, 1)
    assert x.is_contiguous()
    assert weight.is_contiguous()
    out = add_to
    if out is None:
        out = torch.empty(1, num_outputs, dtype=dtype, device=x.device)
    head = x.shape[-1] if parts else 1
    padded = triton.next_power_of_2(head)
    block = triton.next_power_of_2(size // head) * padded
    if not (norm or parts):
        block = min(4096, block)
    rows = min(8, max(1, triton.next_power_of_2(num_outputs) // 256))
    rows = min(rows, max(1, (MOST_SUMS // 2 if gate else MOST_SUMS) // block))
    shift = getattr(norm, "bias", None)
    _linear[(triton.cdiv(num_outputs, rows),)](
        x, x if log_weights is None else log_weights, norm.weight if norm else x,
        x if shift is None else shift, weight, x if bias is None else bias, out,
        num_outputs, norm.eps if norm else 0.0,
        K=size, BLOCK_K=block, ROWS=rows, D=head, PADDED=padded, PARTS=parts, NORM=norm is not None,
        CENTER=isinstance(norm, nn.LayerNorm), SHIFT=shift is not None, BIAS=bias is not None,
        GELU=gelu, GATE=gate, ADD=add_to is not None, num_warps=4, **early_start(),
    )  # fmt: skip
    return out


@triton.jit
def _project(
    x, weight, out, num_rows, num_outputs, size, part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of x @ weight.T, summed over one part of the inputs."""
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * part
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    wait(EARLY)
    for first in range(0, part, BLOCK_K):
        k = start + first + tl.arange(0, BLOCK_K)
        is_k = (k < size)[None, :]
        left = tl.load(
            x + m[:, None] * size + k[None, :], mask=(m < num_rows)[:, None] & is_k, other=0
        )
        right = tl.load(
            weight + n[:, None] * size + k[None, :], mask=(n < num_outputs)[:, None] & is_k, other=0
        )
        total += tl.dot(left, tl.trans(right), input_precision="ieee")
    place = (tl.program_id(1) * num_rows + m)[:, None] * num_outputs + n[None, :]
    is_there = (m < num_rows)[:, None] & (n < num_outputs)[None, :]
    tl.store(out + place, total, mask=is_there)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T for few rows, in parts that add_norm() sums up: (B, K), (N, K) -> (S, B, N).

    The library would run a program a tile, which are too few to read fast, or sum the parts in
    another kernel.
    """
    (num_rows, size), num_outputs = x.shape, weight.shape[0]
    assert x.is_contiguous()
    assert weight.is_contiguous()
    block_k = 64 if size <= 1024 else 128
    part = triton.cdiv(triton.cdiv(size, 4), block_k) * block_k
    parts = triton.cdiv(size, part)
    out = torch.empty(parts, num_rows, num_outputs, dtype=torch.float32, device=x.device)
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    _project[(triton.cdiv(num_outputs, 32), parts, triton.cdiv(num_rows, block_m))](
        x, weight, out, num_rows, num_outputs, size, part,
        BLOCK_M=block_m, BLOCK_N=32, BLOCK_K=block_k, num_warps=4, num_stages=3,
        **early_start(after_ours=False),
    )  # fmt: skip
    return out


@triton.jit
def _add_norm(
    x, parts, bias, gain, shift, out, num_rows, size, epsilon,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, SHIFT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One row: x += the sum of the parts and the bias, and LayerNorm of the result."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    is_k = k < size
    gains = tl.load(gain + k, mask=is_k, other=0).to(tl.float32)
    if SHIFT:
        shifts = tl.load(shift + k, mask=is_k, other=0).to(tl.float32)
    if BIAS:
        biases = tl.load(bias + k, mask=is_k, other=0).to(tl.float32)
    wait(EARLY)
    value = tl.load(x + row * size + k, mask=is_k, other=0)
    for part in tl.static_range(PARTS):
        value += tl.load(parts + (part * num_rows + row) * size + k, mask=is_k, other=0)
    if BIAS:
        value += biases
    if PARTS:
        tl.store(x + row * size + k, value, mask=is_k)
    value = tl.where(is_k, value - tl.sum(value, 0) / size, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / size + epsilon) * gains
    if SHIFT:
        value = value + shifts
    tl.store(out + row * size + k, value.to(out.dtype.element_ty), mask=is_k)


def add_norm(x: Tensor, parts: Tensor | None, bias: Tensor | None, norm: nn.LayerNorm) -> Tensor:
    """x += parts.sum(0) + bias in place; returns norm(x) in the type of its weights.

    x (B, C) and parts (S, B, C) are in float32.
    """
    assert x.is_contiguous()
    out = torch.empty(x.shape, dtype=norm.weight.dtype, device=x.device)
    has_shift = norm.bias is not None
    _add_norm[(len(x),)](
        x, x if parts is None else parts, x if bias is None else bias,
        norm.weight, norm.bias if has_shift else x, out, len(x), x.shape[1], norm.eps,
        PARTS=0 if parts is None else len(parts), BLOCK=triton.next_power_of_2(x.shape[1]),
        BIAS=bias is not None, SHIFT=has_shift, num_warps=4, **early_start(),
    )  # fmt: skip
    return out


@triton.jit
def _embed(
    tokens, lengths, wte, wpe, out, size,
    BLOCK: tl.constexpr, LEARNED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row: its token's embedding, plus its position's if positions are learned."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    is_k = k < size
    wait(EARLY)
    token = tl.load(tokens + row)
    value = tl.load(wte + token * size + k, mask=is_k, other=0).to(tl.float32)
    if LEARNED:
        position = tl.load(lengths + row)
        value += tl.load(wpe + position * size + k, mask=is_k, other=0).to(tl.float32)
    tl.store(out + row * size + k, value, mask=is_k)


def embed(tokens: Tensor, lengths: Tensor, wte: Tensor, wpe: Tensor | None = None) -> Tensor:
    """wte[tokens] + wpe[lengths], both (B,), in float32: (B, C)."""
    size = wte.shape[1]
    out = torch.empty(len(tokens), size, dtype=torch.float32, device=wte.device)
    _embed[(len(tokens),)](
        tokens, lengths, wte, wte if wpe is None else wpe, out, size,
        BLOCK=triton.next_power_of_2(size), LEARNED=wpe is not None, num_warps=4,
        **early_start(after_ours=False),
    )  # fmt: skip
    return out
