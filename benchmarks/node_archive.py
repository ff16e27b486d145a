"""The time from a study's last image to its report in Orthanc.

    python -m pmclip_deploy.benchmarks.node_archive [--studies 5]

Orthanc listens on every interface, whatever its configuration says, so that all of it runs in a network namespace (Debian: orthanc,
dcmtk, util-linux, iproute2). The time includes that of asking Orthanc for its number of instances, every 10 ms.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pmclip_deploy.benchmarks.node import QUIET_S, node, print_waits
from pmclip_deploy.errors import UsageError

HTTP, DICOM = 8042, 4242
APART = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@contextmanager
def orthanc(folder: Path) -> Iterator[None]:
    folder.mkdir()
    settings = {
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "HttpPort": HTTP,
        "DicomPort": DICOM,
        "DicomCheckCalledAet": False,
        "AuthenticationEnabled": False,
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with subprocess.Popen(["Orthanc", folder / "orthanc.json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 60
            while True:
                try:
                    instances()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > end:
                        raise SystemExit("Orthanc did not start") from None
                    time.sleep(0.1)
            yield
        finally:
            process.terminate()


def instances() -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{HTTP}/statistics", timeout=30) as reply:
        return int(json.load(reply)["CountInstances"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=5)
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)  # it runs in the namespace
    options = parser.parse_args()
    if missing := [name for name in ("Orthanc", "storescu", "unshare", "ip") if shutil.which(name) is None]:
        raise UsageError(f"{missing[0]} is not installed", "Debian has it in orthanc, dcmtk, util-linux or iproute2")
    if not options.apart:
        raise SystemExit(subprocess.run([*APART, sys.executable, "-m", __spec__.name, "--apart", *sys.argv[1:]]).returncode)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with orthanc(folder / "orthanc"), node(folder / "node", QUIET_S, f"dicom:ORTHANC@127.0.0.1:{DICOM}") as port:
            print_waits(folder / "studies", options.studies, port, "Orthanc", instances)


if __name__ == "__main__":
    main()
