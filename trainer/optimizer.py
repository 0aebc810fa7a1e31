"""Parameter groups, the optimizer, the learning-rate schedule.

Before: model.py's parameters and their gradients. After: loop.py's update.
"""

import math

import torch
from torch import Tensor, nn

from trainer.config import Config


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019), with weight decay on matrices only.

    Biases, LayerNorm gains and whatever else has fewer than two dimensions are not decayed.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    options = config.optimizer
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.peak_lr, betas=options.betas, eps=1e-8, fused=True)


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of the update that ends step `step` (from 1): warm-up, then a cosine.

    Linear from 0 to peak_lr over warmup_steps, then a half cosine to final_lr_fraction of it at
    the last step (Loshchilov and Hutter 2017, without restarts).
    """
    schedule, peak = config.schedule, config.optimizer.peak_lr
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    decay_steps = max(1, config.num_steps() - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / decay_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.final_lr_fraction + (1 - schedule.final_lr_fraction) * cosine)


def update(optimizer: torch.optim.AdamW, lr: float, is_sound: Tensor) -> None:
    """One AdamW update, or none at all where `is_sound` (a bool on the device) is false.

    The fused kernel reads `found_inf` itself, as for GradScaler, so nothing waits for the GPU.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = (~is_sound).float()  # type: ignore[attr-defined]
    optimizer.step()
