"""Real text in small amounts: Python's own documentation, as shards and as files."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import python_docs
from click.testing import CliRunner, Result

from pipeline import chatml, prepare, shards, sources, tokenizer
from pipeline.engines import Processes
from pipeline.sources import Options

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
HOSTILE = [
    "a<|endoftext|>b",
    "<|endoftext|>",
    " \u00a0\u2003\t\r\n\n  x  ",
    "it's I'LL we've 'tis 's''s",
    "naïve café — “quotes” … ½ ²",
    "中文字符 日本語テキスト 한국어 العربية עברית ไทย हिन्दी",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u200d\ufeff",
    "x" * 5000,
    " " * 3000 + "end",
    "\n" * 2000,
    "1234567890" * 300,
    "\x00\x01\x7f control",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # ok\n",
]
# Conversations that a small model learns by heart.
CONTEXT = 64
WHO = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A small model."},
]
HOW = [
    {"role": "user", "content": "How small?"},
    {"role": "assistant", "content": "Very small."},
]
SYSTEM = {"role": "system", "content": "Be loud."}
LOUD = {"role": "assistant", "content": "A SMALL MODEL!"}
LEARNED = [WHO, [*WHO, *HOW], [SYSTEM, WHO[0], LOUD], HOW]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: where two run at a time, none is left to run alone at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_ranks.py", "test_train.py"))


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Some 60 real documents, and hostile ones among them."""
    return [*python_docs.documents()[:60], *HOSTILE]


@pytest.fixture(scope="session")
def make_parquet() -> Callable[..., Path]:
    def make(path: Path, texts: list[str | None], rows: int = 7, column: str = "text") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({column: texts, "id": list(range(len(texts)))}), path, rows)
        return path

    return make


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., shards.Index]:
    def make(source: Path, folder: Path, workers: int = 1, **options: object) -> shards.Index:
        options = {"val_fraction": 0.2} | options
        found = sources.resolve(str(source))
        engine = Processes(workers)
        outcome = prepare.tokenize(found, folder, Options(**options), engine)  # type: ignore[arg-type]
        return outcome.index

    return make


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory, make_shards, make_parquet) -> Path:
    """A folder of shards of all of Python's prose: about 250,000 train and 70,000 val tokens."""
    root = tmp_path_factory.mktemp("small")
    texts = python_docs.documents()
    make_parquet(root / "source" / "a.parquet", texts[:200], rows=50)
    make_parquet(root / "source" / "b.parquet", texts[200:], rows=50)
    make_shards(root / "source", root / "shards")
    return root / "shards"


@pytest.fixture(scope="session")
def run(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps of a very small model, with checkpoints at 4 and 8. Not to be written to."""
    return trained(small_shards, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="session")
def modern_run(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the modern family, with Muon. Not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "modern"
    sizes = ("family=qwen3", "bias=false", "num_kv_heads=1", "head_size=24", "mlp_size=80")
    settings = [f"--set=model.{size}" for size in sizes]
    return trained(small_shards, folder, *settings, "--set=optimizer.name=muon")


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """A write beyond that size of a file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def trained(data: Path, folder: Path, *settings: str) -> Path:
    from test_train import QUICK

    from trainer.cli import main

    arguments = ["tiny", "--data", str(data), "--out", str(folder), *QUICK, *settings]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def chat_shards(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat folder: in both splits, the conversations of LEARNED, in a window each."""
    folder = tmp_path_factory.mktemp("chat")
    windows = []
    for messages in LEARNED:
        tokens = chatml.render(messages, tokenizer.encode)
        windows.append(tokens + [chatml.IM_END] * (CONTEXT - len(tokens)))
    tokens = np.array([*np.concatenate(windows), chatml.IM_END], np.uint16)
    index = shards.load_index(small_shards)
    made = []
    for split in shards.SPLITS:
        path = folder / f"{split}_000000.bin"
        writer = shards.ShardWriter(path)
        writer.write(tokens)
        checksum = writer.commit()
        made.append(shards.Shard(path.name, split, len(tokens), len(LEARNED), 0, checksum, 0))
    described = index.tokenizer | {"vocab_size": chatml.VOCAB_SIZE}
    raw = json.loads(replace(index, tokenizer=described, shards=tuple(made)).to_json())
    raw["chat"] = {"template": chatml.NAME, "context_length": CONTEXT, "splits": {}}
    (folder / shards.INDEX_FILE).write_text(json.dumps(raw))
    shutil.copy(small_shards / shards.VOCABULARY_FILE, folder)
    return folder


@pytest.fixture(scope="session")
def chat_run(run: Path, chat_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows LEARNED by heart, with a padded vocabulary. Not to be written to."""
    return tuned(run, chat_shards, tmp_path_factory.mktemp("runs") / "chat")


@pytest.fixture(scope="session")
def modern_chat_run(
    modern_run: Path, chat_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same of the modern family. Not to be written to."""
    return tuned(modern_run, chat_shards, tmp_path_factory.mktemp("runs") / "chat")


def tuned(base: Path, chat_shards: Path, folder: Path) -> Path:
    import torch
    import torch.nn.functional as F

    from trainer import checkpoint
    from trainer.model import build_model
    from trainer.run import DATA_FILE

    folder.mkdir()
    for name in (checkpoint.CONFIG_FILE, shards.VOCABULARY_FILE, "metrics.jsonl"):
        shutil.copy(base / name, folder)
    shutil.copy(chat_shards / shards.INDEX_FILE, folder / DATA_FILE)
    state = checkpoint.load_state(base, 8)
    state.model = replace(state.model, vocab_size=50304)
    model = build_model(state.model)
    model.init_weights(0)
    shard = chat_shards / "train_000000.bin"
    tokens = shards.map_shard(shard, len(LEARNED) * CONTEXT + 1)
    windows = np.stack([tokens[n * CONTEXT :][: CONTEXT + 1] for n in range(len(LEARNED))])
    inputs, targets = (torch.from_numpy(w.astype(np.int64)) for w in (windows[:, :-1], windows))
    targets = torch.where(torch.from_numpy(chatml.trained(windows)), targets, -100)[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        x = model.hidden(inputs).flatten(0, 1)
        is_trained = targets.flatten() >= 0
        loss = F.cross_entropy(model.logits(x[is_trained]), targets.flatten()[is_trained])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    checkpoint.save(folder, iter([dict(model.state_dict()), {}]), state)
    return folder


@pytest.fixture(params=["gpt2", "qwen3"])
def either_run(request: pytest.FixtureRequest) -> Path:
    """A run of either family."""
    name = "run" if request.param == "gpt2" else "modern_run"
    found: Path = request.getfixturevalue(name)
    return found


@pytest.fixture(scope="session")
def forge() -> Callable[..., Result]:
    """Run one of the programs in this process: forge("prep", "info", DIR)."""

    def run(program: str, *arguments: object) -> Result:
        import pipeline.cli
        import sampler.cli
        import trainer.cli

        commands = {
            "prep": pipeline.cli.main,
            "train": trainer.cli.main,
            "sample": sampler.cli.sample,
            "export": sampler.cli.export,
            "eval": sampler.cli.evaluate,
            "report": sampler.cli.report,
        }
        return CliRunner().invoke(commands[program], [str(a) for a in arguments])

    return run


@pytest.fixture
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(
        ranks: int, *arguments: object, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *launcher, "-m", "trainer.cli", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False
        )

    return run


def metrics_of(run: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]
