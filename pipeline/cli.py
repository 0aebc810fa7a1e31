"""forge-prep: the offline stage's command line. Decorators, one call each, one error handler."""

import contextlib
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

from pipeline.command import ForgeCommand
from pipeline.errors import ForgeError

# Before numpy: its BLAS, which nothing here calls, would spin with a thread a core in each process.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


class Count(click.ParamType[int]):
    """A whole number such as 250000, 500k, 2.5M, 10B or 1e9."""

    name = "count"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        plain = re.sub(r"_|(?<=\d),(?=\d{3}(?!\d))", "", str(value).lower())  # of thousands
        match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?(?:e\d\d?)?)([kmbt]?)", plain)
        number = round(float(match[1]) * COUNT_UNITS[match[2]]) if match else 0
        if number < 1:
            self.fail(f"{value!r} is no count; write 250000, 500k, 2.5M, 10B or 1e9", param, ctx)
        return number


def next_commands(folder: Path, tokens: dict[str, int]) -> str:
    """What to type next, with a config that the shards are enough for."""
    config = "gpt2" if min(tokens.values()) > 2**20 else "tiny"  # gpt2 validates on a million
    quoted = shlex.quote(str(folder))
    train = f"Train: forge-train {config} --data {quoted} --check"
    most = max(0, tokens["val"] - 1) // 128 * 128  # tiny's context; it validates on 8,192
    if tokens["train"] <= 1_024 or not most:  # tiny's step
        split = "train" if most else "val"
        train = f"Train: too few {split} tokens, even for the config tiny: tokenize more text"
        train += ", or with a larger --val-fraction" * (split == "val")
    elif most < 8_192:
        train += f" --set evaluate.num_tokens={most}"
    return f"Look:  forge-prep info {quoted}\n{train}"


