"""One step of decoding: the next token of B rows at a time, with a KV cache, in static memory.

Before: load.py, which brings the model. After: generate.py, which fills the rows.

Every row has its own length, and its text starts at position 0: prompts are padded on the right,
where causal attention does not look, so a row's numbers do not depend on its neighbours, but for
their last bits, which follow the batch's shape. On a GPU a whole step, the drawing included, is one
CUDA graph; it fits all lengths, since they are read there.
"""

import math
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.errors import ForgeError
from pipeline.shards import VOCAB_SIZE
from trainer.config import ModelConfig
from trainer.cross_entropy import HEAD_MULTIPLE
from trainer.model import GPT2, LanguageModel

MIN_TEMPERATURE = 1e-3  # below it, the likeliest token is taken
MAX_STEPS = 32  # between two looks at the tokens: waiting for a GPU costs as much as a step
PROMPT_MULTIPLE = 64  # to which prompts are padded
# cuDNN would plan its attention anew for each length of prompt, which takes longer than reading.
PROMPT_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the filters apply in this order. Temperature 0 is greedy."""

    repetition_penalty: float = 1.0  # Keskar et al. 2019, "CTRL", section 4.1
    temperature: float = 0.8
    top_k: int | None = None  # of so many likeliest tokens only
    top_p: float | None = None  # of the likeliest that together reach this probability
    min_p: float | None = None  # of those with this share of the likeliest one's probability

    def __post_init__(self) -> None:
        for name in ("repetition_penalty", "temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                option = f"--{name.replace('_', '-')}"
                raise ForgeError(
                    f"{option} must be a finite number, not {value}",
                    fix="give it one, or leave it out",
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with those of the tokens in `seen` (B, V) lowered."""
    less = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, less, logits)


def draw(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """Next tokens (B,) from logits (B, V), by the inverse of the cumulative distribution.

    `noise` (B,) is float64, uniform in [0, 1). Logits may be in bfloat16: the likeliest are found
    faster so, and the rest is in float32. Nothing here may touch the host, not even to copy a
    number: a CUDA graph records it. kernels.draw_top() chooses the same.
    """
    if sampling.is_greedy:
        return logits.argmax(-1)
    order = None
    if sampling.top_k is not None:
        logits, order = logits.topk(min(sampling.top_k, logits.shape[-1]))
    elif sampling.top_p is not None:
        logits, order = logits.sort(descending=True)
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # 0 for the first, which always stays
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    if sampling.min_p is not None:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    # In float64, so that the way in which a GPU adds up cannot show in the choice.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    chosen = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)
    chosen = chosen.clamp(max=logits.shape[-1] - 1)
    return (chosen if order is None else order.gather(1, chosen))[:, 0]


def has_kernels(weight: Tensor) -> bool:
    """Whether sampler/kernels.py serves tensors on this one's device."""
    return weight.is_cuda and find_spec("triton") is not None


class KVCache:
    """Keys and values of B rows, (L, 2, B, K, S, D), each row filled to its own length."""

    def __init__(self, config: ModelConfig, num_rows: int, weight: Tensor) -> None:
        heads, length = config.kv_heads(), config.context_length
        shape = (config.num_layers, 2, num_rows, heads, length, config.head_dim())
        # Zeros: what is masked out is still multiplied by 0.
        self.store = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=weight.device)
        self.each_row = torch.arange(num_rows, device=weight.device)
        self.has_kernels = has_kernels(weight)

    def for_prompts(self, rows: Tensor, length: int) -> "KVCache":
        """Make ready to read texts (len(rows), length) from position 0 on."""
        self.rows: Tensor | None = rows
        self.positions = torch.arange(length, device=rows.device)
        return self

    def for_step(self, longest: int, is_even: bool) -> "KVCache":
        """Make ready to read one token a row, which becomes the row's number `lengths`.

        `longest` is the most tokens that a row has then; `is_even` says that all have as many.
        """
        self.rows, self.longest = None, longest
        self.positions = self.lengths[:, None]
        self.mask = None
        if not (is_even or self.has_kernels):
            steps = torch.arange(longest, device=self.lengths.device)
            self.mask = (steps <= self.positions)[:, None, None]  # (B, 1, 1, longest)
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.store[layer]  # each (B, K, S, D)
        grouped = q.shape[1] != k.shape[1]
        if self.rows is not None:
            keys[self.rows, :, : k.shape[2]] = k.to(keys.dtype)
            values[self.rows, :, : v.shape[2]] = v.to(values.dtype)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        if self.has_kernels:
            from sampler import kernels

            return kernels.attend(q, k, v, keys, values, self.lengths)
        keys[self.each_row, :, self.lengths] = k[:, :, 0]
        values[self.each_row, :, self.lengths] = v[:, :, 0]
        keys, values = keys[:, :, : self.longest], values[:, :, : self.longest]
        return F.scaled_dot_product_attention(q, keys, values, self.mask, enable_gqa=grouped)


