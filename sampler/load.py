"""A model from wherever it lives: a run, a checkpoint, an export, anybody's GPT-2 or Qwen3 folder.

Before: trainer/checkpoint.py, or transformers' layout on the disk. After: decode.py, evaluate.py
and export.py, which take what is loaded here.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline import tokenizer
from pipeline.errors import ForgeError
from pipeline.shards import EOT_TOKEN, VOCABULARY_FILE, read_vocabulary
from sampler.layouts import fill, read_config
from trainer import checkpoint
from trainer.config import load
from trainer.model import LanguageModel, build_model
from trainer.run import CONFIG_FILE

HF_CONFIG = "config.json"
HF_INDEX = "model.safetensors.index.json"
AGAIN = "download or copy the folder again"  # what to do about a damaged file


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation on its device, and the bytes of each of its tokens (V,)."""

    path: Path
    model: LanguageModel
    vocabulary: list[bytes]
    state: checkpoint.State | None  # where training stood; None for a folder of transformers


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_model(
    path: Path, step: int | None, device: torch.device, dtype: torch.dtype | None = None
) -> Loaded:
    """Load `path`, whatever of the four it is.

    `step` chooses a checkpoint of a run (default: the latest); without `dtype` the weights become
    bfloat16 on a GPU and float32 on a CPU.
    """
    if (path / checkpoint.STATE_FILE).is_file():
        if step is not None:
            raise ForgeError(
                "a checkpoint of its own, and --checkpoint",
                where=path,
                fix="give one of them: the run and --checkpoint, or the checkpoint's folder",
            )
        run, name = path.resolve().parent.parent, path.resolve().name
        step = int(name.removeprefix("step_")) if re.fullmatch(r"step_\d+", name) else -1
        if path.resolve() != checkpoint.checkpoint_path(run, step).resolve():
            raise ForgeError(
                "a checkpoint outside of its run, which has the config and the vocabulary",
                where=path,
                fix=f"put it back as RUN/{checkpoint.FOLDER}/step_N, or copy the whole run",
            )
        path = run
    if (path / CONFIG_FILE).is_file():
        loaded = _open_run(path, step)
    elif not (path / HF_CONFIG).is_file():
        raise ForgeError(
            "no model there" if path.exists() else "no such folder",
            where=path,
            fix="give a run of forge-train (the folder named with --out), one of its checkpoints, "
            "or a folder in transformers' GPT-2 or Qwen3 layout (a model of the hub is one after: "
            "hf download NAME --local-dir FOLDER)",
        )
    elif step is not None:
        raise ForgeError("an exported folder has no checkpoints", where=path, fix="no --checkpoint")
    else:
        loaded = _open_transformers(path)
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded.model.to(device, dtype or usual)
    loaded.model.requires_grad_(False)
    return loaded


def _open_run(run: Path, step: int | None) -> Loaded:
    found = checkpoint.steps(run)
    if not found:
        raise ForgeError("the run has no checkpoint yet", where=run, fix="wait for the first one")
    if step is not None and step not in found:
        raise ForgeError(
            f"the run has no checkpoint of step {step}",
            where=run,
            fix=f"--checkpoint {' or '.join(map(str, found))}",
        )
    chosen = found[-1] if step is None else step
    model = build_model(load(str(run / CONFIG_FILE)).model)
    state = checkpoint.load_state(run, chosen, (checkpoint.MODEL_FILE,))
    checkpoint.load_weights(checkpoint.checkpoint_path(run, chosen) / checkpoint.MODEL_FILE, model)
    return Loaded(run, model, read_vocabulary(run / VOCABULARY_FILE), state)


def _open_transformers(folder: Path) -> Loaded:
    """A folder in transformers' layout: one safetensors file or several, any prefix."""
    settings = read_config(_read_json(folder / HF_CONFIG), folder / HF_CONFIG)
    _check_tokenizer(folder)
    model = build_model(settings)
    fill(model, _read_tensors(folder), folder)
    return Loaded(folder, model, list(tokenizer.token_bytes()), None)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    files = [checkpoint.MODEL_FILE]
    if not (folder / checkpoint.MODEL_FILE).is_file():
        if not (folder / HF_INDEX).is_file():
            pickled = any(folder.glob("*.bin"))
            raise ForgeError(
                f"no {checkpoint.MODEL_FILE}"
                + (", only pickled weights, which can run any program when opened" * pickled),
                where=folder,
                fix="convert them with transformers: save_pretrained(FOLDER) writes safetensors",
            )
        places = _read_json(folder / HF_INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise ForgeError("no weight_map", where=folder / HF_INDEX, fix=AGAIN)
        files = sorted({*map(str, places.values())})
    tensors: dict[str, Tensor] = {}
    for name in files:
        try:
            with safe_open(folder / name, "pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ForgeError(
                f"cannot read weights: {error}", where=folder / name, fix=AGAIN
            ) from error
    return tensors


def _check_tokenizer(folder: Path) -> None:
    """ForgeError if the folder's vocabulary is not GPT-2's; without one it is trusted."""
    published = _read_json(tokenizer.package_data() / "encoder.json")
    for name in ("vocab.json", "tokenizer.json"):
        if (folder / name).is_file():
            content: Any = _read_json(folder / name)
            if name == "tokenizer.json":
                model = content.get("model")
                content = model.get("vocab") if isinstance(model, dict) else None
            known = content if isinstance(content, dict) else {}
            if {tokenizer.EOT_TEXT: EOT_TOKEN, **known} != published:
                raise ForgeError(
                    "the tokenizer is not GPT-2's",
                    where=folder / name,
                    fix="only models with GPT-2's tokenizer can be read",
                )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ForgeError(f"cannot read: {error}", where=path, fix=AGAIN) from error
    if not isinstance(content, dict):
        raise ForgeError("not a JSON object", where=path, fix=AGAIN)
    return content
