"""Our models in transformers' layout: config.json, safetensors files, and the names of the weights.

Before: a folder in that layout, or model.py's parameters. After: a model to train or to sample
from, or an export. It must not know about tokenizers.

GPT2LMHeadModel's Conv1D layers hold the transpose of a Linear; Qwen3ForCausalLM has several
matrices where we have one. A padded vocabulary of ours is cut to GPT-2's 50,257 tokens in theirs.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline import shards
from pipeline.errors import ForgeError
from trainer.config import ModelConfig
from trainer.model import LAYER_NORM_EPS, RMS_NORM_EPS, Fused, LanguageModel, build_model

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
AGAIN = "download or copy the folder again"
# Keys of config.json that change what is computed: the default, and the values that we compute.
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
    },
}
PUBLISHED = "give a GPT-2 or Qwen3 model as it was published, or as forge-export writes it"
QWEN3_NAMES = (
    (r"^wte\.", "model.embed_tokens."),
    (r"^ln_f\.", "model.norm."),
    (r"^h\.", "model.layers."),
    (r"\.ln_1\.", ".input_layernorm."),
    (r"\.ln_2\.", ".post_attention_layernorm."),
    (r"\.attn\.", ".self_attn."),
)


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
    if model.config.family == "gpt2":
        for name, weight in model.named_parameters():
            is_conv1d = weight.ndim == 2 and not name.startswith(("wte", "wpe"))
            found.append(Piece(f"transformer.{name}", name, is_transposed=is_conv1d))
        return found
    fused = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, Fused)}
    for name in dict(model.named_parameters()):
        theirs = name
        for ours, other in QWEN3_NAMES:
            theirs = re.sub(ours, other, theirs)
        if name not in fused:
            found.append(Piece(theirs, name))
            continue
        start, kinds = 0, ("q", "k", "v") if "qkv_proj" in name else ("gate", "up")
        for kind, size in zip(kinds, fused[name].sizes, strict=True):
            their_name = re.sub("qkv_proj|gate_up_proj", f"{kind}_proj", theirs)
            found.append(Piece(their_name, name, slice(start, start + size)))
            start += size
    return found


# ---------------------------------------------------------------------------------------------
# Ours -> theirs


def transformers_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The weights under transformers' names."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    weights["wte.weight"] = weights["wte.weight"][: shards.VOCAB_SIZE]
    named = {p.theirs: p.of(weights[p.ours]).contiguous() for p in pieces(model)}
    if model.config.family == "gpt2" and not model.config.bias:  # theirs always has biases
        for piece in pieces(model):
            if not piece.ours.startswith(("wte", "wpe")):
                bias = torch.zeros(len(weights[piece.ours]))
                named[f"{piece.theirs.removesuffix('weight')}bias"] = bias
    return named


def model_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of an export."""
    values = vars(config) | {
        "vocab_size": min(config.vocab_size, shards.VOCAB_SIZE),
        "num_kv_heads": config.kv_heads(),
        "head_size": config.head_dim(),
        "mlp_size": config.mlp_dim(),
    }
    common = {
        "model_type": config.family,
        "bos_token_id": shards.EOT_TOKEN,
        "eos_token_id": shards.EOT_TOKEN,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        **{theirs: values[ours] for theirs, ours in SIZES[config.family].items()},
        **{key: known[0] for key, (_, known) in FIXED[config.family].items()},
    }
    if config.family == "qwen3":
        return common | {
            "architectures": ["Qwen3ForCausalLM"],
            "rope_theta": config.rope_theta,
            "attention_dropout": 0.0,
        }
    return common | {
        "architectures": ["GPT2LMHeadModel"],
        "n_ctx": config.context_length,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


# ---------------------------------------------------------------------------------------------
# Theirs -> ours


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model and the weights of a folder in transformers' layout, under our names.

    The weights have the type that they are stored in, and may be views that are not contiguous.
    Raises ForgeError unless it is a model that we compute exactly.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ForgeError(
            "no model there" if folder.exists() else "no such folder",
            where=folder,
            fix="give a run of forge-train (the folder named with --out), one of its checkpoints, "
            "or a folder in transformers' GPT-2 or Qwen3 layout (to download a model of the hub: "
            "hf download NAME --local-dir FOLDER)",
        )
    config = read_config(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)
    with torch.device("meta"):  # only its names and shapes are needed
        model = build_model(config)
    return config, our_weights(model, read_tensors(folder), folder)


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
    files = [WEIGHTS_FILE]
    if not (folder / WEIGHTS_FILE).is_file():
        if not (folder / INDEX_FILE).is_file():
            pickled = any(folder.glob("*.bin"))
            raise ForgeError(
                f"no {WEIGHTS_FILE}"
                + (", only pickled weights, which can run any program when opened" * pickled),
                where=folder,
                fix="convert them with transformers: save_pretrained(FOLDER) writes safetensors",
            )
        places = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(places, dict):
            raise ForgeError("no weight_map", where=folder / INDEX_FILE, fix=AGAIN)
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


def our_weights(model: LanguageModel, tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Weights for `model` from tensors under transformers' names.

    Raises ForgeError if any is missing, unknown or of another shape, or if the head is not tied.
    """
    prefix = "transformer."  # GPT-2's, which some folders leave out
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    head = named.pop("lm_head.weight", None)
    # Old files list attention's masks among the weights.
    named = {n: t for n, t in named.items() if not n.endswith((".attn.bias", ".attn.masked_bias"))}
    parameters = dict(model.named_parameters())
    wanted = {p.theirs.removeprefix(prefix): p for p in pieces(model)}
    wrong = sorted({*named} ^ {*wanted})
    for name in {*named} & {*wanted}:
        shape = wanted[name].of(parameters[wanted[name].ours]).shape
        if named[name].shape != shape:
            wrong.append(f"{name} {tuple(named[name].shape)}, not {tuple(shape)}")
    if wrong:
        raise ForgeError(f"weights that differ: {', '.join(wrong[:5])}", where=where, fix=PUBLISHED)
    parts: dict[str, list[Tensor]] = {}
    for name, piece in wanted.items():
        tensor = named.pop(name)
        parts.setdefault(piece.ours, []).append(tensor.T if piece.is_transposed else tensor)
    weights = {n: torch.cat(each) if len(each) > 1 else each[0] for n, each in parts.items()}
    embedding = weights["wte.weight"]
    if head is not None and not torch.equal(head.to(embedding), embedding):
        raise ForgeError("the head is not tied to the token embedding", where=where, fix=PUBLISHED)
    return weights


def read_config(config: dict[str, Any], where: Path) -> ModelConfig:
    """The model that a config.json describes; ForgeError unless we compute it exactly."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FIXED:
        raise ForgeError(
            f"a model of type {family!r}; only GPT-2's and Qwen3's layouts can be read",
            where=where,
            fix=PUBLISHED,
        )
    if family == "gpt2":  # which was published without some of its sizes
        config = {"n_positions": 1024, "vocab_size": shards.VOCAB_SIZE} | config
    try:
        sizes = {ours: config[theirs] for theirs, ours in SIZES[family].items()}
    except KeyError as error:
        raise ForgeError(f"the config lacks {error}", where=where, fix=PUBLISHED) from error
    _check_sizes(sizes, where)
    different = [
        f"{key} is {config.get(key, default)!r}"
        for key, (default, known) in FIXED[family].items()
        if config.get(key, default) not in known
    ]
    if family == "gpt2" and config.get("n_inner") not in (None, 4 * sizes["embedding_size"]):
        different.append(f"n_inner is {config['n_inner']}")
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        different.append(f"rope_parameters is {rope!r}")
    if different:
        raise ForgeError(
            f"not the architecture that {family} was published with: {', '.join(different)}",
            where=where,
            fix=PUBLISHED,
        )
    if family == "gpt2":
        return ModelConfig(**sizes)
    theta = config.get("rope_theta") or rope.get("rope_theta")
    if not isinstance(theta, int | float) or not theta > 0:
        raise ForgeError(f"rope_theta is {theta!r}, not a number", where=where, fix=PUBLISHED)
    return ModelConfig(family="qwen3", bias=False, rope_theta=float(theta), **sizes)


def _check_sizes(sizes: dict[str, Any], where: Path) -> None:
    """ForgeError if a model of these sizes could not be built or run."""
    wrong = [
        f"{name} is {size!r}"
        for name, size in sizes.items()
        if not (type(size) is int and size > 0)
    ]
    if not wrong:
        heads, channels = sizes["num_heads"], sizes["embedding_size"]
        if sizes["vocab_size"] < shards.VOCAB_SIZE:
            wrong.append(
                f"{sizes['vocab_size']} tokens, and GPT-2's tokenizer has {shards.VOCAB_SIZE}"
            )
        if "head_size" not in sizes and channels % heads:
            wrong.append(f"{channels} channels for {heads} heads")
        if heads % sizes.get("num_kv_heads", heads):
            wrong.append(f"{heads} heads over {sizes['num_kv_heads']} of keys")
    if wrong:
        raise ForgeError(
            f"the config describes no model: {', '.join(wrong)}", where=where, fix=PUBLISHED
        )
