"""THE FORMAT: shard files and index.json. Write them, map them, read the index.

A shard is an llm.c / modded-nanogpt token file, little-endian throughout:

    offset  size     what
    0       4        magic 20240520
    4       4        version 1
    8       4        number of tokens
    12      1012     zero
    1024    2 each   tokens, uint16

Every document starts with <|endoftext|> (50256), and text never makes that token. Shards of chat
are windows of conversations (chat.py). Beside the shards lie `r50k_base.tiktoken` (the vocabulary:
one `base64(bytes) rank` a line) and index.json, which is written last: a folder without it is not
finished. What is still being made lies in `.work/`.

Sources: llm.c dev/data/data_common.py (write_datafile), modded-nanogpt data/fineweb.py.
"""

import base64
import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.errors import ForgeError, refusals
from pipeline.files import partial_name

MAGIC = 20240520
VERSION = 1
HEADER = Struct("<3i1012x")
TOKEN_BYTES = 2
HEAD_BYTES = 4096  # of a file: its header and first tokens
FLUSH_TOKENS = 2**21  # 4 MiB, after which a shard's bytes are sent to the disk
MAX_SHARD_TOKENS = 2**31 - 1
VOCAB_SIZE = 50257
EOT_TOKEN = 50256
INDEX_FILE = "index.json"
INDEX_FORMAT = "llm-forge shards"
INDEX_VERSION = 1
VOCABULARY_FILE = "r50k_base.tiktoken"
WORK_FOLDER = ".work"  # of a run of forge-prep that is not finished
# The very hash that tiktoken pins for OpenAI's published r50k_base.tiktoken.
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
MIXTURE = "mixture"  # kind of the source of a folder that lists shards of others (mix.py)
SPLITS = ("train", "val")
SECTIONS = ("tokenizer", "source", "options", "skipped", "chat")  # plain records of index.json
RELIED_ON = {
    "tokenizer": ("vocab_size", "sha256"),
    "source": ("name",),
    "skipped": ("null_documents", "empty_documents"),
    "chat": ("template", "context_length", "splits"),  # None for text
}
COUNTS = ("num_tokens", "num_documents", "text_bytes")  # of a shard
MADE_ANEW = "restore the file, or make the folder again: forge-prep tokenize --overwrite"
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})_\d{{6}}\.bin")

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Shard:
    """One shard as index.json lists it. `checksum` is xxh3_64 (hex) of the token bytes.

    `slice` is the piece of the source it was made of; a val shard joins pieces, and has 0.
    `head_checksum` is that of the file's first 4 KiB, header and first tokens: quick to look at
    before each training run. Empty in folders that were made without it.
    A mixture lists files of other folders, and may use only their first `num_tokens`.
    """

    file: str
    split: str
    num_tokens: int
    num_documents: int
    text_bytes: int
    checksum: str
    slice: int
    head_checksum: str = ""

    @property
    def folder(self) -> str:
        """Where the file lies, seen from the index: "" outside a mixture."""
        return self.file.rpartition("/")[0]


@dataclass(frozen=True)
class DocumentLengths:
    """How long documents are, in tokens without <|endoftext|>; they add up.

    `histogram[k]` counts documents of 2**(k/4) <= length < 2**((k+1)/4): quarter octaves.
    """

    min: int = 0
    max: int = 0
    histogram: tuple[int, ...] = ()

    @staticmethod
    def of(lengths: npt.NDArray[np.int64]) -> "DocumentLengths":
        """Figures of an array of document lengths."""
        if lengths.size == 0:
            return DocumentLengths()
        buckets = np.floor(4 * np.log2(np.maximum(lengths, 1))).astype(np.int64)
        counts = tuple(np.bincount(buckets).tolist())
        return DocumentLengths(int(lengths.min()), int(lengths.max()), counts)

    @staticmethod
    def from_json(raw: dict[str, Any]) -> "DocumentLengths":
        lengths = DocumentLengths(raw["min"], raw["max"], tuple(raw["histogram"]))
        _check_counts(lengths.min, lengths.max, *lengths.histogram)
        return lengths

    def __add__(self, other: "DocumentLengths") -> "DocumentLengths":
        if not other.histogram or not self.histogram:
            return self if self.histogram else other
        counts = tuple(map(sum, zip_longest(self.histogram, other.histogram, fillvalue=0)))
        return DocumentLengths(min(self.min, other.min), max(self.max, other.max), counts)


