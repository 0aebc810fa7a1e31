"""plan -> run slices in parallel -> commit -> index.

Before: slices.py, which makes one slice. After: shards.py on the disk, which the trainer reads.

The plan is a pure function of the source's metadata and the options, and each slice of it is an
independent task. So any number of workers and any number of kills give the same bytes. index.json
is made at the end, of the records that finished slices leave in `.work/`.
"""

import json
import math
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import files, shards, sources, tokenizer
from pipeline.downloads import Downloads
from pipeline.errors import ForgeError
from pipeline.shards import WORK_FOLDER, DocumentLengths, Index
from pipeline.slices import (
    Job,
    Options,
    Record,
    cannot_write,
    finished,
    record_path,
    start_worker,
    tokenize_slice,
)
from pipeline.sources import Slice, Source

DOWNLOADS_FOLDER = "downloads"
PLAN_FILE = "plan.json"
FILES_DIFFER = "source files (names, sizes or contents)"
SHUFFLE_SEED = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands: bytes of the plan that are done, of how many, and train + val tokens."""

    done_bytes: int
    total_bytes: int
    num_tokens: int


@dataclass(frozen=True)
class Outcome:
    """How tokenize() ended. All but the index is of this run alone; `new_bytes` are of text."""

    index: Index
    up_to_date: bool
    seconds: float = 0.0
    new_bytes: int = 0
    new_tokens: int = 0


def tokenize(
    source: Source,
    folder: Path,
    options: Options,
    *,
    workers: int,
    overwrite: bool = False,
    keep_downloads: bool = False,
    skip_errors: bool = False,
    append: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Make a folder of shards of a source; go on where an earlier run of the same stopped.

    The same source and options give the same bytes for any number of workers. With `append`, the
    files that a finished folder does not have yet are added and its shards stay as they are. Raises
    ForgeError when the folder holds something else, and for every failure of input, output or
    worker.
    """
    plan = {
        "source": source.record(),
        "options": options.record(),
        "tokenizer": tokenizer.describe(),
    }
    if append and options.max_tokens is not None:
        raise ForgeError(
            "--append and --max-tokens do not go together", fix="take all of the new files, or none"
        )
    started = time.perf_counter()
    with hold(folder):
        old: Index | None = None
        if (folder / shards.INDEX_FILE).exists() and not overwrite:
            old = shards.load_index(folder)
            if append:
                source = _new_files(source, old)
                plan["source"]["files"] = old.source["files"] + source.record()["files"]
                plan["source"] |= {"name": old.source["name"]}
            made = {"source": old.source, "options": old.options, "tokenizer": old.tokenizer}
            _check_plan(plan, made, folder, any_files=append)
            if not append or not source.files:
                for shard in old.shards:
                    shards.check_header(folder / shard.file)
                _tidy(folder, old)
                return Outcome(old, up_to_date=True)
        damaged: list[str] = []  # whole files; workers find the rest
        slices = sources.plan(
            source,
            options.text_column,
            int(options.shard_tokens * sources.BYTES_PER_TOKEN),
            SHUFFLE_SEED if options.max_tokens else None,
            options.min_score,
            (lambda error, name: damaged.append(f"{name}: {error.what}")) if skip_errors else None,
        )
        if overwrite and not _goes_on(folder, plan):
            # Not before all is found to be good, as far as it can be looked at.
            _must_be_ours(folder)
            _check_room(folder, slices, options, source, freed=_shard_files(folder))
            _clear(folder)
        _claim(folder, plan, old)
        first = 1 + max((shard.slice for shard in old.shards), default=-1) if old else 0
        slices = [replace(each, number=each.number + first) for each in slices]
        run = _Run(source, folder, options, slices, keep_downloads, skip_errors, on_progress)
        left = [each for each in slices if each.number not in run.records]
        kept_tokens = sum(record.num_tokens("train") for record in run.records.values())
        _check_room(folder, left, options, source, kept_tokens)
        records = run.run(min(workers, len(slices)) or 1)
        index = _commit(folder, plan, records, sorted(damaged), old)
        _tidy(folder, index)
        seconds = time.perf_counter() - started
    new = [shard for each in records if each.slice not in run.kept for shard in each.shards]
    new_bytes = sum(shard.text_bytes for shard in new)
    return Outcome(index, False, seconds, new_bytes, sum(shard.num_tokens for shard in new))


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep every other forge-prep out of `folder`, made if need be, while this one is at work."""
    with files.hold(folder, "forge-prep"):
        try:
            yield
        except OSError as error:
            raise cannot_write(error, folder) from error


def _claim(folder: Path, plan: dict[str, Any], old: Index | None) -> None:
    """Put the plan and the vocabulary into `folder`, if what lies there allows it.

    `old` is its index when shards are appended to a finished folder.
    """
    work = folder / WORK_FOLDER
    plan_file = work / PLAN_FILE
    _must_be_ours(folder)
    work.mkdir(exist_ok=True)
    if plan_file.exists() and any(work.glob("[0-9]*.json")):
        _check_plan(plan, json.loads(plan_file.read_bytes()), folder, any_files=True)
    elif plan_file.exists() and old is None:  # nothing is finished yet: any plan may follow
        _clear(folder)
    for leftover in [*folder.glob("*.partial"), *work.glob("*.partial")]:
        leftover.unlink(missing_ok=True)
    files.write_whole(plan_file, (json.dumps(plan) + "\n").encode())
    vocabulary = folder / shards.VOCABULARY_FILE
    if not vocabulary.exists() or vocabulary.read_bytes() != tokenizer.vocabulary():
        files.write_whole(vocabulary, tokenizer.vocabulary())


def _must_be_ours(folder: Path) -> None:
    """ForgeError if something lies there, and neither shards of ours nor an unfinished run.

    Other people's shards would stay behind as strangers: only our own are ever removed.
    """
    ours = (folder / shards.INDEX_FILE).exists() or (folder / WORK_FOLDER).exists()
    if not ours and any(path.name != DOWNLOADS_FOLDER for path in folder.iterdir()):
        raise ForgeError(
            "the folder is not empty, and holds neither shards nor an unfinished run of forge-prep",
            where=folder,
            fix="choose another --out (--overwrite removes shards only, nothing else)",
        )
    kind = None
    with suppress(ForgeError):  # no index, or a damaged one
        kind = shards.load_index(folder).source.get("kind")
    if kind is not None and kind not in sources.KINDS.values():
        raise ForgeError(
            "the folder holds token files that others made",
            where=folder,
            fix="choose another --out",
        )


def _goes_on(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether an unfinished run of this very plan lies there: then nothing is in its way."""
    try:
        made = json.loads((folder / WORK_FOLDER / PLAN_FILE).read_bytes())
        _check_plan(plan, made, folder, any_files=True)
    except (OSError, ValueError, ForgeError):
        return False
    return not (folder / shards.INDEX_FILE).exists()


