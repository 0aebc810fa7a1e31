"""What a config would do on this machine, before a day is spent on it (`forge-train --check`)."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ForgeError
from trainer import card, memory
from trainer.config import Config, OptimizerConfig
from trainer.config_file import names_in
from trainer.optimizer import compute_dtype
from trainer.ranks import Ranks
from trainer.report import amount, hardware, say
from trainer.windows import Data, check_amount, find_data

CARD_GIB, FREE_GIB = 24, 23  # what is left of it beside the driver and CUDA's context
MANY_EPOCHS = 5  # Muennighoff et al. 2023, "Scaling Data-Constrained Language Models"


def check(config: Config, name: str, folder: Path) -> None:
    """Print the plan on rank 0. ForgeError if it cannot be trained."""
    ranks, data = Ranks.from_environment(), find_data(config, folder)
    text = report(config, name, data, ranks)
    if ranks.is_first:
        say(text)
    check_amount(config, data)


def report(config: Config, name: str, data: Data, ranks: Ranks) -> str:
    """Parameters, tokens a step, accumulation, memory as text; ForgeError if they cannot be."""
    device = ranks.device()
    cut = memory.cut_here(config, ranks, device)
    model, tokens = config.model, config.batch.tokens_per_step
    train_tokens = data.index.total("num_tokens", "train")
    lines = [
        f"config        {name}: {model.num_layers} layers, {model.num_heads} heads, "
        f"{model.embedding_size} channels, context {model.context_length}",
        f"parameters    {model.num_parameters():,}",
        f"tokens/step   {tokens:,} = {config.windows_per_step()} windows of {model.context_length}",
        f"steps         {until(config, train_tokens)} of {data.index.folder}",
        f"optimizer     {config.optimizer.describe()}",
        f"compute       {model.flops_per_token() / 1e6:,.1f} MFLOP a token{in_all(config)}",
        f"here          {hardware(device, ranks.world_size)}: micro-batch {cut.micro_batch_size} "
        f"x {cut.accumulation_steps} accumulation steps x {ranks.world_size} ranks"
        + (f", about {cut.estimated_bytes / 2**30:.1f} GiB" if device.type == "cuda" else ""),
        f"speed         {speed(config, cut, device, ranks)}",
        f"evaluation    every {config.evaluate.every_steps} steps, about "
        f"{evaluation_share(config):.1%} of the time",
        f"on 2x {CARD_GIB} GiB  {two_cards(config)}",
        *(f"note          {note}" for note in notes(config, train_tokens)),
    ]
    return "\n".join(lines)


def until(config: Config, train_tokens: int) -> str:
    """When the run ends, and the epochs that it sees until then."""
    num_tokens, budget = config.num_tokens(), config.schedule.budget_hours
    within = f"as many as fit in {budget:g} hours" if budget is not None else ""
    if num_tokens is None:
        return f"{within}, an epoch is {amount(train_tokens)} tokens"
    return (
        f"{config.num_steps():,} = {amount(num_tokens)} tokens"
        + f", or {within}" * (budget is not None)
        + f" = {num_tokens / max(1, train_tokens):.2f} epochs"
    )


def notes(config: Config, train_tokens: int) -> list[str]:
    """Warnings about settings that are legal and mostly mistakes."""
    found, num_steps = [], config.num_steps()
    falls = config.schedule.decay_fraction if config.shape() == "wsd" else 0.0
    if num_steps is not None and config.schedule.warmup_steps > (1 - falls) * num_steps:
        found.append(
            f"the warm-up is too long for {num_steps:,} steps (schedule.warmup_steps is "
            f"{config.schedule.warmup_steps:,}): the rate never gets to its peak"
        )
    if (config.num_tokens() or 0) > MANY_EPOCHS * train_tokens:
        found.append("text that comes more than some four times teaches little more")
    if idle := without_effect(config):
        found.append(f"without effect in this config: {', '.join(idle)}")
    return found


def without_effect(config: Config) -> list[str]:
    """Keys that differ from their defaults and that nothing reads, with what makes it so."""
    muon = [name for name in names_in(OptimizerConfig) if name.startswith("muon_")]
    unread: list[tuple[Any, list[str], bool, str]] = [
        (config.optimizer, muon, config.optimizer.name != "muon", 'optimizer.name = "adamw"'),
        (config.schedule, ["decay_fraction"], config.shape() == "cosine", "a cosine"),
        (config.schedule, ["final_lr_fraction"], config.shape() == "wsd", "wsd"),
    ]
    found = []
    for section, names, is_idle, why in unread:
        defaults = {field.name: field.default for field in dataclasses.fields(section)}
        changed = [name for name in names if getattr(section, name) != defaults[name]]
        if is_idle and changed:
            found.append(f"{', '.join(changed)} ({why})")
    return found


def in_all(config: Config) -> str:
    num_tokens = config.num_tokens()
    if num_tokens is None:
        return ""
    return f", {config.model.flops_per_token() * num_tokens:.3g} FLOP in all"


def speed(config: Config, cut: memory.Cut, device: torch.device, ranks: Ranks) -> str:
    """Tokens/s and hours, predicted from a second's measurement of the card."""
    measured = card.measure(device, compute_dtype(config, device))
    if measured is None:
        return "predicted for GPUs only; a few steps show a CPU's"
    each = measured.tokens_per_second(config.model, cut.micro_batch_size)
    share = each * config.model.flops_per_token() / measured.matmul_flops
    found = (
        f"about {each * ranks.world_size:,.0f} tokens/s, {share:.0%} of the card's sustained "
        f"{measured.matmul_flops / 1e12:.0f} TFLOP/s"
    )
    num_tokens = config.num_tokens()
    if num_tokens is None:
        return found
    hours = num_tokens / (each * ranks.world_size) / 3600
    return f"{found}; {hours:.1f} hours for the config's tokens"


def evaluation_share(config: Config) -> float:
    """Of training's time: forward is a third of a step. The sampled text is in it."""
    evaluate = config.evaluate
    tokens = evaluate.num_tokens + evaluate.sample_tokens * config.model.context_length
    return tokens / (3 * evaluate.every_steps * config.batch.tokens_per_step)


def two_cards(config: Config) -> str:
    """The step's cut and the memory a card on the machine that this program is meant for."""
    limit = memory.USABLE * FREE_GIB * 2**30
    try:
        cut = memory.cut_step(config, 2, limit)
    except ForgeError as error:
        return error.what
    text = f"micro-batch {cut.micro_batch_size} x {cut.accumulation_steps} accumulation steps"
    text += f", about {cut.estimated_bytes / 2**30:.1f} GiB a card"
    return text + ": too much" * (cut.estimated_bytes > limit)
