"""forge-train with a fault planted in the 3rd step of rank 1 alone, for torchrun.

PLANTED says which: "nan", in its loss, or "flip", of a weight's last bit.
"""

import math
import os

import torch
from torch import Tensor

from trainer import cli
from trainer.model import GPT2

plain_forward = GPT2.forward
forwards = 0


def forward(self: GPT2, tokens: Tensor, targets: Tensor) -> Tensor:
    global forwards
    loss = plain_forward(self, tokens, targets)
    if not loss.requires_grad:  # an evaluation
        return loss
    forwards += 1
    if forwards == 3 and os.environ["RANK"] == "1":
        if os.environ["PLANTED"] == "nan":
            return loss * math.nan
        self.ln_f.weight.data.view(torch.int32)[0] ^= 1
    return loss


if __name__ == "__main__":
    GPT2.forward = forward  # type: ignore[method-assign]
    cli.main()
