"""What the command lines share: counts, cores, one message and exit code 1 for every failure."""

import contextlib
import io
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.errors import ForgeError, refusal

CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


class Count(click.ParamType[int]):
    """A whole number such as 250000, 500k, 2.5M, 10B or 1e9."""

    name = "count"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        plain = re.sub(r"_|(?<=\d),(?=\d{3}(?!\d))", "", str(value).lower())  # of thousands
        match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?(?:e\d\d?)?)([kmbt]?)", plain)
        number = round(float(match[1]) * COUNT_UNITS[match[2]]) if match else 0
        if number < 1:
            self.fail(f"{value!r} is not a count; write 250000, 500k, 2.5M, 10B or 1e9", param, ctx)
        return number


class FolderTokens(click.ParamType[tuple[Path, int | None]]):
    """A folder, or a folder and a count: DIR:500M."""

    name = "DIR[:TOKENS]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Path, int | None]:
        folder, colon, tokens = str(value).rpartition(":")
        if not colon or Path(value).is_dir():
            return Path(value), None
        return Path(folder), Count().convert(tokens, param, ctx)


def cores() -> int:
    """CPUs that this process may use: the machine's, or its container's quota."""
    count = float(len(os.sched_getaffinity(0)))
    (root, own), group = CGROUPS, ""
    with contextlib.suppress(OSError):
        group = own.read_text().rpartition("::")[2].strip().lstrip("/")
    for folder in [root / group, *(root / group).parents, root / "cpu"]:
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                quota, period = " ".join((folder / name).read_text() for name in names).split()
                count = min(count, float(quota) / float(period) if float(quota) > 0 else count)
    return max(1, math.ceil(count))


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
