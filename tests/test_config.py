"""A config is checked whole, before anything runs."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ForgeError
from trainer import config_file as configs
from trainer.memory import cut_step, divisors, estimate_bytes


@pytest.mark.parametrize("name", configs.available())
def test_every_config_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = configs.load(name, (), lambda: configs.load("tiny").model)  # chat has none
    path = tmp_path / "copy.toml"
    path.write_text(configs.to_toml(config))
    assert configs.load(str(path)) == config


def test_a_config_is_found_from_any_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert configs.load("gpt2").model.embedding_size == 768


def test_set_changes_one_key_in_tomls_notation() -> None:
    config = configs.load("tiny", ("optimizer.peak_lr=3e-4", "compile=full", "seed=7"))
    assert (config.optimizer.peak_lr, config.compile, config.seed) == (3e-4, "full", 7)


def test_all_problems_are_reported_together_with_what_was_meant() -> None:
    settings = (
        "optimizer.peek_lr=1",
        "modle.num_layers=2",
        "batch.tokens_per_step=many",
        "model.bias=1",
        "compile=fast",
    )
    with pytest.raises(ForgeError) as caught:
        configs.load("tiny", settings)
    for part in (
        "5 problems",
        "did you mean optimizer.peak_lr?",
        "did you mean model?",
        "batch.tokens_per_step must be a valid integer, not 'many'",
        "model.bias must be a valid boolean, not 1",
        "compile must be 'auto', 'full' or 'off', not 'fast'",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("model.num_heads=3", "multiple of model.num_heads"),
        ("batch.tokens_per_step=1000", "multiple of model.context_length"),
        ("optimizer.peak_lr=0", "greater than 0"),
        ("optimizer.peak_lr=nan", "a finite number"),
        ("batch.micro_batch_size=-1", "must be 'auto' or be greater than or equal to 1, not -1"),
        ("schedule.max_steps=0", "greater than or equal to 1, not 0"),
        ("schedule.decay_fraction=0", "greater than 0, not 0"),
        ("schedule.decay_fraction=1.5", "less than or equal to 1"),
        ("optimizer.betas=[0.9,1]", "betas must be less than 1, not 1"),
        ("optimizer.betas=[0.9]", "betas has too few values"),
        ("model.vocab_size=70000", "less than or equal to 65536"),
        ("model.num_kv_heads=2", 'only for model.family = "qwen3"'),
        ("model.family=qwen3", "model.bias must be false"),
        ("optimizer.muon_weight_decay=-1", "muon_weight_decay must be greater than or equal to 0"),
        ("peak_lr=3e-4", "did you mean optimizer.peak_lr?"),
        ("unlike_any=1", "unlike_any does not exist"),
        ("optimizer.peak_lr=-1", "must be greater than 0, not -1"),
        ("optimizer.muon_warmup_steps=-1", "greater than or equal to 0"),
        ("nonsense", "key=value"),
        ("seed=1\nmodel.bias=false", "takes one value"),
        ("optimizer={peak_lr=1e-3}", "takes one value"),
        ("optimizer.peak_lr.x=1", "peak_lr must be a valid number"),
        (f"seed={'1' * 5001}", "a valid integer"),
        (f"optimizer.peak_lr=1{'0' * 400}", "a valid number"),
        ("guard.timeout_seconds=1e10", "less than or equal to 1000000"),
    ],
)
def test_values_that_make_no_sense_are_refused(setting: str, says: str) -> None:
    with pytest.raises(ForgeError, match=says):
        configs.load("tiny", (setting,))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("model.num_kv_heads=4", "multiple of model.num_kv_heads"),
        ("model.head_size=63", "must be even"),
        ("model.mlp_size=0", "greater than or equal to 1"),
        ("model.rope_theta=-1", "greater than 0"),
    ],
)
def test_values_that_the_modern_family_cannot_have_are_refused(setting: str, says: str) -> None:
    with pytest.raises(ForgeError, match=says):
        configs.load("forge_124m", (setting,))


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[model]\nnum_layers = 1\n")
    with pytest.raises(ForgeError) as caught:
        configs.load(str(tmp_path / "x.toml"))
    for name in ("model.num_heads", "batch.tokens_per_step", "optimizer.peak_lr"):
        assert f"{name} is missing" in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff", b"x = [", b"x = " + b"[" * 100_000])
def test_a_file_that_is_no_toml_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(ForgeError, match="cannot read the config"):
        configs.load(str(tmp_path / "x.toml"))


def test_an_unknown_config_suggests_a_known_one() -> None:
    with pytest.raises(ForgeError, match="did you mean gpt2_medium"):
        configs.load("gpt2-medium")


def test_whichever_limit_comes_first_ends_the_run() -> None:
    base = configs.load("tiny")
    step = base.batch.tokens_per_step
    for max_steps, max_tokens, steps in (
        (10, None, 10),
        (None, 7 * step - 1, 7),
        (10, 3 * step, 3),
    ):
        schedule = replace(base.schedule, max_steps=max_steps, max_tokens=max_tokens)
        assert replace(base, schedule=schedule).num_steps() == steps


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_machine_never_changes_tokens_per_step(world_size: int) -> None:
    config = configs.load("gpt2_medium")
    cut = cut_step(config, world_size)
    windows = cut.micro_batch_size * cut.accumulation_steps * world_size
    assert windows * config.model.context_length == config.batch.tokens_per_step


def test_a_batch_that_cannot_be_shared_out_says_what_could() -> None:
    config = configs.load("gpt2")
    with pytest.raises(ForgeError, match="cannot be shared out evenly among 7 ranks"):
        cut_step(config, 7)
    uneven = replace(config, batch=replace(config.batch, micro_batch_size=7))
    with pytest.raises(ForgeError, match="does not divide"):
        cut_step(uneven, 1)


def test_divisors_are_all_and_in_order() -> None:
    assert divisors(60) == [1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60]
    assert divisors(49) == [1, 7, 49]


GIB = 2**30


@pytest.mark.parametrize(
    ("name", "world_size", "fits"),
    [
        ("gpt2", 1, True),
        ("gpt2_large", 1, True),
        ("gpt2_xl", 1, False),
        ("gpt2_xl", 2, True),  # each has half of the masters and moments
        ("forge_770m", 1, True),
    ],
)
def test_the_memory_estimate_knows_what_fits_24_gib(name: str, world_size: int, fits: bool) -> None:
    config = configs.load(name)
    assert (estimate_bytes(config, 1, world_size) < 23 * GIB) == fits
    if not fits:
        with pytest.raises(ForgeError, match=r"takes about 2\d\.\d GiB, of 23\.0 on each GPU"):
            cut_step(config, world_size, 23 * GIB)


def test_blocks_are_recomputed_only_where_nothing_else_fits() -> None:
    config = configs.load("gpt2_xl")
    assert not cut_step(config, 2, 23 * GIB).recomputes
    cut = cut_step(config, 2, 20 * GIB)
    assert cut.recomputes
    assert cut.micro_batch_size > 1
    assert cut.estimated_bytes <= 20 * GIB
    asked_for = replace(config, batch=replace(config.batch, micro_batch_size=8))
    assert cut_step(asked_for, 2, 23 * GIB).recomputes
    assert not cut_step(asked_for, 2, 40 * GIB).recomputes


def test_flops_follow_the_published_formula() -> None:
    # 6 * (12 L C^2 + V C) + 12 L C T with L = 12, C = 768, T = 1024, V = 50257
    assert configs.load("gpt2").model.flops_per_token() == 854_438_400
    assert math.isclose(configs.load("gpt2_medium").model.flops_per_token(), 2423e6, rel_tol=1e-3)
    modern = configs.load("forge_124m").model
    gains = 12 * (2 * 768 + 2 * 128) + 768
    assert modern.flops_per_token() == 6 * (modern.num_parameters() - gains) + 12 * 12 * 768 * 1024


def test_a_removed_key_is_ignored_at_its_default_and_else_its_line_is_named(tmp_path: Path) -> None:
    text = configs.to_toml(configs.load("tiny"))
    path, old = tmp_path / "old.toml", text + "batch.doublings = 0\n"
    path.write_text(old)
    assert configs.load(str(path)) == configs.load("tiny")
    path.write_text(old.replace("doublings = 0", "doublings = 1"))
    line = len(old.splitlines())
    with pytest.raises(ForgeError, match=r"batch\.doublings = 1") as caught:
        configs.load(str(path))
    assert str(caught.value.where) == f"{path}, line {line}"
    with pytest.raises(ForgeError, match="was removed"):
        configs.load("tiny", ("schedule.count_downtime=true",))


def test_a_key_that_was_removed_is_no_change_to_a_run_that_had_its_default() -> None:
    now = configs.flat(configs.load("tiny"))
    assert not configs.differences(now | {"optimizer.muon_normalize": True}, now)
    assert configs.differences(now | {"optimizer.muon_normalize": False}, now)


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--max-steps", "--set schedule.max_steps=..."),
        ("--peak_lr=1e-3", "--set optimizer.peak_lr=..."),
        ("--seed", "--set seed=..."),  # a key is meant, however like an option it is
        ("--batch-size", "No such option '--batch-size'.\n"),  # [batch] is no key to set
        ("--dat", "--data"),
    ],
)
def test_an_option_that_is_a_key_is_pointed_to_set(option: str, meant: str, forge) -> None:
    result = forge("train", "tiny", option)
    assert result.exit_code == 2
    assert meant in result.output
