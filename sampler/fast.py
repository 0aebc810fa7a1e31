"""A decode step in few Triton kernels: the models' logits, and drawing among the likeliest.

Generating one token reads all weights and computes almost nothing, so it takes the time of reading
memory and of starting kernels: five a layer for one row, seven for GPT-2 with more rows, and two to
draw.
"""

# ruff: noqa: N803  (Triton writes constants in capitals)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from sampler.attention import attend, attend_parts
from sampler.draw import MIN_TEMPERATURE, Sampling, Steps
from sampler.kernels import add_norm, early_start, embed, linear, project, wait
from trainer.model import GPT2, LanguageModel, gelu

MOST_TOP_K = 64  # tokens that draw_top() sorts
VOCABULARY_BLOCK = 1024


@triton.jit
def _block_top(
    logits, candidates, stride, num_tokens,
    K: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The K largest logits of a row's block, each with its token in one integer of 32 bits.

    Its upper half has the order of the float.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    wait(EARLY)
    logit = tl.load(logits + row * stride + n, mask=n < num_tokens, other=-float("inf"))
    place = (row * tl.num_programs(1) + block) * K + tl.arange(0, K)
    bits = logit.to(tl.int16, bitcast=True).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFF)
    tl.store(candidates + place, tl.topk((bits << 16) | (0xFFFF - n), K))


@triton.jit
def _draw_top(
    logits, candidates, noise, number, drawn, last, lengths, num_candidates,
    top_k, temperature, top_p, min_p,
    K: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row: the top_k of all blocks' candidates, and one of these, as draw.draw() chooses."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    n = tl.arange(0, BLOCK)
    wait(EARLY)
    place = row.to(tl.int64) * num_candidates + n
    packed = tl.load(candidates + place, mask=n < num_candidates, other=-0x7FFFFFFF)
    packed = tl.topk(packed, K)
    bits = packed >> 16
    bits = (bits ^ ((bits >> 31) & 0x7FFF)).to(tl.int16)
    tokens = (0xFFFF - (packed & 0xFFFF)).to(tl.int64)
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


def has_draw(logits: Tensor, sampling: Sampling) -> bool:
    """Whether draw_top() draws this way: among few of the likeliest, and from bfloat16."""
    is_few = sampling.is_greedy or (sampling.top_k or MOST_TOP_K + 1) <= MOST_TOP_K
    return is_few and logits.dtype == torch.bfloat16


def draw_top(logits: Tensor, sampling: Sampling, steps: Steps, lengths: Tensor) -> None:
    """Draw a token a row from its likeliest, and count the step.

    logits (B, V) in bfloat16. For the step n = number[row] it takes noise[n, row], writes the token
    to drawn[n, row] and last[row], and adds 1 to lengths[row] and number[row].
    """
    num_rows, num_tokens = logits.shape
    assert logits.stride(1) == 1
    assert num_tokens <= 2**16
    top_k = 1 if sampling.is_greedy else min(sampling.top_k or 1, num_tokens)
    kept, blocks = max(16, triton.next_power_of_2(top_k)), triton.cdiv(num_tokens, VOCABULARY_BLOCK)
    candidates = torch.empty(num_rows, blocks * kept, dtype=torch.int, device=logits.device)
    _block_top[(num_rows, blocks)](
        logits, candidates, logits.stride(0), num_tokens,
        K=kept, BLOCK=VOCABULARY_BLOCK, num_warps=4 if num_rows == 1 else 2,
        **early_start(after_ours=num_rows == 1),
    )  # fmt: skip
    _draw_top[(num_rows,)](
        logits, candidates, steps.noise, steps.number, steps.drawn, steps.last, lengths,
        blocks * kept, top_k, max(sampling.temperature, MIN_TEMPERATURE),
        2.0 if sampling.top_p is None else sampling.top_p, sampling.min_p or 0.0,
        K=kept, BLOCK=triton.next_power_of_2(blocks * kept), num_warps=8, **early_start(),
    )  # fmt: skip


def has_step(model: LanguageModel, num_rows: int) -> bool:
    """Whether logits() computes a step of this model with `num_rows` rows."""
    return num_rows == 1 or isinstance(model, GPT2)


def logits(model: LanguageModel, tokens: Tensor, store: Tensor, lengths: Tensor) -> Tensor:
    """model.logits(model.hidden(tokens, cache)) for one token a row: (B,) -> (B, V).

    `store` and `lengths` are those of the KVCache. The sum of the layers is kept in float32.
    """
    if len(tokens) == 1:
        return row_logits(model, tokens, store, lengths)
    assert isinstance(model, GPT2)
    return gpt2_logits(model, tokens, store, lengths)


def row_logits(model: Any, tokens: Tensor, store: Tensor, lengths: Tensor) -> Tensor:
    """(1,) -> (1, V), in five kernels a layer."""
    is_gpt2, turned = isinstance(model, GPT2), None
    head, head_size = model.wte.weight, model.config.head_dim()
    x = embed(tokens, lengths, head, model.wpe.weight if is_gpt2 else None)  # (1, C)
    for layer, block in enumerate(model.h):
        attention, mlp = block.attn, block.mlp
        if is_gpt2:
            into, output, up, down = attention.c_attn, attention.c_proj, mlp.c_fc, mlp.c_proj
        else:
            into, output = attention.qkv_proj, attention.o_proj
            up, down = mlp.gate_up_proj, mlp.down_proj
            turned = (attention.q_norm, attention.k_norm, model.turns)
        qkv = linear(x, into.weight, into.bias, norm=block.ln_1).view(-1, head_size)
        q, k, v = torch.split(qkv, [size // head_size for size in into.sizes])  # (H or K, D)
        keys, values = store[layer]
        heads, log_weights = attend_parts(q, k, v, keys, values, lengths, turned)
        linear(heads, output.weight, output.bias, add_to=x, log_weights=log_weights)
        wide = linear(x, up.weight, up.bias, norm=block.ln_2, gelu=is_gpt2, gate=not is_gpt2)
        linear(wide, down.weight, down.bias, add_to=x)
    return linear(x, head, None, norm=model.ln_f, dtype=head.dtype)


def gpt2_logits(model: GPT2, tokens: Tensor, store: Tensor, lengths: Tensor) -> Tensor:
    """(B,) -> (B, V), in seven kernels a layer, two of them the library's."""
    x = embed(tokens, lengths, model.wte.weight, model.wpe.weight)  # (B, C)
    y: Tensor | None = None
    bias: Tensor | None = None
    block: Any
    for layer, block in enumerate(model.h):
        attention, mlp = block.attn, block.mlp
        qkv = attention.c_attn(add_norm(x, y, bias, block.ln_1))
        q, k, v = qkv.view(len(tokens), 3, attention.num_heads, 1, -1).unbind(1)  # (B, H, 1, D)
        keys, values = store[layer]
        heads = attend(q, k, v, keys, values, lengths).view(len(tokens), -1)
        y, bias = project(heads, attention.c_proj.weight), attention.c_proj.bias
        wide = linear_gelu(add_norm(x, y, bias, block.ln_2), mlp.c_fc)
        y, bias = project(wide, mlp.c_proj.weight), mlp.c_proj.bias
    return model.logits(add_norm(x, y, bias, model.ln_f))


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """GELU of a linear layer; the library computes it with the product where there is a bias."""
    if layer.bias is None or not x.is_cuda:
        return gelu(layer(x))
    return torch._addmm_activation(layer.bias, x, layer.weight.T, use_gelu=True)
