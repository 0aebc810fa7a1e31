"""How fast one GPU trains: forge-train against nanoGPT's recipe, in one run.

    python -m tests.benchmarks.train_speed [--data DIR] [--configs gpt2,gpt2_medium]
    ... --configs forge_124m --arms forge --against CHECKOUT    this version beside another, in turn

"forge" is forge-train itself with all that it does (real windows, evaluation, metrics); "plain" is
the recipe that most trainers use: autocast over float32 weights, fused AdamW, F.cross_entropy over
a vocabulary padded to 50304, torch.compile, the same windows. Without --data the tokens are random.
Other arms: "bf16" and "int8", forge-train in that precision; "forge unfused" (without
trainer/fused.py), and a second "forge" to see what the compile cache saves.

The times of the first step, from the start of the process, are those of a run of a single step,
which comes before: in a longer one a step's figures are read only when the next one is queued. With
--against each version has a compile cache of its own, empty at first.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import foreign
from trainer import config_file
from trainer.model import build_model
from trainer.ranks import Ranks
from trainer.report import product_flops, read_metrics
from trainer.windows import MicroBatches, open_data

PRECISIONS = {"bf16": "bfloat16", "int8": "int8"}
ROOT = Path(__file__).parent.parent.parent
MICRO_BATCHES = {  # fast on a large card
    "gpt2": 96,
    "gpt2_medium": 40,
    "gpt2_large": 24,
    "forge_124m": 96,
    "forge_350m": 40,
}
FOLDER = click.Path(path_type=Path, resolve_path=True)
CHECKOUT = click.Path(path_type=Path, resolve_path=True, exists=True, file_okay=False)
NO_BIAS = "--set=model.bias=false"
UNFUSED = "from trainer import cli, fused; fused.available = lambda *_: False; cli.main()"


def random_shards(folder: Path) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in (("train", 20_000_000), ("val", 300_000)):
        generator.integers(0, 50257, count, dtype=np.uint16).tofile(folder / f"{name}.bin")
    foreign.MIN_ALIKE = 0.0  # random tokens are no text
    foreign.index_folder(folder, raw=True)
    return folder


class Measured(NamedTuple):
    speed: float  # tokens/s
    peak: float  # GiB
    begin: float  # seconds from the start of the process to the first step
    end: float  # and to its end


def python_path(tree: Path) -> dict[str, str]:
    """The environment that lets Python find the packages of `tree` first."""
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{tree}{os.pathsep}{before}" if before else str(tree)}


def train(
    command: list[str], steps: int, tree: Path, more: dict[str, str]
) -> tuple[list[dict], float]:
    """Rows of metrics.jsonl of forge-train, and the seconds until its first evaluation ended."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, f"--out={folder}/run", f"--set=schedule.max_steps={steps}"],
            cwd=tree,
            env=os.environ | python_path(tree) | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        begin, output = 0.0, []
        for line in process.stdout or ():
            output.append(line)
            if "validation loss" in line and not begin:  # the model's as it starts
                begin = time.perf_counter() - started
        if process.wait():
            raise click.ClickException("".join(output[-40:]))
        return read_metrics(Path(folder, "run")), begin


def forge(
    config: str,
    data: Path,
    micro_batch: str,
    steps: int,
    arm: str,
    settings: list[str],
    tree: Path = ROOT,
    more: dict[str, str] = {},  # noqa: B006
) -> Measured:
    """Of forge-train as it is in `tree`, with `more` in its environment."""
    program = ["-c", UNFUSED] if "unfused" in arm else ["-m", "trainer.cli"]
    options = [
        f"--set=batch.micro_batch_size={micro_batch}",
        "--set=evaluate.num_tokens=262144",
        "--set=evaluate.sample_tokens=0",
        "--set=checkpoint.every_steps=100000",
    ]
    options += [NO_BIAS] if "without" in arm else []
    options += [f"--set=precision={PRECISIONS[arm]}"] if arm in PRECISIONS else []
    options += [f"--set={setting}" for setting in settings]
    command = [sys.executable, *program, config, f"--data={data}", *options]
    rows, begin = train(command, 1, tree, more)
    (only,) = (row for row in rows if row["kind"] == "step")
    end = begin + only["tokens"] / only["tokens_per_second"]
    rows, _ = train(command, steps, tree, more)
    speeds = [row["tokens_per_second"] for row in rows if row["kind"] == "step"]
    peak = max(row["peak_memory_bytes"] or 0 for row in rows if row["kind"] == "evaluate")
    return Measured(statistics.median(speeds[3:]), peak / 2**30, begin, end)


def plain(config: str, data: Path, micro_batch: int, steps: int) -> Measured:
    """Of the plain recipe, in this process."""
    started = time.perf_counter()
    chosen = config_file.load(config, ("evaluate.num_tokens=65536",))
    windows = open_data(chosen, data).train
    torch.set_float32_matmul_precision("high")
    model = build_model(dataclasses.replace(chosen.model, vocab_size=50304))
    model.init_weights(0)
    model.cuda()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)

    @torch.compile
    def mean_loss(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model.logits(model.hidden(tokens))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    times = []
    device = torch.device("cuda", 0)
    with MicroBatches(windows, chosen, 0, micro_batch, Ranks(), device) as batches:
        begin = time.perf_counter() - started
        for _ in range(steps):
            for tokens, targets in batches.of_step():
                with torch.autocast("cuda", torch.bfloat16):
                    loss = mean_loss(tokens, targets)
                (loss / batches.accumulation_steps).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter())
    seconds = np.diff(times)[2:]
    speed = chosen.batch.tokens_per_step / statistics.median(seconds)
    return Measured(speed, torch.cuda.max_memory_allocated() / 2**30, begin, times[0] - started)


