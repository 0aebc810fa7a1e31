"""plan -> run slices in parallel -> publish: a folder of shards, made or extended.

The plan is a pure function of the source's metadata and the options, and each slice of it is an
independent task. So any number of workers and kills give the same bytes. All is made in `.work/`
and moved to its place at the end. A finished folder that is extended, by more files or a larger
max_tokens, keeps all train shards but the last, and the val tokens of their slices.
"""

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import chat, chatml, files, readers, shards, slices, tokenizer, verify
from pipeline.chat import ChatOptions
from pipeline.downloads import DOWNLOADS_FOLDER, Downloads
from pipeline.errors import KEPT, ForgeError, refusals
from pipeline.shards import WORK_FOLDER, Index, Shard
from pipeline.slices import Figures, Job, Record
from pipeline.sources import BYTES_PER_TOKEN, Options, Plan, Slice, Source


class Progress(NamedTuple):
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
    """What an extended folder keeps: all of its slices but the last. Nothing, in a new folder."""

    num_slices: int = 0
    file: str = ""  # begins the next slice
    row_group: int = 0
    figures: Figures = field(default_factory=Figures)
    train: tuple[Shard, ...] = ()
    val: tuple[Shard, ...] = ()  # of which figures.num_val_tokens stay

    @staticmethod
    def of(index: Index | None) -> "Base":
        if index is None or index.base is None:
            return Base()
        raw = index.base
        train = tuple(each for each in index.of("train") if each.slice < raw["num_slices"])
        figures = Figures.from_json(raw["figures"])
        return Base(**raw | {"figures": figures, "train": train, "val": index.of("val")})


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
        plan |= {"tokenizer": describe_tokenizer(options)}
        state = verify.look_at(folder, plan, overwrite)
        if state.is_enough:
            shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
            assert state.index is not None
            return Outcome(state.index, up_to_date=True)
        source = source.ordered(state.known_files)
        base = Base.of(state.index)
        run = _Run(source, folder, options, base, skip_errors)
        run.cut()  # before anything is removed: damage and a wrong column show here
        if state.is_resumed:
            run.look_up()
        run.check_room([path for path in folder.glob("*.bin") if overwrite])
        if not state.is_resumed:
            verify.clear(folder, all_of_it=overwrite)
        work = verify.begin(folder, plan | {"source": source.record()})
        for leftover in work.glob("*.partial"):
            leftover.unlink()
        files.write_whole(work / shards.VOCABULARY_FILE, tokenizer.vocabulary())
        downloads = None
        if source.hub:
            fetched = (folder if keep_downloads else work) / DOWNLOADS_FOLDER
            downloads = Downloads(source, fetched, keep_downloads)
        records = run.run(workers, downloads, on_progress)
        index = verify.publish(_index(run, records))
    new = [shard for each in records if each.slice not in run.resumed for shard in each.shards]
    new_bytes, new_tokens = sum(s.text_bytes for s in new), sum(s.num_tokens for s in new)
    return Outcome(index, False, time.perf_counter() - started, new_bytes, new_tokens)


def describe_tokenizer(options: Options) -> dict[str, Any]:
    """The tokenizer as index.json records it: that of chat has the markers, too."""
    return tokenizer.describe(chatml.VOCAB_SIZE if options.chat else shards.VOCAB_SIZE)


def _describe_chat(options: ChatOptions | None, every: Figures) -> dict[str, Any] | None:
    """What index.json says of a folder of chat."""
    if options is None:
        return None
    head = {"template": chatml.NAME, "context_length": options.context_length}
    return head | {"num_cut": every.skipped["cut"], "splits": every.chat}


