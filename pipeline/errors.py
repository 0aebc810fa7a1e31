"""ForgeError (what is wrong, where, what to do) and the one translation of the machine's errors.

Every failure that a user can cause or cure is a ForgeError. A cli.py turns it into one message and
exit code 1; anything else that escapes is a bug of ours and shows its traceback.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class ForgeError(Exception):
    """`what` is one sentence; `where` names the file, row, key or rank; `fix` says what to do."""

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where is not None:
            lines.append(f"  where:      {where}")
        if fix is not None:
            lines.append(f"  what to do: {fix}")
        super().__init__("\n".join(lines))


class DamageError(ForgeError):
    """Damaged input: what a second read, on a good machine, would show again.

    Only this may be left out. Want of memory, a failing disk and the like are the machine's errors.
    """


def counted(count: int, noun: str) -> str:
    """1 file, 2 files."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


AGAIN = "run the same command again"
KEPT = "run the same command again; finished slices are kept"
_MEMORY = "use fewer --workers, or a machine with more memory"
_ADVICE = (
    ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    ((errno.EACCES, errno.EPERM, errno.EROFS), "get permission, or name another place"),
    ((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n), or use fewer --workers"),
    ((errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS), "name a place whose file system has locks"),
    ((errno.ENOMEM, errno.EAGAIN), _MEMORY),
    ((errno.EIO, errno.ESTALE, errno.ENXIO, errno.ETIMEDOUT, errno.EREMOTEIO), "check the disk"),
)


def refusal(
    error: OSError | MemoryError, doing: str, where: object, then: str = AGAIN
) -> ForgeError:
    """The one message for what the machine refuses, with advice that fits its cause.

    `doing` completes "cannot"; `then` is what to do afterwards.
    """
    if isinstance(error, MemoryError):
        what = f"not enough memory to {doing}"
        return ForgeError(what, where=str(where), fix=f"{_MEMORY}; {then}")
    fix = "; ".join([*(text for numbers, text in _ADVICE if error.errno in numbers), then])
    what = f"cannot {doing}: {error.strerror or error}"
    return ForgeError(what, where=str(error.filename or where), fix=fix)


@contextmanager
def refusals(doing: str, where: object, then: str = AGAIN) -> Iterator[None]:
    """Make a ForgeError of every error of the machine inside the block."""
    try:
        yield
    except (OSError, MemoryError) as error:
        raise refusal(error, doing, where, then) from error
