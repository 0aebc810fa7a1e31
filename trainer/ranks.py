"""What torchrun says -> Ranks; the process group; the device.

Before: torchrun's environment variables. After: loop.py, which takes Ranks as an argument.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.errors import ForgeError

TIMEOUT = timedelta(minutes=10)  # longest wait for another rank


@dataclass(frozen=True)
class Ranks:
    """This process among the others. One process without torchrun is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @staticmethod
    def from_environment() -> "Ranks":
        try:
            values = [int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
        except (KeyError, ValueError):
            return Ranks()
        return Ranks(*values)

    def device(self) -> torch.device:
        """A GPU a local rank; ForgeError when there are fewer GPUs than ranks."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ForgeError(
                f"no GPU for local rank {self.local_rank}: the machine has "
                f"{torch.cuda.device_count()}",
                where=f"rank {self.rank}",
                fix="start as many processes as there are GPUs: torchrun --nproc_per_node=N",
            )
        return torch.device("cuda", self.local_rank)


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Join the other ranks (NCCL on GPUs, gloo on CPUs) and leave them cleanly."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.world_size == 1:
        yield
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    dist.barrier()  # everyone has looked at the disk before anyone writes to it
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Add a tensor up over all ranks, in place."""
    if ranks.world_size > 1:
        dist.all_reduce(tensor)
    return tensor
