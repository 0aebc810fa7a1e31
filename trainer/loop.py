"""train, train_step, evaluate: the loop that turns windows into a model.

Before: windows.py, model.py, optimizer.py. After: checkpoint.py and metrics.py.

Every rank runs the same code and takes the same branches: what decides (a non-finite step, a wish
to stop) travels with the loss through one all-reduce a step. Nothing waits for the GPU only to
print: a step's figures are read when the next step has been queued.
"""

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline import shards
from pipeline.errors import ForgeError
from trainer import card, checkpoint, memory
from trainer.config import Config
from trainer.metrics import Metrics, amount, duration, hardware, peak_flops, step_line
from trainer.model import GPT2
from trainer.optimizer import Optimizer, learning_rate
from trainer.ranks import Ranks, process_group, sum_over_ranks
from trainer.run import Data, make_folder, open_data, open_run, write_readme
from trainer.windows import MicroBatches, prefetch, to_device, windows_at

VALIDATION_SEED = 0  # one choice of validation windows for every run
PRINT_SECONDS = 1.0  # at most one step line in so long


class StopSignal:
    """Remembers SIGINT and SIGTERM; the loop leaves at the end of a step, with a checkpoint."""

    def __init__(self) -> None:
        self.name = ""

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        def remember(number: int, frame: Any) -> None:
            self.name = signal.Signals(number).name

        before = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StepResult:
    """A step's figures (train_step), on their way from the device to here."""

    def __init__(
        self, step: int, lr: float, figures: Tensor, plan: memory.Plan, seconds_waited: float
    ) -> None:
        self.step, self.lr, self.plan, self.seconds_waited = step, lr, plan, seconds_waited
        self.arrived: torch.cuda.Event | None = None
        self.figures = figures
        if figures.is_cuda:  # reading it directly would wait for all that is queued behind it, too
            self.figures = torch.empty(len(figures), pin_memory=True)
            self.figures.copy_(figures, non_blocking=True)
            self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.arrived.record()

    def read(self) -> tuple[float, bool, bool, float]:
        """(loss, whether any rank wants to stop, or is out of memory, norm); waits for the step."""
        if self.arrived:
            self.arrived.synchronize()
        loss, stop, out_of_memory, norm = self.figures.tolist()
        return loss, stop > 0, out_of_memory > 0, norm


def train_step(
    model: GPT2,
    optimizer: Optimizer,
    batches: MicroBatches,
    accumulation_steps: int,
    tokens_per_step: int,
    lr: float,
    ranks: Ranks,
    stop: StopSignal,
) -> Tensor:
    """One optimizer update: forward, loss, backward, clip, update.

    Returns [mean loss over the global batch, number of ranks that want to stop, number that ran
    out of memory, gradient norm before clipping], on the device. A loss or norm that is not
    finite leaves the weights as they were, and so does a rank without memory.
    """
    total = torch.zeros((), device=optimizer.device)
    out_of_memory = False
    try:
        for _ in range(accumulation_steps):
            inputs, targets = next(batches)
            loss = model(inputs, targets)
            (loss * optimizer.loss_scale).backward()
            optimizer.collect()
            total += loss.detach()
    except torch.OutOfMemoryError:
        out_of_memory = True
    if out_of_memory:  # out of the except clause, which holds the failed step's arrays
        inputs = targets = loss = None  # type: ignore[assignment]
        optimizer.discard()
        torch.cuda.empty_cache()
        total.fill_(math.nan)
    optimizer.reduce(ranks)
    flags = [torch.full_like(total, flag) for flag in (bool(stop.name), out_of_memory)]
    sums = sum_over_ranks(torch.stack([total / tokens_per_step, *flags]), ranks)
    norm = optimizer.update(lr, tokens_per_step, torch.isfinite(sums[0]))
    return torch.cat([sums, norm.reshape(1)])


