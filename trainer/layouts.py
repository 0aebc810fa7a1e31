"""Our models in transformers' layout, read and written: config.json and safetensors files.

GPT2LMHeadModel's Conv1D layers hold the transpose of a Linear; Qwen3ForCausalLM has several
matrices where we have one. A padded vocabulary of ours is cut to its tokens in theirs.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pipeline import chatml, shards
from pipeline.errors import ForgeError
from trainer import checkpoint
from trainer.config import ModelConfig
from trainer.config_file import model_from_dict
from trainer.model import LAYER_NORM_EPS, RMS_NORM_EPS, Fused, LanguageModel, build_model

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer_config.json"
AGAIN = "download or copy the folder again"
# Keys of config.json that change what is computed: transformers' default, and the values that we
# compute, of which exports have the first.
FIXED: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "gpt2": {
        "layer_norm_epsilon": (LAYER_NORM_EPS, (LAYER_NORM_EPS,)),
        "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
        "scale_attn_weights": (True, (True,)),
        "scale_attn_by_inverse_layer_idx": (False, (False,)),
        "add_cross_attention": (False, (False,)),
    },
    "qwen3": {
        "rms_norm_eps": (RMS_NORM_EPS, (RMS_NORM_EPS,)),
        "hidden_act": ("silu", ("silu",)),
        "attention_bias": (False, (False,)),
        "use_sliding_window": (False, (False,)),
        "rope_scaling": (None, (None,)),
        "tie_word_embeddings": (False, (True,)),
    },
}
# Their key of each size, and the field of ModelConfig.
SIZES = {
    "gpt2": {
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "n_embd": "embedding_size",
        "n_positions": "context_length",
        "vocab_size": "vocab_size",
    },
    "qwen3": {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "hidden_size": "embedding_size",
        "head_dim": "head_size",
        "intermediate_size": "mlp_size",
        "max_position_embeddings": "context_length",
        "vocab_size": "vocab_size",
        "rope_theta": "rope_theta",
    },
}
# Keys of an export that are for transformers and other programs alone.
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "attention_dropout": 0.0},
}
PUBLISHED = "give a GPT-2 or Qwen3 model with GPT-2's tokenizer, as published or as exported"
NAMES = {
    "gpt2": {"^": "transformer."},
    "qwen3": {
        r"^wte\.": "model.embed_tokens.",
        r"^ln_f\.": "model.norm.",
        r"^h\.": "model.layers.",
        r"\.ln_1\.": ".input_layernorm.",
        r"\.ln_2\.": ".post_attention_layernorm.",
        r"\.attn\.": ".self_attn.",
    },
}
# Our fused layers, and theirs.
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Piece(NamedTuple):
    """One of their tensors: some rows of one of our parameters, or its transpose."""

    theirs: str
    ours: str
    rows: slice = slice(None)
    is_transposed: bool = False

    def of(self, weight: Tensor) -> Tensor:
        """The view of our parameter that has their shape."""
        return weight.T if self.is_transposed else weight[self.rows]


def pieces(model: LanguageModel) -> list[Piece]:
    """All of their tensors for `model`; those of one of our parameters follow each other."""
    found = []
    for name, weight in model.named_parameters():
        theirs = name
        for ours, other in NAMES[model.config.family].items():
            theirs = re.sub(ours, other, theirs)
        *layer, kind, _ = name.split(".")
        if kind in PARTS:
            start, fused = 0, cast(Fused, model.get_submodule(".".join([*layer, kind])))
            for part, size in zip(PARTS[kind], fused.sizes, strict=True):
                found.append(Piece(theirs.replace(kind, part), name, slice(start, start + size)))
                start += size
        else:
            is_matrix = weight.ndim == 2 and name.startswith("h.")
            is_conv1d = is_matrix and model.config.family == "gpt2"
            found.append(Piece(theirs, name, is_transposed=is_conv1d))
    return found


# ---------------------------------------------------------------------------------------------
# Ours -> theirs


def transformers_weights(
    model: LanguageModel, num_tokens: int = shards.VOCAB_SIZE
) -> dict[str, Tensor]:
    """The weights under transformers' names, with the embedding of `num_tokens` tokens."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    weights["wte.weight"] = weights["wte.weight"][:num_tokens]
    named = {p.theirs: p.of(weights[p.ours]).contiguous() for p in pieces(model)}
    if model.config.family == "gpt2" and not model.config.bias:  # theirs always has biases
        for piece in pieces(model):
            if not piece.ours.startswith(("wte", "wpe")):
                bias = torch.zeros(len(weights[piece.ours]))
                named[f"{piece.theirs.removesuffix('weight')}bias"] = bias
    return named


def model_config(
    config: ModelConfig, dtype: str, num_tokens: int = shards.VOCAB_SIZE
) -> dict[str, Any]:
    """config.json of an export, with a vocabulary of `num_tokens` at most."""
    sizes = config.sizes() | {"vocab_size": min(config.vocab_size, num_tokens)}
    return {
        "model_type": config.family,
        "bos_token_id": shards.EOT_TOKEN,
        "eos_token_id": shards.EOT_TOKEN,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        **{theirs: sizes[ours] for theirs, ours in SIZES[config.family].items()},
        **{key: known[0] for key, (_, known) in FIXED[config.family].items()},
        **OTHERS[config.family],
        **({"n_ctx": config.context_length} if config.family == "gpt2" else {}),
    }


