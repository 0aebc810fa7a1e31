"""THE FORMAT: shard files and index.json. Write them, map them, check them.

Before: slices.py, which turns text into tokens. After: trainer/windows.py, which reads them.

A shard is an llm.c / modded-nanogpt token file, little-endian throughout:

    offset  size     what
    0       4        magic 20240520
    4       4        version 1
    8       4        number of tokens
    12      1012     zero
    1024    2 each   tokens, uint16

Every document starts with <|endoftext|> (50256), and text never makes that token. Beside the shards
lie `r50k_base.tiktoken` (the vocabulary: one `base64(bytes) rank` a line) and index.json, which is
written last: a folder without it is a folder that is not finished.

Sources: llm.c dev/data/data_common.py (write_datafile), modded-nanogpt data/fineweb.py.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.errors import ForgeError
from pipeline.files import write_whole

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
WORK_FOLDER = ".work"  # of a run of forge-prep tokenize that is not finished
# The very hash that tiktoken pins for OpenAI's published r50k_base.tiktoken.
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
SPLITS = ("train", "val")
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})_\d{{6}}\.bin(\.\d+\.partial)?")  # and halves

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Shard:
    """One shard as index.json lists it. `checksum` is xxh3_64 (hex) of the token bytes.

    `head_checksum` is that of the file's first 4 KiB, header and first tokens: quick to look at
    before each training run. Empty in folders that were made without it.
    """

    file: str
    split: str
    num_tokens: int
    num_documents: int
    text_bytes: int
    checksum: str
    slice: int
    head_checksum: str = ""


@dataclass(frozen=True)
class DocumentLengths:
    """How long documents are, in tokens without <|endoftext|>; mergeable, so that slices add up.

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
        return DocumentLengths(
            int(lengths.min()), int(lengths.max()), tuple(np.bincount(buckets).tolist())
        )

    def __add__(self, other: "DocumentLengths") -> "DocumentLengths":
        if not other.histogram or not self.histogram:
            return self if self.histogram else other
        counts = np.zeros(max(len(self.histogram), len(other.histogram)), np.int64)
        counts[: len(self.histogram)] += self.histogram
        counts[: len(other.histogram)] += other.histogram
        return DocumentLengths(
            min(self.min, other.min), max(self.max, other.max), tuple(counts.tolist())
        )

    def percentile(self, fraction: float) -> int:
        """Length that `fraction` of the documents do not exceed, good to a quarter octave."""
        wanted = fraction * sum(self.histogram)
        seen = 0
        for k, count in enumerate(self.histogram):
            if count and seen + count >= wanted:
                inside = (wanted - seen) / count
                return round(min(self.max, max(self.min, 2 ** ((k + inside) / 4))))
            seen += count
        return self.max


@dataclass(frozen=True)
class Index:
    """index.json. `source`, `options` and `skipped` are plain records of how it was made."""

    folder: Path
    tokenizer: dict[str, Any]
    source: dict[str, Any]
    options: dict[str, Any]
    skipped: dict[str, Any]
    document_tokens: dict[str, DocumentLengths]
    shards: tuple[Shard, ...]
    sha256: str = field(default="", compare=False)  # of index.json itself, once it is on disk

    def of(self, split: str) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.split == split)

    def total(self, name: str, split: str | None = None) -> int:
        """Sum of a count of the shards: num_tokens, num_documents or text_bytes."""
        chosen = self.shards if split is None else self.of(split)
        return sum(getattr(shard, name) for shard in chosen)

    def to_json(self) -> str:
        splits = {
            split: {
                "num_shards": len(self.of(split)),
                "num_tokens": self.total("num_tokens", split),
                "num_documents": self.total("num_documents", split),
                "text_bytes": self.total("text_bytes", split),
                "document_tokens": asdict(self.document_tokens.get(split, DocumentLengths())),
            }
            for split in SPLITS
        }
        head = {
            "format": INDEX_FORMAT,
            "version": INDEX_VERSION,
            "tokenizer": self.tokenizer,
            "source": self.source,
            "options": self.options,
            "skipped": self.skipped,
            "splits": splits,
        }
        rows = ",\n".join("    " + json.dumps(asdict(shard)) for shard in self.shards)
        return json.dumps(head, indent=2)[:-2] + f',\n  "shards": [\n{rows}\n  ]\n}}\n'


def shard_path(folder: Path, split: str, number: int) -> Path:
    """The file of the shard that slice `number` (from 0) has of a split."""
    return folder / f"{split}_{number:06d}.bin"


def shard_bytes(num_tokens: int) -> int:
    """Where in a shard token `num_tokens` (from 0) starts; so also the size of one with as many."""
    return HEADER.size + TOKEN_BYTES * num_tokens


def encode_header(num_tokens: int) -> bytes:
    """The 1024 bytes in front of the tokens."""
    return HEADER.pack(MAGIC, VERSION, num_tokens)


