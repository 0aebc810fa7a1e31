"""forge-sample and forge-export on a run: same seed same text, and transformers agrees."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import HOSTILE

from pipeline import shards, tokenizer
from sampler.generate import Sampling, draw, generate, load_run, stream


@pytest.fixture(scope="module")
def run(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from click.testing import CliRunner
    from test_train import QUICK

    from trainer.cli import main

    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["tiny", "--data", str(small_shards), "--out", str(folder), *QUICK]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return folder


def test_the_same_seed_gives_the_same_text(run: Path, forge) -> None:
    texts = [forge("sample", run, "--max-tokens", 20, "--seed", s).output for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("Fruits are good for you because")


def test_json_gives_text_and_tokens_that_agree(run: Path, forge) -> None:
    arguments = ["--json", "--num-samples", 2, "--max-tokens", 8, "--prompt", "A — "]
    result = forge("sample", run, *arguments)
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        assert row["text"] == tokenizer.decode(row["tokens"]).decode("utf-8", "replace")
        assert len(row["tokens"]) <= 8


def test_an_older_checkpoint_can_be_sampled_and_a_missing_one_is_named(run: Path, forge) -> None:
    assert forge("sample", run, "--checkpoint", 4, "--max-tokens", 3).exit_code == 0
    result = forge("sample", run, "--checkpoint", 5)
    assert result.exit_code == 1
    assert "it has 4, 8" in result.output


def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path: Path, forge) -> None:
    for program, more in (("sample", []), ("export", [tmp_path / "out"])):
        result = forge(program, tmp_path, *more)
        assert result.exit_code == 1
        assert "no run of forge-train" in result.output


def test_cached_decoding_takes_the_tokens_of_the_plain_way(run: Path) -> None:
    model, _, _ = load_run(run, None, torch.device("cpu"))
    prompt = tokenizer.encode("The list of the")
    cached = list(generate(model, prompt, 30, Sampling(temperature=0), 0))
    tokens = list(prompt)
    with torch.no_grad():
        for _ in cached:
            tokens.append(int(model.logits(model.hidden(torch.tensor([tokens]))[0, -1]).argmax()))
    assert tokens[len(prompt) :] == cached


def test_generation_goes_on_past_the_context(run: Path) -> None:
    model, _, _ = load_run(run, None, torch.device("cpu"))
    long = tokenizer.encode("word " * 100)
    assert len(list(generate(model, long, 150, Sampling(top_k=5), 0))) > 64


def test_drawing_keeps_to_top_k_and_top_p() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = {draw(logits, Sampling(1.0, top_k=2), generator) for _ in range(200)}
    assert drawn == {0, 1}
    drawn = {draw(logits, Sampling(1.0, top_p=0.6), generator) for _ in range(200)}
    assert drawn == {0}  # the likeliest has 0.64
    assert draw(logits, Sampling(0), generator) == 0


def test_generation_stops_at_the_end_of_text(run: Path) -> None:
    model, _, _ = load_run(run, None, torch.device("cpu"))
    with torch.no_grad():  # a model that only ever wants <|endoftext|>
        model.ln_f.weight.zero_()
        model.wte.weight[shards.EOT_TOKEN] = 10
        model.ln_f.bias.fill_(1)
    assert list(generate(model, [1, 2], 10, Sampling(temperature=0), 0)) == []


def test_a_character_split_over_tokens_comes_out_whole() -> None:
    vocabulary = [*([b""] * 3), b"\xe6\x9e", b"\x9c", b"ok", b"\xe6"]
    assert list(stream(iter([3, 4, 5]), vocabulary)) == ["", "果", "ok", ""]
    assert "".join(stream(iter([5, 6]), vocabulary)) == "ok\ufffd"


def test_an_export_is_the_same_model_to_transformers(run: Path, tmp_path: Path, forge) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "hf"
    result = forge("export", run, out, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    model, _, _ = load_run(run, None, torch.device("cpu"))
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


def test_settings_that_are_no_numbers_are_refused(run: Path, forge) -> None:
    for option in ("--temperature", "--top-p"):
        result = forge("sample", run, option, "nan")
        assert result.exit_code in (1, 2)
        assert isinstance(result.exception, SystemExit)


def test_an_export_does_not_overwrite(run: Path, tmp_path: Path, forge) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    result = forge("export", run, tmp_path)
    assert result.exit_code == 1
    assert "not empty" in result.output