@dataclass(frozen=True)
class Index:
    """index.json. `source`, `options` and `skipped` are plain records of how it was made.

    `slices` says of each slice what a longer run needs (slices.Record); empty if none can follow.
    """

    folder: Path
    tokenizer: dict[str, Any]
    source: dict[str, Any]
    options: dict[str, Any]
    skipped: dict[str, Any]
    document_tokens: dict[str, DocumentLengths]
    shards: tuple[Shard, ...]
    slices: tuple[dict[str, Any], ...] = ()
    chat: dict[str, Any] | None = None
    sha256: str = field(default="", compare=False)  # of index.json itself, once it is on disk

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(shard.folder for shard in self.shards))

    def of(self, split: str, part: str | None = None) -> tuple[Shard, ...]:
        return tuple(s for s in self.shards if s.split == split and part in (None, s.folder))

    def total(self, name: str, split: str | None = None) -> int:
        """Sum of a count of the shards: num_tokens, num_documents or text_bytes."""
        return sum(getattr(shard, name) for shard in self.shards if split in (None, shard.split))

    def to_json(self) -> str:
        head = {"format": INDEX_FORMAT, "version": INDEX_VERSION}
        head |= {key: getattr(self, key) for key in SECTIONS}
        head["splits"] = {
            split: {
                "num_shards": len(self.of(split)),
                **{name: self.total(name, split) for name in COUNTS},
                "document_tokens": asdict(self.document_tokens.get(split, DocumentLengths())),
            }
            for split in SPLITS
        }
        text = json.dumps(head, indent=2)[:-2]
        for name, rows in (("slices", self.slices), ("shards", map(asdict, self.shards))):
            lines = ",\n".join("    " + json.dumps(row) for row in rows)
            text += f',\n  "{name}": [\n{lines}\n  ]'
        return text + "\n}\n"


def shard_name(split: str, number: int) -> str:
    """The file of shard `number` (from 0) of a split; a train shard has its slice's number."""
    return f"{split}_{number:06d}.bin"


def encode_header(num_tokens: int) -> bytes:
    """The 1024 bytes in front of the tokens."""
    return HEADER.pack(MAGIC, VERSION, num_tokens)


class ShardWriter:
    """Writes one shard: whole under its name, once commit() renames it, or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = partial_name(path)
        self.num_tokens = 0
        self._hash = xxhash.xxh3_64()
        self._file = self.partial.open("wb")
        self._file.write(encode_header(0))

    def write(self, tokens: Tokens) -> None:
        data = np.ascontiguousarray(tokens, dtype="<u2").view(np.uint8).data
        if self.num_tokens + len(tokens) > MAX_SHARD_TOKENS:
            what = f"a shard of over {MAX_SHARD_TOKENS:,} tokens does not fit the format"
            fix = "a text file makes one shard: cut it into files (split --line-bytes=1G)"
            raise ForgeError(what, where=self.path, fix=fix)
        self._file.write(data)
        self._hash.update(data)
        before, self.num_tokens = self.num_tokens, self.num_tokens + len(tokens)
        if before // FLUSH_TOKENS < self.num_tokens // FLUSH_TOKENS:
            # Starts writing to the disk now, so that commit() finds little left to wait for.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def commit(self) -> str:
        """Put the shard under its name, on the disk, and return its checksum."""
        self._file.seek(0)
        self._file.write(encode_header(self.num_tokens))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.partial.replace(self.path)
        return self._hash.hexdigest()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:  # what is not committed goes
        self.partial.unlink(missing_ok=True)
        self._file.close()  # fails on a full disk


def check_header(path: Path, fix: str = MADE_ANEW) -> int:
    """Number of tokens of the shard at `path`; ForgeError unless header and size agree."""
    with refusals("read a shard", path, fix), path.open("rb") as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(HEADER.size)
    magic, version, num_tokens = HEADER.unpack(head.ljust(HEADER.size, b"\0"))
    wanted = HEADER.size + TOKEN_BYTES * num_tokens
    if len(head) < HEADER.size:
        what = f"not a shard: too short for a header ({size} bytes)"
    elif (magic, version) != (MAGIC, VERSION):
        what = f"not a shard: magic {magic}, version {version} (expected {MAGIC}, {VERSION})"
    elif head != encode_header(num_tokens):
        what = "damaged shard: bytes in its header are not zero"
    elif size != wanted:
        what = f"the shard is {'shorter' if size < wanted else 'longer'} than its header says: "
        what += f"{size:,} bytes, not {wanted:,} ({num_tokens:,} tokens)"
    else:
        return int(num_tokens)
    raise ForgeError(what, where=path, fix=fix)


def map_shard(path: Path, num_tokens: int) -> Tokens:
    """The tokens of a shard, memory-mapped read-only: (num_tokens,) uint16."""
    try:
        return np.memmap(path, dtype="<u2", mode="r", offset=HEADER.size, shape=(num_tokens,))
    except (OSError, ValueError) as error:
        fix = "run forge-prep verify on its folder"
        raise ForgeError(f"cannot map a shard: {error}", where=path, fix=fix) from error


def parse_vocabulary(data: bytes) -> list[bytes]:
    """Bytes of each token, by rank, of lines `base64(bytes) rank`. ValueError or IndexError."""
    return [base64.b64decode(line.split()[0]) for line in data.splitlines()]


def read_vocabulary(path: Path) -> list[bytes]:
    """Bytes of each token: (vocab_size,), with <|endoftext|> as the last and empty.

    Enough to decode (join the bytes) and to count text bytes, with no tokenizer library.
    """
    fix = f"copy {VOCABULARY_FILE} from another folder of shards"
    try:
        tokens = parse_vocabulary(path.read_bytes())
    except (OSError, ValueError, IndexError) as error:
        raise ForgeError(f"cannot read the vocabulary: {error}", where=path, fix=fix) from error
    if len(tokens) != VOCAB_SIZE - 1:
        what = f"the vocabulary has {len(tokens)} tokens, not {VOCAB_SIZE - 1}"
        raise ForgeError(what, where=path, fix=fix)
    return [*tokens, b""]


def no_index(folder: Path) -> ForgeError:
    """What a folder without index.json probably is."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    below = next(iter(sorted(folder.glob(f"*/{INDEX_FILE}"))), None)
    what = f"the folder has no {INDEX_FILE}"
    if WORK_FOLDER in names:
        what += ", so it is not finished"
        fix = "run its forge-prep command again; finished slices are kept. "
        fix += "If it was made in parts: forge-prep merge DIR"
    elif any(name.endswith(".bin") for name in names):
        fix = "if others made its token files: forge-prep index DIR (--raw for nanoGPT's)"
    else:
        what = f"{'not a' if folder.exists() else 'no such'} folder of shards"
        fix = "make one: forge-prep tokenize SOURCE (text) or chat SOURCE (conversations)"
        fix = f"give the folder of shards itself, such as {below.parent}" if below else fix
    return ForgeError(what, where=folder, fix=fix)


