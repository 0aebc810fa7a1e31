"""The command lines of forge-sample, forge-export, forge-eval and forge-report."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.command import ForgeCommand

MAX_TOKENS = {False: 100, True: 512}  # of a text, and of a chat's answer
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}
CHECKPOINT = click.option(
    "--checkpoint", type=int, metavar="STEP", help="Step of a run.  [default: the latest]"
)


@click.command(cls=ForgeCommand, context_settings=SETTINGS)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    help="Text to continue or to answer; - is standard input, without its final line end.  "
    "[default: ask for prompts on a terminal, else -]",
)
@click.option(
    "--prompts-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help='A file with a prompt on each line, or (.jsonl) an object with "prompt" or, for a chat, '
    '"messages"; the output of the latter is JSON lines, which keep the object\'s other keys.',
)
@click.option("--system", metavar="TEXT", help="The system message of a chat.")
@click.option("--base", is_flag=True, help="Continue text, although MODEL was trained on chat.")
@click.option("--web", is_flag=True, help="Serve a page for the browser, until Ctrl-C.")
@click.option("--host", default="127.0.0.1", help="Address of --web.")
@click.option("--port", type=click.IntRange(1, 65535), default=7860, help="Port of --web.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    help=f"Length of a text.  [default: {MAX_TOKENS[False]}; {MAX_TOKENS[True]} in a chat]",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.8,
    help="Below 1 sharpens, above 1 flattens; 0 takes the likeliest token.",
)
@click.option("--top-k", type=click.IntRange(1), help="Draw from the K likeliest tokens only.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Draw from the likeliest tokens that together reach this probability.",
)
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    help="Draw from tokens with at least this share of the likeliest one's probability.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    help="Above 1 makes tokens that the text already has less likely (as in CTRL).",
)
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="End before this text, in which \\n is a line break and \\t a tab; repeatable.",
)
@click.option(
    "--at-context-end",
    type=click.Choice(["slide", "stop"]),
    default="slide",
    help="When the context is full: drop its older half and continue, or end the text.",
)
@click.option("--num-samples", type=click.IntRange(1), default=1)
@click.option(
    "--parallel",
    type=click.IntRange(1),
    metavar="N",
    help="Texts generated at the same time.  [default: at most 64 on a GPU, 8 on a CPU]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**62),
    default=0,
    help="Same seed, same text, on the same machine with the same options, --num-samples and "
    "--parallel among them; it counts up over --num-samples.",
)
@CHECKPOINT
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON object per text, with tokens and their log-probabilities; not streamed.",
)
@click.version_option(package_name="llm-forge")
def sample(
    model: Path,
    prompt: str | None,
    prompts_file: Path | None,
    checkpoint: int | None,
    num_samples: int,
    parallel: int | None,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate text with MODEL, or talk to it.

    MODEL is a run of forge-train, one of its checkpoints, a folder that forge-export made, or any
    local folder in transformers' GPT-2 or Qwen3 layout. Prints the text while it is generated, and
    stops at <|endoftext|>. Without --prompt, a terminal asks for one prompt after another, and a
    pipe is the prompt. A model that was trained on chat answers, and a terminal opens a
    conversation: /reset starts a new one, /quit leaves. Where the context is full, the oldest
    messages are left out.
    """
    from sampler import chat, load, terminal
    from sampler.draw import Sampling
    from sampler.generate import Limits

    if (prompt is not None) + (prompts_file is not None) + options["web"] > 1:
        raise click.UsageError("--prompt, --prompts-file and --web cannot be combined")
    prompts, asks = None, sys.stdin is not None and sys.stdin.isatty()
    if prompts_file is not None:
        prompts = terminal.read_prompts(prompts_file)
        as_json = as_json or terminal.is_jsonl(prompts_file)
    elif prompt == "-" or (prompt is None and not asks and not options["web"]):
        prompts = [terminal.read_prompt()]
    elif prompt is not None:
        prompts = [terminal.Prompt(prompt)]
    loaded = load.open_model(model, checkpoint, load.best_device())
    if options["base"]:
        loaded = loaded.as_base()
    stops = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in options["stop"])
    slides = options["at_context_end"] == "slide" and not loaded.is_chat
    limits = Limits(options["max_tokens"] or MAX_TOKENS[loaded.is_chat], stops, slides)
    rows = num_samples * len(prompts) if prompts else 1 if loaded.is_chat else num_samples
    kind = chat.Chat if loaded.is_chat else terminal.Session
    session = kind(
        loaded,
        Sampling(**{name: options[name] for name in SAMPLING}),
        limits,
        min(rows, parallel or terminal.PARALLEL[loaded.model.wte.weight.device.type]),
        as_json,
    )
    if isinstance(session, chat.Chat):
        session.system = options["system"]
    elif options["system"] is not None:
        raise click.UsageError("--system is for a model that was trained on chat")
    if options["web"]:
        from sampler import web

        web.serve(session, seed, options["host"], options["port"])
    elif prompts is None:
        session.interact(num_samples, seed)
    else:
        session.write(prompts, num_samples, seed)


