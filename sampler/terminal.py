"""forge-sample's input and output: prompts in, text or JSON lines out, and the interactive mode."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline import tokenizer
from pipeline.errors import ForgeError
from sampler.decode import Decoder
from sampler.draw import Sampling
from sampler.generate import Limits, Sample, generate
from sampler.lines import read_lines
from sampler.load import Loaded

PARALLEL = {"cuda": 64, "cpu": 8}  # texts at a time; more are not faster


@dataclass(frozen=True)
class Prompt:
    """A text to continue or to answer; `row` may have a conversation's "messages" instead."""

    text: str
    row: dict[str, Any] = field(default_factory=dict)  # its object in a .jsonl file
    where: str | None = None  # file and line


def is_jsonl(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


def read_prompt() -> Prompt:
    """All of standard input, without the final line end that echo writes."""
    where, fix = "standard input", "pipe a text in UTF-8 in, or name it: --prompt TEXT"
    if sys.stdin is None:
        raise ForgeError("standard input is closed", where=where, fix=fix)
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        what = f"cannot read the prompt: {getattr(error, 'strerror', None) or error}"
        raise ForgeError(what, where=where, fix=fix) from error
    return Prompt(text.replace("\r\n", "\n").removesuffix("\n"))


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: one per line, or a .jsonl file of "prompt" or "messages" objects."""
    prompts = []
    for where, line in read_lines(path, "--prompts-file", "prompt"):
        if not is_jsonl(path):
            prompts.append(Prompt(line.removesuffix("\r"), where=where))
            continue
        try:
            row = json.loads(line)
            text = row.get("prompt", "") if "messages" in row else row["prompt"]
            if not isinstance(text, str):
                raise TypeError("the prompt is not a string")
            prompts.append(Prompt(text, row, where))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = 'not a JSON object with a text as its "prompt", or with "messages"'
            fix = 'write {"prompt": "..."} on each line'
            raise ForgeError(what, where=where, fix=fix) from error
    return prompts


class Session:
    """A loaded model with its decoder, and how texts are to be generated."""

    help = "One prompt per line. Ctrl-C stops a text, Ctrl-D leaves."
    echoes_prompt = True  # before the text that continues it

    def __init__(
        self, loaded: Loaded, sampling: Sampling, limits: Limits, num_rows: int, as_json: bool
    ) -> None:
        self.loaded, self.limits, self.as_json = loaded, limits, as_json
        self.num_rows = num_rows
        self.draw_by(sampling)

    def draw_by(self, sampling: Sampling) -> None:
        """Make a decoder for `sampling`, which a GPU's graph of a step contains."""
        num_rows, num_tokens = self.num_rows, len(self.loaded.vocabulary)
        try:
            self.decoder = Decoder(
                self.loaded.model, num_rows, sampling, log=self.as_json, num_tokens=num_tokens
            )
        except RuntimeError as error:  # a CPU has no OutOfMemoryError
            is_memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
            if not is_memory:
                raise
            what = f"out of memory with {num_rows:,} texts at a time"
            raise ForgeError(what, fix="a smaller --parallel") from error

    def encode(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt. One too long for the context is an error, or is cut with a note."""
        if "prompt" not in prompt.row and "messages" in prompt.row:
            what = "a conversation, for a model that continues text"
            fix = 'give a model that was trained on chat, or a "prompt" (and no --base)'
            raise ForgeError(what, where=prompt.where, fix=fix)
        most = self.decoder.context_length
        tokens = tokenizer.encode(prompt.text)
        if len(tokens) > most and not self.limits.slides:
            what = f"a prompt of {len(tokens):,} tokens; the context has {most:,}"
            fix = "shorten it, or --at-context-end slide, which reads the end of it"
            raise ForgeError(what, where=prompt.where, fix=fix)
        if len(tokens) > most:
            tell(f"The prompt has {len(tokens):,} tokens: only the last {most:,} are read.")
        return tokens

    def stream(self, prompt: Prompt, seed: int) -> Iterator[str]:
        """The text that follows a prompt, whenever it has grown."""
        samples = [Sample(0, self.encode(prompt), seed)]
        for sample in generate(self.decoder, samples, self.loaded.vocabulary, self.limits):
            yield sample.text

    def write(self, prompts: list[Prompt], num_samples: int, seed: int) -> None:
        """Write num_samples texts of each prompt to standard output, in order.

        Every prompt has the same seeds, from `seed` up. The first unfinished text streams; later
        ones wait for their turn.
        """
        total, texts = len(prompts) * num_samples, map(self.encode, prompts)
        samples = (
            Sample(place * num_samples + number, tokens, seed + number)
            # A prompt that is an error is found before any text is written.
            for place, tokens in enumerate(texts if self.limits.slides else [*texts])
            for number in range(num_samples)
        )
        grown = generate(self.decoder, samples, self.loaded.vocabulary, self.limits)
        for sample in in_order(grown):
            self.show(sample, prompts[sample.number // num_samples], total)

    def show(self, sample: Sample, prompt: Prompt, total: int) -> None:
        """Write what is new in a sample's text; JSON is written at its end."""
        if self.as_json:
            if sample.finish:
                print(json.dumps(self.to_row(sample, prompt)), flush=True)
            return
        if sample.num_shown is None and total > 1:
            sys.stdout.write(f"--- sample {sample.number + 1} of {total}, seed {sample.seed}\n")
        if sample.num_shown is None and self.echoes_prompt:
            sys.stdout.write(prompt.text)
        sys.stdout.write(sample.text[sample.num_shown :] + ("\n" if sample.finish else ""))
        sys.stdout.flush()
        sample.num_shown = len(sample.text)

    def to_row(self, sample: Sample, prompt: Prompt) -> dict[str, Any]:
        state = self.loaded.state
        return {
            **prompt.row,
            **({"step": state.step} if state else {}),
            "seed": sample.seed,
            **({} if "messages" in prompt.row else {"prompt": prompt.text}),
            "text": sample.text,
            "finish": sample.finish,
            "tokens": sample.tokens,
            "logprobs": [round(value, 6) for value in sample.logprobs],
        }

    def interact(self, num_samples: int, seed: int, ask: Callable[[str], str] = input) -> None:
        """Read prompts from the terminal until Ctrl-D. Ctrl-C ends the current text."""
        tell(self.help)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing)
        while True:
            try:
                line = ask("> ")
                # Raised before Ctrl-C can come: the same prompt again gives another text.
                first, seed = seed, seed + num_samples
                self.respond(line, num_samples, first)
            except ForgeError as error:
                tell(f"Error: {error}")
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return

    def respond(self, line: str, num_samples: int, seed: int) -> None:
        """Write what follows a line that was typed. EOFError ends the interactive mode."""
        self.write([Prompt(line)], num_samples, seed)


def in_order(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Samples that have grown, one after the other: those after the current one wait."""
    waiting: dict[int, Sample] = {}
    current = 0
    for grown in samples:
        waiting[grown.number] = grown
        while (sample := waiting.get(current)) is not None:
            yield sample
            if sample.finish is None:
                break
            del waiting[current]
            current += 1


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
