"""CORE: the bundle is read, the prompts are its authors', and the scores are the model's."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline.errors import ForgeError
from sampler import cli, core, score
from sampler.bundle import Task, read_bundle, texts
from trainer.config import ModelConfig
from trainer.model import build_model

CHOICE = {"query": "Q", "choices": ["a", "b"], "gold": 1}
SCHEMA = {"context_options": ["He", "She"], "continuation": "fell.", "gold": 0}
LANGUAGE = {"context": " two plus two is ", "continuation": "four"}


def write_bundle(folder: Path, **changed: str) -> Path:
    """Three tasks of three items, one of each kind; `changed` replaces files."""
    kinds = {"arc_easy": "multiple_choice", "winograd": "schema", "jeopardy": "language_modeling"}
    tasks = "icl_tasks:\n" + "".join(
        f"- {{label: {label}, dataset_uri: x/{label}.jsonl, num_fewshot: [1], "
        f"icl_task_type: {kind}}}\n"
        for label, kind in kinds.items()
    )
    rows = "Eval Task,Random baseline\narc_easy,50\nwinograd,50\njeopardy,0\n"
    files = {"core.yaml": tasks, "eval_meta_data.csv": rows}
    for label, item in zip(kinds, (CHOICE, SCHEMA, LANGUAGE), strict=True):
        files[f"eval_data/x/{label}.jsonl"] = (json.dumps(item) + "\n") * 3
    for name, content in (files | changed).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_prompts_are_the_ones_that_the_bundles_authors_write() -> None:
    solved = "He fell.\n\n"
    assert texts(Task("", "schema", 1, " ", 0.5, [SCHEMA] * 2), 0) == [
        f"{solved}He fell.",
        f"{solved}She fell.",
    ]
    asked = Task("", "multiple_choice", 1, "\nAnswer: ", 0.5, [CHOICE] * 2)
    assert texts(asked, 1) == ["Q\nAnswer: b\n\nQ\nAnswer: a", "Q\nAnswer: b\n\nQ\nAnswer: b"]
    without, whole = texts(Task("", "language_modeling", 0, " ", 0, [LANGUAGE]), 0)
    assert (without, whole) == ("two plus two is", "two plus two is four")


def test_examples_are_others_of_the_task_and_always_the_same() -> None:
    task = Task("", "multiple_choice", 3, " ", 0, [CHOICE | {"query": str(n)} for n in range(9)])
    for number in range(9):
        shots = task.shots(number)
        assert task.items[number] not in shots
        assert [shot["query"] for shot in shots] == [s["query"] for s in task.shots(number)]
    assert [shot["query"] for shot in task.shots(0)] == ["8", "1", "7"]  # as nanochat draws


def test_scored_tokens_are_those_that_differ_or_the_common_ending() -> None:
    left, right = np.array([0, 1, 2, 3]), np.array([0, 1, 4, 5, 3])
    starts = {}
    for kind in ("multiple_choice", "schema"):
        asked = core.answers(Task("", kind, 0, " ", 0, []), [left, right], 16)
        starts[kind] = [int(answer.is_scored.argmax()) for answer in asked]
    assert starts == {"multiple_choice": [2, 2], "schema": [3, 4]}


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_scores_are_those_of_one_text_at_a_time_for_any_batch(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(2, 2, 32, family, 16, vocab_size=97, bias=family == "gpt2")  # type: ignore[arg-type]
    model = build_model(config)
    model.init_weights(3)
    generator = np.random.default_rng(1)
    asked = []
    for length in (2, 5, 9, 16, 17, 30):
        tokens = generator.integers(0, 97, length)
        asked.append(score.Answer.ending(tokens, length - 3, 16))
        other = np.append(tokens[:-1], (tokens[-1] + 1) % 97)  # shares its row
        asked.append(score.Answer.ending(other, length - 1, 16))
    asked.append(score.Answer(tokens[:12], np.arange(12) % 3 == 0))
    monkeypatch.setattr(score, "BATCH_TOKENS", {"cpu": 32})
    monkeypatch.setattr(score, "HEAD_TOKENS", {"cpu": 4})
    for answer, found in zip(asked, score.score(model, asked), strict=True):
        with torch.inference_mode():
            inputs = torch.from_numpy(answer.tokens[None, :-1])
            logits = model.logits(model.hidden(inputs))[0]
        logs = logits.log_softmax(-1)[answer.is_scored[1:]]
        right = torch.from_numpy(answer.tokens[1:][answer.is_scored[1:]])
        assert found.loss == pytest.approx(-logs.gather(1, right[:, None]).mean().item(), rel=1e-5)
        assert found.is_likeliest == bool((logs.argmax(-1) == right).all())


def test_centred_accuracy_is_0_for_guessing_and_1_for_all_right() -> None:
    task = Task("", "multiple_choice", 0, " ", 0.25, [])
    assert core.figures(task, [True, False, False, False])["centered"] == 0
    assert core.figures(task, [True] * 4)["centered"] == 1


def test_forge_eval_says_which_tasks_the_bundle_lacks(tmp_path: Path, run: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    zipped = tmp_path / "bundle.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        for file in bundle.rglob("*.*"):
            archive.write(file, Path("eval_bundle") / file.relative_to(bundle))
    printed = []
    for path in (bundle, zipped):
        command = [str(run), str(run), "--core", str(path), "--json"]
        result = CliRunner().invoke(cli.evaluate, command)
        assert result.exit_code == 0, result.output
        printed.append([json.loads(line) for line in result.stdout.splitlines()])
    assert printed[0] == printed[1]
    (row, same) = printed[0]
    assert row == same
    assert set(row["tasks"]) == {"arc_easy", "winograd", "jeopardy"}
    centred = [task["centered"] for task in row["tasks"].values()]
    assert row["core"] == pytest.approx(sum(centred) / 3)
    assert len(row["missing_tasks"]) == 19
    table = CliRunner().invoke(cli.evaluate, [str(run), "--core", str(bundle)]).stdout
    assert "3 of CORE's 22 tasks; the bundle lacks hellaswag_zeroshot" in table


def test_ranks_share_the_work_and_rank_0_prints_the_same_figures(
    tmp_path: Path, run: Path, small_shards: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"ctx": "It is", "endings": ["a", "b"], "label": 1}\n' * 3)
    program = Path(sys.executable).with_name("forge-eval")
    command = [program, run, "--core", write_bundle(tmp_path), "--questions", questions]
    command += ["--data", small_shards, "--num-tokens", 640, "--json"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc_per_node=2", "--no-python"]
    alone, shared = (
        subprocess.run([*map(str, front + command)], capture_output=True, text=True, check=True)
        for front in ([], launcher)
    )
    rows = [[json.loads(line) for line in each.stdout.splitlines()] for each in (alone, shared)]
    ours, theirs = rows
    assert theirs[0] == pytest.approx(ours[0])  # whose batches had another shape
    assert theirs[1:] == ours[1:]
    assert len(ours) == 3


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_that_was_damaged_on_its_way_is_one_error(tmp_path: Path, compression: int) -> None:
    zipped = tmp_path / "bundle.zip"
    with zipfile.ZipFile(zipped, "w", compression) as archive:
        for file in write_bundle(tmp_path / "bundle").rglob("*.*"):
            archive.write(file, file.relative_to(tmp_path / "bundle"))
        start = archive.getinfo("eval_data/x/arc_easy.jsonl").header_offset
    data = bytearray(zipped.read_bytes())
    data[start + 30 + len("eval_data/x/arc_easy.jsonl")] ^= 0xFF  # its first byte
    zipped.write_bytes(data)
    with pytest.raises(ForgeError, match="cannot read the evaluation bundle"):
        read_bundle(zipped, None)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("core.yaml", "icl_tasks: [", "cannot read the evaluation bundle"),
        ("core.yaml", "tasks: []", "'icl_tasks' is missing"),
        (
            "core.yaml",
            "icl_tasks: [{label: a, icl_task_type: schema, num_fewshot: []}]",
            "cannot read the evaluation bundle",
        ),
        ("eval_meta_data.csv", "Eval Task,Random baseline\n", "'arc_easy' is missing"),
        ("eval_data/x/arc_easy.jsonl", '{"query": "Q"}\n' * 3, "no multiple_choice item"),
        ("eval_data/x/arc_easy.jsonl", "{\n", "cannot read the evaluation bundle"),
        (
            "eval_data/x/arc_easy.jsonl",
            (json.dumps(CHOICE | {"gold": 2}) + "\n") * 3,
            "gold 2 of 2",
        ),
        ("eval_data/x/winograd.jsonl", json.dumps(SCHEMA), "too few for 1 examples"),
        ("core.yaml", "icl_tasks: []", "no task of the bundle has its file"),
    ],
)
def test_bundle_that_cannot_be_used_is_one_error(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    with pytest.raises(ForgeError, match=message):
        read_bundle(write_bundle(tmp_path, **{file: content}), None)


def test_folder_without_core_yaml_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match=r"no core\.yaml"):
        read_bundle(tmp_path, None)
