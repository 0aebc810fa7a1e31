"""forge-export: transformers reads the same model, and its folders can be read here."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import HOSTILE, metrics_of
from safetensors.torch import load_file, save_file

from pipeline import shards, tokenizer
from sampler import export
from sampler.load import Loaded, open_model
from trainer import layouts
from trainer.config import ModelConfig
from trainer.model import build_model


def test_an_export_is_the_same_model_to_transformers(
    either_run: Path, tmp_path: Path, forge
) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "hf"
    result = forge("export", either_run, out, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    model = open_model(either_run, None, torch.device("cpu")).model
    tokens = torch.randint(50257, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model.logits(model.hidden(tokens)) - theirs(tokens).logits).abs().max()
    assert difference < 1e-4

    assert "logits differ by at most" in result.output
    assert "tiktoken's" in result.output

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for text in HOSTILE:
        if "<|endoftext|>" not in text:  # a tokenizer there reads it as the special token
            assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text), repr(text[:80])
            assert their_tokenizer.decode(tokenizer.encode(text)) == text
    assert their_tokenizer("<|endoftext|>")["input_ids"] == [shards.EOT_TOKEN]
    card = (out / "README.md").read_text()
    assert "Trained from scratch on 2,048 tokens" in card


def test_the_card_says_what_the_model_is(run: Path, tmp_path: Path, forge) -> None:
    forge("export", run, tmp_path / "hf", "--checkpoint", 4)
    card = (tmp_path / "hf" / "README.md").read_text()
    (evaluated,) = (row for row in metrics_of(run, "evaluate") if row["step"] == 4)
    for fact in (
        "Trained from scratch on 1,024 tokens of ",
        f"Validation loss {evaluated['loss']:.4f} nats",
        "Training loss",
        "Hardware: CPU",
        "forge-train config.toml",
        "embedding_size = 32",
        "in bfloat16",
    ):
        assert fact in card, fact


def test_an_export_that_transformers_reads_differently_is_not_kept(
    run: Path, tmp_path: Path, forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(layouts, "their_views", lambda model, tensors: tensors)
    result = forge("export", run, tmp_path / "hf")
    assert result.exit_code != 0
    monkeypatch.undo()
    honest = export.model_config

    def other(*arguments: object) -> dict:
        return honest(*arguments) | {"activation_function": "relu"}

    monkeypatch.setattr(export, "model_config", other)
    result = forge("export", run, tmp_path / "hf")
    assert result.exit_code == 1
    assert "logits differ" in result.output
    assert not list(tmp_path.iterdir())


def test_an_export_is_kept_where_transformers_cannot_load_it(
    run: Path, tmp_path: Path, forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    honest = transformers.AutoModelForCausalLM.from_pretrained

    def older(folder: Path, **options: object) -> object:
        if "dtype" in options:  # which transformers 4.55 hands to the model
            raise TypeError("__init__() got an unexpected keyword argument 'dtype'")
        return honest(folder, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", older)
    assert "logits differ by at most" in forge("export", run, tmp_path / "older").output

    def without_qwen3(folder: Path, **options: object) -> None:
        raise ValueError("does not know `qwen3`.\nA second line.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", without_qwen3)
    result = forge("export", run, tmp_path / "oldest")
    assert result.exit_code == 0, result.output
    name = f"transformers {transformers.__version__}"
    assert f"(not checked: {name} cannot load it (ValueError: does not know `qwen3`.))" in (
        result.output
    )

    fake = tmp_path / "packages" / "transformers"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('tokenizers>=0.22 is required')\n")
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.syspath_prepend(fake.parent)
    result = forge("export", run, tmp_path / "unfit")
    assert result.exit_code == 0, result.output
    assert "cannot load it (ImportError: tokenizers>=0.22 is required)" in result.output
    assert (tmp_path / "unfit" / "model.safetensors").is_file()


def test_an_export_writes_the_same_text_as_its_run(either_run: Path, tmp_path: Path, forge) -> None:
    forge("export", either_run, tmp_path / "hf", "--dtype", "float32")
    options = ["--max-tokens", 20, "--temperature", 0, "--prompt", "The list"]
    texts = [forge("sample", path, *options) for path in (either_run, tmp_path / "hf")]
    assert texts[0].exit_code == texts[1].exit_code == 0, texts[1].output
    assert texts[0].output == texts[1].output


@pytest.fixture(params=["gpt2", "qwen3"])
def padded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Loaded, Path]:
    """A model with more rows than the tokenizer has tokens, which writes varied texts, exported."""
    modern = {"bias": False, "num_kv_heads": 2} if request.param == "qwen3" else {}
    config = ModelConfig(2, 4, 32, request.param, context_length=64, vocab_size=50304, **modern)
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        is_gain = weight.ndim == 1 and name.endswith("weight")
        torch.nn.init.normal_(weight, float(is_gain), 0.3, generator=generator)
    model.requires_grad_(False)
    loaded = Loaded(tmp_path, model, [*tokenizer.token_bytes()], None, is_chat=False)
    (tmp_path / "padded").mkdir()
    export.write_files(tmp_path / "padded", loaded, "A card.", "float32")
    return loaded, tmp_path / "padded"


def test_an_export_has_a_row_for_each_token_and_no_others(
    padded: tuple[Loaded, Path],
) -> None:
    """Converters (CTranslate2's) refuse others, and transformers would draw them."""
    pytest.importorskip("transformers")
    loaded, folder = padded
    sizes = {tensor.shape[0] for tensor in load_file(folder / "model.safetensors").values()}
    assert max(sizes) == json.loads((folder / "config.json").read_text())["vocab_size"] == 50257
    assert "logits differ by at most" in export.check(folder, loaded, "float32")
    reopened = open_model(folder, None, torch.device("cpu")).model
    assert torch.equal(reopened.wte.weight, loaded.model.wte.weight[:50257])


def test_transformers_writes_the_same_texts_in_a_batch_as_alone(
    padded: tuple[Loaded, Path],
) -> None:
    transformers = pytest.importorskip("transformers")
    _, folder = padded
    pipeline = transformers.pipeline("text-generation", str(folder))
    prompts = ["a", "It is what it is, and it goes on for", "b c"]
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    alone = [pipeline(prompt, **options) for prompt in prompts]
    assert pipeline(prompts, batch_size=3, **options) == alone
    texts = [text[0]["generated_text"] for text in alone]
    assert len({*texts}) == 3

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = their_tokenizer(prompts, padding=True, return_tensors="pt")
    found = pipeline.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = found[:, inputs["input_ids"].shape[1] :]
    assert their_tokenizer.batch_decode(new, skip_special_tokens=True) == texts
    assert len({*new.flatten().tolist()}) > 15  # no loops, which would prove little


@pytest.fixture
def folder(run: Path, tmp_path: Path, forge) -> Path:
    forge("export", run, tmp_path / "hf", "--dtype", "float32")
    return tmp_path / "hf"


def test_other_people_s_gpt2_folders_are_read(folder: Path, run: Path) -> None:
    """No prefix, attention masks among the weights, an explicit head: all are about."""
    model = open_model(run, None, torch.device("cpu")).model
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): w for name, w in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    halves = {name: weight.half() for name, weight in bare.items()}
    save_file(halves, folder / "model.safetensors")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    found = open_model(folder, None, torch.device("cpu")).model
    for name, weight in found.named_parameters():
        assert torch.allclose(weight, dict(model.named_parameters())[name], atol=1e-3)