@torch.no_grad()
def evaluate(
    model: GPT2, data: Data, config: Config, micro_batch_size: int, ranks: Ranks
) -> tuple[float, float]:
    """Validation loss over the config's fixed tokens: (nats a token, bits a byte of text).

    The same windows whatever the batch and the number of ranks; draws nothing from any generator.
    """
    device = next(model.parameters()).device
    length = config.model.context_length
    count = config.evaluate.num_tokens // length
    chosen = windows_at(np.arange(count), data.val.num_windows, VALIDATION_SEED)
    mine = chosen[ranks.rank :: ranks.world_size]
    token_bytes = torch.tensor([len(token) for token in data.vocabulary], device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for first in range(0, len(mine), micro_batch_size):
        batch = data.val.read(mine[first : first + micro_batch_size])
        inputs, targets = to_device(batch, device)
        missing = micro_batch_size - len(batch)  # keep one shape, so that nothing recompiles
        if missing:
            inputs = torch.cat([inputs, inputs.new_zeros(missing, length)])
            targets = torch.cat([targets, targets.new_full((missing, length), -100)])
        sums[0] += model(inputs, targets)
        sums[1] += token_bytes[targets[: len(batch)]].sum()
    nats, num_bytes = sum_over_ranks(sums, ranks).tolist()
    return nats / (count * length), nats / math.log(2) / num_bytes


@torch.no_grad()
def sample_text(model: GPT2, vocabulary: list[bytes], num_tokens: int, step: int) -> str:
    """A short text from <|endoftext|> on, to look at; its own generator, at temperature 0.8."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(step)
    length = min(num_tokens, model.config.context_length - 1)
    tokens = torch.full((1, length + 1), shards.EOT_TOKEN, device=device)
    # Always the full length, which is causal all the same: new shapes cost a GPU more.
    for n in range(length):
        logits = model.logits(model.hidden(tokens)[:, n]).float().cpu() / 0.8
        logits[:, shards.VOCAB_SIZE :] = -math.inf  # rows that a config may have added
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens[0, n + 1] = drawn.item()
        if drawn.item() == shards.EOT_TOKEN:
            break
    text = b"".join(vocabulary[t] for t in tokens[0, 1 : n + 2].tolist())
    return text.decode("utf-8", "replace")


# ---------------------------------------------------------------------------------------------


def train(config: Config, name: str, data_folder: Path, run: Path, resume: bool) -> None:
    """Train to the end of the schedule, or until a signal; writes everything under `run`.

    Raises ForgeError, on every rank alike, for anything that a user can cause or cure.
    """
    ranks = Ranks.from_environment()
    device = ranks.device()
    data = open_data(config, data_folder)
    last = open_run(config, data, run, resume)
    try:
        with process_group(ranks, device):
            plan = memory.plan_step(config, ranks, device)
            with attention_backends(device):
                Trainer(config, name, data, run, ranks, device, plan).train(last)
    except torch.OutOfMemoryError as error:
        raise ForgeError(
            f"out of GPU memory with a micro-batch of {plan.micro_batch_size}",
            where=f"rank {ranks.rank}, {device}: {str(error).splitlines()[0][:120]}",
            fix="the same command with --resume --set batch.micro_batch_size=N, with a smaller N; "
            "tokens a step stay the same",
        ) from error


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
    ) -> None:
        self.config, self.name, self.data, self.run = config, name, data, run
        self.ranks, self.device, self.plan = ranks, device, plan
        torch.set_float32_matmul_precision("high")
        self.model = GPT2(config.model)
        self.model.init_weights(config.seed)
        self.model.to(device)
        self.optimizer = Optimizer(self.model, config, ranks)
        compile_model(self.model, config, device)
        self.hardware = hardware(device, ranks.world_size)
        self.peak = peak_flops(device)
        self.card = card.measure(device, self.optimizer.weights.dtype)
        self.step = 0
        self.skipped = 0
        self.seconds_before = 0.0
        self.printed_at = 0.0
        self.step_seconds = 0.0  # smoothed, for the ETA

    # -- where we stand

    @property
    def tokens(self) -> int:
        return self.step * self.config.batch.tokens_per_step

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def say(self, text: str) -> None:
        if self.ranks.is_first:
            print(text, flush=True)

    def log(self, kind: str, **values: Any) -> None:
        self.metrics.log(kind, self.step, self.tokens, self.seconds, **values)

    # -- the run

    def train(self, last: int | None) -> None:
        self.started = time.perf_counter()
        num_steps = self.config.num_steps()
        if last is not None:
            self.resume(last)
            if self.step >= num_steps:
                self.say(f"The run is complete: {self.run}")
                return
        problem: object = None
        if self.ranks.is_first:
            problem = make_folder(self.run, self.config, self.data.index)
        self.fail_together(problem, "name another --out, or make it writable")
        self.metrics = Metrics(self.run, self.ranks.is_first, last)
        self.introduce()
        self.log(
            "start",
            world_size=self.ranks.world_size,
            hardware=self.hardware,
            **asdict(self.plan),
            **(asdict(self.card) if self.card else {}),
        )
        if last is None:
            self.evaluate()
        self.first_step = self.step + 1
        stop, stopping = StopSignal(), False
        with stop.caught():
            while self.step < num_steps and not stopping:
                batches = prefetch(
                    self.data.train,
                    self.config.seed,
                    self.step,
                    self.config.windows_per_step(),
                    self.plan.micro_batch_size,
                    self.ranks.rank,
                    self.ranks.world_size,
                    self.device,
                )
                with batches as micro_batches:
                    stopping = self.loop(micro_batches, num_steps, stop)
        if self.step < num_steps:
            self.log("stop", signal=stop.name)
            self.say(f"Stopped at step {self.step}; the same command with --resume goes on.")
        else:
            self.say(f"Done in {duration(self.seconds)}: {self.run}")

    def loop(self, batches: MicroBatches, num_steps: int, stop: StopSignal) -> bool:
        """Steps until the end, a signal (returns true), or a change of the micro-batch."""
        plan = self.plan
        every_evaluation = self.config.evaluate.every_steps
        every_checkpoint = self.config.checkpoint.every_steps
        pending: StepResult | None = None
        stopping = False
        self.step_ended_at = time.perf_counter()
        while self.step < num_steps and not stopping and self.plan is plan:
            lr = learning_rate(self.step + 1, self.config)
            figures = train_step(
                self.model,
                self.optimizer,
                batches,
                self.plan.accumulation_steps,
                self.config.batch.tokens_per_step,
                lr,
                self.ranks,
                stop,
            )
            self.step += 1
            if pending:
                stopping = self.settle(pending)
            pending = StepResult(self.step, lr, figures, plan, batches.take_seconds_waited())
            evaluates = self.step % every_evaluation == 0 or self.step == num_steps
            saves = self.step % every_checkpoint == 0 or self.step == num_steps
            if evaluates or saves or stopping or self.device.type == "cpu":
                stopping = self.settle(pending) or stopping
                pending = None
            if evaluates:
                self.evaluate()
            if saves or (stopping and self.step < num_steps):
                self.save(must=stopping or self.step == num_steps)
            if evaluates or saves:
                self.step_ended_at = time.perf_counter()
        if pending:  # queued with a micro-batch that was too large
            stopping = self.settle(pending) or stopping
        return stopping

    def settle(self, result: StepResult) -> bool:
        """Read a step's figures, log them, and say whether all ranks are to stop."""
        loss, stop, out_of_memory, norm = result.read()
        now = time.perf_counter()
        elapsed, self.step_ended_at = now - self.step_ended_at, now
        num_steps, step_tokens = self.config.num_steps(), self.config.batch.tokens_per_step
        tokens = result.step * step_tokens
        if out_of_memory:
            if result.plan is self.plan:  # not lowered already, for the step before
                self.lower_micro_batch(result.step, tokens)
            return stop
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skip(result.step, tokens, loss, norm)
            return stop
        self.skipped = 0
        speed = step_tokens / elapsed
        if result.step > self.first_step:  # the first one compiles
            recent = 0.05 if self.step_seconds else 1.0
            self.step_seconds += recent * (elapsed - self.step_seconds)
        flops = speed * self.config.model.flops_per_token() / self.ranks.world_size
        row = {
            "loss": loss,
            "lr": result.lr,
            "norm": norm,
            "tokens_per_second": speed,
            "mfu": flops / self.peak if self.peak else None,
            "matmul_utilization": flops / self.card.matmul_flops if self.card else None,
            "data_wait": result.seconds_waited / elapsed,
        }
        self.metrics.log("step", result.step, tokens, self.seconds, **row)
        if now - self.printed_at >= PRINT_SECONDS or result.step in (self.first_step, num_steps):
            self.printed_at = now
            eta = (num_steps - result.step) * (self.step_seconds or elapsed)
            self.say(step_line({"step": result.step, **row}, num_steps, eta))
        return stop

    def skip(self, step: int, tokens: int, loss: float, norm: float) -> None:
        """A step that was not finite: its update was left out, on all ranks alike."""
        self.skipped += 1
        self.metrics.log("skip", step, tokens, self.seconds, loss=str(loss), norm=str(norm))
        self.say(f"step {step}: loss {loss}, norm {norm}: not finite, update skipped")
        if self.skipped >= self.config.guard.max_skipped_steps:
            saved = checkpoint.steps(self.run)
            good = checkpoint.checkpoint_path(self.run, saved[-1]) if saved else "none yet"
            raise ForgeError(
                f"{self.skipped} steps in a row were not finite",
                where=f"step {step} of {self.run}",
                fix=f"lower optimizer.peak_lr; the last good checkpoint: {good}",
            )

    def lower_micro_batch(self, step: int, tokens: int) -> None:
        """A rank ran out of GPU memory: all of them left the step out, and go on with less."""
        plan = memory.smaller(self.plan, self.config)
        if plan is None:
            raise ForgeError(
                "out of GPU memory with a micro-batch of 1",
                where=f"step {step} of {self.run}",
                fix="train a smaller model, or free the GPU of other programs; --resume goes on",
            )
        self.plan = plan
        self.metrics.log("out_of_memory", step, tokens, self.seconds, **asdict(plan))
        self.say(
            f"step {step}: out of GPU memory, update skipped; on with a micro-batch of "
            f"{plan.micro_batch_size} x {plan.accumulation_steps}"
        )

    def evaluate(self) -> None:
        loss, bits = evaluate(
            self.model, self.data, self.config, self.plan.micro_batch_size, self.ranks
        )
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        self.log("evaluate", loss=loss, bits_per_byte=bits, peak_memory_bytes=peak)
        self.say(
            f"step {self.step}/{self.config.num_steps()}  validation loss {loss:.4f}  "
            f"bits per byte {bits:.4f}"
        )
        if self.ranks.is_first and self.config.evaluate.sample_tokens and self.step:
            text = sample_text(
                self.model, self.data.vocabulary, self.config.evaluate.sample_tokens, self.step
            )
            self.log("sample", text=text)
            self.say("  | " + text.strip().replace("\n", "\n  | "))
        write_readme(self.run, self.config, self.name, self.data.index, self.metrics, self.hardware)

    # -- the run folder

    def resume(self, step: int) -> None:
        state = checkpoint.load_state(self.run, step)
        path = checkpoint.checkpoint_path(self.run, step)
        files = (checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE)
        wanted = (self.optimizer.views(self.optimizer.masters), self.optimizer.state())
        self.optimizer.restore(
            *(checkpoint.load_tensors(path / f, w) for f, w in zip(files, wanted, strict=True))
        )
        self.step, self.seconds_before = state.step, state.seconds
        self.say(f"Resuming from step {step}.")

    def save(self, must: bool) -> None:
        """Save on rank 0. What fails in mid-run is a warning; `must` makes it an error."""
        problem: object = None
        if self.ranks.is_first:
            started = time.perf_counter()
            try:
                checkpoint.save(
                    self.run,
                    self.optimizer.views(self.optimizer.masters),
                    self.optimizer.state(),
                    self.step,
                    self.tokens,
                    self.seconds,
                    self.config.checkpoint.keep_last,
                )
                took = time.perf_counter() - started
                self.log("checkpoint", save_seconds=took)
                self.say(f"step {self.step}: checkpoint saved in {took:.1f} s")
            except OSError as error:
                problem = error
                self.say(f"WARNING: step {self.step}: checkpoint not saved: {error}")
        write_readme(self.run, self.config, self.name, self.data.index, self.metrics, self.hardware)
        if must:
            self.fail_together(problem, "make room and run the same command with --resume")

    def fail_together(self, problem: object, fix: str) -> None:
        """A ForgeError on all ranks if rank 0 has a problem with the run folder."""
        failed = torch.tensor(float(problem is not None), device=self.device)
        if sum_over_ranks(failed, self.ranks).item():
            what = f"cannot write the run folder: {problem or 'rank 0 says why'}"
            raise ForgeError(what, where=self.run, fix=fix)

    def introduce(self) -> None:
        config, plan, index = self.config, self.plan, self.data.index
        epochs = config.num_tokens() / index.total("num_tokens", "train")
        self.say(
            f"{self.name}: {config.model.num_parameters():,} parameters on {self.hardware}\n"
            f"{config.batch.tokens_per_step:,} tokens a step = {plan.micro_batch_size} windows of "
            f"{config.model.context_length} x {plan.accumulation_steps} accumulation steps x "
            f"{self.ranks.world_size} ranks\n"
            f"{config.num_steps():,} steps, {amount(config.num_tokens())} tokens, "
            f"{epochs:.2f} epochs of {index.folder}"
        )


def attention_backends(device: torch.device) -> Any:
    """The fastest attention first: cuDNN's from Hopper on, FlashAttention-2 before."""
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        order.insert(0, SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(order, set_priority=True)


def compile_model(model: GPT2, config: Config, device: torch.device) -> None:
    """Put torch.compile where the config asks for it: the whole trunk, each block, or nowhere."""
    how = config.compile
    if how == "auto":
        how = "full" if device.type == "cuda" else "off"
    if how == "full":
        model.trunk = torch.compile(model.hidden, dynamic=False)
    elif how == "block":
        for block in model.h:
            block.compile(dynamic=False)
