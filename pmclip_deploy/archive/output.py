"""The folder of an archive: parts that are whole, batches that are not yet in a part, and what a run that was killed left.

    _archive.json         what all rows have in common
    part-00000.parquet    the rows, about 65,536 a file
    .run/listing/         what there is, while a run lasts
    .run/RUN/             a file for each batch that is computed, until it is in a part

A part's metadata names the batches in it, so that a kill between writing a part and removing its batches doubles no row. A worker that
outlives its run writes into a folder that the next run has removed.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from shutil import rmtree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pmclip_deploy.archive import ABOUT
from pmclip_deploy.archive.listing import Item
from pmclip_deploy.archive.tables import ITEMS, About
from pmclip_deploy.archive.worker import items_of_table
from pmclip_deploy.atomic import write, write_errors, written
from pmclip_deploy.beside import chunks
from pmclip_deploy.errors import BundleError, UsageError

PART_ROWS, LISTED = 65536, 4096  # rows of a part, items of a file of the listing
MERGED = b"pmclip-deploy batches"


class Output:
    """Hold the lock of the folder."""

    def __init__(self, folder: Path, about: About, schema: pa.Schema) -> None:
        """Takes up what earlier runs left. Raises UsageError if they were another archive."""
        self.folder, self.schema = folder, schema
        self._own = folder / ".run"
        self.batches = self._own / secrets.token_hex(6)
        self._waiting, self._rows = list[Path](), 0
        with self._errors():
            self._claim(about)
            merged = {name for part in self.parts for name in json.loads(pq.read_schema(part).metadata[MERGED])}
            for file in sorted(self._own.glob("*/*.parquet")):
                if file.parent.name != "listing" and f"{file.parent.name}/{file.name}" not in merged:
                    self._add(file)
            self._merge()
            rmtree(self._own, ignore_errors=True)
            self.batches.mkdir(mode=0o700, parents=True)

    @property
    def parts(self) -> list[Path]:
        return parts_of(self.folder)

    def known(self) -> NDArray[np.uint64]:
        """The keys of all items that have rows, in order."""
        keys = [pq.read_table(part, columns=["key"])["key"].to_numpy() for part in self.parts]
        return np.unique(np.concatenate(keys)) if keys else np.empty(0, np.uint64)

    def list(self, items: Iterable[Item]) -> tuple[list[Path], int, int]:
        """(files of the items that have no rows yet, how many these are, how many there are in all)"""
        known, files, new, count = self.known(), list[Path](), 0, 0
        with self._errors():
            (self._own / "listing").mkdir(mode=0o700, exist_ok=True)
            for part in chunks(items, LISTED):
                count += len(part)
                part = [item for item, is_known in zip(part, _is_in(part, known), strict=True) if not is_known]
                if part:
                    files.append(self._own / "listing" / f"{len(files):08}.parquet")
                    rows = [{"id": item.id, "source": item.source.encode(errors="surrogateescape"), "key": item.key} for item in part]
                    pq.write_table(pa.Table.from_pylist(rows, ITEMS), files[-1])
                    new += len(part)
        return files, new, count

    def add(self, file: str) -> None:
        """A batch of this run, whose rows lie on the disk."""
        with self._errors():
            self._add(self.batches / file)

    def close(self) -> None:
        """Everything is in parts."""
        with self._errors():
            self._merge()
            rmtree(self._own)

    def _add(self, file: Path) -> None:
        self._waiting.append(file)
        self._rows += pq.read_metadata(file).num_rows
        if self._rows >= PART_ROWS:
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        names = [f"{file.parent.name}/{file.name}" for file in self._waiting]
        schema = self.schema.with_metadata({**self.schema.metadata, MERGED: json.dumps(names)})
        last = max((int(part.stem.removeprefix("part-")) for part in self.parts), default=-1)
        with (
            written(self.folder / f"part-{last + 1:05}.parquet") as new,
            pq.ParquetWriter(new, schema, compression="zstd") as writer,
        ):
            for some in chunks(self._waiting, 256):
                writer.write_table(pa.concat_tables([pq.read_table(file).cast(self.schema) for file in some]).cast(schema))
        for file in self._waiting:
            file.unlink()
        self._waiting, self._rows = [], 0

    def _claim(self, about: About) -> None:
        """The folder is this archive's from now on."""
        file = self.folder / ABOUT
        if not file.exists():
            if any(path.name != "_archive.lock" for path in self.folder.iterdir()):
                raise UsageError(f"{self.folder}: is not empty, and holds no archive", "give another --out")
            write(file, about.to_json() + "\n")
        elif file.read_text("utf-8").strip() != about.to_json():
            raise UsageError(f"{self.folder}: holds another archive: {_differs(file, about)}", "give another --out")

    def _errors(self) -> AbstractContextManager[None]:
        return write_errors(f"{self.folder}:", "check the space left and the permissions", BundleError)


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def items_of_files(files: Sequence[Path], size: int) -> Iterator[list[Item]]:
    """``size`` items each, a file of the listing at a time."""
    return (part for file in files for part in chunks(items_of_table(pq.read_table(file)), size))


def _is_in(items: Sequence[Item], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    keys = np.array([item.key for item in items], np.uint64)
    if not len(known):
        return np.zeros(len(keys), bool)
    return np.asarray(known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys)


def _differs(file: Path, about: About) -> str:
    """Which of the things that all rows share is another one there."""
    try:
        there, here = json.loads(file.read_text("utf-8")), json.loads(about.to_json())
        return "its " + ", ".join(sorted(key for key in here if there.get(key) != here[key])) + " differ"
    except (ValueError, AttributeError):
        return f"its {ABOUT} is broken"
