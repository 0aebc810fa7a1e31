"""forge-sample and forge-export: command lines. Decorators, one call each, one error handler."""

import json
from pathlib import Path
from typing import Any

import click

from pipeline.errors import ForgeError

DEFAULT_PROMPT = "Fruits are good for you because"


class ForgeCommand(click.Command):
    """Turns a ForgeError into one message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ForgeError as error:
            raise click.ClickException(str(error)) from error


SETTINGS = {"help_option_names": ["-h", "--help"]}


@click.command(cls=ForgeCommand, context_settings=SETTINGS)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", default=DEFAULT_PROMPT, show_default=True, help="Text to go on from.")
@click.option("--max-tokens", type=click.IntRange(1), default=100, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.8,
    show_default=True,
    help="Below 1 sharpens, above 1 flattens; 0 takes the likeliest token.",
)
@click.option("--top-k", type=click.IntRange(1), help="Draw from the K likeliest tokens only.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Draw from the likeliest tokens that together reach this probability.",
)
@click.option("--num-samples", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**62),
    default=0,
    show_default=True,
    help="Same seed, same text.",
)
@click.option("--checkpoint", type=int, metavar="STEP", help="Step to load.  [default: the latest]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a sample, not streamed.")
@click.version_option(package_name="llm-forge")
def sample(
    run: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    num_samples: int,
    seed: int,
    checkpoint: int | None,
    as_json: bool,
) -> None:
    """Generate text with RUN, the folder of a run of forge-train.

    Prints the text as it comes, and stops at <|endoftext|>.
    """
    import torch

    from pipeline import tokenizer
    from sampler import generate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, vocabulary, state = generate.load_run(run, checkpoint, device)
    sampling = generate.Sampling(temperature, top_k, top_p)
    for number in range(num_samples):
        tokens = generate.generate(
            model, tokenizer.encode(prompt), max_tokens, sampling, seed + number
        )
        if as_json:
            ids = list(tokens)
            text = "".join(generate.stream(iter(ids), vocabulary))
            row = {"step": state.step, "seed": seed + number, "prompt": prompt}
            click.echo(json.dumps({**row, "text": text, "tokens": ids}))
            continue
        if num_samples > 1:
            click.echo(f"--- sample {number + 1} of {num_samples}, seed {seed + number}")
        click.echo(prompt, nl=False)
        for piece in generate.stream(tokens, vocabulary):
            click.echo(piece, nl=False)
        click.echo()


@click.command(cls=ForgeCommand, context_settings=SETTINGS)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint", type=int, metavar="STEP", help="Step to export.  [default: the latest]"
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="bfloat16",
    show_default=True,
    help="Type of the exported weights.",
)
@click.version_option(package_name="llm-forge")
def export(run: Path, out: Path, checkpoint: int | None, dtype: str) -> None:
    """Export RUN to OUT, a new folder in transformers' GPT-2 layout.

    AutoModelForCausalLM and AutoTokenizer load it with no custom code.
    """
    from sampler import export as exporting

    exporting.export(run, out, checkpoint, dtype)
    click.echo(f"Exported: {out}")


if __name__ == "__main__":
    sample()
