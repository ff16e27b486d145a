"""An export that is told to end leaves nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs the extra `export`")

from pmclip_deploy.models import DEFAULT_BUNDLE
from tests.command import MAIN


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.slow("half an export for each signal")
@pytest.mark.parametrize("sent", [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.nightly) for s in (signal.SIGHUP, signal.SIGINT))])
def test_an_export_that_is_told_to_end_leaves_nothing(tmp_path: Path, sent: signal.Signals) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = ["export", DEFAULT_BUNDLE.parent / "checkpoint", "--output", tmp_path / "bundle", "--precision", "fp32"]
    child = subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, command)],
        env={**os.environ, "TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),  # the tests may run under nohup, which ignores SIGHUP
    )
    deadline = time.monotonic() + 300
    while not list(scratch.glob("pmclip-export-*/*")):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.05)
    child.send_signal(sent)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 128 + sent, said
    assert not list(scratch.glob("pmclip-*")) and [path.name for path in tmp_path.iterdir()] == ["scratch"]
