"""Mixes folders of shards without copying: an index whose shards lie in other folders.

An entry of the index is a train shard of a part: whole, its first tokens, or once more. Training
takes each entry once an epoch. Val is all of each part's.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from pipeline import files, shards, tokenizer, verify
from pipeline.errors import ForgeError, counted, refusals
from pipeline.shards import Index, Shard

MOST_EPOCHS = 100  # of a part: more is a mistake, and a long index


def mix(folder: Path, parts: Sequence[tuple[Path, int | None]], overwrite: bool = False) -> Index:
    """Make a mixture of the first train tokens of each part; None means all of them, once.

    ForgeError if the parts do not go together, or if the folder holds anything else.
    """
    indexes = [shards.load_index(part) for part, _ in parts]
    check_alike(indexes)
    with files.hold(folder, "forge-prep"), refusals("write", folder):
        held = check_out(folder)
        rows, entries = list[dict[str, Any]](), list[Shard]()
        for index, (_, wanted) in zip(indexes, parts, strict=True):
            place = os.path.relpath(index.folder.resolve(), folder.resolve())
            if not (train := list(first_tokens(index, wanted))):
                what = f"{counted(wanted or 0, 'token')}: too few for a window to train on"
                raise ForgeError(what, where=index.folder, fix="ask for more, or leave it out")
            entries += [entry(index, shard, place) for shard in (*train, *index.of("val"))]
            rows.append(describe(index, train, place))
        chat, name = indexes[0].chat, " + ".join(index.source["name"] for index in indexes)
        made = Index(
            folder=folder,
            tokenizer=indexes[0].tokenizer,
            source={"name": name, "kind": shards.MIXTURE, "parts": rows},
            options={},
            skipped={"null_documents": 0, "empty_documents": 0},  # the parts' indexes say it, and
            document_tokens={},  # the lengths of their documents
            shards=tuple(entries),
            chat=chat and chat | {"num_cut": 0, "splits": {}},
        )
        data = made.to_json().encode()
        if held not in (b"", data) and not overwrite:
            what = "the folder holds another mixture, or its parts have changed since"
            fix = "choose another OUT, or add --overwrite: no run on the old one can resume then"
            raise ForgeError(what, where=folder, fix=fix)
        files.write_whole(folder / shards.VOCABULARY_FILE, tokenizer.vocabulary())
        files.write_whole(folder / shards.INDEX_FILE, data)
    return shards.load_index(folder)


def check_alike(indexes: Sequence[Index]) -> None:
    """ForgeError unless the folders can be parts of one mixture."""
    first, seen = indexes[0], set[Path]()
    for index in indexes:
        what, fix = "", "leave it out"
        if index.source.get("kind") == shards.MIXTURE:
            what, fix = "the folder is a mixture itself", "name its parts instead"
        elif index.folder.resolve() in seen:
            what, fix = "the folder is named twice", "name it once, with all its TOKENS"
        elif not index.total("num_tokens", "train"):
            what = "the folder has no train tokens"
        elif holds(index) != holds(first):
            what = f"{holds(first)} and {holds(index)} do not mix"
        if what:
            raise ForgeError(what, where=index.folder, fix=fix)
        seen.add(index.folder.resolve())


def holds(index: Index) -> str:
    windows = f"in windows of {index.chat['context_length']:,} tokens" if index.chat else ""
    return f"conversations {windows}" if index.chat else "text"


def check_out(folder: Path) -> bytes:
    """The index of the mixture that the folder holds, empty if it is new. ForgeError otherwise."""
    path = folder / shards.INDEX_FILE
    with suppress(OSError, ValueError, KeyError, TypeError):
        data = path.read_bytes()
        if shards.is_ours(path) and json.loads(data)["source"]["kind"] == shards.MIXTURE:
            return data
    names = {path.name for path in folder.iterdir() if path.suffix != ".partial"}
    if names - {shards.VOCABULARY_FILE}:  # which a kill may have left
        raise ForgeError("OUT holds other files", where=folder, fix="choose another OUT")
    return b""


def first_tokens(index: Index, wanted: int | None) -> Iterator[Shard]:
    """The train shards of a folder, in order, up to `wanted` tokens, and from the first on again.

    The last is cut there, and counted anew; of conversations, where a window ends.
    """
    available = index.total("num_tokens", "train")
    left = available if wanted is None else wanted
    if left > MOST_EPOCHS * available:
        what = f"{left:,} tokens are {left / available:,.0f} epochs of the folder's {available:,}"
        raise ForgeError(what, where=index.folder, fix=f"at most {MOST_EPOCHS} make sense")
    for shard in cycle(index.of("train")):
        if left >= shard.num_tokens:
            yield shard
        else:
            left -= (left - 1) % index.chat["context_length"] if index.chat else 0
            if left > 1:
                verify.require_sound(index, shard)
                yield verify.measure(index.folder / shard.file, "train", most=left).shard
        left -= shard.num_tokens
        if left <= 0:
            return


def entry(index: Index, shard: Shard, place: str) -> Shard:
    """A shard as the mixture lists it. ForgeError if its file is not there."""
    path = index.folder / shard.file
    shards.check_header(path)
    head = shard.head_checksum or shards.head_checksum(path)
    return replace(shard, file=f"{place}/{shard.file}", head_checksum=head)


def describe(index: Index, train: Sequence[Shard], place: str) -> dict[str, Any]:
    """What the mixture's index says of a part."""
    num_tokens = sum(shard.num_tokens for shard in train)
    return {
        "folder": place,
        "train_tokens": num_tokens,
        "epochs": round(num_tokens / index.total("num_tokens", "train"), 4),
        "val_tokens": index.total("num_tokens", "val"),
        "source": {key: index.source.get(key) for key in ("name", "kind", "hub")},
    }


def table(index: Index) -> list[str]:
    """The parts of a mixture, a line each; nothing for another folder."""
    if not (rows := index.source.get("parts")):
        return []
    total = sum(row["train_tokens"] for row in rows)
    names = files.own_names(row["folder"] for row in rows)
    width = max(4, *map(len, names.values()))
    lines = [f"{'part':{width}}{'train tokens':>18}{'share':>9}{'epochs':>9}{'val tokens':>16}"]
    for row in rows:
        counts = f"{row['train_tokens']:>18,}{row['train_tokens'] / total:>9.2%}"
        counts += f"{row['epochs']:>9.2f}{row['val_tokens']:>16,}"
        lines.append(f"{names[row['folder']]:{width}}{counts}")
    return lines
