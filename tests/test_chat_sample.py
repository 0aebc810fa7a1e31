"""forge-sample, forge-export and forge-eval with a model that was trained on chat."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONTEXT, HOW, LEARNED, LOUD, SYSTEM, WHO
from test_sample import CPU, asked

from pipeline import chatml, shards, tokenizer
from pipeline.errors import ForgeError
from sampler import chat
from sampler.chat import Chat
from sampler.draw import Sampling
from sampler.generate import Limits
from sampler.load import open_model


def opened(run: Path, system: str | None = None) -> Chat:
    loaded = open_model(run, None, CPU)
    session = Chat(loaded, Sampling(temperature=0), Limits(20, (), False), 1, as_json=False)
    session.system = system
    return session


def test_a_prompt_is_answered_once(chat_run: Path, forge) -> None:
    result = forge("sample", chat_run, "--prompt", " Who are you?\n", "--temperature", 0)
    assert result.output == "A small model.\n"


@pytest.mark.parametrize("name", ["chat_run", "modern_chat_run"])
def test_an_export_answers_with_transformers_as_here(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, forge
) -> None:
    chat_run = request.getfixturevalue(name)
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "hf"
    result = forge("export", chat_run, out, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "logits differ by at most" in result.output
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (50259, 50258)

    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for messages in (*LEARNED, [SYSTEM, {"role": "user", "content": "\n\n  x <b> \n"}]):
        for opens in (False, True):
            found = theirs.apply_chat_template(
                messages, add_generation_prompt=opens, return_dict=False
            )
            assert found == chatml.render(messages, tokenizer.encode, add_generation_prompt=opens)
    assert theirs.pad_token_id == shards.EOT_TOKEN
    assert theirs.eos_token_id == chatml.IM_END

    pipeline = transformers.pipeline("text-generation", str(out))
    for messages in ([*WHO, HOW[0]], [SYSTEM, WHO[0]]):
        said = pipeline(messages, max_new_tokens=20, do_sample=False)[0]["generated_text"]
        assert said[-1] == (LOUD if messages[0] == SYSTEM else HOW[1])
    options = ["--temperature", 0, "--prompt", "Who are you?"]
    texts = [forge("sample", path, *options).output for path in (chat_run, out)]
    assert texts == ["A small model.\n"] * 2


def test_the_loss_over_the_assistant_s_words_is_that_of_a_plain_loop(
    chat_run: Path, run: Path, chat_shards: Path, forge
) -> None:
    """Of a base model, too, whose markers are the mean token as when training starts."""
    rows = forge("eval", run, chat_run, "--data", chat_shards, "--json").output.splitlines()
    base, tuned = map(json.loads, rows)
    assert tuned["loss"] < 0.05 < 5 < base["loss"]
    assert tuned["difference"] == pytest.approx(tuned["loss"] - base["loss"])
    for path, row in ((run, base), (chat_run, tuned)):
        loaded = open_model(path, None, CPU)
        weight = loaded.model.wte.weight
        if path == run:
            mean = weight.mean(0, keepdim=True)
            loaded.model.wte.weight = torch.nn.Parameter(torch.cat([weight, mean, mean]))
        nats, count, num_bytes = 0.0, 0, 0
        for messages in LEARNED:
            tokens = chatml.render(messages, tokenizer.encode)
            logits = loaded.model.logits(loaded.model.hidden(torch.tensor([tokens])))[0]
            logs = logits.double().log_softmax(-1)
            for place in np.flatnonzero(chatml.trained(np.array(tokens))):
                nats -= logs[place - 1, tokens[place]].item()
                count += 1
            said = [m["content"] for m in messages if m["role"] == "assistant"]
            num_bytes += len("".join(said))
        assert row["num_tokens"] == count
        assert row["loss"] == pytest.approx(nats / count, abs=1e-4)
        assert row["bits_per_byte"] == pytest.approx(nats / np.log(2) / num_bytes, abs=1e-4)
    table = forge("eval", run, chat_run, "--data", chat_shards).output
    assert f"Over {count} tokens of the val split" in table


def test_a_conversation_remembers_its_turns_until_reset(
    chat_run: Path, capsys: pytest.CaptureFixture
) -> None:
    session = opened(chat_run)
    session.interact(1, 0, asked("Who are you?", "", "How small?"))
    assert capsys.readouterr().out == "A small model.\nVery small.\n\n"
    assert session.history == (*WHO, *HOW)
    session.interact(1, 0, asked("/reset", "Who are you?", "/quit", "How small?"))
    assert session.history == tuple(WHO)
    capsys.readouterr()
    session.interact(1, 0, asked("/help"))
    said = capsys.readouterr()
    assert (said.out, said.err.count("/reset starts")) == ("\n", 2)
    assert session.history == tuple(WHO)
    loud = opened(chat_run, system=SYSTEM["content"])
    loud.interact(1, 0, asked("Who are you?"))
    assert loud.history[-1] == LOUD


def test_ctrl_c_ends_an_answer_and_what_was_said_stays_in_the_conversation(
    chat_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(chat_run)
    honest, answers = session.show, []

    def show(sample, *more) -> None:
        honest(sample, *more)
        if len(sample.tokens) == 2 and not answers:
            answers.append(sample.text)
            raise KeyboardInterrupt

    monkeypatch.setattr(session, "show", show)
    session.interact(1, 0, asked("Who are you?", "How small?"))
    assert session.history[1]["content"] == answers[0] == "A small"
    assert len(session.history) == 4


def test_the_oldest_turns_go_when_the_context_is_full_and_the_system_s_text_stays(
    chat_run: Path, capsys: pytest.CaptureFixture
) -> None:
    session = opened(chat_run)
    old = [{**m, "content": f"{m['content']} {'more ' * 8}"} for m in WHO]
    for system in ([], [SYSTEM]):
        row = {"messages": [*system, *old, *WHO, HOW[0]]}
        tokens = session.encode(chat.Prompt("", row))
        kept = [*system, *WHO, HOW[0]]
        assert tokens == chatml.render(kept, tokenizer.encode, add_generation_prompt=True)
        assert len(tokens) <= CONTEXT - 16
        assert "the oldest 2 messages are left out" in capsys.readouterr().err
    with pytest.raises(ForgeError, match=r"a message of .*: 48 have room"):
        session.encode(chat.Prompt("word " * 60))


@pytest.mark.parametrize("marker", [*chatml.MARKERS])
def test_an_answer_ends_at_any_marker_and_holds_none(chat_run: Path, marker: int) -> None:
    session = opened(chat_run)
    honest = session.loaded.model.logits

    def logits(x: torch.Tensor) -> torch.Tensor:
        """Draw `marker` where <|im_end|> is due, and never a row of the padding."""
        found = honest(x)
        found[:, marker] = found[:, chatml.IM_END] + 1e-3
        found[:, chatml.VOCAB_SIZE :] = 1e9
        return found

    session.loaded.model.logits = logits
    assert list(session.stream(chat.Prompt("Who are you?"), 0))[-1] == "A small model."


def test_a_file_of_conversations_is_answered_line_by_line(
    chat_run: Path, run: Path, tmp_path: Path, forge
) -> None:
    path = tmp_path / "asked.jsonl"
    rows = [
        {"messages": [*WHO, HOW[0]], "id": 1},
        {"messages": [SYSTEM, WHO[0]], "id": 2},
        {"prompt": "Who are you?", "id": 3},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--prompts-file", path, "--temperature", 0]
    found = [json.loads(line) for line in forge("sample", chat_run, *options).output.splitlines()]
    said = [HOW[1]["content"], LOUD["content"], WHO[1]["content"]]
    assert [row["text"] for row in found] == said
    assert {row["finish"] for row in found} == {"eot"}
    for row, asked_row in zip(found, rows, strict=True):
        assert row.items() >= asked_row.items()
        assert row["tokens"] == tokenizer.encode(row["text"])
        assert len(row["logprobs"]) == len(row["tokens"])
    for bad in (
        [],
        [SYSTEM],
        WHO,
        [{"role": "robot", "content": "a"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": " "}],
        [{"role": "user"}],
        ["a"],
        "a",
    ):
        path.write_text(json.dumps({"messages": bad}) + "\n")
        result = forge("sample", chat_run, "--prompts-file", path)
        assert result.exit_code == 1, bad
        assert f"{path}, line 1" in result.output
    path.write_text(json.dumps(rows[0]) + "\n")
    for arguments in ([run], [chat_run, "--base"]):
        result = forge("sample", *arguments, "--prompts-file", path)
        assert result.exit_code == 1
        assert "a conversation, for a model that continues text" in result.output


def test_base_continues_a_text_and_draws_no_marker(chat_run: Path, run: Path, forge) -> None:
    options = ["--prompt", "The moon", "--max-tokens", 5, "--temperature", 1e6, "--json"]
    row = json.loads(forge("sample", chat_run, "--base", *options, "--num-samples", 1).output)
    assert max(row["tokens"]) < shards.EOT_TOKEN
    assert forge("sample", chat_run, "--base", *options[:-1]).output.startswith("The moon")
    result = forge("sample", run, "--system", "Be brief.", "--prompt", "a")
    assert result.exit_code == 2
    assert "trained on chat" in result.output


@pytest.mark.parametrize(
    ("host", "origin", "is_local", "is_own"),
    [
        (b"127.0.0.1:7860", None, True, True),
        (b"localhost:7860", b"http://localhost:7860", True, True),
        (b"127.0.0.1:7860", b"http://evil.example", True, False),
        (b"evil.example", None, True, False),  # a name that now leads here
        (b"192.168.1.5:7860", b"http://192.168.1.5:7860", False, True),
        (b"192.168.1.5:7860", b"http://evil.example", False, False),
    ],
)
def test_the_page_answers_no_other_site(
    host: bytes, origin: bytes | None, is_local: bool, is_own: bool
) -> None:
    from sampler.web import SelfOnly

    headers = {b"host": host} | ({b"origin": origin} if origin else {})
    assert SelfOnly(None, is_local).is_own(headers) == is_own
