"""GPT-2 as published: its sizes, its numbers, its first loss."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sampler.export import model_config, transformers_weights
from sampler.generate import KVCache
from trainer import config as configs
from trainer.config import ModelConfig
from trainer.loop import autocast_for
from trainer.model import GPT2, HeadLoss, softmax_gradient
from trainer.optimizer import make_optimizer, update

SMALL = ModelConfig(num_layers=2, num_heads=4, embedding_size=32, context_length=64)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
    ),
]


def made(config: ModelConfig, seed: int = 0) -> GPT2:
    model = GPT2(config)
    model.init_weights(seed)
    return model


def draw(config: ModelConfig, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(
        config.vocab_size, (batch, config.context_length + 1), generator=generator
    )
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("gpt2_xl", 1_557_611_200),
    ],
)
def test_configs_have_the_published_number_of_parameters(name: str, count: int) -> None:
    config = configs.load(name).model
    with torch.device("meta"):
        model = GPT2(config)
    assert sum(p.numel() for p in model.parameters()) == count == config.num_parameters()


def test_num_parameters_counts_a_model_without_biases() -> None:
    config = replace(SMALL, bias=False)
    assert sum(p.numel() for p in GPT2(config).parameters()) == config.num_parameters()


def test_logits_and_gradients_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    model = made(SMALL)
    for parameter in model.parameters():  # biases and gains that do something
        torch.nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.1)
    settings = transformers.GPT2Config(**model_config(SMALL, "float32"))
    theirs = transformers.GPT2LMHeadModel(settings)
    missing, unexpected = theirs.load_state_dict(transformers_weights(model), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    inputs, targets = draw(SMALL)

    logits = model.logits(model.hidden(inputs))
    assert torch.allclose(logits, theirs(inputs).logits, atol=1e-5)

    loss = model(inputs, targets)
    their_loss = F.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten())
    assert torch.allclose(loss, their_loss, atol=1e-6)
    loss.backward()
    their_loss.backward()
    gradients = {f"transformer.{n}": p.grad for n, p in model.named_parameters()}
    for name, parameter in theirs.named_parameters():
        is_linear = parameter.ndim == 2 and ".h." in name
        ours = gradients[name].T if is_linear else gradients[name]
        assert torch.allclose(ours, parameter.grad, atol=1e-6), name


@pytest.mark.parametrize("name", ["tiny", "gpt2"])
def test_the_first_loss_is_that_of_a_fair_die(name: str) -> None:
    config = replace(configs.load(name).model, context_length=64)
    with torch.no_grad():
        loss = made(config)(*draw(config))
    assert abs(loss.item() - math.log(50257)) < 0.1


@pytest.mark.parametrize("device", DEVICES)
def test_head_loss_is_cross_entropy_of_the_head(device: str) -> None:
    """Against the plain computation in float64, with ignored targets and a last chunk in part."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = 150 if device == "cpu" else 9000
    x = torch.randn(num_tokens, 32, generator=generator)
    weight = torch.randn(1003, 32, generator=generator)
    targets = torch.randint(1003, (num_tokens,), generator=generator)
    targets[::7] = -100

    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    (F.cross_entropy(x64 @ weight64.T, targets) * 3).backward()

    ours = [t.to(device).requires_grad_() for t in (x, weight)]
    loss = HeadLoss.apply(*ours, targets.to(device), softmax_gradient)
    (loss * 3).backward()
    assert torch.allclose(
        loss.cpu().double(), F.cross_entropy(x64 @ weight64.T, targets), rtol=1e-3
    )
    for mine, exact in zip(ours, (x64, weight64), strict=True):
        error = (mine.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()
        assert error < (1e-6 if device == "cpu" else 2e-3)  # a GPU multiplies in TF32 here


def test_a_cache_changes_nothing() -> None:
    model = made(SMALL)
    inputs, _ = draw(SMALL, batch=1)
    with torch.no_grad():
        whole = model.hidden(inputs)
        cache = KVCache(SMALL, model.wte.weight)
        pieces = [model.hidden(inputs[:, :20], cache)]
        pieces += [model.hidden(inputs[:, n : n + 1], cache) for n in range(20, 64)]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)


def test_the_future_does_not_change_the_past() -> None:
    model = made(SMALL)
    inputs, _ = draw(SMALL, batch=1)
    other = inputs.clone()
    other[:, 40:] = 7
    with torch.no_grad():
        assert torch.equal(model.hidden(inputs)[:, :40], model.hidden(other)[:, :40])


def test_the_same_seed_gives_the_same_weights() -> None:
    same = zip(made(SMALL, 5).parameters(), made(SMALL, 5).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert not torch.equal(made(SMALL, 5).wte.weight, made(SMALL, 6).wte.weight)


@pytest.mark.parametrize("device", DEVICES)
def test_training_learns_a_batch_by_heart_and_skips_what_is_not_finite(device: str) -> None:
    config = replace(configs.load("tiny"), model=SMALL)
    model = made(SMALL).to(device)
    optimizer = make_optimizer(model, config)
    inputs, targets = (t.to(device) for t in draw(SMALL))
    losses = []
    for _ in range(30):
        with autocast_for(config, torch.device(device)):
            loss = model(inputs, targets)
        loss.backward()
        update(optimizer, 1e-2, torch.isfinite(loss.detach()))
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 3

    before = [p.detach().clone() for p in model.parameters()]
    steps = [state["step"].clone() for state in optimizer.state.values()]
    (model(inputs, targets) * math.nan).backward()
    update(optimizer, 1e-2, torch.tensor(False, device=device))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    after = [state["step"] for state in optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(steps, after, strict=True))
