"""The speed that `forge-train --check` predicts."""

import pytest

from trainer.check import Card
from trainer.config_file import load

H200 = Card(matmul_flops=680e12, copy_bytes=4.25e12)


@pytest.mark.parametrize(
    ("name", "micro_batch_size", "measured"),
    [("gpt2", 96, 557_000), ("gpt2_medium", 16, 208_700), ("gpt2_large", 5, 84_500)],
)
def test_predicted_speeds_are_within_20_percent_of_measured_ones(
    name: str, micro_batch_size: int, measured: float
) -> None:
    """Measured on an H200 whose sustained product was 680 TFLOP/s (tests/benchmarks)."""
    predicted = H200.tokens_per_second(load(name).model, micro_batch_size)
    assert predicted == pytest.approx(measured, rel=0.2)
