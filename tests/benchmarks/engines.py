"""Whether other programs load an export, and compute the same text and log-probabilities.

    python -m tests.benchmarks.engines RUN [--llama-cpp DIR] [--questions FILE.jsonl]

Exports RUN in float32. Each engine that is installed here continues a prompt greedily, and gives
the log-probabilities of a text that forge-sample drew: transformers, CTranslate2 (ctranslate2),
llama.cpp (llama-cpp-python, gguf; --llama-cpp names a checkout with convert_hf_to_gguf.py, such as
vendor/llama.cpp in llama-cpp-python's sdist). With --questions, EleutherAI's lm-evaluation-harness
(lm-eval, accelerate) scores the file beside forge-eval.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from pipeline import tokenizer
from sampler import evaluate, export
from sampler.decode import Decoder
from sampler.draw import Sampling
from sampler.generate import Limits, Sample, generate
from sampler.load import open_model
from trainer.ranks import Ranks

# (folder, prompt, how many tokens, a text) -> greedy tokens, log p of all the text but its first
Found = tuple[list[int], list[float]]
Engine = Callable[[Path, list[int], int, list[int]], Found]


def written(folder: Path, prompt: list[int], count: int, temperature: float) -> Sample:
    loaded = open_model(folder, None, torch.device("cpu"))
    sample = Sample(0, prompt, 0)
    decoder = Decoder(loaded.model, 1, Sampling(temperature=temperature), log=True)
    for _ in generate(decoder, [sample], loaded.vocabulary, Limits(count)):
        pass
    return sample


def transformers_(folder: Path, prompt: list[int], count: int, text: list[int]) -> Found:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = torch.tensor([prompt])
    found = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False
    )
    with torch.no_grad():
        logits = model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
    return found[0, len(prompt) :].tolist(), logits[range(len(text) - 1), text[1:]].tolist()


def ctranslate2_(folder: Path, prompt: list[int], count: int, text: list[int]) -> Found:
    import ctranslate2

    with tempfile.TemporaryDirectory() as out:
        ctranslate2.converters.TransformersConverter(str(folder)).convert(out, force=True)
        generator = ctranslate2.Generator(out, device="cpu", compute_type="float32")
        names = {n: name for name, n in json.loads((folder / "vocab.json").read_text()).items()}
        (found,) = generator.generate_batch(
            [[names[token] for token in prompt]],
            max_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        (scored,) = generator.score_batch([[names[token] for token in text]])
    return list(found.sequences_ids[0]), list(scored.log_probs)


def llama_cpp(checkout: Path | None) -> Engine:
    def run(folder: Path, prompt: list[int], count: int, text: list[int]) -> Found:
        import llama_cpp

        if checkout is None:
            raise ImportError("its converter is needed: add --llama-cpp CHECKOUT")
        with tempfile.TemporaryDirectory() as out:
            file = Path(out) / "model.gguf"
            converter = [sys.executable, str(checkout / "convert_hf_to_gguf.py"), str(folder)]
            subprocess.run(
                [*converter, "--outfile", str(file), "--outtype", "f32"],
                check=True,
                capture_output=True,
                text=True,
            )
            exact = dict.fromkeys(("type_k", "type_v"), llama_cpp.GGML_TYPE_F32)  # not float16
            model = llama_cpp.Llama(str(file), n_ctx=0, verbose=False, logits_all=True, **exact)
            for hard in export.CHECK_TEXTS:  # its own tokenizer, from the export's files
                if model.tokenize(hard.encode(), add_bos=False) != tokenizer.encode(hard):
                    click.echo(f"llama.cpp gives other tokens for {hard[:50]!r}")
            found = []
            for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
                if len(found) == count or token == model.token_eos():
                    break
                found.append(token)
            model.reset()
            model.eval(text)
            logits = torch.from_numpy(model.scores[: len(text) - 1]).log_softmax(-1)
        return found, logits[range(len(text) - 1), text[1:]].tolist()

    return run


def harness_accuracy(folder: Path, questions: Path) -> dict[str, float]:
    """acc and acc_norm of lm-evaluation-harness, with its own HellaSwag code on a local file."""
    import lm_eval
    from lm_eval.tasks.hellaswag import utils

    task: dict[str, Any] = {
        "task": "local_hellaswag",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(questions)}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "process_docs": utils.process_docs,
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    }
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[task],
        batch_size=8,
        device="cpu",
        bootstrap_iters=2,
    )
    found = results["results"]["local_hellaswag"]
    return {
        "acc": found["acc,none"],
        "acc_norm": found["acc_norm,none"],
        "acc_error": found["acc_stderr,none"],
        "acc_norm_error": found["acc_norm_stderr,none"],
    }


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--prompt", default="The function returns", show_default=True)
@click.option("--tokens", default=40, show_default=True)
@click.option(
    "--llama-cpp",
    "checkout",
    type=click.Path(path_type=Path, exists=True),
    help="A checkout of llama.cpp, for its GGUF converter.",
)
@click.option("--questions", type=click.Path(path_type=Path, exists=True))
def main(
    run: Path, prompt: str, tokens: int, checkout: Path | None, questions: Path | None
) -> None:
    engines: dict[str, Engine] = {
        "transformers": transformers_,
        "ctranslate2": ctranslate2_,
        "llama.cpp": llama_cpp(checkout),
    }
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out) / "hf"
        click.echo(export.export(run, folder, None, "float32"))
        start = tokenizer.encode(prompt)
        greedy = written(folder, start, tokens, 0).tokens
        drawn = written(folder, start, tokens, 0.8)
        text = start + drawn.tokens
        click.echo(f"forge-sample: {tokenizer.decode(greedy).decode('utf-8', 'replace')!r}")
        for name, engine in engines.items():
            try:
                found, logs = engine(folder, start, tokens, text)
            except ImportError as error:
                click.echo(f"{name}: left out: {error}")
                continue
            same = sum(a == b for a, b in zip(found, greedy, strict=False))
            pairs = zip(logs[len(start) - 1 :], drawn.logprobs, strict=True)
            most = max(abs(a - b) for a, b in pairs)
            said = tokenizer.decode(found).decode("utf-8", "replace")
            click.echo(
                f"{name}: {same} of {len(greedy)} greedy tokens are forge-sample's; log p of a "
                f"text differs by at most {most:.1e}\n    {said!r}"
            )
        if questions is None or importlib.util.find_spec("lm_eval") is None:
            return
        loaded = open_model(folder, None, torch.device("cpu"))
        row = evaluate.on_questions(evaluate.read_questions(questions), Ranks(), loaded)
        theirs = harness_accuracy(folder, questions)
        for name, value in theirs.items():
            click.echo(f"{name}: lm-eval {value:.6f}, forge-eval {row[name]:.6f}")


if __name__ == "__main__":
    main()
