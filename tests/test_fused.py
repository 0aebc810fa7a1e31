"""The kernels of training give the plain trunk's numbers.

On a GPU they run as they are; elsewhere in Triton's interpreter, where Triton is installed and
TRITON_INTERPRET=1 is set. Otherwise these tests skip.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainer import fused
from trainer.config import ModelConfig
from trainer.model import LanguageModel, build_model, rotary_table

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU here, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from trainer import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# No size is a power of two, and no row a multiple of a block.
MODERN = ModelConfig(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    embedding_size=72,
    context_length=96,
    vocab_size=777,
    family="qwen3",
    bias=False,
)


def made(config: ModelConfig) -> LanguageModel:
    model = build_model(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():  # all that does nothing at first
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, 0.5, 0.2, generator=generator)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, 0.0, 0.05, generator=generator)
    return model.to(DEVICE).requires_grad_(False)


def differences(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [float((a.detach().cpu() - b.detach()).norm() / b.detach().norm()) for a, b in pairs]


def values_and_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], gradients: list[Tensor]
) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    torch.autograd.backward(outputs, gradients)
    return [*outputs, *(x.grad for x in inputs if x.grad is not None)]


def differ(
    ours: Callable[..., tuple[Tensor, ...]],
    plain: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
    gradients: list[Tensor],
) -> float:
    """The largest difference from the plain computation in float64."""
    exact = [[x.double() for x in given] for given in (inputs, gradients)]
    there = [[x.to(DEVICE) for x in given] for given in (inputs, gradients)]
    found, wanted = values_and_gradients(ours, *there), values_and_gradients(plain, *exact)
    return max(differences(found, wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1, 4096, 10_001])
def test_gradients_are_added_up_in_float32(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sums, fresh = torch.randn(2, size, generator=generator)
    ours, fresh = sums.clone().to(DEVICE), fresh.to(dtype)
    kernels.accumulate[(-(-size // 4096),)](ours, fresh.to(DEVICE), size, 4096)
    assert torch.equal(ours.cpu(), sums + fresh.float())


@pytest.mark.parametrize("shape", [(3, 41, 72), (1, 1, 288), (2, 100, 600)])
def test_a_gate_has_the_plain_ones_values_and_gradients(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    h = 3 * torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
    dy = torch.randn(shape, generator=generator)

    def plain(h: Tensor) -> tuple[Tensor]:
        gate, up = h.chunk(2, -1)
        return (F.silu(gate) * up,)

    assert differ(lambda h: (fused.Gate.apply(h),), plain, [h], [dy]) < 1e-6


@pytest.mark.parametrize(("size", "num_heads", "num_kv_heads"), [(24, 4, 2), (16, 3, 3)])
def test_heads_are_normalized_and_rotated_and_so_are_their_gradients(
    size: int, num_heads: int, num_kv_heads: int
) -> None:
    B, T = 3, 41
    config = replace(MODERN, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=size)
    turns = rotary_table(config)[:, :T]  # of a longer context: not contiguous
    sizes = (num_heads * size, num_kv_heads * size, num_kv_heads * size)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, sum(sizes), generator=generator)
    gains = [0.5 + torch.rand(size, generator=generator) for _ in range(2)]
    dq = torch.randn(B, T, num_heads, size, generator=generator).transpose(1, 2)
    dk = torch.randn(B, num_kv_heads, T, size, generator=generator)
    dv = torch.randn(size, T, B, num_kv_heads, generator=generator).permute(2, 3, 1, 0)

    def plain(x: Tensor, *gains: Tensor) -> tuple[Tensor, ...]:
        heads = [part.unflatten(-1, (-1, size)) for part in x.split(sizes, -1)]
        for n, gain in enumerate(gains):
            normal = F.rms_norm(heads[n], (size,), gain, 1e-6)
            cos, sin = turns.double()
            heads[n] = normal * cos + normal.roll(size // 2, -1) * sin
        return tuple(part.transpose(1, 2) for part in heads)

    def ours(x: Tensor, *gains: Tensor) -> tuple[Tensor, ...]:
        return fused.Rotate.apply(x, *gains, turns.to(x.device), sizes)

    assert differ(ours, plain, [x, *gains], [dq, dk, dv]) < 2e-6


@pytest.mark.parametrize("shape", [(3, 41, 72), (1, 1, 256), (2, 100, 600)])
def test_an_rms_norm_has_the_plain_ones_values_and_gradients(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, dx, dn = torch.randn(4, *shape, generator=generator)
    gain = 1 + torch.randn(shape[-1], generator=generator)

    def plain(x: Tensor, y: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
        return x + y, F.rms_norm(x + y, gain.shape, gain, 1e-6)

    assert differ(fused.AddRMSNorm.apply, plain, [x, y, gain], [dx, dn]) < 2e-6


def test_the_fused_trunk_has_the_plain_ones_loss_and_gradients() -> None:
    num_layers, shape = (2, (2, 20)) if DEVICE == "cpu" else (3, (3, 42))
    exact, ours = (made(replace(MODERN, num_layers=num_layers)).requires_grad_() for _ in range(2))
    exact = exact.cpu().double()
    ours.trunk = partial(fused.hidden, ours)
    tokens = torch.randint(777, shape, generator=torch.Generator().manual_seed(0))
    for model in (exact, ours):
        given = tokens.to(model.wte.weight.device)
        loss = model(given[:, :-1], given[:, 1:])
        loss.backward()
        model.found = [loss, *(p.grad for p in model.parameters())]
    tolerance = 2e-6 if DEVICE == "cpu" else 2e-3
    names = ["loss", *dict(ours.named_parameters())]
    found = dict(zip(names, differences(ours.found, exact.found), strict=True))
    assert all(difference < tolerance for difference in found.values()), found  # not NaN either


def test_a_recomputed_layer_gives_the_same_gradients_and_keeps_its_inputs() -> None:
    tokens, found, kept = torch.arange(80, device=DEVICE).view(2, 40), [], []
    again = partial(checkpoint, fused.layer, use_reentrant=False)
    for layer in (fused.layer, again):
        model = made(MODERN).bfloat16().requires_grad_()
        trunk = partial(fused.hidden, model, layer=layer)
        kept.append(kept_bytes(trunk, tokens))
        trunk(tokens).square().sum().backward()
        found.append(
            [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[1] < kept[0] / 2


def kept_bytes(trunk: Callable[..., Any], tokens: Tensor) -> int:
    sizes: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        kept = trunk(tokens)  # held, so that no address is used twice
    del kept
    return sum(sizes.values())


def test_a_fused_layer_keeps_no_more_for_the_way_back() -> None:
    """Than what the compiler makes of the plain one; elsewhere what is cut the same way."""
    backend = "inductor" if DEVICE == "cuda" else "aot_eager_decomp_partition"
    tokens = torch.zeros(3, 40, dtype=torch.long, device=DEVICE)
    plain, ours = [], []
    for num_layers in (1, 2):
        model = made(replace(MODERN, num_layers=num_layers)).bfloat16().requires_grad_()
        torch.compiler.reset()
        plain.append(kept_bytes(torch.compile(model.hidden, backend=backend), tokens))
        ours.append(kept_bytes(partial(fused.hidden, model), tokens))
    assert ours[1] - ours[0] < 1.01 * (plain[1] - plain[0])


def test_a_step_of_the_fused_trunk_imports_no_compiler() -> None:
    """That would take seconds of a start. In a fresh process."""
    program = """
import sys
from functools import partial
import torch
from trainer import config_file, fused
from trainer.model import build_model
from trainer.optimizer import Optimizer
small = ["vocab_size=777", "num_layers=1", "num_heads=2", "embedding_size=32", "context_length=16"]
small += ["head_size=16", "mlp_size=48"]
small = [f"model.{each}" for each in small]
chosen = config_file.load("forge_124m", ("precision=bfloat16", "evaluate.num_tokens=16", *small))
device = "cuda" if torch.cuda.is_available() else "cpu"
model = build_model(chosen.model)
model.init_weights(0)
optimizer = Optimizer(model.to(device), chosen)
model.trunk = partial(fused.hidden, model)
tokens = torch.arange(17, device=device)[None]
model(tokens[:, :-1], tokens[:, 1:]).backward()
assert optimizer.update(1e-3, 16, torch.ones((), dtype=torch.bool, device=device)) > 0
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
