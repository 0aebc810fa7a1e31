"""A GPU's decode step in few kernels: what a single new token a row needs, in Triton.

Before: decode.py, which calls these on a GPU. After: the same numbers as trainer/model.py gives.

Writing one token is a walk through all weights with almost nothing to compute, so its time is that
of reading memory and of starting kernels. `attend` reads a row's cache to its own length, whatever
the memory behind it; `gpt2_logits` is GPT-2 in five kernels a layer for one row and in eight for
more. Everything is summed in float32.
"""

# ruff: noqa: N803  (Triton writes constants in capitals)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from trainer.model import GPT2, Cache

FEW_PROGRAMS = 128  # about the multiprocessors of a large card


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, keys, values, lengths, out,
    q_row, q_head, kv_row, kv_head, size, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row and head. Each of BLOCK lanes takes every BLOCK-th token of the cache and keeps a
    running softmax of its own (Milakov and Gimelshein 2018); they are joined at the end."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    shared_head = head // GROUP
    d = tl.arange(0, PADDED)
    is_d = d < D
    length = tl.load(lengths + row)
    query = tl.load(q + row * q_row + head * q_head + d, mask=is_d, other=0).to(tl.float32) * scale
    new = row * kv_row + shared_head * kv_head + d
    new_key = tl.load(k + new, mask=is_d, other=0).to(tl.float32)
    new_value = tl.load(v + new, mask=is_d, other=0).to(tl.float32)
    start = (row * (HEADS // GROUP) + shared_head) * size * D
    fits = d < tl.where(length < size, D, 0)
    tl.store(keys + start + length * D + d, new_key.to(keys.dtype.element_ty), mask=fits)
    tl.store(values + start + length * D + d, new_value.to(values.dtype.element_ty), mask=fits)

    best = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, PADDED), tl.float32)
    for first in range(0, length, BLOCK):
        s = first + tl.arange(0, BLOCK)
        is_there = s < length
        at = start + s[:, None] * D + d[None, :]
        both = is_there[:, None] & is_d[None, :]
        key = tl.load(keys + at, mask=both, other=0).to(tl.float32)
        value = tl.load(values + at, mask=both, other=0).to(tl.float32)
        score = tl.where(is_there, tl.sum(key * query[None, :], 1), -1e30)
        higher = tl.maximum(best, score)
        decay = tl.exp(best - higher)
        part = tl.where(is_there, tl.exp(score - higher), 0.0)
        total = total * decay + part
        mixed = mixed * decay[:, None] + part[:, None] * value
        best = higher

    new_score = tl.sum(query * new_key, 0)
    highest = tl.maximum(tl.max(best, 0), new_score)
    decay = tl.exp(best - highest)
    new_part = tl.exp(new_score - highest)
    weight = tl.sum(total * decay, 0) + new_part
    result = (tl.sum(mixed * decay[:, None], 0) + new_part * new_value) / weight
    place = out + (row * HEADS + head) * D + d
    tl.store(place, result.to(out.dtype.element_ty), mask=is_d)


def attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor
) -> Tensor:
    """Put one new token a row into the cache and attend to it and all before.

    q (B, H, 1, D); k and v (B, G, 1, D), H a multiple of G; keys and values (B, G, S, D), written
    at `lengths` (B,). Returns (B, H, 1, D).
    """
    num_rows, heads, _, size = q.shape
    group = heads // k.shape[1]
    assert k.stride() == v.stride()
    assert q.stride(3) == k.stride(3) == 1
    out = torch.empty(num_rows, heads, 1, size, dtype=q.dtype, device=q.device)
    few = num_rows * heads <= FEW_PROGRAMS
    _attend[(num_rows, heads)](
        q, k, v, keys, values, lengths, out,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), keys.shape[2], size**-0.5,
        HEADS=heads, GROUP=group, D=size, PADDED=triton.next_power_of_2(size),
        BLOCK=256 if few else 64, num_warps=8 if few else 4,
    )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _linear(  # type: ignore[no-untyped-def]
    x, gain, shift, weight, bias, out, num_outputs, epsilon,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
    SHIFT: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of a matrix times a vector, with LayerNorm before and GELU or a sum after."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_n = n < num_outputs
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for first in tl.static_range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        is_k = k < K
        at = n.to(tl.int64)[:, None] * K + k[None, :]
        # Asked for first, so that it is under way while x is normalized.
        part = tl.load(weight + at, mask=is_n[:, None] & is_k[None, :], other=0).to(tl.float32)
        value = tl.load(x + k, mask=is_k, other=0).to(tl.float32)
        if NORM:  # BLOCK_K covers all of K then
            value = tl.where(is_k, value - tl.sum(value, 0) / K, 0.0)
            value = value * tl.rsqrt(tl.sum(value * value, 0) / K + epsilon)
            value = value * tl.load(gain + k, mask=is_k, other=0).to(tl.float32)
            if SHIFT:
                value = value + tl.load(shift + k, mask=is_k, other=0).to(tl.float32)
        total += part * value[None, :]
    result = tl.sum(total, 1)
    if BIAS:
        result += tl.load(bias + n, mask=is_n, other=0).to(tl.float32)
    if GELU:  # tanh-approximated: x * (1 + tanh(z)) / 2 = x * sigmoid(2z)
        cubed = result * result * result
        result = result * tl.sigmoid(1.5957691216057308 * (result + 0.044715 * cubed))
    if ADD:
        result += tl.load(out + n, mask=is_n, other=0)
    tl.store(out + n, result, mask=is_n)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: nn.LayerNorm | None = None,
    gelu: bool = False,
    add_to: Tensor | None = None,
) -> Tensor:
    """gelu(weight @ norm(x) + bias) for one row: x of K numbers, weight (N, K) -> (1, N) float32.

    With `add_to` (1, N) the result is added to it in place.
    """
    num_outputs, size = weight.shape
    assert x.numel() == size
    assert x.is_contiguous()
    assert weight.is_contiguous()
    out = add_to
    if out is None:
        out = torch.empty(1, num_outputs, dtype=torch.float32, device=x.device)
    rows = min(8, max(1, triton.next_power_of_2(num_outputs) // 512))
    block = triton.next_power_of_2(size) if norm else min(1024, triton.next_power_of_2(size))
    has_shift = norm is not None and norm.bias is not None
    _linear[(triton.cdiv(num_outputs, rows),)](
        x, norm.weight if norm else x, norm.bias if norm and has_shift else x, weight,
        x if bias is None else bias, out, num_outputs, norm.eps if norm else 0.0,
        K=size, BLOCK_K=block, ROWS=rows, NORM=norm is not None, SHIFT=has_shift,
        BIAS=bias is not None, GELU=gelu, ADD=add_to is not None, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]
    x, y, gain, shift, out, size, epsilon, BLOCK: tl.constexpr, SHIFT: tl.constexpr
):
    """One row: x += y, and LayerNorm of the sum."""
    row = tl.program_id(0).to(tl.int64) * size
    k = tl.arange(0, BLOCK)
    is_k = k < size
    value = tl.load(x + row + k, mask=is_k, other=0)
    value += tl.load(y + row + k, mask=is_k, other=0).to(tl.float32)
    tl.store(x + row + k, value, mask=is_k)
    value = tl.where(is_k, value - tl.sum(value, 0) / size, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / size + epsilon)
    value = value * tl.load(gain + k, mask=is_k, other=0).to(tl.float32)
    if SHIFT:
        value = value + tl.load(shift + k, mask=is_k, other=0).to(tl.float32)
    tl.store(out + row + k, value.to(out.dtype.element_ty), mask=is_k)


def add_norm(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> Tensor:
    """x += y in place, both (B, C), x in float32; returns norm(x) in the type of its weights."""
    assert x.is_contiguous()
    assert y.is_contiguous()
    out = torch.empty(x.shape, dtype=norm.weight.dtype, device=x.device)
    has_shift = norm.bias is not None
    _add_norm[(len(x),)](
        x, y, norm.weight, norm.bias if has_shift else x, out, x.shape[1], norm.eps,
        BLOCK=triton.next_power_of_2(x.shape[1]), SHIFT=has_shift, num_warps=4,
    )  # fmt: skip
    return out


def gpt2_logits(model: GPT2, tokens: Tensor, cache: Cache) -> Tensor:
    """model.logits(model.hidden(tokens, cache)) for one token a row: (B,) -> (B, V).

    One row's logits are in float32. The sum of the layers is kept in float32 in any case.
    """
    rows = len(tokens)
    x = (model.wte(tokens) + model.wpe(cache.positions[:, 0])).float()  # (B, C)
    block: Any
    if rows == 1:  # a vector: five kernels a layer
        for layer, block in enumerate(model.h):
            attention, mlp = block.attn, block.mlp
            qkv = linear(x, attention.c_attn.weight, attention.c_attn.bias, norm=block.ln_1)
            q, k, v = qkv.view(1, 3, attention.num_heads, 1, -1).unbind(1)  # each (1, H, 1, D)
            y = cache.attend(layer, q, k, v)
            linear(y, attention.c_proj.weight, attention.c_proj.bias, add_to=x)
            wide = linear(x, mlp.c_fc.weight, mlp.c_fc.bias, norm=block.ln_2, gelu=True)
            linear(wide, mlp.c_proj.weight, mlp.c_proj.bias, add_to=x)
        return linear(x, model.wte.weight, None, norm=model.ln_f)
    y = torch.zeros_like(x)
    for layer, block in enumerate(model.h):  # eight, and the library's matrix products
        qkv = block.attn.c_attn(add_norm(x, y, block.ln_1))
        q, k, v = qkv.view(rows, 3, block.attn.num_heads, 1, -1).unbind(1)  # each (B, H, 1, D)
        y = block.attn.c_proj(cache.attend(layer, q, k, v).view(rows, -1))
        y = block.mlp(add_norm(x, y, block.ln_2))
    return model.logits(add_norm(x, y, model.ln_f))
