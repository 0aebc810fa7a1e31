"""Laws of mixtures: the amounts that were asked for, nothing copied, and a loss for each part."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import CONTEXT, metrics_of
from test_train import QUICK

from pipeline import files, info, mix, shards, verify
from pipeline.errors import ForgeError
from trainer import config_file
from trainer.evaluate import validation_loss
from trainer.model import build_model
from trainer.ranks import Ranks
from trainer.windows import Windows, open_data


@pytest.fixture(scope="module")
def notes(tmp_path_factory, make_parquet, make_shards, documents: list[str]) -> Path:
    """A small second folder, of several train shards. Not to be written to."""
    root = tmp_path_factory.mktemp("notes")
    texts = [text[:3000] for text in documents]
    source = make_parquet(root / "source.parquet", texts)
    make_shards(source, root / "notes", shard_tokens=6000, val_fraction=0.03)
    return root / "notes"


@pytest.fixture
def mixed(small_shards: Path, notes: Path, tmp_path: Path) -> Path:
    """40,000 tokens of the one; the other two and a half times."""
    mix.mix(tmp_path / "mix", [(small_shards, 40_000), (notes, num_tokens(notes) * 5 // 2)])
    return tmp_path / "mix"


def num_tokens(folder: Path) -> int:
    return shards.load_index(folder).total("num_tokens", "train")


def tokens_of(index: shards.Index, split: str) -> np.ndarray:
    """The tokens of a split, each entry after the other."""
    maps = (shards.map_shard(index.folder / s.file, s.num_tokens) for s in index.of(split))
    return np.concatenate(list(maps))


def problems(folder: Path) -> list[str]:
    return verify.verify(shards.load_index(folder), 1, lambda count: None)


def test_a_mixture_has_the_first_tokens_of_each_part_and_all_of_its_val(
    mixed: Path, small_shards: Path, notes: Path
) -> None:
    assert {path.name for path in mixed.iterdir()} == {"index.json", "r50k_base.tiktoken"}
    index, few = shards.load_index(mixed), num_tokens(notes)
    parts = [shards.load_index(folder) for folder in (small_shards, notes)]
    assert len(parts[1].of("train")) > 2
    assert few > 1000
    first, second = (tokens_of(part, "train") for part in parts)
    wanted = np.concatenate([first[:40_000], second, second, second[: few // 2]])
    assert np.array_equal(tokens_of(index, "train"), wanted)
    assert np.array_equal(
        tokens_of(index, "val"), np.concatenate([tokens_of(part, "val") for part in parts])
    )
    train = json.loads(index.to_json())["splits"]["train"]
    assert train["num_documents"] == (wanted == shards.EOT_TOKEN).sum()
    assert problems(mixed) == []
    assert [row["epochs"] for row in index.source["parts"]] == [
        pytest.approx(40_000 / len(first), abs=1e-4),
        pytest.approx(2.5, abs=1e-3),
    ]


def test_each_entry_comes_once_an_epoch(mixed: Path) -> None:
    index = shards.load_index(mixed)
    windows = Windows(index, "train", 64)
    windows.check()
    counts = [(shard.num_tokens - 1) // 64 for shard in index.of("train")]
    assert windows.num_windows == sum(counts)
    read = iter(windows.read(np.arange(windows.num_windows)))
    for shard, count in zip(index.of("train"), counts, strict=True):
        tokens = shards.map_shard(mixed / shard.file, shard.num_tokens)
        for start in range(0, 64 * count, 64):
            assert np.array_equal(next(read), tokens[start : start + 65])


def test_info_and_show_know_a_mixture(mixed: Path, notes: Path, forge) -> None:
    index = shards.load_index(mixed)
    shown = forge("prep", "info", mixed).stdout
    names = [Path(part).name for part in index.parts]
    assert f"\n{names[0]:{max(map(len, names))}}            40,000" in shown
    assert "2.50" in shown
    assert "document length" not in shown
    number = index.of("train")[0].num_documents - 1  # is cut, like the prefix
    shard, start, tokens = info.find_document(index, "train", number)
    assert start + len(tokens) == shard.num_tokens == 40_000


def test_parts_of_one_name_are_called_by_their_paths() -> None:
    names = files.own_names(["../notes", "../old/notes", "../books"])
    assert list(names.values()) == ["../notes", "../old/notes", "books"]


def test_the_same_command_changes_nothing_and_another_needs_overwrite(
    mixed: Path, small_shards: Path, notes: Path, forge
) -> None:
    index = mixed / "index.json"
    before = index.read_bytes()
    same = [f"{small_shards}:40k", f"{notes}:{num_tokens(notes) * 5 // 2}"]
    assert forge("prep", "mix", mixed, *same).exit_code == 0
    assert index.read_bytes() == before
    refused = forge("prep", "mix", mixed, small_shards, notes)
    assert refused.exit_code == 1
    assert "add --overwrite" in refused.stderr
    assert index.read_bytes() == before
    made = forge("prep", "mix", mixed, small_shards, notes, "--overwrite", "--json")
    assert [row["epochs"] for row in json.loads(made.stdout)["parts"]] == [1, 1]
    assert forge("prep", "mix", mixed, f"{notes}:10x").exit_code == 2


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("mixture", "a mixture itself"),
        ("twice", "named twice"),
        ("chat", "text and conversations in windows of 64 tokens do not mix"),
        ("epochs", "epochs of the folder's"),
        ("too few", "1 token: too few"),
        ("too few of chat", "64 tokens: too few"),
        ("damage", "the index says"),
        ("gone", "cannot read a shard"),
        ("nothing", "no such folder of shards"),
        ("out", "OUT holds other files"),
    ],
)
def test_what_cannot_be_mixed_is_refused_and_nothing_is_written(
    case: str, says: str, mixed: Path, notes: Path, chat_shards: Path, tmp_path: Path
) -> None:
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(notes, copy)
    shard = copy / shards.load_index(copy).of("train")[-1].file
    parts = {
        "mixture": [(notes, None), (mixed, None)],
        "twice": [(notes, 100), (tmp_path / "x" / ".." / "copy", 100), (copy, None)],
        "chat": [(notes, None), (chat_shards, None)],
        "epochs": [(notes, 10**9)],
        "too few": [(notes, 1)],
        "too few of chat": [(chat_shards, 64)],
        "damage": [(copy, num_tokens(copy) - 1)],
        "nothing": [(tmp_path / "nothing", None)],
    }
    (tmp_path / "x").mkdir()
    if case == "damage":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    if case == "gone":
        shard.unlink()
    if case == "out":
        out = notes
    before = [path.read_bytes() for path in sorted(notes.iterdir())]
    with pytest.raises(ForgeError, match=says):
        mix.mix(out, parts.get(case, [(copy, None)]), overwrite=True)
    assert not (tmp_path / "out").exists()
    assert [path.read_bytes() for path in sorted(notes.iterdir())] == before


def test_tokenize_never_takes_a_mixture_for_its_own_shards(
    mixed: Path, notes: Path, tmp_path: Path, forge
) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "some text"}\n')
    made = forge("prep", "tokenize", tmp_path / "text.jsonl", "--out", mixed, "--overwrite")
    assert made.exit_code == 1
    assert "the folder holds a mixture" in made.stderr
    assert problems(mixed) == problems(notes) == []


def test_a_moved_folder_is_a_clear_error_and_both_may_move_together(
    notes: Path, tmp_path: Path, forge
) -> None:
    shutil.copytree(notes, tmp_path / "a" / "notes")
    (tmp_path / "a" / "disk").mkdir()
    (tmp_path / "a" / "mix").symlink_to("disk")
    mix.mix(tmp_path / "a" / "mix", [(tmp_path / "a" / "notes", None)])
    (tmp_path / "a").rename(tmp_path / "b")
    assert problems(tmp_path / "b" / "mix") == []
    (tmp_path / "b" / "notes").rename(tmp_path / "b" / "moved")
    folder = tmp_path / "b" / "mix"
    for command in (("info", folder), ("verify", folder)):
        shown = forge("prep", *command)
        assert shown.exit_code == 1
        assert f"a folder of this mixture is gone\n  where:      {tmp_path}/b/notes" in shown.stderr
    assert "is gone" in forge("train", "tiny", "--data", folder, "--check").stderr
    mix.mix(folder, [(tmp_path / "b" / "moved", None)], overwrite=True)
    assert problems(folder) == []


def test_a_changed_part_is_found(notes: Path, tmp_path: Path) -> None:
    """Bits that the mixture uses, and a shard that was made again with more tokens."""
    copy, folder = tmp_path / "notes", tmp_path / "mix"
    shutil.copytree(notes, copy)
    mix.mix(folder, [(copy, 1000)])
    first = copy / shards.load_index(copy).of("train")[0].file
    data = bytearray(first.read_bytes())
    assert len(data) > shards.HEAD_BYTES
    for position, is_found in ((shards.HEADER.size + 2 * 999, True), (len(data) - 2, False)):
        data[position] ^= 1
        first.write_bytes(data)
        assert bool(problems(folder)) == is_found
        data[position] ^= 1
    with shards.ShardWriter(first) as writer:
        writer.write(np.frombuffer(bytes(data[shards.HEADER.size :]) + b"\x01\x00", "<u2"))
        writer.commit()
    assert "another checksum of its head" in problems(folder)[0]
    windows = Windows(shards.load_index(folder), "train", 64)
    with pytest.raises(ForgeError, match="does not have the 1,000 tokens of the index"):
        windows.read(np.array([0]))
    with pytest.raises(ForgeError, match="if it was extended, mix it again"):
        windows.check()


def test_conversations_are_cut_where_a_window_ends(chat_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(chat_shards, tmp_path / "other")
    parts = [(chat_shards, 6 * CONTEXT), (tmp_path / "other", None)]
    index = mix.mix(tmp_path / "mix", parts)
    sizes = [shard.num_tokens // CONTEXT for shard in index.of("train")]
    assert sizes == [4, 1, 4]
    assert problems(tmp_path / "mix") == []
    assert Windows(index, "train", CONTEXT).num_windows == 9
    assert "windows of 64 tokens" in info.render(index)
    raw = json.loads((tmp_path / "other" / "index.json").read_text())
    raw["chat"]["context_length"] = 32
    (tmp_path / "other" / "index.json").write_text(json.dumps(raw))
    with pytest.raises(ForgeError, match="of 64 tokens and conversations in windows of 32 tokens"):
        mix.mix(tmp_path / "mix", parts, overwrite=True)


def test_the_whole_loss_weighs_the_parts_losses_by_their_train_tokens(
    mixed: Path, small_shards: Path, notes: Path
) -> None:
    settings = tuple(option.removeprefix("--set=") for option in QUICK)
    config = config_file.load("tiny", settings)
    model = build_model(config.model)
    model.init_weights(0)

    def measured(folder: Path, num_tokens: int) -> tuple[float, float, dict[str, float]]:
        asked = replace(config, evaluate=replace(config.evaluate, num_tokens=num_tokens))
        return validation_loss(model, open_data(asked, folder), asked, 4, Ranks())

    most = Windows(shards.load_index(notes), "val", 64).num_windows
    share = 64 * (most + 3)  # more than the notes have
    loss, bits, parts = measured(mixed, 2 * share)
    alone = measured(small_shards, share), measured(notes, 64 * most)
    assert list(parts.values()) == pytest.approx([found[0] for found in alone])
    weights = np.array([40_000, num_tokens(notes) * 5 // 2])
    assert loss == pytest.approx(np.average(list(parts.values()), weights=weights))
    bytes_per_token = [found[0] / found[1] for found in alone]
    assert loss / bits == pytest.approx(np.average(bytes_per_token, weights=weights))


def test_a_run_reports_each_part_and_forge_eval_measures_it(
    mixed: Path, tmp_path: Path, forge
) -> None:
    run = tmp_path / "run"
    short = ("--set=schedule.max_steps=2", "--set=schedule.warmup_steps=1")
    trained = forge("train", "tiny", "--data", mixed, "--out", run, *QUICK, *short)
    assert trained.exit_code == 0, trained.output
    parts = metrics_of(run, "evaluate")[-1]["parts"]
    assert tuple(parts) == shards.load_index(mixed).parts
    said = ", ".join(f"{Path(part).name} {loss:.4f}" for part, loss in parts.items())
    assert f"  {said}\n" in trained.output
    assert f"each part: {said};" in (run / "README.md").read_text()
    assert f"by part           40,000 of {Path(next(iter(parts))).name} (" in trained.output
    measured = forge("eval", run, "--data", mixed, "--num-tokens", 320, "--json")
    rows = [json.loads(line) for line in measured.stdout.splitlines()]
    assert {row["part"]: row["loss"] for row in rows} == pytest.approx(parts, abs=1e-4)
