"""English prose that every CPython carries, as documents: what the demo and the tests train on.

Documents are the docstrings of each module of the standard library and pydoc's topics (the language
reference), of both the paragraphs that are prose. About 1.4 MB: enough to see the whole program
work, not to learn from.

    python -m tests.python_docs FILE.jsonl
"""

import ast
import contextlib
import json
import re
import sys
import sysconfig
from functools import cache
from pathlib import Path

MIN_CHARACTERS = 200
NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@cache
def documents() -> tuple[str, ...]:
    """All documents, in a fixed order for one version of Python."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(library.rglob("*.py"))
    texts = [docstrings(p) for p in paths if NOT_PROSE.isdisjoint(p.relative_to(library).parts)]
    with contextlib.suppress(ImportError):  # some distributions leave it out
        from pydoc_data import topics

        texts += [text for _, text in sorted(topics.topics.items())]
    return tuple(text for text in map(prose, texts) if len(text) >= MIN_CHARACTERS)


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


def write(path: Path) -> None:
    """Write the documents to a file of JSON Lines."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
