"""ForgeError: what is wrong, where, and what to do about it.

Every failure that a user can cause or cure is one of these. A cli.py turns it into one message and
exit code 1; anything else that escapes is a bug of ours and shows its traceback.
"""


class ForgeError(Exception):
    """A failure with a cure.

    `what` is one sentence; `where` names the file, row, key or rank; `fix` says what to do next.
    """

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        lines = [what]
        if where is not None:
            lines.append(f"  where:      {where}")
        if fix is not None:
            lines.append(f"  what to do: {fix}")
        super().__init__("\n".join(lines))
