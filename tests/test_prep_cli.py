"""forge-prep as people and scripts meet it: exit codes, messages, JSON; never a traceback."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from conftest import ROOT

from pipeline import command, foreign, shards, tokenizer, verify
from pipeline.cli import next_commands
from pipeline.making import default_name


@pytest.fixture
def source(tmp_path: Path, make_parquet) -> Path:
    texts = [None, *(f"document number {n}" for n in range(40)), ""]
    return Path(make_parquet(tmp_path / "text.parquet", texts))


def assert_error(result: Result, *says: str) -> None:
    """Exit code 1, one message with a cure, nothing on stdout, no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ")
    assert "what to do:" in result.stderr
    assert "Traceback" not in result.output
    for words in says:
        assert words in result.stderr
    assert result.stdout == ""


def test_tokenize_says_what_it_made_and_what_to_do_next(
    forge, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = forge("prep", "tokenize", source, "--out", out, "--val-fraction", 0.2, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "of 40 documents" in result.stdout
    assert "2 null or empty documents skipped" in result.stdout
    assert f"forge-prep info {out}" in result.stdout
    again = forge("prep", "tokenize", source, "--out", out, "--val-fraction", 0.2)
    assert again.exit_code == 0
    assert f"{out} is up to date." in again.stdout
    other = forge("prep", "tokenize", source, "--out", out, "--val-fraction", 0.3)
    assert_error(other, "val_fraction: 0.2, now 0.3")


def test_tokenize_json_is_one_object_and_nothing_else(forge, source: Path, tmp_path: Path) -> None:
    result = forge("prep", "tokenize", source, "--out", tmp_path / "out", "--json", "--workers", 1)
    summary = json.loads(result.stdout)
    index = shards.load_index(tmp_path / "out")
    assert summary["num_documents"] == 40
    assert summary["num_train_tokens"] == index.total("num_tokens", "train")
    assert (summary["skipped"]["null_documents"], summary["skipped"]["empty_documents"]) == (1, 1)
    assert summary["up_to_date"] is False
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tokenize", "nowhere.parquet"], "no such file, folder or glob"),
        (["tokenize", ""], "SOURCE is empty"),
        (["info", "nowhere"], "no such folder of shards"),
        (["verify", "nowhere"], "no such folder of shards"),
        (["show", "nowhere", "0"], "no such folder of shards"),
        (["info", "."], "not a folder of shards"),
    ],
)
def test_a_missing_source_or_folder_is_exit_code_1(
    forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_error(forge("prep", *arguments), says)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tokenize"],
        ["tokenize", "x", "--max-tokens", "many"],
        ["tokenize", "x", "--max-tokens", "0"],
        ["tokenize", "x", "--max-tokens", "1e400"],
        ["tokenize", "x", "--val-fraction", "1"],
        ["tokenize", "x", "--workers", "0"],
        ["show", "x", "-1"],
        ["frobnicate"],
    ],
)
def test_wrong_usage_is_exit_code_2(forge, arguments: list[str]) -> None:
    result = forge("prep", *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("7", 7),
        ("500k", 500_000),
        ("2.5M", 2_500_000),
        ("1_0B", 10**10),
        ("1e9", 10**9),
        ("10,000", 10**4),
    ],
)
def test_counts_are_written_as_people_write_them(written: str, meant: int) -> None:
    from pipeline.command import Count

    assert Count()(written) == meant


def test_every_error_of_the_pipeline_says_what_to_do() -> None:
    calls = [
        (path.name, node.lineno, {keyword.arg for keyword in node.keywords})
        for path in (ROOT / "pipeline").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ForgeError"
    ]
    assert len(calls) > 30
    assert [call for call in calls if "fix" not in call[2]] == []


def test_info_counts_what_is_there(forge, small_shards: Path) -> None:
    index = shards.load_index(small_shards)
    text = forge("prep", "info", small_shards)
    assert text.exit_code == 0
    assert f"{index.total('num_tokens', 'train'):,}" in text.stdout
    facts = json.loads(forge("prep", "info", small_shards, "--json").stdout)
    for split in shards.SPLITS:
        for name in ("num_tokens", "num_documents", "text_bytes"):
            assert facts["splits"][split][name] == index.total(name, split)
    assert facts["index_sha256"] == index.sha256


