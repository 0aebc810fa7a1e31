"""How much memory a step takes, and the largest micro-batch that fits."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.errors import ForgeError, counted
from trainer.config import Config
from trainer.cross_entropy import HEAD_CHUNK
from trainer.ranks import Ranks

# Bytes a parameter: the weight in bfloat16 and its gradient's sum in float32, on every rank; and on
# the rank whose share it is in the master and AdamW's two moments, or Muon's one, in float32.
WHOLE_BYTES, ADAMW_BYTES, MUON_BYTES = 2 + 4, 4 + 4 + 4, 4 + 4
# Muon's update, after forward and backward, copies all its matrices of the share once, and those of
# one shape (about 40 % of them) three times.
MUON_UPDATE_BYTES = 8.5
GRADIENT_BYTES = 2  # torch.compile gives a whole model's gradients at once, in bfloat16
# Bytes of a compiled bfloat16 step for each token and layer. Forward keeps the block's channels 4
# times, and each number inside the block 2 or 3 times. GPT-2: q, k, v, attention's output, and the
# MLP before and after its function. Qwen3: also q and k before their norms, the gate and its
# product. The factors below are fitted to measured peaks on GPUs (tests/benchmarks/memory).
CHANNEL_BYTES = 8
INSIDE_BYTES = {"gpt2": 4, "qwen3": 6}
INPUT_BYTES = {"gpt2": 2, "qwen3": 4}  # instead, where a block is recomputed: x, and its norm
KEPT = 0.99
BACKWARD_LAYERS = 2.43  # memory of a layer's backward pass, in layers
LOGIT_BYTES = 2
HEAD_BYTES = 10  # per number of the head: padded, and its gradient in bfloat16 and float32
USABLE = 0.94  # of the free memory: the rest goes to fragments and libraries
MOST_INT8_TOKENS = 2**17  # of a micro-batch: a sum of so many products of 127 and 127 fits 32 bits
CPU_TOKENS = 1024  # a CPU is fastest while a micro-batch's logits fit its caches


@dataclass(frozen=True)
class Cut:
    """How a step is cut: micro_batch_size * accumulation_steps * world_size windows."""

    micro_batch_size: int
    accumulation_steps: int
    estimated_bytes: int
    recomputes: bool = False  # the blocks, in the backward pass: it takes a third more FLOPs


def muon_weights(config: Config) -> int:
    """Numbers in the matrices that are Muon's."""
    model = config.model
    return model.num_layers * model.layer_weights() if config.optimizer.name == "muon" else 0


def checkpoint_bytes(config: Config) -> int:
    """On the disk: masters and moments in float32."""
    return 12 * config.model.num_parameters() - 4 * muon_weights(config)


def estimate_bytes(
    config: Config, micro_batch_size: int, world_size: int = 1, recomputes: bool = False
) -> int:
    """Peak bytes on each of `world_size` GPUs: a bfloat16, compiled step."""
    model, num_parameters = config.model, config.model.num_parameters()
    tokens = micro_batch_size * model.context_length
    inside = (model.num_heads + model.kv_heads()) * model.head_dim() + model.mlp_dim()
    channels = CHANNEL_BYTES * model.embedding_size + INSIDE_BYTES[model.family] * inside
    layer = KEPT * tokens * channels
    kept, at_work = model.num_layers * layer, BACKWARD_LAYERS * layer
    gradients = GRADIENT_BYTES * num_parameters if model.family == "gpt2" else 0
    if recomputes:
        kept = model.num_layers * tokens * INPUT_BYTES[model.family] * model.embedding_size
        at_work, gradients = at_work + layer, 0
    head = LOGIT_BYTES * min(tokens, HEAD_CHUNK["cuda"]) * model.vocab_size
    head += HEAD_BYTES * model.vocab_size * model.embedding_size
    activations = max(kept + max(head, at_work), gradients + at_work)
    by_muon = muon_weights(config)
    own = ADAMW_BYTES * (num_parameters - by_muon) + MUON_BYTES * by_muon
    state = WHOLE_BYTES * num_parameters + own / world_size
    return int(state + max(activations, MUON_UPDATE_BYTES * by_muon / world_size))


def cut_here(config: Config, ranks: Ranks, device: torch.device) -> Cut:
    """Cut tokens_per_step for this machine; the same on every rank. ForgeError as cut_step()."""
    if device.type != "cuda":
        return cut_step(config, ranks.world_size)
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    usable = USABLE * min(free, allowed - torch.cuda.memory_reserved(device))
    limit = torch.tensor(int(usable), device=device)
    if dist.is_initialized():
        dist.all_reduce(limit, dist.ReduceOp.MIN)
    return cut_step(config, ranks.world_size, limit.item())


def cut_step(config: Config, world_size: int, limit: float | None = None) -> Cut:
    """Cut tokens_per_step for `world_size` ranks, with `limit` bytes on each; None for CPUs.

    Blocks are recomputed only where nothing else fits: small micro-batches cost less. Raises
    ForgeError when the windows do not divide among the ranks, when a given micro-batch does not
    divide a rank's share, or when not even one window fits.
    """
    windows, given = config.windows_per_step(), config.batch.micro_batch_size
    share = windows // world_size
    sizes = divisors(share)
    if windows % world_size:
        counts = ", ".join(str(n) for n in divisors(windows) if n <= 64)
        every = counted(windows, "window")
        what = f"{every} a step cannot be shared out evenly among {world_size} ranks"
        fix = f"start one of {counts} processes, or --set batch.tokens_per_step=..."
        raise ForgeError(what, where="batch.tokens_per_step", fix=fix)
    if given != "auto":
        if given not in sizes:
            every = counted(share, "window")
            what = f"a micro-batch of {given} does not divide a rank's {every} a step"
            fix = f"use one of {', '.join(map(str, sizes))}"
            raise ForgeError(what, where="batch.micro_batch_size", fix=fix)
        sizes = [given]
    elif config.precision == "int8":
        sizes = [n for n in sizes if n * config.model.context_length <= MOST_INT8_TOKENS]
    if limit is None:
        small = [n for n in sizes if n * config.model.context_length <= CPU_TOKENS]
        size = max(small, default=sizes[0])
        return Cut(size, share // size, estimate_bytes(config, size, world_size))
    for recomputes in (False, True):
        estimates = {n: estimate_bytes(config, n, world_size, recomputes) for n in sizes}
        fits = [n for n in sizes if estimates[n] <= limit]
        if not fits and recomputes and given != "auto":
            fits = sizes  # it was asked for, and the estimate may be wrong
        if fits:
            return Cut(fits[-1], share // fits[-1], estimates[fits[-1]], recomputes)
    needed, free = estimates[1] / 2**30, limit / 2**30
    what = f"a micro-batch of 1 takes about {needed:.1f} GiB, of {free:.1f} on each GPU"
    fix = "train a smaller model, on more GPUs, or end other programs on the GPU"
    raise ForgeError(what, where="batch.micro_batch_size", fix=fix)


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
