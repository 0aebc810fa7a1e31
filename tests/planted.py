"""forge-train with a fault planted on rank 1 alone, for torchrun.

PLANTED says which: "nan", in the loss of its 3rd step, or "flip", of a weight's last bit at each
evaluation: after the last update before a checkpoint, as the next would bring the owner's weight.
"""

import math
import os

import torch
from torch import Tensor

from trainer import cli
from trainer.model import GPT2

plain_forward, plain_loss = GPT2.forward, GPT2.loss
forwards = 0


def forward(self: GPT2, tokens: Tensor, targets: Tensor) -> Tensor:
    global forwards
    forwards += 1
    loss = plain_forward(self, tokens, targets)
    return loss * math.nan if forwards == 3 else loss


def loss(self: GPT2, x: Tensor, targets: Tensor) -> Tensor:
    if not torch.is_grad_enabled():  # an evaluation
        self.ln_f.weight.data.view(torch.int32)[0] ^= 1
    return plain_loss(self, x, targets)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        if os.environ["PLANTED"] == "nan":
            GPT2.forward = forward  # type: ignore[method-assign]
        else:
            GPT2.loss = loss  # type: ignore[method-assign]
    cli.main()