def _index(run: "_Run", records: list[Record]) -> Index:
    """The index of all slices, once val is joined in `.work/`."""
    base, made = run.base, [shard for record in records for shard in record.shards]
    kept = sum((record.figures for record in records[:-1]), base.figures)
    every = kept + (records[-1].figures if records else Figures())
    options = run.options.chat
    if not base.train and not made:
        verify.clear(run.folder)  # or its empty records would hold the next try to these options
        what = "the source holds no text: every document is null, empty, damaged or below "
        what += "--min-score" + "; damaged: " * bool(every.damaged) + ", ".join(every.damaged[:3])
        fix = "look at the source, or name another column with --text-column"
        if options:
            what = f"nothing to train on: {chat.describe_skipped(every.skipped)}"
            fix = "look at the source; --columns names the columns of the conversations"
        raise ForgeError(what, where=run.source.name, fix=fix)
    first = run.plan.slices[len(records) - 1].parts[0]  # of the last slice
    file = run.source.files[first.file].name
    reasons = chat.REASONS if options else ("null", "empty", "low_score")
    counts = {f"{why}_documents": every.skipped[why] for why in reasons}
    length = options.context_length if options else None
    val = slices.join_val(run.folder, base.val, base.figures.num_val_tokens, made, length)
    train = (*base.train, *(shard for shard in made if shard.split == "train"))
    return Index(
        folder=run.folder,
        tokenizer=describe_tokenizer(run.options),
        source=run.source.record(),
        options=run.options.record(),
        skipped=counts | {"num_damaged": every.skipped["damaged"], "damaged": every.damaged},
        document_tokens=every.document_tokens,
        shards=train + val,
        base={"num_slices": base.num_slices + len(records) - 1, "file": file}
        | {"row_group": first.start, "figures": asdict(kept)},
        chat=_describe_chat(options, every),
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
        self, source: Source, folder: Path, options: Options, base: Base, skip_errors: bool
    ) -> None:
        self.source, self.folder, self.options, self.base = source, folder, options, base
        work, no_slice = folder / WORK_FOLDER, Slice(0, ())
        self.job = Job(no_slice, source.kind, (), (), work, options, None, skip_errors)
        self.limit = options.max_tokens or math.inf
        names = [file.name for file in source.files]
        first_file = names.index(base.file) if base.file else 0
        on_damage = (lambda found: None) if skip_errors else readers.stop
        first = (base.num_slices, first_file, base.row_group)
        self.plan = Plan(source, options, on_damage, first)
        self.records: dict[int, Record] = {}
        self.resumed: set[int] = set()  # slices of earlier runs
        self.num_looked_up = self.num_settled = 0  # slices of the plan, from its first on
        self.base_tokens = sum(shard.num_tokens for shard in base.train)
        self.settled_tokens = self.base_tokens  # of train
        self.limits: dict[int, int] = {}  # of the last slice, once max_tokens makes it the last
        self.made_bytes = self.made_tokens = 0  # of the records: source bytes, train tokens
        self.before, self.done = [0, 0], [0, 0]  # bytes and tokens of earlier runs, and of this one

    def check_room(self, freed: Sequence[Path]) -> None:
        """Refuse a run that cannot end well: too little room for its shards, once `freed` are gone.

        Only parquet's metadata say how much text there is.
        """
        if self.source.kind != "parquet" or self.options.min_score is not None:
            return
        left = (self.plan.bytes - self.made_bytes) / BYTES_PER_TOKEN
        needed = min(left, self.tokens_left()) * shards.TOKEN_BYTES
        free = shutil.disk_usage(self.folder).free + sum(path.stat().st_size for path in freed)
        if free < 0.8 * needed:  # the estimate is rough
            what = f"too little room: about {needed / 1e9:.1f} GB of shards, "
            fix = "make room, choose another --out, or take less with --max-tokens"
            raise ForgeError(what + f"{free / 1e9:.1f} GB free", where=self.folder, fix=fix)

    def cut(self) -> None:
        """Cut as many slices as max_tokens is likely to need; rather one too many."""
        wanted = self.tokens_left() / self._tokens_per_byte()
        self.plan.reach(self.made_bytes + max(1.0, 1.1 * wanted))

    def look_up(self) -> None:
        """Find the records of earlier runs for the slices that were cut."""
        for each in self.plan.slices[self.num_looked_up :]:
            if record := slices.finished(self._job(each)):
                self._keep(each, record)
                self.resumed.add(each.number)
                self.before[0] += each.bytes
                self.before[1] += sum(shard.num_tokens for shard in record.shards)
            else:
                slices.record_path(self.job.work, each.number).unlink(missing_ok=True)
        self.num_looked_up = len(self.plan.slices)

    def _keep(self, each: Slice, record: Record) -> None:
        self.records[each.number] = record
        self.made_bytes += each.bytes
        self.made_tokens += record.train_tokens

    def _drop(self, each: Slice, record: Record, num_bytes: int) -> None:
        """Forget a record that counted as `num_bytes`: its slice is made again."""
        del self.records[each.number]
        self.resumed.discard(each.number)
        slices.record_path(self.job.work, each.number).unlink(missing_ok=True)
        self.made_bytes -= num_bytes
        self.made_tokens -= record.train_tokens

    def tokens_left(self) -> float:  # up to max_tokens
        return max(0.0, self.limit - self.base_tokens - self.made_tokens)

    def _tokens_per_byte(self) -> float:
        """Of train, as the finished slices have it: a score drops text, an archive is dense."""
        made = self.made_bytes and self.made_tokens
        return self.made_tokens / self.made_bytes if made else 1 / BYTES_PER_TOKEN

    def run(
        self, workers: int, downloads: Downloads | None, on_progress: Callable[[Progress], None]
    ) -> list[Record]:
        """All records in the order of the slices, up to the one that reaches max_tokens."""
        pool, counts = self._start_pool(workers)
        running: dict[Future[Record], int] = {}
        processes: list[Any] = []
        try:
            while not self._settled():
                if downloads and self.num_settled:
                    last = self.plan.slices[self.num_settled - 1].parts[-1]
                    downloads.release_before(last.file)
                with _deaf_to_ctrl_c(), refusals("start the workers", self.folder, KEPT):
                    free = workers + 1 - len(running)
                    for job in self._next_jobs(set(running.values()), free, downloads):
                        running[pool.submit(slices.tokenize_slice, job)] = job.slice.number
                processes = list((pool._processes or {}).values())
                if not running:
                    time.sleep(0.05)  # waiting for a download
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    record = future.result()
                    each = self.plan.slices[running.pop(future) - self.plan.number]
                    if record.pieces == self._job(each).pieces:  # it may have grown
                        self._keep(each, record)
                self.done = [count.value for count in counts]
                on_progress(self._progress())
        except KeyboardInterrupt:
            raise ForgeError("stopped by Ctrl-C", where=self.folder, fix=KEPT) from None
        except BrokenProcessPool as error:
            what = "a worker process was killed (by hand, or by the kernel for want of memory)"
            if -signal.SIGBUS in {process.exitcode for process in processes}:
                what = "a worker process could not read a file that it had mapped (SIGBUS)"
            doing = (self.plan.slices[number - self.plan.number] for number in running.values())
            names = {self.source.files[part.file].name for each in doing for part in each.parts}
            where = f"{self.folder}, at {', '.join(sorted(names)[:3])}"
            raise ForgeError(what, where=where, fix=f"{KEPT}; try fewer --workers") from error
        finally:
            if running:  # stopped early, or these are beyond max_tokens
                for process in (pool._processes or {}).values():
                    process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
            for leftover in self.job.work.glob("*.partial"):
                leftover.unlink(missing_ok=True)
        return [self.records[each.number] for each in self.plan.slices[: self.num_settled]]

    def _start_pool(self, workers: int) -> tuple[ProcessPoolExecutor, tuple[Any, Any]]:
        context, vocabulary = get_context("spawn"), self.job.work / shards.VOCABULARY_FILE
        more = f"in a container, docker run --shm-size=64m; {KEPT}"
        with refusals("make shared memory", "/dev/shm", more):
            counts = context.Value("q"), context.Value("q")  # with semaphores, which are files
            start = (slices.start_worker, (vocabulary, *counts))
            return ProcessPoolExecutor(workers, context, *start), counts

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
            left, num_tokens = self.limit - self.settled_tokens, record.train_tokens
            is_last = num_tokens >= left
            # A slice that is not the last may be cut, by the smaller limit of an earlier run.
            if num_tokens >= min(left, record.limit or math.inf) and record.limit != left:
                self.limits = {each.number: int(left)} if is_last else {}
                self._drop(each, record, each.bytes)
                return False
            if not is_last and each is self.plan.slices[-1] and not self.plan.whole:
                size = each.bytes
                self.cut()  # the estimate was too low: this slice grows, or more follow it
                if record.pieces != self._job(each).pieces:
                    self._drop(each, record, size)
                self.look_up()
                continue
            self.num_settled += 1
            self.settled_tokens += num_tokens
            if is_last:
                break
        return True

    def _next_jobs(self, busy: set[int], free: int, hub: Downloads | None) -> Iterator[Job]:
        """At most `free` jobs to start now, and no more than max_tokens is likely to need."""
        expected, per_byte = float(self.settled_tokens), self._tokens_per_byte()
        for position in range(self.num_settled, len(self.plan.slices)):
            each = self.plan.slices[position]
            if free <= 0 or expected >= self.limit or (self.limits and position > self.num_settled):
                return  # what lies behind may have records already, and does not count
            record = self.records.get(each.number)
            expected += record.train_tokens if record else each.bytes * per_byte
            if record or each.number in busy:
                continue
            behind = islice(self.plan.slices, position + 1, None)
            later = (other for other in behind if other.number not in self.records)
            here = (self.source.local_path(part.file) for part in each.parts)
            paths = hub.paths(each, later) if hub else tuple(here)
            if paths is None:
                return  # one of its files is still being downloaded
            free -= 1
            yield self._job(each, paths, self.limits.get(each.number, self.options.max_tokens))

    def _job(self, each: Slice, paths: tuple[Path, ...] = (), limit: int | None = None) -> Job:
        parts = tuple(each.parts)  # the plan's own may grow
        files = tuple(self.source.files[part.file] for part in parts)
        this = Slice(each.number, parts)
        return replace(self.job, slice=this, paths=paths, files=files, limit=limit)

    def _progress(self) -> Progress:
        done, tokens = (a + b for a, b in zip(self.before, self.done, strict=True))
        total, wanted = float(self.plan.bytes), self.limit - self.base_tokens
        if wanted < math.inf and tokens:  # as much more as was needed so far
            total = min(total if self.plan.whole else math.inf, done * wanted / tokens)
        return Progress(done, max(done, int(total)), self.base_tokens + tokens)
