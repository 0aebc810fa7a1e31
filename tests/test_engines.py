"""Laws of the engines: a Ray cluster gives the bytes of one machine, whatever dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest
from benchmarks import kill_prep
from conftest import ROOT
from hub import Hub

from pipeline import engines, merge, prepare, shards, sources
from pipeline.engines import Processes, Ray
from pipeline.errors import ForgeError
from pipeline.slices import Job
from pipeline.sources import Options, Slice

OPTIONS = Options(val_fraction=0.1, shard_tokens=500_000)
LIMITED = Options(val_fraction=0.1, shard_tokens=500_000, max_tokens=5_000_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> sources.Source:
    """Some 24 slices of 2 MB of text."""
    path = tmp_path_factory.mktemp("text") / "text.parquet"
    kill_prep.write_source(path, num_slices=48)
    return sources.resolve(str(path))


@pytest.fixture(scope="module")
def straight(source: sources.Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What processes of this machine make of it."""
    folder = tmp_path_factory.mktemp("straight")
    for name, options in (("whole", OPTIONS), ("limited", LIMITED)):
        prepare.tokenize(source, folder / name, options, Processes(2))
    assert len(list((folder / "whole").glob("train_*.bin"))) >= 20
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster with one machine of one CPU, on loopback."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "node_ip_address": "127.0.0.2"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


def grow(cluster: Any, count: int) -> None:
    """Add machines until there are so many."""
    for number in range(len(cluster.list_all_nodes()) + 2, count + 2):
        cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number}")


def made_at(folder: Path) -> dict[str, int]:
    """The train shards of finished slices, and when they were made."""
    if (folder / shards.INDEX_FILE).exists():
        return {p.name: p.stat().st_mtime_ns for p in folder.glob("train_*.bin")}
    return kill_prep.records(folder)


@pytest.mark.parametrize("machines", [1, 2])
def test_a_cluster_gives_the_bytes_of_one_machine(
    source: sources.Source, straight: Path, tmp_path: Path, cluster: Any, machines: int
) -> None:
    grow(cluster, machines)
    seen: list[prepare.Progress] = []
    kind, options = ("whole", OPTIONS) if machines == 1 else ("limited", LIMITED)
    engine = Ray(cluster.address)
    out = tmp_path / "out"
    outcome = prepare.tokenize(source, out, options, engine, on_progress=seen.append)
    assert kill_prep.contents(out) == kill_prep.contents(straight / kind)
    assert [each.num_tokens for each in seen] == sorted(each.num_tokens for each in seen)
    if kind == "whole":
        assert seen[-1].num_tokens == outcome.index.total("num_tokens")
        assert seen[-1].done_bytes == seen[-1].total_bytes


