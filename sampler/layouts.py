"""Our models in transformers' words: config.json, and which of their weights is which of ours.

Before: trainer/model.py's parameters. After: export.py, which writes such folders, and load.py,
which reads them. GPT2LMHeadModel's Conv1D layers hold the transpose of a Linear; Qwen3ForCausalLM
has as several matrices what is one product here.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline import shards
from pipeline.errors import ForgeError
from trainer.config import ModelConfig
from trainer.model import LAYER_NORM_EPS, RMS_NORM_EPS, Fused, LanguageModel

# What a config.json may say otherwise, and we would compute wrong: the default, and what is right.
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
PUBLISHED = "give a GPT-2 or Qwen3 model as it was published, or as forge-export writes it"
NO_SIZES = ("family", "bias", "rope_theta")  # of ModelConfig
QWEN3_NAMES = (
    (r"^wte\.", "model.embed_tokens."),
    (r"^ln_f\.", "model.norm."),
    (r"^h\.", "model.layers."),
    (r"\.ln_1\.", ".input_layernorm."),
    (r"\.ln_2\.", ".post_attention_layernorm."),
    (r"\.attn\.", ".self_attn."),
)


class Piece(NamedTuple):
    """One of their tensors: rows of one of our parameters, or the transpose of all of it."""

    theirs: str
    ours: str
    rows: slice = slice(None)
    is_transposed: bool = False

    def of(self, weight: Tensor) -> Tensor:
        """A view of our parameter in their shape."""
        return weight.T if self.is_transposed else weight[self.rows]


def pieces(model: LanguageModel) -> list[Piece]:
    """Their names, each once, for all parameters of `model`."""
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


def transformers_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The weights under transformers' names."""
    parameters = dict(model.named_parameters())
    named = {p.theirs: p.of(parameters[p.ours].detach()).contiguous() for p in pieces(model)}
    if model.config.family == "gpt2" and not model.config.bias:  # theirs always has biases
        for piece in pieces(model):
            if not piece.ours.startswith(("wte", "wpe")):
                bias = torch.zeros(len(parameters[piece.ours]))
                named[f"{piece.theirs.removesuffix('weight')}bias"] = bias
    return named


def fill(model: LanguageModel, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy weights by transformers' names; ForgeError if they are not just those that we need."""
    prefix = "transformer."  # GPT-2's, which some folders leave out
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    head = named.pop("lm_head.weight", None)
    # Old files carry attention's masks as if they were weights.
    named = {n: t for n, t in named.items() if not n.endswith((".attn.bias", ".attn.masked_bias"))}
    parameters = dict(model.named_parameters())
    wanted = {
        p.theirs.removeprefix(prefix): p.of(parameters[p.ours].detach()) for p in pieces(model)
    }
    wrong = sorted({*named} ^ {*wanted})
    for name in {*named} & {*wanted}:
        if named[name].shape != wanted[name].shape:
            wrong.append(f"{name} {tuple(named[name].shape)}, not {tuple(wanted[name].shape)}")
    if wrong:
        raise ForgeError(f"weights that differ: {', '.join(wrong[:5])}", where=where, fix=PUBLISHED)
    for name, place in wanted.items():
        place.copy_(named[name])
    if head is not None and not torch.equal(head.to(parameters["wte.weight"]), model.wte.weight):
        raise ForgeError("the head is not tied to the token embedding", where=where, fix=PUBLISHED)


def model_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of an export."""
    both = {
        "vocab_size": config.vocab_size,
        "bos_token_id": shards.EOT_TOKEN,
        "eos_token_id": shards.EOT_TOKEN,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
    if config.family == "qwen3":
        return both | {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": config.embedding_size,
            "intermediate_size": config.mlp_dim(),
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.kv_heads(),
            "head_dim": config.head_dim(),
            "max_position_embeddings": config.context_length,
            "rope_theta": config.rope_theta,
            "rms_norm_eps": RMS_NORM_EPS,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
        }
    return both | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.embedding_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def read_config(config: dict[str, Any], where: Path) -> ModelConfig:
    """What a config.json describes; ForgeError unless it is a model that we compute right."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FIXED:
        raise ForgeError(
            f"a model of type {family!r}; only GPT-2's and Qwen3's layouts can be read",
            where=where,
            fix=PUBLISHED,
        )
    different = [
        f"{key} is {config.get(key, default)!r}"
        for key, (default, known) in FIXED[family].items()
        if config.get(key, default) not in known
    ]
    if family == "gpt2" and config.get("n_inner") not in (None, 4 * config.get("n_embd", 0)):
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
    try:
        if family == "gpt2":
            found = ModelConfig(
                num_layers=config["n_layer"],
                num_heads=config["n_head"],
                embedding_size=config["n_embd"],
                context_length=config.get("n_positions", 1024),
                vocab_size=config.get("vocab_size", 50257),
            )
        else:
            found = ModelConfig(
                family="qwen3",
                num_layers=config["num_hidden_layers"],
                num_heads=config["num_attention_heads"],
                num_kv_heads=config["num_key_value_heads"],
                embedding_size=config["hidden_size"],
                head_size=config["head_dim"],
                mlp_size=config["intermediate_size"],
                rope_theta=float(config.get("rope_theta") or rope["rope_theta"]),
                context_length=config["max_position_embeddings"],
                vocab_size=config["vocab_size"],
                bias=False,
            )
    except KeyError as error:
        raise ForgeError(f"the config lacks {error}", where=where, fix=PUBLISHED) from error
    except (TypeError, ValueError) as error:
        raise ForgeError(
            f"the config's rope_theta is no number: {error}", where=where, fix=PUBLISHED
        ) from error
    _check_sizes(found, where)
    return found


def _check_sizes(config: ModelConfig, where: Path) -> None:
    """ForgeError where building or running the model would fail with something unreadable."""
    sizes = {name: size for name, size in vars(config).items() if name not in NO_SIZES}
    wrong = [
        f"{name} is {size!r}"
        for name, size in sizes.items()
        if size is not None and not (type(size) is int and size > 0)
    ]
    if not wrong and config.vocab_size < shards.VOCAB_SIZE:
        wrong.append(f"{config.vocab_size} tokens, and GPT-2's tokenizer has {shards.VOCAB_SIZE}")
    if not wrong and config.head_size is None and config.embedding_size % config.num_heads:
        wrong.append(f"{config.embedding_size} channels for {config.num_heads} heads")
    if not wrong and config.num_heads % config.kv_heads():
        wrong.append(f"{config.num_heads} heads over {config.kv_heads()} of keys")
    if wrong:
        raise ForgeError(
            f"the config describes no model: {', '.join(wrong)}", where=where, fix=PUBLISHED
        )
