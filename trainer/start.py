"""All that happens before the first step: the state, the model, its weights, the run folder."""

import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pipeline import chatml
from pipeline.errors import ForgeError, refusals
from pipeline.shards import load_index
from trainer import checkpoint, int8, layouts
from trainer.backends import compile_model
from trainer.check import describe
from trainer.checkpoint import MODEL_FILE, OPTIMIZER_FILE, State, checkpoint_path
from trainer.config import Config, ModelConfig
from trainer.config_file import flat
from trainer.memory import MOST_INT8_TOKENS, Cut, checkpoint_bytes, cut_here
from trainer.model import build_model
from trainer.optimizer import Optimizer, compute_dtype
from trainer.ranks import Ranks, Shared, fill_from_first, from_first, on_all
from trainer.report import (
    Metrics,
    Readme,
    Report,
    Row,
    Terminal,
    Tracker,
    close,
    duration,
    hardware,
    product_flops,
    read_metrics,
    say,
)
from trainer.run import Command, check_room, knows_chat, write_files
from trainer.schedule import Clock, first_plan
from trainer.step import Setup
from trainer.windows import Data, MicroBatches, check_amount, for_data, open_data

EMBEDDING = "wte.weight"
LEAST_GAIN = 1.1  # of speed, for 8-bit integers: they cost what some percent of the tokens give
OPTIONAL = ("matplotlib", "tensorboardX")  # trackers, where they are installed


def check(command: Command) -> None:
    """Print the plan on rank 0. ForgeError that names all that keeps it from being trained."""
    config, ranks, problems = command.config, Ranks.from_environment(), list[str]()
    data, device = open_data(config, command.data), ranks.device()
    config = for_data(config, data)

    def show() -> None:
        cut = cut_here(config, ranks, device)
        is_measured = device.type == "cuda" and compute_dtype(config, device) == torch.bfloat16
        product = product_flops(device) if is_measured else None
        weights = command.weights_from
        text = describe(config, command.name, data.index, cut, ranks, weights, product)
        if ranks.is_first:
            say(text)
        check_int8(config, device, cut)

    def check_weights() -> None:
        state = new_state(command, data, device)
        if command.weights_from is not None:
            check_source(command.weights_from, state, data.train.is_chat)

    parts = show, partial(check_amount, config, data), check_weights, partial(trackers, config)
    for part in parts:
        try:
            part()
        except ForgeError as error:
            problems.append(str(error))
    if problems:
        raise ForgeError("\n".join(problems))


def new_state(command: Command, data: Data, device: torch.device) -> State:
    """Before the first step. ForgeError for conversations without a model to tune."""
    config = command.config
    if data.train.is_chat and command.weights_from is None:
        what = "conversations tune a model that was trained on text before"
        raise ForgeError(what, where=data.index.folder, fix="forge-train chat --from RUN")
    is_int8 = config.precision == "int8"  # what auto takes is measured later
    return State(
        config.model,
        "int8" if is_int8 else str(compute_dtype(config, device)).removeprefix("torch."),
        data.index.tokenizer.get("sha256", ""),
        flat(config),
        first_plan(config),
        weights_from=str(command.weights_from or ""),
    )


def prepare(
    command: Command, data: Data, device: torch.device, state: State, ranks: Ranks
) -> Setup:
    """The model with random weights, its optimizer and its micro-batches."""
    config = replace(command.config, precision=cast(Any, state.precision))
    cut = cut_here(config, ranks, device)
    check_int8(config, device, cut)
    model = build_model(config.model)
    if not state.step and command.weights_from is None:
        model.init_weights(config.seed)
    optimizer = Optimizer(model.to(device), config, ranks)
    compile_model(model, config, device, cut.recomputes)
    size = cut.micro_batch_size
    int8.use(model, config.precision == "int8")
    batches = MicroBatches(data.train, config, state.step, size, ranks, device)
    return Setup(config, data, ranks, device, cut, model, optimizer, batches)


