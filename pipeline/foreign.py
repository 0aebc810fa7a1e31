"""Token files that others made, given an index so that forge-train can use them.

Before: llm.c's or modded-nanogpt's shards, or nanoGPT's headerless train.bin and val.bin, in a
folder. After: the same folder with index.json and the vocabulary, as prepare.py would leave it.

Files with a header stay as they are. Headerless ones are copied into shards; nanoGPT puts
<|endoftext|> behind each document, so the copy moves it in front, where ours has it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from pipeline import shards, tokenizer
from pipeline.errors import ForgeError
from pipeline.files import write_whole
from pipeline.prepare import hold
from pipeline.shards import WORK_FOLDER, DocumentLengths, Index, Shard, ShardWriter, Tokens

RAW_SHARD_TOKENS = 100_000_000
CHUNK_TOKENS = 2**22


def index_folder(folder: Path, raw: bool) -> Index:
    """Make the index of a folder of other people's token files; ForgeError if they are not."""
    if not folder.is_dir():
        raise ForgeError("no such folder", where=folder, fix="check the path")
    with hold(folder):
        return _make_index(folder, raw)


def _make_index(folder: Path, raw: bool) -> Index:
    if (folder / shards.INDEX_FILE).exists():
        raise ForgeError("the folder has an index already", where=folder, fix="forge-prep info DIR")
    if (folder / WORK_FOLDER).exists():
        raise ForgeError(
            "an unfinished run of forge-prep tokenize lies here",
            where=folder,
            fix="the same forge-prep tokenize again finishes it, and makes the index",
        )
    files = sorted(folder.glob("*.bin"))
    if raw:
        files = [folder / f"{split}.bin" for split in shards.SPLITS]
    try:
        made = list(convert(folder) if raw else map(describe, files))
        write_whole(folder / shards.VOCABULARY_FILE, tokenizer.vocabulary())
    except OSError as error:
        raise ForgeError(
            f"cannot write: {error.strerror}",
            where=error.filename or folder,
            fix="make room (or give write permission) and run the same command again",
        ) from error
    if not made:
        raise ForgeError(
            "no token files (*.bin) here",
            where=folder,
            fix="text becomes shards with forge-prep tokenize",
        )
    lengths = {split: DocumentLengths() for split in shards.SPLITS}
    for shard, figures in made:
        lengths[shard.split] += figures
    index = Index(
        folder=folder,
        tokenizer=tokenizer.describe(),
        source={
            "name": folder.resolve().name,
            "kind": "raw tokens" if raw else "token files",
            "hub": None,
            "files": [{"name": path.name, "bytes": path.stat().st_size} for path in files],
        },
        options={"split_rule": "by the name of the file"},
        skipped={"null_documents": 0, "empty_documents": 0},
        document_tokens=lengths,
        shards=tuple(shard for shard, _ in made),
    )
    shards.save_index(index)
    return shards.load_index(folder)


def convert(folder: Path) -> Iterator[tuple[Shard, DocumentLengths]]:
    """Copy nanoGPT's train.bin and val.bin into shards of whole documents."""
    paths = {split: folder / f"{split}.bin" for split in shards.SPLITS}
    for path in paths.values():
        if not path.exists() or path.stat().st_size == 0:
            raise ForgeError(
                "no such headerless token file",
                where=path,
                fix="--raw needs train.bin and val.bin; shards with a header need no --raw",
            )
        if path.stat().st_size % shards.TOKEN_BYTES:
            raise ForgeError(
                "half a token at the end of a headerless token file: it was cut off",
                where=path,
                fix="copy the file again",
            )
    for split, path in paths.items():
        tokens = np.memmap(path, "<u2", "r")
        start = number = 0
        while start < len(tokens):
            stop = end_of_document(tokens, start + RAW_SHARD_TOKENS)
            # A separator is the last token of the documents; it becomes the first.
            body = tokens[start : stop - 1 if tokens[stop - 1] == shards.EOT_TOKEN else stop]
            writer = ShardWriter(shards.shard_path(folder, split, number))
            try:
                writer.write(np.array([shards.EOT_TOKEN], np.uint16))
                for chunk in range(0, len(body), CHUNK_TOKENS):
                    writer.write(body[chunk : chunk + CHUNK_TOKENS])
                writer.commit()
            finally:
                writer.discard()
            yield describe(writer.path)
            start, number = stop, number + 1


def end_of_document(tokens: Tokens, near: int) -> int:
    """The first position from `near` on behind an <|endoftext|>; the end, if there is none."""
    for start in range(near, len(tokens), CHUNK_TOKENS):
        found = np.flatnonzero(tokens[start : start + CHUNK_TOKENS] == shards.EOT_TOKEN)
        if found.size:
            return start + int(found[0]) + 1
    return len(tokens)


def describe(path: Path) -> tuple[Shard, DocumentLengths]:
    """A shard as the index lists it, from its tokens alone."""
    try:
        num_tokens = shards.check_header(path)
    except ForgeError as error:
        fix = "restore the file; nanoGPT's train.bin and val.bin, which have no header, need --raw"
        raise ForgeError(error.what, where=path, fix=fix) from error
    tokens = shards.map_shard(path, num_tokens)
    byte_counts = np.array([len(token) for token in tokenizer.token_bytes()], np.int64)
    digest, text_bytes, starts = xxhash.xxh3_64(), 0, []
    for first in range(0, num_tokens, CHUNK_TOKENS):
        chunk = np.ascontiguousarray(tokens[first : first + CHUNK_TOKENS])
        if chunk.max() >= shards.VOCAB_SIZE:
            raise ForgeError(
                f"token {chunk.max()} is outside GPT-2's vocabulary of {shards.VOCAB_SIZE}",
                where=path,
                fix="files of another tokenizer, or headerless ones, are not usable so "
                "(headerless: --raw)",
            )
        digest.update(chunk.view(np.uint8).data)
        text_bytes += int(byte_counts[chunk].sum())
        starts.append(np.flatnonzero(chunk == shards.EOT_TOKEN) + first)
    bounds = np.concatenate([*starts, [num_tokens]]).astype(np.int64)
    if len(bounds) == 1:
        raise ForgeError(
            "no <|endoftext|> in the whole file: not GPT-2 documents",
            where=path,
            fix="take files of GPT-2 tokens, or tokenize the text itself: forge-prep tokenize",
        )
    shard = Shard(
        file=path.name,
        split="val"
        if re.search("(?<![a-z])val(id(ation)?)?(?![a-z])", path.name.lower())
        else "train",
        num_tokens=num_tokens,
        num_documents=len(bounds) - 1,
        text_bytes=text_bytes,
        checksum=digest.hexdigest(),
        slice=0,
    )
    return shard, DocumentLengths.of(np.diff(bounds) - 1)