def test_a_folder_is_read_as_the_weights_that_were_exported(
    either_run: Path, tmp_path: Path, forge
) -> None:
    forge("export", either_run, tmp_path / "hf", "--dtype", "float32")
    found = layouts.read_folder(tmp_path / "hf")
    model = open_model(either_run, None, torch.device("cpu")).model
    assert found.config == model.config
    weights, wanted = layouts.weights_of(found), dict(model.named_parameters())
    assert {*weights} == {*wanted}
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_other_people_s_qwen3_folders_are_read(tmp_path: Path, forge) -> None:
    """What transformers itself writes for a model of its own, with heads shared by threes."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "intermediate_size": 56, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    settings = transformers.Qwen3Config(
        **sizes, **heads, vocab_size=50257, tie_word_embeddings=True, max_position_embeddings=96
    )
    theirs = transformers.Qwen3ForCausalLM(settings)
    theirs.save_pretrained(tmp_path)
    model = open_model(tmp_path, None, torch.device("cpu")).model
    tokens = torch.randint(50257, (2, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model.logits(model.hidden(tokens)) - theirs(tokens).logits).abs().max()
    assert difference < 1e-5
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("rms_norm_eps", 1e-5), ("tie_word_embeddings", False)):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        refused(forge, tmp_path, key)
    turns = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    for changed, reason in (
        ({"rope_parameters": turns}, "yarn"),
        ({"rope_parameters": {}}, "rope_theta must be a valid number, not None"),
        ({"rope_theta": "1e4"}, "rope_theta must be a valid number, not '1e4'"),
        ({"head_dim": None}, "of another shape"),
        ({"num_key_value_heads": 4}, "num_heads (6) must be a multiple of model.num_kv_heads (4)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        refused(forge, tmp_path, reason)
    del config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(forge, tmp_path, "of another shape")


def refused(forge, folder: Path, reason: str) -> None:
    result = forge("sample", folder, "--max-tokens", 2)
    assert result.exit_code == 1, reason
    assert reason in result.output


def test_folders_that_would_be_computed_wrong_are_refused(folder: Path, forge) -> None:
    config = json.loads((folder / "config.json").read_text())

    (folder / "config.json").write_text("[" * 100_000)
    refused(forge, folder, "cannot read")
    for key, value, reason in (
        ("model_type", "llama", "'llama'"),
        ("model_type", ["gpt2"], "['gpt2']"),
        ("activation_function", "relu", "activation_function"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon"),
        ("n_inner", 99, "n_inner"),
        ("n_layer", 3, "h.2.attn.c_attn.bias"),
        ("n_positions", 128, "wpe.weight"),
        ("n_layer", "four", "num_layers must be a valid integer, not 'four'"),
        ("n_head", 5, "embedding_size (32) must be a multiple of model.num_heads (5)"),
        ("n_embd", 0, "embedding_size must be greater than or equal to 1"),
        ("n_embd", None, "embedding_size must be a valid integer, not None"),
        ("vocab_size", 40_000, "not 50257 or more"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        refused(forge, folder, reason)
    (folder / "config.json").write_text(json.dumps(config))

    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"the": 1, "!": 2}))
    refused(forge, folder, "tokenizer is not GPT-2's")
    (folder / "vocab.json").unlink()
    whole = (folder / "tokenizer.json").read_text()
    for other in ({"type": "Unigram", "vocab": [["a", 0.0]]}, None, "BPE"):
        (folder / "tokenizer.json").write_text(json.dumps({"model": other}))
        refused(forge, folder, "tokenizer is not GPT-2's")
    (folder / "tokenizer.json").write_text(whole)

    tensors = load_file(folder / "model.safetensors")
    untied = tensors["transformer.wte.weight"] + 1
    save_file(tensors | {"lm_head.weight": untied}, folder / "model.safetensors")
    refused(forge, folder, "not tied")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(forge, folder, "pickled")


def test_an_export_needs_the_config_and_the_index_of_a_run_but_no_log(
    run: Path, tmp_path: Path, forge
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    assert forge("export", copy, tmp_path / "hf").exit_code == 0
    (copy / "metrics.jsonl").unlink()
    assert forge("export", copy, tmp_path / "without").exit_code == 0
    (copy / "data_index.json").unlink()
    result = forge("export", copy, tmp_path / "other")
    assert result.exit_code == 1
    assert "the run folder is incomplete" in result.output
    assert not list(tmp_path.glob("other*"))


def test_an_export_does_not_overwrite(run: Path, tmp_path: Path, forge) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    result = forge("export", run, tmp_path)
    assert result.exit_code == 1
    assert "not empty" in result.output


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "check", lambda *_: "not checked")


def test_an_export_makes_its_folder_or_takes_the_place_of_an_empty_one(
    run: Path, tmp_path: Path, forge, unchecked: None
) -> None:
    for name in ("new", "empty", "other"):
        (tmp_path / f"{name}.partial").mkdir()  # the user's
    (tmp_path / "other").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        result = forge("export", run, tmp_path / name)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "other").stat().st_mode
    made = [{path.name for path in (tmp_path / name).iterdir()} for name in ("new", "empty")]
    assert made[0] == made[1] > {"config.json", "model.safetensors"}
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{n}{end}" for n in ("new", "empty", "other") for end in ("", ".partial")}


def test_an_interrupted_export_leaves_nothing(
    run: Path, tmp_path: Path, forge, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, to: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", broken)
    assert forge("export", run, tmp_path / "new").exit_code == 1
    assert not list(tmp_path.iterdir())


def test_an_export_adds_nothing_to_a_folder_that_was_filled_meanwhile(
    run: Path, tmp_path: Path, forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: object) -> str:
        (tmp_path / "config.json").write_text("precious")
        return "not checked"

    monkeypatch.setattr(export, "check", check)
    result = forge("export", run, tmp_path)
    assert result.exit_code == 1
    assert "not empty" in result.output
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
