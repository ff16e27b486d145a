"""The unit of systemd, and `doctor --ward`."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.command import Result, process
from tests.tree import ROOT

UNIT = ROOT / "pmclip_deploy" / "serve" / "pmclip-deploy.service"


def test_doctor_says_whether_serve_works() -> None:
    pytest.importorskip("fastapi", reason="serving needs the extra `ward`")
    done = process("doctor", "--ward", "--json")
    ward = done.json["ward"]
    assert done.code == 0 and ward["problem"] is None and ward["reader"] == "starts" and all(ward["packages"].values())
    assert "serve works here" in process("doctor", "--ward").out and "ward" not in process("doctor", "--json").json


def test_the_units_are_valid_and_closed(tmp_path: Path, command: Callable[..., Result]) -> None:
    """Of `serve`, and what `ward init` writes for `listen`."""
    folder = tmp_path / 'a "ward" at 100%'
    assert command("ward", "init", folder).code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["chest.yaml", "pmclip-node.service", "pmclip-node.xml", "ward.yaml"]
    service = ElementTree.parse(folder / "pmclip-node.xml").getroot()
    assert service.findtext("arguments") == 'listen --config "%BASE%\\ward.yaml"'
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for unit in (UNIT, folder / "pmclip-node.service"):
        found = subprocess.run(["systemd-analyze", "security", "--offline=true", "--threshold=29", unit], capture_output=True, text=True)
        assert found.returncode == 0 and "exposure level" in found.stdout, found.stdout[-500:]
        found = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
        faults = [line for line in found.stderr.splitlines() if unit.name in line and "is not executable" not in line]
        assert not faults


PLACED = """
set -e
ip link set lo up
! curl -s -m 2 http://192.0.2.1
{python} -m venv opt
opt/bin/pip install -q --no-index --find-links wheels 'pmclip-deploy[ward]'
cd opt
bin/pmclip-deploy doctor --ward
(umask 077; openssl rand -base64 32 > token)
bin/pmclip-deploy serve --port 8765 --token-file token &
service=$!
trap "kill $service" EXIT
curl -s -o /dev/null --retry 60 --retry-delay 1 --retry-connrefused http://127.0.0.1:8765/health/live
ask() {{ curl -fs -H "Authorization: Bearer $(cat token)" "$@"; }}
ask http://127.0.0.1:8765/health/ready
ask -F image=@$(echo lib/python3*/site-packages/pmclip_deploy/models/demo/leg-1.dcm) -F 'questions=is there a fracture?' http://127.0.0.1:8765/v1/answers
test -f lib/python3*/site-packages/pmclip_deploy/serve/pmclip-deploy.service
curl -fs http://127.0.0.1:8765/page/swagger/swagger-ui-bundle.js > /dev/null
trap - EXIT
kill $service
wait $service
"""


@pytest.mark.nightly
def test_it_is_installed_and_answers_where_there_is_no_network(tmp_path: Path) -> None:
    """docs/howto/serve-install.md: wheels from a machine with a network, then everything else without one."""
    apart = ["unshare", "--net", "--map-root-user"]
    if not all(map(shutil.which, ("unshare", "ip", "curl", "openssl"))) or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare, ip, curl and openssl, and the right to use a network of its own")
    made = [sys.executable, "-m", "pip", "wheel", "--quiet", f"{ROOT}[ward]", "--wheel-dir", str(tmp_path / "wheels")]
    subprocess.run(made, check=True, timeout=3000)
    away = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = PLACED.format(python=sys.executable)
    done = subprocess.run([*apart, "bash", "-c", script], cwd=tmp_path, env=away, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert "serve works here" in done.stdout and '"ready":true' in done.stdout and '"answer":"yes"' in done.stdout
