"""No version that pyproject.toml allows has a known vulnerability: pip-audit over the lowest and the newest of them."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.sources import ROOT

IGNORED: dict[str, str] = {}  # a vulnerability's ID, and why it does not reach us
OFFLINE = ("connect", "resolve host", "name resolution", "timed out", "network", "dns error")
EXTRAS = ("train", "export", "sign", "ward", "triton")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, timeout=300)


def skip_offline(said: str, what: str) -> None:
    last = (said.strip().splitlines() or ["no reason"])[-1].strip()[:200]
    if any(word in said.lower() for word in OFFLINE):
        pytest.skip(f"{what} reaches no index: {last}")
    pytest.fail(f"{what}: {last}")


@pytest.mark.nightly  # asks an index about a hundred packages, four times
@pytest.mark.parametrize("python", ["3.10", "3.13"])
@pytest.mark.parametrize("resolution", ["lowest-direct", "highest"])
def test_no_allowed_version_has_a_known_vulnerability(resolution: str, python: str, tmp_path: Path) -> None:
    for package in ("uv", "pip_audit"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed; it comes with the extra `dev`")
    pinned, extras = tmp_path / "pinned.txt", [f"--extra={extra}" for extra in EXTRAS]
    options = ["--quiet", "--no-header", "--no-annotate", f"--resolution={resolution}", f"--python-version={python}"]
    made = run("uv", "pip", "compile", *options, *extras, ROOT / "pyproject.toml", "--output-file", pinned)
    if made.returncode:
        skip_offline(made.stderr, "uv")
    done = run("pip_audit", "--requirement", pinned, "--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off")
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:
        skip_offline(done.stderr, "pip-audit")
    unknown = [row["name"] for row in found if "skip_reason" in row]
    vulnerable = {f"{row['name']} {row['version']}: {v['id']}" for row in found for v in row.get("vulns", ()) if v["id"] not in IGNORED}
    assert not vulnerable
    if unknown:  # an index that serves packages and does not say what is known of them
        pytest.skip(f"the index says nothing about {len(unknown)} of {len(found)} packages, the first: {unknown[0]}")
    assert len(found) > 20