def test_show_gives_the_bytes_of_any_document(forge, tmp_path: Path, make_parquet) -> None:
    texts = [f"document {n} — \u00fc\n" for n in range(40)]
    source, out = make_parquet(tmp_path / "a.parquet", texts), tmp_path / "out"
    forge("prep", "tokenize", source, "--out", out, "--val-fraction", 0.3, "--workers", 1)
    index = shards.load_index(out)
    shown = set()
    for split in shards.SPLITS:
        last = index.total("num_documents", split) - 1
        for number in (0, last):
            result = forge("prep", "show", out, number, "--split", split, "--tokens")
            assert result.exit_code == 0
            shown.add(result.stdout_bytes)
            ids = [int(word) for word in result.stderr.splitlines()[1].split()]
            assert tokenizer.decode(ids) + b"\n" == result.stdout_bytes
        beyond = forge("prep", "show", out, last + 1, "--split", split)
        assert beyond.exit_code == 1
        assert f"the last is {last:,}" in beyond.stderr
    assert len(shown) == 4
    assert shown <= {text.encode() + b"\n" for text in texts}


def test_verify_is_exit_code_0_or_1(forge, small_shards: Path, tmp_path: Path) -> None:
    sound = forge("prep", "verify", small_shards)
    assert sound.exit_code == 0
    assert sound.stdout.startswith("Sound: ")
    copy = Path(shutil.copytree(small_shards, tmp_path / "copy"))
    with (copy / "train_000000.bin").open("r+b") as file:
        file.seek(3000)
        file.write(b"\1\1")
    assert_error(forge("prep", "verify", copy), "1 problem:", "train_000000.bin: checksum")
    with (copy / "train_000000.bin").open("r+b") as file:
        file.seek(shards.HEADER.size + 2)
        file.write(b"\xff\xff")
    assert_error(forge("prep", "show", copy, 0), "token 65535 is outside the vocabulary")
    report = forge("prep", "verify", copy, "--json")
    assert report.exit_code == 1
    assert len(json.loads(report.stdout)["problems"]) == 2


def test_the_folder_is_named_after_the_source() -> None:
    assert default_name("HuggingFaceTB/smollm-corpus", "fineweb-edu-dedup") == "fineweb-edu-dedup"
    assert default_name("a/b/books.jsonl.zst", None) == "books"
    assert default_name("a/books/*/x*.jsonl.gz", None) == "books"
    assert default_name("*.txt", None) == Path.cwd().name
    assert default_name("books/", None) == "books"


