"""Fixtures that every test folder shares, how two workers share the tests, and what a marker must say."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command import Result
from tests.cores import take_share
from tests.sources import SHARED

take_share()  # before a library counts the cores

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before a test file imports onnxruntime, which would report to its maker

# A tuning of whoever runs the tests would change what they see.
os.environ["LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir(), "pmclip-deploy-tests"))

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests in the background has them ignore Ctrl-C


def pytest_configure(config: pytest.Config) -> None:
    """With ``-n``, a file's tests go to one worker, which makes its fixtures once; files keep ``pytest_collection_modifyitems``' order."""
    if config.getoption("dist", "no") == "load":  # what -n sets
        config.option.dist, config.option.loadscopereorder = "loadfile", False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where workers share the tests, files with slow tests come first: short ones fill the gap that the last long one leaves."""
    slow = set()
    for item in items:
        for mark in item.iter_markers("slow"):
            if not (len(mark.args) == 1 and isinstance(mark.args[0], str)):
                raise pytest.UsageError(f"{item.nodeid}: slow says why, as in @pytest.mark.slow('exports three precisions')")
            slow.add(item.path)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, which PMCLIP_SHARED names; tests that need it skip if it is missing."""
    if not SHARED.is_dir():
        pytest.skip("needs the real data; set PMCLIP_SHARED to its folder (default: ../shared/data)")
    return SHARED


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`pmclip-deploy ARGUMENTS` in this process: another one takes long to import torch."""
    from pmclip_deploy.cli import app

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["pmclip-deploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle that answers."""
    from tests.tiny.bundle import tiny_bundle

    return tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def run(command: Callable[..., Result], bundle: Path) -> Callable[..., Result]:
    """``command`` with the tiny bundle for infer and evaluate."""

    def run(*arguments: object) -> Result:
        with_bundle = ["--bundle", bundle] if arguments[:1] in (("infer",), ("evaluate",)) and "--bundle" not in arguments else []
        return command(*arguments, *with_bundle)

    return run


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a folder as one without permission to read it, which root always has."""

    def unlisted(folder: Path) -> None:
        scandir = os.scandir

        def refuses(path: Any = ".") -> Any:
            if os.fspath(path) == str(folder):
                raise PermissionError(13, "Permission denied", str(folder))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuses)

    return unlisted
