"""This process's rank, device and process group, and what all ranks do together."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from pipeline.errors import ForgeError, refusal

T = TypeVar("T")
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# (output, input) of equal shares; either may lie in the other. torch 2.13 has renamed them.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
            what = f"one of WORLD_SIZE={os.environ['WORLD_SIZE']} processes, but {wrong}"
            fix = "start the processes with torchrun; or unset WORLD_SIZE, for a single one"
            raise ForgeError(what, where="the environment", fix=fix) from error
        return Ranks(*values)

    def device(self) -> torch.device:
        """A GPU a local rank; ForgeError when there are fewer GPUs than ranks."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            what = f"more local ranks than GPUs: the machine has {torch.cuda.device_count()}"
            fix = "start as many processes as there are GPUs: torchrun --nproc_per_node=N"
            raise ForgeError(what, where=f"rank {self.rank}", fix=fix)
        return torch.device("cuda", self.local_rank)


@contextmanager
def process_group(ranks: Ranks, device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Join the other ranks and leave them cleanly: NCCL between GPUs, gloo between CPUs.

    Errors of torch that a user can cure become ForgeErrors. torchrun names the rank that failed,
    and the collective's time-out ends one that hangs.
    """
    is_gpu, is_alone = device.type == "cuda", ranks.world_size == 1
    if is_gpu:
        torch.cuda.set_device(device)
    try:
        if not is_alone:
            check_own_store()
            # GPUs get gloo, too: what is decided on the host is shared without the GPU.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if is_gpu else "gloo",
                timeout=timedelta(seconds=timeout_seconds),
                device_id=device if is_gpu else None,
            )
        yield
    except ForgeError:
        if not is_alone:  # the first to leave has torchrun end the others, which print theirs first
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not is_gpu and dist.is_initialized():  # or gloo's threads may abort the process
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if (known := explained(error, ranks)) is None:
            raise
        raise known from error
    if not is_alone:  # after an error NCCL would wait for the ranks that are gone
        dist.destroy_process_group()


def explained(error: RuntimeError, ranks: Ranks) -> ForgeError | None:
    """What a user can do about an error of torch, None if nothing is known."""
    lines = str(error).strip().splitlines()
    where = f"rank {ranks.rank}: {''.join(lines[:1])[:160]}"
    if isinstance(error, torch.OutOfMemoryError):
        fix = (
            "end other programs on the GPU. For forge-train: the same command with --resume --set "
            "batch.micro_batch_size=N, N below what it said at its start; the steps stay the same"
        )
        return ForgeError("out of GPU memory", where=where, fix=fix)
    if "allocate memory" in str(error):  # a CPU has no OutOfMemoryError
        fix = "take a smaller model, or a machine with more memory"
        return ForgeError("out of memory", where=where, fix=fix)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        fix = "install a C compiler, such as gcc, if that is missing; or --resume --set compile=off"
        return ForgeError(f"torch.compile failed: {' '.join(lines[:2])}", where=where, fix=fix)
    if any(sign in str(error) for sign in ("gloo", "NCCL", "nccl", "client socket")):
        fix = (
            "look at the output of the rank that torchrun names; if none failed, one took longer "
            "than guard.timeout_seconds (a checkpoint to a slow disk, say). Then --resume"
        )
        return ForgeError("lost contact with the other ranks", where=where, fix=fix)
    return None


def check_own_store() -> None:
    """ForgeError where torchrun would restart the ranks, and they could not meet again.

    torchrun keeps one store for all its restarts, and the ranks before left their addresses in it
    (pytorch issue 135712). With a store of its own, each start begins without them.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        what = "torchrun may restart the ranks, which could not meet again"
        fix = f"export {OWN_STORE}=1 before the same command"
        raise ForgeError(what, where=f"--max-restarts={restarts}", fix=fix)


def sum_over_ranks(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Add a tensor up over all ranks, in place."""
    if ranks.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def on_all(ranks: Ranks, action: Callable[[], T]) -> list[T]:
    """What `action` returns on each rank, on every rank.

    A ForgeError of one, and what its machine refuses, is raised on all.
    """
    mine: T | ForgeError
    try:
        mine = action()
    except ForgeError as error:
        mine = error
    except OSError as error:
        mine = refusal(error, "read or write", f"rank {ranks.rank}")
    results: list[T | ForgeError] = [mine] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(results, mine)
    if isinstance(mine, ForgeError):
        raise mine
    for rank, result in enumerate(results):
        if isinstance(result, ForgeError):
            raise ForgeError(f"rank {rank}: {result.what}", where=result.where, fix=result.fix)
    return cast(list[T], results)


def from_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank. Its ForgeError is raised on every rank."""
    return on_all(ranks, lambda: action() if ranks.is_first else cast(T, None))[0]


class Shared(NamedTuple):
    """A tensor whose numbers are shared out among the ranks, or all on each."""

    shape: torch.Size
    spans: list[slice]  # of the flat tensor: each rank's numbers
    mine: torch.Tensor  # this rank's, (numbers,)


def gathered(ranks: Ranks, *groups: dict[str, Shared]) -> Iterator[dict[str, torch.Tensor]]:
    """Each group's whole tensors on rank 0, on the CPU; {} on the others. All ranks take all."""
    for group in groups:
        wholes = {}
        for name, shared in group.items():
            if not ranks.is_first:
                send(shared.mine.cpu(), 0)
                continue
            wholes[name] = torch.empty(shared.shape)
            parts = [wholes[name].view(-1)[span] for span in shared.spans]
            parts[0].copy_(shared.mine)
            for rank, part in enumerate(parts[1:], start=1):
                receive(part, rank)
        yield wholes


def send(numbers: torch.Tensor, rank: int) -> None:
    """What receive() takes there; nothing travels where there are no numbers."""
    if len(numbers):
        dist.send(numbers, rank)


def receive(numbers: torch.Tensor, rank: int) -> None:
    if len(numbers):
        dist.recv(numbers, rank)


def fill_from_first(
    ranks: Ranks, read: Callable[[], dict[str, torch.Tensor]], tensors: dict[str, Shared]
) -> None:
    """Fill `tensors` on every rank, in place, with what `read` gives by their names on rank 0.

    Its ForgeError is raised on every rank.
    """
    found: dict[str, torch.Tensor] = {}
    from_first(ranks, lambda: found.update(read()))
    for name, shared in tensors.items():
        mine = torch.empty(shared.mine.shape)
        if ranks.is_first:
            flat = found.pop(name).to("cpu", torch.float32).flatten()
            mine, *others = [flat[span] for span in shared.spans]
            for rank, part in enumerate(others, start=1):
                send(part, rank)
        else:
            receive(mine, 0)
        shared.mine.copy_(mine)
