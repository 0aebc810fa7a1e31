"""Does training in bfloat16 with float32 masters learn what plain mixed precision learns?

    python -m tests.benchmarks.same_learning --data DIR [--config gpt2] [--arms forge,muon,plain]

"forge" is forge-train, "muon" the same with Muon; "plain" computes with float32 weights under
autocast, with F.cross_entropy, clip_grad_norm_ and fused AdamW. Same seed, same first weights, same
windows, same schedule; the validation losses are taken over the same tokens.
"""

import json
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

from trainer import config_file, memory
from trainer.config import Config
from trainer.evaluate import VALIDATION_SEED
from trainer.model import build_model
from trainer.ranks import Ranks
from trainer.report import read_metrics
from trainer.schedule import first_plan, learning_rate
from trainer.windows import Data, MicroBatches, open_data, to_device, windows_at

ARMS = {
    "forge": (),
    "muon": ("optimizer.name=muon", "optimizer.peak_lr=2.4e-3"),
}
ROOT = Path(__file__).parent.parent.parent


def plain(config: Config, data: Data, micro_batch: int) -> dict[int, float]:
    """Validation losses by step."""
    device = Ranks().device()
    torch.set_float32_matmul_precision("high")
    model = build_model(config.model)
    model.init_weights(config.seed)
    model.to(device)
    options = config.optimizer
    groups = [
        {
            "params": [p for p in model.parameters() if p.ndim >= 2],
            "weight_decay": options.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=options.betas, eps=1e-8, fused=True)

    @torch.compile(disable=device.type != "cuda")
    def mean_loss(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model.logits(model.hidden(tokens))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def validation_loss() -> float:
        count = config.evaluate.num_tokens // config.model.context_length
        chosen = windows_at(np.arange(count), data.val.num_windows, VALIDATION_SEED)
        losses = []
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            for first in range(0, count, micro_batch):  # the config makes it a divisor
                batch = data.val.read(chosen[first : first + micro_batch])
                losses.append(mean_loss(*to_device(batch, device)).double())
        return torch.stack(losses).mean().item()

    found = {0: validation_loss()}
    count, plan = config.windows_per_step(), first_plan(config)
    with MicroBatches(data.train, config, 0, micro_batch, Ranks(), device) as batches:
        for step in range(1, (config.num_steps() or 0) + 1):
            for tokens, targets in batches.of_step():
                with torch.autocast(device.type, torch.bfloat16):
                    loss = mean_loss(tokens, targets)
                (loss * micro_batch / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_norm)
            for group in adamw.param_groups:
                group["lr"] = learning_rate(config, plan, step)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            if step % config.evaluate.every_steps == 0:
                found[step] = validation_loss()
    return found


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--config", "name", default="gpt2", show_default=True)
@click.option("--steps", default=2000, show_default=True)
@click.option("--arms", default="forge,plain", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="A file for the losses, as JSON.")
@click.option("--set", "settings", multiple=True)
def main(
    data: Path, name: str, steps: int, arms: str, out: Path | None, settings: tuple[str, ...]
) -> None:
    more = (
        "batch.tokens_per_step=16384",
        f"schedule.max_steps={steps}",
        f"schedule.warmup_steps={steps // 10}",
        "evaluate.num_tokens=262144",
        f"evaluate.every_steps={steps // 10}",
        "evaluate.sample_tokens=0",
        "checkpoint.every_steps=1000000",
        "batch.micro_batch_size=16",
        *settings,
    )
    config = config_file.load(name, more)
    found: dict[str, dict[int, float]] = {}
    for arm in arms.split(","):
        started = time.perf_counter()
        if arm == "plain":
            micro_batch = memory.cut_here(config, Ranks(), Ranks().device()).micro_batch_size
            found[arm] = plain(config, open_data(config, data), micro_batch)
            took = f"{time.perf_counter() - started:.0f} s with compilation"
        else:
            found[arm], seconds, hardware = forge_train(name, data, (*more, *ARMS[arm]))
            took = f"{seconds:.0f} s of training on {hardware}"
        # On a line of its own, as soon as it is known: what comes after may be cut off.
        losses = " ".join(f"{step}:{loss:.4f}" for step, loss in found[arm].items())
        click.echo(f"{arm}: {took}, torch {torch.__version__}: {losses}")
        if out:
            out.write_text(json.dumps(found))
    first, *others = found
    click.echo(f"{name}\n{'step':>6}{first:>10}" + "".join(f"{arm:>10}{'':9}" for arm in others))
    for step, loss in found[first].items():
        compared = (
            f"{found[arm][step]:>10.4f}{found[arm][step] / loss - 1:>+9.2%}" for arm in others
        )
        click.echo(f"{step:>6}{loss:>10.4f}" + "".join(compared))


def forge_train(
    name: str, data: Path, settings: tuple[str, ...]
) -> tuple[dict[int, float], float, str]:
    """(validation losses by step, seconds from the first step to the last, hardware)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainer.cli", name, "--data", str(data)]
        command += ["--out", f"{folder}/run", *(f"--set={setting}" for setting in settings)]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        rows = read_metrics(Path(folder, "run"))
    steps = [row["seconds"] for row in rows if row["kind"] == "step"]
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "evaluate"}
    return losses, steps[-1] - steps[0], rows[0]["hardware"]


if __name__ == "__main__":
    main()
