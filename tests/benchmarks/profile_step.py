"""Where a training step's GPU time goes: kinds of kernels, idle time, exposed communication.

    python -m tests.benchmarks.profile_step gpt2 --data DIR [--set KEY=VALUE]...
    torchrun --standalone --nproc_per_node=2 -m tests.benchmarks.profile_step gpt2 --data DIR

It runs forge-train's own step under torch.profiler and prints milliseconds a step (rank 0). With
Muon it also times the update of the rank's share alone.
"""

import statistics
from pathlib import Path

import click
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from trainer import backends, config_file
from trainer.optimizer import Optimizer
from trainer.ranks import Ranks, process_group
from trainer.run import Command
from trainer.start import new_state, prepare
from trainer.step import Votes, train_step
from trainer.windows import open_data

KINDS = {
    "communication": ("nccl",),
    "attention": ("flash", "fmha", "sdpa", "cudnn_generated"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
    "optimizer": ("adam", "multi_tensor", "accumulate"),
    "cross-entropy": ("softmax_gradient",),
    "fused.py": ("_and_sum", "add_and_norm", "gate", "rotate_heads"),
    "copies": ("memcpy", "memset"),
}
Intervals = list[tuple[float, float]]


def union(intervals: Intervals) -> Intervals:
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Intervals) -> float:
    return sum(end - start for start, end in union(intervals))


def muon_milliseconds(optimizer: Optimizer) -> float:
    """Of Muon's part of an update."""
    part = optimizer.parts["muon"]
    divisor, times = torch.ones((), device=optimizer.device), []
    for _ in range(8):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        # At a rate of 0 the weights stay.
        optimizer.muon(part.own(part.gradients), 0.0, divisor, divisor > 0)
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times[2:])


@click.command()
@click.argument("config")
@click.option("--data", required=True, type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True)
@click.option("--steps", default=3, show_default=True)
@click.option("--kernels", default=0, help="Also print the N kernels that take longest.")
def main(config: str, data: Path, settings: tuple[str, ...], steps: int, kernels: int) -> None:
    chosen = config_file.load(config, ("evaluate.num_tokens=65536", *settings))
    command = Command(chosen, config, data, Path("unused"))
    ranks = Ranks.from_environment()
    device = ranks.device()
    opened = open_data(chosen, data)
    torch.set_float32_matmul_precision("high")
    with (
        process_group(ranks, device, chosen.guard.timeout_seconds),
        backends.attention_backends(device),
    ):
        state = new_state(command, opened, device)
        setup = prepare(command, opened, device, state, ranks)
        cut = setup.cut
        with setup.batches:
            for _ in range(3):
                train_step(setup, 1e-4, Votes())
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for _ in range(steps):
                    train_step(setup, 1e-4, Votes())
                torch.cuda.synchronize()
        by_muon = chosen.optimizer.name == "muon"
        muon = muon_milliseconds(setup.optimizer) if by_muon else 0.0
    if not ranks.is_first:
        return
    by_kind: dict[str, Intervals] = {}
    by_name: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            name = event.name.lower()
            kind = next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "other")
            by_name.setdefault(event.name, []).append(event.time_range.elapsed_us())
            by_kind.setdefault(kind, []).append((event.time_range.start, event.time_range.end))
    everything = [interval for intervals in by_kind.values() for interval in intervals]
    total = max(end for _, end in everything) - min(start for start, _ in everything)
    compute = [
        i for kind, intervals in by_kind.items() if kind != "communication" for i in intervals
    ]
    click.echo(f"{config}, micro-batch {cut.micro_batch_size} x {cut.accumulation_steps}:")
    for kind, intervals in sorted(by_kind.items(), key=lambda item: -length(item[1])):
        click.echo(f"  {kind:24}{length(intervals) / steps / 1e3:>10.2f} ms a step")
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    for name, times in longest[:kernels]:
        click.echo(
            f"    {sum(times) / steps / 1e3:>9.2f} ms in {len(times) / steps:>6.0f}  {name[:110]}"
        )
    exposed = length(everything) - length(compute)
    click.echo(f"  {'exposed communication':24}{exposed / steps / 1e3:>10.2f} ms a step")
    click.echo(f"  {'idle':24}{(total - length(everything)) / steps / 1e3:>10.2f} ms a step")
    click.echo(f"  {'a step':24}{total / steps / 1e3:>10.2f} ms")
    if muon:
        click.echo(f"  {'Muon':24}{muon:>10.2f} ms")
    peak = torch.cuda.max_memory_allocated() / 2**30
    click.echo(f"  peak {peak:.2f} GiB, estimated {cut.estimated_bytes / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
