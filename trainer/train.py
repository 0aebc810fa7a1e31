"""Train a model: a whole run, from top to bottom.

Every rank runs the same code and takes the same branches: what only one of them knows travels with
the loss through one all-reduce a step. Nothing waits for the GPU only to print.
"""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from shlex import quote

import torch

from pipeline.errors import ForgeError, counted
from pipeline.files import check_utf8, hold
from trainer import int8
from trainer.backends import attention_backends
from trainer.checkpoint import Checkpoints, State
from trainer.evaluate import sample_text, validation_loss
from trainer.ranks import Ranks, from_first, gathered, on_all, process_group
from trainer.report import Report, duration, peak_flops, say
from trainer.run import Command, check_machines, open_run
from trainer.schedule import Clock, learning_rate
from trainer.signals import Signals
from trainer.start import (
    choose_precision,
    load_weights,
    new_state,
    open_report,
    prepare,
    trackers,
)
from trainer.step import Inbox, Setup, StepResult, Votes, train_step
from trainer.windows import check_amount, for_data, open_data

ENDING_SECONDS = 5.0  # longest wait for a killed process to release the run


def train(command: Command, started: float | None = None) -> None:
    """Train to the end of the schedule, or until a signal; writes everything under `run`.

    `started` is the time.perf_counter() at which the budget begins (else: now). Only rank 0 reads
    and writes the run folder; each machine has its own shards. Raises ForgeError, on every rank,
    for anything that a user can cause or cure.
    """
    started = time.perf_counter() if started is None else started
    config, run, ranks = command.config, command.run, Ranks.from_environment()
    device = ranks.device()
    torch.set_float32_matmul_precision("high")
    with ExitStack() as opened:
        opened.enter_context(process_group(ranks, device, config.guard.timeout_seconds))
        opened.enter_context(attention_backends(device))
        data = on_all(ranks, lambda: open_data(config, command.data))[ranks.rank]
        config = for_data(config, data)
        command = replace(command, config=config)
        check_machines(run, data.index, ranks)
        check_amount(config, data)

        def open_folder() -> State | None:
            check_utf8(run)
            trackers(config)
            opened.enter_context(hold(run, "forge-train", ENDING_SECONDS))
            return open_run(command, data.index)

        resumed = from_first(ranks, open_folder)
        is_new, state = resumed is None, resumed or new_state(command, data, device)
        if state.step >= state.plan.stop:
            if ranks.is_first:
                say(f"The run is complete: {run}. To train it for longer, give it to --from.")
            return
        setup = prepare(command, data, device, state, ranks)
        load_weights(setup, command, state, is_new)
        if is_new and config.precision == "auto":
            choose_precision(setup, state)
        clock = Clock(config, started, state.seconds)
        checkpoints = Checkpoints(run, config.checkpoint)
        signals = opened.enter_context(Signals())
        if is_new and command.weights_from:
            save_source(setup, state, checkpoints)
        report = open_report(setup, command, state, clock, is_new, opened)
        with setup.batches:
            if is_new:
                evaluate(setup, state, clock, report)
            run_steps(setup, state, clock, signals, report, checkpoints)
        is_complete = state.step >= state.plan.stop
        if not is_complete:
            report("stop", state.step, signal=signals.stop or "on another rank")
        if ranks.is_first:
            stopped = f"Stopped at step {state.step}; the same command with --resume continues."
            done = f"Done in {duration(clock.used)}. Let it write: forge-sample {quote(str(run))}"
            say(done if is_complete else stopped)


def save_source(setup: Setup, state: State, checkpoints: Checkpoints) -> None:
    """Save the weights of --from before the folder counts as a run: --resume never lacks them."""
    if problem := write(setup, state, checkpoints):
        what = f"the weights of --from are not saved: {problem}"
        raise ForgeError(what, where=checkpoints.run, fix="make room, or name another --out")


# ---------------------------------------------------------------------------------------- the loop


@dataclass
class Heard:
    """What the results of earlier steps said, the same on every rank."""

    stop: bool = False
    save: bool = False
    time_is_up: bool = False
    skipped: int = 0  # steps in a row whose update was left out
    is_sound: bool = True  # the last step, and its evaluation if there was one
    is_warm: bool = False  # whether a step was taken

    def take(self, result: StepResult) -> None:
        self.stop |= result.votes.stop
        self.save |= result.votes.save
        self.time_is_up |= result.votes.time_is_up
        self.is_sound = result.is_sound
        self.skipped = 0 if result.is_sound else self.skipped + 1


def run_steps(
    setup: Setup,
    state: State,
    clock: Clock,
    signals: Signals,
    report: Report,
    checkpoints: Checkpoints,
) -> None:
    """Take steps until the plan's end, the end of the budget, or a signal.

    ForgeError if the last step was not sound, or its checkpoint is not on the disk.
    """
    config, inbox, heard, unsaved = setup.config, Inbox(setup.device), Heard(), None
    while state.step < state.plan.stop and not heard.stop:
        votes = vote(setup, state, clock, signals)
        lr = learning_rate(config, state.plan, state.step + 1)
        figures = train_step(setup, lr, votes)
        state.advance(config.batch.tokens_per_step)
        take_up(inbox.push(state.step, lr, figures), setup, heard, clock, report, checkpoints)
        evaluates = state.step % config.evaluate.every_steps == 0
        heard.save |= state.step % config.checkpoint.every_steps == 0
        heard.save |= state.step == state.plan.start  # a longer run can begin from here
        ends = state.step == state.plan.stop
        if evaluates or ends or heard.save or heard.stop or heard.time_is_up:
            take_up(inbox.flush(), setup, heard, clock, report, checkpoints)
        if heard.time_is_up:
            state.plan, ends = replace(state.plan, stop=state.step), True
        if evaluates or ends:
            heard.is_sound &= evaluate(setup, state, clock, report)
        if heard.is_sound and (heard.save or heard.stop or ends):
            state.plan = from_first(setup.ranks, lambda: clock.revise(state.step, state.plan))
            unsaved = save(setup, state, clock, report, checkpoints)
            heard.save = False
        if not inbox.waiting:  # all is read, and something else may have been done since
            inbox.restart()
    reason, cure = unsaved, "make room"
    if not heard.is_sound:
        reason, cure = "a loss or a norm is not finite", "lower optimizer.peak_lr"
    if reason:
        what = f"the last step is not saved: {reason}"
        raise failure(what, state.step, f"{cure}, then --resume", setup, checkpoints)


