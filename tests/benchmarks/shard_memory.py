"""One card of a group: peak memory against the estimate, tokens/s, and what its collectives move.

    python -m tests.benchmarks.shard_memory [--data DIR] [--steps 4] [--against CHECKOUT]
    python -m tests.benchmarks.shard_memory --rows tiny:2:1 --steps 2    on a CPU

A row is CONFIG:RANKS, and :N for a micro-batch of N windows. Each is forge-train's own step as rank
0 in a process that may take 23.0 GiB of the GPU. The other ranks are stood in for by torch's fake
process group: their share of a sum is missing, their share of the weights stays as it began, and
their time costs nothing. Bytes are what a rank sends, in a ring: (ranks - 1) / ranks of the arrays
of reduce-scatter and all-gather, and twice that of all-reduce. With --against rows of one rank are
measured with another checkout, too. Without --data the tokens are random.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent.parent
ROWS = "gpt2_xl:2,gpt2_xl:2:8,forge_350m:2,forge_350m:1,forge_124m:1"
FOLDER = click.Path(path_type=Path, resolve_path=True, exists=True, file_okay=False)


def stand_in(world_size: int, sent: Counter[str]) -> None:
    """A group of which this process is rank 0, and the bytes that it would send, by collective."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from trainer import shares

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    share = (world_size - 1) / world_size

    def reduce_scatter(output: torch.Tensor, whole: torch.Tensor) -> None:
        sent["reduce-scatter"] += int(share * whole.nbytes)

    def all_gather(whole: torch.Tensor, own: torch.Tensor) -> None:
        sent["all-gather"] += int(share * whole.nbytes)

    shares.reduce_scatter, shares.all_gather = reduce_scatter, all_gather  # type: ignore[assignment]
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments: Any) -> None:
        sent["all-reduce"] += int(2 * share * tensor.nbytes)
        all_reduce(tensor, *arguments)

    dist.all_reduce = counted  # type: ignore[assignment]


def measure(row: str, data: Path, gib: float, steps: int, settings: list[str]) -> dict[str, Any]:
    """In this process; with the packages that PYTHONPATH names first."""
    from trainer import backends, config_file
    from trainer.ranks import Ranks
    from trainer.run import Command
    from trainer.start import new_state, prepare
    from trainer.step import Votes, train_step
    from trainer.windows import open_data

    name, world_size, *size = row.split(":")
    settings += [f"batch.micro_batch_size={n}" for n in size]
    config = config_file.load(name, tuple(settings))
    ranks, sent = Ranks(0, 0, int(world_size)), Counter[str]()
    device, opened = ranks.device(), open_data(config, data)
    on_gpu = device.type == "cuda"
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
    if ranks.world_size > 1:
        stand_in(ranks.world_size, sent)
    torch.set_float32_matmul_precision("high")
    command = Command(config, name, data, Path("unused"))
    with backends.attention_backends(device) if on_gpu else nullcontext():
        state = new_state(command, opened, device)
        setup = prepare(command, opened, device, state, ranks)
        seconds, losses = [], []
        with setup.batches:
            for _ in range(steps):
                sent.clear()
                began = time.perf_counter()
                losses.append(train_step(setup, 1e-4, Votes())[0].item())  # waits for the step
                seconds.append(time.perf_counter() - began)
    took = statistics.median(seconds[1:])  # the first one compiles
    cut = setup.cut
    return {
        "cut": f"{cut.micro_batch_size} x {cut.accumulation_steps}",
        "recomputes": getattr(cut, "recomputes", False),
        "estimated": cut.estimated_bytes / 2**30,
        "peak": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
        "reserved": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else 0.0,
        "first_seconds": seconds[0],
        "tokens_per_second": config.batch.tokens_per_step / ranks.world_size / took,
        "losses": losses,
        "sent": dict(sent),
    }


def in_process(arguments: list[str], tree: Path) -> dict[str, Any] | str:
    """What a row measured in a process of its own, or the last line of its error."""
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            str(Path(__file__)),
            *arguments,
        ],  # not the folder: it has a tokenize.py
        cwd=tree,
        env=os.environ
        | {"PYTHONPATH": str(tree), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@click.command()
@click.option("--data", type=FOLDER, help="Shards; random tokens without it.")
@click.option("--rows", default=ROWS, show_default=True)
@click.option("--gib", default=23.0, show_default=True)
@click.option("--steps", type=click.IntRange(2), default=4, show_default=True)
@click.option("--against", type=FOLDER, help="A folder with another version of this project.")
@click.option("--set", "settings", multiple=True)
@click.option("--row", hidden=True)
def main(
    data: Path | None,
    rows: str,
    gib: float,
    steps: int,
    against: Path | None,
    settings: tuple[str, ...],
    row: str | None,
) -> None:
    if row and data:
        click.echo(json.dumps(measure(row, data, gib, steps, list(settings))))
        return
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    click.echo(f"{where}, at most {gib} GiB; torch {torch.__version__}; {steps} steps")
    click.echo(
        f"{'row':16}{'windows':>10}{'estimated':>11}{'peak':>8}{'reserved':>10} GiB{'ratio':>7}"
        f"{'tokens/s':>10}{'1st step':>10}{'sent a step':>13}"
    )
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            from tests.benchmarks.train_speed import random_shards

            data = random_shards(Path(folder) / "random")
        for each in rows.split(","):
            options = [f"--data={data}", f"--row={each}", f"--gib={gib}", f"--steps={steps}"]
            options += [f"--set={setting}" for setting in settings]
            with_other = against is not None and each.split(":")[1] == "1"
            for tree, label in [(against, " (other)")] * with_other + [(ROOT, "")]:
                show(each + label, in_process(options, tree or ROOT))


def show(label: str, found: dict[str, Any] | str) -> None:
    if isinstance(found, str):
        click.echo(f"{label:16}{found}")
        return
    cut = found["cut"] + " again" * found["recomputes"]
    ratio = f"{found['estimated'] / found['peak']:.3f}" if found["peak"] else "-"
    click.echo(
        f"{label:16}{cut:>10}{found['estimated']:>11.2f}{found['peak']:>8.2f}"
        f"{found['reserved']:>10.2f}    {ratio:>7}{found['tokens_per_second']:>10,.0f}"
        f"{found['first_seconds']:>8.1f} s{sum(found['sent'].values()) / 1e9:>10.3f} GB"
    )
    losses = " ".join(f"{loss:.4f}" for loss in found["losses"])
    by_kind = ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in found["sent"].items())
    click.echo(f"{'':16}losses {losses}{f'; GB: {by_kind}' if by_kind else ''}")


if __name__ == "__main__":
    main()
