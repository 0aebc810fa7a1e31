"""forge-export: writes a checkpoint in transformers' layout, with its tokenizer and a model card.

The folder has config.json, generation_config.json, model.safetensors, tokenizer.json, vocab.json,
merges.txt, tokenizer_config.json and README.md. Where transformers can load it, it must agree with
our model, or no folder is kept.
"""

import importlib.metadata
import importlib.util
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline import chatml, shards, tokenizer
from pipeline.errors import ForgeError, refusals
from pipeline.files import check_utf8
from sampler.curves import number, within
from sampler.load import Loaded, open_model
from trainer import checkpoint
from trainer.checkpoint import CONFIG_FILE
from trainer.layouts import TOKENIZER_FILE, model_config, transformers_weights
from trainer.report import duration, read_metrics
from trainer.run import DATA_FILE

CHECK_TEXTS = (
    "Fruits are good for you because they're 100% natural.",
    "it's I'LL we've 'tis 's''s  \u00a0\u2003\t\r\n\n  x  ",
    "naïve café “quotes” ½ ² 中文字符 日本語 한국어 العربية עברית ไทย हिन्दी e\u0301",
    "👩‍👩‍👧‍👦🏳️‍🌈 \u200b\u200d\ufeff \x00\x01\x7f",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # ok\n" + "x" * 300 + " " * 300 + "1" * 300,
)
REPORT = "report this, with the model's config.toml and the versions of torch and transformers"
FAMILIES = {"gpt2": "GPT-2", "qwen3": "Qwen3"}
USE_BASE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
inputs = tokenizer("Fruits are good for you because", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0]))"""
USE_CHAT = """\
from transformers import pipeline

answer = pipeline("text-generation", "PATH")
messages = [{"role": "user", "content": "Which fruits are good for me?"}]
print(answer(messages, max_new_tokens=200)[0]["generated_text"][-1]["content"])"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(run: Path, out: Path, step: int | None, dtype: str) -> str:
    """Write a run's checkpoint to `out`, whole or not at all; returns the result of check()."""
    out = out.resolve()
    check_utf8(out)
    if out.exists() and (there := next(out.iterdir() if out.is_dir() else iter([out]), None)):
        what = "the folder for the export is not empty"
        raise ForgeError(what, where=there, fix="name a new one")
    loaded = open_model(run, step, torch.device("cpu"))
    if loaded.state is None:
        raise ForgeError("that is an exported folder", where=run, fix="give a run of forge-train")
    card = model_card(loaded, loaded.state, dtype)
    prefix = f"{out.name}.partial."
    with refusals("write the export", out, "name another folder"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=prefix, dir=out.parent, ignore_cleanup_errors=True
        ) as made:
            partial = Path(made) / out.name
            partial.mkdir()  # with the usual permissions, unlike `made`
            write_files(partial, loaded, card, dtype)
            checked = check(partial, loaded, dtype)
            partial.rename(out)  # in the place of an empty folder, if there is one
    return checked


