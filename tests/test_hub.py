"""Hub datasets against a hub on loopback: one commit, every file whole, on good days and on bad."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from conftest import ROOT
from hub import COMMIT, NEXT_COMMIT, Hub

from pipeline import shards, verify

DATASET = "somebody/corpus"
README = """---
configs:
- config_name: cosmopedia
  data_files: cosmopedia/*.parquet
- config_name: fineweb-edu-dedup
  data_files: fineweb-edu-dedup/train-*.parquet
---
# A corpus
"""
NAMES = [f"fineweb-edu-dedup/train-{n:05}-of-00004.parquet" for n in range(4)]
ORDER = sorted(NAMES, key=lambda name: xxhash.xxh3_64_intdigest(name.encode()))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, documents, make_parquet) -> Path:
    root: Path = tmp_path_factory.mktemp("dataset")
    (root / "README.md").write_text(README)
    make_parquet(root / "cosmopedia" / "train-0.parquet", ["another config"])
    for n, name in enumerate(NAMES):
        make_parquet(root / name, documents[n::4])
    return root


@pytest.fixture
def hub(dataset: Path) -> Iterator[Hub]:
    with Hub(DATASET, dataset) as served:
        yield served


# kill -9 of the program when a file has come and the first slice is finished.
KILL = """
import os, pathlib, time
is_whole = downloads.is_whole
def die(path, wanted):
    while str(path).endswith("{name}"):
        if list(pathlib.Path("{out}").glob(".work/[0-9]*.json")):
            os.kill(os.getpid(), 9)
        time.sleep(0.01)
    return is_whole(path, wanted)
downloads.is_whole = die
"""
Start = Callable[..., "subprocess.Popen[str]"]
Tokenize = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def start(hub: Hub, tmp_path: Path) -> Start:
    """forge-prep tokenize of the dataset, in a process of its own that knows this hub alone."""

    def start(
        *arguments: object,
        tries: int = 6,
        shard_tokens: int = 10_000_000,
        killed_at: str = "",
        **environment: str,
    ) -> subprocess.Popen[str]:
        program = (
            f"from pipeline import cli, downloads; downloads.DOWNLOAD_TRIES = {tries}\n"
            "downloads.FIRST_PAUSE_SECONDS = 0.05\n"
        )
        if killed_at:
            program += KILL.format(name=killed_at, out=tmp_path / "out")
        program += "cli.main()"
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        settings |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", program, "tokenize", DATASET]
        command += ["--config", "fineweb-edu-dedup", "--out", tmp_path / "out", *arguments]
        return subprocess.Popen(
            [
                *map(str, command),
                "--workers",
                "1",
                "--val-fraction",
                "0.2",
                "--shard-tokens",
                str(shard_tokens),
            ],
            env=os.environ | settings | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def tokenize(start: Start) -> Tokenize:
    def run(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
        process = start(*arguments, **settings)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    return run


@pytest.fixture(scope="module")
def local(dataset: Path, tmp_path_factory: pytest.TempPathFactory, make_shards) -> dict[str, bytes]:
    """The shards that the dataset's files make when they lie on the disk."""
    out = tmp_path_factory.mktemp("local")
    make_shards(dataset / "fineweb*" / "*.parquet", out)  # the names begin with the folder's
    return shard_bytes(out)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.bin")}


def test_a_hub_dataset_gives_the_shards_of_its_files_at_one_commit(
    tokenize: Tokenize, hub: Hub, local: dict[str, bytes], tmp_path: Path
) -> None:
    ran = tokenize(HF_TOKEN="hf_secret")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    index = shards.load_index(tmp_path / "out")
    assert index.source["hub"] == {
        "dataset": DATASET,
        "config": "fineweb-edu-dedup",
        "split": "train",
        "revision": COMMIT,
    }
    assert [file["name"] for file in index.source["files"]] == ORDER
    assert shard_bytes(tmp_path / "out") == local
    sent = {authorization for _, path, authorization in hub.requests if DATASET in path}
    assert sent == {"Bearer hf_secret"}, [r for r in hub.requests if r[2] is None]
    assert all(f"/{COMMIT}/" in path for name in NAMES for path in hub.downloads(name))
    assert not list(tmp_path.glob("out/**/*.parquet")), "downloads are removed behind the run"
    assert "hf_secret" not in (tmp_path / "out" / shards.INDEX_FILE).read_text()
    again = json.loads(tokenize("--json").stdout)
    assert again["up_to_date"] is True


