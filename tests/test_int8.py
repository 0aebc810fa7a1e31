"""Linear layers by 8-bit integers: what rounding allows, and the same bits each time.

On a GPU they run as they are; elsewhere in Triton's interpreter, where Triton is installed and
TRITON_INTERPRET=1 is set. Otherwise these tests skip.
"""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_fused import kept_bytes, made
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainer import config_file, fused, int8
from trainer.config import ModelConfig
from trainer.memory import cut_step

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU here, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

GPU = torch.device("cuda")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODEL = ModelConfig(
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_size=128,
    embedding_size=128,
    mlp_size=256,
    context_length=128,
    vocab_size=777,
    family="qwen3",
    bias=False,
)


@pytest.fixture
def given() -> tuple[Tensor, ...]:
    """x (1152, 256) with rows of different size, weight (128, 256), dy (1152, 128) transposed.

    There are more rows than a group of tiles has.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1152, 256, generator=generator) * torch.rand(1152, 1, generator=generator)
    weight, dy = (torch.randn(128, size, generator=generator) for size in (256, 1152))
    return x.to(DEVICE), weight.to(DEVICE), dy.T.to(DEVICE)


def product(x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """The output and both gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = int8.Product.apply(x, weight)
    y.backward(dy)
    return [y.detach(), x.grad, weight.grad]


def rounded(x: Tensor, along: int) -> Tensor:
    """x in float64, in steps of 1/127 of the largest |number| along a dimension."""
    step = x.double().abs().amax(along, keepdim=True) / 127
    return (x.double() / step).round() * step


def difference(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_all_three_products_are_those_of_the_rounded_arrays(given: tuple[Tensor, ...]) -> None:
    x, weight, dy = given
    exact = [
        rounded(x, 1) @ rounded(weight, 1).T,
        rounded(dy, 1) @ rounded(weight, 0),
        rounded(dy, 0).T @ rounded(x, 0),
    ]
    plain = [x @ weight.T, dy @ weight, dy.T @ x]
    for found, wanted, near in zip(product(*given), exact, plain, strict=True):
        assert difference(found, wanted) < 1e-4  # a number between two steps may go either way
        assert difference(found, near.double()) < 0.015


def test_each_number_is_rounded_to_the_nearest_step_in_both_directions(
    given: tuple[Tensor, ...],
) -> None:
    x = given[0]
    rows, columns = int8.round_both(x)
    for found, numbers in ((rows, x), (columns, x.T)):
        assert torch.equal(found.tops, numbers.abs().amax(1))
        step = found.tops[:, None] / 127
        assert ((found.integers * step - numbers).abs() <= 0.5001 * step).all()


def test_the_same_arrays_give_the_same_bits(given: tuple[Tensor, ...]) -> None:
    for first, second in zip(product(*given), product(*given), strict=True):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in the interpreter
@pytest.mark.parametrize("odd", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_not_lost(odd: str, given: tuple[Tensor, ...]) -> None:
    x, weight, dy = given
    x[3, 4] = float(odd)
    y, _, dw = product(x, weight, dy)
    assert not y[3].isfinite().any()
    assert y[4].isfinite().all()
    assert not dw[:, 4].isfinite().any()


def test_zeros_stay_zeros(given: tuple[Tensor, ...]) -> None:
    x, weight, dy = given
    y, _, dw = product(torch.zeros_like(x), weight, dy)
    assert not y.any()
    assert not dw.any()


def test_a_layer_computes_as_ever_while_paused_and_afterwards() -> None:
    model = made(MODEL).requires_grad_()
    layer = model.h[0].attn.o_proj
    x = torch.randn(1, 128, 256, device=DEVICE)
    exact = F.linear(x, layer.weight)
    for on in (True, False):
        int8.use(model, on)
        assert torch.equal(layer(x), exact) != on
        with int8.paused(model):
            assert torch.equal(layer(x), exact)
        assert torch.equal(layer(x), exact) != on


def test_a_model_learns_nearly_the_same_and_keeps_less_for_the_way_back() -> None:
    tokens = torch.arange(128, device=DEVICE).view(1, 128)
    losses, gradients, kept = [], [], []
    again = partial(checkpoint, fused.layer, use_reentrant=False)
    for on, layer in ((False, fused.layer), (True, fused.layer), (True, again)):
        model = made(MODEL).bfloat16().requires_grad_()
        model.trunk = partial(fused.hidden, model, layer=layer)
        int8.use(model, on)
        loss = model(tokens, tokens)
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.h[0].mlp.down_proj.weight.grad.float().flatten())
        weights = sum(parameter.nbytes for parameter in model.h.parameters())
        kept.append(kept_bytes(model.trunk, tokens) - weights // (2 if on else 1))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert F.cosine_similarity(*gradients[:2], dim=0) > 0.98
    assert kept[1] < kept[0]
    assert losses[2] == losses[1]  # recomputed
    assert torch.equal(gradients[2], gradients[1])


@pytest.mark.parametrize(
    ("windows", "setting", "fits"),
    [
        (16, "seed=1", True),
        (128, "seed=1", True),
        (129, "seed=1", False),  # a sum could overflow
        (16, "model.mlp_size=2000", False),
        (16, "model.num_kv_heads=3", True),
        (16, "precision=float32", False),
    ],
)
def test_sizes_are_multiples_of_a_tile(
    windows: int, setting: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    config = config_file.load("forge_124m", (setting,))
    assert int8.available(config, torch.device("cuda"), windows) == fits
    assert not int8.available(config, torch.device("cpu"), windows)


def test_a_large_card_takes_micro_batches_whose_sums_fit() -> None:
    config = config_file.load("forge_124m", ("precision=int8",))
    for limit in (24e9, 140e9):
        cut = cut_step(config, 1, limit)
        assert int8.available(replace(config, precision="bfloat16"), GPU, cut.micro_batch_size)
    assert cut.micro_batch_size == 120
