"""What a config would do on this machine (`forge-train --check`), printed before it is trained."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ForgeError
from trainer import memory
from trainer.config import Config, ModelConfig
from trainer.optimizer import compute_dtype
from trainer.ranks import Ranks
from trainer.report import amount, hardware, say
from trainer.windows import Data, check_amount, find_data

CARD_GIB, FREE_GIB = 24, 23  # the rest is for the driver and CUDA's context
MANY_EPOCHS = 5  # Muennighoff et al. 2023, "Scaling Data-Constrained Language Models"

# Costs of a step beside its matrix products, measured on an H200 with GPT-2 124M and 350M.
ATTENTION_SPEED = 0.6  # of a plain product's, counted over the full square
LAYER_TRAFFIC = 145  # bytes that elementwise work moves for each token, layer and channel
LOGIT_TRAFFIC = 6  # bytes for each token and word of the vocabulary
GRADIENT_TRAFFIC = 14  # bytes a parameter to add a micro-batch's gradients up
LAYER_SECONDS = 1e-4  # of gaps between the kernels of a layer, forward and backward


def check(config: Config, name: str, folder: Path) -> None:
    """Print the plan on rank 0. ForgeError if it cannot be trained."""
    ranks, data = Ranks.from_environment(), find_data(config, folder)
    text = report(config, name, data, ranks)
    if ranks.is_first:
        say(text)
    check_amount(config, data)


def report(config: Config, name: str, data: Data, ranks: Ranks) -> str:
    """The plan, one fact per line. ForgeError if the step cannot be cut."""
    device, model, num_tokens = ranks.device(), config.model, config.num_tokens()
    cut = memory.cut_here(config, ranks, device)
    flops, train_tokens = model.flops_per_token(), data.index.total("num_tokens", "train")
    in_all = f", {flops * num_tokens:.3g} FLOP in all" if num_tokens else ""
    gib = f", about {cut.estimated_bytes / 2**30:.1f} GiB" if device.type == "cuda" else ""
    lines = [
        f"config        {name}: {model.num_layers} layers, {model.num_heads} heads, "
        f"{model.embedding_size} channels, context {model.context_length}",
        f"parameters    {model.num_parameters():,}",
        f"tokens/step   {config.batch.tokens_per_step:,} = {config.windows_per_step()} windows "
        f"of {model.context_length}",
        f"steps         {until(config, train_tokens)} of {data.index.folder}",
        f"optimizer     {config.optimizer.describe()}",
        f"compute       {flops / 1e6:,.1f} MFLOP a token{in_all}",
        f"here          {hardware(device, ranks.world_size)}: micro-batch {cut.micro_batch_size} "
        f"x {cut.accumulation_steps} accumulation steps x {ranks.world_size} ranks{gib}",
        f"speed         {speed(config, cut, device, ranks)}",
        f"evaluation    every {config.evaluate.every_steps} steps, about "
        f"{evaluation_share(config):.1%} of the time",
        f"on 2x {CARD_GIB} GiB  {two_cards(config)}",
        *(f"note          {note}" for note in notes(config, train_tokens)),
    ]
    return "\n".join(lines)


def until(config: Config, train_tokens: int) -> str:
    """When the run ends, in steps, tokens, epochs and hours."""
    num_tokens, budget = config.num_tokens(), config.schedule.budget_hours
    ends = [] if budget is None else [f"as many as fit in {budget:g} hours"]
    if num_tokens is None:
        return f"{ends[0]}, an epoch is {amount(train_tokens)} tokens"
    epochs = f"{num_tokens / max(1, train_tokens):.2f} epochs"
    return ", or ".join([f"{config.num_steps():,} = {amount(num_tokens)} tokens = {epochs}", *ends])


def notes(config: Config, train_tokens: int) -> list[str]:
    """Warnings about settings that are legal and mostly mistakes."""
    found, num_steps, warmup = [], config.num_steps(), config.schedule.warmup_steps
    decay = config.schedule.decay_fraction if config.shape() == "wsd" else 0.0
    if num_steps is not None and warmup > (1 - decay) * num_steps:
        found.append(
            f"schedule.warmup_steps ({warmup:,}) is too long for {num_steps:,} steps: "
            "the rate never gets to its peak"
        )
    is_timed = config.schedule.budget_hours is not None
    if not is_timed and (config.num_tokens() or 0) > MANY_EPOCHS * train_tokens:
        found.append("more than five epochs: repeated text adds little")
    if idle := without_effect(config):
        found.append(f"without effect in this config: {', '.join(idle)}")
    return found


def without_effect(config: Config) -> list[str]:
    """Keys that have no effect and differ from their defaults, and the reason."""
    optimizer, schedule = config.optimizer, config.schedule
    unread: list[tuple[Any, str, bool, str]] = [
        (optimizer, "muon_", optimizer.name == "adamw", 'optimizer.name = "adamw"'),
        (schedule, "decay_fraction", config.shape() == "cosine", "a cosine"),
        (schedule, "final_lr_fraction", config.shape() == "wsd", "wsd"),
    ]
    found = []
    for section, prefix, is_idle, why in unread:
        own = [field for field in dataclasses.fields(section) if field.name.startswith(prefix)]
        changed = [field.name for field in own if getattr(section, field.name) != field.default]
        if is_idle and changed:
            found.append(f"{', '.join(changed)} ({why})")
    return found


def speed(config: Config, cut: memory.Cut, device: torch.device, ranks: Ranks) -> str:
    """Tokens/s and hours, predicted from a second's measurement of the card."""
    card = measure(device, compute_dtype(config, device))
    if card is None:
        return "predicted for GPUs only; a few steps show a CPU's"
    each = card.tokens_per_second(config.model, cut.micro_batch_size)
    share = each * config.model.flops_per_token() / card.matmul_flops
    hours = (config.num_tokens() or 0) / (each * ranks.world_size) / 3600
    return (
        f"about {each * ranks.world_size:,.0f} tokens/s, {share:.0%} of the card's sustained "
        f"{card.matmul_flops / 1e12:.0f} TFLOP/s"
        + f"; {hours:.1f} hours for the config's tokens"
        * (hours > 0)
    )


