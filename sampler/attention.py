"""Attention of one new token a row over its cache, as Triton kernels that sum in float32."""

# ruff: noqa: N803  (Triton writes constants in capitals)

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from sampler.kernels import early_start, wait

FEW_PROGRAMS = 128  # about the multiprocessors of a large card
PARTS, PART_NUMBERS = 4, 8192  # of a lone row's cache: programs a head, what each reads at once


@triton.jit
def _attend(
    q, k, v, keys, values, lengths, out,
    q_row, q_head, k_row, k_head, v_row, v_head, size, scale,
    GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row and the GROUP heads that share keys and values: a running softmax over the cache
    (Milakov and Gimelshein 2018), then the new token."""
    row = tl.program_id(0).to(tl.int64)
    shared = tl.program_id(1)
    dtype = keys.dtype.element_ty
    g = tl.arange(0, PADDED_GROUP)  # at least 16: what a tensor core takes
    d = tl.arange(0, PADDED)
    is_d = d < D
    is_query = (g < GROUP)[:, None] & is_d[None, :]
    start = (row * tl.num_programs(1) + shared) * size * D
    wait(EARLY)
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
    """Put one new token a row into the cache, and attend to it and to all before it.

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
    """One head of one row, and every `parts`-th block of its cache; part 0 has the new token.

    Earlier kernels of this step write neither the part of the cache that is read, nor the length.
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
    wait(EARLY)
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
    """attend() for one row, in parts of its cache that linear() joins: a program a head is slow.

    q (H, D), k and v (K, D), keys and values (1, K, S, D), length (1,). With `turned`, the norms of
    q and k and rotary_table() (2, S, 1, D), q and k are normalized and turned first. Returns the
    result of each part (P, H, D), and the logarithms of their weights in the mean (P, H).
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
