"""How fast one GPU trains: forge-train against nanoGPT's recipe, in one run.

    python -m tests.benchmarks.train_speed [--data DIR] [--configs gpt2,gpt2_medium]

"forge" is forge-train itself with all that it does (real windows, evaluation, metrics); "plain" is
the recipe that most trainers use: autocast over float32 weights, fused AdamW, F.cross_entropy over
a vocabulary padded to 50304, torch.compile, the same windows. Without --data the tokens are random.
Other arms: "forge by block" (compile=block), "forge unfused" (without trainer/fused.py), and a
second "forge" to see what the compile cache saves.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import foreign
from trainer import config as configs
from trainer.metrics import read_metrics
from trainer.model import build_model
from trainer.run import open_data
from trainer.windows import MicroBatches

ROOT = Path(__file__).parent.parent.parent
MICRO_BATCHES = {  # fast on a large card
    "gpt2": 96,
    "gpt2_medium": 40,
    "gpt2_large": 24,
    "forge_124m": 96,
    "forge_350m": 40,
}
NO_BIAS = "--set=model.bias=false"
UNFUSED = "from trainer import cli, fused; fused.available = lambda *_: False; cli.main()"


def random_shards(folder: Path) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in (("train", 20_000_000), ("val", 300_000)):
        generator.integers(0, 50257, count, dtype=np.uint16).tofile(folder / f"{name}.bin")
    foreign.index_folder(folder, raw=True, is_text=False)
    return folder


def sustained_matmul(seconds: float = 1.0) -> float:
    """FLOP/s of 8192^3 bfloat16 products, over a second: the card's limit once it is warm."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = a @ b
    torch.cuda.synchronize()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(20):
            torch.mm(a, b, out=out)
        torch.cuda.synchronize()
        count += 20
    return 2 * size**3 * count / (time.perf_counter() - started)


def forge(
    config: str,
    data: Path,
    micro_batch: int,
    steps: int,
    settings: tuple[str, ...],
    fuses: bool,
) -> tuple[float, float, float, float]:
    """(tokens/s, peak GiB, seconds to the first step and to its end) of forge-train."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            f"--set=batch.micro_batch_size={micro_batch}",
            f"--set=schedule.max_steps={steps}",
            "--set=evaluate.num_tokens=262144",
            "--set=evaluate.sample_tokens=0",
            "--set=checkpoint.every_steps=100000",
            *settings,
        ]
        program = ["-m", "trainer.cli"] if fuses else ["-c", UNFUSED]
        command = [sys.executable, *program, config, "--data", str(data)]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--out", f"{folder}/run", *options],
            cwd=ROOT,
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
        rows = read_metrics(Path(folder, "run"))
    tokens = configs.load(config).batch.tokens_per_step
    speeds = [row["tokens_per_second"] for row in rows if row["kind"] == "step"]
    peak = max(row["peak_memory_bytes"] for row in rows if row["kind"] == "evaluate")
    return statistics.median(speeds[3:]), peak / 2**30, begin, begin + tokens / speeds[0]


def plain(config: str, data: Path, micro_batch: int, steps: int) -> tuple[float, ...]:
    """The same for the plain recipe."""
    started = time.perf_counter()
    chosen = configs.load(config, ("evaluate.num_tokens=65536",))
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

    count = chosen.windows_per_step()
    accumulation_steps = count // micro_batch
    times = []
    device = torch.device("cuda", 0)
    with MicroBatches(windows, 0, 0, chosen.step_sizes(), micro_batch, 0, 1, device) as batches:
        begin = time.perf_counter() - started
        for _ in range(steps):
            for _ in range(accumulation_steps):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = mean_loss(*next(batches))
                (loss / accumulation_steps).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter())
    seconds = np.diff(times)[2:]
    speed = chosen.batch.tokens_per_step / statistics.median(seconds)
    return speed, torch.cuda.max_memory_allocated() / 2**30, begin, times[0] - started


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Shards; random tokens without it.")
@click.option("--configs", "names", default="gpt2,gpt2_medium", show_default=True)
@click.option("--steps", default=12, show_default=True)
@click.option("--arms", default="plain,forge,forge without biases", show_default=True)
@click.option("--plain-arm", hidden=True)
def main(data: Path | None, names: str, steps: int, arms: str, plain_arm: str | None) -> None:
    if plain_arm and data:
        click.echo(json.dumps(plain(plain_arm, data, MICRO_BATCHES[plain_arm], steps)))
        return
    if not torch.cuda.is_available():
        raise click.ClickException("this benchmark needs a GPU")
    click.echo(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: sustained 8192^3 bfloat16 "
        f"product {sustained_matmul() / 1e12:.0f} TFLOP/s"
    )
    click.echo(
        f"{'config':14}{'arm':24}{'windows':>8}{'tokens/s':>11}{'ratio':>7}{'peak GiB':>10}"
        f"{'first step':>20}{'of matmul':>11}"
    )
    with tempfile.TemporaryDirectory() as folder:
        data = data or random_shards(Path(folder) / "random")
        for name in names.split(","):
            model, micro_batch = configs.load(name).model, MICRO_BATCHES[name]
            against: float | None = None
            for arm in arms.split(","):
                if arm == "plain":  # in a process of its own, so that its memory is free again
                    command = [sys.executable, "-m", "tests.benchmarks.train_speed"]
                    command += ["--data", str(data), "--plain-arm", name, "--steps", str(steps)]
                    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
                    speed, peak, begin, end = json.loads(done.stdout)
                else:
                    settings = (NO_BIAS,) if "without" in arm else ()
                    settings += ("--set=compile=block",) if "block" in arm else ()
                    speed, peak, begin, end = forge(
                        name, data, micro_batch, steps, settings, fuses="unfused" not in arm
                    )
                against = against or speed
                share = speed * model.flops_per_token() / sustained_matmul()
                click.echo(
                    f"{name:14}{arm:24}{micro_batch:>8}{speed:>11,.0f}{speed / against:>7.3f}"
                    f"{peak:>10.1f}{begin:>10.1f} to{end:>5.1f} s{share:>11.1%}"
                )


if __name__ == "__main__":
    main()
