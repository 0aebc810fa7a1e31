"""forge-train with a NaN planted in the 3rd step's loss of rank 1 alone, for torchrun."""

import math
import os

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
    return loss * math.nan if forwards == 3 and os.environ["RANK"] == "1" else loss


if __name__ == "__main__":
    GPT2.forward = forward  # type: ignore[method-assign]
    cli.main()
