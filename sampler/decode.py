"""Decodes B rows of text, one token per step, with a KV cache in static memory.

Every row has its own length, and its text starts at position 0: prompts are padded on the right,
where causal attention does not look, so a row's numbers do not depend on its neighbours, except in
their last bits, which follow the batch's shape. On a GPU a whole step, the drawing included, is one
CUDA graph for all lengths, since it reads them there.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.shards import VOCAB_SIZE
from sampler.draw import Sampling, Steps, draw, penalize
from trainer.config import ModelConfig
from trainer.cross_entropy import HEAD_MULTIPLE
from trainer.model import LanguageModel

PROMPT_MULTIPLE = 64  # to which prompts are padded
# cuDNN plans its attention anew for each length of prompt, which takes longer than reading it.
PROMPT_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def has_kernels(weight: Tensor) -> bool:
    """Whether fast.py and attention.py, which need Triton, run on this tensor's device."""
    return weight.is_cuda and find_spec("triton") is not None


class KVCache:
    """Keys and values of B rows, (L, 2, B, K, S, D), each row filled to its own length."""

    def __init__(self, config: ModelConfig, num_rows: int, weight: Tensor) -> None:
        heads, length = config.kv_heads(), config.context_length
        shape = (config.num_layers, 2, num_rows, heads, length, config.head_dim())
        # Zeros, since masked values are still multiplied by 0.
        self.store = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=weight.device)
        self.each_row = torch.arange(num_rows, device=weight.device)
        self.has_kernels = has_kernels(weight)

    def for_prompts(self, rows: Tensor, length: int) -> "KVCache":
        """Prepare to read texts (len(rows), length) from position 0 on."""
        self.rows: Tensor | None = rows
        self.positions = torch.arange(length, device=rows.device)
        return self

    def for_step(self, longest: int) -> "KVCache":
        """Prepare to read one token a row, at position `lengths`.

        `longest` is the number of tokens in the longest row after that.
        """
        self.rows, self.longest = None, longest
        self.positions = self.lengths[:, None]
        if not self.has_kernels:  # which read the lengths themselves
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
            from sampler import attention

            return attention.attend(q, k, v, keys, values, self.lengths)
        keys[self.each_row, :, self.lengths] = k[:, :, 0]
        values[self.each_row, :, self.lengths] = v[:, :, 0]
        keys, values = keys[:, :, : self.longest], values[:, :, : self.longest]
        return F.scaled_dot_product_attention(q, keys, values, self.mask, enable_gqa=grouped)


