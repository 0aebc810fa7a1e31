"""Laws of checkpoints: whole or absent, kept by a rule, and harmless whoever made them."""

import json
import math
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash

from pipeline.errors import ForgeError
from trainer import checkpoint
from trainer.checkpoint import Saver, State, kept
from trainer.config import CheckpointConfig

WEIGHTS = {"w": torch.arange(100_000.0), "b": torch.ones(3)}
MOMENTS = {"exp_avg.w": torch.zeros(100_000), "step.0": torch.tensor(7.0)}
OPTIONS = CheckpointConfig(keep_last=2, keep_every_hours=2.0)


def state(step: int, hours: float = 0.0, decayed: float = 1.0, loss: float | None = None) -> State:
    return State(step, step * 10, hours * 3600, decayed=decayed, validation_loss=loss)


def test_the_rule_keeps_the_last_the_best_one_a_period_and_the_one_before_the_decay() -> None:
    states = [
        state(1, 0.5),
        state(2, 1.5, loss=3.0),  # the best
        state(3, 2.5),  # the first after 2 hours
        state(4, 3.5, loss=3.5),
        state(5, 4.5),  # the first after 4 hours
        state(6, 5.0),  # the last before the decay
        state(7, 5.2, decayed=0.5),
        state(8, 5.4, decayed=0.3),
        state(9, 5.6, decayed=0.0, loss=3.2),
    ]
    assert kept(states, OPTIONS) == {2, 3, 5, 6, 8, 9}
    assert kept(states, CheckpointConfig(keep_last=1, keep_every_hours=99.0)) == {2, 6, 9}


def test_what_is_saved_is_what_was_there_when_the_save_began(tmp_path: Path) -> None:
    """Training goes on at once, and changes the tensors while the writer writes."""
    saver = Saver(tmp_path, OPTIONS)
    weights = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    for step in (1, 2, 3):
        for tensor in weights.values():
            tensor.fill_(step)
        saver.start(weights, MOMENTS, state(step))
        weights["w"].fill_(-1)
    saver.wait()
    assert [saved.error for saved in saver.finished()] == [None] * 3
    assert checkpoint.steps(tmp_path) == [2, 3]
    path = checkpoint.checkpoint_path(tmp_path, 3)
    found = checkpoint.load_tensors(path / checkpoint.MODEL_FILE, WEIGHTS)
    assert found["w"].eq(3).all()
    assert checkpoint.load_state(tmp_path, 3).step == 3


def test_a_full_disk_leaves_the_older_checkpoints_and_nothing_half(tmp_path: Path) -> None:
    saver = Saver(tmp_path, OPTIONS)
    saver.start(WEIGHTS, MOMENTS, state(1))
    saver.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # the kernel refuses more
    try:
        saver.start(WEIGHTS, MOMENTS, state(2))
        saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    first, second = saver.finished()
    assert first.error is None
    assert isinstance(second.error, OSError)
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.load_state(tmp_path, 1)
    assert [p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()] == ["step_00000001"]


def test_what_a_kill_left_half_written_is_swept_away(tmp_path: Path) -> None:
    half = checkpoint.checkpoint_path(tmp_path, 5).with_suffix(".partial")
    half.mkdir(parents=True)
    assert checkpoint.steps(tmp_path) == []
    Saver(tmp_path, OPTIONS)
    assert not half.exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.find(b"30,")] ^= 1  # of state.json's tokens; else the last
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize(
    "file", [checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE, checkpoint.STATE_FILE]
)
def test_damage_to_any_file_is_found_and_the_older_good_checkpoint_named(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, WEIGHTS, MOMENTS, state(step))
    (checkpoint.checkpoint_path(tmp_path, 2) / checkpoint.MODEL_FILE).unlink()
    damage(checkpoint.checkpoint_path(tmp_path, 3) / file)
    with pytest.raises(ForgeError) as caught:
        checkpoint.load_state(tmp_path, 3)
    assert file in caught.value.what
    assert str(caught.value.where).endswith("step_00000003")
    assert "--resume goes on from step 1 then" in str(caught.value.fix)


def test_a_validation_loss_that_is_no_number_is_not_the_best() -> None:
    states = [state(1, loss=math.nan), state(2, loss=3.0), state(3, loss=4.0), state(4)]
    assert kept(states, CheckpointConfig(keep_last=1, keep_every_hours=99.0)) == {2, 4}


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("file", [checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE])
def test_a_checkpoint_from_a_stranger_cannot_run_code(tmp_path: Path, file: str) -> None:
    path = checkpoint.save(tmp_path, WEIGHTS, MOMENTS, state(1))
    data = pickle.dumps(Evil(tmp_path / "owned"))
    (path / file).write_bytes(data)
    raw = json.loads((path / checkpoint.STATE_FILE).read_text())
    raw["checksums"] = {file: xxhash.xxh3_64(data).hexdigest()}
    other = ({checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE} - {file}).pop()
    raw["checksums"][other] = xxhash.xxh3_64((path / other).read_bytes()).hexdigest()
    (path / checkpoint.STATE_FILE).write_text(json.dumps(raw))
    checkpoint.load_state(tmp_path, 1)  # the checksums are the stranger's
    with pytest.raises(ForgeError, match="cannot read tensors"):
        checkpoint.load_tensors(path / file, WEIGHTS)
    assert not (tmp_path / "owned").exists()
    pickle.loads(data)  # it would have
    assert (tmp_path / "owned").exists()
