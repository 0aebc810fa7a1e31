"""Checks token files that other programs made, and indexes them so that forge-train can use them.

Files with a header stay as they are. Headerless ones are copied into shards; nanoGPT puts
<|endoftext|> behind each document, so the copy moves it in front, where ours has it.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import files, shards, tokenizer, verify
from pipeline.errors import ForgeError, refusals
from pipeline.files import NOT_TRAINING, VALIDATION
from pipeline.shards import DocumentLengths, Index, ShardWriter, Tokens

RAW_SHARD_TOKENS = 100_000_000
CHUNK_TOKENS = 2**22
RAW_KIND, THEIR_KIND = "raw tokens", "token files"
SAMPLE_TOKENS = 4096
MIN_ALIKE = 0.8  # of a sample's tokens; GPT-2's own are all alike, characters 0.6, others less
THEIRS = "these are not GPT-2's tokens: tokenize the text itself with forge-prep tokenize"


def index_folder(folder: Path, raw: bool) -> Index:
    """Make the index of a folder of other people's token files; ForgeError if they are not."""
    if not folder.is_dir():
        raise ForgeError("no such folder", where=folder, fix="check the path")
    with files.hold(folder, "forge-prep"), refusals("write", folder):
        verify.finish_publishing(folder)
        kind = verify.read_plan(folder).get("source", {}).get("kind")
        if (folder / shards.INDEX_FILE).exists():
            what = "the folder has an index already"
            raise ForgeError(what, where=folder, fix="forge-prep info DIR")
        if (folder / shards.WORK_FOLDER).exists() and kind not in (RAW_KIND, THEIR_KIND):
            what = "an unfinished run of forge-prep tokenize lies here"
            raise ForgeError(what, where=folder, fix="finish it: run the same command again")
        found = sorted(folder.glob("*.bin"))
        rows = [{"name": path.name, "bytes": path.stat().st_size} for path in found]
        source: dict[str, Any] = {"name": folder.resolve().name, "hub": None, "files": rows}
        source["kind"] = RAW_KIND if raw else THEIR_KIND
        work = verify.begin(folder, {"source": source, "tokenizer": tokenizer.describe()})
        try:
            made = list(convert(folder, work) if raw else describe(found))
            files.write_whole(work / shards.VOCABULARY_FILE, tokenizer.vocabulary())
            lengths = {split: DocumentLengths() for split in shards.SPLITS}
            for shard, documents in made:
                lengths[shard.split] += documents
            index = Index(
                folder=folder,
                tokenizer=tokenizer.describe(),
                source=source,
                options={"split_rule": "by the name of the file"},
                skipped={"null_documents": 0, "empty_documents": 0},
                document_tokens=lengths,
                shards=tuple(shard for shard, _ in made),
            )
            return verify.publish(index)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def describe(paths: list[Path]) -> Iterator[tuple[shards.Shard, DocumentLengths]]:
    """Shards with a header, as the index lists them."""
    used = [path for path in paths if not re.search(NOT_TRAINING, path.stem.lower())]
    if not used:
        what = "no token files (*.bin) for training here"
        what += " (test, eval, dev are not)" * bool(paths)
        fix = "text becomes shards with forge-prep tokenize"
        raise ForgeError(what, where=paths[0] if paths else None, fix=fix)
    for path in used:
        fix = "restore the file; nanoGPT's train.bin and val.bin, without header, need --raw"
        tokens = shards.map_shard(path, shards.check_header(path, fix))
        check_tokens(tokens, path)
        if verify.next_document(tokens, 0) == len(tokens):
            what = "no <|endoftext|> in the whole file: it has no documents"
            raise ForgeError(what, where=path, fix=THEIRS)
        split = "val" if re.search(VALIDATION, path.stem.lower()) else "train"
        yield verify.measure(path, split)[:2]


