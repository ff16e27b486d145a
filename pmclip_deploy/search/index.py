"""An index: one memory-mapped safetensors file of unit embeddings and the ids they are found by; opens, verifies, writes and searches it.

    8 bytes, little-endian: the length of the header | header, JSON filled up with spaces to 4096 bytes in all
    embeddings F16 (N, D) | id_ends I64 (N,): where each id ends | ids U8: UTF-8, one after the other

The metadata's ``checksum`` is the sha256 of the first 4096 bytes, zeros in place of its own 64 digits, and of the sha256 of each MiB after.
"""

import json
import mmap
import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from io import BufferedRandom, BufferedWriter, FileIO
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import Match
from pmclip_deploy.atomic import write_errors, written
from pmclip_deploy.bundle.checks import no_twin
from pmclip_deploy.console import one_line
from pmclip_deploy.errors import BundleError, InputError, UsageError
from pmclip_deploy.spec import INDEX_SCHEMA

Halves: TypeAlias = NDArray[np.float16]
Chunk: TypeAlias = tuple[Halves, Sequence[str]]  # (n, D) unit rows and their n ids

HEADER = 4096  # bytes before the data, which so begins on a page
BLOCK = 1 << 20  # bytes that are hashed at a time
ROWS = 4096  # that are written at a time
PART = 64 << 20  # bytes that are searched at a time, and then given back: what a search holds of an index that is larger
UNKNOWN = "0" * 64  # where the checksum will stand
OTHER_OUTPUT = "give the ids and the salt that made it, or choose another output"
NEXT_STEP = "make it again with `pmclip-deploy search index`"


@dataclass(frozen=True)
class About:
    """What every row of an index has in common."""

    bundle: str
    bundle_sha256: str  # of its manifest.json
    embedded: str  # "image" or "text"
    ids: str  # "path", "uid" or "caption"
    salt_check: str = ""  # of the ids "uid": eight digits, so that one index gets no ids of two salts


