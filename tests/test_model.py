"""Both families as published: their sizes, their numbers, their first loss."""

import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from sampler.decode import KVCache
from trainer import backends, fused
from trainer import config_file as configs
from trainer.config import ModelConfig
from trainer.cross_entropy import HeadLoss
from trainer.layouts import model_config, their_views, transformers_weights
from trainer.model import LanguageModel, build_model, rotary_table, rotate
from trainer.optimizer import Optimizer, neuron_scales, orthogonalize

SMALL = ModelConfig(num_layers=2, num_heads=4, embedding_size=32, context_length=64)
# Sizes that nothing can mix up: 6 heads of 8 share 2 of keys and values, beside 32 channels.
MODERN = ModelConfig(
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_size=8,
    embedding_size=32,
    mlp_size=80,
    context_length=64,
    family="qwen3",
    bias=False,
)
FAMILIES = [pytest.param(SMALL, id="gpt2"), pytest.param(MODERN, id="qwen3")]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
    ),
]


def made(config: ModelConfig, seed: int = 0) -> LanguageModel:
    model = build_model(config)
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
        ("forge_124m", 123_554_304),  # ours: no more than GPT-2 of the same name
        ("forge_350m", 359_800_832),
        ("forge_770m", 778_118_656),
    ],
)
def test_configs_have_the_number_of_parameters_that_they_say(name: str, count: int) -> None:
    config = configs.load(name).model
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == count == config.num_parameters()


@pytest.mark.parametrize("config", [replace(SMALL, bias=False), MODERN], ids=["gpt2", "qwen3"])
def test_num_parameters_counts_a_model_without_biases(config: ModelConfig) -> None:
    assert sum(p.numel() for p in build_model(config).parameters()) == config.num_parameters()


@pytest.mark.parametrize("config", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(config: ModelConfig) -> None:
    transformers = pytest.importorskip("transformers")
    model = made(config)
    for parameter in model.parameters():  # biases and gains that do something
        torch.nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.1)
    settings = transformers.AutoConfig.for_model(**model_config(config, "float32"))
    theirs = transformers.AutoModelForCausalLM.from_config(settings)
    missing, unexpected = theirs.load_state_dict(transformers_weights(model), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    inputs, targets = draw(config)

    logits = model.logits(model.hidden(inputs))
    assert torch.allclose(logits, theirs(inputs).logits, atol=1e-5)

    loss = model(inputs, targets) / targets.numel()
    their_loss = F.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten())
    assert torch.allclose(loss, their_loss, atol=1e-6)
    loss.backward()
    their_loss.backward()
    ours = their_views(model, {name: p.grad for name, p in model.named_parameters()})
    found = dict(theirs.named_parameters())
    assert {*ours} == {*found} - {"lm_head.weight"}
    for name, gradient in ours.items():
        assert torch.allclose(gradient, found[name].grad, atol=1e-6), name


def test_rotation_turns_pairs_so_that_only_the_distance_counts() -> None:
    turns = rotary_table(MODERN)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotate(q, turns[:, 5:6]).norm(), q.norm())

    def product(at: int, other: int) -> float:
        return float((rotate(q, turns[:, at, None]) * rotate(k, turns[:, other, None])).sum())

    assert product(30, 20) == pytest.approx(product(50, 40), abs=1e-5)
    assert abs(product(30, 20) - product(30, 25)) > 1e-3