def beside_plain(
    name: str, data: Path, micro_batch: str, steps: int, arms: list[str], settings: list[str]
) -> None:
    """Print a row for each arm; the first is what the others compare with."""
    flops, first = config_file.load(name).model.flops_per_token(), 0.0
    for arm in arms:
        if arm == "plain":  # in a process of its own, so that its memory is free again
            command = [sys.executable, "-m", "tests.benchmarks.train_speed", f"--data={data}"]
            command += [f"--plain-arm={name}", f"--micro-batches={micro_batch}", f"--steps={steps}"]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
            found = Measured(*json.loads(done.stdout))
        else:
            found = forge(name, data, micro_batch, steps, arm, settings)
        first = first or found.speed
        share = found.speed * flops / product_flops(torch.device("cuda"))
        show(name, arm, micro_batch, found, first, f"{share:>11.1%}")


def beside_other(
    name: str,
    data: Path,
    micro_batch: str,
    steps: int,
    arm: str,
    settings: list[str],
    other: Path,
    rounds: int,
) -> None:
    """Print a row for each run of the other version and of this one, in turn, and their ratios."""
    theirs: list[Measured] = []
    ours: list[Measured] = []
    with tempfile.TemporaryDirectory() as caches:
        for _ in range(rounds):
            for found, tree, label in ((theirs, other, "against"), (ours, ROOT, "this")):
                more = {
                    "TORCHINDUCTOR_CACHE_DIR": f"{caches}/{label}/inductor",
                    "TRITON_CACHE_DIR": f"{caches}/{label}/triton",
                }
                found.append(forge(name, data, micro_batch, steps, arm, settings, tree, more))
                show(name, f"{arm}, {label}", micro_batch, found[-1], theirs[0].speed)
    speeds = [statistics.mean(each.speed for each in runs) for runs in (ours, theirs)]
    peaks = [max(each.peak for each in runs) for runs in (ours, theirs)]
    later = [each.end - before.end for each, before in zip(ours, theirs, strict=True)]
    click.echo(
        f"{name}, {arm}: this / against: tokens/s {speeds[0] / speeds[1]:.4f}, peak "
        f"{peaks[0] / max(peaks[1], 1e-9):.3f}; end of the first step "
        f"{', '.join(f'{seconds:+.1f}' for seconds in later)} s"
    )


def show(
    name: str, arm: str, micro_batch: str, found: Measured, first: float, more: str = ""
) -> None:
    click.echo(
        f"{name:14}{arm:24}{micro_batch:>8}{found.speed:>11,.0f}{found.speed / first:>7.3f}"
        f"{found.peak:>10.2f}{found.begin:>10.1f} to{found.end:>5.1f} s{more}"
    )


@click.command()
@click.option("--data", type=FOLDER, help="Shards; random tokens without it.")
@click.option("--configs", "names", default="gpt2,gpt2_medium", show_default=True)
@click.option("--micro-batches", help="Windows of each config, such as 96,40.")
@click.option("--steps", type=click.IntRange(4), default=12, show_default=True)
@click.option("--arms", default="plain,forge,forge without biases", show_default=True)
@click.option("--against", type=CHECKOUT, help="A folder with another version of this project.")
@click.option("--rounds", default=2, show_default=True, help="Runs of each, with --against.")
@click.option("--set", "settings", multiple=True, help="Of forge-train, in all its arms.")
@click.option("--plain-arm", hidden=True)
def main(
    data: Path | None,
    names: str,
    micro_batches: str | None,
    steps: int,
    arms: str,
    against: Path | None,
    rounds: int,
    settings: tuple[str, ...],
    plain_arm: str | None,
) -> None:
    if plain_arm and data and micro_batches:
        click.echo(json.dumps(plain(plain_arm, data, int(micro_batches), steps)))
        return
    if not torch.cuda.is_available():
        raise click.ClickException("this benchmark needs a GPU")
    configs = names.split(",")
    sizes = [str(MICRO_BATCHES.get(name, "auto")) for name in configs]
    if micro_batches:
        sizes = micro_batches.split(",")
    if len(sizes) != len(configs):
        raise click.BadParameter(f"--micro-batches has {len(sizes)}, --configs {len(configs)}")
    click.echo(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: sustained 8192^3 bfloat16 "
        f"product {product_flops(torch.device('cuda')) / 1e12:.0f} TFLOP/s"
    )
    click.echo(
        f"{'config':14}{'arm':24}{'windows':>8}{'tokens/s':>11}{'ratio':>7}{'peak GiB':>10}"
        f"{'first step':>20}" + f"{'of matmul':>11}" * (against is None)
    )
    with tempfile.TemporaryDirectory() as folder:
        data = data or random_shards(Path(folder) / "random")
        for name, size in zip(configs, sizes, strict=True):
            if against is None:
                beside_plain(name, data, size, steps, arms.split(","), list(settings))
                continue
            for arm in arms.split(","):
                if arm != "plain":
                    beside_other(name, data, size, steps, arm, list(settings), against, rounds)


if __name__ == "__main__":
    main()
