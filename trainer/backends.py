"""Choices per device: attention's kernels, and where torch.compile goes."""

import functools
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from trainer import fused
from trainer.config import Config
from trainer.model import GPT2, Qwen3


def attention_backends(device: torch.device) -> Any:
    """The fastest attention first: cuDNN's on Hopper and Blackwell's data-center cards only.

    On six cards, huggingface/transformers pull request 48163 found FlashAttention-2 as fast on Ada,
    and faster on Ampere and on Blackwell's other cards.
    """
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10):
        order.insert(0, SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(order, set_priority=True)


def compile_model(
    model: GPT2 | Qwen3, config: Config, device: torch.device, recomputes: bool = False
) -> None:
    """Put fused.py's trunk in place where it serves; else torch.compile, as the config asks.

    With `recomputes` blocks keep their inputs alone, and are computed again in the backward pass
    (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). They are compiled one by
    one then, so that backward gives their gradients one by one.
    """
    compiles = config.compile == "full" or (config.compile == "auto" and device.type == "cuda")
    again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if compiles and isinstance(model, Qwen3) and fused.available(config, device):
        layer = functools.partial(again, fused.layer) if recomputes else fused.layer
        model.trunk = functools.partial(fused.hidden, model, layer=layer)
    elif recomputes:
        for block in model.h:
            run = torch.compile(block.forward, dynamic=False) if compiles else block.forward
            block.forward = functools.partial(again, run)
    elif compiles:
        model.trunk = torch.compile(model.hidden, dynamic=False)
