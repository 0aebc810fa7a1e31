"""Linear layers whose products are of 8-bit floats: forward, and the gradient of the input.

Before: model.py's linear layers in the blocks. After: the same layers, on cards that multiply 8-bit
floats at twice the speed (Ada, Hopper). The gradient of the weight stays in bfloat16: it would need
both its factors transposed, which costs what its product would save.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning": activations and weights in e4m3 (3 bits
of mantissa, up to 448), gradients in e5m2 (2 bits, up to 57344). Weights are scaled by their
largest number once a step. The other scales are fixed, so that nothing has to be looked through for
its largest number first, and rounding becomes part of the kernel that makes the array. That is
sound here: a linear layer's input is normalized (LayerNorm bounds it by its gain times sqrt(C)), or
a mean or GELU of such; and as the loss is a sum, the size of a token's gradients does not depend on
the batch. What is too large all the same is clipped. All scales are powers of two.
"""

from typing import Any

import torch
from torch import Tensor, nn

INPUT_SCALE = 4.0  # e4m3 is then exact to 6 % from 0.004 to 112
GRADIENT_SCALE = 256.0  # e5m2 is then exact to 13 % from 2.4e-7 to 224


def to_float8(x: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale in 8 bits; what is out of range becomes the largest number."""
    most = torch.finfo(dtype).max
    return (x * scale).clamp(-most, most).to(dtype)


def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> Tensor:
    """(a * scale_a) @ (b * scale_b).T + bias in bfloat16, from a (M, K) and b (N, K) in 8 bits."""
    if a.is_cuda:
        return torch._scaled_mm(
            a, b.t(), scale_a, scale_b, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    out = (a.float() * scale_a) @ (b.float() * scale_b).T
    return (out if bias is None else out + bias).to(torch.bfloat16)


class Product(torch.autograd.Function):
    """x (..., K) -> x @ weight.T + bias (..., N), by way of 8 bits."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight8: Tensor,
        transposed8: Tensor,
        undo_input: Tensor,
        undo_gradient: Tensor,
        undo_weight: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        rows8 = to_float8(rows, INPUT_SCALE, torch.float8_e4m3fn)
        ctx.save_for_backward(rows, transposed8, undo_gradient, undo_weight)
        ctx.has_bias, ctx.shape = bias is not None, x.shape
        return product(rows8, weight8, undo_input, undo_weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, transposed8, undo_gradient, undo_weight = ctx.saved_tensors
        dy = gradients[0].reshape(-1, gradients[0].shape[-1])
        dy8 = to_float8(dy, GRADIENT_SCALE, torch.float8_e5m2)
        dx = product(dy8, transposed8, undo_gradient, undo_weight, None).view(ctx.shape)
        db = dy.sum(0) if ctx.has_bias else None
        return dx, dy.T @ rows, db, None, None, None, None, None


class Float8Linear(nn.Linear):
    """A linear layer, (..., K) -> (..., N), with its weight kept in 8 bits, too, in both orders."""

    weight8: Tensor  # (N, K)
    transposed8: Tensor  # (K, N)
    undo_input: Tensor  # the scales' inverses, which the products take
    undo_gradient: Tensor
    undo_weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.sizes = getattr(linear, "sizes", (linear.out_features,))  # model.py's Fused
        dtype, device = torch.float8_e4m3fn, linear.weight.device
        weight8 = torch.empty(linear.weight.shape, dtype=dtype, device=device)
        self.register_buffer("weight8", weight8, persistent=False)
        self.register_buffer("transposed8", weight8.T.contiguous(), persistent=False)
        for name, scale in (("input", INPUT_SCALE), ("gradient", GRADIENT_SCALE), ("weight", 1.0)):
            undo = torch.tensor(1 / scale, device=device)
            self.register_buffer(f"undo_{name}", undo, persistent=False)
        self.quantize()

    @torch.no_grad()
    def quantize(self) -> None:
        """Take up the weight as it is now."""
        dtype = self.weight8.dtype
        largest = self.weight.abs().amax().float().clamp(min=1e-12)
        scale = torch.exp2(torch.log2(torch.finfo(dtype).max / largest).floor())
        self.weight8.copy_(to_float8(self.weight, scale, dtype))
        self.transposed8.copy_(self.weight8.T)
        self.undo_weight.copy_(1 / scale)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Product.apply(  # type: ignore[no-untyped-call]
            x,
            self.weight,
            self.bias,
            self.weight8,
            self.transposed8,
            self.undo_input,
            self.undo_gradient,
            self.undo_weight,
        )
        return out


def convert(model: nn.Module) -> None:
    """Put Float8Linear in the place of every linear layer; names and parameters stay."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and not isinstance(child, Float8Linear):
                setattr(parent, name, Float8Linear(child))
