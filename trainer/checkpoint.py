"""A run's weights and optimizer on the disk: save, load, and which checkpoints stay.

    RUN/checkpoints/step_00001000/
        model.safetensors       weights, float32, by model.py's names
        optimizer.safetensors   optimizer.py's state: moments, and the numbers of sound steps
        state.json              State, and checksums (xxh3_64): of both files and of the rest of
                                this one

A checkpoint is written as NAME.partial and renamed, so one that is there is whole; it is checked on
load all the same. Nothing is ever unpickled.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import ForgeError
from pipeline.files import check_utf8, sync_folder
from trainer.config import CheckpointConfig, ModelConfig
from trainer.config_file import model_from_dict, read_toml
from trainer.ranks import Shared
from trainer.schedule import Plan

FOLDER = "checkpoints"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
WHOLE = (MODEL_FILE, OPTIMIZER_FILE)
CONFIG_FILE = "config.toml"  # of the run
VERSION = 3  # 2: without config; 1: also without model, precision, vocabulary and plan


@dataclass
class State:
    """Where a run stands: everything but the tensors. The position in the data is the step's."""

    model: ModelConfig
    precision: str  # of the weights that the model computes with
    vocabulary: str  # sha256 of its file
    config: dict[str, Any]  # by section.key; empty before version 3
    plan: Plan
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, over all starts
    weights_from: str = ""  # where the run began, unless at random weights
    validation_loss: float | None = None  # of this very step, where it is finite

    def advance(self, tokens: int) -> None:
        """Count one more step."""
        self.step, self.tokens, self.validation_loss = self.step + 1, self.tokens + tokens, None

    @property
    def is_before_decay(self) -> bool:
        return self.plan.height == 1 and self.step <= self.plan.start


def checkpoint_path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step_{step:08d}"


