"""The pictures that a command is given: which arguments name them, what is made of each, and which of them could not be read."""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from pmclip_deploy.beside import side_by_side
from pmclip_deploy.console import counted, print_error, print_note, progress
from pmclip_deploy.errors import InputError
from pmclip_deploy.files import PICTURES, files_below, is_no_picture, unreadable

T = TypeVar("T")


class Pictures:
    """The pictures of files and folders, in order.

    A picture that cannot be read is an error on stderr and does not stop the others. ``unreadable`` lists them, and ``exit_code`` tells.
    Files of a folder that are no pictures are counted in a note, and ``no_pictures`` has their paths.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.alone = len(paths) == 1 and not paths[0].is_dir()
        self.unreadable = list[dict[str, str]]()
        self.no_pictures = list[str]()
        self._listed = dict[Path, tuple[list[Path], dict[Path, InputError]]]()

    @property
    def count(self) -> int:
        """How many files may be pictures: a tuning chooses by it."""
        return sum(len(self._files(path)[0]) if path.is_dir() else 1 for path in self.paths)

    @property
    def exit_code(self) -> int:
        return InputError.exit_code if self.unreadable else 0

    def to_json(self) -> dict[str, Any]:
        """What a document says of the files that gave no result."""
        return {"unreadable": self.unreadable, "no_pictures": self.no_pictures}

    def each(self, make: Callable[[Path], T], bar: str | None) -> Iterator[T]:
        """What ``make`` gives for each picture, in order; threads make some of them ahead. ``bar`` titles a progress bar.

        Raises InputError if a single path gives nothing.
        """
        for are_folders, paths in groupby(self.paths, Path.is_dir):
            if are_folders:
                for folder in paths:
                    yield from self._below(folder, make, bar)
                continue
            files = list(paths)
            for path, result in zip(files, side_by_side(make, files), strict=True):
                if not isinstance(result, InputError):
                    yield result
                elif self.alone:
                    raise result
                else:
                    self._note(path, result)

    def _below(self, folder: Path, make: Callable[[Path], T], bar: str | None) -> Iterator[T]:
        files, unlisted = self._files(folder)
        before, others, count = len(self.unreadable), list[str](), 0
        for each, error in unlisted.items():
            self._note(each, error)
        for file, result in zip(progress(files, bar) if bar else files, side_by_side(make, files), strict=True):
            if not isinstance(result, InputError):
                count += 1
                yield result
            elif is_no_picture(file, result):
                others.append(str(file))
            else:
                self._note(file, result)
        self.no_pictures += others
        if not count and before == len(self.unreadable):
            reason = f"{folder}: a folder without readable images ({counted(len(files), 'file')})"
            nothing = InputError(reason, "give DICOM, PNG or JPEG files")
            if len(self.paths) == 1:
                raise nothing
            self._note(folder, nothing)
        elif others:
            print_note(f"{folder}: {counted(len(others), 'file is no picture', 'files are no pictures')}")

    def _files(self, folder: Path) -> tuple[list[Path], dict[Path, InputError]]:
        """``files_below``, listed once."""
        if folder not in self._listed:
            self._listed[folder] = files_below(folder)
        return self._listed[folder]

    def _note(self, path: Path, error: InputError) -> None:
        self.unreadable.append(unreadable(path, error))
        print_error(str(error))


def leading_pictures(arguments: Sequence[str]) -> int:
    """How many of the first arguments name files or folders."""
    return next((i for i, argument in enumerate(arguments) if not exists(argument)), len(arguments))


def exists(argument: str) -> bool:
    try:
        return bool(argument.strip()) and Path(argument).exists()
    except (OSError, ValueError):  # a question may be too long for a file's name
        return False


def is_named_as_file(argument: str) -> bool:
    return argument.lower().endswith((*PICTURES, ".gz", ".zip"))


def looks_like_a_path(argument: str) -> bool:
    return is_named_as_file(argument) or (("/" in argument or os.sep in argument) and " " not in argument)
