"""Rows become conversations or are left out for a reason; conversations are packed, none is cut."""

import numpy as np
import pytest

from pipeline import chat, chatml, tokenizer
from pipeline.chat import ChatOptions, LeftOutError
from pipeline.errors import ForgeError

ASKED = {"role": "user", "content": "Two and two?"}
SAID = {"role": "assistant", "content": "Four."}


def conversation(*sizes: int) -> chat.Tokens:
    """A conversation of turns, by user and assistant, with these numbers of one-token words."""
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": " a" * size} for n, size in enumerate(sizes)]
    return np.array(chatml.render(turns, tokenizer.encode), np.uint16)


def left_out(messages: object) -> str:
    with pytest.raises(LeftOutError) as found:
        chat.read_messages({"messages": messages}, ("messages",))
    return str(found.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID], "source": "x", "prompt": "another thing"},
        {"conversations": [{"from": "human", "value": "Two and two?"}, SAID]},
        {"conversations": [ASKED, {"from": "gpt", "value": " Four.\n"}]},
        {"instruction": "Two and two?", "input": "", "output": "Four."},
        {"instruction": "Two and two?", "input": None, "output": "Four."},
        {"instruction": "Two and two?", "output": "Four.", "text": "all of it"},
        {"prompt": "Two and two?", "completion": "Four."},
    ],
)
def test_each_layout_is_found_by_its_columns(row: dict) -> None:
    columns = chat.find_columns(row, (), "here")
    assert chat.read_messages(row, columns) == [ASKED, SAID]


def test_columns_of_other_names_are_named() -> None:
    row = {"messages": [], "question": "Two and two?", "response": "Four.", "dialog": [ASKED, SAID]}
    for wanted in (("dialog",), ("question", "response")):
        columns = chat.find_columns(row, wanted, "here")
        assert chat.read_messages(row, columns) == [ASKED, SAID]
    with pytest.raises(ForgeError, match=r"no columns question \+ answer; there are: messages"):
        chat.find_columns(row, ("question", "answer"), "here")
    nothing = r"no conversations.*prompt \+ completion.*there are: text"
    with pytest.raises(ForgeError, match=nothing):
        chat.find_columns(["text"], (), "here")


def test_an_input_follows_its_instruction() -> None:
    row = {"instruction": "Add.\n", "input": "2 and 2", "output": "4"}
    messages = chat.read_messages(row, chat.LAYOUTS[2])
    assert messages[0] == {"role": "user", "content": "Add.\n\n2 and 2"}


def test_a_system_message_stays_and_one_without_text_is_none() -> None:
    for role_key, content_key in (("role", "content"), ("from", "value")):
        system = {role_key: "system", content_key: " Be brief. "}
        kept = chat.read_messages({"messages": [system, ASKED, SAID]}, ("messages",))
        assert kept == [{"role": "system", "content": "Be brief."}, ASKED, SAID]
    nothing = {"role": "system", "content": " \n"}
    assert chat.read_messages({"messages": [nothing, SAID]}, ("messages",)) == [SAID]