def failure(what: str, step: int, cure: str, setup: Setup, checkpoints: Checkpoints) -> ForgeError:
    """An error that names the checkpoint to continue from; for all ranks to raise together."""
    fix = f"{cure}; {from_first(setup.ranks, checkpoints.last)}"
    return ForgeError(what, where=f"step {step} of {checkpoints.run}", fix=fix)


def vote(setup: Setup, state: State, clock: Clock, signals: Signals) -> Votes:
    """This rank's vote; the clock is rank 0's."""
    is_first = setup.ranks.is_first
    return Votes(
        bool(signals.stop),
        signals.take_save() or (is_first and clock.wants_plan(state.step, state.plan)),
        is_first and clock.is_up(state.step, state.plan),
    )


def take_up(
    results: list[StepResult],
    setup: Setup,
    heard: Heard,
    clock: Clock,
    report: Report,
    checkpoints: Checkpoints,
) -> None:
    """Report steps that are done, and keep what they said. ForgeError after too many skipped."""
    for result in results:
        heard.take(result)
        kind = "step" if result.is_sound else "skip"
        row = {"loss": result.loss, "lr": result.lr, "norm": result.norm}
        report(kind, result.step, **row, **speeds(setup, result.seconds))
        if heard.is_warm:  # the first step compiles
            clock.steps.append(result.seconds)
        heard.is_warm = True
        if heard.skipped >= setup.config.guard.max_skipped_steps:
            what = f"{counted(heard.skipped, 'step')} in a row not finite"
            raise failure(what, result.step, "lower optimizer.peak_lr", setup, checkpoints)


def speeds(setup: Setup, seconds: float) -> dict[str, float | None]:
    """Tokens/s, MFU, and the share of the time that the step waited for data."""
    waited = setup.batches.take_seconds_waited()
    speed, peak = setup.config.batch.tokens_per_step / seconds, peak_flops(setup.device)
    flops = speed * setup.config.model.flops_per_token() / setup.ranks.world_size
    mfu = flops / peak if peak else None
    return {"tokens_per_second": speed, "mfu": mfu, "data_wait": waited / seconds}


def evaluate(setup: Setup, state: State, clock: Clock, report: Report) -> bool:
    """Report the validation loss and a sample; returns whether the loss is finite."""
    began = time.perf_counter()
    config, model, device = setup.config, setup.model, setup.device
    size = setup.cut.micro_batch_size
    text, num_tokens = "", config.evaluate.sample_tokens
    with int8.paused(model):
        loss, bits, parts = validation_loss(model, setup.data, config, size, setup.ranks)
        if setup.ranks.is_first and num_tokens and state.step and math.isfinite(loss):
            text = sample_text(model, setup.data, num_tokens, state.step)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    took = time.perf_counter() - began
    if state.step:  # the one before the first step compiles
        clock.evaluation = took
    figures = {"loss": loss, "bits_per_byte": bits, "peak_memory_bytes": peak}
    of_parts = {"parts": parts} if len(setup.data.index.parts) > 1 else {}  # of a mixture
    report("evaluate", state.step, **figures, **of_parts, evaluate_seconds=took)
    if text:
        report("sample", state.step, text=text)
    state.validation_loss = loss if math.isfinite(loss) else None
    return math.isfinite(loss)


def save(
    setup: Setup, state: State, clock: Clock, report: Report, checkpoints: Checkpoints
) -> str | None:
    """Save on rank 0, after comparing the weights of all ranks; returns the error, if any."""
    began, ranks = time.perf_counter(), setup.ranks
    sums = on_all(ranks, setup.optimizer.checksum)
    if len(set(sums)) > 1:
        listed = ", ".join(f"rank {rank}: {found:x}" for rank, found in enumerate(sums))
        what = f"the weights are no longer the same on all ranks ({listed})"
        raise failure(what, state.step, "suspect a GPU or its memory", setup, checkpoints)
    state.seconds = clock.used
    problem = write(setup, state, checkpoints)
    clock.save = time.perf_counter() - began
    if problem is None:
        report("checkpoint", state.step, save_seconds=clock.save)
    elif ranks.is_first:
        say(f"WARNING: step {state.step}: checkpoint not saved: {problem}")
    return problem


def write(setup: Setup, state: State, checkpoints: Checkpoints) -> str | None:
    """Write a checkpoint on rank 0, of what all ranks have; returns the error, if any."""
    optimizer, ranks = setup.optimizer, setup.ranks
    files = gathered(ranks, optimizer.masters(), optimizer.state())

    def take() -> str | None:
        problem = checkpoints.save(files, state) if ranks.is_first else None
        for _ in files:  # after an error the others send the rest all the same
            pass
        return problem

    return on_all(ranks, take)[0]
