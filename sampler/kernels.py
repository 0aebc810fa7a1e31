"""A GPU's decode step in few kernels: what a single new token a row needs, in Triton.

Before: decode.py, which calls these on a GPU. After: the same numbers as trainer/model.py gives.

Writing one token is a walk through all weights with almost nothing to compute, so its time is that
of reading memory and of starting kernels. `attend` reads a row's cache to its own length, whatever
the memory behind it; `logits` is a model in five kernels a layer for one row, and GPT-2 in seven
for more; `draw_top` takes the likeliest tokens and draws one in two. Everything is summed in
float32.

From Hopper on, a kernel starts while the one before it ends (NVIDIA's programmatic dependent
launch): what it does before `gdc_wait` must not read what another kernel of the same step writes
before it. So the weights of a matrix are on their way while the vector that they are for is still
being made. A step's first kernel waits for all that went before.
"""

# ruff: noqa: N803  (Triton writes constants in capitals)

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sampler.decode import KVCache
from trainer.model import GPT2, LanguageModel, Qwen3, gelu

FEW_PROGRAMS = 128  # about the multiprocessors of a large card
MOST_SUMS = 16384  # of a program of linear(): more would not fit its registers
MOST_TOP_K = 64  # of the tokens that draw_top sorts
PARTS, PART_NUMBERS = 4, 8192  # of a lone row's cache: programs a head, what each reads at once
VOCABULARY_BLOCK = 1024


def early_start(after_ours: bool = True) -> dict[str, bool]:
    """Launch options: whether a kernel may start before the one before it has ended.

    Not after one of a library: it may let ours start so early that they are in its way.
    """
    return {"EARLY": is_hopper(), **({"launch_pdl": True} if is_hopper() and after_ours else {})}


@functools.cache
def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@triton.jit
def _wait(EARLY: tl.constexpr):
    """Until the kernels before this one are done; lets the next one start."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _attend(
    q, k, v, keys, values, lengths, out,
    q_row, q_head, k_row, k_head, v_row, v_head, size, scale,
    GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row and the GROUP heads that share keys and values: a running softmax over the cache
    (Milakov and Gimelshein 2018), and the new token at last."""
    row = tl.program_id(0).to(tl.int64)
    shared = tl.program_id(1)
    dtype = keys.dtype.element_ty
    g = tl.arange(0, PADDED_GROUP)  # at least 16: what a tensor core takes
    d = tl.arange(0, PADDED)
    is_d = d < D
    is_query = (g < GROUP)[:, None] & is_d[None, :]
    start = (row * tl.num_programs(1) + shared) * size * D
    _wait(EARLY)
    length = tl.load(lengths + row)
    at = row * q_row + (shared * GROUP + g)[:, None] * q_head + d[None, :]
    query = tl.load(q + at, mask=is_query, other=0).to(dtype)
    new_key = tl.load(k + row * k_row + shared * k_head + d, mask=is_d, other=0).to(dtype)
    new_value = tl.load(v + row * v_row + shared * v_head + d, mask=is_d, other=0).to(dtype)
    fits = d < tl.where(length < size, D, 0)
    tl.store(keys + start + length * D + d, new_key, mask=fits)
    tl.store(values + start + length * D + d, new_value, mask=fits)

    best = tl.full((PADDED_GROUP,), -1e30, tl.float32)
    total = tl.zeros((PADDED_GROUP,), tl.float32)
    mixed = tl.zeros((PADDED_GROUP, PADDED), tl.float32)
    for first in range(0, length, BLOCK):
        s = first + tl.arange(0, BLOCK)
        is_there = s < length
        cached = start + s[:, None] * D + d[None, :]
        both = is_there[:, None] & is_d[None, :]
        key = tl.load(keys + cached, mask=both, other=0)
        value = tl.load(values + cached, mask=both, other=0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(is_there[None, :], score, -1e30)
        higher = tl.maximum(best, tl.max(score, 1))
        decay = tl.exp(best - higher)
        part = tl.exp(score - higher[:, None])
        total = total * decay + tl.sum(part, 1)
        mixed = mixed * decay[:, None] + tl.dot(part.to(dtype), value, input_precision="ieee")
        best = higher

    new_score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
    highest = tl.maximum(best, new_score)
    decay = tl.exp(best - highest)
    new_part = tl.exp(new_score - highest)
    weight = total * decay + new_part
    mixed = mixed * decay[:, None] + new_part[:, None] * new_value.to(tl.float32)[None, :]
    place = ((row * tl.num_programs(1) + shared) * GROUP + g)[:, None] * D + d[None, :]
    tl.store(out + place, (mixed / weight[:, None]).to(out.dtype.element_ty), mask=is_query)


def attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor
) -> Tensor:
    """Put one new token a row into the cache and attend to it and all before.

    q (B, H, 1, D); k and v (B, K, 1, D), H a multiple of K; keys and values (B, K, S, D), written
    at `lengths` (B,). Returns (B, H, 1, D).
    """
    num_rows, heads, _, size = q.shape
    groups = k.shape[1]
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1
    out = torch.empty(num_rows, heads, 1, size, dtype=q.dtype, device=q.device)
    few = num_rows * groups <= FEW_PROGRAMS
    _attend[(num_rows, groups)](
        q, k, v, keys, values, lengths, out,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], keys.shape[2], size**-0.5,
        GROUP=heads // groups, PADDED_GROUP=max(16, triton.next_power_of_2(heads // groups)),
        D=size, PADDED=max(16, triton.next_power_of_2(size)),
        BLOCK=128 if few else 64, num_warps=4, num_stages=3,
        **early_start(after_ours=num_rows == 1),
    )  # fmt: skip
    return out


