"""What to train: frozen dataclasses <- configs/*.toml + --set.

Before: the user, who edits a TOML file. After: every other file of the trainer.

Absent keys mean their defaults, unknown keys are refused, and all problems are reported together.
Derived numbers are methods, so that no two numbers can disagree.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from bisect import bisect_left
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from sys import float_info
from typing import Any, Literal

from pipeline.errors import ForgeError
from pipeline.shards import VOCAB_SIZE

MOST_TIMEOUT_SECONDS = 1_000_000  # of a collective; torch counts them in milliseconds
# Keys that earlier versions had, with their defaults: ignored at these, and refused otherwise.
REMOVED = {
    "guard.spike_zscore": None,
    "guard.spike_window_steps": 128,
}
MOST = 2**53  # of what is counted: up to there a float tells a number from the next


@dataclass(frozen=True)
class ModelConfig:
    num_layers: int
    num_heads: int
    embedding_size: int
    family: Literal["gpt2", "qwen3"] = "gpt2"
    context_length: int = 1024
    vocab_size: int = VOCAB_SIZE
    bias: bool = True  # GPT-2 has biases in every linear layer and LayerNorm; qwen3 has none
    # Only for qwen3; head_dim(), kv_heads() and mlp_dim() say what holds where they are absent.
    num_kv_heads: int | None = None  # heads of keys and values, shared by groups of num_heads
    head_size: int | None = None
    mlp_size: int | None = None
    rope_theta: float = 10_000.0  # base of the rotary positions' frequencies

    def head_dim(self) -> int:
        return self.head_size or self.embedding_size // self.num_heads

    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def mlp_dim(self) -> int:
        """Channels inside the MLP. A gated one has three matrices where GPT-2's has two: 8/3 of
        the embedding instead of 4 make as many weights, rounded up to what a GPU likes."""
        usual = 4 * self.embedding_size
        gated = math.ceil(8 * self.embedding_size / 3 / 128) * 128
        return self.mlp_size or (gated if self.family == "qwen3" else usual)

    def layer_weights(self) -> int:
        """Numbers in the matrices of one block; with GPT-2's proportions 12 C^2."""
        c, wide, narrow = self.embedding_size, self.num_heads, self.kv_heads()
        attention = 2 * c * (wide + narrow) * self.head_dim()
        return attention + (3 if self.family == "qwen3" else 2) * c * self.mlp_dim()

    def num_parameters(self) -> int:
        """Trainable numbers, the tied head counted once."""
        c, per_bias = self.embedding_size, int(self.bias)
        if self.family == "qwen3":
            block = self.layer_weights() + 2 * c + 2 * self.head_dim()
            return self.vocab_size * c + self.num_layers * block + c
        block = self.layer_weights() + 2 * c + per_bias * (9 * c + 2 * c)
        embeddings = (self.vocab_size + self.context_length) * c
        return embeddings + self.num_layers * block + c + per_bias * c

    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward for one token.

        6 for each weight of a matrix multiplication (2 forward, 4 backward; the head counts, the
        embedding look-ups do not) and 12*L*H*D*T for attention's two products over the full,
        unmasked square: the convention of PaLM (Chowdhery et al. 2022, appendix B) and nanoGPT.
        """
        weights = self.num_layers * self.layer_weights() + self.vocab_size * self.embedding_size
        width = self.num_heads * self.head_dim()
        return 6 * weights + 12 * self.num_layers * width * self.context_length


@dataclass(frozen=True)
class BatchConfig:
    tokens_per_step: int
    micro_batch_size: Literal["auto"] | int = "auto"  # windows a rank takes through one forward
    # Batch warm-up: the first steps have 2**doublings times fewer tokens, and after each
    # doubling_steps twice as many, up to tokens_per_step. torch.compile, where it is used, runs
    # again for each size that a micro-batch must shrink to.
    doublings: int = 0
    doubling_steps: int = 100


@dataclass(frozen=True)
class OptimizerConfig:
    peak_lr: float
    name: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, AdamW for the rest
    muon_lr: float = 0.02  # Muon's rate where AdamW's is peak_lr; the schedule moves both alike
    # Muon's, by its own rate; weight_decay is AdamW's, by peak_lr. This is for a day's steps: what
    # is best is proportional to tokens_per_step, and falls with the length of a run (Bergsma et al.
    # 2025, arXiv:2505.13738, of AdamW; Muon in minutes: tests/benchmarks/README.md).
    muon_weight_decay: float = 0.02
    muon_normalize: bool = True  # every neuron's part of Muon's updates alike (NorMuon)
    muon_warmup_steps: int = 0  # in which Muon's momentum rises from 0.85 to 0.95
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_norm: float = 1.0  # gradients are clipped to this norm

    def describe(self) -> str:
        """For people: who updates what, and its highest rate."""
        adamw = f"AdamW at {self.peak_lr:g}"
        if self.name == "adamw":
            return adamw
        muon = "NorMuon" if self.muon_normalize else "Muon"
        return f"{muon} at {self.muon_lr:g} for the blocks' matrices, {adamw} for the rest"


@dataclass(frozen=True)
class ScheduleConfig:
    warmup_steps: int
    max_steps: int | None = None  # whichever of the three ends first
    max_tokens: int | None = None
    budget_hours: float | None = None  # of wall clock, last evaluation and checkpoint included
    count_downtime: bool = False  # whether hours between two starts count, too
    shape: Literal["auto", "cosine", "wsd"] = "auto"  # auto: wsd with budget_hours, else cosine
    final_lr_fraction: float = 0.1  # of peak_lr, where the cosine ends
    decay_fraction: float = 0.2  # of all steps: wsd falls to zero over these last ones


@dataclass(frozen=True)
class EvaluateConfig:
    every_steps: int = 250
    num_tokens: int = 1_048_576  # of the val split, always the same ones
    sample_tokens: int = 64  # length of the text sampled at each evaluation; 0 for none


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep_last: int = 2
    keep_every_hours: float = 6.0  # besides: one for so many hours of training


@dataclass(frozen=True)
class GuardConfig:
    max_skipped_steps: int = 10  # skipped steps in a row before the run stops
    timeout_seconds: float = 300.0  # longest wait for another rank


@dataclass(frozen=True)
class StepSizes:
    """How many windows each step takes, over all ranks; steps count from 0."""

    windows: int  # in the end
    doublings: int = 0
    doubling_steps: int = 1

    def of(self, step: int) -> int:
        """Windows of one step."""
        return self.windows >> max(0, self.doublings - step // self.doubling_steps)

    def cut(self, step: int, world_size: int, micro_batch_size: int) -> tuple[int, int]:
        """(accumulation steps, windows in each) of a rank's share of one step.

        A full step's micro-batch divides it; of a smaller one the largest that does is taken.
        """
        share = self.of(step) // world_size
        size = next(n for n in range(min(share, micro_batch_size), 0, -1) if share % n == 0)
        return share // size, size

    def before(self, step: int) -> int:
        """Windows of all the steps before it: where in the endless order it begins."""
        total, left = 0, step
        for halvings in range(self.doublings, 0, -1):
            steps = min(left, self.doubling_steps)
            total += steps * (self.windows >> halvings)
            left -= steps
        return total + left * self.windows

    def steps(self, step: int, windows: float) -> float:
        """How many steps, from this one on, so many windows make."""
        at = step
        while at < self.doublings * self.doubling_steps:
            doubles_at = (at // self.doubling_steps + 1) * self.doubling_steps
            until_then = (doubles_at - at) * self.of(at)
            if windows <= until_then:
                return at - step + windows / self.of(at)
            at, windows = doubles_at, windows - until_then
        return at - step + windows / self.windows


@dataclass(frozen=True)
class Config:
    """One run. Sections are the TOML file's tables."""

    model: ModelConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    seed: int = 1337
    # auto: full on a GPU, off on a CPU. block starts sooner: it compiles one block, for all. Where
    # fused.py's kernels run (half precision, Triton), Qwen3 is never compiled, GPT-2 only by full.
    compile: Literal["auto", "full", "block", "off"] = "auto"
    # Of the weights that the model computes with; auto: bfloat16, or float32 on a CPU and
    # on GPUs before Ampere. Masters, moments and sums are float32 whatever it is.
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    reduce_precision: Literal["bfloat16", "float32"] = "float32"  # gradients between GPUs

    def windows_per_step(self) -> int:
        return self.batch.tokens_per_step // self.model.context_length

    def step_sizes(self) -> StepSizes:
        batch = self.batch
        return StepSizes(self.windows_per_step(), batch.doublings, batch.doubling_steps)

    def tokens_after(self, steps: int) -> int:
        """Tokens that so many steps have trained on."""
        return self.step_sizes().before(steps) * self.model.context_length

    def num_steps(self) -> int | None:
        """Steps after which the run ends at the latest; None where the clock alone decides."""
        limits = []
        if self.schedule.max_steps is not None:
            limits.append(self.schedule.max_steps)
        if self.schedule.max_tokens is not None:
            small = self.batch.doublings * self.batch.doubling_steps
            most = small + math.ceil(self.schedule.max_tokens / self.batch.tokens_per_step)
            limits.append(bisect_left(range(most), self.schedule.max_tokens, key=self.tokens_after))
        return min(limits) if limits else None

    def num_tokens(self) -> int | None:
        steps = self.num_steps()
        return None if steps is None else self.tokens_after(steps)

    def shape(self) -> Literal["cosine", "wsd"]:
        """How the learning rate goes after the warm-up: a cosine, or stable and then down."""
        if self.schedule.shape != "auto":
            return self.schedule.shape
        return "cosine" if self.schedule.budget_hours is None else "wsd"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, absent ones left out: what from_dict() takes."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items() if v is not None}
            return list(value) if isinstance(value, tuple) else value

        result: dict[str, Any] = plain(dataclasses.asdict(self))
        return result

    def to_toml(self) -> str:
        """The resolved config as a TOML file that load() reads back to an equal Config."""
        values = self.to_dict()
        lines = [f"{k} = {_toml(v)}" for k, v in values.items() if not isinstance(v, dict)]
        for section, keys in values.items():
            if isinstance(keys, dict):
                lines += ["", f"[{section}]", *(f"{k} = {_toml(v)}" for k, v in keys.items())]
        return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def differences(before: Config, after: Config) -> list[str]:
    """What is another in `after`, a line each."""
    flat = []
    for values in (before.to_dict(), after.to_dict()):
        parts = {k: v if isinstance(v, dict) else {"": v} for k, v in values.items()}
        flat.append(
            {f"{s}.{k}".strip("."): v for s, keys in parts.items() for k, v in keys.items()}
        )
    old, new = flat
    return [
        f"{key}: {old.get(key, 'none')} -> {new.get(key, 'none')}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def available() -> list[str]:
    """Names of the configs that come with the program, smallest model first."""
    named = [f for f in files("configs").iterdir() if f.name.endswith(".toml")]
    tables = {f.name[:-5]: tomllib.loads(f.read_text(encoding="utf-8"))["model"] for f in named}
    return sorted(tables, key=lambda n: tables[n]["num_layers"] * tables[n]["embedding_size"] ** 2)


def load(name: str, settings: tuple[str, ...] = ()) -> Config:
    """Config by name (from configs/, whatever the working directory) or by path.

    `settings` are `section.key=value` strings, the value in TOML's notation, quotes optional.
    Raises ForgeError that lists every problem.
    """
    if name.endswith(".toml") or "/" in name:
        path: Any = Path(name)
        if not path.is_file():
            raise ForgeError(
                "no such config file", where=name, fix=f"or name one of: {', '.join(available())}"
            )
    else:
        path = files("configs") / f"{name}.toml"
        if not path.is_file():
            known = ", ".join(available())
            close = difflib.get_close_matches(name, available(), 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ForgeError(
                "no such config", where=name, fix=f"{hint}there are: {known}; or give a .toml path"
            )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ForgeError(
            f"cannot read the config: {error}",
            where=name,
            fix="correct it, or give the name of a config",
        ) from error
    for setting in settings:
        _apply(values, setting)
    return from_dict(values, name)


def _apply(values: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals:
        raise ForgeError(
            "--set takes key=value", where=setting, fix="such as --set optimizer.peak_lr=3e-4"
        )
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {"value": text}  # a bare word is a string
    value = parsed.pop("value")
    if parsed or isinstance(value, dict):
        raise ForgeError(
            "--set takes one value",
            where=f"--set {setting}",
            fix="give each key a --set of its own: section.key=value",
        )
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ForgeError(
                f"{section} is no section", where=f"--set {setting}", fix="write section.key=value"
            )
    values[last] = value


def from_dict(values: dict[str, Any], where: str) -> Config:
    """Build and check a Config; ForgeError lists every problem at once."""
    problems: list[str] = []
    config = _build(Config, values, "", problems)
    if not problems:
        problems = _check(config)
    if problems:
        raise ForgeError(
            f"the config has {len(problems)} problem{'s' * (len(problems) > 1)}:\n    "
            + "\n    ".join(problems),
            where=where,
            fix="edit the file, or --set section.key=value",
        )
    result: Config = config
    return result


def names_in(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _build(cls: Any, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if prefix + key in REMOVED:
            if values[key] != REMOVED[prefix + key]:
                problems.append(f"{prefix}{key} was removed: delete its line")
        elif key not in fields:
            close = [prefix + name for name in difflib.get_close_matches(key, fields, 1)]
            close += [f"{section}.{key}" for section in fields if key in names_in(hints[section])]
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
            problems.append(f"{prefix}{key} does not exist; {hint}")
    built = {}
    for key, each in fields.items():
        kind, name = hints[key], prefix + key
        required = each.default is dataclasses.MISSING and (
            each.default_factory is dataclasses.MISSING
        )
        if key not in values:
            if required and not dataclasses.is_dataclass(kind):
                problems.append(f"{name} is missing")
            elif required:
                _build(kind, {}, f"{name}.", problems)
        elif dataclasses.is_dataclass(kind):
            if isinstance(values[key], dict):
                built[key] = _build(kind, values[key], f"{name}.", problems)
            else:
                problems.append(f"{name} must be a table [{name}], not {values[key]!r}")
        else:
            try:
                built[key] = _convert(values[key], kind)
            except TypeError as error:
                problems.append(f"{name} must be {error}, not {values[key]!r}")
    return None if problems else cls(**built)


def _convert(value: Any, kind: Any) -> Any:
    """`value` as `kind`; TypeError that describes the kind when it is none."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in args and isinstance(value, str):
            return value
        raise TypeError(" or ".join(f'"{arg}"' for arg in args))
    if origin in (types.UnionType, typing.Union):
        wanted = []
        for arg in args:
            if arg is not type(None):
                try:
                    return _convert(value, arg)
                except TypeError as error:
                    wanted.append(str(error))
        raise TypeError(" or ".join(wanted))
    if origin is tuple:
        if isinstance(value, list) and len(value) == len(args):
            return tuple(_convert(v, arg) for v, arg in zip(value, args, strict=True))
        raise TypeError(f"a list of {len(args)} numbers")
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise TypeError({bool: "true or false", int: "a whole number", float: "a number"}[kind])


def _check(config: Config) -> list[str]:
    """What is wrong with values of the right type."""
    model, batch, schedule = config.model, config.batch, config.schedule
    problems = []
    positive = {
        "model.num_layers": model.num_layers,
        "model.num_heads": model.num_heads,
        "model.embedding_size": model.embedding_size,
        "model.context_length": model.context_length,
        "model.num_kv_heads": model.num_kv_heads,
        "model.head_size": model.head_size,
        "model.mlp_size": model.mlp_size,
        "model.rope_theta": model.rope_theta,
        "batch.tokens_per_step": batch.tokens_per_step,
        "batch.doubling_steps": batch.doubling_steps,
        "optimizer.peak_lr": config.optimizer.peak_lr,
        "optimizer.muon_lr": config.optimizer.muon_lr,
        "optimizer.max_norm": config.optimizer.max_norm,
        "evaluate.every_steps": config.evaluate.every_steps,
        "evaluate.num_tokens": config.evaluate.num_tokens,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "checkpoint.keep_every_hours": config.checkpoint.keep_every_hours,
        "guard.max_skipped_steps": config.guard.max_skipped_steps,
        "guard.timeout_seconds": config.guard.timeout_seconds,
        "schedule.budget_hours": schedule.budget_hours,
        "schedule.max_steps": schedule.max_steps,
        "schedule.max_tokens": schedule.max_tokens,
        "batch.micro_batch_size": 1 if batch.micro_batch_size == "auto" else batch.micro_batch_size,
    }
    for name, value in positive.items():
        most = MOST if isinstance(value, int) else float_info.max
        if value is not None and not 0 < value <= most:
            limit = f" and at most {most:.9g}" if value > 0 else ""
            problems.append(f"{name} must be more than 0{limit}, not {value}")
    if problems:
        return problems
    problems += _check_family(model)
    if not 0 < model.vocab_size <= 2**16:
        problems.append(f"model.vocab_size must fit 16 bits, not {model.vocab_size}")
    if not 0 <= batch.doublings < 7:  # the compiler keeps up to 8 graphs
        return [*problems, f"batch.doublings must be from 0 to 6, not {batch.doublings}"]
    if config.windows_per_step() % 2**batch.doublings:
        problems.append(
            f"batch.tokens_per_step ({batch.tokens_per_step}) must be a multiple of "
            f"{2**batch.doublings} windows, to be halved batch.doublings times"
        )
    for name, tokens in (
        ("batch.tokens_per_step", batch.tokens_per_step),
        ("evaluate.num_tokens", config.evaluate.num_tokens),
    ):
        if tokens % model.context_length:
            problems.append(
                f"{name} ({tokens}) must be a multiple of model.context_length "
                f"({model.context_length})"
            )
    if config.num_steps() is None and schedule.budget_hours is None:
        problems.append(
            "schedule.max_steps, schedule.max_tokens or schedule.budget_hours must say when to end"
        )
    if schedule.budget_hours is not None and config.shape() == "cosine":
        problems.append('schedule.shape = "cosine" cannot follow the clock: leave out budget_hours')
    if schedule.warmup_steps < 0 or not 0 <= schedule.final_lr_fraction <= 1:
        problems.append("schedule.warmup_steps must be >= 0 and final_lr_fraction between 0 and 1")
    if not 0 < schedule.decay_fraction <= 1:
        problems.append("schedule.decay_fraction must be more than 0 and at most 1")
    if not 0 <= config.seed < 2**63:
        problems.append(f"seed must be from 0 to 2**63 - 1, not {config.seed}")
    for name in ("weight_decay", "muon_weight_decay"):
        if not 0 <= getattr(config.optimizer, name) < math.inf:
            problems.append(f"optimizer.{name} must be >= 0")
    if config.guard.timeout_seconds > MOST_TIMEOUT_SECONDS:
        problems.append(f"guard.timeout_seconds must be at most {MOST_TIMEOUT_SECONDS:,}")
    if not all(0 <= b < 1 for b in config.optimizer.betas):
        problems.append("optimizer.betas must each be in [0, 1)")
    if config.optimizer.muon_warmup_steps < 0:
        problems.append("optimizer.muon_warmup_steps must be >= 0")
    if config.evaluate.sample_tokens < 0:
        problems.append("evaluate.sample_tokens must be >= 0")
    return problems


def _check_family(model: ModelConfig) -> list[str]:
    """What does not fit the family of the model."""
    problems = []
    if model.head_size is None and model.embedding_size % model.num_heads:
        problems.append(
            f"model.embedding_size ({model.embedding_size}) must be a multiple of model.num_heads "
            f"({model.num_heads})"
        )
    if model.family == "gpt2":
        for name in ("num_kv_heads", "head_size", "mlp_size", "rope_theta"):
            if getattr(model, name) != getattr(ModelConfig, name):
                problems.append(f'model.{name} is only for model.family = "qwen3"')
        return problems
    if model.bias:
        problems.append('model.bias must be false: model.family = "qwen3" has no biases')
    if model.num_heads % model.kv_heads():
        problems.append(
            f"model.num_heads ({model.num_heads}) must be a multiple of model.num_kv_heads "
            f"({model.num_kv_heads})"
        )
    if model.head_dim() % 2:
        problems.append(f"a head's size must be even to be rotated, not {model.head_dim()}")
    return problems
