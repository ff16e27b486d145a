"""Run in a network namespace of its own: start Orthanc, send it files by C-STORE and STOW-RS, and print what it gives back, as JSON.

Usage: python orthanc.py FOLDER FILE...  Orthanc 1.10 listens on every interface whatever its configuration says.
"""

import base64
import fcntl
import json
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HTTP, DICOM = 8042, 4242
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
UP, SET, GET = 0x1, 0x8914, 0x8913  # IFF_UP, SIOCSIFFLAGS, SIOCGIFFLAGS


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        flags = struct.unpack("16sh", fcntl.ioctl(any_socket, GET, struct.pack("16sh", b"lo", 0)))[1]
        fcntl.ioctl(any_socket, SET, struct.pack("16sh", b"lo", flags | UP))


def ask(path: str, data: bytes | None = None, kind: str = "application/json") -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{HTTP}{path}", data, {"Content-Type": kind, "Accept": "*/*"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as reply:
        content: bytes = reply.read()
        return content


def wait_for(server: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < end:
        try:
            ask("/system")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit("Orthanc did not start")


def store(file: Path) -> None:
    done = subprocess.run(["storescu", "--required", "127.0.0.1", str(DICOM), str(file)], capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.decode(errors="replace"))


def stow(file: Path) -> None:
    body = b"--cut\r\nContent-Type: application/dicom\r\n\r\n" + file.read_bytes() + b"\r\n--cut--\r\n"
    ask("/dicom-web/studies", body, 'multipart/related; type="application/dicom"; boundary=cut')


def kept() -> dict[str, str]:
    """The file of each instance that Orthanc holds."""
    ids = json.loads(ask("/instances"))
    return {number: base64.b64encode(ask(f"/instances/{number}/file")).decode() for number in ids}


def apart() -> list[str]:
    """How a command runs with a network of its own. The test skips where it cannot, or where a program is missing."""
    import pytest

    for program, package in {"Orthanc": "orthanc", "storescu": "dcmtk", "unshare": "util-linux"}.items():
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed; Debian has it in {package}")
    if not PLUGIN.exists():
        pytest.skip("Orthanc's DICOMweb plugin is not installed; Debian has it in orthanc-dicomweb")
    command = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("network namespaces are not allowed here, and Orthanc listens on every interface")
    return command


@contextmanager
def running(folder: Path, **more: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """Orthanc on HTTP and DICOM, with its files in ``folder``, and ``more`` settings."""
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "Name": "test", "StorageDirectory": str(folder), "IndexDirectory": str(folder), "HttpPort": HTTP, "DicomPort": DICOM,
        "DicomAlwaysAllowStore": True, "AuthenticationEnabled": False, "RemoteAccessAllowed": False, "Plugins": [str(PLUGIN)],
        "OverwriteInstances": True, "DicomCheckCalledAet": False, **more,
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("ab") as log, subprocess.Popen(["Orthanc", folder / "orthanc.json"], stdout=log, stderr=log) as server:
        try:
            wait_for(server)
            yield server
        finally:
            server.terminate()


def main() -> None:
    folder, files = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    loopback_up()
    with running(folder):
        found = {}
        for name, send in {"C-STORE": store, "STOW-RS": stow}.items():
            for file in files:
                send(file)
            found[name] = kept()
            for number in found[name]:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                    urllib.request.Request(f"http://127.0.0.1:{HTTP}/instances/{number}", method="DELETE"), timeout=30
                ).close()
        print(json.dumps(found))


if __name__ == "__main__":
    main()