class Drawn:
    """Tokens (n, B) and their log-probabilities on their way from the device to here."""

    def __init__(self, tokens: Tensor, logs: Tensor | None) -> None:
        self.tokens, self.logs = self._sent(tokens), None if logs is None else self._sent(logs)
        self.arrived: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.arrived.record()

    def _sent(self, drawn: Tensor) -> Tensor:
        if not drawn.is_cuda:
            return drawn.clone()
        return torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True).copy_(
            drawn, non_blocking=True
        )

    def read(self) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens (B, n) and, if asked for, their log-probabilities under the model (B, n)."""
        if self.arrived:
            self.arrived.synchronize()
        return self.tokens.T.tolist(), [] if self.logs is None else self.logs.T.tolist()


class Decoder:
    """A model and B rows of text that it goes on with, all at once.

    A row's tokens but the last are in the cache; the last is what the next step reads.
    """

    @torch.inference_mode()
    def __init__(
        self, model: LanguageModel, num_rows: int, sampling: Sampling, log: bool = False
    ) -> None:
        weight = model.wte.weight
        self.model, self.num_rows, self.sampling = model, num_rows, sampling
        self.context_length = model.config.context_length
        self.num_tokens = min(VOCAB_SIZE, model.config.vocab_size)  # a config may have more rows
        self.device = weight.device
        self.cache = KVCache(model.config, num_rows, weight)
        self.lengths = [0] * num_rows  # of the rows' cached tokens, as the device has them
        self.last = torch.zeros(num_rows, dtype=torch.long, device=self.device)
        # Of the step in a run, once for each row.
        self.number = torch.zeros(num_rows, dtype=torch.long, device=self.device)
        # Of the steps of a run: what they draw from, what they drew, and how likely it was.
        self.noise = torch.zeros(MAX_STEPS, num_rows, dtype=torch.float64, device=self.device)
        self.drawn = torch.zeros(MAX_STEPS, num_rows, dtype=torch.long, device=self.device)
        self.logs = torch.zeros(MAX_STEPS, num_rows, device=self.device) if log else None
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(num_rows, self.num_tokens, dtype=torch.bool, device=self.device)
        self.is_fused = self.cache.has_kernels and (isinstance(model, GPT2) or num_rows == 1)
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.device.type == "cuda":
            with torch.inference_mode(False):  # the model may be used otherwise, too
                padded = F.pad(weight.detach(), (0, 0, 0, -len(weight) % HEAD_MULTIPLE))
                model.wte.weight = torch.nn.Parameter(padded, requires_grad=False)
            self._capture()

    def _capture(self) -> None:
        """Record a step as a CUDA graph, after a few that make the libraries ready."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step(self.context_length, is_even=False)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step(self.context_length, is_even=False)

    def _step(self, longest: int, is_even: bool) -> None:
        cache = self.cache.for_step(longest, is_even)
        if self.is_fused:
            from sampler import kernels

            logits = kernels.logits(self.model, self.last, cache)
        else:
            logits = self.model.logits(self.model.hidden(self.last[:, None], cache)[:, 0])
        logits = logits[:, : self.num_tokens]
        if self.seen is None:
            self._draw(logits)
        else:
            self._draw(penalize(logits, self.seen, self.sampling.repetition_penalty))
        if self.logs is not None:
            likely = logits.float().log_softmax(-1).gather(1, self.last[:, None])
            self.logs.index_copy_(0, self.number[:1] - 1, likely.T)
        if self.seen is not None:
            self.seen.scatter_(1, self.last[:, None], True)

    def _draw(self, logits: Tensor) -> None:
        """Draw from logits (B, V) into `drawn` and `last`, and count the step."""
        sampling = self.sampling
        top_k = 1 if sampling.is_greedy else sampling.top_k
        if self.cache.has_kernels and top_k is not None:
            from sampler import kernels

            if top_k <= kernels.MOST_TOP_K:
                kernels.draw_top(
                    logits,
                    min(top_k, logits.shape[1]),
                    max(sampling.temperature, MIN_TEMPERATURE),
                    sampling.top_p,
                    sampling.min_p,
                    self.noise,
                    self.number,
                    self.drawn,
                    self.last,
                    self.cache.lengths,
                )
                return
        token = draw(logits, sampling, self.noise.index_select(0, self.number[:1])[0])
        self.drawn.index_copy_(0, self.number[:1], token[None])
        self.last.copy_(token)
        self.cache.lengths += 1
        self.number += 1

    @torch.inference_mode()
    def read(self, texts: dict[int, list[int]]) -> None:
        """Put texts of 1 to context_length tokens into rows, in place of what they had."""
        rows = torch.tensor([*texts], dtype=torch.long, device=self.device)
        longest = max(len(tokens) for tokens in texts.values()) - 1
        if longest:
            length = longest + -longest % (PROMPT_MULTIPLE if self.device.type == "cuda" else 1)
            length = min(length, self.context_length)
            padded = [[*t[:-1], *[0] * (length - len(t) + 1)] for t in texts.values()]
            with sdpa_kernel(PROMPT_ATTENTION):
                tokens = torch.tensor(padded, device=self.device)
                self.model.hidden(tokens, self.cache.for_prompts(rows, length))
        self.last[rows] = torch.tensor([t[-1] for t in texts.values()], device=self.device)
        for row, text in texts.items():
            self.lengths[row] = len(text) - 1
            if self.seen is not None:
                self.seen[row] = False
                self.seen[row, torch.tensor(text, device=self.device)] = True

    @torch.inference_mode()
    def start(self, noise: Tensor) -> "Drawn":
        """Draw n <= MAX_STEPS tokens for every row from `noise` (n, B).

        A GPU is at it when this returns; the next start() or read() queues up behind it. Rows that
        nobody reads start at length 0 again, so that they never run out of room.
        """
        steps = len(noise)
        self.noise[:steps] = self._sent(noise)
        self.cache.lengths.copy_(self._sent(torch.tensor(self.lengths)))
        self.number.zero_()
        for _ in range(steps):
            if self.graph is not None:
                self.graph.replay()
            else:
                self._step(max(self.lengths) + 1, len({*self.lengths}) == 1)
            self.lengths = [length + 1 for length in self.lengths]
        return Drawn(self.drawn[:steps], None if self.logs is None else self.logs[:steps])

    def _sent(self, tensor: Tensor) -> Tensor:
        """A copy on the device; pinned on its way, because others wait until the GPU is idle."""
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def run(self, noise: Tensor) -> tuple[list[list[int]], list[list[float]]]:
        """start(), and wait for the tokens."""
        return self.start(noise).read()

    def clear(self, row: int) -> None:
        """Nobody reads this row any more."""
        self.lengths[row] = 0
