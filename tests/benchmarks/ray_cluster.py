"""What Ray costs beside local processes: python -m tests.benchmarks.ray_cluster [--machines 1,2,4]

Tokenizes the same text with --workers processes of this machine, and on a Ray cluster on loopback
that has as many CPUs, in turns, --tries times; then on clusters of --machines with one CPU each.
The text is --source, --repeat times over. Columns, the median of the tries:

    seconds   from the start of forge-prep to its end; the cluster is there already, as a rule
    CPU       seconds of processor time, of forge-prep, its workers and all of Ray's own processes,
              which a machine that is busy with other things changes less
    same      whether the folder has the very bytes of the first run

With --kill, the last cluster loses a machine in mid-run, and then the driver is killed with SIGKILL
and started again; `redone` counts finished slices that were made again: none may be.
"""

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks import kill_prep
from tests.benchmarks.kill_prep import ROOT, contents

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(seen: dict[int, float]) -> None:
    """Note the processor time so far of each process below this one, itself left out."""
    found: dict[int, tuple[int, float]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            found[int(stat.parent.name)] = int(fields[1]), sum(map(int, fields[11:13])) / TICKS
    below = {os.getpid()}
    while more := {p for p, (parent, _) in found.items() if parent in below} - below:
        below |= more
    seen.update({process: found[process][1] for process in below - {os.getpid()}})


def run(source: Path, out: Path, *more: object) -> tuple[float, float]:
    """Seconds and CPU seconds of one forge-prep tokenize, and of the cluster meanwhile."""
    shutil.rmtree(out, ignore_errors=True)
    before: dict[int, float] = {}
    cpu_seconds(before)
    started = time.perf_counter()
    process = subprocess.Popen(command(source, out, *more), cwd=ROOT, stdout=subprocess.DEVNULL)
    after = dict(before)
    while process.poll() is None:  # Ray's workers leave no account of themselves behind
        cpu_seconds(after)
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    assert process.returncode == 0
    return seconds, sum(n - before.get(process, 0.0) for process, n in after.items())


def command(source: Path, out: Path, *more: object) -> list[str]:
    program = [sys.executable, "-m", "pipeline.cli", "tokenize", source, "--out", out, *more]
    return list(map(str, program))


@contextlib.contextmanager
def cluster(machines: int, cpus: int = 1) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": cpus, "include_dashboard": False, "node_ip_address": "127.0.0.2"}
    made = Cluster(initialize_head=True, head_node_args=head)
    for number in range(1, machines):
        made.add_node(num_cpus=cpus, node_ip_address=f"127.0.0.{number + 2}")
    try:
        yield made
    finally:
        made.shutdown()


def show(name: str, tries: list[tuple[float, float]], same: bool) -> None:
    seconds, cpu = (statistics.median(column) for column in zip(*tries, strict=True))
    every = ", ".join(f"{wall:.1f}/{used:.1f}" for wall, used in tries)
    print(f"{name:34} {seconds:8.1f} {cpu:8.1f}  {same!s:5}  {every}", flush=True)


def wait_for(process: subprocess.Popen[bytes], out: Path, count: int) -> dict[str, int]:
    """The finished slices, once there are so many."""
    while len(found := kill_prep.records(out)) < count:
        assert process.poll() is None
        time.sleep(0.01)
    return found


def disturb(source: Path, out: Path, made: Any, how: str, count: int) -> int:
    """A run that loses a machine or its driver after `count` slices; how many were made again."""
    shutil.rmtree(out, ignore_errors=True)
    arguments = command(source, out, "--ray", made.address)
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
    before = wait_for(process, out, count)
    if how == "machine":
        made.remove_node(made.list_all_nodes()[-1], allow_graceful=False)
    else:
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = kill_prep.records(out)
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
    assert process.wait() == 0
    now = {path.name: path.stat().st_mtime_ns for path in out.glob("train_*.bin")}
    return sum(now[name] != at for name, at in before.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = ROOT.parent / "shared" / "data" / "fineweb-edu-dedup"
    parser.add_argument("--source", type=Path, default=default)
    parser.add_argument("--repeat", type=int, default=10, help="copies of the source to read")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--machines", default="1,2,4")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--kill", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, first, out = folder / "source", folder / "first", folder / "out"
        files = sorted(arguments.source.glob("*.parquet"))
        for copy, path in itertools.product(range(arguments.repeat), files):
            (source / str(copy)).mkdir(parents=True, exist_ok=True)
            (source / str(copy) / path.name).symlink_to(path.resolve())
        measure(arguments, source, first, out)


def measure(arguments: argparse.Namespace, source: Path, first: Path, out: Path) -> None:
    print(f"{'':34} {'seconds':>8} {'CPU':>8}  same   each try: seconds/CPU")
    local: list[tuple[float, float]] = []
    on_ray: list[tuple[float, float]] = []
    processes: Callable[[Path], tuple[float, float]] = lambda folder: run(  # noqa: E731
        source, folder, "--workers", arguments.workers
    )
    with cluster(1, arguments.workers) as made:
        for number in range(arguments.tries):
            local.append(processes(out if number else first))
            on_ray.append(run(source, out, "--ray", made.address))
    expected = contents(first)
    show(f"{arguments.workers} processes", local, True)
    show(f"Ray, 1 machine of {arguments.workers} CPUs", on_ray, contents(out) == expected)
    overheads = [
        statistics.median(r[k] for r in on_ray) / statistics.median(p[k] for p in local) - 1
        for k in (0, 1)
    ]
    print("overhead: {:+.1%} of the seconds, {:+.1%} of the CPU".format(*overheads))
    for machines in map(int, arguments.machines.split(",")):
        with cluster(machines) as made:
            tries = [run(source, out, "--ray", made.address)]
            show(f"Ray, {machines} machines of 1 CPU", tries, contents(out) == expected)
            is_last = machines == int(arguments.machines.split(",")[-1])
            for how in ("machine", "driver") if arguments.kill and is_last else ():
                redone = disturb(source, out, made, how, len(list(first.glob("train_*"))) // 3)
                same = contents(out) == expected
                print(f"{machines} machines, {how} lost: same {same}, redone {redone}", flush=True)


if __name__ == "__main__":
    main()
