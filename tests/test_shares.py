"""Laws of the parameters that ranks share out: nothing is lost, nothing is twice."""

import pytest
import torch

from trainer import config_file
from trainer.config import Config
from trainer.model import build_model
from trainer.optimizer import Optimizer
from trainer.ranks import Ranks
from trainer.shares import layout

SIZES = ["num_layers=3", "num_heads=2", "embedding_size=24", "context_length=16", "vocab_size=97"]


def config(*settings: str) -> Config:
    small = [f"model.{size}" for size in SIZES]
    return config_file.load(
        "forge_124m", ("model.mlp_size=40", "evaluate.num_tokens=16", *small, *settings)
    )


def of_rank(chosen: Config, rank: int, world_size: int) -> Optimizer:
    model = build_model(chosen.model)
    model.init_weights(0)
    return Optimizer(model, chosen, Ranks(rank, rank, world_size))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("world_size", [2, 3, 16])
def test_each_number_belongs_to_one_rank(world_size: int, name: str, precision: str) -> None:
    """Masters and all that a checkpoint has besides; of 16 ranks some have no matrix of Muon's."""
    chosen = config(f"optimizer.name={name}", f"precision={precision}")
    alone = of_rank(chosen, 0, 1)
    generator = torch.Generator().manual_seed(1)
    for shared in alone.state().values():
        shared.mine.copy_(torch.randn(shared.mine.shape, generator=generator))
    optimizers = [of_rank(chosen, rank, world_size) for rank in range(world_size)]
    found = [optimizer.masters() for optimizer in optimizers]
    for key, shared in alone.masters().items():
        parts = [each[key].mine for each in found]
        assert torch.equal(torch.cat(parts), shared.mine), key
    for key, shared in alone.state().items():
        each = [optimizer.state()[key] for optimizer in optimizers]
        assert all(one.shape == shared.shape and one.spans == each[0].spans for one in each), key
        spans = each[0].spans
        assert [len(one.mine) for one in each] == [span.stop - span.start for span in spans], key
        if not key.startswith("step"):
            ends = [0, *(span.stop for span in spans)]
            assert [span.start for span in spans] == ends[:-1]
            assert ends[-1] == shared.mine.numel(), key


def test_a_matrix_of_muon_s_is_whole_in_one_share_and_shares_are_even() -> None:
    sizes = [3, 1, 5, 3] * 12
    for world_size in (1, 2, 3, 4, 8, 100):
        starts, share = layout([size * 640 for size in sizes], world_size, is_whole=True)
        taken = sorted(zip(starts, sizes, strict=True))
        for (start, size), (after, _) in zip(
            taken, [*taken[1:], (world_size * share, 0)], strict=True
        ):
            assert start + size * 640 <= after
            assert start // share == (start + size * 640 - 1) // share
        assert share <= (sum(sizes) / world_size + max(sizes)) * 640
    assert layout([640] * 24, 2, is_whole=True) == ([640 * n for n in range(24)], 640 * 12)


def test_shares_that_need_not_end_anywhere_differ_by_nothing() -> None:
    assert layout([1000, 30, 1], 2, is_whole=False) == ([0, 1000, 1030], 576)