def _new_files(source: Source, old: Index) -> Source:
    """The source without the files that `old` has; all of those must still be there, unchanged."""
    files = {file.name: file.record() for file in source.files}
    for known in old.source["files"]:
        if files.pop(known["name"], None) != known:
            raise ForgeError(
                "a file that the folder was made of is gone or changed",
                where=known["name"],
                fix="restore it: the old files must still be in the source, beside new ones; "
                "or start afresh with --overwrite",
            )
    return replace(source, files=tuple(file for file in source.files if file.name in files))


def _tidy(folder: Path, index: Index) -> None:
    """Remove what an unfinished run left in a finished folder."""
    work = folder / WORK_FOLDER
    if not work.exists():
        return
    listed = {shard.file for shard in index.shards}
    for path in _shard_files(folder):
        if path.name not in listed:
            path.unlink()
    shutil.rmtree(work, ignore_errors=True)


def _shard_files(folder: Path) -> list[Path]:
    """Those that forge-prep made there, and halves of such."""
    return [path for path in folder.iterdir() if shards.SHARD_NAME.fullmatch(path.name)]


def _check_plan(
    wanted: dict[str, Any], made: dict[str, Any], folder: Path, any_files: bool
) -> None:
    """ForgeError that says what differs, unless both plans are the same.

    The order of the files does not count: appended ones stand behind the others. With `any_files`,
    neither do the files nor the hub's commit: each finished slice knows what it was made of.
    Without, the files say what a local source is, and its name does not count: it has many paths.
    """
    differences = []
    for section, old in made.items():
        new = wanted[section]
        for key in {**old, **new}:
            before, now = old.get(key), new.get(key)
            if key == "name" and section == "source" and not (any_files or new["hub"]):
                continue
            if any_files and section == "source" and key == "hub" and before and now:
                before, now = before | {"revision": ""}, now | {"revision": ""}
            if key == "files":
                if any_files:
                    continue
                by_name = [sorted(files, key=lambda f: str(f["name"])) for files in (before, now)]
                if by_name[0] != by_name[1]:
                    differences.append(FILES_DIFFER)
            elif before != now:
                differences.append(f"{section} {key}: {before!r}, now {now!r}")
    if differences:
        raise ForgeError(
            f"the folder was made with other options: {'; '.join(differences)}",
            where=folder,
            fix="choose another --out, or start afresh with --overwrite"
            + " (new files: --append)" * (FILES_DIFFER in differences),
        )


