"""All that happens before the first step: the state, the model, its weights, the run folder."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.errors import ForgeError
from trainer import checkpoint, layouts
from trainer.backends import compile_model, load_libraries
from trainer.check import describe
from trainer.checkpoint import MODEL_FILE, OPTIMIZER_FILE, State, checkpoint_path
from trainer.config import Config
from trainer.memory import cut_here
from trainer.model import build_model
from trainer.optimizer import Optimizer, compute_dtype
from trainer.ranks import Ranks, fill_from_first, from_first
from trainer.report import Metrics, Readme, Report, Row, Terminal, duration, hardware, say
from trainer.run import check_room, fixed_checksum, write_files
from trainer.schedule import Clock, first_plan
from trainer.step import Setup
from trainer.windows import Data, MicroBatches


@dataclass(frozen=True)
class Command:
    """What the user asked for."""

    config: Config
    name: str  # of the config
    data: Path
    run: Path
    resume: bool = False
    weights_from: Path | None = None  # a run, a checkpoint, a folder of transformers


def first_state(
    command: Command, data: Data, device: torch.device, step: int | None, ranks: Ranks
) -> State:
    """Where the run stands: that of the checkpoint at `step`, or before the first step."""
    config, source = command.config, str(command.weights_from or "")

    def resumed() -> State:
        state = checkpoint.load_state(command.run, step or 0)
        if source and source != state.weights_from:
            raise ForgeError(
                f"the run that is resumed began with other weights: "
                f"{state.weights_from or 'random ones'}",
                where=f"--from {source}",
                fix="leave out --from, or name another --out",
            )
        return state

    if step is not None:
        return from_first(ranks, resumed)
    return State(
        config.model,
        str(compute_dtype(config, device)).removeprefix("torch."),
        data.index.tokenizer.get("sha256", ""),
        fixed_checksum(config),
        first_plan(config),
        weights_from=source,
    )


def prepare(
    command: Command, data: Data, device: torch.device, state: State, ranks: Ranks
) -> Setup:
    """The model with random weights, its optimizer and its micro-batches."""
    config = replace(command.config, precision=cast(Any, state.precision))
    cut = cut_here(config, ranks, device)
    model = build_model(config.model)
    with ThreadPoolExecutor() as pool:
        loaded = pool.submit(load_libraries, config.model, device, compute_dtype(config, device))
        if not state.step and command.weights_from is None:
            model.init_weights(config.seed)
        loaded.result()
    optimizer = Optimizer(model.to(device), config, ranks)
    compile_model(model, config, device)
    size = cut.micro_batch_size
    batches = MicroBatches(data.train, config, state.step, size, ranks, device)
    return Setup(config, data, ranks, device, cut, model, optimizer, batches)


def load_weights(setup: Setup, command: Command, step: int | None) -> None:
    """Fill model and optimizer with the checkpoint at `step`, or with the weights of --from."""
    optimizer, files = setup.optimizer, []
    masters = optimizer.views(optimizer.masters)
    if step is not None:
        path, moments = checkpoint_path(command.run, step), optimizer.state()
        files = [(path / MODEL_FILE, masters), (path / OPTIMIZER_FILE, moments)]
    elif command.weights_from is not None:
        fill_from_first(setup.ranks, partial(read_source, command, masters), masters)
    for file, tensors in files:
        fill_from_first(setup.ranks, partial(checkpoint.load_tensors, file, tensors), tensors)
    optimizer.copy_to_model()


def read_source(command: Command, masters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that --from names, for `masters`. ForgeError unless they are of this model."""
    source, wanted = command.weights_from, command.config.model
    assert source is not None
    if found := checkpoint.find(source):
        model = checkpoint.load_state(*found, (MODEL_FILE,)).model
    else:
        model, tensors = layouts.read_folder(source)
    sizes = [each.sizes() for each in (model, wanted)]
    if differing := [f"{k}: {sizes[0][k]} -> {v}" for k, v in sizes[1].items() if sizes[0][k] != v]:
        raise ForgeError(
            f"the weights are of another model: {', '.join(differing)}",
            where=source,
            fix="use a config with the same [model]",
        )
    if found:
        tensors = checkpoint.load_tensors(checkpoint_path(*found) / MODEL_FILE, masters)
    return tensors


def open_report(
    setup: Setup, command: Command, state: State, clock: Clock, step: int | None
) -> Report:
    """Create the run folder, or continue it after `step`. Only rank 0 has watchers."""
    config, run, ranks, cut = setup.config, command.run, setup.ranks, setup.cut
    index, watchers = setup.data.index, list[Callable[[Row], None]]()
    where = hardware(setup.device, ranks.world_size)

    def make() -> None:
        saved = (setup.optimizer.masters, *setup.optimizer.state().values())
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in saved)
        check_room(run, num_bytes, config.checkpoint.keep_last)
        found = ""
        if config.batch.micro_batch_size == "auto":  # and stays so: the next start may find another
            found = (
                f"# On {where}: batch.micro_batch_size was found to be {cut.micro_batch_size}, "
                f"with {cut.accumulation_steps} accumulation steps.\n"
            )
        try:
            metrics = Metrics(run, step)
            write_files(run, command.config, index, found)
        except OSError as error:
            raise ForgeError(
                f"cannot write the run folder: {error.strerror}",
                where=error.filename,
                fix="name another --out, or make it writable",
            ) from error
        readme = Readme(run, command.name, config, index, state)
        watchers.extend((metrics, Terminal(config, state, clock), readme))
        if step is not None:
            say(f"Resuming from step {state.step}, after {duration(state.seconds)} of training.")
        elif state.weights_from:
            say(f"Beginning with the weights of {state.weights_from}.")
        say(describe(config, command.name, index, cut, ranks))
        say(f"Save now: kill -USR1 {os.getpid()}")

    from_first(ranks, make)
    report = Report(watchers, config, clock)
    process = {"process": os.getpid(), "started_at": int(time.time())}
    report(
        "start", state.step, world_size=ranks.world_size, hardware=where, **asdict(cut), **process
    )
    return report


@contextmanager
def clear_errors(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Turns out-of-memory and compiler errors into ForgeErrors."""
    where = f"rank {ranks.rank}, {device}"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ForgeError(
            "out of GPU memory",
            where=f"{where}: {str(error).splitlines()[0][:120]}",
            fix="the same command with --resume --set batch.micro_batch_size=N, N below the "
            "micro-batch that the run said at its start; tokens a step stay the same",
        ) from error
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise ForgeError(
            f"torch.compile failed: {' '.join(str(error).strip().splitlines()[:2])}",
            where=where,
            fix="install a C compiler, such as gcc, if that is missing; or do without: "
            "--resume --set compile=off",
        ) from error
