"""The embedded default: English prose that every CPython carries, as documents.

Documents are the docstrings of each module of the standard library and pydoc's topics (the language
reference), of both the paragraphs that are prose. About 1.4 MB: enough to see the whole program
work, not to learn from.
"""

import ast
import contextlib
import json
import re
import sysconfig
from functools import cache
from pathlib import Path

from pipeline.errors import refusals

MIN_CHARACTERS = 200
NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@cache
def documents() -> tuple[dict[str, str], ...]:
    """All documents, as {"text", "id"}, in a fixed order for one version of Python."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if NOT_PROSE.isdisjoint(inside.parts):
            found[str(inside)] = docstrings(path)
    with contextlib.suppress(ImportError):  # some distributions leave it out
        from pydoc_data import topics

        found |= {f"topic {name}": text for name, text in sorted(topics.topics.items())}
    texts = {name: prose(text) for name, text in found.items()}
    return tuple(
        {"text": text, "id": name} for name, text in texts.items() if len(text) >= MIN_CHARACTERS
    )


def docstrings(path: Path) -> str:
    """All docstrings of a source file, in its order."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def prose(text: str) -> str:
    """The paragraphs of a text that are sentences, unwrapped; no code, tables or headings."""
    paragraphs = [p.strip("\n") for p in re.split(r"\n\s*\n", text)]
    kept = []
    for paragraph in paragraphs:
        unwrapped = " ".join(line.strip() for line in paragraph.splitlines())
        is_code = re.search(r">>>|::$|^[ *+-]{4,}|[=|~^-]{3,}", paragraph, re.MULTILINE)
        if re.fullmatch(r"[A-Z\"'(].*[.!?:]", unwrapped) and " " in unwrapped and not is_code:
            kept.append(unwrapped)
    return "\n\n".join(kept)


def write(path: Path) -> int:
    """Write the documents to a .jsonl file and return their number."""
    lines = [json.dumps(document, ensure_ascii=False) for document in documents()]
    with refusals("write", path, "name another FILE"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)
