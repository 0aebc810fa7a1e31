"""train: the loop that turns windows into a model.

Before: windows.py and step.py. After: validation.py, checkpoint.py and metrics.py.

Every rank runs the same code and takes the same branches: what decides (a non-finite step, a wish
to stop) travels with the loss through one all-reduce a step. Nothing waits for the GPU only to
print: a step's figures are read when the next step has been queued.
"""

import contextlib
import functools
import math
import os
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ForgeError
from pipeline.files import write_whole
from trainer import card, checkpoint, memory
from trainer.backends import attention_backends, compile_model, load_libraries
from trainer.check import notes
from trainer.config import Config
from trainer.metrics import Metrics, amount, duration, hardware, peak_flops, say, step_line
from trainer.model import build_model
from trainer.optimizer import Optimizer, compute_dtype
from trainer.ranks import (
    Heartbeat,
    Ranks,
    fill_from_first,
    from_first,
    gather,
    launch,
    on_all,
    process_group,
)
from trainer.run import (
    Data,
    Past,
    RunLock,
    check_room,
    check_same_folder,
    check_same_shards,
    make_folder,
    open_data,
    open_run,
    run_files,
    write_readme,
)
from trainer.schedule import UNKNOWN_STEPS, Clock, Schedule
from trainer.signals import Wishes
from trainer.step import Moment, Shared, StepResult, train_step
from trainer.validation import sample_text, validation_loss
from trainer.windows import MicroBatches

PRINT_SECONDS = 1.0  # at most one step line in so long


def train(
    config: Config,
    name: str,
    data_folder: Path,
    run: Path,
    resume: bool,
    started: float | None = None,
) -> None:
    """Train to the end of the schedule, or until a signal; writes everything under `run`.

    `started` is the time.perf_counter() from which on the budget runs (else: now). Rank 0 decides
    all that depends on the run folder, and alone writes it; the shards are read from each machine's
    own disk. Raises ForgeError, on every rank alike, for anything that a user can cause or cure.
    """
    started = time.perf_counter() if started is None else started
    ranks = Ranks.from_environment()
    device = ranks.device()
    lock, plan = RunLock(run), None
    try:
        with process_group(ranks, device, config.guard.timeout_seconds) as heartbeat:
            data = on_all(ranks, lambda: open_data(config, data_folder))
            check_same_shards(data, ranks)
            check_same_folder(run, ranks)
            past = from_first(ranks, lambda: open_run(config, data.index, run, resume, lock))
            plan = memory.plan_step(config, ranks, device, past.checkpoint or 0)
            with attention_backends(device):
                trainer = Trainer(
                    config, name, data, run, ranks, device, plan, past, started, heartbeat
                )
                trainer.train(lock)
    except torch.OutOfMemoryError as error:
        raise ForgeError(
            "out of GPU memory"
            + (f" with a micro-batch of {plan.micro_batch_size}" if plan else ""),
            where=f"rank {ranks.rank}, {device}: {str(error).splitlines()[0][:120]}",
            fix="the same command with --resume --set batch.micro_batch_size=N, with a smaller N; "
            "tokens a step stay the same",
        ) from error
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        said = " ".join(str(error).strip().splitlines()[:2])
        raise ForgeError(
            f"torch.compile failed: {said}",
            where=f"rank {ranks.rank}, {device}",
            fix="install a C compiler, such as gcc, if that is missing; or do without: "
            "--resume --set compile=off",
        ) from error
    finally:
        lock.release()