def test_a_real_process_is_quiet_off_a_terminal_and_needs_no_hub_library(
    source: Path, tmp_path: Path
) -> None:
    """Its stderr is empty, and a local source never imports `datasets` (seconds of start-up)."""
    program = (
        "import sys; from pipeline.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'datasets', 'huggingface_hub', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", program, "tokenize", source, "--out", tmp_path / "out"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""


def test_the_next_command_fits_the_number_of_tokens(forge, source: Path, tmp_path) -> None:
    made = forge("prep", "tokenize", source, "--out", tmp_path / "out")
    assert "one split is empty" in made.stdout
    for train, val, says in (
        (10**8, 2**15, "forge-train forge_tiny --data {} --check"),
        (10**8, 2**21, "forge-train forge_124m --data {} --check"),
    ):
        assert says.format(tmp_path) in next_commands(tmp_path, holding(train, val))
    assert "--data 'my folder'" in next_commands(Path("my folder"), holding(10**8, 2**21))


def holding(train: int, val: int) -> shards.Index:
    """An index of that many tokens."""
    made = {"train": train, "val": val}
    each = tuple(shards.Shard("x", s, n, 9, n, "", 0) for s, n in made.items())
    return shards.Index(Path(), {}, {}, {}, {}, {}, each)


def test_a_text_file_that_stays_one_document_is_said_to_be_one(forge, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("A story.\n<|endoftext|>\nA second one.\n")
    made = forge("prep", "tokenize", text, "--out", tmp_path / "out")
    assert "forge-train needs two documents or more" in made.stdout
    assert "--split-on names how some of its lines begin" in made.stdout
    assert "book.txt holds <|endoftext|> as plain text" in made.stderr
    out = tmp_path / "cut"
    cut = forge("prep", "tokenize", text, "--out", out, "--split-on", "<|endoftext|>", "--json")
    assert json.loads(cut.stdout)["num_documents"] == 2
    assert cut.stderr == ""
    assert forge("prep", "tokenize", ROOT, "--split-on", "x").exit_code != 0


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc": "0::/a\n", "a/cpu.max": "150000 100000\n"}, 2),
        ({"proc": "0::/a/b\n", "a/b/cpu.max": "max 100000\n", "a/cpu.max": "100000 100000"}, 1),
        ({"proc": "0::/\n", "cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc": "4:cpu:/x\n",
                "cpu/cpu.cfs_quota_us": "300000",
                "cpu/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        ({"proc": "0::/\n", "cpu.max": "max 100000\n"}, 8),
    ],
)
def test_workers_follow_the_quota_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(command, "CGROUPS", (tmp_path, tmp_path / "proc"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert command.cores() == cores


def test_files_of_other_kinds_are_named_and_hidden_ones_are_not_read(forge, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl.xz", ".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl"):
        (folder / name).write_text('{"text": "some text"}\n')
    made = forge("prep", "tokenize", folder, "--out", tmp_path / "out", "--json")
    assert json.loads(made.stdout)["num_documents"] == 1
    assert json.loads(made.stdout)["num_files_not_read"] == 1
    assert made.stderr == "Not read: b.jsonl.xz\n"
    made = forge("prep", "tokenize", folder / "*", "--out", tmp_path / "glob")
    assert made.stderr == "Not read: b.jsonl.xz\n"
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text('{"text": "more text"}\n')
    made = forge("prep", "tokenize", folder, "--out", tmp_path / "of three", "--json")
    assert json.loads(made.stdout)["num_documents"] == 2
    assert made.stderr == "Not read: test.jsonl, b.jsonl.xz\n"


@pytest.mark.parametrize("option", ["--split", "--revision"])
def test_hub_options_are_refused_for_local_files(forge, source: Path, option: str) -> None:
    result = forge("prep", "tokenize", source, option, "test")
    assert result.exit_code == 2
    assert f"{option} is for a hub dataset" in result.stderr


def test_verify_of_a_folder_whose_extension_was_killed_says_that_more_is_on_its_way(
    forge, small_shards: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(small_shards, tmp_path / "copy"))
    (copy / shards.WORK_FOLDER).mkdir()
    sound = forge("prep", "verify", copy)
    assert sound.exit_code == 0
    assert "An unfinished run lies here" in sound.stdout


def test_index_takes_other_peoples_shards_as_they_are(
    forge, small_shards: Path, tmp_path: Path
) -> None:
    ours = shards.load_index(small_shards)
    for split in shards.SPLITS:
        (shard,) = ours.of(split)
        shutil.copy(small_shards / shard.file, tmp_path / f"fineweb_{split}_000001.bin")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    result = forge("prep", "index", tmp_path)
    assert result.exit_code == 0, result.output
    theirs = shards.load_index(tmp_path)
    for split in shards.SPLITS:
        for name in ("num_tokens", "num_documents", "text_bytes"):
            assert theirs.total(name, split) == ours.total(name, split)
    assert theirs.document_tokens == ours.document_tokens
    assert {p: p.read_bytes() for p in before} == before
    assert forge("prep", "verify", tmp_path).exit_code == 0
    assert forge("prep", "info", tmp_path).exit_code == 0
    assert_error(forge("prep", "index", tmp_path), "has an index already")


@pytest.mark.parametrize("shard_tokens", [10**8, 30])
def test_index_raw_moves_separators_to_the_front(
    forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_tokens: int
) -> None:
    """nanoGPT writes text, then <|endoftext|>; ours puts it first."""
    monkeypatch.setattr(foreign, "RAW_SHARD_TOKENS", shard_tokens)
    texts = [f"document {n} — text" for n in range(20)]
    ids = [tokenizer.encode(text) for text in texts]
    raw = [token for each in ids for token in [*each, shards.EOT_TOKEN]]
    for split in shards.SPLITS:
        (tmp_path / f"{split}.bin").write_bytes(np.array(raw, "<u2").tobytes())
    result = forge("prep", "index", tmp_path, "--raw")
    assert result.exit_code == 0, result.output
    index = shards.load_index(tmp_path)
    wanted = [token for each in ids for token in [shards.EOT_TOKEN, *each]]
    for split in shards.SPLITS:
        made = [shards.map_shard(tmp_path / s.file, s.num_tokens) for s in index.of(split)]
        assert (len(made) > 1) == (shard_tokens == 30)
        assert np.concatenate(made).tolist() == wanted
        assert index.total("num_documents", split) == 20
        assert index.total("text_bytes", split) == len("".join(texts).encode())
    assert forge("prep", "verify", tmp_path).exit_code == 0


def test_index_leaves_an_unfinished_run_alone(forge, tmp_path: Path, make_parquet) -> None:
    make_parquet(tmp_path / "a.parquet", ["a"])
    out = tmp_path / "out"
    assert forge("prep", "tokenize", tmp_path / "a.parquet", "--out", out).exit_code == 0
    (out / "index.json").unlink()
    verify.begin(out, {"source": {"kind": "txt"}, "tokenizer": tokenizer.describe()})
    result = forge("prep", "index", out)
    assert result.exit_code == 1
    assert "unfinished run of forge-prep tokenize" in result.output
    assert not (out / "index.json").exists()


def test_index_refuses_files_that_are_not_token_files(forge, tmp_path: Path) -> None:
    assert forge("prep", "index", tmp_path).exit_code == 1
    (tmp_path / "train.bin").write_bytes(b"\1\0" * 600)
    result = forge("prep", "index", tmp_path)
    assert_error(result, "not a shard", "need --raw")
    (tmp_path / "train.bin").write_bytes(b"\1\0" * 600 + b"\1")
    assert_error(forge("prep", "index", tmp_path, "--raw"), "half a token")
    assert not (tmp_path / shards.INDEX_FILE).exists()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("<u4", "every second token is 0"),
        (">u4", "every second token is 0"),
        ("<i8", "every second token is 0"),
        (">u2", "outside GPT-2's vocabulary|not GPT-2's tokens"),
        ("<f4", "outside GPT-2's vocabulary|not GPT-2's tokens"),
        ("characters", "not GPT-2's tokens"),
        ("u1", "not GPT-2's tokens|half a token"),
        ("other", "not GPT-2's tokens"),
        ("header", "leave --raw out"),
        ("out", "outside GPT-2's vocabulary"),
    ],
)
def test_index_raw_refuses_what_is_not_gpt_2s_tokens_and_leaves_nothing(
    forge, tmp_path: Path, documents, kind: str, says: str
) -> None:
    text = "\n".join(documents[:20])
    good = np.array([*tokenizer.encode(text), shards.EOT_TOKEN])
    others = np.random.default_rng(0).permutation(50256)
    bad = {
        "characters": lambda: np.unique(list(text), return_inverse=True)[1].astype("<u2"),
        "u1": lambda: np.frombuffer(text.encode(), "u1"),
        "other": lambda: others[good[:-1]].astype("<u2"),
        "header": lambda: np.array([20240520, 1, 2], "<i4"),
        "out": lambda: np.array([60000] * 9, "<u2"),
    }.get(kind, lambda: good.astype(kind))()
    good.astype("<u2").tofile(tmp_path / "train.bin")
    bad.tofile(tmp_path / "val.bin")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    result = forge("prep", "index", tmp_path, "--raw")
    assert_error(result)
    assert re.search(says, result.stderr)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert "--raw" in forge("prep", "info", tmp_path).stderr


def test_index_raw_takes_gpt_2s_tokens_without_a_separator(forge, tmp_path: Path) -> None:
    """nanoGPT's shakespeare/prepare.py writes none."""
    tokens = np.array(tokenizer.encode("To be, or not to be: that is the question.\n" * 50), "<u2")
    for split in shards.SPLITS:
        tokens.tofile(tmp_path / f"{split}.bin")
    assert forge("prep", "index", tmp_path, "--raw").exit_code == 0


def test_index_replaces_no_shard(forge, tmp_path: Path) -> None:
    for split in shards.SPLITS:
        np.array([5962, 3188, 50256] * 9, "<u2").tofile(tmp_path / f"{split}.bin")
    (tmp_path / "val_000000.bin").write_bytes(b"MY OTHER DATA")
    assert_error(forge("prep", "index", tmp_path, "--raw"), "not replaced")
    assert (tmp_path / "val_000000.bin").read_bytes() == b"MY OTHER DATA"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["x_test_0.bin", "eval_1.bin", "a-dev-2.bin", "heldout.bin"])
def test_index_takes_no_test_or_eval_file_for_training(forge, tmp_path: Path, name: str) -> None:
    writer = shards.ShardWriter(tmp_path / name)
    writer.write(np.array([50256, 5962, 3188] * 9, np.uint16))
    writer.commit()
    assert_error(forge("prep", "index", tmp_path), "test, eval, dev are not")
    shutil.copy(tmp_path / name, tmp_path / "edu_fineweb_latest_000001.bin")
    assert forge("prep", "index", tmp_path).exit_code == 0
    assert [shard.file for shard in shards.load_index(tmp_path).shards] == [
        "edu_fineweb_latest_000001.bin"
    ]
    assert forge("prep", "verify", tmp_path).exit_code == 0


def test_ctrl_c_is_one_clear_message_and_the_next_run_resumes(
    tmp_path: Path, make_parquet, forge, documents
) -> None:
    source = make_parquet(tmp_path / "a.parquet", documents * 400, rows=100)
    command = [sys.executable, "-m", "pipeline.cli", "tokenize", str(source)]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while not list((tmp_path / "out").glob(".work/train_*")):  # a slice is being written
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the workers as well
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "stopped by Ctrl-C" in output
    assert "Traceback" not in output
    result = forge("prep", "tokenize", source, "--out", tmp_path / "out", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert forge("prep", "verify", tmp_path / "out").exit_code == 0