def test_an_error_of_ours_arrives_as_itself_and_is_not_tried_again(
    tmp_path: Path, cluster: Any
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "sound"}\n{"text": 2}\n')
    found = sources.resolve(str(path))
    with pytest.raises(ForgeError) as caught:
        prepare.tokenize(found, tmp_path / "out", OPTIONS, Ray(cluster.address))
    assert type(caught.value).__module__ == "pipeline.errors"
    assert str(caught.value.where) == f"{path}, line 2"
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_a_driver_that_is_killed_resumes_and_makes_nothing_twice(
    source: sources.Source, straight: Path, tmp_path: Path, cluster: Any
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipeline.cli", "tokenize", source.root / source.name]
    command += ["--out", out, "--val-fraction", "0.1", "--shard-tokens", "500k"]
    command += ["--ray", cluster.address]
    with subprocess.Popen(list(map(str, command)), cwd=ROOT) as driver:
        while len(made_at(out)) < 5:
            assert driver.poll() is None
            time.sleep(0.002)
        driver.send_signal(signal.SIGKILL)
    finished = made_at(out)
    assert not (out / shards.INDEX_FILE).exists()
    done = subprocess.run(
        [*map(str, command), "--json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["up_to_date"] is False
    assert finished.items() <= made_at(out).items()
    assert kill_prep.contents(out) == kill_prep.contents(straight / "whole")


def test_ctrl_c_leaves_a_run_on_ray_to_be_resumed(
    source: sources.Source, straight: Path, tmp_path: Path, cluster: Any
) -> None:
    out = tmp_path / "out"

    def stop(progress: prepare.Progress) -> None:
        if len(made_at(out)) > 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(ForgeError, match="stopped by Ctrl-C"):
        prepare.tokenize(source, out, OPTIONS, Ray(cluster.address), on_progress=stop)
    assert not list(out.rglob("*.partial"))
    finished = made_at(out)
    prepare.tokenize(source, out, OPTIONS, Processes(2))
    assert finished.items() <= made_at(out).items()
    assert kill_prep.contents(out) == kill_prep.contents(straight / "whole")


def test_a_hub_dataset_is_made_in_parts_on_ray_and_beside_it(
    tmp_path: Path, make_parquet, make_shards, cluster: Any
) -> None:
    for n in range(4):
        texts = [f"document {n}.{row} of the dataset" for row in range(20)]
        make_parquet(tmp_path / "hub" / "data" / f"train-{n}.parquet", texts)
    out, name = tmp_path / "out", "somebody/corpus"
    command = [sys.executable, "-m", "pipeline.cli", "tokenize", name, "--out", out]
    command += ["--val-fraction", "0.2", "--shard-tokens", "1", "--workers", "1"]
    with Hub(name, tmp_path / "hub") as hub:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        settings |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        parts = [
            subprocess.Popen([*map(str, command), *more], cwd=ROOT, env=os.environ | settings)
            for more in (["--part", "1/2", "--ray", cluster.address], ["--part", "2/2"])
        ]
        assert [process.wait() for process in parts] == [0, 0]
    assert not list(out.rglob("*.parquet")), "downloads are removed behind a part"
    merge.merge(out)
    make_shards(tmp_path / "hub" / "da*" / "*.parquet", tmp_path / "local", shard_tokens=1)
    local, made = (kill_prep.contents(folder) for folder in (tmp_path / "local", out))
    assert len(made) > 8
    assert {n: made[n] for n in made if n != "index.json"} == {
        n: local[n] for n in local if n != "index.json"
    }


def test_a_folder_that_a_machine_does_not_have_is_named(tmp_path: Path) -> None:
    job = Job(Slice(0, (), OPTIONS), "jsonl", tmp_path, tmp_path / "out" / ".work")
    with pytest.raises(ForgeError, match=f"{socket.gethostname()} does not have") as caught:
        engines._make_on_ray(job)
    assert caught.value.where == job.work
    assert "share" in str(caught.value.fix)


def test_a_machine_that_is_lost_costs_only_what_it_was_making(
    source: sources.Source, straight: Path, tmp_path: Path, cluster: Any
) -> None:
    grow(cluster, 4)
    finished, lost = dict[str, int](), list[IO[bytes]]()

    def lose_one(progress: prepare.Progress) -> None:
        until = time.monotonic() + 1  # then the driver sends more slices out
        while not lost and len(made_at(out)) > 4 and time.monotonic() < until:
            if found := stop_a_worker(cluster, out):
                machine, worker, half_written = found
                lost.append(half_written)
                finished.update(made_at(out))
                cluster.remove_node(machine, allow_graceful=False)
                os.kill(worker, signal.SIGKILL)

    for attempt in range(20):  # until a worker was seen in mid-write
        out = tmp_path / f"out{attempt}"
        prepare.tokenize(source, out, OPTIONS, Ray(cluster.address), on_progress=lose_one)
        if lost:
            break
    assert os.fstat(lost[0].fileno()).st_nlink == 0, "that slice was made again"
    assert finished.items() <= made_at(out).items()
    assert kill_prep.contents(out) == kill_prep.contents(straight / "whole")


def stop_a_worker(cluster: Any, out: Path) -> tuple[Any, int, IO[bytes]] | None:
    """A machine, not the head; its worker, which is stopped; the file that it has half written."""
    for machine in cluster.list_all_nodes():
        raylet = machine.all_processes["raylet"][0].process.pid
        started = Path(f"/proc/{raylet}/task").glob("*/children") if not machine.is_head() else ()
        for worker in " ".join(path.read_text() for path in started).split():
            with suppress(OSError):  # it is closed by now
                for link in Path(f"/proc/{worker}/fd").iterdir():
                    if (path := link.readlink()).match(f"{out}/.work/train_*.partial"):
                        half_written = path.open("rb")
                        os.kill(int(worker), signal.SIGSTOP)
                        if path.exists():
                            return machine, int(worker), half_written
                        os.kill(int(worker), signal.SIGCONT)
    return None


def test_where_ray_is_not_installed_the_error_names_the_extra(
    source: sources.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ForgeError, match="Ray") as caught:
        prepare.tokenize(source, tmp_path / "out", OPTIONS, Ray("auto"))
    assert ".[ray]" in str(caught.value.fix)
    assert not (tmp_path / "out").exists()


def test_where_there_is_no_cluster_the_error_says_how_to_start_one(
    source: sources.Source, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ForgeError, match="cannot join a Ray cluster") as caught:
        prepare.tokenize(source, tmp_path / "out", OPTIONS, Ray("127.0.0.1:1"))
    assert "ray start --head" in str(caught.value.fix)