def evaluation_share(config: Config) -> float:
    """Of training's time: forward is a third of a step. The sampled text is in it."""
    evaluate = config.evaluate
    tokens = evaluate.num_tokens + evaluate.sample_tokens * config.model.context_length
    return tokens / (3 * evaluate.every_steps * config.batch.tokens_per_step)


def two_cards(config: Config) -> str:
    """The step's cut and the memory per card on the machine that this program is meant for."""
    limit = memory.USABLE * FREE_GIB * 2**30
    try:
        cut = memory.cut_step(config, 2, limit)
    except ForgeError as error:
        return error.what
    too_much = ": too much" * (cut.estimated_bytes > limit)
    return (
        f"micro-batch {cut.micro_batch_size} x {cut.accumulation_steps} accumulation steps, about "
        f"{cut.estimated_bytes / 2**30:.1f} GiB a card{too_much}"
    )


@dataclass(frozen=True)
class Card:
    """Sustained speeds of one GPU."""

    matmul_flops: float  # FLOP/s of matrix products in the precision of training
    copy_bytes: float  # bytes/s of a copy, read and written

    def tokens_per_second(self, model: ModelConfig, micro_batch_size: int) -> float:
        """Predicted: products, attention and elementwise work, one after the other."""
        c, layers = model.embedding_size, model.num_layers
        attention = 12 * layers * c * model.context_length
        flops = model.flops_per_token() + attention * (1 / ATTENTION_SPEED - 1)
        traffic = LAYER_TRAFFIC * layers * c + LOGIT_TRAFFIC * model.vocab_size
        seconds = flops / self.matmul_flops + traffic / self.copy_bytes  # a token
        fixed = GRADIENT_TRAFFIC * model.num_parameters() / self.copy_bytes + LAYER_SECONDS * layers
        return 1 / (seconds + fixed / (micro_batch_size * model.context_length))


def measure(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> Card | None:
    """Measure a GPU in about a second; None for a CPU."""
    if device.type != "cuda":
        return None
    size = 8192 if dtype != torch.float32 else 4096
    a, b, c = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    products = rate(lambda: torch.mm(a, b, out=c), seconds)
    copies = rate(lambda: c.copy_(a), seconds / 4)
    return Card(2 * size**3 * products, 2 * c.nbytes * copies)


def rate(work: Callable[[], object], seconds: float) -> float:
    """Calls per second, after an equally long warm-up: a cold card is faster than it stays."""
    for _ in range(2):
        torch.cuda.synchronize()
        started, calls = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < seconds:
            for _ in range(10):
                work()
            torch.cuda.synchronize()
            calls += 10
    return calls / elapsed
