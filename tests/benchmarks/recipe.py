"""What a training recipe is worth: arms that train for the same time on the same card and data.

    python -m tests.benchmarks.recipe --data DIR --out OUT [--arms gpt2-adamw,forge] [--seconds 300]
    ... --arm "wide=gpt2,model.num_heads=6" --arms gpt2-adamw,wide     any config, any settings
    ... --lr-search 3e-4,6e-4,1.2e-3,2.4e-3 [--search-seconds 30]     of the baseline
    ... --arms gpt2-adamw --target forge --shares 0.25,0.35     planned for parts of --seconds
    python -m tests.benchmarks.recipe --report --results a.jsonl --results b.jsonl

An arm's speed is calibrated once, in a short run that is thrown away; as many steps as fit into its
seconds at that speed are its plan, and its schedule ends there. Only training steps count as time:
curves.py says how that is taken. ARM@3e-4 is ARM with that optimizer.peak_lr, ARM@muon_lr=0.01 with
that optimizer.muon_lr, ARM@3e-4@muon_lr=0.01 with both, and so on. The validation tokens are the
same for all arms of one context_length.

Each finished run is a line of OUT/results.jsonl. The same command again leaves out those runs, and
those in --results; one that was cut off is begun anew.
"""

import json
import math
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from pipeline import files, shards
from pipeline.errors import ForgeError
from tests.benchmarks import curves
from tests.benchmarks.curves import Row, Run
from trainer import config_file
from trainer.ranks import Ranks
from trainer.report import duration, hardware, read_metrics

ROOT = Path(__file__).parents[2]
MINUTES = "optimizer.muon_weight_decay=0.1"  # for 65,536 tokens a step, some 2,000 times
MUON = ("optimizer.name=muon", "optimizer.peak_lr=2.4e-3", MINUTES)
TO_ZERO = ("schedule.shape=wsd", "schedule.decay_fraction=0.5")
# What was best over two minutes, for plans that shall end early.
SHORT = ("schedule.shape=wsd", "schedule.decay_fraction=0.8")
MUON_SHORT = ("optimizer.name=muon", "optimizer.muon_lr=0.03", MINUTES)
GPT2_EMBEDDING = ("optimizer.weight_decay=0.25", "optimizer.peak_lr=4.8e-3")
FORGE_EMBEDDING = ("optimizer.weight_decay=0.1", "optimizer.peak_lr=9.6e-3")
ARMS = {  # config, settings
    "gpt2-adamw": ("gpt2",),  # cosine to a tenth
    "gpt2-adamw-wsd": ("gpt2", *TO_ZERO),
    "gpt2-muon": ("gpt2", *MUON, *TO_ZERO),
    "gpt2-muon-short": ("gpt2", *MUON_SHORT, *GPT2_EMBEDDING, *SHORT),
    "forge": ("forge_124m", MINUTES),
    "forge-short": ("forge_124m", MINUTES, *FORGE_EMBEDDING, *SHORT),
    "gpt2_medium-adamw": ("gpt2_medium",),
    "gpt2_medium-adamw-wsd": ("gpt2_medium", *TO_ZERO),
    "gpt2_medium-muon": ("gpt2_medium", *MUON, *TO_ZERO),
    "forge-350m": ("forge_350m", MINUTES),
}
MICRO_BATCH = 64  # windows, on a GPU
WARMUP_FRACTION, MOST_WARMUP_STEPS = 0.1, 300  # an arm may set its own
# What changes no speed; the rest of an arm's settings has a calibration of its own.
SPEEDLESS = re.compile(r"(optimizer\.\w*(lr|decay)|schedule\.(shape|\w+_fraction|warmup_steps))=")
OVERHEAD_SECONDS = 90.0  # of a run: start, compilation, evaluations
SAY_SECONDS = 20.0


@dataclass(frozen=True)
class Arm:
    name: str
    config: str
    settings: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """The config file as it is now: an edit makes another arm of it."""
        is_path = self.config.endswith(".toml")
        path = Path(self.config) if is_path else ROOT / "configs" / f"{self.config}.toml"
        return tomllib.loads(path.read_text())


