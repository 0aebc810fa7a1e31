"""forge-train with a fault planted on one rank alone, for torchrun.

PLANTED says which. On rank 1 "nan", in the loss of its 3rd step, or "flip", of a weight's last bit
at each evaluation: after the last update before a checkpoint, as the next would bring the owner's
weight. On rank 0 "full", a disk without room for the first checkpoint's second file.
"""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from trainer import checkpoint, cli
from trainer.model import GPT2

plain_forward, plain_loss, plain_save = GPT2.forward, GPT2.loss, checkpoint.save_tensors
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


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    if path.name == checkpoint.OPTIMIZER_FILE and not checkpoint.steps(path.parents[2]):
        checkpoint.save_tensors = plain_save
        raise OSError("No space left on device")
    plain_save(tensors, path)


if __name__ == "__main__":
    planted = os.environ["RANK"], os.environ["PLANTED"]
    if planted == ("1", "nan"):
        GPT2.forward = forward  # type: ignore[method-assign]
    elif planted == ("1", "flip"):
        GPT2.loss = loss  # type: ignore[method-assign]
    elif planted == ("0", "full"):
        checkpoint.save_tensors = save_tensors
    cli.main()