@click.command(cls=ForgeCommand, context_settings=SETTINGS)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@CHECKPOINT
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="bfloat16",
    help="Type of the exported weights.",
)
@click.version_option(package_name="llm-forge")
def export(run: Path, out: Path, checkpoint: int | None, dtype: str) -> None:
    """Export RUN to OUT, a new folder in transformers' layout (GPT-2's or Qwen3's).

    RUN is a run of forge-train or one of its checkpoints. AutoModelForCausalLM and AutoTokenizer
    load OUT with no custom code; where transformers is installed, that is checked.
    """
    from sampler import export as exporting

    checked = exporting.export(run, out, checkpoint, dtype)
    click.echo(f"Exported: {out} ({checked})")


@click.command(cls=ForgeCommand, context_settings=SETTINGS)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Folder of shards.")
@click.option("--split", type=click.Choice(["val", "train"]), default="val")
@click.option(
    "--num-tokens",
    type=click.IntRange(1),
    default=1_048_576,
    help="Tokens of --data to measure on, the same for all models; fewer if there are fewer.",
)
@click.option(
    "--questions",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Multiple-choice questions in HellaSwag's format: ctx, endings, label.",
)
@click.option(
    "--core",
    "bundle",
    type=click.Path(path_type=Path),
    help="CORE's evaluation bundle: a folder or .zip with core.yaml and eval_data/.",
)
@click.option(
    "--max-per-task",
    type=click.IntRange(1),
    metavar="N",
    help="Items of each of CORE's tasks, for a quick look.  [default: all]",
)
@CHECKPOINT
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per model and task.")
@click.version_option(package_name="llm-forge")
def evaluate(models: tuple[Path, ...], checkpoint: int | None, as_json: bool, **on: Any) -> None:
    """Measure MODELS side by side: on shards (--data), on --questions, by --core, or several.

    A model is a run of forge-train, one of its checkpoints, a folder that forge-export made, or any
    local folder in transformers' GPT-2 or Qwen3 layout. All see the same tokens, in windows of the
    shortest context. Losses are in nats per token; ± is one standard error. acc_norm is HellaSwag's
    usual number: the ending with the largest log p per character. CORE is DCLM's mean over 22 tasks
    (GPT-2 XL: 0.2565, as nanochat measured it); under torchrun all GPUs share the work.
    """
    if all(on[name] is None for name in ("data", "questions", "bundle")):
        raise click.UsageError("nothing to measure on: add --data, --questions or --core")
    from sampler import evaluate as evaluating

    for rows in evaluating.evaluate(models, checkpoint, **on):
        for line in map(json.dumps, rows) if as_json else [evaluating.show(rows)]:
            click.echo(line)


@click.command(cls=ForgeCommand, context_settings=SETTINGS)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page, NAME.html, which is replaced if it is there.  [default: RUN/report.html]",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw the losses of other models, too: what forge-eval --json printed.",
)
@click.version_option(package_name="llm-forge")
def report(runs: tuple[Path, ...], out: Path | None, against: Path | None) -> None:
    """Show RUN, or several side by side, as one page that opens in any browser.

    Curves over tokens or hours, samples, configs with their differences, data and hardware. A run
    may be training still, or be a copy without its checkpoints. The page loads nothing.
    """
    from sampler import report as reporting

    out = out or runs[0] / "report.html"
    num_bytes = reporting.write_report(runs, out, against)
    click.echo(f"Written: {out} ({num_bytes / 1000:,.0f} kB)")


if __name__ == "__main__":
    sample()
