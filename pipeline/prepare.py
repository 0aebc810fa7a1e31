"""plan -> run slices in parallel -> publish: a folder of shards, made or extended.

The plan is a pure function of the source's metadata and the options, and each slice of it is an
independent task. So any engine, number of workers and kills give the same bytes. All is made in
`.work/` and moved to its place at the end. A run settles the slices in order: a slice is settled
when its record is the right one. A finished folder that is extended, by more files or a larger
max_tokens, is a run that begins at its last slice. A part is a run of some slices that publishes
nothing.
"""

import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import chatml, files, merge, shards, slices, tokenizer, verify
from pipeline.downloads import DOWNLOADS_FOLDER, Downloads
from pipeline.engines import Engine, Running
from pipeline.errors import KEPT, ForgeError, refusals
from pipeline.merge import Outcome
from pipeline.plan import Plan
from pipeline.shards import WORK_FOLDER, Index
from pipeline.slices import Job, Record
from pipeline.sources import BYTES_PER_TOKEN, Options, Slice, Source


class Progress(NamedTuple):
    """Where a run stands: bytes of the plan that are done, of how many, and train + val tokens."""

    done_bytes: int
    total_bytes: int
    num_tokens: int


def tokenize(
    source: Source,
    folder: Path,
    options: Options,
    engine: Engine,
    *,
    overwrite: bool = False,
    keep_downloads: bool = False,
    skip_errors: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Make or extend a folder of shards of a source; resume where an earlier run stopped.

    The same source and options give the same bytes on any engine. Raises ForgeError when the folder
    holds something else, and for every failure of input, output or worker.
    """
    started = time.perf_counter()
    with files.hold(folder, "forge-prep"), refusals("write", folder, KEPT):
        if merge.has_parts(folder):
            fix = f"forge-prep merge {folder}, once all are made; or choose another --out"
            raise ForgeError("this folder is made in parts", where=folder, fix=fix)
        plan = _describe(source, options)
        index, known_files = verify.look_at(folder, plan, overwrite)
        if index and verify.is_enough(index, plan):
            return Outcome(index, up_to_date=True)
        source = source.ordered(known_files)
        place = folder if keep_downloads else folder / WORK_FOLDER
        run = _Run(source, folder, options, engine, index, skip_errors, place)
        run.cut()  # before anything is removed: damage and a wrong column show here
        engine.connect()
        if overwrite:
            verify.clear(folder)
        plan["source"] = source.record()
        try:
            verify.begin(folder, plan)
            run.run(on_progress)
        except Exception:
            is_begun = any(run.work.glob("[0-9]*.json"))
            if not is_begun and not source.hub:  # whose downloads are worth keeping
                verify.forget(folder)
            raise
        made = merge.make_index(folder, plan, [*run.kept, *run.settled], run.kept_shards)
        index = verify.publish(made)
    new = [shard for record in run.made.values() for shard in record.shards]
    new_bytes, new_tokens = sum(s.text_bytes for s in new), sum(s.num_tokens for s in new)
    return Outcome(index, False, time.perf_counter() - started, new_bytes, new_tokens)


def tokenize_part(
    source: Source,
    folder: Path,
    options: Options,
    engine: Engine,
    part: tuple[int, int],
    *,
    keep_downloads: bool = False,
    skip_errors: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> int:
    """Make the slices of a part, such as (3, 16), of a new folder; resume where it stopped.

    Returns how many slices it has. Other processes may make the other parts at the same time.
    merge.merge() finishes the folder.
    """
    own = merge.part_folder(folder, part)
    # The folder is shared with the other parts, and with nobody else.
    held = files.hold(folder, "forge-prep", shared=True), files.hold(own, "forge-prep")
    with held[0], held[1], refusals("write", folder, KEPT):
        merge.check_folder(folder)
        source = source.ordered(())
        place = folder if keep_downloads else own
        run = _Run(source, folder, options, engine, None, skip_errors, place)
        times = [file.modified for file in source.files]
        plan = _describe(source, options) | {"num_slices": run.cut_part(part), "modified": times}
        engine.connect()
        merge.begin_part(folder, part, plan)
        run.run(on_progress)
        shutil.rmtree(own / DOWNLOADS_FOLDER, ignore_errors=True)
        return len(run.settled)


def _describe(source: Source, options: Options) -> dict[str, Any]:
    """The plan of a folder: all that decides its bytes."""
    described = tokenizer.describe(chatml.VOCAB_SIZE if options.chat else shards.VOCAB_SIZE)
    return {"source": source.record(), "options": options.record(), "tokenizer": described}


class _Run:
    """Makes slices in any order, and settles them in theirs.

    `settled` are the records of its slices, from number `first` on, up to the first without one.
    Those in front of `first` are `kept` from the folder that it extends. `records` are those of
    stopped runs and of this one; the latter are in `made`, too.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        options: Options,
        engine: Engine,
        index: Index | None,
        skip_errors: bool,
        downloads: Path,  # the folder above them: where it is this one, they stay
    ) -> None:
        self.downloads = None
        if source.hub:
            source = replace(source, root=downloads / DOWNLOADS_FOLDER)
            self.downloads = Downloads(source, keep_downloads=downloads == folder)
        self.source, self.folder, self.options, self.engine = source, folder, options, engine
        self.skip_errors, self.work = skip_errors, folder / WORK_FOLDER
        rows = [Record.from_json(row) for row in index.slices] if index else []
        self.kept = rows[:-1]
        self.first = len(self.kept)
        old = index.shards if index else ()
        self.kept_shards = [each for each in old if each.split == "val" or each.slice < self.first]
        begins = rows[-1].first if rows else ("", 0)
        self.plan = Plan(source, options, skip_errors, self.first, begins)
        self.settled: list[Record] = []
        self.records: dict[int, Record] = {}
        self.made: dict[int, Record] = {}
        self.running: Running = {}

    def tokens_left(self) -> float:
        """Train tokens up to max_tokens."""
        if self.options.max_tokens is None:
            return math.inf
        has = sum(record.num_train_tokens for record in (*self.kept, *self.settled))
        return max(0, self.options.max_tokens - has)

    def _tokens_per_byte(self) -> float:
        """Of train, as the settled slices have it: a score drops text, an archive is dense."""
        tokens = sum(record.num_train_tokens for record in self.settled)
        return tokens / self._settled_bytes() if tokens else 1 / BYTES_PER_TOKEN

    def _settled_bytes(self) -> int:
        return sum(self.plan.slices[self.first + n].bytes for n in range(len(self.settled)))

    def cut(self) -> None:
        """Cut as many slices as max_tokens is likely to need, and find their finished records."""
        known = set(self.plan.slices)
        wanted = max(1.0, 1.1 * self.tokens_left() / self._tokens_per_byte())
        self.plan.reach(self._settled_bytes() + wanted)
        self._find(self.plan.slices.keys() - known)

    def cut_part(self, part: tuple[int, int]) -> int:
        """Cut all slices, and keep those of a part; the number of all."""
        self.plan.reach(math.inf)
        num_slices = len(self.plan.slices)
        numbers = merge.numbers_of(part, num_slices)
        self.plan.keep(numbers)
        self.first = numbers.start
        self._find(numbers)
        return num_slices

    def _find(self, numbers: Iterable[int]) -> None:
        """Find the finished records of some slices."""
        for number in numbers:
            each = self.plan.slices[number]
            if record := slices.finished(self.work, each):
                self.records[number] = record
                self.engine.done[0] += each.bytes
                self.engine.done[1] += record.num_train_tokens + record.num_val_tokens

    def run(self, on_progress: Callable[[Progress], None]) -> None:
        """Make slices until all that are needed are settled."""
        vocabulary = self.work / shards.VOCABULARY_FILE
        if not vocabulary.exists():
            files.write_whole(vocabulary, tokenizer.vocabulary())
        running = self.running
        try:
            while not self._settle():
                for job in self._next_jobs():
                    running[self.engine.submit(job)] = job.slice
                if not running:
                    time.sleep(0.05)  # waiting for a download
                for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    record = self.engine.record(future, running)
                    number = running.pop(future).number
                    self.records[number] = self.made[number] = record
                on_progress(self._progress())
        except KeyboardInterrupt:
            raise ForgeError("stopped by Ctrl-C", where=self.folder, fix=KEPT) from None
        finally:
            self.engine.stop(running)  # some are beyond max_tokens, or all come too late
            for leftover in self.work.glob("*.partial"):  # of our slices: parts run side by side
                found = re.search(r"\d{6,}", leftover.name)
                if found and int(found[0]) in self.plan.slices:
                    leftover.unlink(missing_ok=True)

    def _settle(self) -> bool:
        """Settle the slices whose records are right; whether these are all that are needed."""
        while self.tokens_left() > 0:
            number = self.first + len(self.settled)
            if number in self.plan.slices:
                if not self._is_right(number):
                    return False
                self.settled.append(self.records[number])
            elif self.plan.whole:
                return True
            else:
                self.cut()  # the estimate was too low: the last slice grows, or more follow it
                if self.settled[-1].made_of != self.plan.slices[number - 1].made_of:
                    self.settled.pop()
        return True

    def _is_right(self, number: int) -> bool:
        """Whether the record of the next slice is the one it must have.

        The slice that reaches max_tokens is made with just the limit that the slices before it
        leave, and no other is cut. So nothing depends on which happened to be done first.
        """
        record, left = self.records.get(number), self.tokens_left()
        if record is None or record.made_of != self.plan.slices[number].made_of:
            return False
        limit = record.limit or math.inf
        return record.num_train_tokens < min(left, limit) or limit == left

    def _next_jobs(self) -> Iterator[Job]:
        """What to start now, so that each worker is busy and some slices wait for one."""
        workers, busy = self.engine.workers(), {each.number for each in self.running.values()}
        last = self.plan.slices.get(self.first + len(self.settled) - 1)
        if self.downloads and last:  # it may grow
            self.downloads.release_before(last.parts[-1].file)
        left = self.tokens_left()
        limit = int(left) if left < math.inf else None
        most = workers + 1 + workers // 8
        for each in islice(self._to_make(busy), max(0, most - len(busy))):
            later = (other for other in self._to_make(busy) if other.number > each.number)
            if self.downloads and not self.downloads.are_here(each, later):
                return
            places = self.source.root.absolute(), self.work.absolute()
            yield Job(each, self.source.kind, *places, limit, self.skip_errors)

    def _to_make(self, busy: set[int]) -> Iterator[Slice]:
        """Slices that nobody has made, in order; no more than max_tokens is likely to need."""
        left, per_byte = self.tokens_left(), self._tokens_per_byte()
        first = self.first + len(self.settled)  # if it has a record, that isn't the right one
        for number in range(first, first + len(self.plan.slices)):
            each, record = self.plan.slices.get(number), self.records.get(number)
            if each is None or left <= 0:
                return
            left -= record.num_train_tokens if record else each.bytes * per_byte
            if number not in busy and (record is None or number == first):
                yield each

    def _progress(self) -> Progress:
        done, tokens = self.engine.done
        before = sum(record.num_train_tokens for record in self.kept)
        total, wanted = float(self.plan.bytes), (self.options.max_tokens or math.inf) - before
        if wanted < math.inf and tokens:  # as much more as was needed so far
            total = min(total if self.plan.whole else math.inf, done * wanted / tokens)
        return Progress(done, max(done, int(total)), before + tokens)
