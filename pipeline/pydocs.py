"""The embedded default: English prose that every CPython carries, as documents.

Before: nothing, which is the point: no download. After: sources.py reads the JSON Lines file.

Documents are pydoc's topics (the language reference), and for each module of the standard library
its docstrings in their order. About 2 MB; enough to see the whole program work, not to learn from.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MIN_CHARACTERS = 200
NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def documents() -> Iterator[dict[str, str]]:
    """Yield {"text", "id"} in a fixed order for one version of Python."""
    yield from library_docstrings()
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions leave it out
        return
    for name, text in sorted(topics.topics.items()):
        yield {"text": text.strip(), "id": f"topic {name}"}


def library_docstrings() -> Iterator[dict[str, str]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if NOT_PROSE.isdisjoint(path.relative_to(library).parts):
            text = "\n\n".join(docstrings(path))
            if len(text) >= MIN_CHARACTERS:
                yield {"text": text, "id": str(path.relative_to(library))}


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a source file, in the order of the file, each under its name."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                name = getattr(node, "name", None)
                yield f"{name}\n\n{text}" if name else text


def write(path: Path) -> int:
    """Write the documents to a .jsonl file and return their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(document, ensure_ascii=False) for document in documents()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)