class Drawn:
    """Tokens (n, B) and their log-probabilities on their way from the device to the host.

    `lengths` are those of the rows' cached tokens once they are drawn.
    """

    def __init__(self, tokens: Tensor, logs: Tensor | None, lengths: list[int]) -> None:
        self.lengths = lengths
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
    """A model and B rows of text that it continues, all at once.

    All of a row's tokens but the last are in the cache; the next step reads the last.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: LanguageModel,
        num_rows: int,
        sampling: Sampling,
        log: bool = False,
        num_tokens: int = VOCAB_SIZE,
    ) -> None:
        """Only the first `num_tokens` of the model's vocabulary are drawn."""
        weight = model.wte.weight
        self.model, self.sampling = model, sampling
        self.num_tokens = min(num_tokens, model.config.vocab_size)
        self.num_rows, self.context_length = num_rows, model.config.context_length
        self.cache = KVCache(model.config, num_rows, weight)
        self.steps = Steps(num_rows, weight.device, log)
        self.lengths = [0] * num_rows  # of the rows' cached tokens, as the device has them
        self.seen: Tensor | None = None  # (B, V): the tokens of each row, for the penalty
        if sampling.repetition_penalty != 1:
            shape = num_rows, self.num_tokens
            self.seen = torch.zeros(shape, dtype=torch.bool, device=weight.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if weight.is_cuda:
            with torch.inference_mode(False):  # the model may be used elsewhere, too
                padded = F.pad(weight.detach(), (0, 0, 0, -len(weight) % HEAD_MULTIPLE))
                model.wte.weight = torch.nn.Parameter(padded, requires_grad=False)
            self._capture()

    @property
    def device(self) -> torch.device:
        return self.cache.lengths.device

    def _capture(self) -> None:
        """Record a step as a CUDA graph, after a few that initialize the libraries."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step(self.context_length)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step(self.context_length)

    def _step(self, longest: int) -> None:
        """Read each row's last token, and draw the next."""
        steps = self.steps
        logits = self._logits(self.cache.for_step(longest))
        if self.seen is None:
            self._draw(logits)
        else:
            self._draw(penalize(logits, self.seen, self.sampling.repetition_penalty))
        if steps.logs is not None:
            likely = logits.float().log_softmax(-1).gather(1, steps.last[:, None])
            steps.logs.index_copy_(0, steps.number[:1] - 1, likely.T)
        if self.seen is not None:
            self.seen.scatter_(1, steps.last[:, None], True)

    def _logits(self, cache: KVCache) -> Tensor:
        """(B, num_tokens): a config may have padded the vocabulary with more rows."""
        model, last, num_tokens = self.model, self.steps.last, self.num_tokens
        if cache.has_kernels:
            from sampler import fast

            if fast.has_step(model, self.num_rows):
                return fast.logits(model, last, cache.store, cache.lengths)[:, :num_tokens]
        return model.logits(model.hidden(last[:, None], cache)[:, 0])[:, :num_tokens]

    def _draw(self, logits: Tensor) -> None:
        """Draw from logits (B, V) into `steps`, and count the step."""
        steps, sampling = self.steps, self.sampling
        if self.cache.has_kernels:
            from sampler import fast

            if fast.has_draw(logits, sampling):
                fast.draw_top(logits, sampling, steps, self.cache.lengths)
                return
        token = draw(logits, sampling, steps.noise.index_select(0, steps.number[:1])[0])
        steps.drawn.index_copy_(0, steps.number[:1], token[None])
        steps.last.copy_(token)
        self.cache.lengths += 1
        steps.number += 1

    @torch.inference_mode()
    def read(self, texts: dict[int, list[int]]) -> None:
        """Replace the texts of some rows: 1 to context_length tokens each."""
        rows = torch.tensor([*texts], dtype=torch.long, device=self.device)
        longest = max(len(tokens) for tokens in texts.values()) - 1
        if longest:
            length = longest + -longest % (PROMPT_MULTIPLE if self.device.type == "cuda" else 1)
            length = min(length, self.context_length)
            padded = [[*t[:-1], *[0] * (length - len(t) + 1)] for t in texts.values()]
            with sdpa_kernel(PROMPT_ATTENTION):
                tokens = torch.tensor(padded, device=self.device)
                self.model.hidden(tokens, self.cache.for_prompts(rows, length))
        self.steps.last[rows] = torch.tensor([t[-1] for t in texts.values()], device=self.device)
        for row, text in texts.items():
            self.lengths[row] = len(text) - 1
            if self.seen is not None:
                self.seen[row] = False
                self.seen[row, torch.tensor(text, device=self.device)] = True
                self.seen[row, VOCAB_SIZE:] = False  # a chat's markers, which have to come again

    @torch.inference_mode()
    def start(self, noise: Tensor) -> Drawn:
        """Draw n <= MAX_STEPS tokens for every row from `noise` (n, B).

        A GPU may still be drawing when this returns; the next start() or read() queues up behind.
        """
        steps, count = self.steps, len(noise)
        steps.noise[:count] = self._sent(noise)
        self.cache.lengths.copy_(self._sent(torch.tensor(self.lengths)))
        steps.number.zero_()
        for _ in range(count):
            if self.graph is not None:
                self.graph.replay()
            else:
                self._step(max(self.lengths) + 1)
            self.lengths = [length + 1 for length in self.lengths]
        logs = None if steps.logs is None else steps.logs[:count]
        return Drawn(steps.drawn[:count], logs, list(self.lengths))

    def _sent(self, tensor: Tensor) -> Tensor:
        """A copy on the device, through pinned memory: other copies wait until the GPU is idle."""
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def clear(self, row: int) -> None:
        """Empty a row that is not in use, so that it does not run out of room."""
        self.lengths[row] = 0
