"""What slices made -> a finished folder: the parts of several processes, joined val, the index."""

import json
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline import chat, chatml, files, shards, slices, verify
from pipeline.downloads import DOWNLOADS_FOLDER
from pipeline.errors import KEPT, ForgeError, refusals
from pipeline.shards import INDEX_FILE, WORK_FOLDER, DocumentLengths, Index, Shard, ShardWriter
from pipeline.slices import Record

VAL_SHARD_TOKENS = 100_000_000  # at most, about
MOST_NAMED = 20  # missing parts in a message
IN_WORDS = {  # what a part's plan has beside the options
    "version": "the version of forge-prep",
    "source": "the files of the source",
    "modified": "the times when the files of the source were written",
    "num_slices": "the number of slices",
    "num_parts": "the number of parts",
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended. All but the index is of this run alone; `new_bytes` are of text."""

    index: Index
    up_to_date: bool
    seconds: float = 0.0
    new_bytes: int = 0
    new_tokens: int = 0

    def summary(self) -> dict[str, Any]:
        """The facts of --json."""
        total = self.index.total
        return {
            "up_to_date": self.up_to_date,
            "num_train_tokens": total("num_tokens", "train"),
            "num_val_tokens": total("num_tokens", "val"),
            "num_documents": total("num_documents"),
            "text_bytes": total("text_bytes"),
            "skipped": self.index.skipped,
            "seconds": round(self.seconds, 3),
        }


# ---------------------------------------------------------------------------------------------
# Parts: 3/16 is the third of 16 runs of slices. All work in one `.work/`, on files of their own.


def numbers_of(part: tuple[int, int], num_slices: int) -> range:
    """The slices of a part: neighbours, so that two parts seldom download the same file."""
    number, count = part
    return range(num_slices * (number - 1) // count, num_slices * number // count)


def part_folder(folder: Path, part: tuple[int, int]) -> Path:
    """What a part keeps to itself, in `.work/`: its lock, its plan, its downloads."""
    return folder / WORK_FOLDER / "part-{}-of-{}".format(*part)


def has_parts(folder: Path) -> bool:
    """Whether any part has begun. One that has not got far has no plan yet."""
    return any((folder / WORK_FOLDER).glob("part-*"))


def plans_of_parts(folder: Path) -> list[dict[str, Any]]:
    paths = (folder / WORK_FOLDER).glob(f"part-*/{verify.PLAN_FILE}")
    return [json.loads(path.read_bytes()) for path in paths]


def check_folder(folder: Path) -> None:
    """ForgeError if a folder has more in it than parts."""
    others = sorted({path.name for path in folder.iterdir()} - {DOWNLOADS_FOLDER, WORK_FOLDER})
    others += ["an unfinished run"] * (folder / WORK_FOLDER / verify.PLAN_FILE).exists()
    if others:
        what = f"parts are made in a folder of their own; this one has {', '.join(others[:3])}"
        raise ForgeError(what, where=folder, fix="choose another --out")


def check_plans(folder: Path, plans: Sequence[dict[str, Any]]) -> None:
    """ForgeError if parts would not make one folder."""
    for plan in plans[1:]:
        found = verify.differences(plans[0], plan) or [
            says for key, says in IN_WORDS.items() if plan[key] != plans[0].get(key)
        ]
        if found:
            what = f"the parts of this folder are not of one plan, but differ in {'; '.join(found)}"
            fix = "make all of the same source (of a hub dataset, name the commit with --revision) "
            fix += "with the same options, in another --out"
            raise ForgeError(what, where=folder, fix=fix)


def begin_part(folder: Path, part: tuple[int, int], plan: dict[str, Any]) -> None:
    """Write the plan of a part, if it agrees with those of all parts that have begun."""
    data = json.dumps({"version": shards.INDEX_VERSION, **plan, "num_parts": part[1]}).encode()
    check_plans(folder, [*plans_of_parts(folder), json.loads(data)])
    files.write_whole(part_folder(folder, part) / verify.PLAN_FILE, data)


def merge(folder: Path) -> Outcome:
    """Finish a folder whose parts are all made. ForgeError names those that are missing."""
    started = time.perf_counter()
    with files.hold(folder, "forge-prep"), refusals("write", folder, KEPT):
        verify.finish_publishing(folder)  # of a call that was killed
        if (folder / INDEX_FILE).exists():
            return Outcome(shards.load_index(folder), up_to_date=True)
        plans = plans_of_parts(folder)
        if not plans:
            what = "there is nothing to merge: no part of this folder has begun"
            fix = "begin with forge-prep tokenize SOURCE --out NEW_FOLDER --part 1/N"
            raise ForgeError(what, where=folder, fix=fix)
        check_plans(folder, plans)
        verify.check_ours(folder, plans[0])
        num_slices, num_parts = plans[0]["num_slices"], plans[0]["num_parts"]
        work = folder / WORK_FOLDER
        records = [slices.read_record(work, number) for number in range(num_slices)]
        parts = [(number, num_parts) for number in range(1, num_parts + 1)]
        missing = [p for p in parts if None in [records[n] for n in numbers_of(p, num_slices)]]
        if missing:
            names = ", ".join("{}/{}".format(*part) for part in missing[:MOST_NAMED])
            names += f" and {len(missing) - MOST_NAMED} more" * (len(missing) > MOST_NAMED)
            fix = "run the commands of those parts, then forge-prep merge again"
            raise ForgeError(f"parts are missing: {names}", where=folder, fix=fix)
        made = [record for record in records if record]
        index = verify.publish(make_index(folder, plans[0], made))
        return Outcome(index, False, time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------
# Once all slices are made


def make_index(
    folder: Path, plan: dict[str, Any], records: Sequence[Record], kept: Sequence[Shard] = ()
) -> Index:
    """The index of a whole plan, once val is joined in `.work/`. ForgeError if there is no text.

    `kept` are the shards of a folder that is extended; the records of its slices list none.
    """
    skipped = sum((Counter(record.skipped) for record in records), Counter[str]())
    damaged = list(chain.from_iterable(record.damaged for record in records))
    context_length = plan["options"].get("context_length")  # of chat alone
    if not any(record.num_train_tokens + record.num_val_tokens for record in records):
        verify.forget(folder)  # or it would hold the next try to these options
        what = "the source holds no text: every document is null, empty, damaged or below "
        what += "--min-score" + "; damaged: " * bool(damaged) + ", ".join(damaged[:3])
        fix = "look at the source, or name another column with --text-column"
        if context_length:
            what = "nothing to train on: " + "; ".join(chat.describe_skipped(skipped))
            fix = "look at the source; --columns names the columns of the conversations"
        raise ForgeError(what, where=plan["source"]["name"], fix=fix)
    made = list(chain.from_iterable(record.shards for record in records))
    kept_val, made_val = ([s for s in some if s.split == "val"] for some in (kept, made))
    kept_tokens = sum(record.num_val_tokens for record in records if not record.shards)
    val = join_val(folder, kept_val, kept_tokens, made_val, context_length)
    train = [shard for shard in (*kept, *made) if shard.split == "train"]
    reasons = chat.REASONS if context_length else ("null", "empty", "low_score")
    counts = {f"{why}_documents": skipped[why] for why in reasons}
    lengths, none = [record.document_tokens for record in records], DocumentLengths()
    of_chat = None
    if context_length:
        held = {split: chat.total(each.chat[split] for each in records) for split in shards.SPLITS}
        of_chat = {"template": chatml.NAME, "context_length": context_length}
        of_chat |= {"num_cut": skipped["cut"], "splits": held}
    return Index(
        folder=folder,
        tokenizer=plan["tokenizer"],
        source=plan["source"],
        options=plan["options"],
        skipped=counts | {"num_damaged": skipped["damaged"], "damaged": damaged},
        document_tokens={
            split: sum((each[split] for each in lengths), none) for split in shards.SPLITS
        },
        shards=(*train, *val),
        slices=tuple(record.row() for record in records),
        chat=of_chat,
    )


def join_val(
    folder: Path,
    kept: list[Shard],
    kept_tokens: int,
    made: list[Shard],
    context_length: int | None,
) -> tuple[Shard, ...]:
    """Join val into few large shards in `.work/`: `kept_tokens` of the old ones, then the pieces.

    Others' trainers want procs * B * T + 1 tokens in each shard, so all are about as large. Shards
    of chat, which has a context_length, are whole windows and one more <|im_end|>.
    """
    last = np.array([chatml.IM_END] if context_length else [], np.uint16)
    work = folder / WORK_FOLDER
    pieces, left = deque[tuple[Path, Shard, int]](), kept_tokens
    for shard in kept:
        pieces.append((folder / shard.file, shard, min(left, shard.num_tokens - len(last))))
        left -= pieces[-1][2]
    pieces.extend((work / shard.file, shard, shard.num_tokens - len(last)) for shard in made)
    total = sum(num_tokens for _, _, num_tokens in pieces)
    count = math.ceil(total / VAL_SHARD_TOKENS)
    paths = [work / shards.shard_name("val", number) for number in range(count)]
    position, rest = 0, np.empty(0, np.uint16)
    for number, path in enumerate(paths, 1):
        wanted = total * number // count  # the next document from there on ends the shard
        wanted -= wanted % (context_length or 1)  # where a window begins, so does a conversation
        with ShardWriter(path) as writer:
            while len(rest) or pieces:
                if not len(rest):
                    path_of_piece, shard, num_tokens = pieces.popleft()
                    rest = _checked_tokens(path_of_piece, shard)[:num_tokens]
                stop = len(rest)
                if number < count:
                    stop = verify.next_document(rest, wanted - position)
                writer.write(rest[:stop])
                position, rest = position + stop, rest[stop:]
                if len(rest):
                    break
            writer.write(last)
            writer.commit()
    return tuple(verify.measure(path, "val").shard for path in paths)


def _checked_tokens(path: Path, shard: Shard) -> shards.Tokens:
    """All tokens of a shard, read into memory; ForgeError if a byte has changed."""
    with refusals("read a shard", path):
        tokens = np.fromfile(path, "<u2", offset=shards.HEADER.size)
    if xxhash.xxh3_64_hexdigest(tokens.data) != shard.checksum:
        what = "the shard is damaged: its bytes are not those that were written"
        raise ForgeError(what, where=path, fix="run forge-prep verify on its folder")
    return tokens
