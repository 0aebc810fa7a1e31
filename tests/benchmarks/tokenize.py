"""How fast text becomes shards: python -m tests.benchmarks.tokenize [--workers 1,2] [--repeat 25]

Prints MB/s of text, best of --tries, of

    a  reading the parquet column alone
    b  encoding alone, from a fresh encoder on, as much text as c; then once, no word known before
    c  forge-prep tokenize, one worker; then with each other number of --workers
    e  c's inner loop with tiktoken (encode_to_numpy) as the encoder
    f  tiktoken's encode_ordinary_batch into arrays, as nanoGPT and llm.c prepare their data

and of c: seconds to the first token on the disk, and the memory of workers and parent after 1, 10
and 50 slices a worker. `whole` counts from the start of the process to its end, `steady` from the
first finished slices on; `CPU` is MB of text a second of processor time, start-up included, which
holds on a machine that is busy with other things. The text is --source, --repeat times over.
"""

import argparse
import contextlib
import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline import readers, shards, slices, sources, tokenizer
from pipeline.plan import Plan
from pipeline.slices import Job
from pipeline.sources import Options

ROOT = Path(__file__).parents[2]
TIKTOKEN_BYTES = 30_000_000  # enough text for the slow rows
MARKS = (1, 10, 50)  # slices a worker


def batches(source: sources.Source) -> Iterator[list[bytes]]:
    """The texts of the source, some 1,024 at a time."""
    slices = planned(source, 2**40).slices.values()
    for part in (part for each in slices for part in each.parts):
        at = readers.Reading(source.root / part.file.name, Options())
        for batch in readers.read_documents(source.kind, at, part):
            yield [text for text in batch.documents if text]


def planned(source: sources.Source, shard_tokens: int) -> Plan:
    plan = Plan(source, Options(shard_tokens=shard_tokens))
    plan.reach(math.inf)
    return plan


def text_bytes(documents: list[bytes]) -> int:
    return sum(map(len, documents))


def best(tries: int, work: Callable[[], int]) -> tuple[float, float]:
    """The best MB/s, and MB a CPU second, of tries of `work`, which returns its bytes of text."""
    speeds = []
    for _ in range(tries):
        started, cpu = time.perf_counter(), time.process_time()
        megabytes = work() / 1e6
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        speeds.append((megabytes / seconds, megabytes / cpu))
    wall, processor = zip(*speeds, strict=True)
    return max(wall), max(processor)


class TiktokenEncoder:
    """In place of tokenizer.BulkEncoder."""

    def encode(self, documents: list[bytes]) -> Iterator[npt.NDArray[np.uint32]]:
        encode = tokenizer.reference().encode_to_numpy
        return (encode(document.decode(), disallowed_special=()) for document in documents)


def run_with_tiktoken(source: sources.Source, folder: Path) -> int:
    """One slice through prepare's own worker code, in this process."""
    slices._encoder = lambda path: TiktokenEncoder()  # type: ignore[assignment,return-value]
    first = planned(source, round(TIKTOKEN_BYTES / sources.BYTES_PER_TOKEN)).slices[0]
    folder.mkdir(parents=True, exist_ok=True)
    made = slices.tokenize_slice(Job(first, source.kind, source.root, folder))
    return sum(shard.text_bytes for shard in made.shards)


@dataclass
class Run:
    """One forge-prep tokenize, watched from outside."""

    num_bytes: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the parent and the workers
    first_token_seconds: float = 0.0
    first_slices_seconds: float = 0.0
    first_slices: int = 0
    num_slices: int = 0
    worker_mib: dict[int, float] = field(default_factory=dict)  # by slices a worker
    parent_mib: float = 0.0
    peak_worker_mib: float = 0.0

    @property
    def whole(self) -> float:
        return self.num_bytes / 1e6 / self.seconds

    @property
    def cpu(self) -> float:
        return self.num_bytes / 1e6 / self.cpu_seconds

    @property
    def steady(self) -> float:
        """MB/s between the first finished slices and the end."""
        left = 1 - self.first_slices / max(1, self.num_slices)
        return self.num_bytes * left / 1e6 / (self.seconds - self.first_slices_seconds)