class ShardWriter:
    """Writes one shard: whole under its name, or not at all.

    Tokens go to NAME.<pid>.partial and the file is renamed by commit(). The process id keeps a
    writer that outlived its parent from touching the file of the one that replaced it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self.num_tokens = 0
        self._hash = xxhash.xxh3_64()
        self._file = self.partial.open("wb")
        self._file.write(encode_header(0))

    def write(self, tokens: Tokens) -> None:
        data = np.ascontiguousarray(tokens, dtype="<u2").view(np.uint8).data
        if self.num_tokens + len(tokens) > MAX_SHARD_TOKENS:
            raise ForgeError(
                f"a shard of over {MAX_SHARD_TOKENS:,} tokens does not fit the format",
                where=self.path,
                fix="a text file makes one shard: split it (split --line-bytes=1G, for .jsonl)",
            )
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

    def discard(self) -> None:
        self._file.close()
        self.partial.unlink(missing_ok=True)


def check_header(path: Path) -> int:
    """Number of tokens of the shard at `path`; ForgeError unless header and size agree."""
    fix = "restore the file, or make the folder again: forge-prep tokenize --overwrite"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.size)
    except OSError as error:
        raise ForgeError(f"cannot read a shard: {error.strerror}", where=path, fix=fix) from error
    if len(head) < HEADER.size:
        raise ForgeError(f"not a shard: {size} bytes are no header", where=path, fix=fix)
    magic, version, num_tokens = HEADER.unpack(head)
    if magic != MAGIC or version != VERSION:
        raise ForgeError(
            f"not a shard: magic {magic}, version {version} (expected {MAGIC}, {VERSION})",
            where=path,
            fix=fix,
        )
    if head != encode_header(num_tokens):
        raise ForgeError("damaged shard: bytes in its header are not zero", where=path, fix=fix)
    wanted = shard_bytes(num_tokens)
    if size != wanted:
        longer = "shorter" if size < wanted else "longer"
        raise ForgeError(
            f"the shard is {longer} than its header says: {size:,} bytes, not {wanted:,} "
            f"({num_tokens:,} tokens)",
            where=path,
            fix=fix,
        )
    return int(num_tokens)


def map_shard(path: Path, num_tokens: int) -> Tokens:
    """The tokens of a shard, memory-mapped read-only: (num_tokens,) uint16."""
    try:
        return np.memmap(path, dtype="<u2", mode="r", offset=HEADER.size, shape=(num_tokens,))
    except (OSError, ValueError) as error:
        raise ForgeError(
            f"cannot map a shard: {error}", where=path, fix="run forge-prep verify on its folder"
        ) from error


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
        raise ForgeError(
            f"the vocabulary has {len(tokens)} tokens, not {VOCAB_SIZE - 1}", where=path, fix=fix
        )
    return [*tokens, b""]


def no_index(folder: Path) -> ForgeError:
    """What a folder without index.json probably is."""
    names = [path.name for path in folder.iterdir()]
    if WORK_FOLDER in names or any(map(SHARD_NAME.fullmatch, names)):
        return ForgeError(
            f"the folder has no {INDEX_FILE}, so it is not finished",
            where=folder,
            fix="run its forge-prep tokenize command again; it goes on where it stopped",
        )
    if any(name.endswith(".bin") for name in names):
        return ForgeError(
            f"the folder has no {INDEX_FILE}",
            where=folder,
            fix="if its .bin files are llm.c's or nanoGPT's tokens: forge-prep index DIR",
        )
    below = next(iter(sorted(folder.glob(f"*/{INDEX_FILE}"))), None)
    return ForgeError(
        f"no folder of shards: it has no {INDEX_FILE}",
        where=folder,
        fix=f"give the folder of shards itself, such as {below.parent}"
        if below
        else "make one of the text first: forge-prep tokenize SOURCE --out DIR; then give DIR",
    )


def load_index(folder: Path) -> Index:
    """Read and check index.json of a folder of shards.

    ForgeError when there is none, or it is damaged or of another format.
    """
    path = folder / INDEX_FILE
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if not folder.is_dir():
            raise ForgeError(
                "no such folder of shards",
                where=folder,
                fix="make one: forge-prep tokenize SOURCE --out DIR",
            ) from None
        raise no_index(folder) from None
    except OSError as error:
        raise ForgeError(
            f"cannot read the index: {error.strerror}", where=path, fix="give read permission"
        ) from error
    try:
        raw = json.loads(data)
        if (raw["format"], raw["version"]) != (INDEX_FORMAT, INDEX_VERSION):
            raise ForgeError(
                f"the index is of another format: {raw['format']!r} version {raw['version']}",
                where=path,
                fix="read it with the version of llm-forge that made it, or make it again",
            )
        lengths = {
            split: DocumentLengths(
                figures["document_tokens"]["min"],
                figures["document_tokens"]["max"],
                tuple(figures["document_tokens"]["histogram"]),
            )
            for split, figures in raw["splits"].items()
        }
        for section, key in (
            ("tokenizer", "vocab_size"),
            ("tokenizer", "sha256"),
            ("source", "name"),
            ("skipped", "null_documents"),
            ("skipped", "empty_documents"),
        ):
            raw[section][key]  # what others rely on
        for figures in lengths.values():
            _check_counts(figures.min, figures.max, *figures.histogram)
        for shard in raw["shards"]:
            _check_counts(*(shard[key] for key in ("num_tokens", "num_documents", "text_bytes")))
        return Index(
            folder=folder,
            tokenizer=raw["tokenizer"],
            source=raw["source"],
            options=raw["options"],
            skipped=raw["skipped"],
            document_tokens=lengths,
            shards=tuple(Shard(**shard) for shard in raw["shards"]),
            sha256=hashlib.sha256(data).hexdigest(),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ForgeError(
            f"the index is damaged: {error!r}",
            where=path,
            fix="make the folder again with forge-prep tokenize --overwrite",
        ) from error


def _check_counts(*values: Any) -> None:
    for value in values:
        if type(value) is not int or value < 0:
            raise ValueError(f"{value!r} is no count")


def save_index(index: Index) -> None:
    """Write index.json, whole or not at all, with the checksums of the shards' heads."""
    with_heads = tuple(
        replace(shard, head_checksum=head_checksum(index.folder / shard.file))
        for shard in index.shards
    )
    write_whole(index.folder / INDEX_FILE, replace(index, shards=with_heads).to_json().encode())


