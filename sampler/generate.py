"""Checkpoint -> text: KV-cached decoding.

Before: trainer/checkpoint.py, the weights of a run. After: the terminal, by way of cli.py.
"""

import codecs
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import ForgeError
from pipeline.shards import EOT_TOKEN, VOCAB_SIZE, VOCABULARY_FILE, read_vocabulary
from trainer import checkpoint
from trainer.config import ModelConfig, load
from trainer.model import GPT2
from trainer.run import CONFIG_FILE

MIN_TEMPERATURE = 1e-3  # below it, the likeliest token is taken


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest."""

    temperature: float = 0.8
    top_k: int | None = None  # of so many likeliest tokens only
    top_p: float | None = None  # of the likeliest tokens that together reach this probability

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("top-p", self.top_p)):
            if value is not None and not math.isfinite(value):
                raise ForgeError(f"--{name} must be a number, not {value}")


class KVCache:
    """Keys and values of one sequence for all layers: (L, 1, H, T, D), filled from the left."""

    def __init__(self, config: ModelConfig, weight: Tensor) -> None:
        heads, size = config.num_heads, config.embedding_size // config.num_heads
        shape = (config.num_layers, 1, heads, config.context_length, size)
        self.keys = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.empty_like(self.keys)
        self.num_layers = config.num_layers
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        if layer == self.num_layers - 1:
            self.length = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def load_run(
    run: Path, step: int | None, device: torch.device
) -> tuple[GPT2, list[bytes], checkpoint.State]:
    """Model, vocabulary and state of a run at one of its checkpoints (default: the latest)."""
    if not (run / CONFIG_FILE).is_file():
        raise ForgeError("no run of forge-train", where=run, fix="give the folder named with --out")
    found = checkpoint.steps(run)
    if not found:
        raise ForgeError("the run has no checkpoint yet", where=run, fix="wait for the first one")
    if step is not None and step not in found:
        have = ", ".join(map(str, found))
        raise ForgeError(f"the run has no checkpoint of step {step}; it has {have}", where=run)
    chosen = found[-1] if step is None else step
    model = GPT2(load(str(run / CONFIG_FILE)).model)
    state = checkpoint.load_state(run, chosen)
    checkpoint.load_weights(checkpoint.checkpoint_path(run, chosen) / checkpoint.MODEL_FILE, model)
    model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model, read_vocabulary(run / VOCABULARY_FILE), state


@torch.inference_mode()
def generate(
    model: GPT2, prompt: list[int], max_tokens: int, sampling: Sampling, seed: int
) -> Iterator[int]:
    """Yield up to `max_tokens` new tokens, ending early before <|endoftext|>.

    An empty prompt starts from <|endoftext|>, as every document does. When the context is full, its
    older half is dropped and the rest is read again.
    """
    weight, length = model.wte.weight, model.config.context_length
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt) or [EOT_TOKEN]
    cache = KVCache(model.config, weight)
    unread = tokens[-(length - 1) :]
    for _ in range(max_tokens):
        if cache.length + len(unread) > length:
            cache.length, unread = 0, tokens[-(length // 2) :]
        x = model.hidden(torch.tensor([unread], device=weight.device), cache)
        token = draw(model.logits(x[0, -1]).float().cpu(), sampling, generator)
        if token == EOT_TOKEN:
            return
        tokens.append(token)
        unread = [token]
        yield token


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from logits (V,)."""
    logits[VOCAB_SIZE:] = -torch.inf  # rows that a config may have added
    if sampling.temperature < MIN_TEMPERATURE:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(logits):
        least = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(0)
    if sampling.top_p is not None:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered >= sampling.top_p  # the first always stays
        probabilities[order[beyond]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def stream(tokens: Iterator[int], vocabulary: list[bytes]) -> Iterator[str]:
    """Tokens as text, piece by piece; a character split over tokens waits for its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(vocabulary[token])
    yield decoder.decode(b"", final=True)
