"""Files of a hub dataset, a few ahead of the workers; each checked against the hub's hash.

Before: sources.py, which resolved the dataset to files of one commit. After: the worker processes
of prepare.py, which read them as local files.
"""

import hashlib
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from pipeline.errors import ForgeError
from pipeline.sources import Slice, Source, SourceFile

FILES_AHEAD = 2  # downloads beyond the files that workers are reading
DOWNLOAD_TRIES = 6
FIRST_PAUSE_SECONDS = 1.0  # doubled after each try


class Downloads:
    """Files of a hub dataset, fetched a few ahead of the workers and removed behind them."""

    def __init__(
        self, source: Source, folder: Path, slices: list[Slice], keep_downloads: bool
    ) -> None:
        assert source.hub is not None
        self.source, self.hub, self.keep = source, source.hub, keep_downloads
        self.folder = folder
        self.users: dict[int, int] = {}  # slices left that read a file
        for each in slices:
            for part in each.parts:
                self.users[part.file] = self.users.get(part.file, 0) + 1
        self.fetched: dict[int, Future[Path]] = {}

    def paths(self, each: Slice, later: list[Slice]) -> tuple[Path, ...] | None:
        """Paths of the files of a slice, once they are here; starts some of those of `later`."""
        wanted = [part.file for part in each.parts]
        coming = dict.fromkeys(part.file for other in later for part in other.parts)
        ahead = [file for file in coming if file not in wanted][:FILES_AHEAD]
        for file in [*wanted, *ahead]:
            if file not in self.fetched:
                self.fetched[file] = Future()
                # A daemon: Ctrl-C does not wait for gigabytes.
                threading.Thread(target=self._run, args=(file,), daemon=True).start()
        if not all(self.fetched[file].done() for file in wanted):
            return None
        return tuple(self.fetched[file].result() for file in wanted)

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
                path = hf_hub_download(
                    self.hub["dataset"],
                    wanted.name,
                    repo_type="dataset",
                    revision=self.hub["revision"],
                    local_dir=self.folder,
                )
                if is_whole(Path(path), wanted):
                    return Path(path)
                problem = "the bytes that came do not have the hash that the hub lists"
                Path(path).unlink()
            except Exception as error:  # network trouble has a dozen unrelated types
                problem = f"{type(error).__name__}: {error}"
            if attempt + 1 < DOWNLOAD_TRIES:
                time.sleep(min(60.0, FIRST_PAUSE_SECONDS * 2.0**attempt))
        raise ForgeError(
            f"cannot download a file of the dataset: {problem}",
            where=f"{self.hub['dataset']} {wanted.name}",
            fix="check the network and run the same command again; finished slices are kept",
        )

    def release(self, each: Slice) -> None:
        for part in each.parts:
            self.users[part.file] -= 1
            if self.users[part.file] == 0 and not self.keep and part.file in self.fetched:
                self.fetched[part.file].result().unlink(missing_ok=True)


def is_whole(path: Path, wanted: SourceFile) -> bool:
    """Whether a file has the size and the hash (sha256, or git's sha1) that the hub lists."""
    if path.stat().st_size != wanted.bytes:
        return False
    if not wanted.checksum:
        return True
    if len(wanted.checksum) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % wanted.bytes)
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest() == wanted.checksum
