"""Opens a model: a run, one of its checkpoints, an export, or any GPT-2 or Qwen3 folder."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline import chatml, tokenizer
from pipeline.errors import ForgeError
from pipeline.shards import EOT_TOKEN, VOCAB_SIZE, VOCABULARY_FILE, read_vocabulary
from sampler.curves import within
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
    state = None
    if found := checkpoint.find(path, step):
        path, step = found
        state = checkpoint.load_state(path, step, (checkpoint.MODEL_FILE,))
        model: LanguageModel = build_model(state.model)
        weights = checkpoint.checkpoint_path(path, step) / checkpoint.MODEL_FILE
        model.load_state_dict(checkpoint.load_tensors(weights, dict(model.named_parameters())))
        vocabulary = read_vocabulary(path / VOCABULARY_FILE)
    elif step is not None:
        what = "an exported folder has no checkpoints"
        raise ForgeError(what, where=path, fix="leave out --checkpoint")
    else:
        model = layouts.read_folder(path)
        _check_tokenizer(path)
        vocabulary = [*tokenizer.token_bytes()]
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    model.to(device, dtype or usual).requires_grad_(False)
    is_chat = knows_chat(path)
    return Loaded(path, model, vocabulary + MARKERS * is_chat, state, is_chat)


def _check_tokenizer(folder: Path) -> None:
    """ForgeError if the folder has a vocabulary that is not GPT-2's."""
    published = layouts.read_json(tokenizer.package_data() / "encoder.json")
    for name, *keys in (("vocab.json",), ("tokenizer.json", "model", "vocab")):
        if (folder / name).is_file():
            known = within(layouts.read_json(folder / name), *keys)
            is_table = isinstance(known, dict)
            if not is_table or {tokenizer.EOT_TEXT: EOT_TOKEN, **known} != published:
                fix = "give a model with GPT-2's tokenizer: no other can be read"
                raise ForgeError("the tokenizer is not GPT-2's", where=folder / name, fix=fix)
