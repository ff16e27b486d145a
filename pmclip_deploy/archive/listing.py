"""What an archive holds: items of a folder, a list, a DICOMDIR or a DICOMweb service, one after another and never all at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.files import is_file
from pmclip_deploy.ids import id_from_path

LISTS = (".txt", ".lst")


class Item(NamedTuple):
    id: str
    source: str  # where a worker reads it: a path or a URL
    key: int  # 64 bits of a hash of the id, the file's size and its time of change; equal for a file that did not change


def items_of(source: str) -> Iterator[Item]:
    """Raises InputError or UsageError before the first item if there is nothing of the kind."""
    if source.startswith(("http://", "https://")):
        from pmclip_deploy.archive.web import instances

        return (Item(url, url, _key(url)) for url in instances(source))
    path = Path(source)
    if path.is_dir():
        return (_of_file(file, path) for file in _below(path))
    if not path.is_file():
        raise InputError(f"{source}: no such file or folder", "check the path")
    if path.name.upper() == "DICOMDIR":
        return (_of_file(file, path.parent) for file in _of_dicomdir(path))
    if path.suffix.lower() in LISTS:
        return (_of_file(file, None) for file in _of_list(path))
    raise UsageError(f"{source}: is no folder, no list (.txt), no DICOMDIR and no URL", "give one of these")


def _below(folder: Path) -> Iterator[Path]:
    """Every file, a folder at a time. A folder that cannot be listed comes as itself: its row says why."""
    unlisted = list[Path]()
    for parent, folders, names in os.walk(folder, onerror=lambda error: unlisted.append(Path(error.filename))):
        folders.sort()
        yield from (path for name in sorted(names) if is_file(path := Path(parent) / name))
    yield from unlisted


def _of_list(path: Path) -> Iterator[Path]:
    """A path a line, from the folder of the list where it is relative."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for line in file:
                if name := line.strip("\r\n"):
                    yield path.parent / name
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "check the path") from None


def _of_dicomdir(path: Path) -> Iterator[Path]:
    """Referenced File ID (0004,1500) of each record (PS3.3 F.3)."""
    from pydicom import dcmread

    try:
        records = dcmread(path).DirectoryRecordSequence
    except Exception:  # whatever pydicom raises for what is no DICOM file
        raise InputError(f"{path}: is no DICOMDIR", "give the folder") from None
    for record in records:
        if "ReferencedFileID" in record:
            parts = record.ReferencedFileID
            parts = [parts] if isinstance(parts, str) else [str(part) for part in parts]
            if parts and not any(part in ("", "..", ".") or "/" in part or "\\" in part for part in parts):
                yield path.parent.joinpath(*parts)


def _of_file(path: Path, folder: Path | None) -> Item:
    name = id_from_path(path if folder is None else path.relative_to(folder))
    try:
        found = path.stat()
        return Item(name, os.fspath(path.absolute()), _key(name, found.st_size, found.st_mtime_ns))
    except OSError:
        return Item(name, os.fspath(path.absolute()), _key(name))


def _key(*of: object) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(map(str, of)).encode()).digest()[:8], "little")
