"""Hub datasets: their files at one commit, fetched a few ahead of the workers and checked.

Before: sources.py, which asks for the files of a dataset. After: the worker processes of
prepare.py, which read them as local files.
"""

import errno
import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import KEPT, ForgeError, refusal
from pipeline.sources import SUFFIXES, Slice, Source, SourceFile, kind_of

DOWNLOADS_FOLDER = "downloads"
FILES_AHEAD = 2  # downloads beyond the files that workers are reading
DOWNLOAD_TRIES = 6
FIRST_PAUSE_SECONDS = 1.0  # doubled after each try
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE)


def resolve_hub(name: str, config: str | None, split: str, revision: str | None) -> Source:
    """Resolve a hub dataset to its data files, at one commit, with the `datasets` library."""
    import datasets
    from datasets.utils.logging import disable_progress_bar
    from huggingface_hub import HfFileSystem

    disable_progress_bar()
    try:
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
    hub = HfFileSystem()
    paths = [str(path) for path in by_split[split]]
    if any(not path.startswith("hf://") for path in paths):
        what, fix = "the dataset's files do not lie on the hub", "download them; give their folder"
        raise ForgeError(what, where=name, fix=fix)
    with on_the_hub(name):
        infos = {path: hub.info(path) for path in paths}
        parsed: list[Any] = [hub.resolve_path(path) for path in paths]
    files = tuple(
        SourceFile(p.path_in_repo, int(infos[path]["size"]), hub_checksum(infos[path]))
        for p, path in zip(parsed, paths, strict=True)
    )
    kind = kind_of(files[0].name)
    if kind is None or any(kind_of(file.name) != kind for file in files):
        endings = sorted({"".join(Path(file.name).suffixes[-2:]) for file in files})
        what = f"the split's files are not all of one known kind: {', '.join(endings)}"
        fix = f"download them and give a glob of one kind; known endings: {SUFFIXES}"
        raise ForgeError(what, where=name, fix=fix)
    commit = {"dataset": name, "split": split, "revision": parsed[0].revision}
    commit |= {"config": config} if config else {}
    return Source(name, kind, "", files, commit)


@contextmanager
def on_the_hub(where: str) -> Iterator[None]:
    """Makes trouble with the network a ForgeError; Arrow's errors are the file's, and pass."""
    try:
        yield
    except (pa.ArrowException, MemoryError):
        raise
    except Exception as error:  # a dozen unrelated types
        if type(error) is OSError:  # Arrow's as well; the network's are subclasses, or none
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


def hub_checksum(info: dict[str, Any]) -> str:
    """sha256 of a large file, git's sha1 of a small one, as the hub lists them."""
    lfs = info.get("lfs")
    return str(lfs["sha256"] if lfs else info.get("blob_id") or "")


class Downloads:
    """Files of a hub dataset, fetched a few ahead of the workers and removed behind them."""

    def __init__(self, source: Source, folder: Path, keep_downloads: bool) -> None:
        assert source.hub is not None
        self.source, self.hub, self.keep = source, source.hub, keep_downloads
        self.folder = folder
        self.fetched: dict[int, Future[Path]] = {}

    def paths(self, each: Slice, later: Iterator[Slice]) -> tuple[Path, ...] | None:
        """Paths of the files of a slice, once they are here; starts some of those of `later`."""
        wanted = [part.file for part in each.parts if not part.damage]
        files = dict.fromkeys(wanted)
        for other in later:
            if len(files) >= len(wanted) + FILES_AHEAD:
                break
            files |= dict.fromkeys(part.file for part in other.parts if not part.damage)
        for file in list(files)[: len(wanted) + FILES_AHEAD]:
            if file not in self.fetched:
                self.fetched[file] = Future()
                # A daemon: Ctrl-C does not wait for gigabytes.
                threading.Thread(target=self._run, args=(file,), daemon=True).start()
        if not all(self.fetched[file].done() for file in wanted):
            return None
        return tuple(
            Path() if part.damage else self.fetched[part.file].result() for part in each.parts
        )

    def _run(self, file: int) -> None:
        try:
            self.fetched[file].set_result(self._fetch(file))
        except BaseException as error:
            self.fetched[file].set_exception(error)

    def _fetch(self, file: int) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        wanted = self.source.files[file]
        for attempt in range(DOWNLOAD_TRIES):
            try:
                at: Any = {"revision": self.hub["revision"], "local_dir": self.folder}
                name = self.hub["dataset"]
                path = Path(hf_hub_download(name, wanted.name, repo_type="dataset", **at))
                if is_whole(path, wanted):
                    return path
                problem = "the bytes that came do not have the hash that the hub lists"
                path.unlink()
            except Exception as error:  # network trouble has a dozen unrelated types
                if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                    raise refusal(error, "write a download", self.folder) from error
                problem = f"{type(error).__name__}: {error}"
            if attempt + 1 < DOWNLOAD_TRIES:
                time.sleep(min(60.0, FIRST_PAUSE_SECONDS * 2.0**attempt))
        where = f"{self.hub['dataset']} {wanted.name}"
        what, fix = (
            f"cannot download a file of the dataset: {problem}",
            f"check the network; {KEPT}",
        )
        raise ForgeError(what, where=where, fix=fix)

    def release_before(self, file: int) -> None:
        """Remove the files in front of `file`: nobody needs them any more."""
        for each in [] if self.keep else [each for each in self.fetched if each < file]:
            self.fetched.pop(each).result().unlink(missing_ok=True)


def is_whole(path: Path, wanted: SourceFile) -> bool:
    """Whether a file has the size and the hash (sha256, or git's sha1) that the hub lists."""
    is_git = len(wanted.checksum) != 64
    digest = hashlib.sha1(b"blob %d\0" % wanted.bytes) if is_git else hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
        same = digest.hexdigest() == wanted.checksum or not wanted.checksum
        return same and file.tell() == wanted.bytes
