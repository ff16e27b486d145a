"""The unit of systemd, and `doctor --ward`."""

import shutil
import subprocess

import pytest

from tests.command import process
from tests.tree import ROOT

UNIT = ROOT / "pmclip_deploy" / "serve" / "pmclip-deploy.service"


def test_doctor_says_whether_serve_works() -> None:
    pytest.importorskip("fastapi", reason="serving needs the extra `ward`")
    done = process("doctor", "--ward", "--json")
    ward = done.json["ward"]
    assert done.code == 0 and ward["problem"] is None and ward["reader"] == "starts" and all(ward["packages"].values())
    assert "serve works here" in process("doctor", "--ward").out and "ward" not in process("doctor", "--json").json


def test_the_unit_is_valid_and_closed() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    found = subprocess.run(["systemd-analyze", "security", "--offline=true", "--threshold=29", UNIT], capture_output=True, text=True)
    assert found.returncode == 0 and "exposure level" in found.stdout, found.stdout[-500:]
    found = subprocess.run(["systemd-analyze", "verify", UNIT], capture_output=True, text=True)
    faults = [line for line in found.stderr.splitlines() if UNIT.name in line and "is not executable" not in line]
    assert not faults
