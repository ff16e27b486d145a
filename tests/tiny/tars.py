"""Tar files of what is given, each file with (name, content, and what else its header says)."""

import io
import tarfile
from pathlib import Path
from typing import Any


def header(name: str, content: bytes = b"", **about: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in {"size": len(content), **about}.items():
        setattr(info, key, value)
    return info


def tar(path: Path, *entries: tuple[Any, ...]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as file:
        for name, content, *about in entries:
            file.addfile(header(name, content, **dict(*about)), io.BytesIO(content))
    return path
