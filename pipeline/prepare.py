"""plan -> run slices in parallel -> publish: a folder of shards, made or extended.

Before: slices.py, which makes one slice. After: shards.py on the disk, which the trainer reads.

The plan is a pure function of the source's metadata and the options, and each slice of it is an
independent task. So any number of workers and any number of kills give the same bytes. All is made
in `.work/` and moved to its place at the end, so a finished folder stays whole while it is extended
by more files or a larger max_tokens: it keeps all train shards but the last, and the val tokens of
their slices.
"""

import math
import multiprocessing
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import files, readers, shards, tokenizer, verify
from pipeline.downloads import DOWNLOADS_FOLDER, Downloads
from pipeline.errors import ForgeError, refusals
from pipeline.readers import KEPT
from pipeline.shards import WORK_FOLDER, DocumentLengths, Index, Shard
from pipeline.slices import Job, Record, finished, record_path, start_worker, tokenize_slice
from pipeline.sources import BYTES_PER_TOKEN, Options, Plan, Slice, Source


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


@dataclass(frozen=True)
class Base:
    """What an extended folder keeps: all of its slices but the last. Nothing, in a new folder.

    `file` and `row_group` begin the next slice.
    """

    index: Index | None = None
    num_slices: int = 0
    file: str = ""
    row_group: int = 0
    num_val_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    document_tokens: dict[str, DocumentLengths] = field(
        default_factory=lambda: {split: DocumentLengths() for split in shards.SPLITS}
    )

    @staticmethod
    def of(index: Index | None) -> "Base":
        if index is None or index.base is None:
            return Base()
        lengths = index.base["document_tokens"].items()
        tokens = {split: DocumentLengths.from_json(each) for split, each in lengths}
        return Base(**index.base | {"index": index, "document_tokens": tokens})

    def add(self, records: list[Record]) -> "Base":
        """With more slices behind it."""
        skipped, lengths = Counter(self.skipped), dict(self.document_tokens)
        for record in records:
            skipped.update(record.skipped)
            lengths = {split: lengths[split] + record.document_tokens[split] for split in lengths}
        return replace(
            self,
            num_slices=self.num_slices + len(records),
            num_val_tokens=self.num_val_tokens + sum(each.num_tokens("val") for each in records),
            skipped=dict(skipped),
            damaged=(*self.damaged, *(place for each in records for place in each.damaged)),
            document_tokens=lengths,
        )

    @property
    def train_shards(self) -> tuple[Shard, ...]:
        train = self.index.of("train") if self.index else ()
        return tuple(shard for shard in train if shard.slice < self.num_slices)

    def to_json(self, file: str, row_group: int) -> dict[str, Any]:
        raw = asdict(replace(self, index=None, file=file, row_group=row_group))
        del raw["index"]
        return raw


