"""plan -> run slices in parallel -> publish: a folder of shards, made or extended.

The plan is a pure function of the source's metadata and the options, and each slice of it is an
independent task. So any number of workers and kills give the same bytes. All is made in `.work/`
and moved to its place at the end. A run settles the slices in order: a slice is settled when its
record is the right one. A finished folder that is extended, by more files or a larger max_tokens,
is a run whose slices are settled already, all but the last.
"""

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import chat, chatml, files, readers, shards, slices, tokenizer, verify
from pipeline.downloads import DOWNLOADS_FOLDER, Downloads
from pipeline.errors import KEPT, ForgeError, refusals
from pipeline.plan import Plan
from pipeline.shards import WORK_FOLDER, DocumentLengths, Index
from pipeline.slices import Job, Record
from pipeline.sources import BYTES_PER_TOKEN, Options, Slice, Source

SHARED = f"in a container, docker run --shm-size=64m; {KEPT}"


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

    def summary(self) -> dict[str, Any]:
        """The facts of `forge-prep tokenize --json`."""
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
    """Make or extend a folder of shards of a source; resume where an earlier run stopped.

    The same source and options give the same bytes for any number of workers. Raises ForgeError
    when the folder holds something else, and for every failure of input, output or worker.
    """
    started = time.perf_counter()
    with files.hold(folder, "forge-prep"), refusals("write", folder, KEPT):
        wanted = {"source": source.record(), "options": options.record()}
        wanted |= {"tokenizer": tokenizer.describe(vocab_size(options))}
        index, known_files = verify.look_at(folder, wanted, overwrite)
        work = folder / WORK_FOLDER
        if index and verify.is_enough(index, wanted):
            return Outcome(index, up_to_date=True)
        if source.hub:
            source = replace(source, root=(folder if keep_downloads else work) / DOWNLOADS_FOLDER)
        source = source.ordered(known_files)
        run = _Run(source, folder, options, index, skip_errors)
        run.cut()  # before anything is removed: damage and a wrong column show here
        if overwrite:
            verify.clear(folder)
        verify.begin(folder, wanted | {"source": source.record()})
        files.write_whole(work / shards.VOCABULARY_FILE, tokenizer.vocabulary())
        downloads = Downloads(source, keep_downloads) if source.hub else None
        run.run(workers, downloads, on_progress)
        index = verify.publish(run.index())
    new = [shard for record in run.made.values() for shard in record.shards]
    new_bytes, new_tokens = sum(s.text_bytes for s in new), sum(s.num_tokens for s in new)
    return Outcome(index, False, time.perf_counter() - started, new_bytes, new_tokens)