def cores() -> int:
    """CPUs that this process may use: of the machine, or of its container's quota."""
    count = float(len(os.sched_getaffinity(0)))
    root, own = Path("/sys/fs/cgroup"), "/"
    with contextlib.suppress(OSError, ValueError, IndexError):
        own = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
    group = root / own.lstrip("/")
    for folder in [group, *group.parents]:
        with contextlib.suppress(OSError, ValueError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = (
                    (folder / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period")
                )
            if float(quota) > 0:
                count = min(count, float(quota) / float(period))
    return max(1, math.ceil(count))


class ForgeGroup(click.Group):
    command_class = ForgeCommand


@click.group(cls=ForgeGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llm-forge")
def main() -> None:
    """Turn text into shards: tokenize once, offline; train from them as often as you like.

    \b
    Typical use:
      forge-prep tokenize HuggingFaceTB/smollm-corpus --config fineweb-edu-dedup --max-tokens 10B
      forge-prep info data_cache/fineweb-edu-dedup
    """


@main.command()
@click.argument("source")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the shards.  [default: data_cache/ and the name of the config or source]",
)
@click.option("--config", help="Config of a hub dataset, such as fineweb-edu-dedup.")
@click.option("--split", default="train", show_default=True, help="Split of a hub dataset.")
@click.option("--revision", help="Branch, tag or commit of a hub dataset; the commit is recorded.")
@click.option("--text-column", default="text", show_default=True, help="Column or key of the text.")
@click.option(
    "--max-tokens",
    type=Count(),
    help="Stop after so many training tokens (10B, 500M); the files are taken in a shuffled order.",
)
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.005,
    show_default=True,
    help="Share of the documents held out, by the hash of their text.",
)
@click.option(
    "--shard-tokens",
    type=Count(),
    default="10M",
    show_default=True,
    help="Tokens a shard, at most, about. Small sources get smaller shards; a text file is always "
    "one; compressed files make larger ones.",
)
@click.option(
    "--min-score",
    type=float,
    help="Drop documents whose metadata.int_score (or score) is lower, or null.",
)
@click.option(
    "--split-on",
    metavar="TEXT",
    help="Start a new document of a .txt file at each line that begins with TEXT: '' for blank "
    "lines, 'CHAPTER', '<|endoftext|>'.",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="At a damaged file, row group, line or text: stop, or leave it out and list it in "
    "index.json.",
)
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: one a core]")
@click.option("--overwrite", is_flag=True, help="Remove the shards in the folder first.")
@click.option(
    "--keep-downloads",
    is_flag=True,
    help="Keep the files of a hub dataset, in downloads/ of the folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def tokenize(
    source: str,
    out: Path | None,
    config: str | None,
    split: str,
    revision: str | None,
    text_column: str,
    max_tokens: int | None,
    val_fraction: float,
    shard_tokens: int,
    min_score: float | None,
    split_on: str | None,
    on_error: str,
    workers: int | None,
    overwrite: bool,
    keep_downloads: bool,
    as_json: bool,
) -> None:
    """Tokenize SOURCE into a folder of shards with an index.

    SOURCE is a .parquet, .jsonl, .jsonl.gz, .jsonl.zst or .txt file, a folder or a quoted glob of
    such files, or a hub dataset id. In JSON Lines a line is a document; a .txt file is one.

    Stopped or killed, the same command goes on where it was, and ends with the same bytes.

    \b
    Examples:
      forge-prep tokenize HuggingFaceTB/smollm-corpus --config fineweb-edu-dedup --max-tokens 10B
      forge-prep tokenize 'books/*.jsonl.zst' --out data_cache/books --text-column body
    """
    from pipeline.prepare import tokenize
    from pipeline.sources import Options, resolve

    resolved = resolve(source, config, split, revision)
    given = click.get_current_context().get_parameter_source
    for name in ("config", "split", "revision"):
        if not resolved.hub and given(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} is for a hub dataset, and {source} is none")
    if others := resolved.not_read:
        more = f" and {len(others) - 3} more" * (len(others) > 3)
        click.echo(f"Not read, of other kinds: {', '.join(others[:3])}{more}", err=True)
    folder = out or Path("data_cache") / default_name(source, config)
    options = Options(text_column, val_fraction, max_tokens, shard_tokens, min_score, split_on)
    with ProgressBar() as bar:
        outcome = tokenize(
            resolved,
            folder,
            options,
            workers=workers or cores(),
            overwrite=overwrite,
            keep_downloads=keep_downloads,
            skip_errors=on_error == "skip",
            on_progress=bar.update,
        )
    index = outcome.index
    tokens = {name: index.total("num_tokens", name) for name in ("train", "val")}
    if as_json:
        summary = {
            "folder": str(folder),
            "up_to_date": outcome.up_to_date,
            "num_train_tokens": tokens["train"],
            "num_val_tokens": tokens["val"],
            "num_documents": index.total("num_documents"),
            "text_bytes": index.total("text_bytes"),
            "skipped": index.skipped,
            "num_files_not_read": len(resolved.not_read),
            "seconds": round(outcome.seconds, 3),
        }
        click.echo(json.dumps(summary))
        return
    if outcome.up_to_date:
        click.echo(f"{folder} is up to date.")
    else:
        speed = (
            outcome.new_bytes / 1e6 / outcome.seconds,
            outcome.new_tokens / 1e6 / outcome.seconds,
        )
        click.echo(
            f"Done in {outcome.seconds:.1f} s: {speed[0]:.0f} MB/s of text, "
            f"{speed[1]:.1f} M tokens/s."
        )
    skipped = index.skipped["null_documents"] + index.skipped["empty_documents"]
    click.echo(
        f"{tokens['train']:,} train + {tokens['val']:,} val tokens of "
        f"{index.total('num_documents'):,} documents in {len(index.shards):,} shards; "
        f"{skipped:,} null or empty documents skipped."
    )
    if low := index.skipped.get("low_score_documents"):
        click.echo(f"{low:,} documents below --min-score, or without a score, dropped.")
    for place in index.skipped.get("damaged", []):
        click.echo(f"Left out, damaged: {place}")
    if max_tokens and tokens["train"] < max_tokens:
        click.echo(f"The source has no more: fewer than --max-tokens, {max_tokens:,}.")
    click.echo(next_commands(folder, tokens))


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def info(folder: Path, as_json: bool) -> None:
    """Show what a folder of shards holds, and how many epochs each config makes of it."""
    from pipeline import info, shards

    index = shards.load_index(folder)
    click.echo(json.dumps(info.summarize(index), indent=2) if as_json else info.render(index))


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("document", type=click.IntRange(0))
@click.option("--split", type=click.Choice(["train", "val"]), default="train", show_default=True)
@click.option("--tokens", is_flag=True, help="Show the token ids too.")
def show(folder: Path, document: int, split: str, tokens: bool) -> None:
    """Decode DOCUMENT (a number from 0) of a folder of shards."""
    from pipeline import info, shards, tokenizer

    shard, start, ids = info.find_document(shards.load_index(folder), split, document)
    click.echo(
        f"{split} document {document:,}: {len(ids):,} tokens, at token {start:,} of {shard.file}",
        err=True,
    )
    if tokens:
        click.echo(" ".join(map(str, ids.tolist())), err=True)
    sys.stdout.buffer.write(tokenizer.decode(ids) + b"\n")


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(1), help="Threads.  [default: one a core]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(folder: Path, workers: int | None, as_json: bool) -> None:
    """Read every byte of a folder of shards and check it against its index.

    Finds flipped bits, truncated, missing and strange shards, tokens outside the vocabulary and
    wrong document counts. Exit code 1 when anything is wrong.
    """
    from pipeline import shards
    from pipeline.verify import verify

    index = shards.load_index(folder)
    total = shards.TOKEN_BYTES * index.total("num_tokens")
    with ProgressBar(total) as bar:
        problems = verify(index, workers or cores(), bar.add)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "folder": str(folder),
                    "num_shards": len(index.shards),
                    "num_bytes": total,
                    "problems": problems,
                }
            )
        )
    if problems:
        raise ForgeError(
            f"{len(problems)} problems:\n  " + "\n  ".join(problems),
            where=folder,
            fix="restore those files, or make the folder again: forge-prep tokenize --overwrite",
        )
    if not as_json:
        click.echo(f"Sound: {len(index.shards):,} shards, {total / 1e9:.3f} GB.")
        if (folder / shards.WORK_FOLDER).exists():
            click.echo("An unfinished run lies here, too: the same forge-prep tokenize ends it.")


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--raw", is_flag=True, help="Headerless train.bin and val.bin, as nanoGPT's.")
def index(folder: Path, raw: bool) -> None:
    """Make an index for a folder of other people's GPT-2 token files.

    DIR holds llm.c or modded-nanogpt shards (fineweb_train_*.bin, fineweb_val_*.bin), which stay as
    they are; or, with --raw, nanoGPT's train.bin and val.bin, which are copied into shards.
    """
    from pipeline import foreign

    made = foreign.index_folder(folder, raw)
    tokens = {name: made.total("num_tokens", name) for name in ("train", "val")}
    click.echo(
        f"{tokens['train']:,} train + {tokens['val']:,} val tokens in {len(made.shards):,} shards."
    )
    click.echo(next_commands(folder, tokens))


