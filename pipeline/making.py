"""What forge-prep tokenize and chat share: their options, and the way to a folder of shards."""

import functools
import glob
import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from pipeline.command import Count, cores
from pipeline.errors import counted
from pipeline.terminal import progress_bar, report, show_progress

Command = Callable[..., Any]
A_PATH = click.Path(path_type=Path)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
shown = functools.partial(click.option, show_default=True)


class PartOfRun(click.ParamType[tuple[int, int]]):
    """A part of a run, such as 3/16."""

    name = "part"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(value))
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is not a part; write 1/16 to 16/16", param, ctx)
        return int(match[1]), int(match[2])


OF_A_SOURCE = (
    click.argument("source"),
    click.option(
        "--out",
        type=A_PATH,
        help="Folder for the shards.  [default: data_cache/NAME, after the config or the source]",
    ),
    click.option("--config", help="Config of a hub dataset, such as fineweb-edu-dedup."),
    shown("--split", default="train", help="Split of a hub dataset."),
    click.option("--revision", help="Branch, tag or commit of a hub dataset; it is recorded."),
    click.option(
        "--max-tokens",
        type=Count(),
        help="Stop after this many training tokens (10B, 500M). A larger number adds to a folder.",
    ),
    shown(
        "--on-error",
        default="stop",
        type=click.Choice(["stop", "skip"]),
        help="Stop at a damaged file, row group, line or text, or leave it out and count it.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1),
        help="Processes, or tasks at a time on Ray.  [default: one per core]",
    ),
    click.option(
        "--ray",
        is_flag=False,
        flag_value="auto",
        metavar="[ADDRESS]",
        help="Work on a Ray cluster whose machines share the folders; by default, this one's.",
    ),
    click.option(
        "--part",
        type=PartOfRun(),
        metavar="K/N",
        help="Make part K of N, for a scheduler that runs N commands; forge-prep merge ends it.",
    ),
    click.option("--overwrite", is_flag=True, help="Remove forge-prep's shards there first."),
    click.option("--keep-downloads", is_flag=True, help="Keep a hub dataset's files, downloads/."),
    AS_JSON,
)


def of_a_source(command: Command) -> Command:
    """Give a command SOURCE, and the options of all that make shards of one."""
    for each in reversed(OF_A_SOURCE):
        command = each(command)
    return command


def val_fraction(default: float, what: str) -> Callable[[Command], Command]:
    says = f"Share of the {what} held out, by the hash of their text."
    share = click.FloatRange(0, 1, max_open=True)
    return shown("--val-fraction", default=default, type=share, help=says)


def find(source: str, given: dict[str, Any]) -> Any:
    """The resolved SOURCE; says which files there are not read."""
    from pipeline.sources import resolve

    names = ("config", "split", "revision")
    found = resolve(source, **{name: given[name] for name in names})
    origin = click.get_current_context().get_parameter_source
    for name in names:
        if not found.hub and origin(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} is for a hub dataset, and {source} is not one")
    if others := found.not_read:
        more = f" and {len(others) - 3} more" * (len(others) > 3)
        click.echo(f"Not read: {', '.join(others[:3])}{more}", err=True)
    return found


def make(source: str, found: Any, options: Any, given: dict[str, Any]) -> None:
    """Make shards of a resolved SOURCE, or a part of them, and say what was made."""
    from pipeline import engines, prepare

    folder = given["out"] or Path("data_cache") / default_name(source, given["config"])
    part = given["part"]
    if part and given["max_tokens"]:
        what = "--part cannot stop at --max-tokens: where that is depends on the parts before it"
        raise click.UsageError(what)
    if part and given["overwrite"]:
        raise click.UsageError("--overwrite with --part would remove what the other parts made")
    engine: engines.Engine
    if given["ray"]:
        engine = engines.Ray(given["ray"], given["workers"])
    else:
        engine = engines.Processes(given["workers"] or cores())
    with progress_bar() as bar, redirect_stdout(sys.stderr):  # Ray speaks there of lost machines
        on_progress = functools.partial(show_progress, bar)
        how = {"keep_downloads": given["keep_downloads"], "on_progress": on_progress}
        how |= {"skip_errors": given["on_error"] == "skip"}
        if part:
            num_slices = prepare.tokenize_part(found, folder, options, engine, part, **how)
        else:
            how |= {"overwrite": given["overwrite"]}
            outcome = prepare.tokenize(found, folder, options, engine, **how)
    if not part:
        facts = {"num_files_not_read": len(found.not_read)}
        report(folder, outcome, given["as_json"], options.max_tokens, **facts)
    elif given["as_json"]:
        click.echo(json.dumps({"folder": str(folder), "part": part, "num_slices": num_slices}))
    else:
        click.echo(f"Part {part[0]} of {part[1]} is made: {counted(num_slices, 'slice')}.")
        click.echo(f"Once all parts are: forge-prep merge {shlex.quote(str(folder))}")


def default_name(source: str, config: str | None) -> str:
    """Name of the folder in data_cache/ when --out is not given."""
    if not config and glob.has_magic(source) and not Path(source).exists():
        parts = Path(source).parts  # of a glob: the folder above its first wildcard
        source = str(Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts)))
    name = config or Path(source.rstrip("/")).name
    if name in ("", ".", ".."):
        name = Path(source).resolve().name
    for suffix in (".gz", ".zst", ".parquet", ".jsonl", ".json", ".txt"):
        name = name.removesuffix(suffix)
    return re.sub(r"[^\w.-]+", "_", name).strip("_") or "shards"