def vocab_size(options: Options) -> int:
    """Token ids of a folder: chat has its markers, too."""
    return chatml.VOCAB_SIZE if options.chat else shards.VOCAB_SIZE


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Block SIGINT in the processes that are started inside; this one gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Run:
    """One run. `settled` are the records of the slices in order, up to the first without one.

    A folder that is extended has an `index`, whose records are settled from the start, but the
    last. `records` are those of stopped runs and of this one; the latter are in `made`, too.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        options: Options,
        index: Index | None,
        skip_errors: bool,
    ) -> None:
        self.source, self.folder, self.options = source, folder, options
        self.skip_errors, self.work = skip_errors, folder / WORK_FOLDER
        rows = [Record.from_json(row) for row in index.slices] if index else []
        self.settled = rows[:-1]
        self.num_kept = len(self.settled)
        old = index.shards if index else ()
        self.kept = [each for each in old if each.split == "val" or each.slice < self.num_kept]
        on_damage = (lambda found: None) if skip_errors else readers.stop
        first = rows[-1].first if rows else ("", 0)
        self.plan = Plan(source, options, on_damage, self.num_kept, *first)
        self.records: dict[int, Record] = {}
        self.made: dict[int, Record] = {}
        with refusals("make shared memory", "/dev/shm", SHARED):
            self.context = get_context("spawn")  # its semaphores are files
            self.done: Any = self.context.Array("q", 2)  # source bytes and tokens, of all runs

    def tokens_left(self) -> float:
        """Train tokens up to max_tokens."""
        if self.options.max_tokens is None:
            return math.inf
        return max(0, self.options.max_tokens - sum(r.num_train_tokens for r in self.settled))

    def _tokens_per_byte(self) -> float:
        """Of train, as the settled slices have it: a score drops text, an archive is dense."""
        tokens = sum(record.num_train_tokens for record in self.settled[self.num_kept :])
        return tokens / self._settled_bytes() if tokens else 1 / BYTES_PER_TOKEN

    def _settled_bytes(self) -> int:
        return sum(self.plan.slices[n].bytes for n in range(self.num_kept, len(self.settled)))

    def cut(self) -> None:
        """Cut as many slices as max_tokens is likely to need, and find their finished records."""
        known = set(self.plan.slices)
        wanted = max(1.0, 1.1 * self.tokens_left() / self._tokens_per_byte())
        self.plan.reach(self._settled_bytes() + wanted)
        for number in self.plan.slices.keys() - known:
            each = self.plan.slices[number]
            if record := slices.finished(self.work, each):
                self.records[number] = record
                self.done[0] += each.bytes
                self.done[1] += record.num_train_tokens + record.num_val_tokens

    def run(
        self, workers: int, downloads: Downloads | None, on_progress: Callable[[Progress], None]
    ) -> None:
        """Make slices until all that are needed are settled."""
        vocabulary = self.work / shards.VOCABULARY_FILE
        with refusals("make shared memory", "/dev/shm", SHARED):
            start = (slices.start_worker, (vocabulary, self.done))
            pool = ProcessPoolExecutor(workers, self.context, *start)
        running: dict[Future[Record], int] = {}
        processes: list[Any] = []
        try:
            while not self._settle():
                with _ctrl_c_blocked(), refusals("start the workers", self.folder, KEPT):
                    for job in self._next_jobs(set(running.values()), workers + 1, downloads):
                        running[pool.submit(slices.tokenize_slice, job)] = job.slice.number
                processes = list((pool._processes or {}).values())
                if not running:
                    time.sleep(0.05)  # waiting for a download
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    record = future.result()  # or its error, with what was running
                    number = running.pop(future)
                    self.records[number] = self.made[number] = record
                on_progress(self._progress())
        except KeyboardInterrupt:
            raise ForgeError("stopped by Ctrl-C", where=self.folder, fix=KEPT) from None
        except BrokenProcessPool as error:
            what = "a worker process was killed (by hand, or by the kernel for want of memory)"
            if -signal.SIGBUS in {process.exitcode for process in processes}:
                what = "a worker process could not read a file that it had mapped (SIGBUS)"
            doing = chain.from_iterable(self.plan.slices[n].parts for n in running.values())
            names = sorted({part.file.name for part in doing})
            where = f"{self.folder}, at {', '.join(names[:3])}"
            raise ForgeError(what, where=where, fix=f"{KEPT}; try fewer --workers") from error
        finally:
            if running:  # stopped early, or these are beyond max_tokens
                for process in (pool._processes or {}).values():
                    process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
            for leftover in self.work.glob("*.partial"):
                leftover.unlink(missing_ok=True)

    def _settle(self) -> bool:
        """Settle the slices whose records are right; whether these are all that are needed."""
        while self.tokens_left() > 0:
            number = len(self.settled)
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

    def _next_jobs(self, busy: set[int], most: int, downloads: Downloads | None) -> Iterator[Job]:
        """What to start now, so that `most` slices are being made, those of `busy` included."""
        last = self.plan.slices.get(len(self.settled) - 1)
        if downloads and last:  # it may grow
            downloads.release_before(last.parts[-1].file)
        left = self.tokens_left()
        limit = int(left) if left < math.inf else None
        for each in islice(self._to_make(busy), max(0, most - len(busy))):
            later = (other for other in self._to_make(busy) if other.number > each.number)
            if downloads and not downloads.are_here(each, later):
                return
            yield Job(each, self.source.kind, self.source.root, self.work, limit, self.skip_errors)

    def _to_make(self, busy: set[int]) -> Iterator[Slice]:
        """Slices that nobody has made, in order; no more than max_tokens is likely to need."""
        left, per_byte = self.tokens_left(), self._tokens_per_byte()
        first = len(self.settled)  # if it has a record, that isn't the right one
        for number in range(first, first + len(self.plan.slices)):
            each, record = self.plan.slices.get(number), self.records.get(number)
            if each is None or left <= 0:
                return
            left -= record.num_train_tokens if record else each.bytes * per_byte
            if number not in busy and (record is None or number == first):
                yield each

    def _progress(self) -> Progress:
        done, tokens = self.done
        before = sum(record.num_train_tokens for record in self.settled[: self.num_kept])
        total, wanted = float(self.plan.bytes), (self.options.max_tokens or math.inf) - before
        if wanted < math.inf and tokens:  # as much more as was needed so far
            total = min(total if self.plan.whole else math.inf, done * wanted / tokens)
        return Progress(done, max(done, int(total)), before + tokens)

    def index(self) -> Index:
        """The index of all slices, once val is joined in `.work/`."""
        skipped = sum((Counter(record.skipped) for record in self.settled), Counter[str]())
        damaged = list(chain.from_iterable(record.damaged for record in self.settled))
        if not any(record.num_train_tokens + record.num_val_tokens for record in self.settled):
            verify.forget(self.folder)  # or it would hold the next try to these options
            what = "the source holds no text: every document is null, empty, damaged or below "
            what += "--min-score" + "; damaged: " * bool(damaged) + ", ".join(damaged[:3])
            fix = "look at the source, or name another column with --text-column"
            if self.options.chat:
                what = "nothing to train on: " + "; ".join(chat.describe_skipped(skipped))
                fix = "look at the source; --columns names the columns of the conversations"
            raise ForgeError(what, where=self.source.name, fix=fix)
        new = self.settled[self.num_kept :]
        made = list(chain.from_iterable(record.shards for record in new))
        kept_val, made_val = (
            [shard for shard in some if shard.split == "val"] for some in (self.kept, made)
        )
        kept_tokens = sum(record.num_val_tokens for record in self.settled[: self.num_kept])
        how = self.options.chat
        context_length = how.context_length if how else None
        val = slices.join_val(self.folder, kept_val, kept_tokens, made_val, context_length)
        train = [shard for shard in (*self.kept, *made) if shard.split == "train"]
        reasons = chat.REASONS if how else ("null", "empty", "low_score")
        counts = {f"{why}_documents": skipped[why] for why in reasons}
        lengths = [record.document_tokens for record in self.settled]
        none = DocumentLengths()
        return Index(
            folder=self.folder,
            tokenizer=tokenizer.describe(vocab_size(self.options)),
            source=self.source.record(),
            options=self.options.record(),
            skipped=counts | {"num_damaged": skipped["damaged"], "damaged": damaged},
            document_tokens={
                split: sum((each[split] for each in lengths), none) for split in shards.SPLITS
            },
            shards=(*train, *val),
            slices=tuple(record.row() for record in self.settled),
            chat=self._describe_chat(skipped),
        )

    def _describe_chat(self, skipped: Counter[str]) -> dict[str, Any] | None:
        """What index.json says of a folder of chat."""
        if self.options.chat is None:
            return None
        head = {"template": chatml.NAME, "context_length": self.options.chat.context_length}
        splits = {
            split: chat.total(record.chat[split] for record in self.settled)
            for split in shards.SPLITS
        }
        return head | {"num_cut": skipped["cut"], "splits": splits}
