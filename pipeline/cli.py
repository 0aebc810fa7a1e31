"""forge-prep: the offline stage's command line. Decorators, one call each, one error handler."""

import contextlib
import functools
import glob
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.command import Count, ForgeCommand, counted
from pipeline.errors import ForgeError

# Before numpy: its BLAS, which nothing here calls, would spin with a thread a core in each process.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def next_commands(folder: Path, index: Any) -> str:
    """What to type next, with a config that the shards are enough for."""
    train, val = (index.total("num_tokens", split) for split in ("train", "val"))
    config = "gpt2" if min(train, val) > 2**20 else "tiny"  # gpt2 validates on a million
    quoted, most = shlex.quote(str(folder)), max(0, val - 1) // 128 * 128  # tiny's context
    advice = f"forge-train {config} --data {quoted} --check"
    if index.total("num_documents") == 1:
        advice = "a document is never split, and forge-train needs two; --split-on cuts a .txt"
    elif not most:
        advice = "too few val tokens, even for the config tiny: tokenize more text, "
        advice += "or start again with a larger --val-fraction and --overwrite"
    elif train <= 1_024:  # tiny's step
        advice = "too few train tokens, even for the config tiny: tokenize more text"
    elif most < 8_192:  # tiny validates on as many
        advice += f" --set evaluate.num_tokens={most}"
    return f"Look:  forge-prep info {quoted}\nTrain: {advice}"


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


class ForgeGroup(click.Group):
    command_class = ForgeCommand