def tokenize(
    source: Source,
    folder: Path,
    options: Options,
    *,
    workers: int,
    overwrite: bool = False,
    keep_downloads: bool = False,
    skip_errors: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Make a folder of shards of a source, or extend one; resume where an earlier run stopped.

    The same source and options give the same bytes for any number of workers. Raises ForgeError
    when the folder holds something else, and for every failure of input, output or worker.
    """
    started = time.perf_counter()
    with files.hold(folder, "forge-prep"), refusals("write", folder, KEPT):
        plan = {"source": source.record(), "options": options.record()}
        plan |= {"tokenizer": tokenizer.describe()}
        state = verify.look_at(folder, plan, overwrite)
        if state.is_enough:
            shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
            assert state.index is not None
            return Outcome(state.index, up_to_date=True)
        source = source.ordered(state.known_files)
        base = Base.of(state.index)
        run = _Run(source, folder, options, base, keep_downloads, skip_errors, on_progress)
        run.cut()  # before anything is removed: damage and a wrong column show here
        freed = [path for path in folder.glob("*.bin") if overwrite]
        if not state.is_resumed:
            _check_room(folder, run, freed)
            verify.clear(folder, all_of_it=overwrite)
        work = shards.begin(folder, plan | {"source": source.record()})
        for leftover in work.glob("*.partial"):
            leftover.unlink()
        files.write_whole(work / shards.VOCABULARY_FILE, tokenizer.vocabulary())
        run.look_up()
        _check_room(folder, run)
        records = run.run(workers)
        index = shards.publish(_index(run, records))
    new = [shard for each in records if each.slice not in run.resumed for shard in each.shards]
    new_bytes = sum(shard.text_bytes for shard in new)
    new_tokens = sum(shard.num_tokens for shard in new)
    return Outcome(index, False, time.perf_counter() - started, new_bytes, new_tokens)


def _check_room(folder: Path, run: "_Run", freed: Sequence[Path] = ()) -> None:
    """Refuse a run that cannot end well: too little room for its shards, once `freed` are gone.

    Only parquet's metadata say how much text there is.
    """
    if run.source.kind != "parquet" or run.options.min_score is not None:
        return
    text = sum(each.bytes for each in run.plan.slices if each.number not in run.records)
    needed = min(text / BYTES_PER_TOKEN, run.tokens_left()) * shards.TOKEN_BYTES
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in freed)
    if free < 0.8 * needed:  # the estimate is rough
        raise ForgeError(
            f"too little room: about {needed / 1e9:.1f} GB of shards, {free / 1e9:.1f} GB free",
            where=folder,
            fix="make room, choose another --out, or take less with --max-tokens",
        )


def _index(run: "_Run", records: list[Record]) -> Index:
    """The index of all slices, once val is joined in `.work/`."""
    base, folder = run.base, run.folder
    made = [shard for record in records for shard in record.shards]
    every = base.add(records)
    if not base.train_shards and not made:
        verify.clear(folder)  # or its empty records would hold the next try to these options
        left_out = f"; damaged: {', '.join(every.damaged[:3])}" if every.damaged else ""
        raise ForgeError(
            "the source holds no text: every document is null, empty, damaged or below --min-score"
            + left_out,
            where=run.source.name,
            fix="look at the source, or name another column with --text-column",
        )
    last = run.plan.slices[len(records) - 1].parts[0]
    file = run.source.files[last.file].name
    skipped = {f"{why}_documents": every.skipped[why] for why in ("null", "empty", "low_score")}
    kept_val = base.index.of("val") if base.index else ()
    return Index(
        folder=folder,
        tokenizer=tokenizer.describe(),
        source=run.source.record(),
        options=run.options.record(),
        skipped=skipped | {"num_damaged": every.skipped["damaged"], "damaged": every.damaged},
        document_tokens=every.document_tokens,
        shards=(
            *base.train_shards,
            *(shard for shard in made if shard.split == "train"),
            *verify.join_val(folder, kept_val, base.num_val_tokens, made),
        ),
        base=base.add(records[:-1]).to_json(file, last.start),
    )


# ---------------------------------------------------------------------------------------------
# The run


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
        base: Base,
        keep_downloads: bool,
        skip_errors: bool,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.source, self.folder, self.options, self.base = source, folder, options, base
        self.skip_errors, self.on_progress = skip_errors, on_progress
        self.limit = options.max_tokens or math.inf
        names = [file.name for file in source.files]
        first_file = names.index(base.file) if base.file else 0
        on_damage = (lambda found: None) if skip_errors else readers.stop
        first = (base.num_slices, first_file, base.row_group)
        self.plan = Plan(source, options, on_damage, first)
        self.downloads: Downloads | None = None
        if source.hub:
            fetched = (folder if keep_downloads else folder / WORK_FOLDER) / DOWNLOADS_FOLDER
            self.downloads = Downloads(source, fetched, keep_downloads)
        self.records: dict[int, Record] = {}
        self.resumed: set[int] = set()  # slices of earlier runs
        self.num_looked_up = self.num_settled = 0  # slices of the plan, from its first on
        self.base_tokens = sum(shard.num_tokens for shard in base.train_shards)
        self.settled_tokens = self.base_tokens  # of train
        self.limits: dict[int, int] = {}  # of the last slice, once max_tokens makes it the last
        self.done = (0, 0)  # bytes and tokens that this run's workers have counted

    def cut(self) -> None:
        """Cut as many slices as max_tokens is likely to need; rather one too many."""
        made = sum(each.bytes for each in self.plan.slices if each.number in self.records)
        self.plan.reach(made + max(1.0, 1.1 * self.tokens_left() / self._tokens_per_byte()))

    def look_up(self) -> None:
        """Find the records of earlier runs for the slices that were cut."""
        for each in self.plan.slices[self.num_looked_up :]:
            if record := finished(self._job(each, (), None)):
                self.records[each.number] = record
                self.resumed.add(each.number)
            else:
                self._forget(each.number)
        self.num_looked_up = len(self.plan.slices)

    def _forget(self, number: int) -> None:
        self.records.pop(number, None)
        self.resumed.discard(number)
        record_path(self.folder / WORK_FOLDER, number).unlink(missing_ok=True)

    def tokens_left(self) -> float:
        """Train tokens up to max_tokens that no record has."""
        made = sum(record.num_tokens("train") for record in self.records.values())
        return max(0.0, self.limit - self.base_tokens - made)

    def _tokens_per_byte(self) -> float:
        """Of train, as the finished slices have it: a score drops text, an archive is dense."""
        size = sum(each.bytes for each in self.plan.slices if each.number in self.records)
        tokens = sum(record.num_tokens("train") for record in self.records.values())
        return tokens / size if size and tokens else 1 / BYTES_PER_TOKEN

    def run(self, workers: int) -> list[Record]:
        """All records in the order of the slices, up to the one that reaches max_tokens."""
        pool, counts = self._start_pool(workers)
        running: dict[Future[Record], int] = {}
        processes: list[Any] = []
        try:
            while not self._settled():
                with _deaf_to_ctrl_c(), refusals("start the workers", self.folder, KEPT):
                    for job in self._next_jobs(set(running.values()), workers + 1 - len(running)):
                        running[pool.submit(tokenize_slice, job)] = job.slice.number
                processes = list((pool._processes or {}).values())
                if not running:
                    time.sleep(0.05)  # waiting for a download
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    number, record = running.pop(future), future.result()
                    each = self.plan.slices[number - self.plan.number]
                    if record.pieces == self._job(each, (), None).pieces:  # it may have grown
                        self.records[number] = record
                self.done = (counts[0].value, counts[1].value)
                self._report()
        except KeyboardInterrupt:
            fix = "run the same command again to resume; finished slices are kept"
            raise ForgeError("stopped by Ctrl-C", where=self.folder, fix=fix) from None
        except BrokenProcessPool as error:
            raise died(processes, self.folder) from error
        finally:
            if running:  # stopped early, or these are beyond max_tokens
                for process in (pool._processes or {}).values():
                    process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
            for leftover in (self.folder / WORK_FOLDER).glob("*.partial"):
                leftover.unlink(missing_ok=True)
        return [self.records[each.number] for each in self.plan.slices[: self.num_settled]]

    def _start_pool(self, workers: int) -> tuple[ProcessPoolExecutor, tuple[Any, Any]]:
        context = multiprocessing.get_context("spawn")
        vocabulary = self.folder / WORK_FOLDER / shards.VOCABULARY_FILE
        try:
            counts = context.Value("q"), context.Value("q")
            pool = ProcessPoolExecutor(workers, context, start_worker, (vocabulary, *counts))
        except OSError as error:  # semaphores are files there
            fix = f"give it room (docker run --shm-size=64m) or permission; {KEPT}"
            what = f"cannot make shared memory: {error.strerror}"
            raise ForgeError(what, where="/dev/shm", fix=fix) from error
        return pool, counts

    def _settled(self) -> bool:
        """Whether every slice that is needed has its record.

        The first slice to reach max_tokens is the last one needed. It is made (again) with just
        the limit that the slices before it leave, so that the result does not depend on which
        slices happened to be done first; its files have to be there until then.
        """
        while self.num_settled < len(self.plan.slices):
            each = self.plan.slices[self.num_settled]
            record = self.records.get(each.number)
            if record is None:
                return False
            left, num_tokens = self.limit - self.settled_tokens, record.num_tokens("train")
            is_last = num_tokens >= left
            # A slice that is not the last may be cut, by the smaller limit of an earlier run.
            if num_tokens >= min(left, record.limit or math.inf) and record.limit != left:
                self.limits = {each.number: int(left)} if is_last else {}
                self._forget(each.number)
                return False
            if not is_last and each is self.plan.slices[-1] and not self.plan.whole:
                self.cut()  # the estimate was too low: this slice grows, or more follow it
                self.look_up()
                if record.pieces != self._job(each, (), None).pieces:
                    self._forget(each.number)
                continue
            self.num_settled += 1
            self.settled_tokens += num_tokens
            if is_last:
                return True
            if self.downloads:
                self.downloads.release_before(each.parts[-1].file)
        return True

    def _next_jobs(self, busy: set[int], free: int) -> Iterator[Job]:
        """At most `free` jobs to start now, and no more than max_tokens is likely to need."""
        expected, per_byte = float(self.settled_tokens), self._tokens_per_byte()
        for position in range(self.num_settled, len(self.plan.slices)):
            each = self.plan.slices[position]
            if free <= 0 or expected >= self.limit or (self.limits and position > self.num_settled):
                return  # what lies behind may have records already, and does not count
            record = self.records.get(each.number)
            expected += record.num_tokens("train") if record else each.bytes * per_byte
            if record or each.number in busy:
                continue
            paths = self._paths(each, position)
            if paths is None:
                return
            free -= 1
            yield self._job(each, paths, self.limits.get(each.number, self.options.max_tokens))

    def _job(self, each: Slice, paths: tuple[Path, ...], limit: int | None) -> Job:
        return Job(
            slice=replace(each, parts=tuple(each.parts)),  # the plan's own may grow
            kind=self.source.kind,
            paths=paths,
            files=tuple(self.source.files[part.file] for part in each.parts),
            work=self.folder / WORK_FOLDER,
            options=self.options,
            limit=limit,
            skip_errors=self.skip_errors,
        )

    def _paths(self, each: Slice, position: int) -> tuple[Path, ...] | None:
        """Where the files of a slice lie; None while one of them is still being downloaded."""
        if not self.downloads:
            return tuple(self.source.local_path(part.file) for part in each.parts)
        slices = self.plan.slices
        later = (slices[n] for n in range(position + 1, len(slices)))
        without = (other for other in later if other.number not in self.records)
        return self.downloads.paths(each, without)

    def _report(self) -> None:
        kept = [self.records[number] for number in self.resumed]
        done = sum(self.plan.slices[each.slice - self.plan.number].bytes for each in kept)
        tokens = self.base_tokens + sum(s.num_tokens for each in kept for s in each.shards)
        done, tokens = done + self.done[0], tokens + self.done[1]
        total = max(done, self.plan.bytes)
        new, wanted = tokens - self.base_tokens, self.limit - self.base_tokens
        if wanted < math.inf and new:
            total = max(done, int(done * wanted / new))  # as much more as was needed so far
            total = min(total, max(done, self.plan.bytes)) if self.plan.whole else total
        self.on_progress(Progress(done, total, tokens))


def died(processes: list[Any], folder: Path) -> ForgeError:
    """What ended a worker process, by its exit code."""
    codes = {process.exitcode for process in processes} - {None, 0, -signal.SIGTERM}
    if -signal.SIGBUS in codes:
        what = "a worker process could not read a file that it had mapped (SIGBUS)"
        return ForgeError(what, where=folder, fix=f"check the disk of the source; {KEPT}")
    return ForgeError(
        "a worker process was killed (by hand, or by the kernel for want of memory)",
        where=folder,
        fix="run the same command again, perhaps with fewer --workers; finished slices are kept",
    )
