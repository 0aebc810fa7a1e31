"""forge-eval: the trainer's own loss, transformers' log-probabilities, the harness's accuracy."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import python_docs
import torch
from conftest import ROOT, metrics_of

from pipeline import tokenizer
from pipeline.shards import EOT_TOKEN, load_index, map_shard
from sampler import evaluate
from sampler.load import open_model
from trainer.ranks import Ranks

CPU = torch.device("cpu")
QUESTIONS = [
    {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he",
        "endings": [
            "is using wrap to wrap a pair of skis.",
            "is ripping level tiles off.",
            "is holding a rubik's cube.",
            "starts pulling up roofing on a roof.",
        ],
        "label": 3,
    },
    {
        "ind": 25,
        "activity_label": "Finance and Business",
        "ctx_a": "[header] How to write a list [title] Begin with a plan.  [step] A plan helps.",
        "ctx_b": "",
        "ctx": "",
        "endings": [
            "[substeps] Write it down.",
            "Sing — loudly.",
            "It is blue.",
            "No one knows [x].",
        ],
        "label": 0,
    },
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HellaSwag-shaped questions: two by hand, and some made of Python's own documentation."""
    rows = list(QUESTIONS)
    texts = [text for text in python_docs.documents() if len(text) > 400]
    for number, text in enumerate(texts[:40]):
        words = text.split()
        others = [texts[(number + n) % 40].split()[30:38] for n in (3, 7, 11)]
        endings = [" ".join(w) for w in (words[20:30], *others)]
        label = number % 4
        endings[0], endings[label] = endings[label], endings[0]
        row = {"activity_label": words[0], "ctx_a": " ".join(words[1:20]), "ctx_b": "so it"}
        rows.append({**row, "endings": endings, "label": label})
    path = tmp_path_factory.mktemp("questions") / "hellaswag.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_loss_is_the_one_that_training_logged(run: Path, small_shards: Path, forge) -> None:
    (row,) = rows_of(forge("eval", run, "--data", small_shards, "--num-tokens", 640, "--json"))
    logged = metrics_of(run, "evaluate")[-1]
    assert row["num_tokens"] == 640
    assert row["loss"] == pytest.approx(logged["loss"], abs=6e-5)  # six digits are logged
    assert row["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], abs=2e-5)


def test_the_standard_errors_are_those_of_resampled_windows(run: Path, small_shards: Path) -> None:
    loaded = open_model(run, None, CPU)
    windows = evaluate.Windows(load_index(small_shards), "val", 64)
    count = 80
    row = evaluate.on_shards(windows, count, [], Ranks(), loaded)
    nats, _, num_bytes = evaluate.window_losses(windows, count, Ranks(), loaded)
    chosen = np.random.default_rng(0).integers(0, count, (2000, count))
    losses = nats[chosen].mean(1) / 64
    bits = nats[chosen].sum(1) / math.log(2) / num_bytes[chosen].sum(1)
    assert row["loss_error"] == pytest.approx(losses.std(), rel=0.1)
    assert row["bits_per_byte_error"] == pytest.approx(bits.std(), rel=0.1)


def test_models_are_compared_over_the_same_tokens(
    run: Path, small_shards: Path, tmp_path: Path, forge
) -> None:
    """A run, its earlier checkpoint and its export; the difference is that of paired windows."""
    forge("export", run, tmp_path / "hf", "--dtype", "float32")
    models = [run, run / "checkpoints" / "step_00000004", tmp_path / "hf"]
    result = forge("eval", *models, "--data", small_shards, "--num-tokens", 640, "--json")
    first, older, exported = rows_of(result)
    assert exported["loss"] == pytest.approx(first["loss"], abs=1e-5)
    assert exported["difference"] == pytest.approx(0, abs=1e-5)
    assert older["step"] == 4
    assert older["difference"] == pytest.approx(older["loss"] - first["loss"])
    assert older["difference_error"] < older["loss_error"]
    table = forge("eval", *models, "--data", small_shards, "--num-tokens", 640).stdout
    assert f"{first['loss']:.4f} ± {first['loss_error']:.4f}" in table


def test_a_whole_split_counts_each_token_once(
    run: Path, documents: list[str], tmp_path: Path, make_parquet, make_shards
) -> None:
    source = make_parquet(tmp_path / "source.parquet", [text[:3000] for text in documents[:8]])
    index = make_shards(source, tmp_path / "shards", val_fraction=0.0)
    loaded = open_model(run, None, CPU)
    ((windows, count),) = evaluate.windows_of(index.folder, "train", 32, 10**9)
    row = evaluate.on_shards(windows, count, [], Ranks(), loaded)
    # Straight from the tokens, a window after the other.
    nats = num_bytes = count = 0
    sizes = torch.tensor([len(token) for token in loaded.vocabulary])
    for shard in index.of("train"):
        tokens = torch.from_numpy(
            map_shard(index.folder / shard.file, shard.num_tokens).astype("i8")
        )
        for first in range(0, len(tokens) - 32, 32):
            window = tokens[None, first : first + 33]
            nats += loaded.model(window[:, :-1], window[:, 1:]).item()
            num_bytes += sizes[window[:, 1:]].sum().item()
            count += 32
    assert row["num_tokens"] == count
    assert row["loss"] == pytest.approx(nats / count, abs=1e-5)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, abs=1e-5)


