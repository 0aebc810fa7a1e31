"""What a config does on this machine: for `forge-train --check`, and when a run starts."""

import math

from pipeline.errors import counted
from pipeline.files import own_names
from pipeline.shards import SPLITS, Index
from trainer.config import Config
from trainer.memory import Cut, checkpoint_bytes
from trainer.ranks import Ranks
from trainer.report import duration, hardware

MANY_EPOCHS = 5  # Muennighoff et al. 2023, "Scaling Data-Constrained Language Models"
# Of a bare product's FLOP/s, what a step reached: 0.57 on two RTX 4090s (llm.c's published 221 k
# tokens/s of GPT-2 124M), 0.74 to 0.78 on one H200 (tests/benchmarks/README.md, Training speed).
STEP_SHARE = 0.55, 0.78


def describe(
    config: Config,
    name: str,
    index: Index,
    cut: Cut,
    ranks: Ranks,
    weights_from: object = None,
    product: float | None = None,
) -> str:
    """The model, the step, the end of the run, and likely mistakes.

    In the words of forge-report, and in its order. `product` is the product_flops() of a GPU, from
    which hours are estimated.
    """
    model, is_gpu = config.model, ranks.device().type == "cuda"
    train_tokens, val_tokens = (index.total("num_tokens", split) for split in SPLITS)
    flops = (product or math.nan) * ranks.world_size / model.flops_per_token()
    speeds = [share * flops for share in STEP_SHARE if product]  # tokens/s
    rows = extent(config, train_tokens, speeds)
    if "time" not in rows and not is_gpu:
        rows["time"] = "not estimated on a CPU"
    most = (config.checkpoint.keep_last + 3) * checkpoint_bytes(config)  # best, flat, being written
    rows["checkpoints, GB"] = f"up to {most / 1e9:.2f}"
    if is_gpu:
        again = ", with blocks recomputed in the backward pass" * cut.recomputes
        rows["peak memory of a GPU, GB"] = f"about {cut.estimated_bytes / 1e9:.1f}{again}"
    rows |= {
        "hardware": hardware(ranks.device(), ranks.world_size),
        "micro-batch, accumulation, ranks": (
            f"{cut.micro_batch_size} x {cut.accumulation_steps} x {ranks.world_size} = "
            f"{counted(config.windows_per_step(), 'window')} of {model.context_length:,}, "
            f"{config.batch.tokens_per_step:,} tokens a step"
        ),
        "parameters": f"{model.num_parameters():,}",
        **({"weights from": str(weights_from)} if weights_from else {}),
        "data": f"{index.source['name']}, in {index.folder}",
        "training tokens": f"{train_tokens:,}",
        "validation tokens": f"{val_tokens:,}",
    }
    if parts := index.source.get("parts"):  # of a mixture
        names = own_names(part["folder"] for part in parts).values()
        rows["training tokens by part"] = ", ".join(
            f"{part['train_tokens']:,} of {name} ({part['epochs']:.2f} epochs)"
            for part, name in zip(parts, names, strict=True)
        )
    found = [f"note: {note}" for note in notes(config, train_tokens)]
    if product:
        shares = " to ".join(f"{share:.0%}" for share in STEP_SHARE)
        speed = f"{product / 1e12:.0f} TFLOP/s a GPU, measured now"
        found.append(f"note: the time is for {shares} of a bare product's speed, {speed}")
    lines = (f"{label:34}{text}" for label, text in rows.items())
    return "\n".join([f"{name}: {config.optimizer.describe()}", *lines, *found])


def extent(config: Config, train_tokens: int, speeds: list[float]) -> dict[str, str]:
    """How far a run goes: what is not sure from its least to its most, and not what is unknown.

    `speeds` are the least and the most tokens/s, if they are known.
    """
    tokens = config.num_tokens() or math.inf
    budget = (config.schedule.budget_hours or math.inf) * 3600
    taken, seconds = [tokens], [budget]
    if speeds:
        taken = [min(tokens, speed * budget) for speed in speeds]
        seconds = [min(budget, tokens / speed) for speed in reversed(speeds)]
    per_step = config.batch.tokens_per_step
    found = {
        "steps": [f"{each / per_step:,.0f}" for each in taken],
        "tokens": [f"{each:,.0f}" for each in taken],
        "epochs": [f"{each / max(1, train_tokens):.2f}" for each in taken],
    }
    if taken[-1] == math.inf:
        found = {"steps": ["as many as the time allows"]}
    if seconds[-1] < math.inf:
        found["time"] = [duration(each) for each in seconds]
    most = "at most " * (not speeds and max(tokens, budget) < math.inf)  # one ends it first
    return {label: most + " to ".join(dict.fromkeys(texts)) for label, texts in found.items()}


def notes(config: Config, train_tokens: int) -> list[str]:
    """Settings that are legal and mostly mistakes."""
    found, num_steps, warmup = [], config.num_steps(), config.schedule.warmup_steps
    decay = config.schedule.decay_fraction if config.shape() == "wsd" else 0.0
    if num_steps is not None and warmup > (1 - decay) * num_steps:
        found.append(
            f"schedule.warmup_steps ({warmup:,}) is too long for {counted(num_steps, 'step')}: "
            "the rate never reaches its peak"
        )
    is_timed = config.schedule.budget_hours is not None
    if not is_timed and (config.num_tokens() or 0) > MANY_EPOCHS * train_tokens:
        found.append("more than five epochs: repeated text adds little")
    return found
