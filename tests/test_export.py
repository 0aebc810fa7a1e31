"""forge-export: transformers reads the same model, and what it writes can be read here."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import HOSTILE

from pipeline import shards, tokenizer
from sampler.load import open_model


def test_an_export_is_the_same_model_to_transformers(run: Path, tmp_path: Path, forge) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "hf"
    result = forge("export", run, out, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    model = open_model(run, None, torch.device("cpu")).model
    tokens = torch.randint(50257, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model.logits(model.hidden(tokens)) - theirs(tokens).logits).abs().max()
    assert difference < 1e-4

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for text in HOSTILE:
        if "<|endoftext|>" not in text:  # a tokenizer there reads it as the special token
            assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text), repr(text[:80])
            assert their_tokenizer.decode(tokenizer.encode(text)) == text
    assert their_tokenizer("<|endoftext|>")["input_ids"] == [shards.EOT_TOKEN]
    card = (out / "README.md").read_text()
    assert "Trained from scratch on 2,048 tokens" in card


def test_an_export_does_not_mind_half_a_metrics_line(run: Path, tmp_path: Path, forge) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    assert forge("export", copy, tmp_path / "hf").exit_code == 0
    (copy / "metrics.jsonl").unlink()
    result = forge("export", copy, tmp_path / "other")
    assert result.exit_code == 1
    assert "the run folder is not whole" in result.output
    assert not list(tmp_path.glob("other*"))


def test_an_export_does_not_overwrite(run: Path, tmp_path: Path, forge) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    result = forge("export", run, tmp_path)
    assert result.exit_code == 1
    assert "not empty" in result.output
