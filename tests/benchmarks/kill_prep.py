"""Kill forge-prep at random moments: python -m tests.benchmarks.kill_prep [--kills 20]

Starts `forge-prep tokenize`, waits until some more slices are finished, ends a worker, the parent
or the whole group with SIGKILL, and starts it again, until it gets through. Then the folder must
hold the very bytes of a run that nobody disturbed, with no finished slice made twice.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import sources

ROOT = Path(__file__).parents[2]
SLICE_BYTES = 1_000_000  # many slices of a few milliseconds each


@dataclass
class Tally:
    """What was killed how often, and what the runs after it found."""

    kills: Counter[str] = field(default_factory=Counter)
    num_runs: int = 0
    num_slices: int = 0
    redone_slices: int = 0
    half_written: int = 0
    identical: bool = False


def write_source(path: Path, num_slices: int) -> None:
    """Text of about `num_slices` slices, no two documents alike."""
    words = ["the", "model", "reads", "text", "of", "a", "slice", "and", "learns", "tokens"]
    text = " ".join(random.Random(0).choices(words, k=SLICE_BYTES // 50))
    rows = [f"{number} {text}" for number in range(10 * num_slices)]
    pq.write_table(pa.table({"text": rows}), path, row_group_size=10)


def start(source: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline.cli", "tokenize", source, "--out", out]
    command += ["--workers", workers, "--val-fraction", "0.1"]
    command += ["--shard-tokens", round(SLICE_BYTES / sources.BYTES_PER_TOKEN)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=quiet, stderr=quiet, start_new_session=True
    )


def records(out: Path) -> dict[str, int]:
    """The train shards of finished slices, and when they were made."""
    found = {}
    for record in list((out / ".work").glob("[0-9]*.json")):
        shard = out / ".work" / f"train_{record.stem}.bin"
        if shard.exists():
            found[shard.name] = shard.stat().st_mtime_ns
    return found


def members(group: int) -> list[int]:
    """Processes of a group, the parent first, the workers behind it."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found, key=lambda process: process != group)


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


def torment(folder: Path, kills: int, workers: int, seed: int = 0, num_slices: int = 60) -> Tally:
    """Run undisturbed, then with `kills` kills; compare."""
    source, straight, out = folder / "text.parquet", folder / "straight", folder / "out"
    write_source(source, num_slices)
    assert start(source, straight, workers).wait() == 0
    rng, tally = random.Random(seed), Tally()
    tally.num_slices = len(list(straight.glob("train_*.bin")))
    most = max(1, tally.num_slices // (2 * kills + 2))  # so that the last kill still finds work
    while tally.num_runs < 4 * kills + 1:
        finished = records(out)
        process = start(source, out, workers)
        tally.num_runs += 1
        target = rng.choice(["worker", "parent", "group"])
        enough = len(finished) + rng.randint(0, most)
        if tally.kills.total() < kills:
            while process.poll() is None and len(records(out)) < enough:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.02)
            if process.poll() is None:
                family = members(process.pid)
                # multiprocessing's resource tracker is the first child; workers follow it
                victims = {"worker": family[-1:], "parent": family[:1], "group": family}[target]
                for victim in victims:
                    os.kill(victim, signal.SIGKILL)
                tally.kills[target] += 1
        code = process.wait()
        while members(process.pid):  # workers end with their parent
            time.sleep(0.01)
        now = records(out)
        done = out / "index.json"
        kept = (
            {name: (out / name).stat().st_mtime_ns for name in finished} if done.exists() else now
        )
        tally.redone_slices += sum(kept.get(name) != stamp for name, stamp in finished.items())
        if code == 0:
            break
    tally.half_written = len(list(out.rglob("*.partial")))
    tally.identical = contents(out) == contents(straight)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = torment(Path(folder), arguments.kills, arguments.workers, arguments.seed, 200)
    print(f"kills: {dict(tally.kills)} in {tally.num_runs} runs of {tally.num_slices} slices")
    print(f"finished slices made twice: {tally.redone_slices}")
    print(f"half-written files left: {tally.half_written}")
    print(f"the same bytes as an undisturbed run: {tally.identical}")
    if tally.redone_slices or tally.half_written or not tally.identical:
        sys.exit(1)


if __name__ == "__main__":
    main()
