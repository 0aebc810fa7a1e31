"""Conversations: rows of a source -> messages -> tokens -> packed windows. It knows no files.

A window has exactly context_length tokens. It holds whole conversations, each of which begins with
<|endoftext|>, then padding: <|im_end|> outside a turn. What cannot be trained on is left out, for
one of REASONS.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import chatml
from pipeline.errors import ForgeError

Tokens = npt.NDArray[np.uint16]
Messages = list[dict[str, str]]

# Columns that hold a conversation: one with a list of messages; or those of a prompt, whose parts
# are joined, and of its answer. The first layout whose columns are all there is taken.
LAYOUTS = (
    ("messages",),
    ("conversations",),
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("prompt", "completion"),
)
NAMES_OF_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in chatml.ROLES}
REASONS = {
    "null": "null",
    "empty": "without a message, or with one without text",
    "malformed": "not a list of messages with a role and a content (or from and value)",
    "unknown_role": f"with a role that is none of {', '.join(NAMES_OF_ROLES)}",
    "not_text": "with content that is null, a list of parts or otherwise no text",
    "no_assistant": "without an assistant's turn",
    "too_long": "longer than the context (--long cut keeps their beginning)",
}
COUNTS = ("num_turns", "num_trained_tokens", "num_padding_tokens")
MIN_CONTEXT_LENGTH = 16
EOT = np.array([chatml.EOT_TOKEN], np.uint16)
NAME_COLUMNS = (
    "name the column of the messages, or those of prompt and answer: "
    "--columns dialog, --columns question,response"
)


@dataclass(frozen=True)
class ChatOptions:
    """How conversations are found and laid out. `columns` is a layout, if it is none of LAYOUTS."""

    context_length: int = 1024
    long: str = "leave"  # or "cut": what happens to conversations longer than the context
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.context_length < MIN_CONTEXT_LENGTH:
            what = f"--context-length {self.context_length} is too short for a conversation"
            raise ForgeError(what, fix=f"take the model's own, from {MIN_CONTEXT_LENGTH} on")

    def record(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return asdict(self) | {"columns": list(self.columns)}


def describe_skipped(counts: Mapping[str, int]) -> list[str]:
    """How many conversations were left out for each reason, in words."""
    return [f"{counts[why]:,} {REASONS[why]}" for why in REASONS if counts.get(why)]


class LeftOutError(Exception):
    """A conversation that is not trained on. Its text is one of REASONS."""


def find_columns(names: Iterable[str], wanted: tuple[str, ...], where: object) -> tuple[str, ...]:
    """The `wanted` columns, or the first of LAYOUTS that is there. ForgeError if there is none."""
    names, layouts = list(names), (wanted,) if wanted else LAYOUTS
    for columns in layouts:
        if set(columns) <= set(names):
            return columns
    known = " or ".join(" + ".join(columns) for columns in layouts)
    what = f"no conversations: no columns {known}; there are: {', '.join(names)}"
    raise ForgeError(what, where=where, fix=NAME_COLUMNS)


def read_messages(row: Mapping[str, Any], columns: tuple[str, ...]) -> Messages:
    """The messages of a row, trimmed, with roles of chatml.ROLES.

    A system message without text is dropped. Raises LeftOutError for a row that is not a
    conversation with an assistant.
    """
    raw = row[columns[0]]
    if raw is None:
        raise LeftOutError("null")
    if len(columns) > 1:
        *parts, answer = (row[name] for name in columns)
        parts = [part for part in parts if part is not None]
        if not all(isinstance(part, str) for part in parts):
            raise LeftOutError("not_text")
        prompt = "\n\n".join(part for part in map(str.strip, parts) if part)
        raw = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    if not isinstance(raw, list):
        raise LeftOutError("malformed")
    messages = [_read_message(each) for each in raw]
    messages = [each for each in messages if each["content"] or each["role"] != "system"]
    if not messages or not all(each["content"] for each in messages):
        raise LeftOutError("empty")
    if not any(each["role"] == "assistant" for each in messages):
        raise LeftOutError("no_assistant")
    return messages


def _read_message(raw: Any) -> dict[str, str]:
    match raw:
        case {"role": str(role), "content": content} | {"from": str(role), "value": content}:
            pass
        case _:
            raise LeftOutError("malformed")
    if role not in NAMES_OF_ROLES:
        raise LeftOutError("unknown_role")
    try:
        content.encode()
    except (AttributeError, UnicodeEncodeError):  # JSON can escape half a character
        raise LeftOutError("not_text") from None
    return {"role": NAMES_OF_ROLES[role], "content": content.strip()}


def fit(tokens: Tokens, options: ChatOptions) -> Tokens:
    """A conversation that fits into a window: all of it, or with `long` "cut" its beginning.

    It is cut behind the last assistant's turn that fits. Raises LeftOutError if it is left out.
    """
    if len(tokens) <= options.context_length:
        return tokens
    is_end = chatml.trained(tokens) & (tokens == chatml.IM_END)
    stops = np.flatnonzero(is_end) + 1 + len(chatml.NEWLINE)
    stops = stops[stops <= options.context_length]
    if options.long == "leave" or not len(stops):
        raise LeftOutError("too_long")
    return tokens[: stops[-1]]


def pack(lengths: Sequence[int], context_length: int) -> list[list[int]]:
    """Which conversations share a window: best fit, longest first.

    Each goes into the window that has the least room left, but enough. Both windows and what they
    hold come in the order of the source. No length may be over context_length.

    Source: Johnson 1973, "Near-optimal bin packing algorithms"; for language models Ding et al.
    2024, arXiv:2404.10830.
    """
    windows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(context_length + 1)]  # windows, by tokens left
    has_room = bytearray(context_length + 1)  # whether there is such a window
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        room = has_room.find(True, lengths[number])
        if room < 0:
            room = context_length
            by_room[room].append(len(windows))
            windows.append([])
        window = by_room[room].pop()
        has_room[room] = bool(by_room[room])
        windows[window].append(number)
        left = room - lengths[number]
        by_room[left].append(window)
        has_room[left] = True
    return sorted(sorted(window) for window in windows)


def join(documents: Iterable[npt.NDArray[Any]]) -> Tokens:
    """Some documents as one array, each behind <|endoftext|>."""
    pieces = [piece for tokens in documents for piece in (EOT, tokens)]
    return np.concatenate(pieces, dtype=np.uint16, casting="unsafe")


def lay_out(conversations: Sequence[Tokens], context_length: int) -> Tokens:
    """Packed conversations behind <|endoftext|>, and padding: (num_windows, context_length)."""
    packed = pack([1 + len(tokens) for tokens in conversations], context_length)
    windows = np.full((len(packed), context_length), chatml.IM_END, np.uint16)
    for window, numbers in zip(windows, packed, strict=True):
        together = join([conversations[number] for number in numbers])
        window[: len(together)] = together
    return windows


def count(windows: Tokens) -> dict[str, int]:
    """What windows hold. A turn is a message, of any role."""
    starts, ends = (int((windows == token).sum()) for token in (chatml.IM_START, chatml.IM_END))
    num_trained = int(chatml.trained(windows).sum())
    return dict(zip(COUNTS, (starts, num_trained, ends - starts), strict=True))


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums over some of count()'s results."""
    rows = list(counts)
    return {name: sum(row[name] for row in rows) for name in COUNTS}
