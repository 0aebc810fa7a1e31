"""Save, load, latest: a run's weights and optimizer on the disk.

Before: loop.py. After: a later loop.py (--resume) and sampler/.

    RUN/checkpoints/step_00001000/
        model.safetensors       weights, float32, by model.py's names
        optimizer.safetensors   optimizer.py's state: AdamW's moments, Muon's momentum
        state.json              step, tokens, seconds, and checksums (xxh3_64): of both files and
                                of all else in this one

A checkpoint is written as NAME.partial and renamed, so one that is there is whole; it is checked on
load all the same. Nothing is ever unpickled.
"""

import json
import math
import os
import queue
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import ForgeError
from pipeline.files import sync_folder
from trainer.config import CheckpointConfig, ModelConfig, load

FOLDER = "checkpoints"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class State:
    """Where training stands. The position in the data follows from the step."""

    step: int
    tokens: int
    seconds: float  # of training, over all starts
    checksums: dict[str, str] = field(default_factory=dict)
    decayed: float = 1.0  # what the decay has left of the peak learning rate (schedule.py)
    validation_loss: float | None = None  # if it was evaluated at this step


def checkpoint_path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step_{step:08d}"


def steps(run: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, in order."""
    found = (run / FOLDER).glob("step_" + "[0-9]" * 8)
    return sorted(int(path.name.removeprefix("step_")) for path in found)


def save(run: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: State) -> Path:
    """Write a checkpoint, whole or not at all, with its checksums in place of those of `state`.

    Raises OSError when the disk does not take it; older checkpoints are untouched then.
    """
    path = checkpoint_path(run, state.step)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_tensors(weights, partial / MODEL_FILE)
        save_tensors(optimizer, partial / OPTIMIZER_FILE)
        sums = {name: _checksum(partial / name) for name in (MODEL_FILE, OPTIMIZER_FILE)}
        raw = asdict(state) | {"checksums": sums}
        sums[STATE_FILE] = _own_checksum(raw)
        with (partial / STATE_FILE).open("w") as file:
            json.dump(raw, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        sync_folder(path.parent)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def prune(run: Path, options: CheckpointConfig) -> None:
    """Remove the checkpoints that the rule does not keep."""
    known = []
    for step in steps(run):
        with suppress(ForgeError):  # a damaged one stays, to be looked at
            known.append(read_state(run, step))
    for step in {state.step for state in known} - kept(known, options):
        shutil.rmtree(checkpoint_path(run, step), ignore_errors=True)


def kept(states: list[State], options: CheckpointConfig) -> set[int]:
    """Steps of the checkpoints to keep, of `states` in order.

    The last keep_last; the first in each keep_every_hours of training; the best by validation
    loss; and the last before the learning rate's decay, from which the run can be extended.
    """
    chosen = {state.step for state in states[-options.keep_last :]}
    chosen |= {state.step for state in [s for s in states if s.decayed == 1][-1:]}
    losses = {s.step: s.validation_loss for s in states if s.validation_loss is not None}
    if finite := {step: loss for step, loss in losses.items() if math.isfinite(loss)}:
        chosen.add(min(finite, key=lambda step: finite[step]))
    periods: dict[int, int] = {}
    for state in states:
        periods.setdefault(int(state.seconds / 3600 / options.keep_every_hours), state.step)
    return chosen | {step for period, step in periods.items() if period > 0}


@dataclass(frozen=True)
class Saved:
    """How a save went: seconds until it was on the disk, or what the disk said."""

    step: int
    seconds: float
    error: Exception | None


class Saver:
    """Writes checkpoints behind training's back, one at a time.

    What is saved is copied to the host's memory first (pinned, on GPUs: the copies are queued
    between two steps, and the writer waits for them, not the trainer). The copy's place is kept
    for the next one, so that memory stays flat.
    """

    def __init__(self, run: Path, options: CheckpointConfig) -> None:
        self.run, self.options = run, options
        self.copies: dict[str, dict[str, Tensor]] = {}
        self.thread: threading.Thread | None = None
        self.results: queue.SimpleQueue[Saved] = queue.SimpleQueue()
        for left in (run / FOLDER).glob("*.partial"):  # of a start that was killed
            shutil.rmtree(left, ignore_errors=True)

    def start(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: State) -> None:
        """Copy everything and leave the writing to a thread; first waits for the save before."""
        self.wait()
        copied = self._copy("weights", weights), self._copy("optimizer", optimizer)
        arrived: torch.cuda.Event | None = None
        if next(iter(weights.values())).is_cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self.thread = threading.Thread(target=self._write, args=(*copied, state, arrived))
        self.thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def is_busy(self, seconds: float) -> bool:
        """Whether something is still being written after waiting for so long."""
        if self.thread:
            self.thread.join(seconds)
        return self.thread is not None and self.thread.is_alive()

    def finished(self) -> list[Saved]:
        """The saves that have ended since the last call."""
        found = []
        with suppress(queue.Empty):
            while True:
                found.append(self.results.get_nowait())
        return found

    def prepare(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Make room for the copies ahead, behind the first step's compilation.

        Pinning a few gigabytes takes seconds.
        """

        def allocate() -> None:
            self._places("weights", weights)
            self._places("optimizer", optimizer)

        self.wait()
        self.thread = threading.Thread(target=allocate)
        self.thread.start()

    def _places(self, kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if kind not in self.copies:
            self.copies[kind] = {
                name: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
                for name, t in tensors.items()
            }
        return self.copies[kind]

    def _copy(self, kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        places = self._places(kind, tensors)
        for name, tensor in tensors.items():
            places[name].copy_(tensor, non_blocking=True)
        return places

    def _write(
        self,
        weights: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: State,
        arrived: torch.cuda.Event | None,
    ) -> None:
        started = time.perf_counter()
        error: Exception | None = None
        try:
            if arrived:
                arrived.synchronize()
            save(self.run, weights, optimizer, state)
            prune(self.run, self.options)
        except Exception as caught:  # a warning at the next step, whatever it is
            error = caught
        self.results.put(Saved(state.step, time.perf_counter() - started, error))


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file and wait until it is on the disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its type for a full disk, too
        raise OSError(f"cannot write {path}: {error}") from error
    path.chmod(0o644)  # the library makes it readable to its owner only
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_state(run: Path, step: int) -> State:
    """state.json of a checkpoint; ForgeError when it cannot be read."""
    try:
        return _state(checkpoint_path(run, step))
    except (OSError, ValueError) as error:
        raise _unusable(run, step, error) from error


def read_model(run: Path, step: int) -> ModelConfig:
    """The model of a checkpoint: from its state.json, or from the run's config where older
    versions wrote it."""
    path = checkpoint_path(run, step) / STATE_FILE
    try:
        model = json.loads(path.read_text()).get("model")
        return load(str(run / "config.toml")).model if model is None else ModelConfig(**model)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unusable(run, step, error) from error


def load_state(
    run: Path, step: int, files: tuple[str, ...] = (MODEL_FILE, OPTIMIZER_FILE)
) -> State:
    """state.json of a checkpoint, after checking `files` against it; ForgeError if it is damaged,
    which names the next older one that is good."""
    try:
        return _whole_state(checkpoint_path(run, step), files)
    except (OSError, ValueError) as error:
        raise _unusable(run, step, error) from error


def _state(path: Path) -> State:
    try:
        raw = json.loads((path / STATE_FILE).read_text())
        state = State(**{key: value for key, value in raw.items() if key != "model"})
        if state.checksums.get(STATE_FILE) not in (None, _own_checksum(raw)):  # older ones: None
            raise ValueError("checksum differs")
    except (ValueError, TypeError, AttributeError) as error:  # whatever it may hold
        raise ValueError(f"{STATE_FILE}: {error}") from error
    return state


def _whole_state(path: Path, files: tuple[str, ...]) -> State:
    state = _state(path)
    for name in files:
        if _checksum(path / name) != state.checksums.get(name):
            raise ValueError(f"{name}: checksum differs")
    return state


def _unusable(run: Path, step: int, error: Exception) -> ForgeError:
    """Says what to do about a damaged checkpoint: which older one is good."""
    good = None
    for older in reversed([found for found in steps(run) if found < step]):
        with suppress(OSError, ValueError):
            good = _whole_state(checkpoint_path(run, older), (MODEL_FILE, OPTIMIZER_FILE)).step
            break
    return ForgeError(
        f"damaged checkpoint: {error}",
        where=checkpoint_path(run, step),
        fix="for training, remove this folder: --resume goes on from "
        + (f"step {good} then; elsewhere, --checkpoint {good}" if good else "an older one, if any"),
    )


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill `model` from a model.safetensors; ForgeError when names or shapes differ."""
    wanted = {name: parameter.data for name, parameter in model.named_parameters()}
    tensors = load_tensors(path, wanted)
    for name, weight in wanted.items():
        weight.copy_(tensors[name])


def load_tensors(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ForgeError unless names and shapes are those wanted."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ForgeError(
            f"cannot read tensors: {error}", where=path, fix="copy the checkpoint again"
        ) from error
    differing = {k for k in {*tensors, *wanted} if k not in tensors or k not in wanted}
    differing |= {k for k in {*tensors} & {*wanted} if tensors[k].shape != wanted[k].shape}
    if differing:
        fix = "use the config that the run was made with"
        if all(name.startswith("mean_squares.") for name in differing):
            before = "false" if differing <= {*wanted} else "true"
            fix += f" (--set optimizer.muon_normalize={before})"
        raise ForgeError(
            "the checkpoint is of another model or optimizer; differing: "
            f"{', '.join(sorted(differing)[:5])}",
            where=path,
            fix=fix,
        )
    return tensors


def _own_checksum(raw: dict[str, Any]) -> str:
    """Of what state.json says, but for this checksum. Of the file's own fields, not of this
    version's."""
    others = {name: value for name, value in raw.get("checksums", {}).items() if name != STATE_FILE}
    text = json.dumps(raw | {"checksums": others}, sort_keys=True)
    return xxhash.xxh3_64(text.encode()).hexdigest()


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
