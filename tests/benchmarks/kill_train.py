"""Kill forge-train at random moments: python -m tests.benchmarks.kill_train [--kills 20]

Trains a small model on two ranks with gloo, ends one rank, all processes or torchrun itself with
SIGKILL, every other time while a checkpoint is being written, and starts the same command again,
until it gets through. Losses of all steps and final weights must be the bits of a run that nobody
disturbed. With --restarts torchrun restarts the ranks by itself when one is killed.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import prepare, sources
from pipeline.engines import Processes
from pipeline.sources import Options
from tests import python_docs
from trainer import checkpoint
from trainer.ranks import OWN_STORE

ROOT = Path(__file__).parents[2]
VICTIMS = ("rank", "all", "launcher")
SETTINGS = {
    "model.num_layers": 2,
    "model.embedding_size": 32,
    "model.context_length": 64,
    "batch.tokens_per_step": 256,
    "schedule.warmup_steps": 2,
    "evaluate.every_steps": 5,
    "evaluate.num_tokens": 640,
    "evaluate.sample_tokens": 4,
    "checkpoint.every_steps": 3,
    "compile": "off",
}


@dataclass
class Tally:
    kills: Counter[str] = field(default_factory=Counter)
    num_starts: int = 0
    while_writing: int = 0  # kills that left a half-written checkpoint
    longest_seconds: float = 0.0  # from a kill to the end of that start
    same_losses: bool = False
    same_weights: bool = False


def start(data: Path, run: Path, steps: int, restarts: int = 0) -> subprocess.Popen[bytes]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launcher += [f"--max-restarts={restarts}"]
    command = [sys.executable, "-m", *launcher, "-m", "trainer.cli", "tiny"]
    command += ["--data", data, "--out", run, "--resume", f"--set=schedule.max_steps={steps}"]
    command += [f"--set={key}={value}" for key, value in SETTINGS.items()]
    log = run.with_name(run.name + ".log").open("ab")
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", OWN_STORE: "1"},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def losses(run: Path) -> list[tuple[int, float]]:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError):  # not there yet, or a line half written
        return []
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "step"]


def half_written(run: Path) -> bool:
    return any((run / checkpoint.FOLDER).glob("*.partial"))


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    try:
        path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        return [int(pid) for pid in path.read_text().split()]
    except OSError:
        return []


def strike(process: subprocess.Popen[bytes], victim: str, rng: random.Random) -> None:
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif victim == "launcher":
        process.kill()
    elif ranks := ranks_of(process):
        os.kill(rng.choice(ranks), signal.SIGKILL)


def undisturbed(folder: Path, data: Path, steps: int) -> Path:
    """A run that nobody disturbs."""
    run = folder / "straight"
    assert start(data, run, steps).wait() == 0, (folder / "straight.log").read_text()
    return run


def torment(
    run: Path, straight: Path, data: Path, steps: int, kills: int, seed: int = 0, restarts: int = 0
) -> Tally:
    """A run with `kills` kills, compared with the undisturbed run `straight`."""
    rng, tally = random.Random(seed), Tally()
    for number in itertools.count():
        process = start(data, run, steps, restarts)
        tally.num_starts += 1
        struck_at = time.monotonic()
        while number < kills and process.poll() is None:
            victim = VICTIMS[number % 3]
            at = (number + 1) * steps // (kills + 1) + rng.randint(0, max(1, steps // (kills + 1)))
            while process.poll() is None and len(losses(run)) < min(at, steps - 1):
                time.sleep(0.005)
            if number % 2:  # inside a checkpoint's writing
                while process.poll() is None and not half_written(run):
                    time.sleep(0.0005)
            else:
                time.sleep(rng.random() * 0.1)
            if process.poll() is None:
                strike(process, victim, rng)
                tally.kills[victim] += 1
                tally.while_writing += half_written(run)
                struck_at = time.monotonic()
                print(f"killed {victim} after step {len(losses(run))}", flush=True)
            break
        code = process.wait(timeout=300)
        tally.longest_seconds = max(tally.longest_seconds, time.monotonic() - struck_at)
        if code == 0:
            break
        assert number < 4 * kills + 4, run.with_name(run.name + ".log").read_text()[-3000:]
    tally.same_losses = losses(run) == losses(straight)
    last = [checkpoint.checkpoint_path(r, steps) / checkpoint.MODEL_FILE for r in (run, straight)]
    tally.same_weights = last[0].read_bytes() == last[1].read_bytes()
    return tally


def make_data(folder: Path) -> Path:
    """Shards of Python's own documentation."""
    text = folder / "docs.jsonl"
    python_docs.write(text)
    source = sources.resolve(str(text))
    prepare.tokenize(source, folder / "shards", Options(val_fraction=0.2), Processes(1))
    return folder / "shards"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restarts", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        data = make_data(folder)
        straight = undisturbed(folder, data, given.steps)
        more = (given.steps, given.kills, given.seed, given.restarts)
        tally = torment(folder / "run", straight, data, *more)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"kills: {dict(tally.kills)} in {tally.num_starts} starts of {given.steps} steps")
    print(f"of them inside a checkpoint's writing: {tally.while_writing}")
    print(f"longest time from a kill to the end of its start: {tally.longest_seconds:.0f} s")
    print(f"the same losses as an undisturbed run, every step: {tally.same_losses}")
    print(f"the same weights, every bit: {tally.same_weights}")
    if not (tally.same_losses and tally.same_weights):
        sys.exit(1)


if __name__ == "__main__":
    main()
