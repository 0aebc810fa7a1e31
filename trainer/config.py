"""Every key of a config with its bounds and its default; numbers that follow are methods."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool, with_config

from pipeline.shards import VOCAB_SIZE

KNOWN_KEYS = ConfigDict(extra="forbid", allow_inf_nan=False)  # for pydantic: config_file.py
Count = Annotated[int, Field(strict=True, ge=1, le=2**53)]  # floats are exact up to here
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Positive = Annotated[float, Field(strict=True, gt=0)]
NotNegative = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]
ENDS = ("max_steps", "max_tokens", "max_epochs", "budget_hours")  # of the schedule


def indivisible(names: tuple[str, str], value: int, divisor: int) -> list[str]:
    """The problem that `value` is not a multiple of `divisor`, if so."""
    problem = f"{names[0]} ({value}) must be a multiple of {names[1]} ({divisor})"
    return [problem] if value % divisor else []


@with_config(KNOWN_KEYS)
@dataclass(frozen=True)
class ModelConfig:
    num_layers: Count
    num_heads: Count
    embedding_size: Count
    family: Literal["gpt2", "qwen3"] = "gpt2"
    context_length: Count = 1024
    vocab_size: Annotated[int, Field(strict=True, ge=1, le=2**16)] = (
        VOCAB_SIZE  # token ids are 16 bits
    )
    bias: StrictBool = True  # GPT-2 has biases in every linear layer and LayerNorm; qwen3 has none
    # Only for qwen3; head_dim(), kv_heads() and mlp_dim() give their defaults.
    num_kv_heads: Count | None = None  # heads of keys and values, each for a group of num_heads
    head_size: Count | None = None
    mlp_size: Count | None = None
    rope_theta: Positive = 10_000.0  # base of the rotary positions' frequencies

    def head_dim(self) -> int:
        return self.head_size or self.embedding_size // self.num_heads

    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def mlp_dim(self) -> int:
        """Channels inside the MLP. A gated one has three matrices, GPT-2's has two: with 8/3 of
        the embedding for 4 both have equally many weights. Rounded up to a multiple of 128."""
        gated = math.ceil(8 * self.embedding_size / 3 / 128) * 128
        return self.mlp_size or (gated if self.family == "qwen3" else 4 * self.embedding_size)

    def sizes(self) -> dict[str, Any]:
        """Every key, defaults filled in: two models of equal sizes are the same model."""
        derived = {"num_kv_heads": self.kv_heads(), "head_size": self.head_dim()}
        return dataclasses.asdict(self) | derived | {"mlp_size": self.mlp_dim()}

    def conflicts(self) -> list[str]:
        """Problems of keys that do not fit together."""
        problems = []
        if self.head_size is None:
            names = "model.embedding_size", "model.num_heads"
            problems += indivisible(names, self.embedding_size, self.num_heads)
        if self.family == "gpt2":
            for name in ("num_kv_heads", "head_size", "mlp_size", "rope_theta"):
                if getattr(self, name) != getattr(ModelConfig, name):
                    problems.append(f'model.{name} is only for model.family = "qwen3"')
            return problems
        if self.bias:
            problems.append('model.bias must be false: model.family = "qwen3" has no biases')
        names = "model.num_heads", "model.num_kv_heads"
        problems += indivisible(names, self.num_heads, self.kv_heads())
        if self.head_dim() % 2:
            problems.append(f"a head's size must be even to be rotated, not {self.head_dim()}")
        return problems

    def layer_weights(self) -> int:
        """Numbers in the matrices of one block; with GPT-2's proportions 12 C^2."""
        c, wide, narrow = self.embedding_size, self.num_heads, self.kv_heads()
        attention = 2 * c * (wide + narrow) * self.head_dim()
        return attention + (3 if self.family == "qwen3" else 2) * c * self.mlp_dim()

    def num_parameters(self) -> int:
        """Trainable numbers, the tied head counted once."""
        c, layers = self.embedding_size, self.num_layers
        weights = self.vocab_size * c + layers * self.layer_weights()
        gains = (2 * layers + 1) * c
        if self.family == "qwen3":
            return weights + gains + 2 * layers * self.head_dim()
        biases = (11 * layers + 1) * c if self.bias else 0
        return weights + gains + biases + self.context_length * c

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
    tokens_per_step: Count
    micro_batch_size: Literal["auto"] | Count = "auto"  # windows in one forward of a rank


