"""How every program ends that fails: one message and exit code 1."""

import contextlib
import io
import sys
from typing import Any

import click

from pipeline.errors import ForgeError, refusal


class ForgeCommand(click.Command):
    """Turns a ForgeError, and what the system refuses, into one message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a model may write what a terminal cannot
        try:
            return super().invoke(ctx)
        except ForgeError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise  # nobody reads on: click ends quietly
            where = f"standard output{', or an open file' * _can_flush()}"
            raise click.ClickException(str(refusal(error, "read or write", where))) from error


def _can_flush() -> bool:
    """Whether standard output takes what it holds; else closes it, or Python tries at the end."""
    if sys.stdout is None:  # it was closed before we began
        return False
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return False
    return True
