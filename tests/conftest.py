"""Fixtures that every test folder shares."""

import os
import signal
from pathlib import Path

import pytest

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before a test file imports onnxruntime, which would report to its maker
ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("PMCLIP_SHARED", ROOT.parent / "shared" / "data"))

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests in the background has them ignore Ctrl-C


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it skip where it isn't."""
    if not SHARED.is_dir():
        pytest.skip("needs the real data in ../shared/data")
    return SHARED