@pytest.mark.parametrize(
    ("reason", "messages"),
    [
        ("null", None),
        ("empty", []),
        ("empty", [{"role": "system", "content": ""}]),
        ("empty", [ASKED, {"role": "assistant", "content": " \n\t"}]),
        ("malformed", "user: Two and two?"),
        ("malformed", {"role": "user", "content": "x"}),
        ("malformed", ["Two and two?"]),
        ("malformed", [None]),
        ("malformed", [{"role": "user"}]),
        ("malformed", [{"text": "x"}]),
        ("malformed", [{"role": None, "content": "x"}, SAID]),
        ("malformed", [{"role": ["user"], "content": "x"}, SAID]),
        ("unknown_role", [ASKED, SAID, {"role": "tool", "content": "4"}]),
        ("unknown_role", [{"role": "", "content": "x"}, SAID]),
        ("not_text", [ASKED, {"role": "assistant", "content": None}]),
        ("not_text", [{"role": "user", "content": [{"type": "text", "text": "x"}]}, SAID]),
        ("not_text", [{"role": "user", "content": 4}, SAID]),
        ("not_text", [{"role": "user", "content": "half a letter: \ud83d"}, SAID]),
        ("no_assistant", [ASKED]),
        ("no_assistant", [{"role": "system", "content": "Be brief."}, ASKED]),
    ],
)
def test_a_bad_conversation_is_left_out_for_its_reason(reason: str, messages: object) -> None:
    assert left_out(messages) == reason
    assert reason in chat.REASONS


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("null", {"prompt": None, "completion": "Four."}),
        ("empty", {"prompt": " ", "completion": "Four."}),
        ("empty", {"prompt": "Two and two?", "completion": ""}),
        ("not_text", {"prompt": "Two and two?", "completion": None}),
        ("not_text", {"prompt": [ASKED], "completion": [SAID]}),
        ("not_text", {"prompt": "\udead", "completion": "Four."}),
    ],
)
def test_a_bad_pair_is_left_out_for_its_reason(reason: str, row: dict) -> None:
    with pytest.raises(LeftOutError) as found:
        chat.read_messages(row, ("prompt", "completion"))
    assert str(found.value) == reason


def test_packing_keeps_every_conversation_whole_and_wastes_little() -> None:
    # Lengths like smol-smoltalk's: median about 500 tokens, many near 1,024.
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(450), 0.7, 20_000).astype(int) + 8
    lengths = lengths[lengths <= 1024].tolist()
    windows = chat.pack(lengths, 1024)
    assert sorted(number for window in windows for number in window) == list(range(len(lengths)))
    assert max(sum(lengths[n] for n in window) for window in windows) <= 1024
    assert windows == sorted(windows) == chat.pack(lengths, 1024)
    assert 1 - sum(lengths) / (1024 * len(windows)) < 0.05


def test_each_conversation_goes_where_least_room_is_left() -> None:
    assert chat.pack([], 10) == []
    assert chat.pack([4, 10, 6, 3], 10) == [[0, 2], [1], [3]]
    assert chat.pack([7, 6, 3], 10) == [[0, 2], [1]]  # first fit in the source's order would not
    assert chat.pack([8, 7, 2, 3], 10) == [[0, 2], [1, 3]]
    assert chat.pack([10, 10, 1], 10) == [[0], [1], [2]]


def test_windows_hold_conversations_and_then_padding() -> None:
    made = [conversation(5, 9), conversation(30, 30), conversation(2, 3, 1, 1)]
    length = 100
    windows = chat.lay_out([tokens[1:] for tokens in made], length)
    assert windows.shape == (2, length)
    assert windows.dtype == np.uint16
    for window, numbers in zip(windows, ([0, 1], [2]), strict=True):
        together = np.concatenate([made[number] for number in numbers])
        assert window[0] == chatml.EOT_TOKEN
        assert window[: len(together)].tolist() == together.tolist()
        assert set(window[len(together) :].tolist()) <= {chatml.IM_END}
    assert chat.count(windows) == {
        "num_turns": 8,
        "num_trained_tokens": 9 + 30 + 3 + 1 + 4,  # words, and an end for each turn
        "num_padding_tokens": 2 * length - sum(map(len, made)),
    }
    assert chat.lay_out([], length).shape == (0, length)


def test_a_long_conversation_is_cut_behind_the_last_answer_that_fits() -> None:
    whole = conversation(9, 9, 5, 5, 40, 5)
    ends = np.flatnonzero(whole == chatml.IM_END) + 2  # and a line's end
    for length, stop in ((len(whole) - 1, ends[3]), (ends[3], ends[3]), (ends[3] - 1, ends[1])):
        assert chat.fit(whole, ChatOptions(length, "cut")).tolist() == whole[:stop].tolist()
    for options in (ChatOptions(ends[1] - 1, "cut"), ChatOptions(len(whole) - 1, "leave")):
        with pytest.raises(LeftOutError) as found:
            chat.fit(whole, options)
        assert str(found.value) == "too_long"


def test_a_context_too_short_for_anything_is_an_error() -> None:
    with pytest.raises(ForgeError, match="--context-length 15 is too short"):
        ChatOptions(context_length=15)
