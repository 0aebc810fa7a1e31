"""How tokenizing grows with workers: python -m tests.benchmarks.scale_tokenize [--workers 1,2,4]

For each number n of workers: one `forge-prep tokenize` of n times --gigabytes of text (the source
over and over), whose workers note what each slice took. Beside it stand the machine's own limits,
n processes that have nothing in common: so one can tell what the pipeline loses from what cores
lose that share clock, memory and caches.

    whole     MB/s of text from the start of the process to its end
    steady    the same for each worker from the end of its first slice to the end of its last: all
              but start-up, the first words of a fresh encoder and the end, when slices run out;
              what a run of minutes comes to
    encoding  MB/s of n encoders alone, warm, on the same text in memory
    CPU       seconds of processor time a GB of text; they grow with n when cores share too much
    shards    MB/s of shards that steady makes; `disk`: n processes that write and sync files

The factors are against the best row of the fewest workers: the first run on a fresh machine may be
slower than the rest, so name a number twice (--workers 16,1,16,1).

And in per cent of the workers' time, from the first slice's start to the last one's end: reading
and decompressing, encoding, split (a hash a document, val or train), writing with its checksum,
committing (sync, rename), the rest of a slice, idle between two slices, and idle at the end.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import engines, readers, shards, slices, sources, tokenizer
from tests.benchmarks import tokenize

PROGRAM = """
from pipeline import cli, engines
from tests.benchmarks import scale_tokenize
engines._start_worker = scale_tokenize.start_watched_worker
cli.main()
"""
NOTES = "FORGE_BENCHMARK_NOTES"  # the folder that workers leave their notes in
PHASES = ("read", "encode", "split", "write", "commit")
FULL_BYTES = 957.57e9  # FineWeb-Edu, deduplicated
LIMIT_SECONDS = 3.0
DISK_BYTES = 128 * 2**20  # a process


# ---------------------------------------------------------------------------------------------
# In a worker


def start_watched_worker(*arguments: Any) -> None:
    """prepare.py's own start of a worker; then a clock around each part of its work."""
    engines._start_worker(*arguments)
    spent: Counter[str] = Counter()

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter_ns()
            try:
                return function(*arguments)
            finally:
                spent[name] += time.perf_counter_ns() - started

        return call

    def clocked_batches(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def read(*arguments: Any) -> Iterator[Any]:
            yield from iter(clocked("read", lambda: next(batches, None)), None)

        def started(*arguments: Any) -> Iterator[Any]:
            nonlocal batches
            batches = function(*arguments)
            return read()

        batches: Iterator[Any] = iter(())
        return started

    def noted(function: Callable[..., slices.Record]) -> Callable[..., slices.Record]:
        def make(*arguments: Any) -> slices.Record:
            spent.clear()
            started, cpu = time.perf_counter_ns(), time.process_time_ns()
            record = function(*arguments)
            note = {"start": started, "end": time.perf_counter_ns()} | spent
            note["cpu"] = time.process_time_ns() - cpu
            note["bytes"] = sum(shard.text_bytes for shard in record.shards)
            note["tokens"] = sum(shard.num_tokens for shard in record.shards)
            note["split"] = note.pop("documents") - note["encode"] - note["write"]
            with (Path(os.environ[NOTES]) / str(os.getpid())).open("a") as file:
                file.write(json.dumps(note) + "\n")
            return record

        return make

    slices.write_documents = clocked("documents", slices.write_documents)
    slices.tokenize_slice = noted(slices.tokenize_slice)
    readers.read_documents = clocked_batches(readers.read_documents)
    encode = tokenizer.BulkEncoder.encode  # lazy; the clock needs it done
    tokenizer.BulkEncoder.encode = lambda *arguments: list(encode(*arguments))  # type: ignore[assignment]
    for owner, method, name in (
        (tokenizer.BulkEncoder, "encode", "encode"),
        (shards.ShardWriter, "write", "write"),
        (shards.ShardWriter, "commit", "commit"),
    ):
        setattr(owner, method, clocked(name, getattr(owner, method)))


# ---------------------------------------------------------------------------------------------
# The machine's limits


def encode_alone(source: Path, ready: Any, speeds: Any) -> None:
    """Encode the source's text over and over for some seconds."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / shards.VOCABULARY_FILE
        vocabulary.write_bytes(tokenizer.vocabulary())
        encoder = tokenizer.BulkEncoder(vocabulary)
        texts = list(tokenize.batches(sources.resolve(str(source))))
        for batch in texts:
            deque(encoder.encode(batch), maxlen=0)
    ready.wait()
    started, num_bytes, number = time.perf_counter(), 0, 0
    while time.perf_counter() - started < LIMIT_SECONDS:
        deque(encoder.encode(texts[number % len(texts)]), maxlen=0)
        num_bytes += tokenize.text_bytes(texts[number % len(texts)])
        number += 1
    speeds.put(num_bytes / 1e6 / (time.perf_counter() - started))


def write_alone(folder: Path, ready: Any, speeds: Any) -> None:
    """Write one file as a shard is written."""
    tokens = np.random.default_rng(0).integers(0, 50257, 2**21, np.uint16)
    writer = shards.ShardWriter(folder / f"train_{os.getpid()}.bin")
    ready.wait()
    started = time.perf_counter()
    for _ in range(DISK_BYTES // tokens.nbytes):
        writer.write(tokens)
    writer.commit()
    speeds.put(DISK_BYTES / 1e6 / (time.perf_counter() - started))
    writer.path.unlink()


def together(count: int, work: Callable[..., None], argument: Path) -> float:
    """MB/s of `count` processes that do the same at the same time."""
    context = multiprocessing.get_context("spawn")
    ready, speeds = context.Barrier(count), context.Queue()
    processes = [context.Process(target=work, args=(argument, ready, speeds)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [speeds.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return float(sum(found))


# ---------------------------------------------------------------------------------------------
# The runs


@dataclass
class Row:
    """What n workers reached."""

    workers: int
    num_bytes: int
    num_tokens: int
    num_slices: int
    whole: float  # MB/s of text, as are the next two
    steady: float
    encoding: float
    disk: float  # MB/s of files
    start_seconds: float
    cpu_seconds: float
    shares: dict[str, float]  # per cent of the workers' time


def run(workers: int, source: Path, folder: Path, gigabytes: float) -> Row:
    found = sources.resolve(str(source))
    text = tokenize.planned(found, 2**40).bytes
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        (work / "notes").mkdir()
        for copy in range(max(1, round(workers * gigabytes * 1e9 / text))):
            (work / "source" / f"{copy:05}").mkdir(parents=True)
            for file in found.files:
                link = work / "source" / f"{copy:05}" / Path(file.name).name
                link.symlink_to(Path(found.root) / file.name)
        command = [sys.executable, "-c", PROGRAM, "tokenize", work / "source"]
        command += ["--out", work / "out", "--workers", workers]
        started = time.perf_counter_ns()
        subprocess.run(
            list(map(str, command)),
            cwd=tokenize.ROOT,
            env=os.environ | {NOTES: str(work / "notes")},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        seconds = (time.perf_counter_ns() - started) / 1e9
        notes = [
            [json.loads(line) for line in path.read_text().splitlines()]
            for path in (work / "notes").iterdir()
        ]
        disk = together(workers, write_alone, work)
    everything = [note for worker in notes for note in worker]
    num_bytes = sum(note["bytes"] for note in everything)
    begin, end = min(note["start"] for note in everything), max(note["end"] for note in everything)
    total = workers * (end - begin)
    spent = {phase: sum(note.get(phase, 0) for note in everything) for phase in PHASES}
    in_slices = sum(note["end"] - note["start"] for note in everything)
    spent["rest"] = in_slices - sum(spent.values())
    tail = sum(end - worker[-1]["end"] for worker in notes) + (workers - len(notes)) * (end - begin)
    spent |= {"idle": total - in_slices - tail, "end": tail}
    steady = [
        1e3 * sum(n["bytes"] for n in worker[1:]) / (worker[-1]["end"] - worker[0]["end"])
        for worker in notes
        if len(worker) > 1
    ]
    return Row(
        workers,
        num_bytes,
        sum(note["tokens"] for note in everything),
        len(everything),
        num_bytes / 1e6 / seconds,
        sum(steady),
        together(workers, encode_alone, source),
        disk,
        (begin - started) / 1e9,
        sum(note["cpu"] for note in everything) / 1e9,
        {name: 100 * ns / total for name, ns in spent.items()},
    )


def show(rows: list[Row]) -> None:
    fewest = min(row.workers for row in rows)
    first = max((row for row in rows if row.workers == fewest), key=lambda row: row.steady)
    print(f"\n{'':7}{'text':>8}{'slices':>8}{'whole':>14}{'steady':>16}{'encoding':>16}", end="")
    print(f"{'steady /':>10}{'CPU':>9}{'shards':>8}{'disk':>7}{'start':>8}")
    print(f"{'workers':7}{'GB':>8}{'':8}{'MB/s':>14}{'MB/s':>16}{'MB/s':>16}", end="")
    print(f"{'encoding':>10}{'s/GB':>9}{'MB/s':>8}{'MB/s':>7}{'s':>8}")
    for row in rows:
        speeds = (row.whole, row.steady, row.encoding)
        bases = (first.whole, first.steady, first.encoding)
        tokens = row.num_tokens / row.num_bytes
        print(f"{row.workers:7}{row.num_bytes / 1e9:8.1f}{row.num_slices:8}", end="")
        for speed, base, width in zip(speeds, bases, (6, 8, 8), strict=True):
            print(f"{speed:{width},.0f}{speed / base:7.2f}x", end="")
        print(
            f"{row.steady / row.encoding:10.2f}{row.cpu_seconds / row.num_bytes * 1e9:9.2f}", end=""
        )
        print(f"{2 * tokens * row.steady:8.0f}{row.disk:7.0f}{row.start_seconds:8.2f}")
    print(f"\n{'workers':7}" + "".join(f"{name:>9}" for name in first.shares) + "   per cent")
    for row in rows:
        print(f"{row.workers:7}" + "".join(f"{share:9.1f}" for share in row.shares.values()))
    best = max(rows, key=lambda row: row.steady)
    tokens = best.num_tokens / best.num_bytes
    print(
        f"\n{best.workers} workers, steady: {best.steady:,.0f} MB/s of text, "
        f"{best.steady * tokens:,.1f} M tokens/s. FineWeb-Edu's 957.57 GB "
        f"(at as many bytes a token, {FULL_BYTES * tokens / 1e9:,.0f} B tokens) would take "
        f"{FULL_BYTES / best.steady / 1e6 / 60:.1f} minutes."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = tokenize.ROOT.parent / "shared" / "data" / "fineweb-edu-dedup"
    parser.add_argument("--source", type=Path, default=default)
    parser.add_argument("--workers", default="1,2,4,8,16")
    parser.add_argument("--gigabytes", type=float, default=1.5, help="of text, a worker")
    parser.add_argument("--out", type=Path, help="where shards go [default: a temporary folder]")
    arguments = parser.parse_args()
    cpu = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
    smt = Path("/sys/devices/system/cpu/smt/active")
    print(f"{len(os.sched_getaffinity(0))} cores of {cpu[0].partition(':')[2].strip()}, ", end="")
    print(f"threads share cores: {smt.read_text().strip() if smt.exists() else '?'}, ", end="")
    print(f"load before: {os.getloadavg()[0]:.1f}", flush=True)
    rows = []
    for workers in map(int, arguments.workers.split(",")):
        rows.append(
            run(
                workers,
                arguments.source,
                arguments.out or tempfile.gettempdir(),
                arguments.gigabytes,
            )
        )
        print(f"{workers} workers: {rows[-1].whole:,.0f} MB/s", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