def is_ours(path: Path) -> bool:
    """Whether a JSON file, perhaps damaged, carries our format: nothing else is ever removed."""
    with suppress(OSError):
        return INDEX_FORMAT.encode() in path.read_bytes()[:1000]
    return False


def load_index(folder: Path) -> Index:
    """The checked index.json of a folder. ForgeError if it is absent, damaged or another format."""
    path = folder / INDEX_FILE
    with refusals("read the index", path):
        if not path.exists():
            raise no_index(folder)
        data = path.read_bytes()
    if not is_ours(path):
        what, fix = "another program made this index.json", "give a folder of forge-prep's shards"
        raise ForgeError(what, where=path, fix=fix)
    try:
        raw = {"chat": None} | json.loads(data)
        if (raw["format"], raw["version"]) != (INDEX_FORMAT, INDEX_VERSION):
            what = f"the index is of another version: {raw['version']}"
            fix = "read it with the version of llm-forge that made it, or make it again"
            raise ForgeError(what, where=path, fix=fix)
        for section, keys in RELIED_ON.items():
            for key in keys if section != "chat" or raw["chat"] else ():
                raw[section][key]
        _check_counts(*(shard[key] for shard in raw["shards"] for key in COUNTS))
        _check_counts(raw["tokenizer"]["vocab_size"], (raw["chat"] or {}).get("context_length", 0))
        figures = {split: each["document_tokens"] for split, each in raw["splits"].items()}
        index = Index(
            folder=folder,
            **{section: raw[section] for section in SECTIONS},
            document_tokens={k: DocumentLengths.from_json(v) for k, v in figures.items()},
            shards=tuple(Shard(**shard) for shard in raw["shards"]),
            slices=tuple(raw.get("slices", ())),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        if gone := [part for part in index.parts if not (folder / part).is_dir()]:
            what, fix = "a folder of this mixture is gone", "move it back, or mix the folders again"
            raise ForgeError(what, where=(folder / gone[0]).resolve(), fix=fix)
        return index
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fix = "restore index.json, or make the shards again in another folder"
        raise ForgeError(f"the index is damaged: {error!r}", where=path, fix=fix) from error


def _check_counts(*values: Any) -> None:
    for value in values:
        if type(value) is not int or value < 0:
            raise ValueError(f"{value!r} is not a count")


def head_checksum(path: Path) -> str:
    """xxh3_64 (hex) of a shard's first 4 KiB."""
    with path.open("rb") as file:
        return xxhash.xxh3_64(file.read(HEAD_BYTES)).hexdigest()
