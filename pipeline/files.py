"""Files that appear whole or not at all, and the lock that keeps two programs out of one folder."""

import fcntl
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import ForgeError, refusal, refusals

OTHER_FOLDER = "choose another folder (--out)"
# What other people's files are for, by their lower-case names.
TRAINING = "(?<![a-z])train(ing)?(?![a-z])"
NOT_TRAINING = "(?<![a-z])(test|eval|dev|heldout|holdout)[a-z]*(?![a-z])"
VALIDATION = "(?<![a-z])val(id(ation)?)?(?![a-z])"


def partial_name(path: Path) -> Path:
    """Where to write what will be `path`: no other process, on any machine, writes there.

    So a writer that outlived its parent never touches the file of the one that replaced it.
    """
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


def write_whole(path: Path, data: bytes, wait_for_disk: bool = True) -> None:
    """Write a file, whole or not at all; also after a power cut, if the disk is waited for."""
    partial = partial_name(path)
    try:
        with partial.open("wb") as file:
            file.write(data)
            if wait_for_disk:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    if wait_for_disk:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def hold(
    folder: Path, program: str, wait_seconds: float = 0.0, shared: bool = False
) -> Iterator[None]:
    """Make `folder` and keep every other process that holds it out, until the block ends.

    With `shared`, only those that do not share it. `program` names what is writing, for the
    message; a process that is just ending is waited for. New folders that stay empty are removed.
    Raises ForgeError. Over a network, processes of other machines may not be kept out.
    """
    with refusals("make the folder", folder, OTHER_FOLDER):
        new = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with refusals("lock the folder", folder, OTHER_FOLDER):
            operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            _lock(descriptor, operation, folder, program, time.monotonic() + wait_seconds)
        if os.fstat(descriptor).st_nlink == 0:
            what = f"another {program} has just removed this folder"
            raise ForgeError(what, where=folder, fix="run the same command again")
        yield
    finally:
        with suppress(OSError):  # not empty
            for each in new:
                each.rmdir()
        os.close(descriptor)


def _lock(descriptor: int, operation: int, folder: Path, program: str, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                what = f"another {program} is writing this folder"
                fix = f"let it finish, or stop it; or {OTHER_FOLDER}"
                raise ForgeError(what, where=folder, fix=fix) from None
            time.sleep(0.1)


def own_names(folders: Iterable[str]) -> dict[str, str]:
    """What to call each folder: its own name, or the path where another has the same name."""
    names = {folder: Path(folder).name for folder in folders}
    counts = Counter(names.values())
    return {folder: name if counts[name] == 1 else folder for folder, name in names.items()}


def check_utf8(path: Path) -> None:
    """ForgeError if the path is not valid UTF-8, which safetensors and index.json require."""
    if os.fsencode(path).decode("utf-8", "ignore") != str(path):
        fix = "rename the folder or file whose name has the invalid character"
        raise ForgeError("the path is not valid UTF-8", where=repr(str(path)), fix=fix)


def files_in(folder: Path) -> Iterator[Path]:
    """All files below `folder`, through links, too, but no hidden ones (copies of editors)."""

    def fail(error: OSError) -> None:
        raise refusal(error, "read a folder of the source", folder) from error

    seen: dict[Path, str] = {}
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        before = seen.setdefault(Path(root).resolve(), root)
        if before != root:
            what = f"two ways through the source lead to one folder, the other is {before}"
            raise ForgeError(what, where=root, fix="remove the link, or name files with a glob")
        paths = (Path(root, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file() or not path.exists())  # broken links


def for_training(names: list[str]) -> list[str]:
    """The names without those of tests and validation, where any is named for training."""
    if not any(re.search(TRAINING, name.lower()) for name in names):
        return names
    others = re.compile(f"{NOT_TRAINING}|{VALIDATION}")
    return [n for n in names if re.search(TRAINING, n.lower()) or not others.search(n.lower())]
