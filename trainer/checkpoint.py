"""Save, load, latest: a run's weights and optimizer on the disk.

Before: loop.py. After: a later loop.py (--resume) and sampler/.

    RUN/checkpoints/step_00001000/
        model.safetensors       weights, float32, by transformers' GPT-2 names
        optimizer.safetensors   optimizer.py's state: AdamW's moments, `exp_avg.NAME` and so on
        state.json              step, tokens, seconds, and a checksum (xxh3_64) of both files

A checkpoint is written as NAME.partial and renamed, so one that is there is whole; it is checked on
load all the same. Nothing is ever unpickled.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import ForgeError
from pipeline.shards import sync_folder

FOLDER = "checkpoints"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class State:
    """Where training stands. The position in the data is step * windows_per_step."""

    step: int
    tokens: int
    seconds: float  # of training, over all starts
    checksums: dict[str, str]


def checkpoint_path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step_{step:08d}"


def steps(run: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, in order."""
    found = (run / FOLDER).glob("step_" + "[0-9]" * 8)
    return sorted(int(path.name.removeprefix("step_")) for path in found)


def save(
    run: Path,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    step: int,
    tokens: int,
    seconds: float,
    keep_last: int,
) -> Path:
    """Write a checkpoint, whole or not at all, and drop all but the newest `keep_last`.

    Raises OSError when the disk does not take it; older checkpoints are untouched then.
    """
    path = checkpoint_path(run, step)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_tensors(weights, partial / MODEL_FILE)
        save_tensors(optimizer, partial / OPTIMIZER_FILE)
        sums = {name: _checksum(partial / name) for name in (MODEL_FILE, OPTIMIZER_FILE)}
        state = State(step, tokens, seconds, sums)
        with (partial / STATE_FILE).open("w") as file:
            json.dump(asdict(state), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        sync_folder(path.parent)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in steps(run)[:-keep_last]:
        shutil.rmtree(checkpoint_path(run, old))
    return path


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file and wait until it is on the disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its type for a full disk, too
        raise OSError(f"cannot write {path}: {error}") from error
    path.chmod(0o644)  # the library makes it readable to its owner only
    with path.open("rb") as file:
        os.fsync(file.fileno())


def load_state(
    run: Path, step: int, files: tuple[str, ...] = (MODEL_FILE, OPTIMIZER_FILE)
) -> State:
    """state.json of a checkpoint, after checking `files` against it."""
    path = checkpoint_path(run, step)
    fix = "use an older one: --checkpoint STEP; for training, remove this folder"
    try:
        state = State(**json.loads((path / STATE_FILE).read_text()))
        for name in files:
            if _checksum(path / name) != state.checksums[name]:
                raise ForgeError("damaged checkpoint: checksum differs", where=path / name, fix=fix)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ForgeError(f"cannot read a checkpoint: {error}", where=path, fix=fix) from error
    return state


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
        raise ForgeError(f"cannot read tensors: {error}", where=path) from error
    differing = {k for k in {*tensors, *wanted} if k not in tensors or k not in wanted}
    differing |= {k for k in {*tensors} & {*wanted} if tensors[k].shape != wanted[k].shape}
    if differing:
        raise ForgeError(
            f"the checkpoint is of another model; differing: {', '.join(sorted(differing)[:5])}",
            where=path,
            fix="use the config that the run was made with",
        )
    return tensors


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