def convert(folder: Path, work: Path) -> Iterator[tuple[shards.Shard, DocumentLengths]]:
    """Copy nanoGPT's train.bin and val.bin into shards of whole documents."""
    raw = {split: read_raw(folder / f"{split}.bin") for split in shards.SPLITS}
    if there := next((p for p in folder.iterdir() if shards.SHARD_NAME.fullmatch(p.name)), None):
        what = "a shard is there already, and is not replaced"
        raise ForgeError(what, where=there, fix="move it elsewhere")
    for split, tokens in raw.items():
        # The separator behind each document goes in front: that of the last has no place.
        end = len(tokens) - int(tokens[-1] == shards.EOT_TOKEN)
        start = number = 0
        while start <= end:
            stop = min(end, verify.next_document(tokens, start + RAW_SHARD_TOKENS))
            path = work / shards.shard_name(split, number)
            with ShardWriter(path) as writer:
                writer.write(np.array([shards.EOT_TOKEN], np.uint16))
                for chunk in range(start, stop, CHUNK_TOKENS):
                    writer.write(tokens[chunk : min(stop, chunk + CHUNK_TOKENS)])
                writer.commit()
            yield verify.measure(path, split)[:2]
            start, number = stop + 1, number + 1


def read_raw(path: Path) -> Tokens:
    """The tokens of a headerless file, mapped and checked."""
    if not path.exists() or path.stat().st_size == 0:
        fix = "--raw needs train.bin and val.bin; shards with a header need no --raw"
        raise ForgeError("no such headerless token file", where=path, fix=fix)
    if path.stat().st_size % shards.TOKEN_BYTES:
        what = "half a token at the end of a headerless token file: it was cut off"
        raise ForgeError(what, where=path, fix="copy the file again")
    tokens = np.memmap(path, "<u2", "r")
    if tokens[:2].tobytes() == shards.encode_header(0)[:4]:
        what = "the file has a header: it is a shard already"
        raise ForgeError(what, where=path, fix="leave --raw out")
    check_tokens(tokens, path)
    return tokens


def check_tokens(tokens: Tokens, path: Path) -> None:
    """ForgeError unless all tokens are in GPT-2's vocabulary, and some samples are its text."""
    ends = (0, len(tokens) // 2, max(0, len(tokens) - SAMPLE_TOKENS))
    samples = [np.array(tokens[n : n + SAMPLE_TOKENS]) for n in ends]
    for sample in samples:
        if len(sample) > 8 and max((sample[n::2] == 0).mean() for n in (0, 1)) > 0.9:
            what = "every second token is 0: tokens of four or eight bytes, not of two"
            raise ForgeError(what, where=path, fix="write them as uint16, little-endian")
    for start in range(0, len(tokens), CHUNK_TOKENS):
        if (largest := tokens[start : start + CHUNK_TOKENS].max()) >= shards.VOCAB_SIZE:
            what = f"token {largest} is outside GPT-2's vocabulary of {shards.VOCAB_SIZE}"
            raise ForgeError(what, where=path, fix=THEIRS)
    for sample in samples:
        if (alike := share_alike(sample)) < MIN_ALIKE:
            what = f"not GPT-2's tokens: only {alike:.0%} come back when their text is encoded"
            raise ForgeError(what, where=path, fix=THEIRS)


def share_alike(sample: Tokens) -> float:
    """The share of tokens that GPT-2's tokenizer makes again of the text that they stand for."""
    alike = total = 0
    for document in np.split(sample, np.flatnonzero(sample == shards.EOT_TOKEN)):
        tokens = document[document != shards.EOT_TOKEN].tolist()
        again = tokenizer.encode(tokenizer.decode(tokens).decode("utf-8", "ignore"))
        alike += len(set(placed(tokens)) & set(placed(again)))
        total += len(tokens)
    return alike / max(1, total)


def placed(tokens: list[int]) -> Iterator[tuple[int, int]]:
    """Each token, and the byte of the text at which it ends."""
    return zip(tokens, np.cumsum(verify.token_lengths()[tokens]).tolist(), strict=True)
