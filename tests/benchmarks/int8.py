"""What 8-bit integers are worth on a card that is not here: its kernels, and a model of a step.

    python -m tests.benchmarks.int8                 needs no GPU
    python -m tests.benchmarks.train_speed --arms bf16,int8 --configs forge_350m    measures a card

First each kernel of trainer/int8.py as compiled for an RTX 4090 (compute capability 8.9): registers
a thread, bytes spilled, shared memory. Then the microseconds of a token. Products, integers and
attention reach a share of the card's published peak, and all else moves bytes. On the H200 the
shares were found in profiles and are held against measured runs. On the RTX 4090 the share of
products is what llm.c's published speed asks for, that of integers the H200's, that of attention is
a guess.
"""

import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trainer import config_file, int8, kernels
from trainer.config import Config

SHARED_BYTES = 99 * 1024  # that a program may have on an RTX 4090
TYPES = {"x": "*bf16", "out": "*bf16", "tops": "*fp32", "a": "*i8", "b": "*i8", "by": "*i8"}


class Card(NamedTuple):
    name: str
    bf16: float  # FLOP/s, published, dense, with float32 sums
    int8: float
    memory: float  # bytes/s
    product_share: float
    integer_share: float
    attention_share: float
    memory_share: float


class Measured(NamedTuple):
    """tokens/s on one card: by forge-train on an H200, by llm.c on one of two RTX 4090s."""

    card: Card
    config: str
    tokens_per_step: int
    precision: str
    speed: float


H200 = Card("H200", 989e12, 1979e12, 4.8e12, 0.66, 0.45, 0.33, 0.8)
RTX_4090 = Card("RTX 4090", 165e12, 660e12, 1.008e12, 0.64, 0.45, 0.5, 0.9)
MEASURED = [
    Measured(H200, "forge_124m", 65_536, "bfloat16", 558_245),
    Measured(H200, "forge_124m", 65_536, "int8", 531_420),
    Measured(H200, "forge_350m", 131_072, "bfloat16", 210_700),
    Measured(H200, "forge_350m", 131_072, "int8", 218_717),
    Measured(RTX_4090, "gpt2", 524_288, "bfloat16", 221_000 / 2),
]


def compiled(kernel: Any, values: dict[str, int], warps: int, capability: int) -> str:
    """Registers, spilled bytes and shared memory of a kernel, by cuobjdump."""
    names = kernel.arg_names
    signature = {
        name: "constexpr"
        if name in values
        else TYPES.get(name) or TYPES.get(name.split("_")[-1]) or TYPES.get(name[:2], "i32")
        for name in names
    }
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if name.islower()}
    source = ASTSource(kernel, signature, values, aligned)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(field.split(":")[:2] for field in said.split() if field.count(":") == 1)
    shared = made.metadata.shared
    assert shared <= SHARED_BYTES
    return f"{usage['REG']:>9}{usage['STACK']:>15}{shared:>14,}"


def microseconds(card: Card, config: Config, precision: str) -> float:
    """Of a token in training."""
    model, layers = config.model, config.model.num_layers
    C, inside = model.embedding_size, model.mlp_dim()
    queries, keys = (n * model.head_dim() for n in (model.num_heads, model.kv_heads()))
    gates = 2 if model.family == "qwen3" else 1
    # (inputs, outputs) of a block's linear layers
    shapes = [(C, queries + 2 * keys), (queries, C), (C, gates * inside), (inside, C)]
    linear = layers * sum(6 * a * b for a, b in shapes)
    head = 6 * C * model.vocab_size
    attention = layers * 7 * model.context_length * queries  # of which half is masked
    squares = [
        min(C, b) ** 2 * max(C, b) for b in (queries, keys, keys, queries, *[inside] * (gates + 1))
    ]
    muon = layers * sum(30 * each for each in squares) * (config.optimizer.name == "muon")
    # Norms with their additions, the gate, rotations; the logits, three times.
    moved = layers * (32 * C + 8 * gates * inside + 10 * (queries + keys) + 4 * keys)
    moved += 6 * model.vocab_size
    product, seconds = card.product_share * card.bf16, 0.0
    if precision == "int8":
        seconds += linear / (card.integer_share * card.int8)
        moved += layers * sum(6 * (a + b) for a, b in shapes)  # read twice, written twice
    else:
        seconds += linear / product
    seconds += (head + muon / config.batch.tokens_per_step) / product
    seconds += attention / (card.attention_share * card.bf16)
    seconds += moved / (card.memory_share * card.memory)
    return 1e6 * seconds


@click.command()
def main() -> None:
    click.echo(f"{'for an RTX 4090':16}registers  spilled bytes  shared bytes")
    rows, columns = int8.ROUND_TILE
    tile = dict(zip(("ROWS", "COLUMNS", "DEPTH"), int8.TILE, strict=True))
    rounding = {"ROWS": rows, "COLUMNS": columns}
    for kernel, values, warps in (
        (kernels.largest, rounding, 4),
        (kernels.round_both, rounding, 4),
        (kernels.multiply, tile | {"GROUP": int8.GROUP}, 8),
    ):
        click.echo(f"{kernel.__name__:16}{compiled(kernel, values, warps, 89)}")
    click.echo(
        f"\n{'card':10}{'config':13}{'precision':11}{'tokens/s':>9}{'measured':>10}{'ratio':>7}"
    )
    for card, name, tokens, precision, speed in MEASURED:
        config = config_file.load(name, (f"batch.tokens_per_step={tokens}",))
        found = 1e6 / microseconds(card, config, precision)
        row = (
            f"{card.name:10}{name:13}{precision:11}{found:9,.0f}{speed:10,.0f}{found / speed:7.2f}"
        )
        click.echo(row)
    for name in ("forge_124m", "forge_350m"):
        config = config_file.load(name)
        plain, ours = (microseconds(RTX_4090, config, each) for each in ("bfloat16", "int8"))
        for precision, each in (("bfloat16", plain), ("int8", ours)):
            click.echo(f"{'RTX 4090':10}{name:13}{precision:11}{1e6 / each:9,.0f}")
        click.echo(f"{'':10}{name:13}int8 / bfloat16 {plain / ours:.2f}")


if __name__ == "__main__":
    main()