def test_a_hub_that_cannot_be_reached_is_an_error_without_retries(tokenize: Tokenize) -> None:
    result = tokenize(HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: cannot resolve the hub dataset: ConnectError")
    assert "check the id (or path), --config and the network" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "nonsense"], "cannot resolve the hub dataset"),
        (["--split", "test"], "no split 'test' (it has train)"),
    ],
)
def test_what_the_hub_does_not_have_is_an_error(
    tokenize: Tokenize, arguments: list[str], says: str
) -> None:
    ran = tokenize(*arguments)
    assert ran.returncode == 1
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("layout", ["{}.parquet", "{}/0.parquet", "data/{}-00000-of-00001.parquet"])
def test_a_split_that_is_not_there_names_those_that_are_whatever_the_layout(
    tmp_path: Path, make_parquet, layout: str
) -> None:
    for split in ("train", "test"):
        make_parquet(tmp_path / "hub" / layout.format(split), ["some text"])
    (tmp_path / "hub" / "README.md").write_text("# a card without configs")
    with Hub(DATASET, tmp_path / "hub") as hub:
        ran = run_on(hub, tmp_path, "--split", "validation")
    assert ran.returncode == 1
    assert "no split 'validation' (it has train, test)" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_dataset_of_compressed_json_lines_is_read(tmp_path: Path) -> None:
    (tmp_path / "hub" / "en").mkdir(parents=True)
    name = "en/c4-train.00000-of-01024.json.gz"
    (tmp_path / "hub" / name).write_bytes(gzip.compress(b'{"text": "a b"}\n'))
    (tmp_path / "hub" / "README.md").write_text("# like C4")
    with Hub(DATASET, tmp_path / "hub") as hub:
        ran = run_on(hub, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert shards.load_index(tmp_path / "out").total("num_documents") == 1


def test_a_limited_run_reads_the_footers_of_the_files_that_it_needs(
    tmp_path: Path, make_parquet
) -> None:
    for n in range(40):
        make_parquet(tmp_path / "hub" / "data" / f"train-{n:05}-of-00040.parquet", ["a b"] * 300)
    (tmp_path / "hub" / "README.md").write_text("# many files")
    with Hub(DATASET, tmp_path / "hub") as hub:
        ran = run_on(hub, tmp_path, "--max-tokens", "100")
        asked = {path for _, path, _ in hub.requests if path.endswith(".parquet")}
    assert ran.returncode == 0, ran.stderr
    assert len(asked) == 1


def run_on(hub: Hub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    settings |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "pipeline.cli", "tokenize", DATASET, *arguments]
    command += ["--out", str(tmp_path / "out"), "--workers", "1"]
    return subprocess.run(
        command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_bad_days_of_the_hub_change_no_byte(
    tokenize: Tokenize, hub: Hub, local: dict[str, bytes], tmp_path: Path
) -> None:
    faults: list[list[int | str]] = [["break", "break"], [429, 429], [503], ["change"]]
    hub.faults = dict(zip(NAMES, faults, strict=True))
    hub.faults[f"footer of {NAMES[0]}"] = [503, "break"]
    hub.faults[f"footer of {NAMES[1]}"] = [429]
    ran = tokenize("--keep-downloads")
    assert ran.returncode == 0, ran.stderr
    assert not any(hub.faults.values()), "every fault was met"
    assert [p.name for p in sorted(tmp_path.glob("out/downloads/*/*.parquet"))] == [
        Path(name).name for name in NAMES
    ]
    assert tokenize("--keep-downloads", "--overwrite").returncode == 0
    assert shard_bytes(tmp_path / "out") == local


def test_a_file_that_stays_wrong_is_an_error_and_the_next_run_resumes(
    tokenize: Tokenize, hub: Hub, local: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults[NAMES[2]] = ["change"] * 99
    ran = tokenize(tries=2)
    assert ran.returncode == 1
    assert "do not have the hash that the hub lists" in ran.stderr
    assert NAMES[2] in ran.stderr
    assert "Traceback" not in ran.stderr
    hub.faults.clear()
    assert tokenize().returncode == 0
    assert shard_bytes(tmp_path / "out") == local


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [(401, 1, "cannot read from the hub"), ("change", 0, "Left out, damaged: " + NAMES[0])],
)
def test_skipping_what_is_damaged_skips_nothing_that_the_network_kept_back(
    tokenize: Tokenize, hub: Hub, tmp_path: Path, fault: int | str, code: int, says: str
) -> None:
    hub.faults[f"footer of {NAMES[0]}"] = [fault] * 9
    ran = tokenize("--on-error", "skip")
    assert ran.returncode == code, ran.stderr
    assert says in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    assert (tmp_path / "out" / shards.INDEX_FILE).exists() == (code == 0)


def test_ctrl_c_does_not_wait_for_a_download(start: Start, hub: Hub) -> None:
    hub.faults[NAMES[0]] = ["stall"]
    process = start(HF_HUB_DOWNLOAD_TIMEOUT="100")
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=40)
    assert process.returncode == 1
    assert stderr.startswith("Error: stopped by Ctrl-C")
    assert "Traceback" not in stderr


@pytest.fixture
def growing_hub(dataset: Path, tmp_path: Path) -> Iterator[Hub]:
    """The dataset without its last two files, which come with the next commit."""
    folder = shutil.copytree(dataset, tmp_path / "repository")
    for name in NAMES[2:]:
        (folder / name).unlink()
    with Hub(DATASET, folder) as served:
        yield served


def grow(hub: Hub, dataset: Path) -> None:
    for name in NAMES[2:]:
        shutil.copy(dataset / name, hub.folder / name)
    hub.commit = NEXT_COMMIT


def test_a_newer_commit_with_more_files_extends_the_folder_after_a_kill_too(
    growing_hub: Hub, dataset: Path, local: dict[str, bytes], tmp_path: Path, tokenize: Tokenize
) -> None:
    hub, out = growing_hub, tmp_path / "out"
    settings: dict[str, Any] = {"shard_tokens": 200, "HF_ENDPOINT": hub.endpoint}
    assert tokenize(**settings).returncode == 0
    first = {p.name: p.stat().st_mtime_ns for p in out.glob("train_*.bin")}
    kept = dict(sorted(first.items())[:-1])
    grow(hub, dataset)
    hub.requests.clear()
    new = [name for name in ORDER if name in NAMES[2:]]
    killed = tokenize(killed_at=new[1], **settings)
    assert killed.returncode == -signal.SIGKILL
    assert verify.verify(shards.load_index(out), 1, lambda count: None) == [], "still whole"
    finished = finished_slices(out)
    assert finished
    done = tokenize(**settings)
    assert done.returncode == 0, done.stderr
    now = {p.name: p.stat().st_mtime_ns for p in out.glob("train_*.bin")}
    assert now.items() > (kept | finished).items()
    before = [name for name in ORDER if name in NAMES[:2]]
    assert not hub.downloads(before[0]), "old files are not fetched again, but the last slice's"
    index = shards.load_index(out)
    assert index.source["hub"]["revision"] == NEXT_COMMIT
    assert [file["name"] for file in index.source["files"]] == before + new
    assert documents_of(shard_bytes(out)) == documents_of(local)
    assert verify.verify(index, 1, lambda count: None) == []
    assert json.loads(tokenize("--json", **settings).stdout)["up_to_date"]
    assert not (out / ".work").exists()


def finished_slices(out: Path) -> dict[str, int]:
    """The train shards of an unfinished run's finished slices, and when they were made."""
    made = [out / ".work" / f"train_{record.stem}.bin" for record in out.glob(".work/[0-9]*.json")]
    return {path.name: path.stat().st_mtime_ns for path in made if path.exists()}


def documents_of(files: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """All documents with their side, as bytes of tokens, in any order."""
    found = []
    for name, data in files.items():
        tokens = np.frombuffer(data, "<u2", offset=shards.HEADER.size)
        for document in np.split(tokens, np.flatnonzero(tokens == shards.EOT_TOKEN))[1:]:
            found.append((name.partition("_")[0], document.tobytes()))
    return sorted(found)


def test_a_commit_between_two_runs_keeps_what_did_not_change(
    growing_hub: Hub, dataset: Path, local: dict[str, bytes], tmp_path: Path, tokenize: Tokenize
) -> None:
    hub, out = growing_hub, tmp_path / "out"
    second = [name for name in ORDER if name in NAMES[:2]][1]
    killed = tokenize(killed_at=second, shard_tokens=200, HF_ENDPOINT=hub.endpoint)
    assert killed.returncode == -signal.SIGKILL
    finished = finished_slices(out)
    assert finished
    grow(hub, dataset)
    done = tokenize(HF_ENDPOINT=hub.endpoint, shard_tokens=200)
    assert done.returncode == 0, done.stderr
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert shards.load_index(out).source["hub"]["revision"] == NEXT_COMMIT
    assert documents_of(shard_bytes(out)) == documents_of(local)


def test_the_slice_that_is_made_again_for_max_tokens_still_has_its_file(
    tokenize: Tokenize, hub: Hub, tmp_path: Path, dataset: Path, make_shards
) -> None:
    """It is the last one of the first file, all of whose slices were finished once."""
    whole = make_shards(dataset / ORDER[0], tmp_path / "one").total("num_tokens", "train")
    ran = tokenize("--max-tokens", whole - 10, shard_tokens=200)
    assert ran.returncode == 0, ran.stderr
    assert whole - 10 <= shards.load_index(tmp_path / "out").total("num_tokens", "train") <= whole
    fetched = [path for path in hub.downloads(ORDER[0]) if path.endswith(ORDER[0])]
    assert fetched
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_limited_run_takes_no_more_files_than_it_needs(
    tokenize: Tokenize, hub: Hub, tmp_path: Path
) -> None:
    ran = tokenize("--max-tokens", "100", shard_tokens=200)
    assert ran.returncode == 0, ran.stderr
    index = shards.load_index(tmp_path / "out")
    assert index.total("num_tokens", "train") >= 100
    whole = [
        path for method, path, _ in hub.requests if method == "HEAD" and path.endswith(".parquet")
    ]
    assert len(set(whole)) == 1
