"""ChatML: a conversation as tokens, and which of them are trained on.

    <|endoftext|>
    <|im_start|>role\\ncontent<|im_end|>\\n     for each message

The markers are token ids that text never makes. The trainer and the sampler import this file, so it
imports numpy and nothing else.

Source: openai-python chatml.md (v0.27); the template is of the kind that transformers uses.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

EOT_TOKEN = 50256  # <|endoftext|>, which begins a conversation
IM_START = 50257
IM_END = 50258
VOCAB_SIZE = 50259
MARKERS = {EOT_TOKEN: "<|endoftext|>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}
ROLES = ("system", "user", "assistant")
NAME = "chatml"  # in index.json
ASSISTANT = (562, 10167, 198)  # "assistant\n"
NEWLINE = (198,)

# Content is trimmed: GPT-2's tokenizer may join the line's end with white space that follows it.
TEMPLATE = (
    "{{ '<|endoftext|>' }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim"
    " + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def as_text(messages: Iterable[Mapping[str, str]]) -> str:
    """A conversation of {"role", "content"} as TEMPLATE renders it."""
    start, end = MARKERS[IM_START], MARKERS[IM_END]
    turns = (f"{start}{each['role']}\n{each['content'].strip()}{end}\n" for each in messages)
    return MARKERS[EOT_TOKEN] + "".join(turns)


def render(
    messages: Iterable[Mapping[str, str]],
    encode: Callable[[str], Iterable[int]],
    add_generation_prompt: bool = False,
) -> list[int]:
    """Token ids of a conversation of {"role", "content"}; see as_text().

    `encode` gives the ids of ordinary text. Markers in a message's content are ordinary text, too.
    `add_generation_prompt` opens the assistant's next turn.
    """
    tokens = [EOT_TOKEN]
    for message in messages:
        tokens.append(IM_START)
        tokens.extend(encode(f"{message['role']}\n{message['content'].strip()}"))
        tokens.append(IM_END)
        tokens.extend(NEWLINE)
    if add_generation_prompt:
        tokens += [IM_START, *ASSISTANT]
    return tokens


def trained(tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Which tokens the loss is over: the assistant's words, and the <|im_end|> of each turn.

    `tokens` is one window, or any array of windows: (..., num_tokens). The result has its shape.
    Of a window of context_length + 1 tokens, the targets are `trained(window)[..., 1:]`.
    """
    here = np.arange(tokens.shape[-1], dtype=np.int32)
    opens = tokens == IM_START  # an assistant's turn
    for offset, token in enumerate(ASSISTANT, start=1):
        opens[..., :-offset] &= tokens[..., offset:] == token
        opens[..., -offset:] = False
    marker = np.maximum.accumulate(np.where(tokens >= EOT_TOKEN, here, 0), axis=-1)
    before = np.zeros_like(marker)  # where the last marker before each token is
    before[..., 1:] = marker[..., :-1]
    in_turn = np.take_along_axis(opens, before, axis=-1)
    is_said = (tokens < EOT_TOKEN) | (tokens == IM_END)
    mask: npt.NDArray[np.bool_] = in_turn & is_said & (here > before + len(ASSISTANT))
    return mask
