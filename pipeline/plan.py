"""Cuts a source into slices, from metadata alone: no text is read."""

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pyarrow.parquet as pq

from pipeline import sources
from pipeline.errors import DamageError, refusals
from pipeline.hub import open_on_hub
from pipeline.readers import columns_bytes, damage, find_columns, find_score
from pipeline.sources import Options, Part, Slice, Source, SourceFile

FOOTERS_AT_ONCE = 16


class Plan:
    """The slices of a source, by number, cut as far as needed; the last may grow until `whole`.

    It may begin behind the slices of a finished folder: with slice `number`, whose `first` part is
    a row group of a file.
    """

    def __init__(
        self,
        source: Source,
        options: Options,
        skip_errors: bool = False,
        number: int = 0,
        first: tuple[str, int] = ("", 0),
    ) -> None:
        self.source, self.options, self.skip_errors = source, options, skip_errors
        file, self.first_group = first
        self.first_file = [each.name for each in source.files].index(file) if file else 0
        self.num_files = self.first_file  # that are cut, or lie in front
        self.slices: dict[int, Slice] = {}
        self.bytes = 0
        self._number = number - 1  # of the last slice
        self._parts: list[Part] = []
        self._room = 0.0

    @property
    def whole(self) -> bool:
        return self.num_files == len(self.source.files)

    def reach(self, wanted_bytes: float) -> None:
        """Cut slices until they have that many bytes; reads the metadata of no more files."""
        while not self.whole and self.bytes < wanted_bytes:
            left = self.source.files[self.num_files :]
            if wanted_bytes < math.inf:  # as many as it takes, if they are like those before
                per_file = self.bytes / max(1, self.num_files - self.first_file)
                guess = math.ceil((wanted_bytes - self.bytes) / per_file) if per_file else 1
                left = left[: min(guess, FOOTERS_AT_ONCE)]
            with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
                for parts in pool.map(self._parts_of, left):
                    is_first = self.num_files == self.first_file
                    self._add(parts[self.first_group :] if is_first else parts)
                    self.num_files += 1
            self._close()

    def keep(self, numbers: range) -> None:
        """Forget all slices but those."""
        self.slices = {number: self.slices[number] for number in numbers}
        self.bytes = sum(each.bytes for each in self.slices.values())

    def _add(self, parts: list[Part]) -> None:
        full = self.options.shard_tokens * sources.BYTES_PER_TOKEN
        for part in parts:
            if not self._parts or part.bytes > self._room < full:
                self._close()
                self._number, self._parts, self._room = self._number + 1, [], full
            self._room -= part.bytes
            self.bytes += part.bytes
            if self._parts and self._parts[-1].file == part.file:
                before = self._parts.pop()
                part = replace(part, start=before.start, bytes=before.bytes + part.bytes)
            self._parts.append(part)

    def _close(self) -> None:
        if self._parts:
            self.slices[self._number] = Slice(self._number, tuple(self._parts), self.options)

    def _parts_of(self, file: SourceFile) -> list[Part]:
        if self.source.kind != "parquet":
            return [Part(file, 0, 1, file.bytes)]
        try:
            return row_groups(self.source, file, self.options)
        except DamageError as found:
            if not self.skip_errors:
                raise
            return [Part(file, 0, 0, 0, found.what)]


def row_groups(source: Source, file: SourceFile, options: Options) -> list[Part]:
    """One part per row group of a parquet file; checks that its columns are there."""
    where = str(source.root / file.name)
    if source.hub:
        where = f"datasets/{source.hub['dataset']}@{source.hub['revision']}/{file.name}"
    opened = open_on_hub(where) if source.hub else nullcontext(where)
    in_whole = damage("not a whole parquet file", where)
    with refusals("read a source file", where), in_whole, opened as readable:
        metadata = pq.read_metadata(readable)
    wanted = find_columns(metadata.schema.to_arrow_schema(), options, where)
    if options.min_score is not None:
        find_score(metadata, where)
    sizes = [columns_bytes(metadata.row_group(g), wanted) for g in range(metadata.num_row_groups)]
    return [Part(file, g, g + 1, size) for g, size in enumerate(sizes)]
