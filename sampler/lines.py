"""Reads text files that have a prompt or a question on each line."""

from pathlib import Path

from pipeline.errors import ForgeError


def read_lines(path: Path, option: str, what: str) -> list[tuple[str, str]]:
    """(file and line number, line) of all lines that are not blank; ForgeError if there are none.

    For the message: `option` names the file, and each line is a `what`.
    """
    try:
        # Not splitlines(), which also splits at rarer characters. utf-8-sig drops the byte order
        # mark that Windows programs write.
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        problem = f"cannot read the {what}s: {getattr(error, 'strerror', None) or error}"
        fix = f"give {option} a text file in UTF-8, one {what} per line"
        raise ForgeError(problem, where=path, fix=fix) from error
    found = [(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ForgeError(f"the file has no {what}", where=path, fix="write one per line")
    return found
