"""Where slices are made: in processes of this machine, or in tasks of a Ray cluster.

A slice depends on nothing but its job, so an engine is no more than submit(), which returns a
future, and stop(). Which engine it is changes no byte.
"""

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Collection
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from pipeline.errors import KEPT, ForgeError, refusals
from pipeline.slices import Job, Record, tokenize_slice
from pipeline.sources import Slice

SHARED = f"in a container, docker run --shm-size=64m; {KEPT}"
CANCEL_SECONDS = 10.0  # for tasks on Ray to remove what they have half written
ON_ALL = "on every machine of the cluster"

Running = dict[Future[Record], Slice]


class Processes:
    """Worker processes of this machine. `done` counts bytes of the source and tokens."""

    def __init__(self, workers: int) -> None:
        self.num_workers = workers
        self.processes: list[Any] = []
        with refusals("make shared memory", "/dev/shm", SHARED):
            context = multiprocessing.get_context("spawn")  # its semaphores are files
            self.done: Any = context.Array("q", 2)
            self.pool = ProcessPoolExecutor(workers, context, _start_worker, (self.done,))

    def connect(self) -> None:
        """Nothing to do: a process starts with the first job that needs it."""

    def workers(self) -> int:
        """How many slices are made at a time."""
        return self.num_workers

    def submit(self, job: Job) -> Future[Record]:
        # Processes that this starts inherit the blocked SIGINT; this one gets it afterwards.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with refusals("start the workers", job.work.parent, KEPT):
                future = self.pool.submit(tokenize_slice, job, _add)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.processes = list((self.pool._processes or {}).values())
        return future

    def record(self, future: Future[Record], running: Running) -> Record:
        """What a job returned. ForgeError if it failed, or a worker died."""
        try:
            return future.result()
        except BrokenProcessPool as error:
            what = "a worker process was killed (by hand, or by the kernel for want of memory)"
            if -signal.SIGBUS in {process.exitcode for process in self.processes}:
                what = "a worker process could not read a file that it had mapped (SIGBUS)"
            names = {part.file.name for each in running.values() for part in each.parts}
            fix = f"{KEPT}; try fewer --workers"
            raise ForgeError(what, where=", ".join(sorted(names)[:3]), fix=fix) from error

    def stop(self, running: Collection[Future[Record]]) -> None:
        """End all that is running."""
        for process in self.processes if running else ():
            process.kill()
        self.pool.shutdown(wait=True, cancel_futures=True)


_done: Any  # in a worker process: Processes.done


def _start_worker(done: Any) -> None:
    global _done
    _done = done
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _add(source_bytes: int, tokens: int) -> None:
    with _done.get_lock():
        _done[0] += source_bytes
        _done[1] += tokens


class Ray:
    """Tasks of one CPU each on a Ray cluster, whose machines share the folders.

    Ray makes a slice again when a worker or its machine dies, and passes on what our code raises.
    """

    def __init__(self, address: str, workers: int | None = None) -> None:
        """`workers` slices at a time, or as many as the cluster has CPUs."""
        self.address, self.num_workers = address, workers
        self.done = [0, 0]

    def connect(self) -> None:
        try:
            import ray
        except ImportError as error:
            fix = f"pip install -e '.[ray]' in the clone, {ON_ALL}"
            raise ForgeError("--ray needs Ray, which is not installed here", fix=fix) from error
        ours = {"py_modules": [str(Path(__file__).parent)]}  # all machines run this very code
        quiet: Any = {"log_to_driver": False, "logging_level": "error"}
        host, _, port = self.address.rpartition(":")
        try:
            if port.isdigit():  # Ray itself would try for minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            ray.init(self.address, runtime_env=ours, **quiet)
        except Exception as error:  # a dozen unrelated types
            what = f"cannot join a Ray cluster: {type(error).__name__}: {error}"
            fix = "ray start --head, or ray start --address=HEAD:6379 where there is a head"
            raise ForgeError(what, where=self.address, fix=fix) from error
        self.ray, self.task = ray, ray.remote(num_cpus=1)(_make_on_ray)

    def workers(self) -> int:
        return self.num_workers or int(self.ray.cluster_resources().get("CPU", 1))

    def submit(self, job: Job) -> Future[Record]:
        future: Future[Record] = self.task.remote(job).future()
        return future

    def record(self, future: Future[Record], running: Running) -> Record:
        try:
            record = future.result()
        except self.ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)  # what our code raised
            if isinstance(cause, ForgeError):
                raise cause from None
            what = f"Ray could not make a slice: {type(error).__name__}: {error}"
            fix = f"install the same packages {ON_ALL}; {KEPT}"
            raise ForgeError(what, where=self.address, fix=fix) from error
        self.done[0] += running[future].bytes
        self.done[1] += record.num_train_tokens + record.num_val_tokens
        return record

    def stop(self, running: Collection[Future[Record]]) -> None:
        for future in running:
            self.ray.cancel(future.object_ref)  # type: ignore[attr-defined]
        wait(running, timeout=CANCEL_SECONDS)
        self.ray.shutdown()


def _make_on_ray(job: Job) -> Record:
    for folder in (job.root, job.work):
        if not folder.is_dir():
            what = f"the machine {socket.gethostname()} does not have this folder"
            fix = "take folders that all machines of the cluster share"
            raise ForgeError(what, where=folder, fix=fix)
    return tokenize_slice(job)


Engine = Processes | Ray