def _clear(folder: Path) -> None:
    """Remove what forge-prep made in `folder`, and nothing else. The index goes first.

    The work folder stays, empty: as long as it is there, the folder is seen to be forge-prep's.
    """
    work = folder / WORK_FOLDER
    work.mkdir(exist_ok=True)
    made = [folder / name for name in (shards.INDEX_FILE, shards.VOCABULARY_FILE)]
    for path in [*made, *_shard_files(folder)]:
        path.unlink(missing_ok=True)
    for path in sorted(work.iterdir(), key=lambda p: p.name == PLAN_FILE):  # the plan last
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _check_room(
    folder: Path,
    slices: list[Slice],
    options: Options,
    source: Source,
    kept_tokens: int = 0,
    freed: Sequence[Path] = (),
) -> None:
    """Refuse a run that cannot end well: too little room for its shards, once `freed` are gone.

    `slices` are those that are still to be made, the others have `kept_tokens` for train. Only
    parquet's metadata say how much text there is.
    """
    if source.kind != "parquet" or options.min_score is not None:
        return
    text = sum(each.bytes for each in slices)
    if options.max_tokens:
        left = max(0, options.max_tokens - kept_tokens)
        text = min(text, int(left * sources.BYTES_PER_TOKEN))
    needed = text / sources.BYTES_PER_TOKEN * shards.TOKEN_BYTES
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in freed)
    if free < 0.8 * needed:  # the estimate is rough
        raise ForgeError(
            f"too little room: about {needed / 1e9:.1f} GB of shards, {free / 1e9:.1f} GB free",
            where=folder,
            fix="make room, choose another --out, or take less with --max-tokens",
        )