def write_files(folder: Path, loaded: Loaded, card: str, dtype: str) -> None:
    """All files of an export. A chat's answers end at <|im_end|>, and at <|endoftext|>."""
    model, num_tokens = loaded.model, len(loaded.vocabulary)
    weights = transformers_weights(model, num_tokens)
    weights = {name: weight.to(DTYPES[dtype]) for name, weight in weights.items()}
    checkpoint.save_tensors(weights, folder / checkpoint.MODEL_FILE)
    end = chatml.IM_END if loaded.is_chat else shards.EOT_TOKEN
    special = chatml.MARKERS if loaded.is_chat else {end: tokenizer.EOT_TEXT}
    files = {
        "config.json": model_config(model.config, dtype, num_tokens) | {"eos_token_id": end},
        "generation_config.json": {
            **dict.fromkeys(("bos_token_id", "pad_token_id"), shards.EOT_TOKEN),
            "eos_token_id": [end, shards.EOT_TOKEN] if loaded.is_chat else end,
            "do_sample": True,
        },
        "tokenizer.json": tokenizer_json(special),
        TOKENIZER_FILE: {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": model.config.context_length,
            "add_prefix_space": False,
            "padding_side": "left",  # so that the new tokens of a batch follow its texts
            **dict.fromkeys(("bos_token", "unk_token", "pad_token"), tokenizer.EOT_TEXT),
            "eos_token": special[end],
            **({"chat_template": chatml.TEMPLATE} if loaded.is_chat else {}),
        },
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    # OpenAI's files, under transformers' names.
    shutil.copyfile(tokenizer.package_data() / "encoder.json", folder / "vocab.json")
    shutil.copyfile(tokenizer.package_data() / "vocab.bpe", folder / "merges.txt")
    (folder / "README.md").write_text(card, encoding="utf-8")


def check(folder: Path, loaded: Loaded, dtype: str) -> str:
    """Compare an export with our model, if transformers is installed; says what was found.

    Raises ForgeError if logits in float32 differ by 1e-4 from those of the model, whose weights are
    rounded to `dtype` here, or if the tokenizer gives other ids than tiktoken.
    """
    if importlib.util.find_spec("transformers") is None:
        return "not checked: transformers is not installed"
    name = "transformers"
    try:
        name += f" {importlib.metadata.version(name)}"
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        # A tensor of the wrong shape is then left out, which shows in the logits.
        options = {"ignore_mismatched_sizes": True}
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        theirs.float()  # the option for it has another name in each version
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # an optional package, which may be broken in many ways
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return f"not checked: {name} cannot load it ({reason})"
    model, num_tokens = loaded.model, len(loaded.vocabulary)
    model.to(DTYPES[dtype]).float()
    length = min(256, model.config.context_length)
    tokens = torch.randint(num_tokens, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.logits(model.hidden(tokens))[..., :num_tokens]
        difference = (wanted - theirs(tokens).logits).abs().max().item()
    # 1e-4 for logits of ordinary size; float32 has seven digits, whatever their size.
    if not difference < 1e-4 * max(1.0, wanted.abs().max().item() / 100):
        what = f"transformers' logits differ by {difference:.2g}"
        raise ForgeError(what, where=folder, fix=REPORT)
    their_tokenizer.model_max_length = 10**6  # or it warns of long texts
    for text in CHECK_TEXTS:
        if their_tokenizer(text)["input_ids"] != tokenizer.encode(text):
            what = f"transformers' tokens differ for {text[:40]!r}"
            raise ForgeError(what, where=folder, fix=REPORT)
    return (
        f"checked with {name}: logits differ by at most {difference:.1e} in float32, "
        "tokens are tiktoken's"
    )


def tokenizer_json(special: dict[int, str]) -> dict[str, Any]:
    """GPT-2's tokenizer in the format of the `tokenizers` library, with its special tokens."""
    data = tokenizer.package_data()
    usual = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": text, "special": True, **usual}
            for token, text in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": json.loads((data / "encoder.json").read_text(encoding="utf-8")),
            "merges": (data / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1],
        },
    }


def model_card(loaded: Loaded, state: checkpoint.State, dtype: str) -> str:
    """README.md of the export: data, tokens, losses, hours, hardware."""
    run, model = loaded.path.resolve(), loaded.model.config
    try:
        config = (run / CONFIG_FILE).read_text("utf-8-sig")
        data = json.loads((run / DATA_FILE).read_text())["source"]
        rows = read_metrics(run)
    except (OSError, ValueError, KeyError) as error:
        what = f"the run folder is incomplete: {error!r}"
        fix = f"restore its {CONFIG_FILE} and {DATA_FILE}"
        raise ForgeError(what, where=run, fix=fix) from error
    exported = replace(model, vocab_size=min(model.vocab_size, len(loaded.vocabulary)))
    last = {row["kind"]: row for row in rows if row["step"] <= state.step and row.get("loss", 1)}
    hub = data.get("hub") or {}
    revision = f" at {hub['revision']}" if hub else ""
    ranks, measured = int(number(within(last, "start", "world_size")) or 1), ""
    if hardware := within(last, "start", "hardware"):
        measured += f"- Hardware: {hardware}\n"
    if (loss := number(within(last, "step", "loss"))) is not None:
        measured += f"- Training loss {loss:.4f} nats a token at the last step\n"
    loss, bits = (number(within(last, "evaluate", key)) for key in ("loss", "bits_per_byte"))
    if loss is not None and bits is not None:
        measured += f"""\
- Validation loss {loss:.4f} nats a token, {bits:.4f} bits a byte, on held-out documents of the \
same data, at step {last["evaluate"]["step"]:,}
"""
    launcher = f"torchrun --standalone --nproc_per_node={ranks} --no-python " if ranks > 1 else ""
    continues = "continues text; it was not trained to follow instructions or to be correct."
    answers = "answers in conversations (ChatML); it was not trained to be correct or safe."
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
---

# {run.name}

- {exported.num_parameters():,} parameters, in {dtype}: {model.num_layers} layers, \
{model.num_heads} heads, {model.embedding_size} channels, context {model.context_length}; \
{FAMILIES[model.family]}'s architecture, GPT-2's tokenizer
- Trained from {state.weights_from or "scratch"} on {state.tokens:,} tokens of \
{data["name"]}{revision}, in {state.step:,} steps and {duration(state.seconds)} (h:mm:ss)
{measured}- Command: `{launcher}forge-train config.toml --data DIR --out RUN`; the config is below
- It {answers if loaded.is_chat else continues}

```python
{USE_CHAT if loaded.is_chat else USE_BASE}
```

The config of the run, `config.toml`:

```toml
{config.rstrip()}
```
"""
