"""Ray on two machines, which are two network namespaces of this one with a cable between them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="needs the extra `archive`")

from pmclip_deploy.benchmarks.archive import rows
from pmclip_deploy.benchmarks.archive_noting import MAIN, noted
from tests.search.test_search import picture

NODES = [f"pmclip-{os.getpid()}-{n}" for n in (1, 2)]
HEAD, OTHER = "10.77.0.1", "10.77.0.2"
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-this-test-alone-" + "0" * 40}


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


def kill(node: str) -> None:
    """Every process of a machine."""
    for pid in ip("netns", "pids", node).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def nodes() -> Iterator[dict[str, str]]:
    """Two machines of one processor each that form a cluster; the environment of what runs there."""
    pytest.importorskip("ray", reason="needs the extra `ray`")
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("needs root and `ip` (Debian: iproute2), which make network namespaces")
    folder = tempfile.mkdtemp(prefix="pm")  # sockets' paths are short
    # Ray keeps in the environment what this process's own clusters are
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | TOKEN
    try:
        for node in NODES:
            if subprocess.run(["ip", "netns", "add", node], capture_output=True).returncode:
                pytest.skip("network namespaces are not allowed here")
        ip("-n", NODES[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", NODES[1])
        for node, address in zip(NODES, (HEAD, OTHER), strict=True):
            for of in (("link", "set", "lo", "up"), ("addr", "add", f"{address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
                ip("-n", node, *of)
            which = ["--head", "--temp-dir", folder, "--include-dashboard=false"] if address == HEAD else ["--address", f"{HEAD}:6379"]
            start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus", "1", "--num-gpus", "0", "--disable-usage-stats"]
            start += ["--node-ip-address", address, "--object-store-memory", str(100 << 20), *which]
            started = subprocess.run(["ip", "netns", "exec", node, *start], env=environment, capture_output=True, text=True)
            assert started.returncode == 0, started.stderr
        yield environment
    finally:
        for node in NODES:
            with suppress(subprocess.CalledProcessError):
                kill(node)
                ip("netns", "del", node)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.nightly  # starts two Ray nodes
def test_a_node_that_is_lost_loses_and_doubles_no_row(nodes: dict[str, str], bundle: Path, tmp_path: Path) -> None:
    for seed in range(7):
        picture(tmp_path / f"{seed}.png", seed)
    (tmp_path / "in").mkdir()
    for number in range(400):
        (tmp_path / "in" / f"{number:03}.png").symlink_to(tmp_path / f"{number % 7}.png")
    command = [sys.executable, "-c", MAIN, "archive", "embed", tmp_path / "in", "--bundle", bundle, "--batch", "2", "--workers", "2"]
    command += ["--json"]
    out, on_ray = tmp_path / "ray", ["--engine", "ray", "--ray-address", f"{HEAD}:6379"]
    with subprocess.Popen(
        ["ip", "netns", "exec", NODES[0], *command, *on_ray, "--out", out],
        env=nodes, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        end = time.monotonic() + 120
        while len({where for _, where in noted(out)}) < 2 or len(noted(out)) < 40:
            assert process.poll() is None and time.monotonic() < end, "both nodes take part"
            time.sleep(0.02)
        kill(NODES[1])
        known = len(noted(out))
        said, errors = process.communicate(timeout=240)
    assert process.returncode == 0 and known < 380 and json.loads(said)["computed"] == 400, errors
    assert all("images" in line for line in errors.splitlines()), errors  # nothing but the progress
    assert subprocess.run([*command, "--out", tmp_path / "local"], capture_output=True, timeout=240).returncode == 0
    assert rows(out).num_rows == 400 and rows(out).equals(rows(tmp_path / "local"))
    images = [key for key, _ in noted(out)]
    assert len(set(images)) == 400 and len(images) <= 402  # the batch that the lost node was at
