"""A copy of the sources to which a test adds what CONTRIBUTING's table says, and its command line in a process of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import MAIN
from tests.sources import FOLDERS, ROOT

TABLE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


class Tree:
    """The sources below ``folder``, links kept. A row of the table is named by what it adds: only what it says to write is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in FOLDERS:
            left_out = shutil.ignore_patterns("__pycache__", "models", "results")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=left_out)
        if not (folder / "pmclip_deploy" / "train").is_symlink():
            pytest.skip("a checkout without links")
        (folder / "pmclip_deploy" / "models").symlink_to(ROOT / "pmclip_deploy" / "models")

    def write(self, row: str, path: str, text: str) -> None:
        """A new file, in a folder that the row names."""
        assert f"{Path(path).parent.as_posix()}/" in named(row) and not (self.folder / path).exists()
        (self.folder / path).write_text(text, encoding="utf-8")

    def edit(self, row: str, path: str, *changes: tuple[str, str]) -> None:
        """Each text that stands once in a file that the row names, replaced."""
        assert path in named(row)
        text = (self.folder / path).read_text(encoding="utf-8")
        for old, new in changes:
            assert text.count(old) == 1, f"{path}: {text.count(old)} times {old!r}"
            text = text.replace(old, new)
        (self.folder / path).write_text(text, encoding="utf-8")

    def python(self, code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "COLUMNS": "200"}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, cwd=self.folder)

    def fails(self, *arguments: object) -> tuple[int, str]:
        """(exit code, what a command says)"""
        done = self.python(MAIN, *arguments)
        assert done.returncode, done.stdout
        return done.returncode, done.stderr

    def runs(self, *arguments: object, code: str = MAIN) -> str:
        """What a command prints."""
        done = self.python(code, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout


def written(row: str) -> str:
    """What the table says to write."""
    (line,) = [line for line in TABLE.splitlines() if line.startswith(f"| {row} |")]
    return line.split(" | ")[1]


def named(row: str) -> list[str]:
    """The files and, with a slash at the end, the folders of it."""
    return re.findall(r"`([\w./]+)`", written(row))
