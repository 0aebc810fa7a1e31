"""Opens a model: a run, one of its checkpoints, an export, or any GPT-2 or Qwen3 folder.

Before: trainer/checkpoint.py, or a folder that trainer/layouts.py reads. After: decode.py,
evaluate.py and export.py.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import tokenizer
from pipeline.errors import ForgeError
from pipeline.shards import EOT_TOKEN, VOCABULARY_FILE, read_vocabulary
from trainer import checkpoint, layouts
from trainer.model import LanguageModel, build_model
from trainer.run import CONFIG_FILE


@dataclass(frozen=True)
class Loaded:
    """A model ready to compute, and the bytes of each of its tokens (V,)."""

    path: Path
    model: LanguageModel
    vocabulary: list[bytes]
    state: checkpoint.State | None  # where training stood; None for a folder of transformers


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_model(
    path: Path, step: int | None, device: torch.device, dtype: torch.dtype | None = None
) -> Loaded:
    """Load the model at `path` onto `device`.

    `step` chooses a checkpoint of a run (default: the latest). The default `dtype` is bfloat16 on a
    GPU and float32 on a CPU.
    """
    if (path / checkpoint.STATE_FILE).is_file():
        path, step = _run_of(path, step)
    layouts.check_path(path)
    if (path / CONFIG_FILE).is_file():
        loaded = _open_run(path, step)
    elif not (path / layouts.CONFIG_FILE).is_file():
        raise ForgeError(
            "no model there" if path.exists() else "no such folder",
            where=path,
            fix="give a run of forge-train (the folder named with --out), one of its checkpoints, "
            "or a folder in transformers' GPT-2 or Qwen3 layout (to download a model of the hub: "
            "hf download NAME --local-dir FOLDER)",
        )
    elif step is not None:
        raise ForgeError(
            "an exported folder has no checkpoints", where=path, fix="leave out --checkpoint"
        )
    else:
        loaded = _open_transformers(path)
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded.model.to(device, dtype or usual)
    loaded.model.requires_grad_(False)
    return loaded


def _run_of(path: Path, step: int | None) -> tuple[Path, int]:
    """The run that a checkpoint's folder is in, and the checkpoint's step."""
    if step is not None:
        raise ForgeError(
            "both a checkpoint's folder and --checkpoint",
            where=path,
            fix="give one of them: the run and --checkpoint, or the checkpoint's folder",
        )
    run, name = path.resolve().parent.parent, path.resolve().name
    step = int(name.removeprefix("step_")) if re.fullmatch(r"step_\d+", name) else -1
    if path.resolve() != checkpoint.checkpoint_path(run, step).resolve():
        raise ForgeError(
            "a checkpoint outside of its run, which has the vocabulary",
            where=path,
            fix=f"put it back as RUN/{checkpoint.FOLDER}/step_N, or copy the whole run",
        )
    return run, step


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
    state = checkpoint.load_state(run, chosen, (checkpoint.MODEL_FILE,))
    model = build_model(checkpoint.read_model(run, chosen))
    checkpoint.load_weights(checkpoint.checkpoint_path(run, chosen) / checkpoint.MODEL_FILE, model)
    return Loaded(run, model, read_vocabulary(run / VOCABULARY_FILE), state)


def _open_transformers(folder: Path) -> Loaded:
    """A folder in transformers' layout."""
    config, weights = layouts.read_folder(folder)
    _check_tokenizer(folder)
    model = build_model(config)
    model.load_state_dict(weights)
    return Loaded(folder, model, list(tokenizer.token_bytes()), None)


def _check_tokenizer(folder: Path) -> None:
    """ForgeError if the folder has a vocabulary that is not GPT-2's."""
    published = layouts.read_json(tokenizer.package_data() / "encoder.json")
    for name in ("vocab.json", "tokenizer.json"):
        if (folder / name).is_file():
            content: Any = layouts.read_json(folder / name)
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
