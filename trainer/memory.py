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

# Bytes a parameter: master, gradient and two AdamW moments in float32, the weight in bfloat16.
STATE_BYTES = 4 + 4 + 4 + 4 + 2
FLOAT8_BYTES = 2  # besides: the weight in 8 bits, in both orders
# Bytes of a compiled bfloat16 step for each token and channel: what forward keeps in each layer,
# and what the backward pass of one layer adds. Fitted to measured peaks (tests/benchmarks/memory).
LAYER_BYTES = 31.7
BACKWARD_BYTES = 77
LOGIT_BYTES = 2
HEAD_BYTES = 10  # a number of the head: padded, its gradient, in bfloat16 and in float32
USABLE = 0.94  # of the free memory: the rest goes to fragments and libraries
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
    kept = LAYER_BYTES * tokens * model.num_layers * model.embedding_size
    head = LOGIT_BYTES * min(tokens, HEAD_CHUNK["cuda"]) * model.vocab_size
    head += HEAD_BYTES * model.vocab_size * model.embedding_size
    backward = BACKWARD_BYTES * tokens * model.embedding_size
    state = STATE_BYTES + FLOAT8_BYTES * (config.precision == "float8")
    return int(state * model.num_parameters() + kept + max(head, backward))


def usable_bytes(device: torch.device) -> int:
    """What this process may take of a GPU: what is free, within the process's own limit if any."""
    free, total = torch.cuda.mem_get_info(device)
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return int(USABLE * min(free, limit - torch.cuda.memory_reserved(device)))


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
    limit = torch.tensor(usable_bytes(device), device=device)
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


def smaller(plan: Plan, config: Config) -> Plan | None:
    """The next smaller cut of the same step, None if there is none."""
    share = plan.micro_batch_size * plan.accumulation_steps
    fits = [size for size in divisors(share) if size < plan.micro_batch_size]
    if not fits:
        return None
    return Plan(fits[-1], share // fits[-1], estimate_bytes(config, fits[-1]))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