@dataclass(frozen=True)
class OptimizerConfig:
    peak_lr: Positive
    # muon: NorMuon for the blocks' matrices, AdamW for the rest.
    name: Literal["adamw", "muon"] = "adamw"
    muon_lr: Positive = 0.02  # Muon's peak rate; the schedule scales it like peak_lr, AdamW's
    # Times Muon's own rate; weight_decay is AdamW's, times peak_lr. This is for a day's steps: the
    # best one is proportional to tokens_per_step, and falls with the length of a run (Bergsma et
    # al. 2025, arXiv:2505.13738, of AdamW; Muon in minutes: tests/benchmarks/README.md).
    muon_weight_decay: NotNegative = 0.02
    muon_warmup_steps: CountOrZero = 0  # Muon's momentum rises from 0.85 to 0.95
    weight_decay: NotNegative = 0.1
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    max_norm: Positive = 1.0  # gradients are clipped to this norm

    def describe(self) -> str:
        """For people: each rule and its peak rate."""
        adamw = f"AdamW at {self.peak_lr:g}"
        if self.name == "adamw":
            return adamw
        return f"NorMuon at {self.muon_lr:g} for the blocks' matrices, {adamw} for the rest"


@dataclass(frozen=True)
class ScheduleConfig:
    warmup_steps: CountOrZero
    max_steps: Count | None = None  # the run ends at the first of these
    max_tokens: Count | None = None
    # Of the shards.
    max_epochs: Annotated[float, Field(strict=True, gt=0, le=1_000_000)] | None = None
    budget_hours: Positive | None = None  # wall clock, with the last evaluation and checkpoint
    shape: Literal["auto", "cosine", "wsd"] = "auto"  # auto: wsd with budget_hours, else cosine
    final_lr_fraction: Share = 0.1  # of peak_lr, where the cosine ends
    # Of all steps: the last ones, over which wsd falls to zero.
    decay_fraction: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.2


@dataclass(frozen=True)
class EvaluateConfig:
    every_steps: Count = 250
    num_tokens: Count = 1_048_576  # of the val split, always the same
    sample_tokens: CountOrZero = 64  # of the text sampled at each evaluation


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: Count = 1000
    keep_last: Count = 2  # besides the newest, which nothing has shown to be good yet


@dataclass(frozen=True)
class GuardConfig:
    max_skipped_steps: Count = 10  # in a row; then the run stops
    # Longest wait in a collective, rank 0's checkpoints included; torch counts milliseconds.
    timeout_seconds: Annotated[float, Field(strict=True, gt=0, le=1_000_000)] = 300.0


@dataclass(frozen=True)
class ReportConfig:
    to: Literal["wandb", "trackio"] | None = None  # where figures are sent, besides the run folder


@with_config(KNOWN_KEYS)  # and all sections
@dataclass(frozen=True)
class Config:
    """One run. Sections are the TOML file's tables."""

    model: ModelConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    evaluate: EvaluateConfig
    checkpoint: CheckpointConfig
    guard: GuardConfig
    report: ReportConfig
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 1337
    # auto: full on a GPU, off on a CPU. Nothing is compiled where fused.py's kernels run (qwen3 in
    # bfloat16, Triton).
    compile: Literal["auto", "full", "off"] = "auto"
    # Of the weights that the model computes with; auto: bfloat16, or float32 on a CPU and on GPUs
    # before Ampere. Masters, moments and sums are always float32. int8 is bfloat16 with the blocks'
    # linear layers by 8-bit integers (int8.py); auto takes it where that measures 10 % faster.
    precision: Literal["auto", "int8", "bfloat16", "float32"] = "auto"
    reduce_precision: Literal["bfloat16", "float32"] = "float32"  # gradients between GPUs

    def conflicts(self) -> list[str]:
        """Problems of keys that do not fit together."""
        problems = self.model.conflicts()
        for name, tokens in (
            ("batch.tokens_per_step", self.batch.tokens_per_step),
            ("evaluate.num_tokens", self.evaluate.num_tokens),
        ):
            names = name, "model.context_length"
            problems += indivisible(names, tokens, self.model.context_length)
        budget_hours = self.schedule.budget_hours
        if not any(getattr(self.schedule, name) for name in ENDS):
            keys = ", ".join(f"schedule.{name}" for name in ENDS)
            problems.append(f"one of {keys} must say when to end")
        if budget_hours is not None and self.shape() == "cosine":
            problems.append('schedule.shape = "cosine" is not for schedule.budget_hours: use "wsd"')
        return problems

    def windows_per_step(self) -> int:
        return self.batch.tokens_per_step // self.model.context_length

    def num_steps(self) -> int | None:
        """Steps of the run at most; None if only the clock ends it.

        max_epochs counts once the data is known: windows.for_data().
        """
        max_steps, max_tokens = self.schedule.max_steps, self.schedule.max_tokens
        by_tokens = max_tokens and -(-max_tokens // self.batch.tokens_per_step)
        return min((limit for limit in (max_steps, by_tokens) if limit), default=None)

    def num_tokens(self) -> int | None:
        steps = self.num_steps()
        return None if steps is None else steps * self.batch.tokens_per_step

    def shape(self) -> Literal["cosine", "wsd"]:
        """The learning rate after the warm-up: a cosine, or stable and then down (wsd)."""
        if self.schedule.shape != "auto":
            return self.schedule.shape
        return "cosine" if self.schedule.budget_hours is None else "wsd"