def test_nothing_or_too_little_to_measure_on_is_refused(
    run: Path, small_shards: Path, forge
) -> None:
    assert forge("eval", run).exit_code == 2
    result = forge("eval", run, "--data", small_shards, "--num-tokens", 64)
    assert result.exit_code == 1
    assert "needs at least 2" in result.output


def test_scores_are_transformers_log_probabilities(
    run: Path, questions: Path, tmp_path: Path, forge
) -> None:
    transformers = pytest.importorskip("transformers")
    forge("export", run, tmp_path / "hf", "--dtype", "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    found = evaluate.read_questions(questions)[:6]
    assert found[0].context == "Roof shingle removal: A man is sitting on a roof. He"
    assert found[1].endings[0] == " Write it down."
    scores = [*evaluate.ending_scores(found, Ranks(), open_model(run, None, CPU))]
    assert len(scores) == 6
    for question, nats in scores:
        for ending, score in zip(question.endings, nats, strict=True):
            tokens = tokenizer.encode(f"{question.context} {ending}")[-65:]
            count = len(tokenizer.encode(f"{question.context} {ending}")) - len(
                tokenizer.encode(question.context.rstrip())
            )
            with torch.no_grad():
                logits = theirs(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
            wanted = logits[range(len(tokens) - 1), tokens[1:]][-count:].sum().item()
            assert score == pytest.approx(wanted, abs=1e-3)


def test_spaces_at_the_context_s_end_count_as_the_ending_s() -> None:
    blue = tokenizer.encode(" blue.")
    for context, before, ending in (
        ("It is", tokenizer.encode("It is"), blue),
        ("It is  ", tokenizer.encode("It is"), tokenizer.encode("   blue.")),
        ("", [EOT_TOKEN], blue),
    ):
        pair = evaluate.encode_pair(context, "blue.", 64)
        start = int(pair.is_scored.argmax())
        tokens = pair.tokens.tolist()
        assert (tokens[:start], tokens[start:]) == (before, ending), context


def test_a_malformed_question_is_named_by_its_line(run: Path, tmp_path: Path, forge) -> None:
    good = {"ctx": "It is", "endings": ["a", "b"], "label": 1}
    path = tmp_path / "q.jsonl"
    parts = {"activity_label": "Jumping", "ctx_a": "She jumps.", "ctx_b": "she"}
    for bad in (
        {**good, "label": 2},
        {"ctx": "x", "label": 0},
        {**good, "endings": ["a", ""]},
        {**good, "endings": "ab"},
        {**good, "endings": ["a", 1]},
        {**good, "endings": ["a", None]},
        {**good, "ctx": None},
        *({**good, **parts, key: None} for key in parts),
        [],
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        result = forge("eval", run, "--questions", path)
        assert result.exit_code == 1
        assert "line 2" in result.output


def test_the_harness_counts_the_same_answers_right(
    run: Path, questions: Path, tmp_path: Path, forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EleutherAI's lm-evaluation-harness, where it is installed, on the same file."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")  # which lm-eval needs and does not bring
    monkeypatch.syspath_prepend(ROOT)
    from tests.benchmarks.engines import harness_accuracy

    forge("export", run, tmp_path / "hf", "--dtype", "float32")
    (row,) = rows_of(forge("eval", run, "--questions", questions, "--json"))
    theirs = harness_accuracy(tmp_path / "hf", questions)
    for name in ("acc", "acc_norm"):
        assert row[name] == pytest.approx(theirs[name])
        assert row[f"{name}_error"] == pytest.approx(theirs[f"{name}_error"])


def test_one_question_has_no_standard_error(run: Path, tmp_path: Path, forge) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"ctx": "It is", "endings": ["a", "b"], "label": 1}\n')
    (row,) = rows_of(forge("eval", run, "--questions", path, "--json"))
    assert row["acc_error"] is None
    assert "± -" in forge("eval", run, "--questions", path).output


def test_a_byte_order_mark_is_not_part_of_a_question(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"ctx": "It is", "endings": ["a", "b"], "label": 1}\n', "utf-8-sig")
    assert evaluate.read_questions(path)[0].context == "It is"
