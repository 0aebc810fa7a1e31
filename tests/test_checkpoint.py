"""Laws of checkpoints: whole or absent, kept by a rule, and harmless whoever made them."""

import json
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import xxhash

from pipeline.errors import ForgeError
from trainer import checkpoint
from trainer.checkpoint import Checkpoints, State, kept
from trainer.config import CheckpointConfig, ModelConfig
from trainer.schedule import Plan

WEIGHTS = {"w": torch.arange(100_000.0), "b": torch.ones(3)}
MOMENTS = {"exp_avg.w": torch.zeros(100_000), "step.0": torch.tensor(7.0)}
OPTIONS = CheckpointConfig(keep_last=2)


MODEL = ModelConfig(num_layers=1, num_heads=1, embedding_size=8)
FALLING = Plan(6, 9, 1.0)


def files() -> Iterator[dict[str, torch.Tensor]]:
    return iter([WEIGHTS, MOMENTS])


def state(step: int, loss: float | None = None) -> State:
    return State(MODEL, "float32", "", {}, FALLING, step, step * 10, validation_loss=loss)


def test_the_rule_keeps_the_last_the_best_and_the_one_before_the_decay() -> None:
    losses = {2: 3.0, 4: 3.5, 9: 3.2}
    states = [state(step, loss=losses.get(step)) for step in range(1, 10)]  # FALLING begins at 6
    assert kept(states, OPTIONS) == {2, 6, 8, 9}
    assert kept(states, CheckpointConfig(keep_last=1)) == {2, 6, 9}


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    """Also where no plan is known yet, and with the sizes that a model leaves open."""
    for saved in (
        state(1),
        State(MODEL, "bfloat16", "abc", {"seed": 7}, Plan(), 2, 20, 0.5, "a/run"),
    ):
        checkpoint.save(tmp_path, files(), saved)
        assert checkpoint.load_state(tmp_path, saved.step) == saved


def test_the_last_checkpoint_pushes_out_no_other(tmp_path: Path) -> None:
    written = Checkpoints(tmp_path, CheckpointConfig(keep_last=1))
    there = []
    for step in (5, 6, 7, 8, 9):  # 6 is the last before the decay
        assert written.save(files(), state(step)) is None
        there.append(checkpoint.steps(tmp_path))
    assert there == [[5], [5, 6], [6, 7], [6, 7, 8], [6, 8, 9]]
    assert "step_00000009; if it fails again, move that away" in written.last()


def test_a_full_disk_leaves_the_older_checkpoints_and_nothing_half(tmp_path: Path) -> None:
    written = Checkpoints(tmp_path, OPTIONS)
    assert written.save(files(), state(1)) is None
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # the kernel refuses more
    try:
        problem = written.save(files(), state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert problem
    assert checkpoint.load_state(tmp_path, 1)
    assert [p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()] == ["step_00000001"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.find(b"30,")] ^= 1  # of state.json's tokens; else the last
    path.write_bytes(data)


def nest(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


@pytest.mark.parametrize("damage", [cut, flip, nest, Path.unlink])
@pytest.mark.parametrize(
    "file", [checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE, checkpoint.STATE_FILE]
)
def test_damage_to_any_file_is_found_and_the_older_good_checkpoint_named(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, files(), state(step))
    (checkpoint.checkpoint_path(tmp_path, 2) / checkpoint.MODEL_FILE).unlink()
    damage(checkpoint.checkpoint_path(tmp_path, 3) / file)
    with pytest.raises(ForgeError) as caught:
        checkpoint.load_state(tmp_path, 3)
    assert file in caught.value.what
    assert str(caught.value.where).endswith("step_00000003")
    assert "--resume continues from step 1" in str(caught.value.fix)


def test_damage_where_no_other_is_whole_promises_no_resume(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, files(), state(3))
    cut(checkpoint.checkpoint_path(tmp_path, 3) / checkpoint.MODEL_FILE)
    with pytest.raises(ForgeError) as caught:
        checkpoint.load_state(tmp_path, 3)
    assert "no older checkpoint is whole" in str(caught.value.fix)
    assert "--resume" not in str(caught.value.fix)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("file", [checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE])
def test_a_checkpoint_from_a_stranger_cannot_run_code(tmp_path: Path, file: str) -> None:
    path = checkpoint.save(tmp_path, files(), state(1))
    data = pickle.dumps(Evil(tmp_path / "owned"))
    (path / file).write_bytes(data)
    raw = json.loads((path / checkpoint.STATE_FILE).read_text())
    raw["checksums"] = {file: xxhash.xxh3_64(data).hexdigest()}
    other = ({checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE} - {file}).pop()
    raw["checksums"][other] = xxhash.xxh3_64((path / other).read_bytes()).hexdigest()
    raw["checksums"][checkpoint.STATE_FILE] = checkpoint._own_checksum(raw)
    (path / checkpoint.STATE_FILE).write_text(json.dumps(raw))
    checkpoint.load_state(tmp_path, 1)  # the checksums are the stranger's
    with pytest.raises(ForgeError, match="cannot read tensors"):
        checkpoint.load_tensors(path / file, WEIGHTS)
    assert not (tmp_path / "owned").exists()
    pickle.loads(data)  # it would have
    assert (tmp_path / "owned").exists()
