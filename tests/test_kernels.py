"""The GPU's kernels give the plain model's numbers.

On a GPU they run as they are; elsewhere in Triton's interpreter, where Triton is installed and
TRITON_INTERPRET=1 is set. Otherwise these tests skip.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from sampler import decode, draw
from sampler.decode import Decoder
from sampler.draw import Sampling, Steps
from trainer import fused
from trainer.config import ModelConfig
from trainer.model import LanguageModel, build_model, rotary_table

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU here, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from sampler import attention, fast, kernels
from trainer import kernels as kernels_of_training

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# No size is a power of two, and no row a multiple of a block.
SMALL = ModelConfig(num_layers=2, num_heads=3, embedding_size=72, context_length=96, vocab_size=777)
MODERN = replace(SMALL, family="qwen3", bias=False, head_size=16, num_heads=4, num_kv_heads=2)


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


@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("num_rows", [1, 5, 30])
def test_attention_is_that_of_each_rows_own_length(num_rows: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    heads, size, room = 6, 24, 300
    q = torch.randn(num_rows, heads, 1, size, generator=generator).to(DEVICE)
    k = torch.randn(num_rows, groups, 1, size, generator=generator).to(DEVICE)
    v = torch.randn(num_rows, 2 * groups, 1, size, generator=generator).to(DEVICE)[:, groups:]
    keys, values = torch.randn(2, num_rows, groups, room, size, generator=generator).to(DEVICE)
    lengths = torch.randint(room, (num_rows,), generator=generator)
    lengths[-1] = 0
    before = keys.clone()
    y = attention.attend(q, k, v, keys, values, lengths.to(DEVICE))
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(keys[row, :, length], k[row, :, 0])
        assert torch.equal(keys[row, :, :length], before[row, :, :length])
        assert torch.equal(keys[row, :, length + 1 :], before[row, :, length + 1 :])
        there = keys[row, :, : length + 1], values[row, :, : length + 1]
        wanted = F.scaled_dot_product_attention(q[row], *there, enable_gqa=groups < heads)
        assert torch.allclose(y[row], wanted, atol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 16, 75, 299])
def test_parts_of_attention_join_to_the_whole(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PARTS", 3)
    monkeypatch.setattr(
        attention, "PART_NUMBERS", 16 * 32
    )  # 16 tokens, so that a part takes several
    generator = torch.Generator().manual_seed(length)
    heads, size, room = 3, 24, 300
    q, k, v = torch.randn(3, heads, size, generator=generator).to(DEVICE)
    keys, values = torch.randn(2, 1, heads, room, size, generator=generator).to(DEVICE)
    matrix = torch.randn(40, heads * size, generator=generator).to(DEVICE)
    before = keys.clone()
    given = keys, values, torch.tensor([length], device=DEVICE)
    parts, log_weights = attention.attend_parts(q, k, v, *given)
    y = kernels.linear(parts, matrix, None, log_weights=log_weights)
    assert torch.equal(keys[0, :, length], k)
    keys[0, :, length] = before[0, :, length]
    assert torch.equal(keys, before)
    keys[0, :, length] = k
    there = keys[:, :, : length + 1], values[:, :, : length + 1]
    wanted = F.scaled_dot_product_attention(q[None, :, None], *there).flatten() @ matrix.T
    assert torch.allclose(y[0], wanted, atol=1e-4)


def test_only_few_of_the_likeliest_are_drawn_with_kernels() -> None:
    few = (Sampling(top_k=64), Sampling(temperature=0), Sampling(temperature=0, top_k=65))
    assert all(fast.has_draw(sampling) for sampling in few)
    assert not any(fast.has_draw(sampling) for sampling in (Sampling(), Sampling(top_k=65)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=0.8, top_k=50),
        Sampling(temperature=1.3, top_k=64, top_p=0.4, min_p=0.02),
        Sampling(temperature=3.0, top_k=5, top_p=0.1),
    ],
)
def test_the_likeliest_tokens_are_drawn_as_the_plain_way_draws(
    sampling: Sampling, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows, num_tokens, step = 6, 2500, 2
    if DEVICE == "cpu":  # the interpreter sorts number by number
        monkeypatch.setattr(fast, "VOCABULARY_BLOCK", 128)
        num_rows, num_tokens = 2, 200
    order = torch.stack([torch.randperm(num_tokens, generator=generator) for _ in range(num_rows)])
    # 64 that differ in bfloat16, too: which of two equals is taken is nobody's business.
    distinct = torch.where(order < 64, order / 4, -9.0)
    logits = F.pad(distinct, (0, 12), value=99.0).to(DEVICE, dtype)[:, :num_tokens]
    steps = Steps(num_rows, torch.device(DEVICE), log=False)
    steps.noise[:4] = torch.rand(4, num_rows, dtype=torch.float64, generator=generator)
    steps.number.fill_(step)
    lengths = torch.arange(num_rows, device=DEVICE)
    assert fast.has_draw(sampling)
    fast.draw_top(logits, sampling, steps, lengths)
    wanted = draw.draw(logits, sampling, steps.noise[step])
    assert steps.last.tolist() == steps.drawn[step].tolist() == wanted.tolist()
    assert steps.number.tolist() == [step + 1] * num_rows
    assert lengths.tolist() == list(range(1, num_rows + 1))


@pytest.mark.parametrize(
    ("num_rows", "config", "sampling"),
    [
        (1, SMALL, Sampling(top_p=0.9)),
        pytest.param(
            1,
            replace(SMALL, bias=False),
            Sampling(temperature=0),
            marks=pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter is slow"),
        ),
        (1, MODERN, Sampling(top_k=20)),
        (3, SMALL, Sampling(top_k=20, min_p=0.01, repetition_penalty=1.2)),
        (3, SMALL, Sampling()),
        (3, MODERN, Sampling(top_p=0.9)),
    ],
)
def test_a_step_with_kernels_draws_what_the_plain_step_draws(
    num_rows: int, config: ModelConfig, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {row: list(range(row, 20 * row + 3)) for row in range(num_rows)}
    generator = torch.Generator().manual_seed(0)
    num_steps = 8
    if DEVICE == "cpu":  # the interpreter is slow: by the program, and by the number that is sorted
        monkeypatch.setattr(fast, "VOCABULARY_BLOCK", 128)
        monkeypatch.setattr(attention, "PARTS", 2)
        num_steps, vocab_size = 2, 131
        if config == SMALL and num_rows == 1:
            vocab_size = 259  # from 257 on, a program of linear() has two outputs
        config = replace(config, num_layers=1, embedding_size=18, vocab_size=vocab_size)
        if config.family == "qwen3":
            config = replace(config, head_size=6, mlp_size=40)
    noise = torch.rand(num_steps, num_rows, dtype=torch.float64, generator=generator)
    drawn, logs = {}, {}
    for with_kernels in (False, True):
        monkeypatch.setattr(decode, "has_kernels", lambda weight, answer=with_kernels: answer)
        decoder = Decoder(made(config), num_rows, sampling, log=True)
        decoder.read(texts)
        drawn[with_kernels], logs[with_kernels] = decoder.start(noise).read()
    assert drawn[True] == drawn[False]
    assert torch.allclose(torch.tensor(logs[True]), torch.tensor(logs[False]), atol=1e-4)


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
    kernels_of_training.accumulate[(-(-size // 4096),)](ours, fresh.to(DEVICE), size, 4096)
    assert torch.equal(ours.cpu(), sums + fresh.float())


@pytest.mark.parametrize("shape", [(3, 41, 72), (1, 1, 288), (2, 100, 600)])
def test_gelu_gives_the_bias_before_it_its_gradient(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = 3 * torch.randn(2, *shape, generator=generator)
    bias = torch.randn(shape[-1], generator=generator)
    assert (
        differ(
            lambda x, bias: (fused.Gelu.apply(x + bias.detach(), bias),),
            lambda x, bias: (F.gelu(x + bias, approximate="tanh"),),
            [x, bias],
            [dy],
        )
        < 1e-6
    )


@pytest.mark.parametrize("size", [24, 16])
def test_gradients_of_queries_keys_and_values_are_packed_from_any_order(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    B, H, T = 3, 5, 41
    x = torch.randn(B, T, 3 * H * size, generator=generator)
    bias = torch.randn(3 * H * size, generator=generator)
    dq = torch.randn(B, T, H, size, generator=generator).transpose(1, 2)
    dk = torch.randn(B, H, T, size, generator=generator)
    dv = torch.randn(size, T, B, H, generator=generator).permute(2, 3, 1, 0)

    def plain(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        parts = (x + bias).chunk(3, -1)
        return tuple(part.view(B, T, H, size).transpose(1, 2) for part in parts)

    def ours(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return fused.Split.apply(x + bias.detach(), bias, H)

    assert differ(ours, plain, [x, bias], [dq, dk, dv]) < 1e-6


@pytest.mark.parametrize("shape", [(3, 41, 72), (1, 1, 256), (2, 100, 600)])
def test_a_layer_norm_gives_the_bias_before_it_its_gradient(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, dx, dn = torch.randn(4, *shape, generator=generator)
    y_bias, gain, bias = 1 + torch.randn(3, shape[-1], generator=generator)

    def plain(x: Tensor, y: Tensor, y_bias: Tensor, *gain_and_bias: Tensor) -> tuple[Tensor, ...]:
        x = x + (y + y_bias)
        return x, F.layer_norm(x, gain.shape, *gain_and_bias)

    def ours(x: Tensor, y: Tensor, y_bias: Tensor, *gain_and_bias: Tensor) -> tuple[Tensor, ...]:
        return fused.AddNorm.apply(x, y + y_bias.detach(), y_bias, *gain_and_bias)

    assert differ(ours, plain, [x, y, y_bias, gain, bias], [dx, dn]) < 2e-6


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


def compiled(trunk: Callable[..., Any]) -> Callable[..., Any]:
    """As training has it on a GPU; elsewhere what is cut the same way, but runs by itself."""
    backend = "inductor" if DEVICE == "cuda" else "aot_eager_decomp_partition"
    torch.compiler.reset()
    return torch.compile(trunk, fullgraph=True, dynamic=False, backend=backend)


@pytest.mark.parametrize(
    ("config", "compiles"),
    [(SMALL, False), (SMALL, True), (MODERN, False)],
    ids=["gpt2", "gpt2 compiled", "qwen3"],
)
def test_the_fused_trunk_has_the_plain_ones_loss_and_gradients(
    config: ModelConfig, compiles: bool
) -> None:
    num_layers, shape = (2, (2, 20)) if DEVICE == "cpu" else (3, (3, 42))
    exact, ours = (made(replace(config, num_layers=num_layers)).requires_grad_() for _ in range(2))
    exact = exact.cpu().double()
    ours.trunk = partial(fused.hidden, ours)
    if compiles:
        ours.trunk = compiled(ours.trunk)
    counters.clear()
    tokens = torch.randint(777, shape, generator=torch.Generator().manual_seed(0))
    for model in (exact, ours):
        given = tokens.to(model.wte.weight.device)
        loss = model(given[:, :-1], given[:, 1:])
        loss.backward()
        model.found = [loss, *(p.grad for p in model.parameters())]
    assert counters["stats"]["unique_graphs"] == int(compiles)
    tolerance = 2e-6 if DEVICE == "cpu" else 2e-3
    names = ["loss", *dict(ours.named_parameters())]
    found = dict(zip(names, differences(ours.found, exact.found), strict=True))
    assert all(difference < tolerance for difference in found.values()), found  # not NaN either


def kept_bytes(trunk: Callable[..., Any], tokens: Tensor) -> int:
    sizes: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        kept = trunk(tokens)  # held, so that no address is used twice
    del kept
    return sum(sizes.values())


@pytest.mark.parametrize("config", [SMALL, MODERN], ids=["gpt2", "qwen3"])
def test_a_fused_layer_keeps_no_more_for_the_way_back(config: ModelConfig) -> None:
    tokens = torch.zeros(3, 40, dtype=torch.long, device=DEVICE)
    plain, ours = [], []
    for num_layers in (1, 2):
        model = made(replace(config, num_layers=num_layers)).bfloat16().requires_grad_()
        trunk = partial(fused.hidden, model)
        plain.append(kept_bytes(compiled(model.hidden), tokens))
        ours.append(kept_bytes(trunk if config is MODERN else compiled(trunk), tokens))
    assert ours[1] - ours[0] < 1.01 * (plain[1] - plain[0])


@pytest.mark.parametrize("name", ["gpt2", "forge_124m"])
def test_a_step_of_the_fused_trunk_alone_imports_no_compiler(name: str) -> None:
    """That would take seconds of a start. In a fresh process."""
    program = f"""
import sys
from functools import partial
import torch
from trainer import config, fused
from trainer.model import build_model
from trainer.optimizer import Optimizer
small = ["vocab_size=777", "num_layers=1", "num_heads=2", "embedding_size=32", "context_length=16"]
small += ["head_size=16", "mlp_size=48"] if "{name}" == "forge_124m" else []
small = [f"model.{{each}}" for each in small]
chosen = config.load("{name}", ("precision=bfloat16", "evaluate.num_tokens=16", *small))
device = "cuda" if torch.cuda.is_available() else "cpu"
model = build_model(chosen.model)
model.init_weights(0)
optimizer = Optimizer(model.to(device), chosen)
model.trunk = partial(fused.hidden, model)
tokens = torch.arange(17, device=device)[None]
model(tokens[:, :-1], tokens[:, 1:]).backward()
optimizer.collect()
assert optimizer.update(1e-3, 16, torch.ones((), dtype=torch.bool, device=device)) > 0
assert "torch._dynamo" not in sys.modules
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
