"""Laws of the format."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import files_up_to

from pipeline import info, shards, verify
from pipeline.errors import ForgeError
from pipeline.shards import DocumentLengths, ShardWriter


def write(path: Path, tokens: list[int]) -> str:
    writer = ShardWriter(path)
    writer.write(np.array(tokens, np.uint16))
    return writer.commit()


def test_a_shard_is_an_llm_c_token_file_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "x.bin", [50256, 1, 258])
    data = (tmp_path / "x.bin").read_bytes()
    # magic 20240520, version 1, three tokens, zeros up to byte 1024, then 50256, 1, 258
    assert data.hex() == "88d834010100000003000000" + "00" * 1012 + "50c401000201"


def test_tokens_come_back_as_they_went_in(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 50257, 10_000).astype(np.uint16)
    write(tmp_path / "x.bin", tokens.tolist())
    assert shards.check_header(tmp_path / "x.bin") == 10_000
    mapped = shards.map_shard(tmp_path / "x.bin", 10_000)
    assert np.array_equal(mapped, tokens)


def test_a_shard_that_is_not_committed_is_not_there(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x.bin") as writer:
        writer.write(np.zeros(10, np.uint16))
    assert not (tmp_path / "x.bin").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_a_full_disk_refuses_leaves_nothing(tmp_path: Path) -> None:
    with (
        files_up_to(4_000),
        pytest.raises(OSError, match="File too large"),
        ShardWriter(tmp_path / "x.bin") as writer,
    ):
        writer.write(np.zeros(2_000, np.uint16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-2], "shorter than its header says"),
        (lambda data: data + b"\0\0", "longer than its header says"),
        (lambda data: b"\0" + data[1:], "not a shard: magic"),
        (lambda data: data[:500], "too short for a header"),
        (lambda data: data[:100] + b"\1" + data[101:], "header are not zero"),
    ],
)
def test_a_damaged_header_or_size_is_named(tmp_path: Path, damage, says: str) -> None:
    path = tmp_path / "x.bin"
    write(path, [50256, 1, 2, 3])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ForgeError, match=says) as caught:
        shards.check_header(path)
    assert caught.value.where == path


def test_the_index_survives_a_round_trip(small_shards: Path) -> None:
    index = shards.load_index(small_shards)
    assert index.to_json() == (small_shards / "index.json").read_text()


def test_lengths_add_up_like_the_lengths_themselves() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(1, 9000, 500), rng.integers(1, 300, 80)
    both = DocumentLengths.of(np.concatenate([a, b]))
    assert DocumentLengths.of(a) + DocumentLengths.of(b) == both
    assert DocumentLengths() + both == both + DocumentLengths() == both
    exact = np.quantile(np.concatenate([a, b]), 0.5)
    assert abs(info.percentile(both, 0.5) / exact - 1) < 0.1


@pytest.fixture
def copy(small_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_shards, tmp_path / "copy"))


def problems(folder: Path) -> str:
    return "\n".join(verify.verify(shards.load_index(folder), 2, lambda count: None))


def test_verify_finds_nothing_in_a_sound_folder(copy: Path) -> None:
    assert problems(copy) == ""


def test_verify_finds_a_flipped_bit(copy: Path) -> None:
    path = copy / "train_000000.bin"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert "train_000000.bin: checksum" in problems(copy)


def test_verify_finds_truncated_missing_and_strange_shards(copy: Path) -> None:
    train, val = copy / "train_000000.bin", copy / "val_000000.bin"
    train.write_bytes(train.read_bytes()[:-10])
    shutil.move(val, copy / "val_000077.bin")
    found = problems(copy)
    assert "train_000000.bin: the shard is shorter" in found
    assert "val_000000.bin: cannot read" in found
    assert "val_000077.bin: not in the index" in found


def test_verify_finds_tokens_outside_the_vocabulary_and_wrong_counts(copy: Path) -> None:
    path = copy / "train_000000.bin"
    data = bytearray(path.read_bytes())
    data[1024:1028] = (60000).to_bytes(2, "little") * 2
    path.write_bytes(data)
    found = problems(copy)
    assert "token 60000 is outside" in found
    assert ": documents " in found
    assert "does not start with <|endoftext|>" in found


def test_verify_finds_a_vocabulary_that_is_changed_or_cannot_be_read(copy: Path) -> None:
    path = copy / shards.VOCABULARY_FILE
    path.write_bytes(path.read_bytes()[:-1])
    assert problems(copy) == "r50k_base.tiktoken: changed"
    path.unlink()
    path.mkdir()
    assert problems(copy) == "r50k_base.tiktoken: cannot be read: Is a directory"


def test_verify_finds_all_that_training_would_stop_at(copy: Path) -> None:
    """Training looks at the checksums of the heads alone."""
    raw = json.loads((copy / "index.json").read_text())
    raw["shards"][0]["head_checksum"] = "0" * 16
    (copy / "index.json").write_text(json.dumps(raw))
    assert problems(copy) == "train_000000.bin: the index has another checksum of its head"


def test_verify_finds_totals_that_do_not_add_up(copy: Path) -> None:
    raw = json.loads((copy / "index.json").read_text())
    raw["splits"]["val"]["num_documents"] += 1
    (copy / "index.json").write_text(json.dumps(raw))
    assert problems(copy) == "index.json: the totals of val are not the sums over its shards"


def test_a_folder_without_index_is_not_finished(copy: Path) -> None:
    (copy / "index.json").unlink()
    with pytest.raises(ForgeError, match="has no index"):
        shards.load_index(copy)
    (copy / shards.WORK_FOLDER).mkdir()
    with pytest.raises(ForgeError, match="not finished"):
        shards.load_index(copy)


def test_a_damaged_index_is_an_error_not_a_traceback(copy: Path) -> None:
    whole = json.loads((copy / "index.json").read_text())
    without = [json.dumps(whole | {section: {}}) for section in ("tokenizer", "source")]
    without += [json.dumps(whole | {"splits": []}), json.dumps(whole | {"skipped": {}})]
    for key, value in (("num_tokens", "12"), ("num_documents", None), ("text_bytes", -1)):
        first = whole["shards"][0] | {key: value}
        without.append(json.dumps(whole | {"shards": [first]}))
    for size in ("50257", -5):
        without.append(json.dumps(whole | {"tokenizer": whole["tokenizer"] | {"vocab_size": size}}))
    chat = {"template": "chatml", "context_length": "64", "splits": {}}
    without.append(json.dumps(whole | {"chat": chat}))
    lengths = {"document_tokens": {"min": 1, "max": 2, "histogram": ["a"]}}
    without.append(json.dumps(whole | {"splits": {"train": lengths}}))
    deep = '{"format": "llm-forge shards", "a": ' + "[" * 100_000
    for text in ('{"format": "llm-forge shards"', deep, *without):
        (copy / "index.json").write_text(text)
        with pytest.raises(ForgeError, match="damaged"):
            shards.load_index(copy)


@pytest.mark.parametrize("text", ['{"chunks": []}', '{"version": 2, "shards": []}', "[1]", "\x00"])
def test_an_index_of_another_program_is_not_called_damaged(copy: Path, text: str) -> None:
    (copy / "index.json").write_text(text)
    with pytest.raises(ForgeError, match="another program") as caught:
        shards.load_index(copy)
    assert "--overwrite" not in str(caught.value)


class LlmC:
    """What llm.c's dataloader.h asks of the shards of one split, written anew."""

    def __init__(self, paths: list[Path], batch: int, length: int, processes: int) -> None:
        self.shards = []
        for path in sorted(paths):
            header = np.fromfile(path, "<i4", 256)
            assert (header[0], header[1]) == (20240520, 1), "bad magic or version"
            assert path.stat().st_size == 1024 + 2 * int(header[2]), "file size is not as expected"
            assert header[2] >= processes * batch * length + 1, "shard is too small"
            self.shards.append(np.fromfile(path, "<u2", offset=1024))
        self.step, self.length = processes * batch * length, length

    def batches(self) -> Iterator[np.ndarray]:
        for tokens in self.shards:
            for start in range(0, len(tokens) - self.step, self.step):
                yield tokens[start : start + self.step + 1]


