"""What a hub dataset holds, and pieces of its files."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipeline.errors import ForgeError


def resolve_hub(
    name: str, config: str | None, split: str, revision: str | None
) -> tuple[dict[str, tuple[int, str]], dict[str, str]]:
    """The data files of a hub dataset at one commit, by the `datasets` library.

    Returns the bytes and checksum of each, by its name, and the commit that they are of.
    """
    import datasets
    from datasets.utils.logging import disable_progress_bar
    from huggingface_hub import HfApi, HfFileSystem

    disable_progress_bar()
    try:
        HfApi().dataset_info(name, revision=revision)  # fails at once, the next line after 23 s
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        by_split = {str(key): files for key, files in (builder.config.data_files or {}).items()}
    except Exception as error:  # the library raises a dozen unrelated types, network's included
        what = f"cannot resolve the hub dataset: {type(error).__name__}: {error}"
        fix = "check the id (or path), --config and the network; or give a folder of its files"
        where = name + (f", config {config}" if config else "")
        raise ForgeError(what, where=where, fix=fix) from error
    if split not in by_split:
        what = f"the dataset has no split {split!r} (it has {', '.join(by_split) or 'none'})"
        raise ForgeError(what, where=name, fix="name one of them with --split")
    hub: Any = HfFileSystem()
    files, commit = dict[str, tuple[int, str]](), {"dataset": name, "split": split}
    with on_the_hub(name):
        for path in map(str, by_split[split]):
            info, place = hub.info(path), hub.resolve_path(path)
            # A large file has a sha256, a small one git's sha1.
            checksum = info["lfs"]["sha256"] if info.get("lfs") else info.get("blob_id")
            files[place.path_in_repo] = (int(info["size"]), str(checksum or ""))
            commit["revision"] = place.revision
    return files, commit | ({"config": config} if config else {})


@contextmanager
def on_the_hub(where: str) -> Iterator[None]:
    """Makes trouble with the network a ForgeError; Arrow's errors are the file's, and pass."""
    try:
        yield
    except Exception as error:  # a dozen unrelated types
        # A plain OSError is Arrow's as well: the network's are subclasses of it, or no OSError.
        if isinstance(error, pa.ArrowException | MemoryError) or type(error) is OSError:
            raise
        what = f"cannot read from the hub: {type(error).__name__}: {error}"
        fix = "check the network and HF_TOKEN and run the same command again"
        raise ForgeError(what, where=where, fix=fix) from error


@contextmanager
def open_on_hub(path: str) -> Iterator[Any]:
    """A file of the hub, to read pieces of."""
    from huggingface_hub import HfFileSystem

    with on_the_hub(path), HfFileSystem().open(path, "rb", block_size=2**20) as remote:
        yield remote