@main.command("python-docs")
@click.argument("file", type=click.Path(path_type=Path))
def python_docs(file: Path) -> None:
    """Write Python's own documentation as JSON Lines to FILE: 1.4 MB and more, no download."""
    from pipeline import pydocs

    click.echo(f"{pydocs.write(file):,} documents, {file.stat().st_size / 1e6:.1f} MB: {file}")


def default_name(source: str, config: str | None) -> str:
    """Name of the folder in data_cache/ when --out is not given."""
    if not config and glob.has_magic(source) and not Path(source).exists():
        parts = Path(source).parts  # of a glob: the folder above its first wildcard
        source = str(Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts)))
    name = config or Path(source.rstrip("/")).name
    if name in ("", ".", ".."):
        name = Path(source).resolve().name
    for suffix in (".gz", ".zst", ".parquet", ".jsonl", ".txt"):
        name = name.removesuffix(suffix)
    return re.sub(r"[^\w.-]+", "_", name).strip("_") or "shards"


class ProgressBar:
    """tqdm by bytes on a terminal, silent elsewhere."""

    def __init__(self, total: int | None = None) -> None:
        from tqdm import tqdm

        self.first: Any = None  # the last prepare.Progress before any text was done
        width = min(110, shutil.get_terminal_size().columns)
        self.bar = tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            disable=None,
            ncols=width,
            smoothing=0.1,
            leave=False,
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def add(self, count: int) -> None:
        self.bar.update(count)

    def update(self, progress: Any) -> None:
        """Show a prepare.Progress. The clock runs from the first text on: start-up is no speed."""
        if self.bar.disable:
            return
        if self.first is None or progress.done_bytes == self.first.done_bytes:
            self.first = progress
            self.bar.reset(progress.total_bytes)
            self.bar.initial = progress.done_bytes
        self.bar.n, self.bar.total = progress.done_bytes, progress.total_bytes
        new = (progress.num_tokens - self.first.num_tokens) / 1e6
        speed = new / max(1e-3, self.bar.format_dict["elapsed"])
        self.bar.set_postfix_str(f"{speed:.1f} M tokens/s", refresh=False)
        self.bar.refresh()


if __name__ == "__main__":
    main()
