"""Opens a model: a run, one of its checkpoints, an export, or any GPT-2 or Qwen3 folder."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline import chatml, tokenizer
from pipeline.errors import ForgeError
from pipeline.shards import EOT_TOKEN, VOCAB_SIZE, VOCABULARY_FILE, read_vocabulary
from trainer import checkpoint, layouts
from trainer.model import LanguageModel, build_model
from trainer.run import knows_chat

MARKERS = [b""] * (chatml.VOCAB_SIZE - VOCAB_SIZE)


@dataclass(frozen=True)
class Loaded:
    """A model ready to compute, and the bytes of each token that it may write (V,)."""

    path: Path
    model: LanguageModel
    vocabulary: list[bytes]
    state: checkpoint.State | None  # where training stood; None for a folder of transformers
    is_chat: bool  # trained on conversations: its vocabulary has ChatML's markers, of no bytes

    def with_markers(self) -> "Loaded":
        """A copy of a base model as training on chat starts: each marker is the mean token."""
        model = copy.deepcopy(self.model)
        grown = layouts.with_markers(model.wte.weight)
        model.wte.weight = torch.nn.Parameter(grown, requires_grad=False)
        return replace(self, model=model, vocabulary=self.vocabulary + MARKERS, is_chat=True)

    def as_base(self) -> "Loaded":
        """The same model, to continue texts with."""
        return replace(self, vocabulary=self.vocabulary[:VOCAB_SIZE], is_chat=False)


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
        what = "an exported folder has no checkpoints"
        raise ForgeError(what, where=path, fix="leave out --checkpoint")
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
    vocabulary, is_chat = read_vocabulary(run / VOCABULARY_FILE), knows_chat(run)
    return Loaded(run, model, vocabulary + MARKERS * is_chat, state, is_chat)


def _open_transformers(folder: Path) -> Loaded:
    """A folder in transformers' layout."""
    model = layouts.read_folder(folder)
    _check_tokenizer(folder)
    is_chat = knows_chat(folder)
    return Loaded(folder, model, [*tokenizer.token_bytes()] + MARKERS * is_chat, None, is_chat)


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
                fix = "give a model with GPT-2's tokenizer: no other can be read"
                raise ForgeError("the tokenizer is not GPT-2's", where=folder / name, fix=fix)
