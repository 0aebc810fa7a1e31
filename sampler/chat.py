"""A conversation with a model that was trained on chat: its messages -> tokens -> the answer."""

from typing import Any

from pipeline import chatml, tokenizer
from pipeline.errors import ForgeError
from sampler.generate import Sample
from sampler.terminal import Prompt, Session, tell

Message = dict[str, str]


class Chat(Session):
    """Writes answers, where a Session continues texts.

    `history` is the conversation in the terminal so far. `system` is the text that comes first in
    every conversation that does not have one.
    """

    help = "Ctrl-C ends an answer. /reset starts a new conversation, /quit or Ctrl-D leaves."
    echoes_prompt = False

    system: str | None = None
    history: tuple[Message, ...] = ()
    answer = ""  # the last one, as far as it was shown

    def encode(self, prompt: Prompt) -> list[int]:
        """Tokens of a conversation, up to the header of the answer.

        Where it is too long for the context, its oldest turns are left out, but not the system's
        text: a quarter of the context, or --max-tokens if that is less, is kept for the answer.
        """
        messages = prompt.row.get("messages", [{"role": "user", "content": prompt.text}])
        messages = check_messages(messages, prompt.where)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        length = self.decoder.context_length
        most = length - min(self.limits.max_tokens, length // 4)
        tokens, num_dropped = fit(messages, most)
        if len(tokens) > most:
            what = f"a message of {len(tokens):,} tokens, with its system text: {most:,} have room"
            raise ForgeError(what, where=prompt.where, fix="shorten it")
        if num_dropped:
            tell(f"The context is full: the oldest {num_dropped} messages are left out.")
        return tokens

    def respond(self, line: str, num_samples: int, seed: int) -> None:
        """Answer a line, or obey it: /reset, /quit. What Ctrl-C leaves of an answer was said."""
        command = line.strip()
        if command == "/quit":
            raise EOFError
        if command == "/reset":
            self.history = ()
            tell("A new conversation.")
        elif command.startswith("/") and command[1:].isalpha():  # /help, say
            tell(self.help)
        elif command:
            asked = [*self.history, {"role": "user", "content": line}]
            self.answer = ""
            try:
                self.write([Prompt(line, {"messages": asked})], num_samples, seed)
            finally:
                if self.answer.strip():
                    self.history = (*asked, {"role": "assistant", "content": self.answer})

    def show(self, sample: Sample, prompt: Prompt, total: int) -> None:
        self.answer = sample.text
        super().show(sample, prompt, total)


def check_messages(messages: Any, where: str | None) -> list[Message]:
    """Messages that chatml.render() takes and that end with a user's; else ForgeError."""
    fix, problem = 'write {"messages": [{"role": "user", "content": "..."}]}', None
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ForgeError("messages is not a list of objects", where=where, fix=fix)
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in chatml.ROLES:
            problem = f"the role {role!r} is none of {', '.join(chatml.ROLES)}"
        elif not isinstance(content, str):
            problem = f"the content of a message is not a text: {content!r}"
    if not problem and (not messages or role != "user" or not content.strip()):
        problem = "the last message is not a user's, or is empty: nothing to answer"
    if problem:
        raise ForgeError(problem, where=where, fix=fix)
    return messages


def fit(messages: list[Message], most: int) -> tuple[list[int], int]:
    """Tokens of the conversation's end, and how many of its messages are left out.

    The system's message stays, and the one to answer; the others begin with a user's. So the
    tokens may be more than `most`.
    """
    first = int(messages[0]["role"] == "system")
    last = len(messages) - 1
    for start in range(first, last + 1):
        if start > first and messages[start]["role"] != "user":
            continue
        kept = messages[:first] + messages[start:]
        tokens = chatml.render(kept, tokenizer.encode, add_generation_prompt=True)
        if len(tokens) <= most:
            break
    return tokens, start - first
