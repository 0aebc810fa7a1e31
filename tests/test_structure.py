"""Imports run one way, and one document can be followed through the whole program."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from pipeline import info, shards, tokenizer
from trainer.windows import Windows, permute

PACKAGES = ("pipeline", "trainer", "sampler")
ALLOWED = {
    "pipeline": {"pipeline"},
    "trainer": {
        "trainer",
        "pipeline.chatml",
        "pipeline.shards",
        "pipeline.errors",
        "pipeline.files",
        "pipeline.command",
    },
    "sampler": {
        "sampler",
        "trainer",
        "pipeline.chatml",
        "pipeline.shards",
        "pipeline.errors",
        "pipeline.files",
        "pipeline.tokenizer",
        "pipeline.command",
    },
}
FORBIDDEN = {
    "pipeline": {"torch"},
    "trainer": {"datasets", "tiktoken", "pyarrow", "gigatoken", "transformers"},
    "sampler": {"datasets", "pyarrow", "gigatoken", "transformers"},
}
# An export is checked with transformers where it is installed, inside one function.
EXCEPTIONS = {("export.py", "transformers")}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    for path in (ROOT / package).glob("*.py"):
        for name in imports(path):
            first = name.split(".")[0]
            is_forbidden = first in FORBIDDEN[package] and (path.name, first) not in EXCEPTIONS
            assert not is_forbidden, f"{path.name} imports {name}"
            if first in PACKAGES:
                allowed = any(name == a or name.startswith(f"{a}.") for a in ALLOWED[package])
                assert allowed, f"{path.name} imports {name}"


def test_no_module_imports_one_that_imports_it() -> None:
    paths = [path for package in PACKAGES for path in (ROOT / package).glob("*.py")]
    modules = {f"{path.parent.name}.{path.stem}": imports(path) for path in paths}
    graph = {
        module: {name for name in modules if any(f"{i}.".startswith(f"{name}.") for i in found)}
        for module, found in modules.items()
    }
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError
    assert [module for module in graph if "trainer.train" in graph[module]] == ["trainer.cli"]


def test_what_one_reads_at_a_time_is_short() -> None:
    """No file over 360 lines, no function but a kernel with 10 arguments, the loop in 45 lines."""
    for path in (path for package in PACKAGES for path in (ROOT / package).glob("*.py")):
        text = path.read_text()
        assert text.count("\n") <= 360, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                is_kernel = any("triton" in ast.unparse(d) for d in node.decorator_list)
                arguments = [a for a in node.args.args + node.args.kwonlyargs if a.arg != "self"]
                assert is_kernel or len(arguments) < 10, f"{path.name}: {node.name}"
                assert node.name != "run_steps" or node.end_lineno - node.lineno < 45


def test_packages_import_nothing_by_themselves() -> None:
    assert all((ROOT / p / "__init__.py").read_text() == "" for p in PACKAGES)


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    for module in ("pipeline.cli", "trainer.cli", "sampler.cli"):
        heavy = "('torch', 'pyarrow', 'datasets', 'transformers')"
        code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert done.stdout.strip() == "[]", module


def test_follow_one_token(tmp_path: Path, make_parquet, make_shards, forge) -> None:
    """README's walk: text -> tokens -> shard -> window -> micro-batch -> model -> text."""
    import torch

    from trainer.config import ModelConfig
    from trainer.model import GPT2

    text = "Fruits are good for you because they have vitamins. " * 30
    others = [f"Document {n}: " + "plain words that fill a window. " * 40 for n in range(9)]
    source = make_parquet(tmp_path / "source.parquet", [text, *others])
    index = make_shards(source, tmp_path / "shards", val_fraction=0.0)

    # The shard holds the document's tokens behind <|endoftext|>, and they decode to its bytes.
    shard, start, tokens = info.find_document(index, "train", 0)
    assert tokens.tolist() == tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text.encode()
    mapped = shards.map_shard(index.folder / shard.file, shard.num_tokens)
    assert mapped[start - 1] == shards.EOT_TOKEN

    # Its sixth token, " you", is target 5 of window 0, which comes once in an epoch.
    token = tokenizer.encode(" you")[0]
    assert mapped[start + 5] == token
    windows = Windows(index, "train", 32)
    order = permute(np.arange(windows.num_windows), windows.num_windows, (1337, 0))
    position = order.tolist().index(0)
    window = windows.read(order[position : position + 1])[0]
    inputs, targets = window[:-1], window[1:]
    assert targets[start + 4] == token == inputs[start + 5]

    # The model reads the inputs and gives a loss; what it would say decodes to text.
    model = GPT2(ModelConfig(num_layers=1, num_heads=2, embedding_size=16, context_length=32))
    model.init_weights(0)
    batch = [torch.from_numpy(x.astype(np.int64))[None] for x in (inputs, targets)]
    assert model(*batch).item() / batch[1].numel() == pytest.approx(np.log(50257), abs=0.1)
    said = model.logits(model.hidden(batch[0])).argmax(-1)[0].tolist()
    assert isinstance(tokenizer.decode(said).decode("utf-8", "replace"), str)
