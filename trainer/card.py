"""What the card in hand does, measured, and what a model will reach on it (`--check`)."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainer.config import ModelConfig

# What a step costs beside its matrix products, measured on an H200 with GPT-2 124M and 350M.
ATTENTION_SPEED = 0.6  # of a plain product's, counted over the full square
LAYER_TRAFFIC = 145  # bytes that elementwise work moves for each token, layer and channel
LOGIT_TRAFFIC = 6  # and for each token and word of the vocabulary
GRADIENT_TRAFFIC = 14  # bytes a parameter to add a micro-batch's gradients up
LAYER_SECONDS = 1e-4  # of gaps between the kernels of a layer, forward and backward


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
    """Calls a second, after a warm-up as long: a cold card is faster than it stays."""
    for _ in range(2):
        torch.cuda.synchronize()
        started, calls = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < seconds:
            for _ in range(10):
                work()
            torch.cuda.synchronize()
            calls += 10
    return calls / elapsed
