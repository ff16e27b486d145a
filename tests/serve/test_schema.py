"""The service keeps to its own description, whatever is sent: no 5xx that it does not name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.running import TOKEN, Running

pytest.importorskip("fastapi", reason="serving needs the extra `ward`")
pytest.importorskip("schemathesis", reason="makes requests with schemathesis")

NO_PICTURES = ("--exclude-checks", "positive_data_acceptance")  # of a file a schema says nothing: almost no bytes are a picture


def _schemathesis(service: Running, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "schema.json").write_bytes(service.client.get("/openapi.json").content)
    command = [
        "run",
        "schema.json",
        "--url",
        service.url,
        "-H",
        f"Authorization: Bearer {TOKEN}",
        "--no-color",
        "--request-timeout",
        "60",
        *options,
    ]
    code = "from schemathesis.cli import schemathesis; schemathesis()"
    return subprocess.run([sys.executable, "-c", code, *command], cwd=folder, capture_output=True, text=True, env={**os.environ, "CI": "1"})


@pytest.mark.slow("hundreds of requests that schemathesis makes up")
def test_requests_that_a_machine_makes_up(service: Running, tmp_path: Path) -> None:
    done = _schemathesis(
        service, tmp_path, "--checks", "not_a_server_error", "--max-examples", "15", "--seed", "7", "--phases", "examples,coverage,fuzzing"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert service.client.get("/health/ready").status_code == 200


@pytest.mark.nightly
def test_ten_minutes_of_them(service: Running, tmp_path: Path) -> None:
    done = _schemathesis(service, tmp_path, "--checks", "all", *NO_PICTURES, "--max-time", "600", "--max-examples", "100000")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
