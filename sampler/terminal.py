"""What forge-sample reads and shows: prompts in, text or JSON lines out, and the interactive mode.

Before: generate.py, which makes the texts. After: a person, or a program that reads JSON lines.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline import tokenizer
from pipeline.errors import ForgeError
from sampler.decode import Decoder, Sampling
from sampler.generate import Limits, Sample, generate
from sampler.load import Loaded

PARALLEL = {"cuda": 64, "cpu": 8}  # texts at a time: what a device can use


@dataclass(frozen=True)
class Prompt:
    text: str
    row: dict[str, Any] = field(default_factory=dict)  # what came with it in a .jsonl file
    where: str | None = None  # file and line


def is_jsonl(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


def read_prompt() -> Prompt:
    """All of standard input, less a line end at its end, as echo writes one."""
    if sys.stdin is None:
        raise ForgeError(
            "standard input is closed", fix="pipe a text in, or name it: --prompt TEXT"
        )
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ForgeError(
            f"cannot read the prompt: {getattr(error, 'strerror', None) or error}",
            where="standard input",
            fix="give --prompt - a text in UTF-8",
        ) from error
    return Prompt(text.replace("\r\n", "\n").removesuffix("\n"))


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file: a line each, or of a .jsonl file an object with "prompt" each."""
    try:
        # No other character ends a line here; Windows programs put a mark before the first.
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ForgeError(
            f"cannot read the prompts: {getattr(error, 'strerror', None) or error}",
            where=path,
            fix="give --prompts-file a file of text, one prompt a line",
        ) from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if not is_jsonl(path):
            prompts.append(Prompt(line.removesuffix("\r"), where=where))
            continue
        try:
            row = json.loads(line)
            if not isinstance(row["prompt"], str):
                raise TypeError("the prompt is no text")
            prompts.append(Prompt(row["prompt"], row, where))
        except (ValueError, KeyError, TypeError) as error:
            raise ForgeError(
                'not a JSON object with a text as its "prompt"',
                where=where,
                fix='write {"prompt": "..."} on each line',
            ) from error
    if not prompts:
        raise ForgeError("the file has no prompt", where=path, fix="write one a line")
    return prompts


class Session:
    """A loaded model with its decoder, and how texts are to be made."""

    def __init__(
        self, loaded: Loaded, sampling: Sampling, limits: Limits, num_rows: int, as_json: bool
    ) -> None:
        self.loaded, self.limits, self.as_json = loaded, limits, as_json
        try:
            self.decoder = Decoder(loaded.model, num_rows, sampling, log=as_json)
        except RuntimeError as error:  # a CPU has no OutOfMemoryError
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(
                error
            ):
                raise
            raise ForgeError(
                f"out of memory with {num_rows:,} texts at a time", fix="a smaller --parallel"
            ) from error

    def samples(self, prompts: list[Prompt], num_samples: int, seed: int) -> Iterator[Sample]:
        """num_samples of each prompt; the same seeds for each, counted up from `seed`."""
        length = self.decoder.context_length
        for place, prompt in enumerate(prompts):
            tokens = tokenizer.encode(prompt.text)
            if len(tokens) > length:
                _tell(f"The prompt has {len(tokens):,} tokens: only the last {length:,} are read.")
            for number in range(num_samples):
                yield Sample(place * num_samples + number, tokens, seed + number)

    def check(self, prompts: list[Prompt]) -> None:
        """ForgeError if a prompt is longer than the context, and may not be cut."""
        length = self.decoder.context_length
        for prompt in [] if self.limits.slides else prompts:
            if (count := len(tokenizer.encode(prompt.text))) > length:
                raise ForgeError(
                    f"a prompt of {count:,} tokens; the context has {length:,}",
                    where=prompt.where,
                    fix="shorten it, or --at-context-end slide, which reads the end of it",
                )

    def write(self, prompts: list[Prompt], num_samples: int, seed: int) -> None:
        """Write all texts to standard output, in order; the one at hand streams."""
        self.check(prompts)
        total = len(prompts) * num_samples
        grown = generate(
            self.decoder,
            self.samples(prompts, num_samples, seed),
            self.loaded.vocabulary,
            self.limits,
        )
        started, num_tokens = time.perf_counter(), 0
        quiet = total == 1 or not sys.stderr.isatty() or (sys.stdout.isatty() and not self.as_json)
        with tqdm(total=total, unit="text", disable=quiet, file=sys.stderr) as progress:

            def counted() -> Iterator[Sample]:
                nonlocal num_tokens
                for sample in grown:
                    if sample.finish:
                        progress.update()
                        num_tokens += len(sample.tokens)
                    yield sample

            for sample, text, is_new in in_order(counted()):
                prompt = prompts[sample.number // num_samples]
                if self.as_json:
                    if sample.finish:
                        print(json.dumps(self.to_row(sample, prompt)), flush=True)
                    continue
                if is_new and total > 1:
                    name = f"--- sample {sample.number + 1} of {total}, seed {sample.seed}\n"
                    sys.stdout.write(name)
                if is_new:
                    sys.stdout.write(prompt.text)
                sys.stdout.write(text + ("\n" if sample.finish else ""))
                sys.stdout.flush()
        seconds = time.perf_counter() - started
        if sys.stderr.isatty():
            _tell(f"{num_tokens:,} tokens, {num_tokens / seconds:,.0f} tokens/s")

    def to_row(self, sample: Sample, prompt: Prompt) -> dict[str, Any]:
        state = self.loaded.state
        return {
            **prompt.row,
            **({"step": state.step} if state else {}),
            "seed": sample.seed,
            "prompt": prompt.text,
            "text": sample.text,
            "finish": sample.finish,
            "tokens": sample.tokens,
            "logprobs": [round(value, 6) for value in sample.logprobs],
        }

    def interact(self, num_samples: int, seed: int, ask: Callable[[str], str] = input) -> None:
        """Prompts from the terminal until Ctrl-D; Ctrl-C ends the text at hand."""
        _tell("A prompt a line. Ctrl-C stops a text, Ctrl-D leaves.")
        with _line_history():
            while True:
                try:
                    line = ask("> ")
                    # Raised before Ctrl-C can come: the same prompt again gives another text.
                    first, seed = seed, seed + num_samples
                    self.write([Prompt(line)], num_samples, first)
                except ForgeError as error:
                    _tell(f"Error: {error}")
                except KeyboardInterrupt:
                    print()
                except EOFError:
                    print()
                    return


def in_order(samples: Iterable[Sample]) -> Iterator[tuple[Sample, str, bool]]:
    """(sample, the new part of its text, whether it is its first): one sample after the other.

    The first that is not finished streams; those behind it wait for their turn.
    """
    waiting: dict[int, Sample] = {}
    current, shown = 0, -1  # which sample streams, and how much of it was shown; -1: nothing yet
    for grown in samples:
        waiting[grown.number] = grown
        while (sample := waiting.get(current)) is not None:
            new = sample.text[max(shown, 0) :]
            yield sample, new, shown < 0
            shown = len(sample.text)
            if sample.finish is None:
                break
            del waiting[current]
            current, shown = current + 1, -1


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _line_history() -> Iterator[None]:
    """Line editing, with the prompts of earlier sessions, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = folder / "llm-forge" / "prompts"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(path)