def modded_nanogpt(paths: list[Path], batch_size: int) -> Iterator[np.ndarray]:
    """modded-nanogpt's distributed_data_generator, written anew: whole batches of each shard."""
    for path in sorted(paths):
        header = np.fromfile(path, "<i4", 256)
        assert (header[0], header[1]) == (20240520, 1)
        tokens = np.fromfile(path, "<u2", offset=1024)
        assert len(tokens) == header[2]
        assert len(tokens) > batch_size, "one batch of validation comes from one shard"
        for start in range(0, len(tokens) - batch_size, batch_size):
            yield tokens[start : start + batch_size + 1]


def test_the_loaders_of_llm_c_and_modded_nanogpt_take_both_splits(
    small_shards: Path, tmp_path: Path, make_shards
) -> None:
    made = make_shards(
        small_shards.parent / "source", tmp_path, val_fraction=0.1, shard_tokens=90_000
    )
    assert len(made.of("train")) > 2
    for split in shards.SPLITS:
        paths = list(tmp_path.glob(f"{split}_*.bin"))
        batches = list(LlmC(paths, batch=2, length=1024, processes=2).batches())
        again = list(modded_nanogpt(paths, batch_size=4096))
        assert len(batches) >= len(paths)
        assert all(batch.max() < 50257 for batch in batches)
        assert [batch.tolist() for batch in again] == [batch.tolist() for batch in batches]