@pytest.mark.parametrize("name", ["tiny", "gpt2", "forge_124m"])
def test_the_first_loss_is_that_of_a_fair_die(name: str) -> None:
    config = replace(configs.load(name).model, context_length=64, num_layers=2)
    with torch.no_grad():
        loss = made(config)(*draw(config, batch=4)).item() / (4 * 64)
    assert abs(loss - math.log(50257)) < 0.1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_loss_is_cross_entropy_of_the_head(device: str, dtype: str) -> None:
    """Against the plain computation in float64, with ignored targets and a last chunk in part."""
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    num_tokens = 150 if device == "cpu" else 33_000
    x = torch.randn(num_tokens, 32, generator=generator).to(kind)
    weight = torch.randn(1003, 32, generator=generator).to(kind)
    targets = torch.randint(1003, (num_tokens,), generator=generator)
    targets[::7] = -100

    x64, weight64 = (t.double().requires_grad_() for t in (x, weight))
    exact_loss = F.cross_entropy(x64 @ weight64.T, targets, reduction="sum")
    (exact_loss / 4).backward()

    ours = [t.to(device).requires_grad_() for t in (x, weight)]
    loss = HeadLoss.apply(*ours, targets.to(device))
    (loss / 4).backward()
    tolerance = {"float32": 1e-6 if device == "cpu" else 2e-3, "float16": 2e-3, "bfloat16": 1e-2}
    assert loss.item() == pytest.approx(exact_loss.item(), rel=tolerance[dtype])
    for mine, exact in zip(ours, (x64, weight64), strict=True):
        assert mine.grad.dtype == kind
        error = (mine.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()
        assert error < tolerance[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_head_loss_of_what_is_not_finite_is_not_finite(device: str) -> None:
    for bad in (math.nan, math.inf):
        x = torch.ones(4, 8, device=device)
        x[2, 3] = bad
        weight = torch.ones(20, 8, device=device)
        loss = HeadLoss.apply(x, weight, torch.zeros(4, dtype=torch.int64, device=device))
        assert not math.isfinite(loss.item())


@pytest.mark.parametrize("device", DEVICES)
def test_the_flat_optimizer_is_adamw_on_clipped_gradients(device: str) -> None:
    """Against torch's AdamW, a parameter at a time, and its clipping, both in float64."""
    config = replace(configs.load("tiny"), model=SMALL, precision="float32")
    ours, plain = made(SMALL).to(device), made(SMALL).double()
    optimizer = Optimizer(ours, config)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    generator = torch.Generator().manual_seed(2)
    clipped = []
    for step in range(6):
        plain.zero_grad()
        for mine, exact in zip(ours.parameters(), plain.parameters(), strict=True):
            gradient = torch.randn(exact.shape, generator=generator) * (100.0 if step % 2 else 0.01)
            for half in (gradient * 0.25, gradient * 0.75):  # two accumulation steps
                mine.grad += half.to(device)
            exact.grad = gradient.double() / 50  # tokens
        exact_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), config.optimizer.max_norm)
        adamw.step()
        norm = optimizer.update(1e-2, 50, torch.tensor(True, device=device))
        assert norm.item() == pytest.approx(exact_norm.item(), rel=1e-4)
        clipped.append(norm.item() > 1)
    assert {True, False} == {*clipped}
    for mine, exact in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.cpu().double(), exact, atol=2e-6)


@pytest.mark.parametrize("config", FAMILIES)
def test_a_cache_changes_nothing(config: ModelConfig) -> None:
    model = made(config)
    inputs, _ = draw(config, batch=1)
    with torch.no_grad():
        whole = model.hidden(inputs)
        cache = KVCache(config, 1, model.wte.weight)
        parts = [model.hidden(inputs[:, :20], cache.for_prompts(torch.tensor([0]), 20))]
        for n in range(20, 64):
            cache.lengths.fill_(n)
            parts.append(model.hidden(inputs[:, n : n + 1], cache.for_step(n + 1)))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("config", FAMILIES)
def test_the_future_does_not_change_the_past(config: ModelConfig) -> None:
    model = made(config)
    inputs, _ = draw(config, batch=1)
    other = inputs.clone()
    other[:, 40:] = 7
    with torch.no_grad():
        assert torch.equal(model.hidden(inputs)[:, :40], model.hidden(other)[:, :40])


@pytest.mark.parametrize("config", FAMILIES)
def test_compiling_by_block_compiles_one_for_all(config: ModelConfig) -> None:
    """Each anew would take as long as the whole, and from the ninth on torch gives up."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = made(replace(config, num_layers=3))
    for block in model.h:
        block.compile(backend=counter, dynamic=False)
    model(*draw(config)).backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("config", FAMILIES)
def test_the_same_seed_gives_the_same_weights(config: ModelConfig) -> None:
    same = zip(made(config, 5).parameters(), made(config, 5).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert not torch.equal(made(config, 5).wte.weight, made(config, 6).wte.weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (96, 24)])
def test_orthogonalized_matrices_keep_their_directions_and_lose_their_sizes(
    device: str, shape: tuple[int, int]
) -> None:
    """Against the singular value decomposition in float64."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, -1.5, min(shape), dtype=torch.float64)
    matrices = []
    for _ in range(3):
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(drawn, full_matrices=False)
        matrices.append(u @ torch.diag(sizes) @ vh)
    given = torch.stack(matrices)
    made_so = orthogonalize(given.float().to(device)).cpu().double()
    u, _, vh = torch.linalg.svd(given, full_matrices=False)
    inner = u.mT @ made_so @ vh.mT  # diagonal, if the directions are kept
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < (1e-4 if device == "cpu" else 0.1)
    assert values.min() > 0.5
    assert values.max() < 1.3


