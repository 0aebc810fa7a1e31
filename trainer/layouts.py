"""Our models in transformers' layout, read and written: config.json and safetensors files.

GPT2LMHeadModel's Conv1D layers hold the transpose of a Linear; Qwen3ForCausalLM has several
matrices where we have one. A padded vocabulary of ours is cut to its tokens in theirs.
"""

import json
import re
from pathlib import Path
from typing import Any, cast

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
PUBLISHED = "give a GPT-2 or Qwen3 model with GPT-2's tokenizer, as published or as exported"
# Keys of config.json that change what is computed, and what we compute. transformers has these
# defaults, too, but for tied embeddings, and where these are not tied, the weights show it.
COMPUTED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "qwen3": {
        "rms_norm_eps": RMS_NORM_EPS,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_scaling": None,
        "tie_word_embeddings": True,
    },
}
SAME = {"gelu_new": "gelu_pytorch_tanh"}  # another name of the same function
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


def their_views(model: LanguageModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of the model's parameters, as views under transformers' names."""
    found, is_gpt2 = dict[str, Tensor](), model.config.family == "gpt2"
    for name, tensor in tensors.items():
        theirs = name
        for ours, other in NAMES[model.config.family].items():
            theirs = re.sub(ours, other, theirs)
        module, kind = name.removesuffix(".weight"), name.split(".")[-2]
        if kind in PARTS:
            sizes = list(cast(Fused, model.get_submodule(module)).sizes)
            for part, rows in zip(PARTS[kind], torch.split(tensor, sizes), strict=True):
                found[theirs.replace(kind, part)] = rows
        else:
            is_conv1d = is_gpt2 and name.startswith("h.") and tensor.ndim == 2
            found[theirs] = tensor.T if is_conv1d else tensor
    return found


def weights_of(model: LanguageModel) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


# ---------------------------------------------------------------------------------------------
# Ours -> theirs


def transformers_weights(
    model: LanguageModel, num_tokens: int = shards.VOCAB_SIZE
) -> dict[str, Tensor]:
    """The weights under transformers' names, with the embedding of `num_tokens` tokens."""
    weights = weights_of(model)
    weights["wte.weight"] = weights["wte.weight"][:num_tokens]
    if model.config.family == "gpt2" and not model.config.bias:  # theirs always has biases
        for name in [name for name in weights if not name.startswith(("wte", "wpe"))]:
            weights[f"{name.removesuffix('weight')}bias"] = torch.zeros(len(weights[name]))
    return {name: view.contiguous() for name, view in their_views(model, weights).items()}


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
        **COMPUTED[config.family],
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


def read_folder(folder: Path) -> LanguageModel:
    """The model in a folder in transformers' layout; ForgeError unless we compute it exactly."""
    config, prefix = read_model(folder), "transformer."  # GPT-2's, which some folders leave out
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = ", only pickled weights, which can run any program when opened"
        what = f"no {WEIGHTS_FILE}{pickled * any(folder.glob('*.bin'))}"
        fix = "make one with transformers: save_pretrained(FOLDER, max_shard_size='100GB')"
        raise ForgeError(what, where=folder, fix=fix)
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.read_tensors(folder / WEIGHTS_FILE).items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))  # old files list these masks
    }
    head = tensors.pop("lm_head.weight", None)
    with torch.device("meta"):  # for names and shapes alone
        model = build_model(config)
    wanted = their_views(model, weights_of(model)).items()
    differing = {(name.removeprefix(prefix), view.shape) for name, view in wanted}
    differing ^= {(name, tensor.shape) for name, tensor in tensors.items()}
    if differing:
        names = sorted({name for name, _ in differing})
        what = f"weights that are missing, unknown or of another shape: {', '.join(names[:5])}"
        raise ForgeError(what, where=folder, fix=PUBLISHED)
    model = build_model(config)
    for name, view in their_views(model, weights_of(model)).items():
        view.copy_(tensors[name.removeprefix(prefix)])
    if head is not None and not torch.equal(head.to(model.wte.weight), model.wte.weight):
        what = "the head is not tied to the token embedding"
        raise ForgeError(what, where=folder, fix=PUBLISHED)
    return model


def read_model(folder: Path) -> ModelConfig:
    """The model of a folder in transformers' layout; ForgeError unless we compute it exactly."""
    where = folder / CONFIG_FILE
    if not where.is_file():
        fix = (
            "give a run of forge-train (its --out), one of its checkpoints, or a folder in "
            "transformers' GPT-2 or Qwen3 layout (hf download NAME --local-dir FOLDER)"
        )
        what = "no model there" if folder.exists() else f"no such folder in {Path.cwd()}"
        raise ForgeError(what, where=folder, fix=fix)
    config = read_json(where)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in SIZES:
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
        f"{key} is {config[key]!r}"
        for key, ours in COMPUTED[family].items()
        if config.get(key, ours) not in (ours, SAME.get(ours, ours))
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ForgeError(f"cannot read: {error}", where=path, fix=AGAIN) from error
    if not isinstance(content, dict):
        raise ForgeError("not a JSON object", where=path, fix=AGAIN)
    return content
