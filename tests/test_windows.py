"""Laws of the window order: a pure function of (seed, position), shared out among the ranks."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import shards
from pipeline.errors import ForgeError
from trainer import config_file
from trainer.config import Config
from trainer.ranks import Ranks
from trainer.windows import (
    MicroBatches,
    Windows,
    for_data,
    open_data,
    permute,
    step_positions,
    windows_at,
)

CPU = torch.device("cpu")


def steps_of(windows: int, seed: int = 0) -> Config:
    """A config whose steps take `windows` windows of 64 tokens."""
    settings = ("model.context_length=64", f"batch.tokens_per_step={64 * windows}", f"seed={seed}")
    return config_file.load("tiny", (*settings, "evaluate.num_tokens=64"))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1000, 4097])
def test_the_permutation_meets_every_number_once(size: int) -> None:
    permuted = permute(np.arange(size), size, (7, 0))
    assert sorted(permuted.tolist()) == list(range(size))


def test_the_permutation_depends_on_seed_and_epoch_and_looks_shuffled() -> None:
    numbers = np.arange(10_000)
    a, b, c = (permute(numbers, 10_000, key) for key in ((1, 0), (1, 1), (2, 0)))
    for x, y in ((a, b), (a, c), (b, c)):
        assert np.mean(x == y) < 0.001
    assert abs(np.corrcoef(numbers, a)[0, 1]) < 0.05
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.05


def test_one_position_at_a_time_gives_the_same_order() -> None:
    together = windows_at(np.arange(300), 100, 3)
    alone = [windows_at(np.array([n]), 100, 3)[0] for n in range(300)]
    assert together.tolist() == alone


def test_each_window_comes_once_an_epoch() -> None:
    order = windows_at(np.arange(300), 100, 3).reshape(3, 100)
    assert all(sorted(epoch.tolist()) == list(range(100)) for epoch in order)
    assert not np.array_equal(order[0], order[1])


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_ranks_share_the_windows_without_overlap(world_size: int, micro_batch_size: int) -> None:
    shares = [
        step_positions(5, steps_of(24), micro_batch_size, Ranks(rank, rank, world_size))
        for rank in range(world_size)
    ]
    assert all(share.shape[1] == micro_batch_size for share in shares)
    together = np.concatenate([share.ravel() for share in shares])
    assert together.tolist() == list(range(5 * 24, 6 * 24))


@pytest.fixture(scope="module")
def windows(small_shards: Path) -> Windows:
    return Windows(shards.load_index(small_shards), "train", 64)


def test_each_token_is_a_target_once_an_epoch(windows: Windows) -> None:
    read = windows.read(np.arange(windows.num_windows))
    at = 0
    for shard in windows.shards:
        tokens = shards.map_shard(windows.index.folder / shard.file, shard.num_tokens)
        count = (shard.num_tokens - 1) // 64
        assert np.array_equal(read[at : at + count, 1:].ravel(), tokens[1 : count * 64 + 1])
        assert np.array_equal(read[at : at + count, :-1].ravel(), tokens[: count * 64])
        at += count
    assert at == windows.num_windows


def test_an_evaluation_takes_no_more_than_the_val_split_has(small_shards: Path) -> None:
    """And says so: config.toml and README.md of the run have that number."""
    config = steps_of(4)
    data = open_data(config, small_shards)
    whole = 64 * data.val.num_windows
    for asked, taken in ((64, 64), (10 * whole, whole)):
        wanted = replace(config, evaluate=replace(config.evaluate, num_tokens=asked))
        assert for_data(wanted, data).evaluate.num_tokens == taken


def test_reading_ahead_gives_what_the_arguments_say(windows: Windows) -> None:
    config, ranks = steps_of(8, seed=9), Ranks(1, 1, 2)
    with MicroBatches(windows, config, 2, 4, ranks, CPU) as batches:
        ((inputs, targets),) = batches.of_step()
    positions = step_positions(2, config, 4, ranks)[0]
    wanted = windows.read(windows_at(positions, windows.num_windows, 9))
    assert inputs.tolist() == wanted[:, :-1].tolist()
    assert targets.tolist() == wanted[:, 1:].tolist()


def copy_of(windows: Windows, folder: Path) -> Windows:
    shutil.copytree(windows.index.folder, folder)
    return Windows(shards.load_index(folder), "train", 64)


@pytest.mark.parametrize("harm", ["gone", "shorter"])
def test_a_shard_that_changes_while_training_is_an_error_and_no_signal(
    windows: Windows, tmp_path: Path, harm: str
) -> None:
    copy = copy_of(windows, tmp_path / "copy")
    path = copy.index.folder / copy.shards[0].file
    copy.read(np.array([0]))
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2])
    says = "cannot read a shard" if harm == "gone" else "shorter than its header"
    with MicroBatches(copy, steps_of(4), 0, 2, Ranks(), CPU) as batches:
        steps = (list(batches.of_step()) for _ in range(9))
        with pytest.raises(ForgeError, match=says) as caught:
            list(steps)
    assert str(caught.value.where) == str(path)


def test_a_truncated_shard_is_found_before_the_first_step(windows: Windows, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(windows.index.folder, tmp_path / "copy"))
    path = folder / windows.shards[0].file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ForgeError, match="shorter than its header says"):
        Windows(shards.load_index(folder), "train", 64).check()


def test_a_changed_shard_is_found_before_the_first_step(windows: Windows, tmp_path: Path) -> None:
    copy = copy_of(windows, tmp_path / "copy")
    path = copy.index.folder / copy.shards[0].file
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    path.write_bytes(data)
    with pytest.raises(ForgeError, match="has changed since the index was written"):
        copy.check()