@triton.jit
def _turned(x, paired, gain, paired_gain, cos, sin, epsilon, D: tl.constexpr):
    """x normalized and turned, as trainer/model.py does it; `paired` is x, its halves exchanged."""
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + epsilon)
    return (x * gain * cos + paired * paired_gain * sin) * scale


@triton.jit
def _attend_parts(
    q, k, v, q_gain, k_gain, turns, keys, values, length_at, out, log_weights, size, scale, epsilon,
    GROUP: tl.constexpr, TURN: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head of one row, and of its cache's blocks one in `parts`; the first has the new token.

    This step's kernels before it write neither what is read of the cache here, nor the length.
    """
    head, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    shared = head // GROUP
    d = tl.arange(0, PADDED)
    is_d = d < D
    length = tl.load(length_at)
    start = shared * size * D
    s = part * BLOCK + tl.arange(0, BLOCK)
    cached, both = start + s[:, None] * D + d[None, :], (s < length)[:, None] & is_d[None, :]
    key = tl.load(keys + cached, mask=both, other=0)
    value = tl.load(values + cached, mask=both, other=0)
    if TURN:
        pair = (d + D // 2) % D
        turn = turns + tl.minimum(length, size - 1) * D + d
        cos, sin = tl.load(turn, mask=is_d, other=0), tl.load(turn + size * D, mask=is_d, other=0)
        q_gains, q_paired = tl.load(q_gain + d, mask=is_d, other=0), tl.load(q_gain + pair)
        k_gains, k_paired = tl.load(k_gain + d, mask=is_d, other=0), tl.load(k_gain + pair)
    _wait(EARLY)
    query = tl.load(q + head * D + d, mask=is_d, other=0)
    new_key = tl.load(k + shared * D + d, mask=is_d, other=0)
    new_value = tl.load(v + shared * D + d, mask=is_d, other=0).to(key.dtype)
    if TURN:
        paired = tl.load(q + head * D + pair)
        query = _turned(query, paired, q_gains, q_paired, cos, sin, epsilon, D)
        paired = tl.load(k + shared * D + pair)
        new_key = _turned(new_key, paired, k_gains, k_paired, cos, sin, epsilon, D)
    new_key = new_key.to(key.dtype)
    fits = d < tl.where((length < size) & (part == 0) & (head % GROUP == 0), D, 0)
    tl.store(keys + start + length * D + d, new_key, mask=fits)
    tl.store(values + start + length * D + d, new_value, mask=fits)

    query = query.to(key.dtype).to(tl.float32) * scale
    best = tl.where(part == 0, tl.sum(query * new_key.to(tl.float32), 0), -1e30)
    total = tl.full((), 1.0, tl.float32)
    mixed = new_value.to(tl.float32)
    for first in range(part * BLOCK, length, parts * BLOCK):
        score = tl.sum(key.to(tl.float32) * query[None, :], 1)
        score = tl.where(first + tl.arange(0, BLOCK) < length, score, -1e30)
        higher = tl.maximum(best, tl.max(score, 0))
        decay = tl.exp(best - higher)
        weight = tl.exp(score - higher)
        total = total * decay + tl.sum(weight, 0)
        mixed = mixed * decay + tl.sum(weight[:, None] * value.to(tl.float32), 0)
        best = higher
        cached += parts * BLOCK * D
        both = (first + parts * BLOCK + tl.arange(0, BLOCK) < length)[:, None] & is_d[None, :]
        key = tl.load(keys + cached, mask=both, other=0)
        value = tl.load(values + cached, mask=both, other=0)

    place = part * tl.num_programs(0) + head
    tl.store(out + place * D + d, mixed / total, mask=is_d)
    tl.store(log_weights + place, best + tl.log(total))


def attend_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    turned: tuple[nn.RMSNorm, nn.RMSNorm, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """attend() for one row, in parts of its cache that linear() joins: one alone takes too long.

    q (H, D), k and v (K, D), keys and values (1, K, S, D), length (1,). With `turned`, the norms of
    q and k and rotary_table() (2, S, 1, D), q and k are normalized and turned first. Returns what
    each part attends to (P, H, D), and the logarithms of their weights in the mean (P, H).
    (Flash-decoding, Dao et al. 2023.)
    """
    (heads, size), groups = q.shape, len(k)
    q_norm, k_norm, turns = turned or (None, None, q)
    padded = max(16, triton.next_power_of_2(size))
    assert q.is_contiguous()
    assert k.is_contiguous()
    assert v.is_contiguous()
    out = torch.empty(PARTS, heads, size, dtype=keys.dtype, device=q.device)
    log_weights = torch.empty(PARTS, heads, device=q.device)
    _attend_parts[(heads, PARTS)](
        q, k, v, q_norm.weight if q_norm else q, k_norm.weight if k_norm else k, turns,
        keys, values, length, out, log_weights, keys.shape[2], size**-0.5,
        q_norm.eps if q_norm else 0.0, GROUP=heads // groups, TURN=turned is not None,
        D=size, PADDED=padded, BLOCK=PART_NUMBERS // padded, num_warps=4, **early_start(),
    )  # fmt: skip
    return out, log_weights


@triton.jit
def _joined(
    parts, log_weights,
    H: tl.constexpr, PADDED_H: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The mean of what attend_parts() returned: head by head, each padded."""
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
        # Asked for first, so that it is under way while x is made and normalized.
        part = tl.load(weight + at, mask=is_n[:, None] & is_k[None, :], other=0).to(tl.float32)
        if GATE:
            at = (n.to(tl.int64) + num_outputs)[:, None] * K + k[None, :]
            other = tl.load(weight + at, mask=is_n[:, None] & is_k[None, :], other=0)
        if NORM:  # BLOCK_K covers all of K then
            gains = tl.load(gain + k, mask=is_k, other=0).to(tl.float32)
            if SHIFT:
                shifts = tl.load(shift + k, mask=is_k, other=0).to(tl.float32)
        if first == 0:
            _wait(EARLY)
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
    what attend_parts() returned. With `gate`, weight is (2N, K), and of its two results silu(first)
    * second is returned.
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
    _wait(EARLY)
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

    The library would run as many programs as there are tiles, which are too few to read fast, or
    sum the parts in a kernel of its own.
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
    _wait(EARLY)
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
    """One row: its token's embedding and, where there is one, its position's."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    is_k = k < size
    _wait(EARLY)
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


@triton.jit
def _block_top(
    logits, candidates, stride, num_tokens, K: tl.constexpr, BLOCK: tl.constexpr,
    NARROW: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The K largest logits of a row's block, each with its token in one integer.

    Its upper half has the order of the float; 32 bits hold both where the float has 16.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    _wait(EARLY)
    logit = tl.load(logits + row * stride + n, mask=n < num_tokens, other=-float("inf"))
    place = (row * tl.num_programs(1) + block) * K + tl.arange(0, K)
    if NARROW:
        bits = logit.to(tl.int16, bitcast=True).to(tl.int32)
        bits = bits ^ ((bits >> 31) & 0x7FFF)
        tl.store(candidates + place, tl.topk((bits << 16) | (0xFFFF - n), K))
    else:
        bits = logit.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        packed = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - n).to(tl.int64)
        tl.store(candidates + place, tl.topk(packed, K))


@triton.jit
def _draw_top(
    logits, candidates, noise, number, drawn, last, lengths, num_candidates,
    top_k, temperature, top_p, min_p,
    K: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row: of all blocks' candidates the top_k, and of these one, as decode.draw() chooses."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    n = tl.arange(0, BLOCK)
    _wait(EARLY)
    place = row.to(tl.int64) * num_candidates + n
    least = -0x7FFFFFFF if NARROW else -0x7FFFFFFFFFFFFFFF
    packed = tl.load(candidates + place, mask=n < num_candidates, other=least)
    packed = tl.topk(packed, K)
    if NARROW:
        bits = packed >> 16
        bits = (bits ^ ((bits >> 31) & 0x7FFF)).to(tl.int16)
        tokens = (0xFFFF - (packed & 0xFFFF)).to(tl.int64)
    else:
        bits = (packed >> 32).to(tl.int32)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        tokens = 0x7FFFFFFF - (packed & 0x7FFFFFFF)
    logit = bits.to(logits.dtype.element_ty, bitcast=True).to(tl.float32)
    k = tl.arange(0, K)
    score = tl.where(k < top_k, logit / temperature, -float("inf"))
    probability = tl.exp(score - tl.max(score, 0))
    probability = probability / tl.sum(probability, 0)
    before = tl.cumsum(probability, 0) - probability
    probability = tl.where((before >= top_p) & (k > 0), 0.0, probability)
    probability = tl.where(probability < min_p * tl.max(probability, 0), 0.0, probability)
    cumulative = tl.cumsum(probability.to(tl.float64), 0)
    at = tl.load(number + row)
    threshold = tl.load(noise + at * num_rows + row) * tl.max(cumulative, 0)
    chosen = tl.minimum(tl.sum((cumulative <= threshold).to(tl.int32), 0), top_k - 1)
    token = tl.sum(tl.where(k == chosen, tokens, 0), 0)
    tl.store(drawn + at * num_rows + row, token)
    tl.store(last + row, token)
    tl.store(number + row, at + 1)
    tl.store(lengths + row, tl.load(lengths + row) + 1)


def draw_top(
    logits: Tensor,
    top_k: int,
    temperature: float,
    top_p: float | None,
    min_p: float | None,
    noise: Tensor,
    number: Tensor,
    drawn: Tensor,
    last: Tensor,
    lengths: Tensor,
) -> None:
    """Draw a token a row from its `top_k` <= MOST_TOP_K likeliest, and go on to the next.

    logits (B, V). For the step n = number[row] it takes noise[n, row], writes the token to
    drawn[n, row] and last[row], and adds 1 to lengths[row] and number[row].
    """
    num_rows, num_tokens = logits.shape
    assert logits.stride(1) == 1
    assert num_tokens <= 2**16
    narrow = logits.element_size() == 2
    kept, blocks = max(16, triton.next_power_of_2(top_k)), triton.cdiv(num_tokens, VOCABULARY_BLOCK)
    candidates = torch.empty(
        num_rows, blocks * kept, dtype=torch.int if narrow else torch.long, device=logits.device
    )
    how = {"K": kept, "NARROW": narrow}
    _block_top[(num_rows, blocks)](
        logits, candidates, logits.stride(0), num_tokens,
        BLOCK=VOCABULARY_BLOCK, num_warps=4 if num_rows == 1 else 2,
        **how, **early_start(after_ours=num_rows == 1),
    )  # fmt: skip
    _draw_top[(num_rows,)](
        logits, candidates, noise, number, drawn, last, lengths, blocks * kept,
        top_k, temperature, 2.0 if top_p is None else top_p, min_p or 0.0,
        BLOCK=triton.next_power_of_2(blocks * kept), num_warps=8, **how, **early_start(),
    )  # fmt: skip


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """GELU of a linear layer, which the library computes with its product where there is a bias."""
    if layer.bias is None or not x.is_cuda:
        return gelu(layer(x))
    return torch._addmm_activation(layer.bias, x, layer.weight.T, use_gelu=True)


def logits(model: LanguageModel, tokens: Tensor, cache: KVCache) -> Tensor:
    """model.logits(model.hidden(tokens, cache)) for one token a row: (B,) -> (B, V).

    The sum of the layers is kept in float32. Qwen3 is for one row alone.
    """
    if isinstance(model, Qwen3):
        return qwen3_logits(model, tokens, cache)
    assert isinstance(model, GPT2)
    return gpt2_logits(model, tokens, cache)


def gpt2_logits(model: GPT2, tokens: Tensor, cache: KVCache) -> Tensor:
    """(B,) -> (B, V)."""
    rows = len(tokens)
    x = embed(tokens, cache.lengths, model.wte.weight, model.wpe.weight)  # (B, C)
    block: Any
    if rows == 1:  # a vector: five kernels a layer
        for layer, block in enumerate(model.h):
            attention, mlp = block.attn, block.mlp
            qkv = linear(x, attention.c_attn.weight, attention.c_attn.bias, norm=block.ln_1)
            q, k, v = qkv.view(3, attention.num_heads, -1)  # each (H, D)
            keys, values = cache.store[layer]
            heads, log_weights = attend_parts(q, k, v, keys, values, cache.lengths)
            output = attention.c_proj
            linear(heads, output.weight, output.bias, add_to=x, log_weights=log_weights)
            wide = linear(x, mlp.c_fc.weight, mlp.c_fc.bias, norm=block.ln_2, gelu=True)
            linear(wide, mlp.c_proj.weight, mlp.c_proj.bias, add_to=x)
        head = model.wte.weight
        return linear(x, head, None, norm=model.ln_f, dtype=head.dtype)
    y: Tensor | None = None
    bias: Tensor | None = None
    for layer, block in enumerate(model.h):  # seven, two of them the library's
        attention, mlp = block.attn, block.mlp
        qkv = attention.c_attn(add_norm(x, y, bias, block.ln_1))
        q, k, v = qkv.view(rows, 3, attention.num_heads, 1, -1).unbind(1)  # each (B, H, 1, D)
        heads = cache.attend(layer, q, k, v).view(rows, -1)
        y, bias = project(heads, attention.c_proj.weight), attention.c_proj.bias
        wide = linear_gelu(add_norm(x, y, bias, block.ln_2), mlp.c_fc)
        y, bias = project(wide, mlp.c_proj.weight), mlp.c_proj.bias
    return model.logits(add_norm(x, y, bias, model.ln_f))


def qwen3_logits(model: Qwen3, tokens: Tensor, cache: KVCache) -> Tensor:
    """(1,) -> (1, V)."""
    x = embed(tokens, cache.lengths, model.wte.weight)  # (1, C)
    block: Any
    for layer, block in enumerate(model.h):
        attention, mlp = block.attn, block.mlp
        qkv = linear(x, attention.qkv_proj.weight, None, norm=block.ln_1)
        each = qkv.view(-1, attention.head_size)  # (H + 2K, D)
        q, k, v = torch.split(each, [size // attention.head_size for size in attention.sizes])
        keys, values = cache.store[layer]
        turned = (attention.q_norm, attention.k_norm, model.turns)
        heads, log_weights = attend_parts(q, k, v, keys, values, cache.lengths, turned)
        linear(heads, attention.o_proj.weight, None, add_to=x, log_weights=log_weights)
        wide = linear(x, mlp.gate_up_proj.weight, None, norm=block.ln_2, gate=True)
        linear(wide, mlp.down_proj.weight, None, add_to=x)
    head = model.wte.weight
    return linear(x, head, None, norm=model.ln_f, dtype=head.dtype)