def _commit(
    folder: Path,
    plan: dict[str, Any],
    records: list[Record],
    damaged: list[str],
    old: Index | None,
) -> Index:
    lengths = {split: DocumentLengths() for split in shards.SPLITS}
    lengths |= old.document_tokens if old else {}
    for record in records:
        for split in shards.SPLITS:
            lengths[split] += record.document_tokens[split]
    skipped = {
        f"{why}_documents": sum(getattr(record, f"{why}_documents") for record in records)
        for why in ("null", "empty", "low_score")
    }
    skipped |= {"damaged": damaged + [place for record in records for place in record.damaged]}
    if old:
        skipped = {why: old.skipped.get(why, type(new)()) + new for why, new in skipped.items()}
    index = Index(
        folder=folder,
        tokenizer=plan["tokenizer"],
        source=plan["source"],
        options=plan["options"],
        skipped=skipped,
        document_tokens=lengths,
        shards=(old.shards if old else ())
        + tuple(shard for record in records for shard in record.shards),
    )
    if not index.shards:
        _clear(folder)  # or its empty records would hold the next try to these options
        if all(path.name in (WORK_FOLDER, DOWNLOADS_FOLDER) for path in folder.iterdir()):
            (folder / WORK_FOLDER).rmdir()
        left_out = f"; damaged: {', '.join(skipped['damaged'][:3])}" if skipped["damaged"] else ""
        raise ForgeError(
            "the source holds no text: every document is null, empty, damaged or below --min-score"
            + left_out,
            where=plan["source"]["name"],
            fix="look at the source, or name another column with --text-column",
        )
    shards.save_index(index)
    return shards.load_index(folder)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """For the processes that are started here; this one hears of it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Run:
    """One run over the slices that have no record yet."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        options: Options,
        slices: list[Slice],
        keep_downloads: bool,
        skip_errors: bool,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.skip_errors = skip_errors
        self.source, self.folder, self.options = source, folder, options
        self.slices = slices  # max_tokens shortens them
        self.last_limit: int | None = None  # of the last slice, once max_tokens makes it the last
        self.on_progress = on_progress
        self.downloads: Downloads | None = None
        if source.hub:
            fetched = (folder if keep_downloads else folder / WORK_FOLDER) / DOWNLOADS_FOLDER
            self.downloads = Downloads(source, fetched, slices, keep_downloads)
        self.records: dict[int, Record] = {}
        self.counted_bytes = self.counted_tokens = 0
        self.total_bytes = sum(each.bytes for each in slices)
        for each in slices:
            if record := finished(self._job(each, (), None)):
                self.records[each.number] = record
            else:
                record_path(folder, each.number).unlink(missing_ok=True)
        self.kept = set(self.records)  # slices of earlier runs
        self.kept_bytes = sum(each.bytes for each in slices if each.number in self.records)
        self.kept_tokens = sum(
            record.num_tokens(split) for record in self.records.values() for split in shards.SPLITS
        )
        self.num_settled = self.settled_tokens = 0  # slices from the first on, and train tokens

    def run(self, workers: int) -> list[Record]:
        """All records in the order of the slices, up to the one that reaches max_tokens."""
        context = multiprocessing.get_context("spawn")
        done_bytes, done_tokens = context.Value("q"), context.Value("q")
        vocabulary = self.folder / shards.VOCABULARY_FILE
        pool = ProcessPoolExecutor(
            workers, context, start_worker, (vocabulary, done_bytes, done_tokens)
        )
        running: dict[Future[Record], int] = {}
        try:
            while not self._settled():
                with _deaf_to_ctrl_c():  # workers inherit it: the parent decides
                    for job in self._next_jobs(set(running.values()), workers + 1 - len(running)):
                        running[pool.submit(tokenize_slice, job)] = job.slice.number
                if not running:
                    time.sleep(0.05)  # waiting for a download
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    self.records[running.pop(future)] = future.result()
                self.counted_bytes, self.counted_tokens = done_bytes.value, done_tokens.value
                self._report()
        except KeyboardInterrupt:
            raise ForgeError(
                "stopped by Ctrl-C",
                where=self.folder,
                fix="run the same command again to go on; finished slices are kept",
            ) from None
        except BrokenProcessPool as error:
            raise ForgeError(
                "a worker process was killed (by hand, or by the kernel for want of memory)",
                where=self.folder,
                fix="run the same command again, perhaps with fewer --workers; "
                "finished slices are kept",
            ) from error
        finally:
            if running:  # stopped early, or these are beyond max_tokens
                for process in (pool._processes or {}).values():
                    process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
            for leftover in self.folder.rglob("*.partial"):
                leftover.unlink(missing_ok=True)
        return [self.records[each.number] for each in self.slices]

    def _settled(self) -> bool:
        """Whether every slice that is needed has its record.

        The first slice to reach max_tokens is the last one needed. It is made (again) with just
        the limit that the slices before it leave, so that the result does not depend on which
        slices happened to be done first; its files have to be there until then.
        """
        while self.num_settled < len(self.slices):
            each = self.slices[self.num_settled]
            record = self.records.get(each.number)
            if record is None:
                return False
            left = (self.options.max_tokens or math.inf) - self.settled_tokens
            num_tokens = record.num_tokens("train")
            if is_last := num_tokens >= left:
                self.slices = self.slices[: self.num_settled + 1]
            # A slice that is not the last may be cut: it was the last one before files changed.
            if num_tokens >= min(left, record.limit or math.inf) and record.limit != left:
                self.last_limit = int(left) if is_last else None
                del self.records[each.number]
                record_path(self.folder, each.number).unlink()
                return False
            self.num_settled += 1
            self.settled_tokens += num_tokens
            if self.downloads:
                self.downloads.release(each)
        return True

    def _next_jobs(self, busy: set[int], free: int) -> Iterator[Job]:
        """At most `free` jobs to start now, and no more than max_tokens is likely to need."""
        needed, expected, per_byte = [], 0, self._tokens_per_byte()
        for each in self.slices:
            if expected >= (self.options.max_tokens or math.inf):
                break  # what lies behind may have records already, and does not count
            if record := self.records.get(each.number):
                expected += record.num_tokens("train")
            else:
                expected += int(each.bytes * per_byte)
                needed.append(each)
        for position, each in enumerate(needed):
            if each.number in busy:
                continue
            paths = self._paths(each, needed[position + 1 :]) if free > 0 else None
            if paths is None:
                return
            free -= 1
            last = each is self.slices[-1]
            limit = self.last_limit if last and self.last_limit else self.options.max_tokens
            yield self._job(each, paths, limit)

    def _job(self, each: Slice, paths: tuple[Path, ...], limit: int | None) -> Job:
        return Job(
            slice=each,
            kind=self.source.kind,
            paths=paths,
            files=tuple(self.source.files[part.file] for part in each.parts),
            folder=self.folder,
            options=self.options,
            limit=limit,
            skip_errors=self.skip_errors,
        )

    def _paths(self, each: Slice, later: list[Slice]) -> tuple[Path, ...] | None:
        """Where the files of a slice lie; None while one of them is still being downloaded."""
        if self.downloads:
            return self.downloads.paths(each, later)
        return tuple(self.source.local_path(part.file) for part in each.parts)

    def _tokens_per_byte(self) -> float:
        """Of train, as the finished slices have it: a score drops text, an archive is dense."""
        size = sum(each.bytes for each in self.slices if each.number in self.records)
        tokens = sum(record.num_tokens("train") for record in self.records.values())
        return tokens / size if size and tokens else 1 / sources.BYTES_PER_TOKEN

    def _report(self) -> None:
        done, tokens = self.kept_bytes + self.counted_bytes, self.kept_tokens + self.counted_tokens
        total = max(done, self.total_bytes)
        if self.options.max_tokens is not None and tokens:  # as much more as was needed so far
            total = max(done, min(total, int(done * self.options.max_tokens / tokens)))
        self.on_progress(Progress(done, total, tokens))
