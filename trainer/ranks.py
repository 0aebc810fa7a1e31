"""This process's rank, device and process group, and what all ranks do together."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from pipeline.errors import ForgeError

T = TypeVar("T")
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


@dataclass(frozen=True)
class Ranks:
    """This process's place in the group. One process without torchrun is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @staticmethod
    def from_environment() -> "Ranks":
        """From torchrun's environment; one process without WORLD_SIZE, whatever else is set.

        ForgeError if there are several processes and a variable that they need is not set.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return Ranks()
        try:
            values = [int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            wrong = f"{error} is not set" if isinstance(error, KeyError) else str(error)
            raise ForgeError(
                f"one of WORLD_SIZE={os.environ['WORLD_SIZE']} processes, but {wrong}",
                where="the environment",
                fix="start the processes with torchrun; or unset WORLD_SIZE, for a single one",
            ) from error
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
def process_group(ranks: Ranks, device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Join the other ranks and leave them cleanly: NCCL between GPUs, gloo between CPUs.

    ForgeError when others go away. torchrun names the rank that failed, and the collective's
    time-out ends one that hangs.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.world_size == 1:
        yield
        return
    check_own_store()
    # GPUs get gloo, too: what is decided on the host is shared without the GPU.
    backend, device_id = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    timeout = timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
        yield
    except ForgeError:
        # All ranks have it and leave by themselves: the first to be gone has torchrun end the
        # others, which must print their message first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("gloo", "NCCL", "nccl", "client socket")):
            raise
        raise ForgeError(
            "lost contact with the other ranks",
            where=f"rank {ranks.rank}: {str(error).splitlines()[0][:160]}",
            fix="look at the output of the rank that torchrun names; if none failed, one took "
            "longer than guard.timeout_seconds (a checkpoint to a slow disk, say). Then --resume",
        ) from error
    # Not after an error: it would wait for the ranks that are gone.
    dist.destroy_process_group()


def check_own_store() -> None:
    """ForgeError where torchrun would restart the ranks, and they could not meet again.

    torchrun keeps one store for all its restarts, and the ranks before left their addresses in it:
    who reads those waits for the dead (pytorch issue 135712). With a store of its own, each start
    begins without them.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ForgeError(
            f"torchrun may restart the ranks ({restarts} times), which could not meet again",
            where="the environment of torchrun",
            fix=f"export {OWN_STORE}=1 before the same command",
        )


def sum_over_ranks(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Add a tensor up over all ranks, in place."""
    if ranks.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank. Its ForgeError is raised on every rank."""
    result: list[T | ForgeError] = [ForgeError("rank 0 did not answer")]
    if ranks.is_first:
        try:
            result = [action()]
        except ForgeError as error:
            result = [error]
    if ranks.world_size > 1:
        dist.broadcast_object_list(result, src=0)
    if isinstance(result[0], ForgeError):
        raise result[0]
    return result[0]


def on_all(ranks: Ranks, action: Callable[[], T]) -> T:
    """What `action` returns on this rank. A ForgeError on any rank is raised on every rank."""
    problem: ForgeError | None = None
    try:
        result = action()
    except ForgeError as error:
        problem = error
    for rank, other in enumerate(gather(ranks, problem)):
        if other and rank != ranks.rank and problem is None:
            raise ForgeError(f"rank {rank}: {other.what}", where=other.where, fix=other.fix)
    if problem:
        raise problem
    return result


def gather(ranks: Ranks, value: T) -> list[T]:
    """Each rank's value, by rank, on every rank."""
    values = [value] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def fill_from_first(
    ranks: Ranks, read: Callable[[], dict[str, torch.Tensor]], tensors: dict[str, torch.Tensor]
) -> None:
    """Fill `tensors` on every rank, in place, with what `read` gives by their names on rank 0.

    Its ForgeError is raised on every rank.
    """
    found: dict[str, torch.Tensor] = {}

    def keep() -> None:
        found.update(read())

    from_first(ranks, keep)
    for name, tensor in tensors.items():
        if ranks.is_first:
            tensor.copy_(found.pop(name))
        if ranks.world_size > 1:
            dist.broadcast(tensor, src=0)
