"""Fixtures that every test folder shares, how two workers share the tests, and what a marker must say."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.cores import take_share

take_share()  # before a library counts the cores

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before a test file imports onnxruntime, which would report to its maker
ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("PMCLIP_SHARED", ROOT.parent / "shared" / "data"))

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests in the background has them ignore Ctrl-C


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests go to one worker, which makes the file's fixtures once; files go in the order of ``pytest_collection_modifyitems``."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


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
    """The folder of real data beside the checkout; tests that need it skip where it isn't."""
    if not SHARED.is_dir():
        pytest.skip("needs the real data in ../shared/data")
    return SHARED
