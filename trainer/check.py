"""What a config does on this machine: for `forge-train --check`, and when a run starts."""

from pathlib import Path

from pipeline.errors import ForgeError
from pipeline.shards import Index
from trainer.config import Config, counted
from trainer.memory import Cut, checkpoint_bytes, cut_here
from trainer.ranks import Ranks
from trainer.report import amount, hardware, say
from trainer.windows import check_amount, open_data, with_epochs

MANY_EPOCHS = 5  # Muennighoff et al. 2023, "Scaling Data-Constrained Language Models"


def check(config: Config, name: str, folder: Path) -> None:
    """Print the plan on rank 0. ForgeError that names all that keeps it from being trained."""
    ranks, problems = Ranks.from_environment(), []
    data, device = open_data(config, folder), ranks.device()
    config = with_epochs(config, data)
    try:
        text = describe(config, name, data.index, cut_here(config, ranks, device), ranks)
        if ranks.is_first:
            say(text)
    except ForgeError as error:
        problems.append(str(error))
    try:
        check_amount(config, data)
    except ForgeError as error:
        problems.append(str(error))
    if problems:
        raise ForgeError("\n".join(problems))


def describe(config: Config, name: str, index: Index, cut: Cut, ranks: Ranks) -> str:
    """The model, the step, the end of the run, and likely mistakes."""
    model, train_tokens = config.model, index.total("num_tokens", "train")
    lines = [
        f"{name}: {model.num_parameters():,} parameters on "
        f"{hardware(ranks.device(), ranks.world_size)}",
        f"{config.batch.tokens_per_step:,} tokens a step = "
        f"{counted(config.windows_per_step(), 'window')} of {model.context_length}: micro-batch "
        f"{cut.micro_batch_size} x {counted(cut.accumulation_steps, 'accumulation step')} x "
        f"{counted(ranks.world_size, 'rank')}",
        f"steps: {until(config, train_tokens)}",
        f"data: {index.folder}",
        f"optimizer: {config.optimizer.describe()}",
        f"memory: about {cut.estimated_bytes / 2**30:.1f} GiB on a GPU, in bfloat16"
        f"{', with all blocks recomputed in the backward pass' * cut.recomputes}; a checkpoint "
        f"takes {checkpoint_bytes(config) / 1e9:.2f} GB of disk",
        *(f"note: {note}" for note in notes(config, train_tokens)),
    ]
    return "\n".join(lines)


def until(config: Config, train_tokens: int) -> str:
    """When the run ends, in steps, tokens, epochs and hours."""
    num_tokens, budget = config.num_tokens(), config.schedule.budget_hours
    ends = [] if budget is None else [f"as many as fit in {budget:g} hours"]
    if num_tokens is None:
        return f"{ends[0]}; an epoch is {amount(train_tokens)} tokens"
    epochs = f"{num_tokens / max(1, train_tokens):.2f} epochs"
    return ", or ".join([f"{config.num_steps():,} = {amount(num_tokens)} tokens = {epochs}", *ends])


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
