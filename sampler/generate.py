"""Generates texts from prompts: fills the decoder's rows, and reads them until each text ends."""

import codecs
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from xxhash import xxh3_64_intdigest

from pipeline.errors import ForgeError
from pipeline.shards import EOT_TOKEN
from sampler.decode import Decoder, Drawn
from sampler.draw import MAX_STEPS

Finish = Literal["eot", "stop", "length", "context"]


@dataclass(frozen=True)
class Limits:
    """Where texts end, besides <|endoftext|> and the markers of a chat."""

    max_tokens: int = 100
    stops: tuple[str, ...] = ()  # strings; the text ends before the first of them
    slides: bool = True  # at the context's end, drop the older half of it; else end there

    def __post_init__(self) -> None:
        if "" in self.stops:
            raise ForgeError("--stop is empty", fix="name a text, or leave it out")


@dataclass
class Sample:
    """A growing text. With an empty prompt it starts from <|endoftext|>, as documents do."""

    number: int
    prompt: list[int]
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # natural logarithms, if asked for
    text: str = ""  # what may be shown: whole characters, and no possible start of a stop
    num_shown: int | None = None  # characters of it; None: not even the prompt
    finish: Finish | None = None

    def __post_init__(self) -> None:
        # From seed and prompt: the prompts of a file share a seed, but not their random numbers.
        prompt = xxh3_64_intdigest(np.array(self.prompt, "<u4").tobytes())
        stream = np.random.SeedSequence((self.seed, prompt))
        self._generator = np.random.Generator(np.random.Philox(stream))
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def noise(self, count: int) -> npt.NDArray[np.float64]:
        """The next uniform numbers of this text (count,), which no other text changes.

        The tokens drawn with them may still depend on the batch's shape: logits' last bits do.
        """
        return self._generator.random(count)

    def history(self, most: int) -> list[int]:
        """The last tokens of the text so far, at most `most`."""
        return ((self.prompt or [EOT_TOKEN]) + self.tokens)[-most:]

    def take(
        self, tokens: list[int], logs: list[float], vocabulary: list[bytes], limits: Limits
    ) -> None:
        """Add the tokens that were drawn, up to the text's end."""
        tokens = tokens[: limits.max_tokens - len(self.tokens)]
        end = next((n for n, token in enumerate(tokens) if token >= EOT_TOKEN), None)
        if end is not None:  # the end of a text or of an answer; no special token is part of it
            tokens = tokens[:end]
            self.finish = "eot"
        elif len(self.tokens) + len(tokens) == limits.max_tokens:
            self.finish = "length"
        for piece in [[token] for token in tokens] if limits.stops else [tokens]:
            self.tokens += piece
            self._held += self._decoder.decode(b"".join(vocabulary[token] for token in piece))
            found = [self._held.find(stop) for stop in limits.stops if stop in self._held]
            if found:
                self._held = self._held[: min(found)]
                self.finish = "stop"
                break
            waiting = max((_overlap(self._held, stop) for stop in limits.stops), default=0)
            self.text += self._held[: len(self._held) - waiting]
            self._held = self._held[len(self._held) - waiting :]
        self.logprobs = (self.logprobs + logs)[: len(self.tokens)]
        if self.finish:
            self.end(self.finish)

    def end(self, finish: Finish) -> None:
        rest = "" if finish == "stop" else self._decoder.decode(b"", final=True)
        self.text, self._held, self.finish = self.text + self._held + rest, "", finish


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def generate(
    decoder: Decoder, samples: Iterable[Sample], vocabulary: list[bytes], limits: Limits
) -> Iterator[Sample]:
    """Write all samples, as many at a time as the decoder has rows.

    Yields a sample whenever it has grown, and with its `finish` set once, at its end. A row whose
    text has ended takes the next sample at once.
    """
    waiting, length = iter(samples), decoder.context_length
    rows: list[Sample | None] = [None] * decoder.num_rows
    queued = [0] * decoder.num_rows  # tokens of each row's text that are drawn or being drawn
    stride, most_pending = (1, 1) if decoder.graph is None else (MAX_STEPS, 2)
    unread: dict[int, list[int]] = {}
    pending: deque[tuple[Drawn, dict[int, Sample]]] = deque()  # the latter by their rows
    while True:
        for row, old in enumerate(rows):
            if old is None and (new := next(waiting, None)) is not None:
                rows[row], queued[row] = new, 0
                unread[row] = new.history(length)
        if unread:
            decoder.read(unread)
            unread = {}
        active = {row: sample for row, sample in enumerate(rows) if sample is not None}
        steps = 0
        if active:
            room = min(length - decoder.lengths[row] for row in active)
            steps = min(stride, room, max(limits.max_tokens - queued[row] for row in active))
        if steps > 0:
            for row in set(range(len(rows))) - active.keys():
                decoder.clear(row)
            noise = np.zeros((steps, len(rows)))
            for row, sample in active.items():
                noise[:, row] = sample.noise(steps)
                queued[row] += steps
            pending.append((decoder.start(torch.from_numpy(noise)), active))
            if len(pending) < most_pending:
                continue  # the GPU draws on while we read the tokens before
        if not pending:
            return
        drawn, active = pending.popleft()
        tokens, logs = drawn.read()
        for row, sample in active.items():
            if sample.finish is not None:
                continue  # it ended in earlier steps
            sample.take(tokens[row], logs[row] if logs else [], vocabulary, limits)
            if sample.finish is None and drawn.lengths[row] == length:
                if limits.slides:
                    unread[row] = sample.history(max(1, length // 2))
                else:
                    sample.end("context")
            yield sample
            if sample.finish is not None:
                rows[row] = None