# ---------------------------------------------------------------------------------------------
# Theirs -> ours


def with_markers(rows: Tensor) -> Tensor:
    """An embedding (V, C) of a text model with rows for ChatML's markers: each the mean token.

    Rows of a padded vocabulary become theirs.
    """
    missing = max(0, chatml.VOCAB_SIZE - len(rows))
    grown = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
    grown[shards.VOCAB_SIZE : chatml.VOCAB_SIZE] = rows[: shards.VOCAB_SIZE].mean(0)
    return grown


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model and the weights of a folder in transformers' layout, under our names.

    The weights keep their stored type, and may be views that are not contiguous. Raises ForgeError
    unless we compute the model exactly.
    """
    config = read_model(folder)
    with torch.device("meta"):  # for names and shapes alone
        model = build_model(config)
    return config, our_weights(model, read_tensors(folder), folder)


def read_model(folder: Path) -> ModelConfig:
    """The model of a folder in transformers' layout; ForgeError unless we compute it exactly."""
    where = folder / CONFIG_FILE
    if not where.is_file():
        fix = (
            "give a run of forge-train (its --out), one of its checkpoints, or a folder in "
            "transformers' GPT-2 or Qwen3 layout (hf download NAME --local-dir FOLDER)"
        )
        what = "no model there" if folder.exists() else "no such folder"
        raise ForgeError(what, where=folder, fix=fix)
    return read_config(read_json(where), where)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ForgeError(f"cannot read: {error}", where=path, fix=AGAIN) from error
    if not isinstance(content, dict):
        raise ForgeError("not a JSON object", where=path, fix=AGAIN)
    return content


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, under the names that they are stored with."""
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = ", only pickled weights, which can run any program when opened"
        what = f"no {WEIGHTS_FILE}{pickled * any(folder.glob('*.bin'))}"
        fix = "make one with transformers: save_pretrained(FOLDER, max_shard_size='100GB')"
        raise ForgeError(what, where=folder, fix=fix)
    return checkpoint.read_tensors(folder / WEIGHTS_FILE)


def our_weights(model: LanguageModel, tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Weights for `model` from tensors under transformers' names.

    Raises ForgeError if any is missing, unknown or of another shape, or if the head is not tied.
    """
    prefix = "transformer."  # GPT-2's, which some folders leave out
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    head = named.pop("lm_head.weight", None)
    parameters, parts, wrong = dict(model.named_parameters()), dict[str, list[Tensor]](), []
    for piece in pieces(model):
        name = piece.theirs.removeprefix(prefix)
        tensor, shape = named.pop(name, None), piece.of(parameters[piece.ours]).shape
        if tensor is None:
            wrong.append(f"{name} is missing")
        elif tensor.shape != shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}")
        else:
            part = tensor.T if piece.is_transposed else tensor
            parts.setdefault(piece.ours, []).append(part)
    # Old files list attention's masks among the weights.
    masks = ".attn.bias", ".attn.masked_bias"
    wrong += [f"{name} is unknown" for name in named if not name.endswith(masks)]
    if wrong:
        raise ForgeError(f"weights that differ: {', '.join(wrong[:5])}", where=where, fix=PUBLISHED)
    weights = {n: torch.cat(each) if len(each) > 1 else each[0] for n, each in parts.items()}
    embedding = weights["wte.weight"]
    if head is not None and not torch.equal(head.to(embedding), embedding):
        raise ForgeError("the head is not tied to the token embedding", where=where, fix=PUBLISHED)
    return weights


def read_config(config: dict[str, Any], where: Path) -> ModelConfig:
    """The model that a config.json describes; ForgeError unless we compute it exactly."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FIXED:
        what = f"a model of type {family!r}; only GPT-2's and Qwen3's layouts can be read"
        raise ForgeError(what, where=where, fix=PUBLISHED)
    rope = config.get("rope_parameters") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    if family == "gpt2":  # which was published without some of its sizes
        config = {"n_positions": 1024, "vocab_size": shards.VOCAB_SIZE} | config
    else:
        config = config | {"rope_theta": config.get("rope_theta") or rope.get("rope_theta")}
    values = {ours: config.get(theirs) for theirs, ours in SIZES[family].items()}
    values |= {"family": family, "bias": family == "gpt2"}
    model = model_from_dict(values, where, PUBLISHED)
    problems = [
        f"{key} is {config.get(key, default)!r}"
        for key, (default, known) in FIXED[family].items()
        if config.get(key, default) not in known
    ]
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope_parameters is {rope!r}")
    if family == "gpt2" and config.get("n_inner") not in (None, model.mlp_dim()):
        problems.append(f"n_inner is {config['n_inner']!r}")
    if model.vocab_size < shards.VOCAB_SIZE:
        problems.append(f"vocab_size is {model.vocab_size}, not {shards.VOCAB_SIZE} or more")
    if problems:
        what = f"not the architecture that {family} was published with: {', '.join(problems)}"
        raise ForgeError(what, where=where, fix=PUBLISHED)
    return model
