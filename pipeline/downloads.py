"""Hub datasets: their files at one commit, fetched a few ahead of the workers and checked."""

import errno
import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pipeline.errors import KEPT, ForgeError, refusal
from pipeline.sources import Slice, Source, SourceFile

DOWNLOADS_FOLDER = "downloads"
FILES_AHEAD = 2  # downloads beyond the files that workers are reading
DOWNLOAD_TRIES = 6
FIRST_PAUSE_SECONDS = 1.0  # doubled after each try
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE)


class Downloads:
    """Files of a hub dataset, fetched a few ahead of the workers and removed behind them."""

    def __init__(self, source: Source, keep_downloads: bool) -> None:
        assert source.hub is not None
        self.source, self.hub, self.keep = source, source.hub, keep_downloads
        self.places = {file: place for place, file in enumerate(source.files)}
        self.fetched: dict[SourceFile, Future[None]] = {}

    def are_here(self, each: Slice, later: Iterator[Slice]) -> bool:
        """Whether the files of a slice are here; starts to fetch them, and some of `later`."""
        wanted = [part.file for part in each.parts if not part.damage]
        files = dict.fromkeys(wanted)
        for file in (part.file for other in later for part in other.parts if not part.damage):
            if len(files) >= len(wanted) + FILES_AHEAD:
                break
            files[file] = None
        for file in files:
            if file not in self.fetched:
                self.fetched[file] = Future()
                # A daemon: Ctrl-C does not wait for gigabytes.
                threading.Thread(target=self._run, args=(file,), daemon=True).start()
        fetched = [self.fetched[file] for file in wanted]
        return all(each.done() and each.result() is None for each in fetched)

    def _run(self, file: SourceFile) -> None:
        try:
            self._fetch(file)
            self.fetched[file].set_result(None)
        except BaseException as error:
            self.fetched[file].set_exception(error)

    def _fetch(self, wanted: SourceFile) -> None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        for attempt in range(DOWNLOAD_TRIES):
            try:
                at: Any = {"revision": self.hub["revision"], "local_dir": self.source.root}
                name = self.hub["dataset"]
                path = Path(hf_hub_download(name, wanted.name, repo_type="dataset", **at))
                if is_whole(path, wanted):
                    return
                problem = "the bytes that came do not have the hash that the hub lists"
                path.unlink()
            except Exception as error:  # network trouble has a dozen unrelated types
                if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                    raise refusal(error, "write a download", self.source.root) from error
                problem = f"{type(error).__name__}: {error}"
            if attempt + 1 < DOWNLOAD_TRIES:
                time.sleep(min(60.0, FIRST_PAUSE_SECONDS * 2.0**attempt))
        where = f"{self.hub['dataset']} {wanted.name}"
        what = f"cannot download a file of the dataset: {problem}"
        raise ForgeError(what, where=where, fix=f"check the network; {KEPT}")

    def release_before(self, file: SourceFile) -> None:
        """Remove the files in front of `file`: nobody needs them any more."""
        for each in list(self.fetched):
            if not self.keep and self.places[each] < self.places[file]:
                self.fetched.pop(each).result()
                (self.source.root / each.name).unlink(missing_ok=True)


def is_whole(path: Path, wanted: SourceFile) -> bool:
    """Whether a file has the size and the hash (sha256, or git's sha1) that the hub lists."""
    is_git = len(wanted.checksum) != 64
    digest = hashlib.sha1(b"blob %d\0" % wanted.bytes) if is_git else hashlib.sha256()
    with path.open("rb") as file:
        hashlib.file_digest(file, lambda: digest)
        same = digest.hexdigest() == wanted.checksum or not wanted.checksum
        return same and file.tell() == wanted.bytes