def steps(run: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, in order."""
    found = (run / FOLDER).glob("step_" + "[0-9]" * 8)
    return sorted(int(path.name.removeprefix("step_")) for path in found)


def num_bytes(run: Path) -> int:
    """What its checkpoints take of the disk; those that vanish meanwhile do not count."""
    total = 0
    for path in (run / FOLDER).rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def find(path: Path, step: int | None = None) -> tuple[Path, int] | None:
    """(run, step) of a run's folder, whose latest checkpoint it is, or of a checkpoint's.

    None for any other folder. ForgeError for a run without the checkpoint.
    """
    check_utf8(path)
    if (path / STATE_FILE).is_file():
        run, name = path.absolute().parent.parent, path.absolute().name
        number = name.removeprefix("step_")
        if step is not None:
            what = "both a checkpoint's folder and --checkpoint"
            raise ForgeError(what, where=path, fix="give the run and --checkpoint, or the folder")
        if not number.isdecimal() or checkpoint_path(run, int(number)) != path.absolute():
            what = "a checkpoint outside of its run, which has the vocabulary"
            fix = f"put it back as RUN/{FOLDER}/step_N, or copy the whole run"
            raise ForgeError(what, where=path, fix=fix)
        return run, int(number)
    if not (path / CONFIG_FILE).is_file():
        return None
    found = steps(path)
    if not found:
        fix = "wait for it, or --resume"
        raise ForgeError("the run has no checkpoint yet", where=path, fix=fix)
    if step is not None and step not in found:
        fix = f"--checkpoint {' or '.join(map(str, found))}"
        raise ForgeError(f"the run has no checkpoint of step {step}", where=path, fix=fix)
    return path, found[-1] if step is None else step


# ---------------------------------------------------------------------------------------- save


def save(run: Path, files: Iterator[dict[str, Tensor]], state: State) -> Path:
    """Write a checkpoint, whole or not at all.

    `files` are the weights and the optimizer's state; the second is made when the first is written.
    Raises OSError when the disk does not take it; older checkpoints are untouched then.
    """
    path = checkpoint_path(run, state.step)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in WHOLE:
            save_tensors(next(files), partial / name)
        sums = {name: _checksum(partial / name) for name in WHOLE}
        raw = _plain(state) | {"checksums": sums}
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


def _plain(state: State) -> dict[str, Any]:
    """For JSON: without keys that are absent, and null where a plan is not known yet."""
    raw = {"version": VERSION, **asdict(state)}
    raw["model"] = {k: v for k, v in raw["model"].items() if v is not None}
    raw["plan"] = {k: None if v == math.inf else v for k, v in raw["plan"].items()}
    return raw


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file and wait until it is on the disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its type for a full disk, too
        raise OSError(f"cannot write {path}: {error}") from error
    path.chmod(0o644)  # the library makes it readable to its owner only
    with path.open("rb") as file:
        os.fsync(file.fileno())


class Checkpoints:
    """The checkpoints that a run writes, each after a sound step.

    An update can be finite and ruin the weights all the same, which only the next step shows. So
    the last checkpoint pushes out no other: older ones go when the next one shows that it was good.
    """

    def __init__(self, run: Path, options: CheckpointConfig) -> None:
        self.run, self.options = run, options

    def save(self, files: Iterator[dict[str, Tensor]], state: State) -> str | None:
        """Remove what the rule does not keep, and write a checkpoint; returns the error, if any."""
        try:
            prune(self.run, self.options)
            save(self.run, files, state)
        except OSError as error:
            return str(error)
        return None

    def last(self) -> str:
        """For people: the checkpoint to continue from."""
        if not (found := steps(self.run)):
            return "there is no checkpoint yet"
        path = checkpoint_path(self.run, found[-1])
        return f"last checkpoint: {path}; if it fails again, move that away: it may be ruined"


def prune(run: Path, options: CheckpointConfig) -> None:
    """Remove the checkpoints that the rule does not keep. Damaged ones stay, to be looked at."""
    states = known_states(run)
    for step in {state.step for state in states} - kept(states, options):
        path = checkpoint_path(run, step)
        half = path.rename(path.with_name(path.name + ".partial"))  # a kill leaves no half of it
        shutil.rmtree(half, ignore_errors=True)


def kept(states: list[State], options: CheckpointConfig) -> set[int]:
    """Steps of the checkpoints to keep, of `states` in order.

    The last keep_last; the best by validation loss; and the last before the learning rate's decay,
    from which a longer run can begin.
    """
    chosen = {state.step for state in states[-options.keep_last :]}
    chosen |= {state.step for state in [s for s in states if s.is_before_decay][-1:]}
    losses = [(s.validation_loss, s.step) for s in states if s.validation_loss is not None]
    return chosen | {step for _, step in sorted(losses)[:1]}


def before_decay(run: Path) -> int | None:
    """Step of the last checkpoint before the learning rate fell; None if there is none."""
    flat = [state.step for state in known_states(run) if state.is_before_decay]
    return flat[-1] if flat else None


def known_states(run: Path) -> list[State]:
    """Of all checkpoints whose state.json can be read, in order."""
    known = []
    for step in steps(run):
        with suppress(OSError, ValueError, ForgeError):
            known.append(_state(run, step, ()))
    return known


# ---------------------------------------------------------------------------------------- load


def load_state(run: Path, step: int, files: tuple[str, ...] = WHOLE) -> State:
    """state.json of a checkpoint, after checking `files` against its checksums.

    ForgeError if any is damaged, which names the next older checkpoint that is whole, if any is.
    """
    try:
        return _state(run, step, files)
    except (OSError, ValueError) as error:
        fix = "no older checkpoint is whole: bring this one back, or begin anew with another --out"
        for older in reversed([found for found in steps(run) if found < step]):
            with suppress(OSError, ValueError):
                _state(run, older, WHOLE)
                fix = f"remove this folder, and --resume continues from step {older}; "
                fix += f"to sample or export now, --checkpoint {older}"
                break
        what, where = f"damaged checkpoint: {error}", checkpoint_path(run, step)
        raise ForgeError(what, where=where, fix=fix) from error


def _state(run: Path, step: int, files: tuple[str, ...]) -> State:
    """load_state(), but OSError or ValueError for damage."""
    path = checkpoint_path(run, step)
    try:
        raw = json.loads((path / STATE_FILE).read_text())
        sums = raw.pop("checksums")
        if sums.get(STATE_FILE) != _own_checksum(raw | {"checksums": sums}):
            raise ValueError("checksum differs")
        version = raw.pop("version", 1)
        if version > VERSION:
            what = "a later version of this program made the checkpoint"
            raise ForgeError(what, where=path, fix="use that version")
        if version == 1:  # whose model stands in the run's config alone
            model = read_toml(run / CONFIG_FILE)["model"]
            start = None if raw.pop("decayed") == 1 else -1.0
            raw |= {"model": model, "plan": {"start": start}}
            raw |= {"precision": "float32", "vocabulary": ""}
        if version < 3:
            raw.pop("fixed", None)
            raw["config"] = {}
        model = model_from_dict(raw.pop("model"), path)
        plan = {k: math.inf if v is None else v for k, v in raw.pop("plan").items()}
        state = State(model=model, plan=Plan(**plan), **raw)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{STATE_FILE}: {error}") from error
    for name in files:
        if _checksum(path / name) != sums.get(name):
            raise ValueError(f"{name}: checksum differs")
    return state


def load_tensors(path: Path, wanted: Mapping[str, Tensor | Shared]) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ForgeError unless names and shapes are those wanted."""
    tensors = read_tensors(path)
    found = {(name, tensor.shape) for name, tensor in tensors.items()}
    known = {(name, tensor.shape) for name, tensor in wanted.items()}
    if differing := sorted({name for name, _ in found ^ known}):
        what = f"the checkpoint is of another model or optimizer: {', '.join(differing[:5])}"
        raise ForgeError(what, where=path, fix="use the config that the run was made with")
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        what = f"cannot read tensors: {error}"
        raise ForgeError(what, where=path, fix="copy or download the folder again") from error


def _own_checksum(raw: dict[str, Any]) -> str:
    """Checksum of state.json without itself."""
    others = {name: value for name, value in raw.get("checksums", {}).items() if name != STATE_FILE}
    text = json.dumps(raw | {"checksums": others}, sort_keys=True)
    return xxhash.xxh3_64(text.encode()).hexdigest()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
