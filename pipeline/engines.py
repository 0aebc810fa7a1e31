"""Where slices are made: in processes of this machine, or in tasks of a Ray cluster.

An engine runs jobs that depend on nothing but themselves. Which one does changes no byte.
"""

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pipeline.errors import KEPT, ForgeError, refusals
from pipeline.slices import Job, Record, tokenize_slice
from pipeline.sources import Slice

SHARED = f"in a container, docker run --shm-size=64m; {KEPT}"
CANCEL_SECONDS = 10.0  # for tasks on Ray to remove what they have half written
ON_ALL = "on every machine of the cluster"


class Engine:
    """Makes slices, some at a time. As a context, it stops what is left at the end."""

    done: Any  # bytes of the source and tokens, of all that is made

    def __init__(self) -> None:
        self.running: dict[Future[Record], Slice] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def workers(self) -> int:
        """How many slices it makes at a time, just now."""
        raise NotImplementedError

    def start(self, job: Job) -> None:
        self.running[self._submit(job)] = job.slice

    def ended(self) -> Iterator[tuple[Slice, Record]]:
        """The slices that have just been made; waits for one, a moment. Raises ForgeError."""
        futures, _ = wait(self.running, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in futures:
            record = self._record_of(future)
            yield self.running.pop(future), record

    def stop(self) -> None:
        """End all that runs."""
        raise NotImplementedError

    def _submit(self, job: Job) -> Future[Record]:
        raise NotImplementedError

    def _record_of(self, future: Future[Record]) -> Record:
        """The record that a job returned; ForgeError if it failed."""
        raise NotImplementedError


class Processes(Engine):
    """Worker processes of this machine."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.num_workers = workers
        self.processes: list[Any] = []
        with refusals("make shared memory", "/dev/shm", SHARED):
            context = multiprocessing.get_context("spawn")  # its semaphores are files
            self.done = context.Array("q", 2)
            self.pool = ProcessPoolExecutor(workers, context, _start_worker, (self.done,))

    def workers(self) -> int:
        return self.num_workers

    def _submit(self, job: Job) -> Future[Record]:
        with _ctrl_c_blocked(), refusals("start the workers", job.work.parent, KEPT):
            future = self.pool.submit(_make_here, job)
        self.processes = list((self.pool._processes or {}).values())
        return future

    def _record_of(self, future: Future[Record]) -> Record:
        try:
            return future.result()
        except BrokenProcessPool as error:
            what = "a worker process was killed (by hand, or by the kernel for want of memory)"
            if -signal.SIGBUS in {process.exitcode for process in self.processes}:
                what = "a worker process could not read a file that it had mapped (SIGBUS)"
            parts = (part for each in self.running.values() for part in each.parts)
            names = sorted({part.file.name for part in parts})
            fix = f"{KEPT}; try fewer --workers"
            raise ForgeError(what, where=", ".join(names[:3]), fix=fix) from error

    def stop(self) -> None:
        if self.running:
            for process in self.processes:
                process.kill()
        self.pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Block SIGINT in the processes that are started inside; this one gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_done: Any  # in a worker process: Processes.done


def _start_worker(done: Any) -> None:
    global _done
    _done = done
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _make_here(job: Job) -> Record:
    return tokenize_slice(job, _add)


def _add(source_bytes: int, tokens: int) -> None:
    with _done.get_lock():
        _done[0] += source_bytes
        _done[1] += tokens


class Ray(Engine):
    """Tasks of one CPU on a Ray cluster, whose machines share the folders.

    Ray makes a slice again when a worker or its machine dies, and passes our errors on.
    """

    def __init__(self, address: str, workers: int | None = None) -> None:
        """`workers` slices at a time, or as many as the cluster has CPUs."""
        super().__init__()
        self.address, self.most, self.done = address, workers, [0, 0]

    def __enter__(self) -> Self:
        try:
            import ray
        except ImportError as error:
            fix = f"pip install 'llm-forge[ray]', {ON_ALL}"
            raise ForgeError("--ray needs Ray, which is not installed here", fix=fix) from error
        here = {"py_modules": [str(Path(__file__).parent)]}  # all machines run this very code
        quiet: Any = {"log_to_driver": False, "logging_level": "error"}
        try:
            ray.init(self.address, runtime_env=here, **quiet)
        except Exception as error:  # a dozen unrelated types
            what = f"cannot join a Ray cluster: {type(error).__name__}: {error}"
            fix = "ray start --head here, or ray start --address=HEAD:6379 where there is one"
            raise ForgeError(what, where=self.address, fix=fix) from error
        self.ray, self.task = ray, ray.remote(num_cpus=1)(_make_on_ray)
        return self

    def workers(self) -> int:  # machines come and go
        return self.most or int(self.ray.cluster_resources().get("CPU", 1))

    def _submit(self, job: Job) -> Future[Record]:
        future: Future[Record] = self.task.remote(job).future()
        return future

    def _record_of(self, future: Future[Record]) -> Record:
        try:
            record = future.result()
        except self.ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)  # what our code raised
            if isinstance(cause, ForgeError):
                raise cause from None
            what = f"Ray could not make a slice: {type(error).__name__}: {error}"
            fix = f"install the same packages {ON_ALL}; {KEPT}"
            raise ForgeError(
                what, where=self.running[future].parts[0].file.name, fix=fix
            ) from error
        self.done[0] += self.running[future].bytes
        self.done[1] += record.num_train_tokens + record.num_val_tokens
        return record

    def stop(self) -> None:
        if self.ray.is_initialized():
            for future in self.running:
                self.ray.cancel(future.object_ref)  # type: ignore[attr-defined]
            wait(self.running, timeout=CANCEL_SECONDS)
            self.ray.shutdown()


def _make_on_ray(job: Job) -> Record:
    for folder in (job.root, job.work):
        if not folder.is_dir():
            what = f"the machine {socket.gethostname()} does not have this folder"
            fix = "take folders that all machines of the cluster share"
            raise ForgeError(what, where=folder, fix=fix)
    return tokenize_slice(job)
