"""GPT-2 as published: tokens (B, T) -> logits (B, T, V).

Before: windows.py. After: loop.py (loss) and sampler/generate.py (text).

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; code openai/gpt-2
src/model.py. Learned positions, pre-LayerNorm, tanh-approximated GELU, head tied to the token
embedding. Modules carry the names of transformers' GPT2LMHeadModel, so that export is a transpose.

Dimensions: B batch, T time, C embedding, H heads, D = C / H, V vocabulary.
"""

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig

# Tokens whose logits exist at one time: a CPU wants them in its cache, a GPU enough work.
HEAD_CHUNK = {"cpu": 64, "cuda": 8192}
HEAD_MULTIPLE = 128  # rows to which a GPU's head is padded: 50257 is no size for tensor cores


class Cache(Protocol):
    """Keys and values of the tokens before (sampler/generate.py has one)."""

    length: int  # tokens already in it

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, D) to a layer and return all of it: (B, H, length + T, D)."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads = layer, config.num_heads
        size = config.embedding_size
        self.c_attn = nn.Linear(size, 3 * size, bias=config.bias)
        self.c_proj = nn.Linear(size, size, bias=config.bias)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        B, T, C = x.shape  # noqa: N806
        # (B, T, 3C) -> three of (B, H, T, D)
        q, k, v = self.c_attn(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        # A single new token may look at everything; a whole prompt or window is causal.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return out


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.embedding_size
        self.c_fc = nn.Linear(size, 4 * size, bias=config.bias)
        self.c_proj = nn.Linear(4 * size, size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return out


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.embedding_size, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.embedding_size, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT2(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.embedding_size)
        self.wpe = nn.Embedding(config.context_length, config.embedding_size)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.embedding_size, bias=config.bias)
        # What training runs; loop.py may put compiled ones here.
        self.trunk = self.hidden
        self.softmax_gradient = softmax_gradient

    def init_weights(self, seed: int) -> None:
        """GPT-2's initialization, the same on every rank and device.

        Normal with 0.02 for weights and 0.01 for positions (openai/gpt-2 src/model.py), zero for
        biases, and projections into the residual stream scaled by 1/sqrt(2L) (the paper, 2.3).
        One number departs from it: the token embedding is at most 0.3/sqrt(C). It is the head too,
        and at 0.02 its logits start with a variance of C * 0.0004, which lifts the first loss
        0.15 (C = 768) to 0.4 (C = 1600) above ln V; this way every size starts at ln V.
        """
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / math.sqrt(2 * self.config.num_layers)
        embedding = min(0.02, 0.3 / math.sqrt(self.config.embedding_size))
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                deviation = residual if name.endswith("c_proj.weight") else 0.02
                deviation = {"wte.weight": embedding, "wpe.weight": 0.01}.get(name, deviation)
                drawn = torch.empty(weight.shape).normal_(0.0, deviation, generator=generator)
                with torch.no_grad():
                    weight.copy_(drawn)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The last layer's normalized output: tokens (B, T) -> (B, T, C)."""
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for block in self.h:
            x = block(x, cache)
        out: Tensor = self.ln_f(x)
        return out

    def logits(self, x: Tensor) -> Tensor:
        """The tied head: (..., C) -> (..., V)."""
        return F.linear(x, self.wte.weight)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per token, over targets (B, T) that are not -100."""
        x = self.trunk(tokens).flatten(0, 1)
        loss: Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
            x, self.wte.weight, targets.flatten(), self.softmax_gradient
        )
        return loss


class HeadLoss(torch.autograd.Function):
    """Head and cross-entropy in one, a chunk of tokens at a time: x (N, C), weight (V, C) -> loss.

    The logits of all tokens would be the largest array of a step by far. Here each chunk's logits
    are overwritten with their gradient, softmax - one-hot, and used up at once, so that forward
    leaves only the gradients of x and weight, and backward has no more to do than to scale them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softmax_gradient: Any
    ) -> Tensor:
        kind, num_tokens = x.device.type, len(x)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        wants_gradient = any(ctx.needs_input_grad)
        with torch.autocast(kind, enabled=False):
            size = len(weight)
            w = weight.to(dtype)
            if kind == "cuda":
                w = F.pad(w, (0, 0, 0, -size % HEAD_MULTIPLE))
            num_targets = (targets != -100).sum()
            loss = torch.zeros((), device=x.device)
            if wants_gradient:
                dx = torch.empty(x.shape, dtype=dtype, device=x.device)
                dw = torch.zeros(w.shape, dtype=weight.dtype, device=x.device)
            for start in range(0, num_tokens, HEAD_CHUNK[kind]):
                part = slice(start, start + HEAD_CHUNK[kind])
                xs = x[part].to(dtype)
                logits = xs @ w.T  # (chunk, V and its padding)
                right = targets[part].clamp(min=0).unsqueeze(1)  # (chunk, 1)
                counts = (targets[part] != -100).unsqueeze(1)
                loss += softmax_gradient(logits[:, :size], right, counts)
                if wants_gradient:
                    torch.mm(logits, w, out=dx[part])
                    if dtype == dw.dtype:
                        dw.addmm_(logits.T, xs)
                    else:  # products in bfloat16, their sum over the chunks in float32
                        dw += logits.T @ xs
            if wants_gradient:
                ctx.save_for_backward(dx, dw[:size], num_targets)
                ctx.dtype = x.dtype
            return loss / num_targets

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dw, num_targets = ctx.saved_tensors
        scale = gradients[0] / num_targets
        return dx.to(ctx.dtype) * scale, dw * scale, None, None


def softmax_gradient(logits: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """Sum of the losses of n tokens; `logits` (n, V) become softmax - one-hot, in place.

    `right` (n, 1) are the targets; rows where `counts` (n, 1) is false count for nothing.
    """
    if logits.dtype == torch.float32 and not logits.is_cuda:
        return _softmax_gradient_in_cache(logits, right, counts)
    # For the compiler: one pass for the sums and one for the gradient.
    wide = logits.float()
    log_total = wide.logsumexp(1, keepdim=True)
    score = wide.gather(1, right)
    is_right = torch.arange(logits.shape[1], device=logits.device) == right
    logits.copy_((torch.exp(wide - log_total) - is_right.float()) * counts)
    return ((log_total - score) * counts).sum()


def _softmax_gradient_in_cache(logits: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """The same without a second array of that size, for a CPU's cache."""
    logits -= logits.amax(1, keepdim=True)
    score = logits.gather(1, right)
    logits.exp_()
    total = logits.sum(1, keepdim=True)
    logits *= counts / total
    logits.scatter_add_(1, right, -counts.to(logits.dtype))
    return ((total.log() - score) * counts).sum()