def no_scales(directions: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """Instead of neuron_scales(): what is left is Muon."""
    return torch.ones(len(directions), 1, 1, device=directions.device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "model_config", [replace(SMALL, bias=False), MODERN], ids=["gpt2", "qwen3"]
)
def test_muon_is_torch_s_on_each_matrix_of_the_blocks(
    device: str, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fused here are several matrices there; embeddings and gains are AdamW's."""
    monkeypatch.setattr("trainer.optimizer.neuron_scales", no_scales)
    few = replace(model_config, vocab_size=500)
    options = replace(
        configs.load("tiny").optimizer,
        name="muon",
        peak_lr=0.01,
        muon_lr=0.03,
        muon_weight_decay=0.4,
        max_norm=1e9,
    )
    config = replace(configs.load("tiny"), model=few, optimizer=options, precision="float32")
    ours, plain = made(few).to(device), made(few)
    optimizer = Optimizer(ours, config)
    matrices, others = {}, {}
    for name, parameter in plain.named_parameters():
        sizes = (len(parameter),)
        if name.startswith("h.") and parameter.ndim == 2:
            sizes = getattr(plain.get_submodule(name.removesuffix(".weight")), "sizes", sizes)
            for n, part in enumerate(parameter.detach().split(sizes)):
                matrices[name, n] = torch.nn.Parameter(part.clone())
        else:
            others[name] = torch.nn.Parameter(parameter.detach().clone())
    assert len(matrices) == 2 * (6 if few.family == "gpt2" else 7)
    muon = torch.optim.Muon(matrices.values(), lr=0.03, weight_decay=options.muon_weight_decay)
    groups = [
        {"params": [p for p in others.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in others.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=options.betas)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        for name, parameter in ours.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad.copy_(gradient * 7)  # of 7 tokens
            if name in others:
                others[name].grad = gradient
                continue
            parts = [matrices[key] for key in matrices if key[0] == name]
            for part, own in zip(parts, gradient.split([len(p) for p in parts]), strict=True):
                part.grad = own
        optimizer.update(0.01, 7, torch.tensor(True, device=device))
        muon.step()
        adamw.step()
    before = dict(made(few).named_parameters())
    for name, parameter in ours.named_parameters():
        exact = others.get(name)
        if exact is None:
            exact = torch.cat([matrices[key] for key in matrices if key[0] == name])
        moved = (exact - before[name]).norm()
        assert moved > 0, name
        # torch's iterations are in bfloat16 on a CPU, too
        tolerance = 1e-4 if name in others else 0.02
        assert (parameter.cpu() - exact).norm() / moved < tolerance, name


@pytest.mark.parametrize("shape", [(3, 40, 24), (3, 24, 40), (3, 24, 24)])
def test_neurons_are_scaled_alike_and_the_norm_stays(shape: tuple[int, int, int]) -> None:
    """NorMuon's formulas, matrix by matrix; a neuron of a wide matrix is a column."""
    n, rows, columns = shape
    generator = torch.Generator().manual_seed(4)
    mean_squares, average = torch.zeros(n, max(shape)), torch.zeros(n, max(shape))
    for step in range(3):
        given = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator)
        found = given * neuron_scales(given, mean_squares, torch.tensor(0.05))
        for number, matrix in enumerate(given.mT if rows < columns else given):
            average[number] = 0.95 * average[number] + 0.05 * (matrix**2).mean(1)
            exact = matrix / average[number].sqrt()[:, None]
            exact *= matrix.norm() / exact.norm()
            exact = exact.T if rows < columns else exact
            torch.testing.assert_close(found[number], exact)
            if step == 0:  # there is no past to be measured against
                parts = exact.norm(dim=0 if rows < columns else 1)
                torch.testing.assert_close(parts, parts.mean().expand(max(shape)))
    unsound = mean_squares.clone()
    neuron_scales(given, unsound, torch.tensor(0.0))
    assert torch.equal(unsound, mean_squares)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_of_muon_is_normalized_neuron_by_neuron(
    family: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one leaves all neurons of a matrix with as large a part, as there is no past."""
    few = replace(family, vocab_size=500, bias=False)
    options = replace(configs.load("tiny").optimizer, name="muon", muon_weight_decay=0.0)
    moved = []
    for scales in (neuron_scales, no_scales):
        monkeypatch.setattr("trainer.optimizer.neuron_scales", scales)
        model = made(few)
        optimizer = Optimizer(model, replace(configs.load("tiny"), model=few, optimizer=options))
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.update(0.01, 1, torch.tensor(True))
        moved.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, ours in moved[0].items():
        if not name.startswith("h.") or ours.ndim < 2:
            assert torch.equal(ours, moved[1][name]), name
            continue
        sizes = getattr(model.get_submodule(name.removesuffix(".weight")), "sizes", (len(ours),))
        for part, plain in zip(ours.split(sizes), moved[1][name].split(sizes), strict=True):
            rows, columns = part.shape
            neurons = part.norm(dim=1 if rows >= columns else 0)
            torch.testing.assert_close(
                neurons, neurons.mean().expand(len(neurons)), rtol=1e-4, atol=0
            )
            torch.testing.assert_close(part.norm(), plain.norm(), rtol=1e-4, atol=0)
            assert (part - plain).norm() > 0.01 * plain.norm()


def test_muon_s_momentum_rises_over_its_warm_up() -> None:
    options = replace(configs.load("tiny").optimizer, name="muon", muon_warmup_steps=4)
    few = replace(SMALL, vocab_size=500)
    optimizer = Optimizer(made(few), replace(configs.load("tiny"), model=few, optimizer=options))
    found = []
    for _ in range(6):
        optimizer.update(0.0, 1, torch.tensor(True))
        found.append(float(optimizer.muon_momentum()))
    assert found == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "family"),
    [("adamw", SMALL), ("muon", SMALL), ("muon", MODERN)],
    ids=["gpt2-adamw", "gpt2-muon", "qwen3-muon"],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_learns_a_batch_by_heart_and_skips_what_is_not_finite(
    device: str, precision: str, name: str, family: ModelConfig
) -> None:
    few = replace(family, vocab_size=500)
    config = replace(configs.load("tiny"), model=few, precision=precision)
    config = replace(config, optimizer=replace(config.optimizer, name=name))
    model = made(few).to(device)
    optimizer = Optimizer(model, config)
    assert model.wte.weight.dtype == getattr(torch, precision)
    for part in optimizer.parts.values():
        assert part.masters.dtype == part.gradients.dtype == torch.float32
    inputs, targets = (t.to(device) for t in draw(few))
    losses = []

    def step(factor: float) -> None:
        loss = model(inputs, targets)
        (loss * factor).backward()
        optimizer.update(1e-2, targets.numel(), torch.isfinite(loss.detach()))
        losses.append(loss.item() / targets.numel())

    for _ in range(30):
        step(1.0)
    assert losses[-1] < losses[0] - 3

    def everything() -> dict[str, torch.Tensor]:
        tensors = optimizer.masters() | optimizer.state()
        return {key: shared.mine.clone() for key, shared in tensors.items()}

    before = everything()
    step(math.nan)
    for key, tensor in everything().items():
        assert torch.equal(tensor, before[key]), key
    step(1.0)
    assert not torch.equal(everything()["wte.weight"], before["wte.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_blocks_give_the_same_gradients_and_keep_only_their_inputs(
    family: ModelConfig,
) -> None:
    inputs, targets = draw(family)
    losses, gradients, kept = [], [], []
    for recomputes in (False, True):
        model, sizes = made(family), [0]
        backends.compile_model(model, configs.load("tiny"), torch.device("cpu"), recomputes)

        def note(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes[0] += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            x = model.trunk(inputs)
        loss = model.loss(x, targets)
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad for parameter in model.parameters()])
        kept.append(sizes[0])
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(("config", "compiles"), [(SMALL, True), (MODERN, False)])
def test_a_gpu_compiles_what_is_faster_for_it(
    config: ModelConfig, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "available", lambda *_: True)
    model = build_model(config)
    backends.compile_model(model, configs.load("tiny"), torch.device("cuda"))
    assert isinstance(model.trunk, functools.partial) is not compiles


@pytest.mark.parametrize(("capability", "chosen"), [(8, "FLASH"), (9, "CUDNN"), (12, "FLASH")])
def test_the_attention_kernel_is_the_fastest_of_that_kind_of_card(
    capability: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    monkeypatch.setattr(backends, "sdpa_kernel", lambda order, set_priority: (order, set_priority))
    order, is_order = backends.attention_backends(torch.device("cuda"))
    assert is_order
    assert order[0].name == f"{chosen}_ATTENTION"


def test_the_fused_trunk_is_for_the_modern_family_in_half_precision_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused.cross_entropy, "gpu_kernels", lambda: "a kernel")
    config = replace(configs.load("forge_124m"), precision="bfloat16")
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert fused.available(config, gpu)
    assert not fused.available(config, cpu)
    assert not fused.available(replace(config, precision="float32"), gpu)
    assert not fused.available(replace(config, model=SMALL), gpu)
    monkeypatch.setattr(fused.cross_entropy, "gpu_kernels", lambda: None)
    assert not fused.available(config, gpu)
