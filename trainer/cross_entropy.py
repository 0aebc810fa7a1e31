"""The output head and cross-entropy in one: x (N, C), weight (V, C), targets (N,) -> sum of losses.

The logits of a step are by far its largest array. Here a chunk of them is overwritten with its own
gradient, softmax - one-hot, and used at once: nothing of size (N, V) outlives the forward pass.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens whose logits exist at one time: few enough for a CPU's cache, enough work for a GPU.
HEAD_CHUNK = {"cpu": 64, "cuda": 32768}
HEAD_MULTIPLE = 128  # a GPU's head is padded to this: tensor cores are slow at 50257 rows
IGNORED = -100  # a target without loss or gradient


class HeadLoss(torch.autograd.Function):
    """Sum of the losses, in nats. Forward also computes the gradients; backward scales them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        kind, num_tokens, size = x.device.type, len(x), len(weight)
        chunk = HEAD_CHUNK[kind]
        wants_gradient = any(ctx.needs_input_grad)
        w = F.pad(weight, (0, 0, 0, -size % HEAD_MULTIPLE)) if kind == "cuda" else weight
        loss = torch.zeros((), device=x.device)
        if wants_gradient:
            dx = torch.empty_like(x)
            # The products are as exact as the weights; the sum of several is kept in float32.
            dtype = x.dtype if num_tokens <= chunk else torch.promote_types(x.dtype, torch.float32)
            dw = torch.zeros(w.shape, dtype=dtype, device=x.device)
        for start in range(0, num_tokens, chunk):
            part = slice(start, start + chunk)
            logits = x[part] @ w.T  # (chunk, V and its padding)
            loss += softmax_gradient(logits, targets[part], size)
            if wants_gradient:
                torch.mm(logits, w, out=dx[part])
                if dw.dtype == x.dtype:
                    dw.addmm_(logits.T, x[part])
                else:
                    dw += logits.T @ x[part]
            del logits  # else it would live until the next chunk's replace it
        if wants_gradient:
            ctx.save_for_backward(dx, dw[:size].to(x.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dw = ctx.saved_tensors
        scale = gradients[0].to(dx.dtype)  # a power of two in training, so this loses nothing
        return dx * scale, dw * scale, None


def softmax_gradient(logits: Tensor, targets: Tensor, size: int) -> Tensor:
    """Sum of n tokens' losses; the first `size` columns of `logits` (n, V) become the gradient.

    Columns from `size` on are padding: they are zero and stay so.
    """
    if logits.is_cuda and (kernels := gpu_kernels()):
        rows, stride = logits.shape[0], logits.stride(0)
        losses = torch.empty(rows, device=logits.device)
        kernels.softmax_gradient[(rows,)](logits, targets, losses, stride, size, 2048, num_warps=4)
        return losses.sum()
    logits = logits[:, :size]
    right, counts = targets.clamp(min=0).unsqueeze(1), (targets != IGNORED).unsqueeze(1)
    wide = logits.float() if logits.element_size() < 4 else logits  # a copy, or the same memory
    wide -= wide.amax(1, keepdim=True)
    score = wide.gather(1, right)
    wide.exp_()
    total = wide.sum(1, keepdim=True)
    wide *= counts / total
    wide.scatter_add_(1, right, -counts.to(wide.dtype))
    if wide is not logits:
        logits.copy_(wide)
    return ((total.log() - score) * counts).sum()


@functools.cache
def gpu_kernels() -> Any:
    """The Triton kernels, None without Triton."""
    try:
        from trainer import kernels
    except ImportError:
        return None
    return kernels
