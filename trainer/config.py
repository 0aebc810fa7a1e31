"""What to train: every key of a config, with its bounds and its default, and what follows from it.

Derived numbers are methods, so that no two numbers can disagree.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from sys import float_info
from typing import Annotated, Any, Literal

from pipeline.shards import VOCAB_SIZE


@dataclass(frozen=True)
class Bounds:
    """The values that a number may have; `above` leaves `low` itself out."""

    low: float
    high: float = float_info.max
    above: bool = False

    def check(self, value: float) -> None:
        """TypeError that says what is allowed."""
        if not (self.low < value if self.above else self.low <= value) or value > self.high:
            least = f"more than {self.low:g}" if self.above else f"at least {self.low:g}"
            most = "" if self.high == float_info.max else f" and at most {self.high:,}"
            noun = "a whole number" if isinstance(value, int) else "a number"
            raise TypeError(f"{noun} of {least}{most}")


Count = Annotated[int, Bounds(1, 2**53)]  # up to there a float tells a number from the next
CountOrZero = Annotated[int, Bounds(0, 2**53)]
Positive = Annotated[float, Bounds(0, above=True)]
NotNegative = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
Beta = Annotated[float, Bounds(0, math.nextafter(1, 0))]


@dataclass(frozen=True)
class ModelConfig:
    num_layers: Count
    num_heads: Count
    embedding_size: Count
    family: Literal["gpt2", "qwen3"] = "gpt2"
    context_length: Count = 1024
    vocab_size: Annotated[int, Bounds(1, 2**16)] = VOCAB_SIZE  # token ids are 16 bits
    bias: bool = True  # GPT-2 has biases in every linear layer and LayerNorm; qwen3 has none
    # Only for qwen3; head_dim(), kv_heads() and mlp_dim() say what holds where they are absent.
    num_kv_heads: Count | None = None  # heads of keys and values, shared by groups of num_heads
    head_size: Count | None = None
    mlp_size: Count | None = None
    rope_theta: Positive = 10_000.0  # base of the rotary positions' frequencies

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

    def sizes(self) -> dict[str, Any]:
        """Every key with what holds where it is absent: two models of the same sizes are one."""
        derived = {"num_kv_heads": self.kv_heads(), "head_size": self.head_dim()}
        return dataclasses.asdict(self) | derived | {"mlp_size": self.mlp_dim()}

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
    tokens_per_step: Count
    micro_batch_size: Literal["auto"] | Count = "auto"  # windows a rank takes through one forward


@dataclass(frozen=True)
class OptimizerConfig:
    peak_lr: Positive
    name: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, AdamW for the rest
    muon_lr: Positive = 0.02  # Muon's rate where AdamW's is peak_lr; the schedule moves both alike
    # Muon's, by its own rate; weight_decay is AdamW's, by peak_lr. This is for a day's steps: the
    # best one is proportional to tokens_per_step, and falls with the length of a run (Bergsma et
    # al. 2025, arXiv:2505.13738, of AdamW; Muon in minutes: tests/benchmarks/README.md).
    muon_weight_decay: NotNegative = 0.02
    muon_normalize: bool = True  # every neuron's part of Muon's updates alike (NorMuon)
    muon_warmup_steps: CountOrZero = 0  # in which Muon's momentum rises from 0.85 to 0.95
    weight_decay: NotNegative = 0.1
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    max_norm: Positive = 1.0  # gradients are clipped to this norm

    def describe(self) -> str:
        """For people: who updates what, and its highest rate."""
        adamw = f"AdamW at {self.peak_lr:g}"
        if self.name == "adamw":
            return adamw
        muon = "NorMuon" if self.muon_normalize else "Muon"
        return f"{muon} at {self.muon_lr:g} for the blocks' matrices, {adamw} for the rest"


@dataclass(frozen=True)
class ScheduleConfig:
    warmup_steps: CountOrZero
    max_steps: Count | None = None  # whichever of the three ends first
    max_tokens: Count | None = None
    budget_hours: Positive | None = None  # of wall clock, last evaluation and checkpoint included
    shape: Literal["auto", "cosine", "wsd"] = "auto"  # auto: wsd with budget_hours, else cosine
    final_lr_fraction: Share = 0.1  # of peak_lr, where the cosine ends
    # Of all steps: wsd falls to zero over these last ones.
    decay_fraction: Annotated[float, Bounds(0, 1, above=True)] = 0.2


@dataclass(frozen=True)
class EvaluateConfig:
    every_steps: Count = 250
    num_tokens: Count = 1_048_576  # of the val split, always the same ones
    sample_tokens: CountOrZero = 64  # length of the text sampled at each evaluation; 0 for none


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: Count = 1000
    keep_last: Count = 2
    keep_every_hours: Positive = 6.0  # besides: one for so many hours of training


@dataclass(frozen=True)
class GuardConfig:
    max_skipped_steps: Count = 10  # skipped steps in a row before the run stops
    # Longest wait for another rank; torch counts it in milliseconds.
    timeout_seconds: Annotated[float, Bounds(0, 1_000_000, above=True)] = 300.0


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
    seed: Annotated[int, Bounds(0, 2**63 - 1)] = 1337
    # auto: full on a GPU, off on a CPU. block starts sooner: it compiles one block, for all. Where
    # fused.py's kernels run (qwen3 in bfloat16, Triton), nothing is compiled.
    compile: Literal["auto", "full", "block", "off"] = "auto"
    # Of the weights that the model computes with; auto: bfloat16, or float32 on a CPU and on GPUs
    # before Ampere. Masters, moments and sums are float32 whatever it is.
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    reduce_precision: Literal["bfloat16", "float32"] = "float32"  # gradients between GPUs

    def windows_per_step(self) -> int:
        return self.batch.tokens_per_step // self.model.context_length

    def num_steps(self) -> int | None:
        """Steps after which the run ends at the latest; None where the clock alone decides."""
        limits = []
        if self.schedule.max_steps is not None:
            limits.append(self.schedule.max_steps)
        if self.schedule.max_tokens is not None:
            limits.append(-(-self.schedule.max_tokens // self.batch.tokens_per_step))
        return min(limits) if limits else None

    def num_tokens(self) -> int | None:
        steps = self.num_steps()
        return None if steps is None else steps * self.batch.tokens_per_step

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
