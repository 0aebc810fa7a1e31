"""How much memory a step takes, and the largest micro-batch that fits.

Before: config.py. After: loop.py, which trains with that micro-batch, and `forge-train --check`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.errors import ForgeError
from trainer.config import Config
from trainer.cross_entropy import HEAD_CHUNK
from trainer.ranks import Ranks

# Bytes a parameter: float32 weight, gradient and two AdamW moments, and autocast's bfloat16 copy.
STATE_BYTES = 4 + 4 + 4 + 4 + 2
# Bytes that a compiled bfloat16 step keeps for each token, layer and channel. Fitted to measured
# peaks (GPT-2 124M at 96 windows: 37.08 GB; 350M at 12 windows: 18.93 GB), within 1 % of both.
LAYER_BYTES = 37.5
USABLE = 0.9  # of the free memory: the rest goes to fragments and libraries
CPU_TOKENS = 1024  # a CPU is fastest when a micro-batch's logits stay near its caches


@dataclass(frozen=True)
class Plan:
    """How a step is cut: micro_batch_size * accumulation_steps * world_size windows."""

    micro_batch_size: int
    accumulation_steps: int
    estimated_bytes: int


def estimate_bytes(config: Config, micro_batch_size: int) -> int:
    """Peak bytes on one GPU: a bfloat16, compiled step with AdamW."""
    model = config.model
    tokens = micro_batch_size * model.context_length
    activations = LAYER_BYTES * tokens * model.num_layers * model.embedding_size
    logits = 2 * min(tokens, HEAD_CHUNK["cuda"]) * model.vocab_size
    head = (4 + 2) * model.vocab_size * model.embedding_size  # its gradient, and padded in bfloat16
    return int(STATE_BYTES * model.num_parameters() + activations + logits + head)


def plan_step(config: Config, ranks: Ranks, device: torch.device) -> Plan:
    """Cut tokens_per_step for this machine; the same on every rank.

    Raises ForgeError when the windows do not divide among the ranks, when a given micro-batch does
    not divide a rank's share, or when not even one window fits.
    """
    windows, world = config.windows_per_step(), ranks.world_size
    if windows % world:
        fits = ", ".join(str(n) for n in range(1, 65) if windows % n == 0)
        raise ForgeError(
            f"{windows} windows a step cannot be shared out evenly among {world} ranks",
            where="batch.tokens_per_step",
            fix=f"use one of {fits} ranks, or --set batch.tokens_per_step=...",
        )
    share = windows // world
    wanted = config.batch.micro_batch_size
    if wanted == "auto":
        wanted = _largest(config, share, device, ranks)
    elif share % wanted:
        raise ForgeError(
            f"a micro-batch of {wanted} does not divide a rank's {share} windows a step",
            where="batch.micro_batch_size",
            fix=f"use one of {', '.join(map(str, divisors(share)))}",
        )
    return Plan(wanted, share // wanted, estimate_bytes(config, wanted))


def _largest(config: Config, share: int, device: torch.device, ranks: Ranks) -> int:
    if device.type != "cuda":
        most = max(1, CPU_TOKENS // config.model.context_length)
        return max(size for size in divisors(share) if size <= most)
    limit = torch.tensor(USABLE * torch.cuda.mem_get_info(device)[0], device=device)
    if dist.is_initialized():
        dist.all_reduce(limit, dist.ReduceOp.MIN)
    fits = [size for size in divisors(share) if estimate_bytes(config, size) <= limit.item()]
    if not fits:
        raise ForgeError(
            f"not even a micro-batch of 1 fits: it takes about "
            f"{estimate_bytes(config, 1) / 2**30:.1f} GiB, {limit.item() / 2**30:.1f} GiB are free",
            where=f"rank {ranks.rank}, {device}",
            fix="train a smaller model, or free the GPU of other programs",
        )
    return max(fits)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
