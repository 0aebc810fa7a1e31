"""forge-prep: the offline stage's command line. Decorators, one call each, one error handler."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.command import Count, FolderTokens, ForgeCommand, cores
from pipeline.errors import ForgeError, counted
from pipeline.making import A_PATH, AS_JSON, find, make, of_a_source, shown, val_fraction
from pipeline.terminal import next_commands, progress_bar, report

# Before numpy: its BLAS, which nothing here calls, would spin with a thread a core in each process.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llm-forge")
def main() -> None:
    """Turn text into shards of tokens, once; then train from them as often as you like.

    \b
    Typical use:
      forge-prep tokenize HuggingFaceTB/smollm-corpus --config fineweb-edu-dedup --max-tokens 10B
      forge-prep info data_cache/fineweb-edu-dedup
    """


main.command_class = ForgeCommand
DIR = click.argument("folder", metavar="DIR", type=A_PATH)


@main.command()
@of_a_source
@val_fraction(0.005, "documents")
@shown("--text-column", default="text", help="Column or key of the text.")
@shown("--shard-tokens", default="10M", type=Count(), help="Tokens in a train shard, roughly.")
@click.option("--min-score", type=float, help="Drop documents with a lower score, or none.")
@click.option(
    "--split-on",
    metavar="TEXT",
    help="Start a new document of a .txt file at each line that begins with TEXT, such as "
    "'CHAPTER' or '<|endoftext|>'; '' means at blank lines.",
)
def tokenize(source: str, split_on: str | None, **given: Any) -> None:
    """Tokenize SOURCE into a folder of shards.

    SOURCE is a .parquet, .jsonl, .json (JSON Lines; also .gz, .zst) or .txt file, a folder or a
    quoted glob of such files, or the id of a hub dataset. Each line of JSON Lines is a document. A
    .txt file is one document, unless --split-on cuts it. Where a folder has files named for
    training, those named for validation or tests are not read; a glob reads all that it names.

    After a stop or a kill, the same command resumes, and ends with the same bytes. When the source
    has more files, or --max-tokens is larger, it extends a finished folder.

    The bytes are the same on one machine, on a Ray cluster (--ray) and in parts (--part).

    \b
    Examples:
      forge-prep tokenize HuggingFaceTB/smollm-corpus --config fineweb-edu-dedup --max-tokens 10B
      forge-prep tokenize 'books/*.jsonl.zst' --out data_cache/books --text-column body
    """
    from pipeline.sources import Options, with_marker

    found = find(source, given)
    if split_on is not None and found.kind != "txt":
        raise click.UsageError(f"--split-on is for .txt files; {source} holds {found.kind}")
    if split_on is None and found.kind == "txt" and (marked := with_marker(found)):
        hint = "--split-on '<|endoftext|>' makes documents of its pieces"
        click.echo(f"{marked} holds <|endoftext|> as plain text: {hint}.", err=True)
    names = ("val_fraction", "max_tokens", "text_column", "shard_tokens", "min_score")
    make(source, found, Options(**{name: given[name] for name in names}, split_on=split_on), given)


@main.command()
@of_a_source
@val_fraction(0.02, "conversations")
@shown(
    "--context-length",
    default=1024,
    type=click.IntRange(1),
    help="Tokens of a window: the context_length of the model that is to be tuned.",
)
@shown(
    "--long",
    default="leave",
    type=click.Choice(["leave", "cut"]),
    help="Leave longer conversations out, or cut them behind the last answer that fits.",
)
@click.option(
    "--columns",
    metavar="NAMES",
    default="",
    help="Where conversations are, if not found: the column of the messages, or those of the "
    "prompt and the answer, such as question,response.",
)
def chat(source: str, context_length: int, long: str, columns: str, **given: Any) -> None:
    """Turn the conversations of SOURCE into a folder of shards.

    SOURCE is as for tokenize, but for .txt. Each row or line is a conversation: `messages`, a list
    of role and content; or `conversations`, of from and value; or `instruction`, `input` and
    `output`; or `prompt` and `completion`. Roles are system, user and assistant (or human, gpt).

    Conversations are written as ChatML and packed whole into windows of --context-length tokens.
    The model will learn the assistant's words only: forge-prep show marks them. What cannot be
    trained on is left out: forge-prep info counts it, by reason.

    After a stop or a kill, the same command resumes, and ends with the same bytes.

    \b
    Examples:
      forge-prep chat HuggingFaceTB/smol-smoltalk
      forge-prep chat faq.jsonl --out data_cache/faq --columns question,answer --val-fraction 0.1
    """
    from pipeline.chat import ChatOptions
    from pipeline.sources import Options

    how = ChatOptions(context_length, long, tuple(filter(None, columns.split(","))))
    found = find(source, given)
    if found.kind == "txt":
        raise click.UsageError(f"conversations are .parquet or .jsonl; {source} holds .txt")
    options = Options(val_fraction=given["val_fraction"], max_tokens=given["max_tokens"], chat=how)
    make(source, found, options, given)


@main.command()
@DIR
@AS_JSON
def merge(folder: Path, as_json: bool) -> None:
    """Finish a folder that was made in parts.

    It names the parts of tokenize or chat --part that are missing. The bytes are those of one run.
    """
    from pipeline.merge import merge

    report(folder, merge(folder), as_json)


@main.command()
@click.argument("out", type=FolderTokens(), metavar="OUT")
@click.argument("parts", nargs=-1, required=True, metavar="DIR[:TOKENS]...", type=FolderTokens())
@click.option("--overwrite", is_flag=True, help="Replace the mixture that OUT holds.")
@AS_JSON
def mix(
    out: tuple[Path, int | None], parts: tuple[Any, ...], overwrite: bool, as_json: bool
) -> None:
    """Mix folders of shards without copying them.

    OUT lists the shards of each DIR, which stay where they are: their first TOKENS for training
    (10B, 500M), or all. Where there are fewer, they come again, as epochs of that DIR. Validation
    gets the whole val split of each, and reports the loss of each, too.

    \b
    Example:
      forge-prep mix data_cache/mix data_cache/fineweb-edu-dedup:9B data_cache/notes:50M
    """
    from pipeline import mix

    folder, wanted = out
    if wanted is not None:
        raise click.UsageError("OUT comes first: a new folder, without :TOKENS")
    made = mix.mix(folder, parts, overwrite)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "parts": made.source["parts"]}))
    else:
        click.echo("\n".join([*mix.table(made), next_commands(folder, made)]))


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

    DOCUMENT is its number, from 0. Of a conversation, lines that are trained on begin with "> ".
    """
    from pipeline import info, shards, tokenizer

    index = shards.load_index(folder)
    shard, start, ids = info.find_document(index, split, document)
    found = f"{len(ids):,} tokens, at token {start:,} of {shard.file}"
    click.echo(f"{split} document {document:,}: {found}", err=True)
    if tokens:
        click.echo(" ".join(map(str, ids.tolist())), err=True)
    text = info.marked(ids) if index.chat else tokenizer.decode(ids)
    sys.stdout.buffer.write(text + b"\n")


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
    listed = set(index.shards)  # a mixture may repeat some
    total = shards.TOKEN_BYTES * sum(shard.num_tokens for shard in listed)
    with progress_bar(total) as bar:
        problems = verify(index, workers or cores(), bar.update)
    if as_json:
        facts = {"folder": str(folder), "num_shards": len(listed), "num_bytes": total}
        click.echo(json.dumps(facts | {"problems": problems}))
    if problems:
        fix = "restore those files, or make the folder again, with --overwrite"
        what = "\n  ".join([f"{counted(len(problems), 'problem')}:", *problems])
        raise ForgeError(what, where=folder, fix=fix)
    if not as_json:
        click.echo(f"Sound: {counted(len(listed), 'shard')}, {total / 1e9:.3f} GB.")
        if (folder / shards.WORK_FOLDER).exists():
            unfinished = "An unfinished run lies here, too"
            click.echo(f"{unfinished}: its forge-prep tokenize command finishes it.")


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
    from pipeline.merge import Outcome

    made = foreign.index_folder(folder, raw)
    report(folder, Outcome(made, up_to_date=False), as_json=False)


if __name__ == "__main__":
    main()
