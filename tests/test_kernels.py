"""The GPU's kernels give the plain model's numbers.

On a GPU they run as they are; elsewhere in Triton's interpreter, where Triton is installed and
TRITON_INTERPRET=1 is set. Otherwise these tests skip.
"""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sampler import decode, draw
from sampler.decode import Decoder
from sampler.draw import Sampling, Steps
from trainer.config import ModelConfig
from trainer.model import LanguageModel, build_model

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU here, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from sampler import attention, fast, kernels

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
    logits = torch.zeros(1, 9, dtype=torch.bfloat16)
    assert all(fast.has_draw(logits, sampling) for sampling in few)
    assert not any(fast.has_draw(logits, sampling) for sampling in (Sampling(), Sampling(top_k=65)))
    assert not fast.has_draw(logits.float(), few[0])


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=0.8, top_k=50),
        Sampling(temperature=1.3, top_k=64, top_p=0.4, min_p=0.02),
        Sampling(temperature=3.0, top_k=5, top_p=0.1),
    ],
)
def test_kernels_draw_the_same_tokens_among_the_likeliest(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows, num_tokens, step = 6, 2500, 2
    if DEVICE == "cpu":  # the interpreter sorts number by number
        monkeypatch.setattr(fast, "VOCABULARY_BLOCK", 128)
        num_rows, num_tokens = 2, 200
    order = torch.stack([torch.randperm(num_tokens, generator=generator) for _ in range(num_rows)])
    # 64 that differ in bfloat16, too: which of two equals is taken is nobody's business.
    distinct = torch.where(order < 64, order / 4, -9.0)
    logits = F.pad(distinct, (0, 12), value=99.0).to(DEVICE, torch.bfloat16)[:, :num_tokens]
    steps = Steps(num_rows, torch.device(DEVICE), log=False)
    steps.noise[:4] = torch.rand(4, num_rows, dtype=torch.float64, generator=generator)
    steps.number.fill_(step)
    lengths = torch.arange(num_rows, device=DEVICE)
    assert fast.has_draw(logits, sampling)
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
def test_a_step_with_kernels_draws_the_same_tokens(
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
