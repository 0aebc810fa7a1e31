"""How a tuned model answers: which answers end by themselves, and what packing costs.

    python -m tests.benchmarks.chat RUN --data DIR [--split val] [--num-prompts 200]

DIR is a folder of forge-prep chat that RUN was not tuned on. "Packed" is the loss over the
assistant's words as training has it: several conversations in a window, each of which sees those
before it. "Alone" is the same of the same conversations, each in a window of its own. Answers are
to the first question of each conversation, at temperature 0.7 and top-p 0.9, of 256 tokens at most.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch

from pipeline import chatml
from pipeline.shards import EOT_TOKEN, load_index
from sampler.decode import Decoder
from sampler.draw import Sampling
from sampler.generate import Limits, Sample, generate
from sampler.load import Loaded, best_device, open_model
from sampler.score import Answer, score
from trainer.windows import Windows

Tokens = npt.NDArray[np.uint16]


def conversations(window: Tokens) -> Iterator[Tokens]:
    """The conversations packed in a window, each from its <|endoftext|> to its last turn's end."""
    starts = [*np.flatnonzero(window[:-1] == EOT_TOKEN), len(window) - 1]
    for start, stop in pairwise(starts):
        yield window[start:stop]


def loss(loaded: Loaded, windows: Tokens) -> tuple[float, int]:
    """Nats over the assistant's words of (n, T + 1) windows, and their number."""
    asked = [Answer(window.astype(np.int64), chatml.trained(window)) for window in windows]
    scores = score(loaded.model, asked)
    return sum(each.nats for each in scores), sum(each.num_tokens for each in scores)


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--split", type=click.Choice(["train", "val"]), default="val", show_default=True)
@click.option("--num-prompts", type=int, default=200, show_default=True)
@torch.inference_mode()
def main(run: Path, data: Path, split: str, num_prompts: int) -> None:
    device = best_device()
    loaded = open_model(run, None, device, torch.float32)
    length = loaded.model.config.context_length
    windows = Windows(load_index(data), split, length)
    packed = windows.read(np.arange(windows.num_windows))
    each = [found for window in packed for found in conversations(window)]
    alone = np.full((len(each), length + 1), chatml.IM_END, np.uint16)
    for row, tokens in zip(alone, each, strict=True):
        row[: len(tokens)] = tokens
    for name, rows in (("packed", packed), ("alone", alone)):
        nats, count = loss(loaded, rows)
        print(f"{name:8} loss {nats / count:.4f} over {count:,} of the assistant's tokens")

    answered = open_model(run, None, device)
    samples = []
    for number, tokens in enumerate(each[:num_prompts]):
        first = int(np.argmax(chatml.trained(tokens)))  # of the answer
        samples.append(Sample(number, tokens[:first].tolist(), number))
    sampling, num_tokens = Sampling(temperature=0.7, top_p=0.9), len(answered.vocabulary)
    decoder = Decoder(answered.model, min(64, len(samples)), sampling, num_tokens=num_tokens)
    limits = Limits(256, (), False)
    ended = [s for s in generate(decoder, samples, answered.vocabulary, limits) if s.finish]
    share = sum(sample.finish == "eot" for sample in ended) / len(ended)
    print(
        f"{share:.1%} of {len(ended)} answers end by themselves within {limits.max_tokens} tokens"
    )


if __name__ == "__main__":
    main()
