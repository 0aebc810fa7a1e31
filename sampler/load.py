"""Opens a model: a run, one of its checkpoints, an export, or any GPT-2 or Qwen3 folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import tokenizer
from pipeline.errors import ForgeError
from pipeline.shards import EOT_TOKEN, VOCABULARY_FILE, read_vocabulary
from trainer import checkpoint, layouts
from trainer.model import LanguageModel, build_model


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
    if found := checkpoint.find(path, step):
        loaded = _open_run(*found)
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


def _open_run(run: Path, step: int) -> Loaded:
    state = checkpoint.load_state(run, step, (checkpoint.MODEL_FILE,))
    model = build_model(state.model)
    path = checkpoint.checkpoint_path(run, step) / checkpoint.MODEL_FILE
    model.load_state_dict(checkpoint.load_tensors(path, dict(model.named_parameters())))
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