def head_checksum(path: Path) -> str:
    """xxh3_64 (hex) of a shard's first 4 KiB."""
    with path.open("rb") as file:
        return xxhash.xxh3_64(file.read(HEAD_BYTES)).hexdigest()


# ---------------------------------------------------------------------------------------------
# Checking


def check_shard(
    folder: Path, shard: Shard, whole_documents: bool, on_bytes: Callable[[int], None]
) -> list[str]:
    """Read one shard whole and list what is wrong with it (nothing, when all is well)."""
    path = folder / shard.file
    try:
        num_tokens = check_header(path)
        if num_tokens != shard.num_tokens:
            return [f"{shard.file}: {num_tokens:,} tokens, the index says {shard.num_tokens:,}"]
        digest, num_documents, largest = xxhash.xxh3_64(), 0, 0
        first: int | None = None
        with path.open("rb") as file:
            file.seek(HEADER.size)
            while chunk := file.read(1 << 22):
                tokens = np.frombuffer(chunk, "<u2")
                first = int(tokens[0]) if first is None else first
                digest.update(chunk)
                num_documents += int(np.count_nonzero(tokens == EOT_TOKEN))
                largest = max(largest, int(tokens.max()))
                on_bytes(len(chunk))
    except ForgeError as error:
        return [f"{shard.file}: {error.what}"]
    except OSError as error:
        return [f"{shard.file}: cannot be read: {error.strerror}"]
    problems = []
    if digest.hexdigest() != shard.checksum:
        problems.append(
            f"{shard.file}: checksum {digest.hexdigest()}, the index says {shard.checksum}"
        )
    if largest >= VOCAB_SIZE:
        problems.append(f"{shard.file}: token {largest} is outside the vocabulary of {VOCAB_SIZE}")
    if num_documents != shard.num_documents:
        problems.append(
            f"{shard.file}: {num_documents:,} documents, the index says {shard.num_documents:,}"
        )
    if first not in (EOT_TOKEN, None) and whole_documents:
        problems.append(f"{shard.file}: does not start with <|endoftext|>")
    if not problems and shard.head_checksum not in ("", head_checksum(path)):
        problems.append(f"{shard.file}: the index has another checksum of its head")
    return problems


def verify(index: Index, workers: int, on_bytes: Callable[[int], None]) -> list[str]:
    """Check every byte of a folder against its index; the list of problems, empty when sound.

    Hashing and counting release the interpreter's lock, so threads use all cores.
    """
    problems = []
    listed = json.loads((index.folder / INDEX_FILE).read_bytes())["splits"]
    summed = json.loads(index.to_json())["splits"]
    for split in SPLITS:
        if listed.get(split) != summed[split]:
            problems.append(f"{INDEX_FILE}: the totals of {split} are not the sums over its shards")
    known = {shard.file for shard in index.shards}
    known |= {file["name"] for file in index.source.get("files", [])}
    goes_on = (index.folder / WORK_FOLDER).exists()  # a run that is not finished
    for path in sorted(index.folder.glob("*.bin")):
        if path.name not in known and not (goes_on and SHARD_NAME.fullmatch(path.name)):
            problems.append(f"{path.name}: a stranger, not in the index: move it elsewhere")
    try:
        vocabulary = (index.folder / VOCABULARY_FILE).read_bytes()
        if hashlib.sha256(vocabulary).hexdigest() != index.tokenizer["sha256"]:
            problems.append(f"{VOCABULARY_FILE}: changed")
    except OSError as error:
        problems.append(f"{VOCABULARY_FILE}: cannot be read: {error.strerror}")
    whole = index.source.get("kind") != "token files"  # other people's may cut documents
    with ThreadPoolExecutor(workers) as pool:
        found: Iterable[list[str]] = pool.map(
            lambda shard: check_shard(index.folder, shard, whole, on_bytes), index.shards
        )
        for more in found:
            problems += more
    return problems
