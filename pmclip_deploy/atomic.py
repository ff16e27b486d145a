"""Files and folders that are whole or as they were: written under a name beside, synced, and put in place. Standard library only.

A full disk, a killed process or a power cut leaves the old content of a file. A folder that exists takes two renames to replace: a process
that is killed between them leaves the old folder as ``.NAME.(numbers).old`` and none under its name. ``written_into`` replaces each file in
one step, but not all of them at once. What fails is an OSError, whichever library wrote; ``write_errors`` makes one line of it.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE
from threading import get_ident

from pmclip_deploy.errors import PmclipError, UsageError


@contextmanager
def written(path: Path, new: Path | None = None, mode: int = 0o666) -> Iterator[Path]:
    """A new, empty file to write to, which takes the place of ``path``, and its permissions, at the end. Raises OSError.

    ``mode`` is a new file's, less the umask. ``new`` is the name beside; it is another process's remains where it exists, and goes.
    """
    new = _beside(path) if new is None else new
    with _as_os_error():
        try:
            new.unlink(missing_ok=True)
            os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))  # never through a link that somebody placed there
            permissions = new.stat().st_mode
            yield new
            _sync(new)
            if os.name == "posix":  # safetensors 0.8 makes its files private, whatever the umask
                new.chmod(S_IMODE(path.stat().st_mode if path.is_file() else permissions))
            new.replace(path)
            sync_folder(path.parent)
        finally:
            new.unlink(missing_ok=True)


def write(path: Path, content: bytes | str) -> None:
    """To where a user says: through a link, and straight into what cannot be replaced. Raises OSError.

    That is a device, a pipe, and a file that is open already: whoever opened it, such as a shell, goes on writing to it.
    """
    data = content.encode() if isinstance(content, str) else content
    if (number := _open_file(path)) is not None:
        with open(number, "wb", closefd=False) as file:  # where the file stands: opened by name, it would be emptied
            file.write(data)
    elif path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data)
    else:
        with written(Path(os.path.realpath(path))) as new:
            new.write_bytes(data)


def _open_file(path: Path) -> int | None:
    """The number of the file of this process that ``path`` names, as /dev/stdout does; None if it names none."""
    place = os.path.abspath(path)  # noqa: PTH100 - a resolved path would be the name of the file behind
    found = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,9})", place)
    return int(found[1]) if found else {"/dev/stdout": 1, "/dev/stderr": 2}.get(place)


def append(path: Path, content: bytes | str) -> None:
    """To the end of a file; what was written is taken back where the disk does not take all of it. Raises OSError."""
    fresh, size = not path.exists(), path.stat().st_size if path.is_file() else None
    try:
        with path.open("ab") as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError:
        if size is not None:
            os.truncate(path, size)
        elif fresh:
            path.unlink(missing_ok=True)
        raise


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """A new folder, which takes the place of ``folder`` as a whole, by two renames if ``folder`` exists. Raises OSError."""
    new, old = _beside(folder), _beside(folder, "old")
    with _as_os_error():
        try:
            new.mkdir(parents=True)
            yield new
            _sync_files(new)
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
            sync_folder(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def written_into(folder: Path) -> Iterator[Path]:
    """A new folder whose files go to ``folder``, which may hold others, one by one once all of them are whole. Raises OSError."""
    new = folder / _beside(folder).name
    with _as_os_error():
        try:
            new.mkdir(parents=True)
            yield new
            _sync_files(new)
            for file in sorted(new.iterdir()):
                file.replace(folder / file.name)
            sync_folder(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def write_errors(what: str, hint: str, error: type[PmclipError] = UsageError) -> Iterator[None]:
    """Raises ``error``, "WHAT cannot be written (the reason); HINT", in place of an OSError."""
    with _as_os_error():
        try:
            yield
        except OSError as fault:
            reason = fault.strerror or " ".join(str(fault).split())[:200] or type(fault).__name__
            raise error(f"{what} cannot be written ({reason})", hint) from fault


def sync_folder(folder: Path) -> None:
    """So that a rename in it outlasts a power cut."""
    if os.name == "posix":  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _beside(path: Path, ending: str = "new") -> Path:
    """Of this thread alone; short enough for any file system, however long the name is."""
    return path.with_name(f".{path.name[:50]}.{os.getpid()}.{get_ident()}.{ending}")


def _sync(file: Path) -> None:
    with file.open("r+b") as content:
        os.fsync(content.fileno())


def _sync_files(folder: Path) -> None:
    for file in folder.iterdir():
        (_sync_files if file.is_dir() else _sync)(file)
    sync_folder(folder)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """safetensors has an error of its own for a full disk, and torch's zip writer, closing, hides the disk's behind another one."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