def memory_mib(process: int) -> float:
    """Resident memory without mapped files (the source's pages are the page cache's)."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    anonymous = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return int(anonymous[0]) / 1024 if anonymous else 0.0


def children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


def children(process: int) -> list[int]:
    try:
        return [
            int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except OSError:
        return []


def run_forge_prep(source: Path, out: Path, workers: int, shard_tokens: int) -> Run:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline.cli", "tokenize", source, "--out", out]
    command += ["--workers", workers, "--shard-tokens", shard_tokens]
    run = Run(0)
    started, cpu = time.perf_counter(), children_cpu()
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        seconds = time.perf_counter() - started
        finished = 0
        with contextlib.suppress(FileNotFoundError):  # renamed while we look
            written = [p.stat().st_size for p in out.glob(".work/train_*.partial")]
            if not run.first_token_seconds and max(written, default=0) > shards.HEADER.size:
                run.first_token_seconds = seconds
            finished = len(list(out.glob(".work/train_*.bin")))
        if finished >= workers and not run.first_slices:
            run.first_slices, run.first_slices_seconds = finished, seconds
        now = max(map(memory_mib, children(process.pid)), default=0.0)
        run.peak_worker_mib = max(run.peak_worker_mib, now)
        run.parent_mib = max(run.parent_mib, memory_mib(process.pid))
        for mark in MARKS:
            if finished >= mark * workers:
                run.worker_mib.setdefault(mark, now)
        time.sleep(0.03)
    run.seconds, run.cpu_seconds = time.perf_counter() - started, children_cpu() - cpu
    if process.returncode:
        sys.exit(process.returncode)
    index = shards.load_index(out)
    run.num_bytes, run.num_slices = index.total("text_bytes"), len(index.of("train"))
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = ROOT.parent / "shared" / "data" / "fineweb-edu-dedup"
    parser.add_argument("--source", type=Path, default=default)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, as in 1,2,4")
    parser.add_argument("--repeat", type=int, default=25, help="copies of the source to read")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--shard-tokens", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path, help="where shards go [default: a temporary folder]")
    parser.add_argument("--only-runs", action="store_true", help="leave out a, b, e and f")
    arguments = parser.parse_args()
    if not any(arguments.source.glob("*.parquet")):
        parser.error(
            f"no .parquet files in {arguments.source}; name a folder of them with --source"
        )
    with tempfile.TemporaryDirectory(dir=arguments.out) as name:
        folder = Path(name)
        for copy, path in itertools.product(
            range(arguments.repeat), sorted(arguments.source.glob("*.parquet"))
        ):
            (folder / "source" / str(copy)).mkdir(parents=True, exist_ok=True)
            (folder / "source" / str(copy) / path.name).symlink_to(path.resolve())
        speed = {} if arguments.only_runs else measure_parts(arguments, folder)
        counts = [int(count) for count in arguments.workers.split(",")]
        runs: dict[int, Run] = {}
        for _, count in itertools.product(range(arguments.tries), counts):
            run = run_forge_prep(folder / "source", folder / "out", count, arguments.shard_tokens)
            runs[count] = max(runs.get(count, run), run, key=lambda each: each.whole)
    print_table(speed, runs)


def measure_parts(arguments: argparse.Namespace, folder: Path) -> dict[str, tuple[float, float]]:
    """Rows a, b, e and f."""
    source = sources.resolve(str(arguments.source))
    texts = list(batches(source))
    vocabulary = folder / shards.VOCABULARY_FILE
    vocabulary.write_bytes(tokenizer.vocabulary())

    def encode(times: int) -> int:
        encoder = tokenizer.BulkEncoder(vocabulary)
        for batch in texts * times:
            deque(encoder.encode(batch), maxlen=0)
        return sum(map(text_bytes, texts)) * times

    def encode_as_others_do() -> int:
        done = 0
        for batch in texts:
            encoded = tokenizer.reference().encode_ordinary_batch(
                [document.decode() for document in batch], num_threads=len(os.sched_getaffinity(0))
            )
            for ids in encoded:
                np.array(ids, np.uint16)
            done += text_bytes(batch)
            if done >= TIKTOKEN_BYTES:
                break
        return done

    tokenizer.encode("loaded before the clock starts")
    return {
        "a": best(arguments.tries, lambda: sum(map(text_bytes, batches(source)))),
        "b": best(arguments.tries, lambda: encode(arguments.repeat)),
        "b once": best(arguments.tries, lambda: encode(1)),
        "e": best(arguments.tries, lambda: run_with_tiktoken(source, folder / "tiktoken")),
        "f": best(arguments.tries, encode_as_others_do),
    }


def print_table(speed: dict[str, tuple[float, float]], runs: dict[int, Run]) -> None:
    first = next(iter(runs.values()))
    names = {
        "a": "reading the column alone",
        "b": "encoding alone",
        "b once": "encoding alone, text that comes once",
        "e": "forge-prep's loop with tiktoken",
        "f": "tiktoken encode_ordinary_batch, all cores",
    }
    print(f"{first.num_bytes / 1e9:.2f} GB of text, {len(os.sched_getaffinity(0))} cores\n")
    print(f"{'':52}{'whole':>8}{'steady':>8}{'CPU':>8}  MB/s")
    for key in ("a", "b", "b once"):
        if key in speed:
            print(f"{key[0]}  {names[key]:49}{speed[key][0]:8.0f}{'':8}{speed[key][1]:8.0f}")
    for count, run in runs.items():
        label = f"forge-prep tokenize, {count} worker{'s' * (count > 1)}"
        print(f"{'c' if run is first else 'd'}  {label:49}", end="")
        print(f"{run.whole:8.0f}{run.steady:8.0f}{run.cpu:8.0f}")
    for key in "ef":
        if key in speed:
            print(f"{key}  {names[key]:49}{speed[key][0]:8.1f}{'':8}{speed[key][1]:8.1f}")
    print()
    if speed:
        series, series_cpu = (
            1 / (1 / a + 1 / b) for a, b in zip(speed["a"], speed["b"], strict=True)
        )
        ratios = (first.whole / series, first.steady / series, first.cpu / series_cpu)
        print("c / (a and b in series): {:.2f}, steady {:.2f}, CPU {:.2f}".format(*ratios))
        for key in "bef":
            ratios = (first.whole / speed[key][0], first.cpu / speed[key][1])
            print("c / {}: {:.2f}, CPU {:.2f}".format(key, *ratios))
    for count, run in list(runs.items())[1:]:
        ratio = f"{run.steady / first.steady:.2f}" if first.steady else "too little text to say,"
        print(f"{count} workers / {next(iter(runs))}: {ratio} in steady state")
    for count, run in runs.items():
        marks = ", ".join(f"{mib:.0f} after {mark}" for mark, mib in run.worker_mib.items())
        print(
            f"{count} workers: first token on the disk after {run.first_token_seconds:.2f} s; "
            f"MiB a worker by slices: {marks}; peak {run.peak_worker_mib:.0f}; "
            f"parent {run.parent_mib:.0f}"
        )


if __name__ == "__main__":
    main()