class Trainer:
    def __init__(
        self,
        config: Config,
        name: str,
        data: Data,
        run: Path,
        ranks: Ranks,
        device: torch.device,
        plan: memory.Plan,
        past: Past,
        started: float,
        heartbeat: Heartbeat | None,
    ) -> None:
        self.config, self.name, self.data, self.run = config, name, data, run
        self.ranks, self.device, self.plan = ranks, device, plan
        self.past, self.started, self.heartbeat = past, started, heartbeat
        torch.set_float32_matmul_precision("high")
        self.model = build_model(config.model)
        dtype = compute_dtype(config, device)
        with ThreadPoolExecutor() as pool:  # the CPU is busy while the card is measured
            filled = pool.submit(self.model.init_weights, config.seed)
            loaded = pool.submit(load_libraries, config.model, device, dtype)
            self.card = card.measure(device, dtype)
            filled.result()
            loaded.result()
        self.model.to(device)
        self.optimizer = Optimizer(self.model, config, ranks)
        compile_model(self.model, config, device)
        self.hardware = hardware(device, ranks.world_size)
        self.peak = peak_flops(device)
        self.step = 0
        self.saved_step: int | None = None
        self.unsaved: Exception | None = None  # what the last save failed of
        self.validation: tuple[int, float] | None = None  # step, loss
        self.decayed = 1.0  # what the decay has left of the rate, after `step`
        self.schedule = Schedule(config, self.decayed, past.replay)
        timed = (past.evaluate_seconds, past.step_seconds)
        self.clock = Clock(config, *(timed if past.hardware == self.hardware else ()))
        self.room = (0, UNKNOWN_STEPS)  # (step, steps that fitted from it on), as last heard
        self.skipped = 0  # steps in a row
        self.stopping = self.saving = False
        self.printed_at = 0.0

    # -- where we stand

    @property
    def tokens(self) -> int:
        return self.config.tokens_after(self.step)

    @property
    def seconds(self) -> float:
        """Of training, over all starts."""
        return self.past.seconds + time.perf_counter() - self.started

    @property
    def budget_used(self) -> float:
        """Seconds of schedule.budget_hours that are gone."""
        if self.config.schedule.count_downtime:
            # At least the training itself, if a clock was set back meanwhile.
            return max(self.seconds, time.time() - self.past.started_at)
        return self.seconds

    @property
    def num_steps(self) -> int | str:
        """The last step, as far as that is known: for people."""
        fixed = self.config.num_steps()
        if self.config.schedule.budget_hours is None or self.room[1] >= UNKNOWN_STEPS:
            return fixed or "?"
        return f"~{min(fixed or math.inf, self.room[0] - 1 + int(self.room[1]))}"

    def say(self, text: str) -> None:
        if self.ranks.is_first:
            say(text)

    def log(self, kind: str, step: int | None = None, **values: Any) -> None:
        """A row of metrics.jsonl, of `step` (from 1) or of where we stand."""
        step = self.step if step is None else step
        self.metrics.log(kind, step, self.config.tokens_after(step), self.seconds, **values)

    def write_readme(self) -> None:
        write_readme(self.run, self.config, self.name, self.data.index, self.metrics, self.hardware)

    # -- the run

    def train(self, lock: RunLock) -> None:
        last = self.past.checkpoint
        if last is not None:
            self.resume(last)
            if self.schedule.is_over(self.step):
                hours = self.past.by_clock
                ended = "schedule.budget_hours" if hours else "schedule.max_steps or max_tokens"
                self.say(f"The run is complete: {self.run}. More of {ended} lets it go on.")
                return
        self.metrics = Metrics(self.run, self.ranks.is_first)
        found, plan = "", self.plan
        if self.config.batch.micro_batch_size == "auto":  # and so it stays: the next may find more
            found = (
                f"# On {self.hardware}: batch.micro_batch_size was found to be "
                f"{plan.micro_batch_size}, with {plan.accumulation_steps} accumulation steps.\n"
            )
        saved = (self.optimizer.masters, *self.optimizer.state().values())
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in saved)
        keep_last = self.config.checkpoint.keep_last
        from_first(self.ranks, lambda: check_room(self.run, num_bytes, keep_last))
        self.lock, self.files = lock, run_files(self.config, self.data.index, found)
        more = (self.past, lock, self.start_metrics, self.files)
        from_first(self.ranks, lambda: make_folder(self.run, *more))
        self.saver = checkpoint.Saver(self.run, self.config.checkpoint)
        if self.ranks.is_first:
            self.saver.prepare(self.optimizer.views(self.optimizer.masters), self.optimizer.state())
        wishes = Wishes()
        try:
            with wishes.caught():
                self.introduce()
                if last is None:
                    self.evaluate()
                self.first_step = self.step + 1
                while not self.ends:
                    with MicroBatches(
                        self.data.train,
                        self.config.seed,
                        self.step,
                        self.config.step_sizes(),
                        self.plan.micro_batch_size,
                        self.ranks.rank,
                        self.ranks.world_size,
                        self.device,
                    ) as batches:
                        self.loop(batches, wishes)
                if self.saved_step != self.step:
                    self.save()
                self.must_be_saved()
        except ForgeError:  # on all ranks; the first to leave has torchrun end the others
            self.wait_for_save()
            raise
        finally:
            self.saver.wait()
        if self.schedule.is_over(self.step):
            self.say(f"Done in {duration(self.seconds)}: {self.run}")
            over = self.budget_used - (self.config.schedule.budget_hours or math.inf) * 3600
            if over >= 1 and self.past.checkpoint is None:
                self.say(
                    f"That is {over:.0f} s over the budget: start, first steps, evaluations and "
                    "checkpoint did not fit into it."
                )
        else:
            self.log("stop", signal=wishes.stop or "of another rank")
            self.say(f"Stopped at step {self.step}; the same command with --resume goes on.")

    def start_metrics(self) -> None:
        self.metrics.start(
            self.past.checkpoint,
            self.tokens,
            self.seconds,
            world_size=self.ranks.world_size,
            hardware=self.hardware,
            **asdict(self.plan),
            **(asdict(self.card) if self.card else {}),
            process=os.getpid(),
            launch=launch(),
            started_at=self.past.started_at,
            **({"replay": list(self.past.replay)} if self.past.replay else {}),
        )

    @property
    def ends(self) -> bool:
        return self.stopping or self.schedule.is_over(self.step)

    def loop(self, batches: MicroBatches, wishes: Wishes) -> None:
        """Steps until the end, a signal, or a change of the micro-batch."""
        plan, sizes = self.plan, self.config.step_sizes()
        pending: StepResult | None = None
        self.step_began = Moment(self.device)
        while not self.ends and self.plan is plan:
            at, fitting = self.room
            lr = self.schedule.rate(self.step + 1, fitting - (self.step + 1 - at))
            if self.schedule.decayed < 1 and self.decayed == 1:
                self.settle(pending, batches)
                pending = None
                self.begin_decay()
            cut = sizes.cut(self.step, self.ranks.world_size, plan.micro_batch_size)
            figures = train_step(
                self.model,
                self.optimizer,
                batches,
                cut[0],
                sizes.of(self.step) * self.config.model.context_length,
                lr,
                self.ranks,
                wishes,
                self.clock.steps_left(self.budget_used, self.step) - (pending is not None),
            )
            self.settle(pending, batches)
            self.step += 1
            decayed = (self.decayed, self.schedule.decayed)
            self.decayed = self.schedule.decayed
            waited = batches.take_seconds_waited()
            pending = StepResult(self.step, lr, decayed, figures, plan, waited)
            over = self.schedule.is_over(self.step)
            evaluates = over or self.step % self.config.evaluate.every_steps == 0
            saves = self.step % self.config.checkpoint.every_steps == 0
            if evaluates or saves or self.stopping or self.saving or self.device.type == "cpu":
                self.settle(pending, batches)
                pending = None
            if evaluates:
                self.evaluate()
            if saves or self.saving:
                self.save()
            self.note_saved()
        self.settle(pending, batches)  # queued with a micro-batch that was too large

    def settle(self, result: StepResult | None, batches: MicroBatches) -> None:
        """Read a step's figures, log them, and take up what any rank wants."""
        if result is None:
            return
        shared = result.read()
        elapsed = result.arrived.seconds_since(self.step_began)
        self.step_began = result.arrived
        if self.heartbeat:
            self.heartbeat.progress(result.step)
        if shared.failed:
            self.fail(result, batches)
        self.stopping = self.stopping or shared.stops > 0
        self.saving = self.saving or shared.saves > 0
        self.room = (result.step, shared.steps_left)
        if shared.out_of_memory:
            self.lower_micro_batch(result)
            return
        if result.step > self.first_step:  # the first one compiles
            self.clock.note_step(result.step, elapsed)
        row: dict[str, Any] = {"loss": shared.loss, "lr": result.lr, "norm": shared.norm}
        if self.config.shape() == "wsd":
            row["decayed"] = result.decayed
        if not math.isfinite(shared.loss + shared.norm):
            self.skip(result, shared, row, batches)
            return
        self.skipped = 0
        tokens = self.config.tokens_after(result.step)
        step_tokens = tokens - self.config.tokens_after(result.step - 1)
        speed = row["tokens_per_second"] = step_tokens / elapsed
        flops = speed * self.config.model.flops_per_token() / self.ranks.world_size
        row["mfu"] = flops / self.peak if self.peak else None
        row["matmul_utilization"] = flops / self.card.matmul_flops if self.card else None
        row["data_wait"] = result.seconds_waited / elapsed
        self.log("step", result.step, **row)
        over = self.schedule.is_over(result.step)
        now = time.perf_counter()
        if now - self.printed_at >= PRINT_SECONDS or result.step == self.first_step or over:
            self.printed_at = now
            self.say(step_line({"step": result.step, **row}, self.num_steps, self.eta(elapsed)))

    def eta(self, elapsed: float) -> float:
        """Seconds until the end, as far as they are known; `elapsed` are the last step's."""
        times = self.clock.step_seconds or (elapsed,)
        fixed, budget = self.config.num_steps(), self.config.schedule.budget_hours
        sizes, left = self.config.step_sizes(), []
        if fixed:
            full_steps = (sizes.before(fixed) - sizes.before(self.step)) / sizes.windows
            left.append(full_steps * statistics.median(times))
        if budget is not None:
            left.append(budget * 3600 - self.budget_used)
        return max(0.0, min(left))

    def skip(
        self, result: StepResult, shared: Shared, row: dict[str, Any], batches: MicroBatches
    ) -> None:
        """A step whose update was left out, on all ranks alike: say which windows made it."""
        self.skipped += 1
        step = result.step
        micro_batches = [
            divmod(n, len(shared.suspects) // self.ranks.world_size)
            for n, is_suspect in enumerate(shared.suspects)
            if is_suspect or not any(shared.suspects)
        ]
        found = [
            self.data.train.locate(int(window))
            for rank, micro_step in micro_batches
            for window in batches.windows_of(step - 1, rank, micro_step)
        ]
        windows = [{"shard": s.file, "offset": start, "slice": s.slice} for s, start in found]
        row |= {"loss": str(shared.loss), "norm": str(shared.norm)}
        self.log("skip", step, **row, windows=windows)
        self.say(
            f"step {step}: loss {shared.loss}, norm {shared.norm}: not finite, update skipped; "
            f"{len(windows)} windows, the first at token {windows[0]['offset']:,} of "
            f"{windows[0]['shard']}"
        )
        if self.skipped >= self.config.guard.max_skipped_steps:
            raise ForgeError(
                f"{self.skipped} steps in a row were not finite",
                where=f"step {step} of {self.run}",
                fix=f"lower optimizer.peak_lr; the last good checkpoint: {self.last_saved()}",
            )

    def lower_micro_batch(self, result: StepResult) -> None:
        """A rank ran out of GPU memory: all of them left the step out, and go on with less."""
        step = result.step
        decayed = {"decayed": result.decayed} if self.config.shape() == "wsd" else {}
        if result.plan is not self.plan:  # it was queued before the last step's was lowered
            self.log("out_of_memory", step, **asdict(self.plan), **decayed)
            self.say(f"step {step}: out of GPU memory as well, update skipped")
            return
        _, used = self.config.step_sizes().cut(
            step - 1, self.ranks.world_size, self.plan.micro_batch_size
        )
        plan = memory.smaller(self.plan, self.config, used)
        if plan is None:
            raise ForgeError(
                "out of GPU memory with a micro-batch of 1",
                where=f"step {step} of {self.run}",
                fix="train a smaller model, or free the GPU of other programs; --resume goes on",
            )
        self.plan = plan
        self.log("out_of_memory", step, **asdict(plan), **decayed)
        self.say(
            f"step {step}: out of GPU memory, update skipped; on with a micro-batch of "
            f"{plan.micro_batch_size} x {plan.accumulation_steps}"
        )

    def fail(self, result: StepResult, batches: MicroBatches) -> None:
        """A rank could not read its windows: save what there is before that step, and stop."""
        self.step, self.decayed = result.step - 1, result.decayed_before
        if self.step != self.saved_step and self.step:
            self.save()

        def say_why() -> None:
            if batches.error:
                raise batches.error

        on_all(self.ranks, say_why)

    def evaluate(self) -> None:
        started = time.perf_counter()
        try:
            loss, bits = validation_loss(
                self.model, self.data, self.config, self.plan.micro_batch_size, self.ranks
            )
        except ForgeError:  # on all ranks: a shard of the val split is gone
            if self.step and self.step != self.saved_step:
                self.save()
            raise
        self.validation = (self.step, loss)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        text = ""
        samples = self.config.evaluate.sample_tokens and self.step and math.isfinite(loss)
        if self.ranks.is_first and samples:
            text = sample_text(
                self.model, self.data.vocabulary, self.config.evaluate.sample_tokens, self.step
            )
        took = time.perf_counter() - started
        self.step_began = Moment(self.device)
        if self.step:  # the one before the first step compiles
            self.clock.evaluate_seconds = took
        figures: dict[str, Any] = {"loss": loss, "bits_per_byte": bits, "peak_memory_bytes": peak}
        self.log("evaluate", **figures, evaluate_seconds=took)
        self.say(
            f"step {self.step}/{self.num_steps}  validation loss {loss:.4f}  "
            f"bits per byte {bits:.4f}"
        )
        if text:
            self.log("sample", text=text)
            self.say("  | " + re.sub(r"\s*\n\s*", "\n  | ", text.strip()))
        self.write_readme()

    # -- the run folder

    def begin_decay(self) -> None:
        """The rate falls from the next step on: keep what was before, to extend the run from."""
        step = self.step + 1
        self.log("decay", step, steps_left=self.schedule.left)
        self.say(f"step {step}: the learning rate falls to zero from here on")
        if self.step and self.step != self.saved_step:
            self.save()

    def resume(self, step: int) -> None:
        """Take up a checkpoint that rank 0 reads for all."""
        path = checkpoint.checkpoint_path(self.run, step)
        wanted = {
            checkpoint.MODEL_FILE: self.optimizer.views(self.optimizer.masters),
            checkpoint.OPTIMIZER_FILE: self.optimizer.state(),
        }
        state = from_first(self.ranks, lambda: checkpoint.load_state(self.run, step))
        for file, tensors in wanted.items():
            read = functools.partial(checkpoint.load_tensors, path / file, tensors)
            fill_from_first(self.ranks, read, tensors)
        self.optimizer.copy_to_model()
        self.step, self.decayed, self.saved_step = state.step, state.decayed, state.step
        self.schedule.decayed = state.decayed
        self.room = (self.step, UNKNOWN_STEPS)
        self.say(f"Resuming from step {step}.")
        for change in self.past.changes:
            self.say(f"Changed since the last start: {change}")

    def save(self) -> None:
        """Begin to save on rank 0, after comparing the weights of all ranks."""
        started = time.perf_counter()
        self.saving = False
        self.wait_for_save()
        self.check_same_weights()
        loss = self.validation[1] if self.validation and self.validation[0] == self.step else None
        if loss is not None and not math.isfinite(loss):
            loss = None
        state = checkpoint.State(
            self.step, self.tokens, self.seconds, decayed=self.decayed, validation_loss=loss
        )
        from_first(self.ranks, self.mend_folder)
        if self.ranks.is_first:
            masters = self.optimizer.views(self.optimizer.masters)
            self.saver.start(masters, self.optimizer.state(), state)
        self.saved_step = self.step
        self.write_readme()
        self.clock.stall_seconds = time.perf_counter() - started
        if self.device.type == "cpu":  # on a GPU the copies count to the next step, where they are
            self.step_began = Moment(self.device)

    def mend_folder(self) -> None:
        """A checkpoint is of no use without the files beside it: someone may have removed them."""
        gone = [name for name in self.files if not (self.run / name).exists()]
        if gone:
            self.say(f"WARNING: {', '.join(gone)} of {self.run} was gone: writing it again")
            with contextlib.suppress(OSError):  # the save itself will say so
                self.run.mkdir(parents=True, exist_ok=True)
                self.lock.renew()
                for name in gone:
                    write_whole(self.run / name, self.files[name])

    def check_same_weights(self) -> None:
        """ForgeError unless the weights are the same bits on all ranks."""
        masters = self.optimizer.masters
        sums = gather(self.ranks, int(masters.view(torch.int32).sum(dtype=torch.int64)))
        if len(set(sums)) > 1:
            listed = ", ".join(f"rank {rank}: {total:x}" for rank, total in enumerate(sums))
            raise ForgeError(
                f"the weights are no longer the same on all ranks ({listed})",
                where=f"step {self.step} of {self.run}",
                fix=f"suspect a GPU or its memory; the last good checkpoint: {self.last_saved()}",
            )

    def last_saved(self) -> str:
        """The checkpoint to go on from, once none is being written."""
        self.wait_for_save()
        saved = from_first(self.ranks, lambda: checkpoint.steps(self.run))
        return str(checkpoint.checkpoint_path(self.run, saved[-1])) if saved else "none yet"

    def note_saved(self) -> None:
        """Log the saves that have ended."""
        for saved in self.saver.finished():
            self.unsaved = saved.error
            if saved.error:
                good = checkpoint.steps(self.run)
                self.say(
                    f"WARNING: step {saved.step}: checkpoint not saved: {saved.error}; "
                    + (f"the last one is of step {good[-1]}" if good else "there is none yet")
                )
                continue
            took = self.clock.save_seconds = saved.seconds
            stall = self.clock.stall_seconds
            self.log("checkpoint", saved.step, save_seconds=took, stall_seconds=stall)
            self.say(f"step {saved.step}: checkpoint saved in {took:.1f} s")

    def wait_for_save(self) -> None:
        """Until rank 0 writes nothing: in turns, each shorter than a collective may take."""
        while from_first(self.ranks, lambda: self.saver.is_busy(1.0)):
            if self.heartbeat:
                self.heartbeat.progress(self.step)

    def must_be_saved(self) -> None:
        """Wait for the last checkpoint; ForgeError on all ranks if the disk did not take it."""

        def look() -> None:
            self.note_saved()
            if self.unsaved:
                raise ForgeError(
                    f"cannot write the run folder: {self.unsaved}",
                    where=self.run,
                    fix="make room and run the same command with --resume",
                )

        self.wait_for_save()
        from_first(self.ranks, look)
        self.write_readme()

    def introduce(self) -> None:
        config, plan, index = self.config, self.plan, self.data.index
        num_tokens, budget = config.num_tokens(), config.schedule.budget_hours
        ends = []
        if num_tokens is not None:
            epochs = num_tokens / index.total("num_tokens", "train")
            ends.append(
                f"{config.num_steps():,} steps, {amount(num_tokens)} tokens, {epochs:.2f} epochs"
            )
        if budget is not None:
            ends.append(f"{budget:g} hours, {duration(self.budget_used)} of them used")
        warm_up = ""
        if config.batch.doublings:
            small = config.tokens_after(1)
            warm_up = f"; {small:,} at first, doubled each {config.batch.doubling_steps} steps"
        self.say(
            f"{self.name}: {config.model.num_parameters():,} parameters on {self.hardware}\n"
            f"{config.batch.tokens_per_step:,} tokens a step = {plan.micro_batch_size} windows of "
            f"{config.model.context_length} x {plan.accumulation_steps} accumulation steps x "
            f"{self.ranks.world_size} ranks{warm_up}\n"
            f"{' or '.join(ends)}, from {index.folder}\n"
            f"Save now: kill -USR1 {os.getpid()}"
        )
        for note in notes(config, index.total("num_tokens", "train")):
            self.say(f"Note: {note}")