def parse_arm(text: str) -> tuple[str, tuple[str, ...]]:
    """NAME=CONFIG,key=value,...: a comma inside a value, as in [0.9,0.95], divides nothing."""
    name, _, rest = text.partition("=")
    if not (name and rest) or "@" in name:
        raise click.BadParameter(f"NAME=CONFIG,key=value,... is wanted, not {text}")
    return name, tuple(re.split(r",(?=[\w.]+=)", rest))


def find_arm(name: str, table: dict[str, tuple[str, ...]]) -> Arm:
    base, *changes = name.split("@")
    if base not in table:
        raise click.BadParameter(f"no such arm: {base}; there are {', '.join(table)}, or --arm")
    config, *settings = table[base]
    for change in changes:
        key, _, value = change.rpartition("=")
        settings.append(f"optimizer.{key or 'peak_lr'}={value}")
    return Arm(name, config, tuple(settings))


class FailedError(Exception):
    """A run that did not get to its end; the others go on."""


class Bench:
    """Trains arms, and keeps what they gave in OUT/results.jsonl."""

    def __init__(
        self, data: Path, results: list[Path], common: tuple[str, ...], evaluations: int
    ) -> None:
        """`results` are read; the first of them is written, too."""
        self.data, self.results, self.common = data, results, common
        self.evaluations = evaluations
        self.index = shards.load_index(data)
        self.hardware = hardware(Ranks().device(), 1)
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def say(self, text: str) -> None:
        click.echo(f"[{duration(self.elapsed)}] {text}")

    def known(self) -> list[dict[str, Any]]:
        return [line for path in self.results for line in curves.read_lines(path)]

    def keep(self, line: dict[str, Any]) -> None:
        """Add a line, or leave the file as it is: a cut writes no half of one."""
        path = self.results[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
        files.write_whole(path, before + json.dumps(line).encode() + b"\n")

    def settings(self, arm: Arm) -> list[str]:
        """All but the seed and what follows from the number of steps. ForgeError if it is wrong."""
        given = [*self.common, *arm.settings]
        config = config_file.load(arm.config, (*given, "schedule.max_steps=1"))
        windows = config.windows_per_step()
        if torch.cuda.is_available() and "batch.micro_batch_size" not in " ".join(given):
            given.append(f"batch.micro_batch_size={math.gcd(windows, MICRO_BATCH)}")
        return given

    def wanted(self, arm: Arm, seconds: float, seed: int) -> Run:
        """What makes a run that run, and no other."""
        return {
            "arm": arm.name,
            "planned_seconds": seconds,
            "seed": seed,
            "settings": self.settings(arm),  # checks that there is such a config, too
            "config": arm.values(),
            "data": self.index.sha256[:16],
        }

    def is_done(self, wanted: Run) -> bool:
        """Whether it was measured before. One name never stands for two things."""
        same_name = [line for line in self.known() if line.get("arm") == wanted["arm"]]
        for run in same_name:
            curves.check_same(run, wanted)
        return any(all(run[key] == wanted[key] for key in wanted) for run in same_name)

    def train(self, arm: Arm, steps: int, evaluations: int, seed: int) -> list[Row]:
        """The rows of metrics.jsonl of one forge-train that ends after `steps`."""
        settings = [
            f"schedule.max_steps={steps}",
            f"schedule.warmup_steps={min(MOST_WARMUP_STEPS, int(steps * WARMUP_FRACTION))}",
            f"evaluate.every_steps={math.ceil(steps / evaluations)}",
            "evaluate.sample_tokens=0",
            "checkpoint.every_steps=1000000",
            *self.settings(arm),
            f"seed={seed}",
        ]
        with tempfile.TemporaryDirectory(prefix="recipe-") as folder:
            command = [sys.executable, "-m", "trainer.cli", arm.config, "--data", str(self.data)]
            command += ["--out", f"{folder}/run", *(f"--set={setting}" for setting in settings)]
            # A pipe, so that forge-train cannot print, and ends, when this process is killed.
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            tail: deque[str] = deque(maxlen=20)
            said_at = time.monotonic()
            try:
                for line in process.stdout or ():
                    tail.append(line)
                    if line.startswith("step ") and time.monotonic() - said_at > SAY_SECONDS:
                        said_at = time.monotonic()
                        self.say(f"{arm.name} seed {seed}: {line.strip()}")
                code = process.wait()
            finally:
                process.kill()
                process.wait()
            if code:
                raise FailedError(f"exit code {code}\n{''.join(tail)}")
            rows = read_metrics(Path(folder, "run"))
        if max(row["step"] for row in rows) != steps:
            raise FailedError(f"it was stopped before step {steps}")
        return rows

    def speed(self, arm: Arm, steps: int) -> float:
        """Tokens/s, calibrated in a run of `steps`, unless known."""
        own = [setting for setting in self.settings(arm) if not SPEEDLESS.match(setting)]
        key = {"calibration": arm.values(), "settings": own, "hardware": self.hardware}
        for line in self.known():
            if all(line.get(name) == value for name, value in key.items()):
                return float(line["tokens_per_second"])
        rows = [row for row in self.train(arm, steps, 1, 0) if row["kind"] == "step"]
        speed = statistics.median(row["tokens_per_second"] for row in rows[len(rows) // 2 :])
        self.keep(key | {"tokens_per_second": speed})
        self.say(f"{arm.name}: {speed:,.0f} tokens/s in {steps} steps of calibration")
        return speed

    def measure(self, arm: Arm, seconds: float, seed: int, calibration_steps: int) -> None:
        """One run, from its plan to its line."""
        speed = self.speed(arm, calibration_steps)
        run = self.wanted(arm, seconds, seed)
        config = config_file.load(arm.config, (*run["settings"], "schedule.max_steps=1000000000"))
        tokens = max(1, round(seconds * speed - config.batch.tokens_per_step / 2))
        ends = (*run["settings"], "schedule.max_steps=1000000000", f"schedule.max_tokens={tokens}")
        steps = max(2, config_file.load(arm.config, ends).num_steps() or 0)
        self.say(f"{arm.name} seed {seed}: {steps:,} steps for {seconds:g} s")
        rows = self.train(arm, steps, self.evaluations, seed)
        ended, excluded = curves.training_seconds(rows)
        tokens, took = max(row["tokens"] for row in rows), max(ended.values())
        peaks = [row["peak_memory_bytes"] for row in rows if row["kind"] == "evaluate"]
        run |= {
            "steps": steps,
            "tokens": tokens,
            "epochs": tokens / self.index.total("num_tokens", "train"),
            "seconds": took,
            "excluded_seconds": excluded,
            "tokens_per_second": tokens / took,
            "peak_memory_bytes": max((peak for peak in peaks if peak), default=None),
            "hardware": self.hardware,
            "torch": torch.__version__,
            "curve": curves.curve_of(rows),
        }
        self.keep(run)
        self.say(
            f"{arm.name} seed {seed}: {curves.final(run):.4f} after {took:.1f} s of training; "
            f"{excluded:.1f} s more of compilation and stalls left out"
        )

    def measure_all(
        self, runs: list[tuple[Arm, float, int]], calibration_steps: int, within: float | None
    ) -> int:
        """How many failed. Those that would end later than `within` seconds are not begun."""
        todo = [each for each in runs if not self.is_done(self.wanted(*each))]
        failed = 0
        for number, (arm, seconds, seed) in enumerate(todo):
            if within and self.elapsed + seconds + OVERHEAD_SECONDS > within:
                self.say(
                    f"{len(todo) - number} runs are left: the same command continues with them"
                )
                break
            try:
                self.measure(arm, seconds, seed, calibration_steps)
            except FailedError as error:
                failed += 1
                self.say(f"{arm.name} seed {seed} FAILED: {error}")
        return failed


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


@click.command(epilog=f"Arms: {', '.join(ARMS)}; and those of --arm.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of shards.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/recipe", show_default=True)
@click.option("--arms", default="gpt2-adamw,gpt2-muon,forge", show_default=True)
@click.option("--arm", "own", multiple=True, help="NAME=CONFIG,key=value,...: one more to name.")
@click.option("--baseline", help="To compare with; the first of --arms unless given.")
@click.option("--seconds", default=300.0, show_default=True, help="Of training, in each run.")
@click.option("--seeds", default="1,2", show_default=True)
@click.option("--lr-search", help="Train only the baseline (or --target), at these peak_lr.")
@click.option("--search-seconds", type=float, help="For each of them; --seconds unless given.")
@click.option("--target", help="Arm that shall reach the baseline's final loss sooner.")
@click.option(
    "--shares",
    default="0.25,0.35",
    show_default=True,
    help="Fractions of --seconds to plan --target for.",
)
@click.option("--tokens-per-step", default=65_536, show_default=True)
@click.option("--val-tokens", default=524_288, show_default=True)
@click.option("--evaluations", default=24, show_default=True, help="In each run.")
@click.option("--calibration-steps", default=48, show_default=True)
@click.option(
    "--within", type=float, help="Start no run that would end later than this many seconds."
)
@click.option("--report", "only_report", is_flag=True, help="Train nothing: table and curves.")
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    help="A results.jsonl of before: its runs are not repeated, and are in the report.",
)
@click.option("--curves", "picture", type=click.Path(path_type=Path), help="OUT/curves.svg.")
def main(
    data: Path | None,
    out: Path,
    arms: str,
    own: tuple[str, ...],
    baseline: str | None,
    seconds: float,
    seeds: str,
    lr_search: str | None,
    search_seconds: float | None,
    target: str | None,
    shares: str,
    tokens_per_step: int,
    val_tokens: int,
    evaluations: int,
    calibration_steps: int,
    within: float | None,
    only_report: bool,
    results: tuple[Path, ...],
    picture: Path | None,
) -> None:
    """Train arms for the same time; print the table and draw the curves.

    ARM@3e-4 is ARM with that peak_lr, ARM@weight_decay=0.5 with that optimizer.weight_decay, etc.
    """
    baseline = baseline or arms.split(",")[0]
    plans = [(name, seconds) for name in arms.split(",")]
    if lr_search:
        searched = (target or baseline).partition("@")[0]
        plans = [(f"{searched}@{rate}", search_seconds or seconds) for rate in lr_search.split(",")]
    elif target:
        plans += [(target, share * seconds) for share in numbers(shares)]
    files, failed = [out / "results.jsonl", *results], 0
    if only_report and results:
        files = list(results)
    if not only_report:
        if data is None:
            raise click.UsageError("--data is missing: the folder of shards (or --report)")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and forge-train ends, too
        table = ARMS | dict(map(parse_arm, own))
        runs = [
            (find_arm(name, table), planned, int(seed))
            for seed in seeds.split(",")
            for name, planned in plans
        ]
        common = (
            f"batch.tokens_per_step={tokens_per_step}",
            f"evaluate.num_tokens={val_tokens}",
        )
        try:
            bench = Bench(data, files, common, evaluations)
            there = bench.index.total("num_tokens", "val")
            if there <= val_tokens:
                raise ForgeError(
                    f"{val_tokens:,} validation tokens are asked for, and there are {there:,}",
                    where=data,
                    fix="--val-tokens N (a multiple of the context); or tokenize with a larger "
                    "--val-fraction: 0.012 for 47 M tokens",
                )
            failed = bench.measure_all(runs, calibration_steps, within)
        except ForgeError as error:
            raise click.ClickException(str(error)) from error
    groups = curves.group(files)
    if not groups:
        raise click.ClickException("there is no finished run")
    curves.report(groups, baseline)
    if lr_search and (tried := {plan: groups[plan] for plan in plans if plan in groups}):
        best = min(tried, key=lambda plan: curves.mean([curves.final(r) for r in tried[plan]]))
        click.echo(f"best of {len(tried)} rates at {best[1]:g} s: {best[0]}")
    curves.draw(groups, baseline, picture or out / "curves.svg")
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()