@dataclass(frozen=True, eq=False)
class Index:
    """An opened index. The arrays are views of the file, which another process may replace meanwhile, and must not change."""

    path: Path
    about: About
    checksum: str
    bytes: int
    embeddings: Halves  # (N, D) of length 1
    id_ends: NDArray[np.int64]  # (N,)
    id_bytes: NDArray[np.uint8]
    mapped: mmap.mmap

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def dim(self) -> int:
        return int(self.embeddings.shape[1])

    def id(self, row: int) -> str:
        start = self.id_ends[row - 1] if row else 0
        return self.id_bytes[start : self.id_ends[row]].tobytes().decode(errors="replace")

    def ids(self) -> Iterator[str]:
        return map(self.id, range(len(self)))

    def chunks(self, without: "frozenset[str]" = frozenset()) -> Iterator[Chunk]:
        for start in range(0, len(self), ROWS):
            ids = [self.id(row) for row in range(start, min(start + ROWS, len(self)))]
            kept = [i for i, each in enumerate(ids) if each not in without]
            yield self.embeddings[start : start + ROWS][kept], [ids[i] for i in kept]

    def matches(self, embedding: NDArray[np.float32], k: int) -> list[Match]:
        """(D,) -> the k nearest rows, the nearest first; fewer where the index has fewer."""
        from pmclip_deploy.kernels import contrastive_similarity

        rows, found = max(1, PART // (2 * max(1, self.dim))), []
        for start in range(0, len(self), rows):
            part = self.embeddings[start : start + rows]
            best = contrastive_similarity(embedding[None], part, 1.0, min(k, len(part)))
            found += [(-float(score), start + int(row)) for score, row in zip(best.score[0], best.index[0], strict=True) if row >= 0]
            if len(self) > rows:
                self.give_back(start, len(part))
        return [Match(self.id(row), -score) for score, row in sorted(found)[:k]]

    def give_back(self, start: int, rows: int) -> None:
        """Memory that a search has read, to the system: it reads the file again if it needs it."""
        if rows and hasattr(self.mapped, "madvise"):
            first = (HEADER + 2 * self.dim * start) // mmap.PAGESIZE * mmap.PAGESIZE
            self.mapped.madvise(mmap.MADV_DONTNEED, first, 2 * self.dim * rows)

    def refuse_other_bundle(self, bundle: str, digest: str) -> None:
        refuse_other_bundle(self.path, self.about, bundle, digest)

    def refuse_other(self, about: About, next_step: str) -> None:
        """Rows that are not ``about``'s. Raises BundleError or UsageError."""
        self.refuse_other_bundle(about.bundle, about.bundle_sha256)
        if (self.about.embedded, self.about.ids) != (about.embedded, about.ids):
            raise UsageError(
                f"{self.path}: holds {self.about.embedded}s with ids of kind {self.about.ids}, and these are {about.embedded}s with ids "
                f"of kind {about.ids}",
                next_step,
            )
        if self.about.salt_check != about.salt_check:
            raise UsageError(f"{self.path}: its ids were made with another salt", next_step)

    def to_json(self) -> dict[str, Any]:
        size = {"rows": len(self), "dim": self.dim, "bytes": self.bytes}
        return {"path": str(self.path), **size, **asdict(self.about), "checksum": self.checksum, "verified": True}


def refuse_other_bundle(path: Path, about: About, bundle: str, digest: str) -> None:
    if digest != about.bundle_sha256:
        theirs = one_line(f"{about.bundle} {about.bundle_sha256[:12]}")
        raise BundleError(
            f"{path}: made with bundle {theirs}, and this one is {bundle} {digest[:12] or 'without a manifest'}",
            'pass the same bundle with bundle="FOLDER", or make another index',
        )


def unit(embedding: NDArray[np.float32], of: str) -> Halves:
    """(D,) -> (D,) of length 1."""
    wide = embedding.astype(np.float64)
    length = float(np.sqrt((wide**2).sum()))
    if not np.isfinite(length) or length == 0:
        raise InputError(f"{of}: its embedding has no direction, so nothing is near it", "give another image or text")
    return (wide / length).astype(np.float16)


# --- reading ------------------------------------------------------------------------------------------------------------------


def index_from_file(path: "str | os.PathLike[str]") -> Index:
    """Verifies the whole file, by plain reads: a bad disk then is an error, where through the map it would end the process."""
    path = Path(path)
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(HEADER)
        metadata, tensors = _metadata_and_tensors(head)
        rows, dim = _count(tensors["embeddings"]["shape"][0]), _count(tensors["embeddings"]["shape"][1])
        id_bytes = _count(tensors["ids"]["shape"][0])
        if tensors != (expected := _tensors(rows, dim, id_bytes)):
            raise ValueError("its tensors are not those of an index")
        if size != HEADER + expected["ids"]["data_offsets"][1]:
            raise ValueError(f"it has {size} bytes, not {HEADER + expected['ids']['data_offsets'][1]}")
        if _checksum(file, head, metadata["checksum"]) != metadata["checksum"]:
            raise ValueError("its checksum differs")
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        embeddings = np.frombuffer(mapped, "<f2", rows * dim, HEADER).reshape(rows, dim)
        id_ends = np.frombuffer(mapped, "<i8", rows, HEADER + embeddings.nbytes)
        ids = np.frombuffer(mapped, np.uint8, id_bytes, HEADER + embeddings.nbytes + id_ends.nbytes)
        about = _about(metadata)
    return Index(path, about, str(metadata["checksum"]), size, embeddings, id_ends, ids, mapped)


def about_from_file(path: Path) -> About:
    """What the header says; the file is not verified."""
    with _opened(path) as file:
        return _about(_metadata_and_tensors(file.read(HEADER))[0])


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """An index file; what reading it raises becomes a BundleError."""
    try:
        if not path.is_file():  # a device or a pipe is not read
            raise BundleError(f"{path}: no such index", "make one with `pmclip-deploy search index`")
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})", "check the disk and its permissions") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else "its header is broken"
        raise BundleError(f"{path}: not a usable index, {reason}", NEXT_STEP) from error