def load_weights(setup: Setup, command: Command, state: State, is_new: bool) -> None:
    """Fill model and optimizer with the run's checkpoint, or with the weights of --from."""
    optimizer = setup.optimizer
    masters, moments = optimizer.masters(), optimizer.state()
    if not is_new:
        path = checkpoint_path(command.run, state.step)
        for file, tensors in ((MODEL_FILE, masters), (OPTIMIZER_FILE, moments)):
            read = partial(checkpoint.load_tensors, path / file, tensors)
            fill_from_first(setup.ranks, read, tensors)
    elif command.weights_from is not None:
        is_chat = setup.data.train.is_chat
        read = partial(read_source, command.weights_from, state, is_chat, masters)
        fill_from_first(setup.ranks, read, masters)
    optimizer.copy_to_model()


def model_to_tune(name: str, source: Path | None, data: Path, run: Path | None) -> ModelConfig:
    """The model of a config that has none, of that name: that of `run` which is resumed, if any.

    Else that of --from, with a row of the embedding for each of chat's tokens. ForgeError unless
    `data` is of conversations.
    """
    if run is not None and (steps := checkpoint.steps(run)):
        return checkpoint.load_state(run, steps[-1], ()).model
    index = load_index(data)
    if source is None:
        what, fix = "the config has no model of its own", "--from RUN, the run that is to be tuned"
        raise ForgeError(what, where=name, fix=fix)
    if index.chat is None:
        fix = "make a folder of conversations: forge-prep chat SOURCE --out DIR"
        raise ForgeError("a folder of text, not of conversations", where=data, fix=fix)
    model = source_model(source)[0]
    return replace(model, vocab_size=max(model.vocab_size, index.tokenizer["vocab_size"]))


def source_model(source: Path) -> tuple[ModelConfig, str, Path]:
    """The model that --from names, its vocabulary ("" if unknown), and its folder. ForgeError."""
    if found := checkpoint.find(source):
        state = checkpoint.load_state(*found, ())
        return state.model, state.vocabulary, found[0]
    return layouts.read_model(source), "", source


def check_source(source: Path, new: State, is_chat: bool) -> bool:
    """ForgeError unless the weights that --from names are of `new`'s model and vocabulary.

    Returns whether chat's markers are new to them.
    """
    model, vocabulary, folder = source_model(source)
    if vocabulary not in ("", new.vocabulary):
        fix = "train from scratch on these shards"
        raise ForgeError("the weights are of another vocabulary", where=source, fix=fix)
    is_new_to_chat = is_chat and not knows_chat(folder)
    theirs, ours = model.sizes(), new.model.sizes()
    if is_new_to_chat:
        theirs["vocab_size"] = max(model.vocab_size, chatml.VOCAB_SIZE)
    if differing := [f"{k}: {theirs[k]} -> {v}" for k, v in ours.items() if theirs[k] != v]:
        what = f"the weights are of another model: {', '.join(differing)}"
        raise ForgeError(what, where=source, fix="use a config with the same [model]")
    return is_new_to_chat


def check_int8(config: Config, device: torch.device, cut: Cut) -> None:
    """ForgeError if the config asks for 8-bit integers that are not for this model or device."""
    if config.precision == "int8" and not int8.available(config, device, cut.micro_batch_size):
        what = f"int8 is for a GPU, family qwen3, sizes of n * {int8.MULTIPLE} and micro-batches"
        what += f" of up to {MOST_INT8_TOKENS:,} tokens"
        fix = 'leave it at "auto", or lower batch.micro_batch_size; a run that began with int8 '
        fix += "needs such a GPU to go on"
        raise ForgeError(what, where="precision", fix=fix)


