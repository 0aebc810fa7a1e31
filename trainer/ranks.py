"""What torchrun says -> Ranks; the process group; the device; what all ranks do together.

Before: torchrun's environment variables. After: loop.py, which takes Ranks as an argument.
"""

import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from pipeline.errors import ForgeError

T = TypeVar("T")
BEAT_SECONDS = 1.0


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
        """As torchrun says; one process without WORLD_SIZE, whatever else is set.

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


def launch() -> str | None:
    """Names the torchrun that started this process: the same after its own restarts, no other's.

    Its process id and when it began, as the kernel counts; None without torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    launcher = os.getppid()
    try:
        began_at = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # not Linux
        began_at = ""
    return f"{launcher} {began_at}"


# ---------------------------------------------------------------------------------------------


class Heartbeat:
    """Who is there: each rank sets its pulse in a store every second and watches the others'.

    A collective cannot say who is missing, and over NCCL it does not notice a dead rank at all. So
    when this rank makes no progress and another has been silent for `silent_seconds`, this process
    says which and ends; torchrun then ends or restarts the group.
    """

    def __init__(self, store: Store, ranks: Ranks, silent_seconds: float) -> None:
        self.store, self.ranks, self.silent_seconds = store, ranks, silent_seconds
        self.heard = {rank: time.monotonic() for rank in range(ranks.world_size)}
        self.pulses = dict.fromkeys(self.heard, "")
        self.step = 0
        self.progress_at = time.monotonic()
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def progress(self, step: int) -> None:
        self.step, self.progress_at = step, time.monotonic()

    def end(self) -> None:
        """Wait for the thread: Python, at its own end, would kill it inside torch and abort."""
        self.ending.set()
        self.thread.join(timeout=5)  # unless the store does not answer

    def missing(self) -> str:
        """The other ranks that are silent; if none is, those that are behind."""
        now = time.monotonic()
        silent = [
            f"rank {rank} (silent for {now - heard:.0f} s, last at step {self._step(rank)})"
            for rank, heard in self.heard.items()
            if now - heard > 3 * BEAT_SECONDS and rank != self.ranks.rank
        ]
        behind = [
            f"rank {rank} (alive, at step {self._step(rank)})"
            for rank in self.heard
            if rank != self.ranks.rank and self._step(rank) < self.step
        ]
        return ", ".join(silent or behind) or "unknown: all ranks are alive and at the same step"

    def _step(self, rank: int) -> int:
        return int(self.pulses[rank].partition(" ")[0] or 0)

    def _run(self) -> None:
        count = 0
        while not self.ending.wait(BEAT_SECONDS):
            count += 1
            try:
                self.store.set(f"pulse/{self.ranks.rank}", f"{self.step} {count}")
                for rank in self.heard:
                    key = f"pulse/{rank}"
                    pulse = self.store.get(key).decode() if self.store.check([key]) else ""
                    if pulse != self.pulses[rank]:
                        self.pulses[rank], self.heard[rank] = pulse, time.monotonic()
            except RuntimeError:  # the store's own process is gone: collectives will say so
                return
            stuck = time.monotonic() - self.progress_at > self.silent_seconds
            longest = time.monotonic() - min(self.heard.values())
            if stuck and longest > self.silent_seconds:
                print(
                    f"Error: [rank {self.ranks.rank}] missing: {self.missing()}\n"
                    f"  where:      after step {self.step}\n"
                    "  what to do: look at that rank's own output; then the same command with "
                    "--resume",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def fresh_store(ranks: Ranks, timeout: timedelta) -> Store:
    """A key-value store that only the processes of this very start share.

    torchrun keeps one store for all its restarts, and the ranks before left their addresses in it:
    who reads those waits for the dead (pytorch issue 135712). Restart counts differ between
    machines, so they cannot tell the starts apart. Instead rank 0 calls with a new name, every
    other rank answers to it with a new name of its own, and goes on when rank 0 has repeated that.
    """
    shared = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timeout,
    )
    me = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    if ranks.is_first:
        call = me
        shared.set("forge/call", call)
        answers = {str(rank): f"forge/{call}/{rank}" for rank in range(1, ranks.world_size)}
        while missing := [rank for rank, key in answers.items() if not shared.check([key])]:
            if time.monotonic() > deadline:
                raise _not_there(f"rank {', '.join(missing)}", timeout)
            time.sleep(0.02)
        names = {rank: shared.get(key).decode() for rank, key in answers.items()}
        shared.set(f"forge/{call}/go", json.dumps(names))
    else:
        while True:
            call = shared.get("forge/call").decode() if shared.check(["forge/call"]) else ""
            shared.set(f"forge/{call}/{ranks.rank}", me)
            go = f"forge/{call}/go"
            if shared.check([go]) and json.loads(shared.get(go))[str(ranks.rank)] == me:
                break
            if time.monotonic() > deadline:
                raise _not_there("rank 0, or one that it waits for,", timeout)
            time.sleep(0.02)
    return PrefixStore(f"forge/{call}", shared)


def _not_there(who: str, timeout: timedelta) -> ForgeError:
    return ForgeError(
        f"{who} did not join within {timeout.total_seconds():.0f} s",
        where=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        fix="look at that rank's own output; start the group again with --resume",
    )


@contextmanager
def process_group(
    ranks: Ranks, device: torch.device, timeout_seconds: float
) -> Iterator[Heartbeat | None]:
    """Join the other ranks and leave them cleanly: NCCL between GPUs, gloo between CPUs.

    Raises ForgeError that names the missing when others go away.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.world_size == 1:
        yield None
        return
    timeout = timedelta(seconds=timeout_seconds)
    # GPUs get gloo, too: what is decided on the host is shared without the GPU.
    backend, device_id = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        dist.init_process_group(
            backend,
            timeout=timeout,
            store=fresh_store(ranks, timeout),
            rank=ranks.rank,
            world_size=ranks.world_size,
            device_id=device_id,
        )
    else:
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    # A connection of its own: whoever waits for a key keeps the other one busy.
    store = _get_default_store().clone()  # type: ignore[attr-defined]
    heartbeat = Heartbeat(store, ranks, max(timeout_seconds / 5, 5 * BEAT_SECONDS))
    try:
        yield heartbeat
    except ForgeError:
        # All ranks have it and leave by themselves: the first to be gone has torchrun end the
        # others, which are to say what happened, too.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("gloo", "NCCL", "nccl")):
            raise
        time.sleep(4 * BEAT_SECONDS)  # until a dead rank is seen to be silent
        raise ForgeError(
            f"lost contact with the other ranks; missing: {heartbeat.missing()}",
            where=f"rank {ranks.rank} after step {heartbeat.step}: "
            f"{str(error).splitlines()[0][:160]}",
            fix="look at that rank's own output; then the same command with --resume",
        ) from error
    finally:
        heartbeat.end()
        with suppress(RuntimeError):
            dist.destroy_process_group()


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