def _about(metadata: dict[str, Any]) -> About:
    return About(**{field.name: str(metadata[field.name]) for field in fields(About)})


def _metadata_and_tensors(head: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    if len(head) < HEADER or int.from_bytes(head[:8], "little") != HEADER - 8:
        raise ValueError("it does not begin like one")
    tensors = json.loads(head[8:], object_pairs_hook=no_twin)
    metadata = tensors.pop("__metadata__")
    if (schema := str(metadata["schema"])) != INDEX_SCHEMA:
        raise ValueError(f'its schema is "{one_line(schema[:60])}", this version reads "{INDEX_SCHEMA}"')
    return metadata, tensors


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError("its header is broken")
    return value


def _checksum(file: FileIO | BufferedRandom, head: bytes, checksum: str) -> str:
    """Of a file with that header, read by one thread at a time and hashed by several."""
    size, lock = os.fstat(file.fileno()).st_size, Lock()

    def digest(start: int) -> bytes:
        block = memoryview(bytearray(min(BLOCK, size - start)))
        with lock:
            file.seek(start)
            read = file.readinto(block)
        return sha256(block[:read]).digest()

    whole = sha256(head.replace(checksum.encode(), UNKNOWN.encode()))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for each in pool.map(digest, range(HEADER, size, BLOCK)):
            whole.update(each)
    return whole.hexdigest()


# --- writing ------------------------------------------------------------------------------------------------------------------


def write_index(path: Path, about: About, dim: int, chunks: Iterable[Chunk]) -> int:
    """Streams ``chunks`` to a file that takes the place of ``path``, and its permissions, when it is whole. -> the number of rows

    Hold the lock. On Windows a file that is mapped cannot be replaced: keep no Index of ``path`` beside ``chunks``.
    """
    ends, ids = array("q"), bytearray()
    with (
        write_errors(f"{path}:", "check the space left and the permissions", BundleError),
        written(path, beside(path, "new"), mode=0o600) as new,  # where a process died, its file is there
        new.open("r+b") as file,
    ):
        file.seek(HEADER)
        for embeddings, names in chunks:
            file.write(np.ascontiguousarray(embeddings, "<f2").data)
            for name in names:
                ids += name.encode()
                ends.append(len(ids))
        file.write(np.array(ends, "<i8").data)
        file.write(ids)
        file.flush()
        head = _header(about, len(ends), dim, len(ids))
        head = head.replace(UNKNOWN.encode(), _checksum(file, head, UNKNOWN).encode())
        file.seek(0)
        file.write(head)
    return len(ends)


def _header(about: About, rows: int, dim: int, id_bytes: int) -> bytes:
    metadata = {"schema": INDEX_SCHEMA, **asdict(about), "bundle": about.bundle[:200], "checksum": UNKNOWN}
    text = json.dumps({"__metadata__": metadata, **_tensors(rows, dim, id_bytes)}).encode()
    return (HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8)


def _tensors(rows: int, dim: int, id_bytes: int) -> dict[str, Any]:
    first, second = 2 * rows * dim, 2 * rows * dim + 8 * rows
    return {
        "embeddings": {"dtype": "F16", "shape": [rows, dim], "data_offsets": [0, first]},
        "id_ends": {"dtype": "I64", "shape": [rows], "data_offsets": [first, second]},
        "ids": {"dtype": "U8", "shape": [id_bytes], "data_offsets": [second, second + id_bytes]},
    }


def beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process writes to an index. The system lets the lock go when a process ends, however it ends, so none is ever stale."""
    lock = beside(path, "lock")
    try:
        file = _locked_file(lock)
    except BlockingIOError:
        raise BundleError(f"{path}: another process is writing to it", "wait until that is done") from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror})", "check the folder and its permissions") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file; there an empty one stays
            lock.unlink()
        file.close()


def _locked_file(path: Path) -> BufferedWriter:
    while True:
        file = path.open("ab")
        try:
            _lock(file.fileno())
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:  # who held it removed it between our two lines
            pass
        except OSError:
            file.close()
            raise
        file.close()


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
