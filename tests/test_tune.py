"""forge-train chat: the loss is over the assistant's words alone, and every law holds."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import metrics_of
from safetensors.torch import load_file
from test_train import QUICK, same_weights, weights

from pipeline import chatml, shards, tokenizer
from trainer import checkpoint, layouts
from trainer.config import ModelConfig
from trainer.cross_entropy import IGNORED
from trainer.model import build_model
from trainer.windows import Windows, to_device

CPU = torch.device("cpu")
LENGTH = 64
STEPS = 6
CHAT = [
    "--set=batch.tokens_per_step=256",
    f"--set=schedule.max_steps={STEPS}",
    "--set=schedule.warmup_steps=2",
    "--set=evaluate.every_steps=3",
    "--set=evaluate.num_tokens=128",
    "--set=evaluate.sample_tokens=4",
    "--set=checkpoint.every_steps=3",
]


def conversation(number: int) -> list[dict[str, str]]:
    asked = f"What is {number} and {number % 7}?"
    said = f"It is {number + number % 7}. " * (1 + number % 3)
    system = [{"role": "system", "content": "Be brief."}] * (number % 2)
    return [
        *system,
        {"role": "user", "content": asked},
        {"role": "assistant", "content": said},
    ]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, forge: Callable[..., Result]) -> Path:
    """A folder of 200 short conversations, packed for 64 tokens of context."""
    root = tmp_path_factory.mktemp("chat")
    lines = [json.dumps({"messages": conversation(number)}) for number in range(200)]
    (root / "chat.jsonl").write_text("\n".join(lines))
    options = ["--context-length", LENGTH, "--val-fraction", 0.2, "--workers", 1]
    made = forge("prep", "chat", root / "chat.jsonl", "--out", root / "shards", *options)
    assert made.exit_code == 0, made.output
    return root / "shards"


@pytest.fixture(scope="module")
def tuned(
    chat: Path, run: Path, tmp_path_factory: pytest.TempPathFactory, forge: Callable[..., Result]
) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    result = forge("train", "chat", "--from", run, "--data", chat, "--out", out, *CHAT)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_loss_and_gradients_are_those_of_a_plain_loop_over_single_conversations(
    family: str,
) -> None:
    sizes = (2, 2, 16, family, LENGTH)
    config = ModelConfig(*sizes, vocab_size=chatml.VOCAB_SIZE, bias=family == "gpt2")  # type: ignore[arg-type]
    model = build_model(config)
    model.init_weights(1)
    model.double()
    alone = [chatml.render(conversation(number), tokenizer.encode) for number in range(4)]
    padded = np.full((4, LENGTH + 1), chatml.IM_END, np.uint16)
    for row, tokens in zip(padded, alone, strict=True):
        row[: len(tokens)] = tokens
    model(*to_device(padded, CPU, is_chat=True)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    total, count = torch.zeros((), dtype=torch.float64), 0
    model.zero_grad()
    for number, tokens in enumerate(alone):
        said = tokenizer.encode("assistant\n" + conversation(number)[-1]["content"].strip())
        end = len(tokens) - 2  # of the answer's <|im_end|>; a line's end follows
        first = end - len(said) + len(chatml.ASSISTANT)
        logits = model.logits(model.hidden(torch.tensor([tokens])))[0]
        for place in range(first, end + 1):
            total = total - logits[place - 1].log_softmax(-1)[tokens[place]]
            count += 1
    total.backward()
    targets = to_device(padded, CPU, is_chat=True)[1]
    assert (targets != IGNORED).sum() == count
    with torch.no_grad():
        packed = model(*to_device(padded, CPU, is_chat=True))
    assert packed.item() == pytest.approx(total.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-8)


def test_a_run_is_tuned_and_says_so(tuned: Path, run: Path, chat: Path) -> None:
    losses = [row["loss"] for row in metrics_of(tuned, "evaluate")]
    assert losses[-1] < losses[0]
    assert f"trained from {run}" in (tuned / "README.md").read_text()
    index = json.loads((tuned / "data_index.json").read_text())
    assert index["chat"]["context_length"] == LENGTH
    sample = metrics_of(tuned, "sample")[-1]["text"]
    assert "user\nWhat is" in sample
    assert "assistant\n" in sample


def test_new_rows_of_the_embedding_are_the_mean_of_the_others(
    tmp_path: Path, chat: Path, run: Path, forge: Callable[..., Result]
) -> None:
    out = tmp_path / "run"
    stopped = [*CHAT, "--set=schedule.max_steps=1", "--set=optimizer.peak_lr=1e-30"]
    result = forge("train", "chat", "--from", run, "--data", chat, "--out", out, *stopped)
    assert result.exit_code == 0, result.output
    old, new = weights(run)["wte.weight"], weights(out)["wte.weight"]
    assert new.shape == (chatml.VOCAB_SIZE, old.shape[1])
    assert torch.equal(new[: len(old)], old)
    torch.testing.assert_close(new[len(old) :], old.mean(0).expand(2, -1))


def test_a_resumed_tuning_ends_with_the_same_bits(
    tmp_path: Path, chat: Path, run: Path, tuned: Path, forge: Callable[..., Result]
) -> None:
    out = tmp_path / "run"
    command = ["chat", "--from", run, "--data", chat, "--out", out, *CHAT]
    assert forge("train", *command).exit_code == 0
    last = out / "checkpoints" / f"step_{STEPS:08d}"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    command = ["chat", "--data", chat, "--out", out, *CHAT, "--resume"]  # --from is not needed
    assert forge("train", *command).exit_code == 0
    assert same_weights(out, tuned)


def test_two_ranks_divide_by_the_trained_tokens_of_both(
    tmp_path: Path, chat: Path, run: Path, tuned: Path, torchrun
) -> None:
    out = tmp_path / "run"
    result = torchrun(2, "chat", "--from", run, "--data", chat, "--out", out, *CHAT)
    assert result.returncode == 0, result.stderr
    for kind in ("step", "evaluate"):
        ours, theirs = ([row["loss"] for row in metrics_of(r, kind)] for r in (out, tuned))
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_epochs_end_a_run(
    tmp_path: Path, chat: Path, run: Path, forge: Callable[..., Result]
) -> None:
    out = tmp_path / "run"
    command = ["chat", "--from", run, "--data", chat, "--out", out]
    command += [each for each in CHAT if "max_steps" not in each] + [
        "--set=schedule.max_epochs=0.5"
    ]
    assert forge("train", *command).exit_code == 0
    num_windows = Windows(shards.load_index(chat), "train", LENGTH).num_windows
    assert metrics_of(out, "step")[-1]["step"] == math.ceil(num_windows / 2 / 4)
    again = forge("train", *command, "--resume")
    assert "The run is complete" in again.output


def test_a_folder_of_transformers_is_tuned(
    tmp_path: Path, chat: Path, run: Path, forge: Callable[..., Result]
) -> None:
    exported, out = tmp_path / "hf", tmp_path / "run"
    assert forge("export", run, exported, "--dtype", "float32").exit_code == 0
    result = forge("train", "chat", "--from", exported, "--data", chat, "--out", out, *CHAT)
    assert result.exit_code == 0, result.output
    assert layouts.read_model(exported).vocab_size == shards.VOCAB_SIZE


def test_markers_take_the_place_of_padding_as_the_mean_token(
    tmp_path: Path, chat: Path, small_shards: Path, forge: Callable[..., Result]
) -> None:
    base, out = tmp_path / "base", tmp_path / "run"
    padded = [*QUICK, "--set=model.vocab_size=50304", "--set=schedule.max_steps=2"]
    assert forge("train", "tiny", "--data", small_shards, "--out", base, *padded).exit_code == 0
    short = [*CHAT, "--set=schedule.max_steps=1", "--set=optimizer.peak_lr=1e-30"]
    short += ["--set=optimizer.name=adamw"]
    assert (
        forge("train", "chat", "--from", base, "--data", chat, "--out", out, *short).exit_code == 0
    )
    old, new = weights(base)["wte.weight"], weights(out)["wte.weight"]
    assert torch.equal(new[: shards.VOCAB_SIZE], old[: shards.VOCAB_SIZE])
    mean = old[: shards.VOCAB_SIZE].mean(0).expand(2, -1)
    torch.testing.assert_close(new[shards.VOCAB_SIZE : chatml.VOCAB_SIZE], mean)
    assert torch.equal(new[chatml.VOCAB_SIZE :], old[chatml.VOCAB_SIZE :])


def test_a_run_killed_before_its_first_save_is_no_run_yet(
    tmp_path: Path, chat: Path, run: Path, forge: Callable[..., Result], monkeypatch
) -> None:
    """So the same command begins it again, and never with random weights."""
    out = tmp_path / "run"
    command = ["chat", "--from", run, "--data", chat, "--out", out, *CHAT, "--resume"]

    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", full)
        result = forge("train", *command)
    assert result.exit_code == 1
    assert "the weights of --from are not saved" in result.output
    assert not (out / "config.toml").exists()
    assert forge("train", *command).exit_code == 0


def test_a_run_of_another_vocabulary_is_not_tuned(
    tmp_path: Path, chat: Path, run: Path, forge: Callable[..., Result]
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    step = checkpoint.steps(other)[-1]
    state = checkpoint.load_state(other, step)
    state.vocabulary = "0" * 64
    files = [
        load_file(checkpoint.checkpoint_path(other, step) / name)
        for name in (checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE)
    ]
    checkpoint.save(other, iter(files), state)
    out = tmp_path / "run"
    for end in (["--out", out], ["--check"]):
        result = forge("train", "chat", "--from", other, "--data", chat, *end, *CHAT)
        assert result.exit_code == 1
        assert "the weights are of another vocabulary" in result.output


def test_data_and_config_that_do_not_fit_are_one_error(
    tmp_path: Path, chat: Path, run: Path, small_shards: Path, forge: Callable[..., Result]
) -> None:
    out = ["--out", tmp_path / "run"]
    wider = "--set=model.vocab_size=50259"
    for arguments, message in (
        (["chat", "--data", chat], "the config has no model of its own"),
        (["chat", "--from", run, "--data", small_shards], "a folder of text, not of conversations"),
        (["tiny", "--data", chat, *QUICK, wider], "conversations tune a model that was trained"),
        (["tiny", "--data", chat, *QUICK], "the shards have 50,259 token ids, the model 50,257"),
        (
            ["tiny", "--data", chat, *QUICK, wider, "--set=model.context_length=32"],
            "conversations packed for 64 tokens of context",
        ),
    ):
        result = forge("train", *arguments, *out)
        assert result.exit_code == 1, result.output
        assert message in result.output
        assert not (tmp_path / "run").exists()