@click.group(cls=ForgeGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llm-forge")
def main() -> None:
    """Turn text into shards of tokens, once; then train from them as often as you like.

    \b
    Typical use:
      forge-prep tokenize HuggingFaceTB/smollm-corpus --config fineweb-edu-dedup --max-tokens 10B
      forge-prep info data_cache/fineweb-edu-dedup
    """


A_PATH = click.Path(path_type=Path)
DIR = click.argument("folder", metavar="DIR", type=A_PATH)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
shown = functools.partial(click.option, show_default=True)


@main.command()
@click.argument("source")
@click.option(
    "--out",
    type=A_PATH,
    help="Folder for the shards.  [default: data_cache/NAME, after the config or the source]",
)
@click.option("--config", help="Config of a hub dataset, such as fineweb-edu-dedup.")
@shown("--split", default="train", help="Split of a hub dataset.")
@click.option("--revision", help="Branch, tag or commit of a hub dataset; the commit is recorded.")
@shown("--text-column", default="text", help="Column or key of the text.")
@click.option(
    "--max-tokens",
    type=Count(),
    help="Stop after this many training tokens (10B, 500M). A larger number extends the folder.",
)
@shown(
    "--val-fraction",
    default=0.005,
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of the documents held out, by the hash of their text.",
)
@shown("--shard-tokens", default="10M", type=Count(), help="Tokens in a train shard, roughly.")
@click.option("--min-score", type=float, help="Drop documents with a lower score, or none.")
@click.option(
    "--split-on",
    metavar="TEXT",
    help="Start a new document of a .txt file at each line that begins with TEXT, such as "
    "'CHAPTER' or '<|endoftext|>'; '' means at blank lines.",
)
@shown(
    "--on-error",
    default="stop",
    type=click.Choice(["stop", "skip"]),
    help="Stop at a damaged file, row group, line or text, or leave it out and count it.",
)
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: one per core]")
@click.option("--overwrite", is_flag=True, help="Remove forge-prep's shards in the folder first.")
@click.option("--keep-downloads", is_flag=True, help="Keep a hub dataset's files, in downloads/.")
@AS_JSON
def tokenize(
    source: str,
    out: Path | None,
    on_error: str,
    workers: int | None,
    overwrite: bool,
    keep_downloads: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Tokenize SOURCE into a folder of shards.

    SOURCE is a .parquet, .jsonl, .json (JSON Lines; also .gz, .zst) or .txt file, a folder or a
    quoted glob of such files, or the id of a hub dataset. Each line of JSON Lines is a document. A
    .txt file is one document, unless --split-on cuts it.

    After a stop or a kill, the same command resumes, and ends with the same bytes. When the source
    has more files, or --max-tokens is larger, it extends a finished folder.

    \b
    Examples:
      forge-prep tokenize HuggingFaceTB/smollm-corpus --config fineweb-edu-dedup --max-tokens 10B
      forge-prep tokenize 'books/*.jsonl.zst' --out data_cache/books --text-column body
    """
    from pipeline.prepare import tokenize
    from pipeline.sources import Options, resolve, with_marker

    hub = {name: options.pop(name) for name in ("config", "split", "revision")}
    resolved = resolve(source, **hub)
    given = click.get_current_context().get_parameter_source
    for name in hub:
        if not resolved.hub and given(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} is for a hub dataset, and {source} is not one")
    if options["split_on"] is not None and resolved.kind != "txt":
        raise click.UsageError(f"--split-on is for .txt files; {source} holds {resolved.kind}")
    if others := resolved.not_read:
        more = f" and {len(others) - 3} more" * (len(others) > 3)
        click.echo(f"Not read, of other kinds: {', '.join(others[:3])}{more}", err=True)
    if options["split_on"] is None and resolved.kind == "txt" and (marked := with_marker(resolved)):
        hint = "--split-on '<|endoftext|>' makes documents of its pieces"
        click.echo(f"{marked} holds <|endoftext|> as plain text: {hint}.", err=True)
    folder = out or Path("data_cache") / default_name(source, hub["config"])
    with ProgressBar() as bar:
        outcome = tokenize(
            resolved,
            folder,
            Options(**options),
            workers=workers or cores(),
            overwrite=overwrite,
            keep_downloads=keep_downloads,
            skip_errors=on_error == "skip",
            on_progress=bar.update,
        )
    if as_json:
        summary = {"folder": str(folder), "num_files_not_read": len(resolved.not_read)}
        click.echo(json.dumps(summary | outcome.summary()))
    else:
        report(folder, outcome, options["max_tokens"])


def report(folder: Path, outcome: Any, max_tokens: int | None) -> None:
    """Say how a prepare.Outcome ended."""
    facts, skipped = outcome.summary(), outcome.index.skipped
    if outcome.up_to_date:
        click.echo(f"{folder} is up to date.")
    else:
        speeds = (n / 1e6 / outcome.seconds for n in (outcome.new_bytes, outcome.new_tokens))
        text = "{:.0f} MB/s of text, {:.1f} M tokens/s".format(*speeds)
        click.echo(f"Done in {outcome.seconds:.1f} s: {text}.")
    num_blank = skipped["null_documents"] + skipped["empty_documents"]
    click.echo(
        f"{facts['num_train_tokens']:,} train + {facts['num_val_tokens']:,} val tokens of "
        f"{counted(facts['num_documents'], 'document')} in "
        f"{counted(len(outcome.index.shards), 'shard')}; "
        f"{counted(num_blank, 'null or empty document')} skipped."
    )
    if low := skipped.get("low_score_documents"):
        click.echo(f"{counted(low, 'document')} below --min-score, or without a score, dropped.")
    for place in skipped.get("damaged", []):
        click.echo(f"Left out, damaged: {place}")
    if (more := skipped.get("num_damaged", 0) - len(skipped.get("damaged", []))) > 0:
        click.echo(f"And {more:,} more.")
    if facts["num_train_tokens"] < (max_tokens or 0):
        click.echo(f"The source has no more: fewer than --max-tokens, {max_tokens:,}.")
    click.echo(next_commands(folder, outcome.index))


@main.command()
@DIR
@AS_JSON
def info(folder: Path, as_json: bool) -> None:
    """Show what a folder of shards holds.

    Also how many epochs of it each config's budget makes.
    """
    from pipeline import info, shards

    index = shards.load_index(folder)
    click.echo(json.dumps(info.summarize(index), indent=2) if as_json else info.render(index))


@main.command()
@DIR
@click.argument("document", type=click.IntRange(0))
@click.option("--split", type=click.Choice(["train", "val"]), default="train", show_default=True)
@click.option("--tokens", is_flag=True, help="Show the token ids too.")
def show(folder: Path, document: int, split: str, tokens: bool) -> None:
    """Print one document of a folder of shards.

    DOCUMENT is its number, from 0.
    """
    from pipeline import info, shards, tokenizer

    shard, start, ids = info.find_document(shards.load_index(folder), split, document)
    found = f"{len(ids):,} tokens, at token {start:,} of {shard.file}"
    click.echo(f"{split} document {document:,}: {found}", err=True)
    if tokens:
        click.echo(" ".join(map(str, ids.tolist())), err=True)
    sys.stdout.buffer.write(tokenizer.decode(ids) + b"\n")


@main.command()
@DIR
@click.option("--workers", type=click.IntRange(1), help="Threads.  [default: one per core]")
@AS_JSON
def verify(folder: Path, workers: int | None, as_json: bool) -> None:
    """Check every byte of a folder of shards.

    Finds flipped bits; truncated, missing and unlisted shards; tokens outside the vocabulary; wrong
    document counts. The exit code is 1 when anything is wrong.
    """
    from pipeline import shards
    from pipeline.verify import verify

    index = shards.load_index(folder)
    total = shards.TOKEN_BYTES * index.total("num_tokens")
    with ProgressBar(total) as bar:
        problems = verify(index, workers or cores(), bar.add)
    if as_json:
        facts = {"folder": str(folder), "num_shards": len(index.shards), "num_bytes": total}
        click.echo(json.dumps(facts | {"problems": problems}))
    if problems:
        fix = "restore those files, or make the folder again: forge-prep tokenize --overwrite"
        what = "\n  ".join([f"{counted(len(problems), 'problem')}:", *problems])
        raise ForgeError(what, where=folder, fix=fix)
    if not as_json:
        click.echo(f"Sound: {counted(len(index.shards), 'shard')}, {total / 1e9:.3f} GB.")
        if (folder / shards.WORK_FOLDER).exists():
            click.echo(
                "An unfinished run lies here, too: its forge-prep tokenize command finishes it."
            )


@main.command()
@DIR
@click.option(
    "--raw", is_flag=True, help="Take nanoGPT's train.bin and val.bin, which have no header."
)
def index(folder: Path, raw: bool) -> None:
    """Make an index for other people's GPT-2 token files.

    DIR holds llm.c or modded-nanogpt shards (fineweb_train_*.bin, fineweb_val_*.bin), which stay as
    they are; or, with --raw, nanoGPT's train.bin and val.bin, which are copied into shards.
    """
    from pipeline import foreign

    made = foreign.index_folder(folder, raw)
    train, val = (made.total("num_tokens", split) for split in ("train", "val"))
    shard_count = counted(len(made.shards), "shard")
    click.echo(f"{train:,} train + {val:,} val tokens in {shard_count}.")
    click.echo(next_commands(folder, made))


@main.command("python-docs")
@click.argument("file", type=A_PATH)
def python_docs(file: Path) -> None:
    """Write Python's own documentation to FILE, to try things.

    1.4 MB and more of JSON Lines, without a download.
    """
    from pipeline import pydocs

    click.echo(
        f"{counted(pydocs.write(file), 'document')}, {file.stat().st_size / 1e6:.1f} MB: {file}"
    )


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


class ProgressBar:
    """tqdm by bytes on a terminal, silent elsewhere."""

    def __init__(self, total: int | None = None) -> None:
        from tqdm import tqdm

        self.start_bytes = -1
        width = min(110, shutil.get_terminal_size().columns)
        look = {"unit": "B", "unit_scale": True, "ncols": width, "smoothing": 0.1, "leave": False}
        self.bar = tqdm(total=total, disable=None, **look)
        self.add = self.bar.update

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, progress: Any) -> None:
        """Show a prepare.Progress. The clock starts with the first text."""
        if self.bar.disable:
            return
        if self.start_bytes in (-1, progress.done_bytes):
            self.start_bytes = self.bar.initial = progress.done_bytes
            self.bar.reset(progress.total_bytes)
        self.bar.n, self.bar.total = progress.done_bytes, progress.total_bytes
        self.bar.set_postfix_str(f"{progress.num_tokens / 1e6:,.1f} M tokens", refresh=False)
        self.bar.refresh()


if __name__ == "__main__":
    main()