def choose_precision(setup: Setup, state: State) -> None:
    """For a new run with precision "auto": 8-bit integers where every card gains by them."""
    model, windows = setup.model, setup.cut.micro_batch_size

    def measure() -> float:
        is_available = int8.available(setup.config, setup.device, windows)
        return int8.speedup(model, windows) if is_available else 0.0

    if not (gain := min(on_all(setup.ranks, measure))):
        return
    if gain >= LEAST_GAIN:
        state.precision = "int8"
        int8.use(model, True)
    for part in setup.optimizer.parts.values():
        part.gradients.zero_()
    if setup.ranks.is_first:
        say(f"Precision: {state.precision}. By 8-bit integers {gain:.2f} times as fast here.")


def read_source(
    source: Path, new: State, is_chat: bool, masters: dict[str, Shared]
) -> dict[str, Tensor]:
    """The weights that --from names, for the `masters` of a new run. ForgeError as check_source().

    For chat, the embedding of a text model gets rows for the markers.
    """
    is_new_to_chat = check_source(source, new, is_chat)
    if found := checkpoint.find(source):
        model = checkpoint.load_state(*found, (MODEL_FILE,)).model
        rows = torch.empty(model.vocab_size, model.embedding_size, device="meta")
        path = checkpoint_path(*found) / MODEL_FILE
        tensors = checkpoint.load_tensors(path, masters | {EMBEDDING: rows})
    else:
        tensors = layouts.weights_of(layouts.read_folder(source))
    if is_new_to_chat:
        tensors[EMBEDDING] = layouts.with_markers(tensors[EMBEDDING])
    return tensors


def trackers(config: Config) -> list[str]:
    """Libraries to pass rows to. ForgeError if the one that was asked for is not installed."""
    asked, found = config.report.to, [name for name in OPTIONAL if find_spec(name)]
    if asked and not find_spec(asked):
        fix = f"pip install {asked}, or leave report.to out"
        raise ForgeError(f"the package {asked} is not installed", where="report.to", fix=fix)
    return [*found, asked] if asked else found


def open_report(
    setup: Setup, command: Command, state: State, clock: Clock, is_new: bool, opened: ExitStack
) -> Report:
    """Create the run folder, or continue it. Only rank 0 has watchers; `opened` closes them."""
    config, run, ranks, cut = setup.config, command.run, setup.ranks, setup.cut
    index, watchers = setup.data.index, list[Callable[[Row], None]]()
    where, started_at = hardware(setup.device, ranks.world_size), int(time.time())

    def make() -> None:
        check_room(run, checkpoint_bytes(config), config.checkpoint.keep_last)
        found = ""
        if config.batch.micro_batch_size == "auto":  # and stays so: the next start may find another
            found = (
                f"# On {where}: batch.micro_batch_size was found to be {cut.micro_batch_size}.\n"
            )
        with refusals("write the run folder", run, "choose another --out"):
            metrics = Metrics(run, None if is_new else state.step)
            write_files(run, command.config, index, found)
        past = read_metrics(run)
        readme = Readme(run, command.name, config, index, state, past)
        watchers.extend((metrics, Terminal(config, state, clock), readme))
        begun_at = past[0].get("started_at") if past else started_at
        name = re.sub(r"[^\w.-]", "-", f"{run.resolve().name}-{begun_at}")
        step = -1 if is_new else state.step
        given = {"run": str(run), "name": name, "config": flat(config), "step": step}
        begun = list[Tracker]()
        opened.callback(close, begun)
        for library in trackers(config):
            begun.append(Tracker(library, given))
        watchers.extend(begun)
        opened.callback(say, "", end="")  # erases the line that renews itself
        if not is_new:
            say(f"Resuming from step {state.step}, after {duration(state.seconds)} of training.")
        say(describe(config, command.name, index, cut, ranks, state.weights_from))
        say(f"Save now: kill -USR1 {os.getpid()}")

    from_first(ranks, make)
    report = Report(watchers, config, clock)
    process = {"process": os.getpid(), "started_at": started_at}
    here = {"world_size": ranks.world_size, "hardware": where, "precision": state.precision}
    report("start", state.step, **here, **asdict(cut), **process)
    return report
