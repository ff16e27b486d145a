"""Run in a network namespace of its own: an archive of what Orthanc holds, by DICOMweb.

Usage: python -m tests.archive.orthanc_web FOLDER BUNDLE OUT SALT FILE...
"""

import subprocess
import sys
from pathlib import Path

from tests.command import MAIN
from tests.report import orthanc


def main() -> None:
    folder, bundle, out, salt, *files = map(Path, sys.argv[1:])
    orthanc.loopback_up()
    with orthanc.running(folder):
        for file in files:
            orthanc.store(file)
        command = [sys.executable, "-c", MAIN, "archive", "embed", f"http://127.0.0.1:{orthanc.HTTP}/dicom-web/", "--out", out]
        options = ["--bundle", bundle, "--workers", "1", "--ids", "uid", "--salt-file", salt, "--json"]
        for _ in range(2):
            done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200)
            print(done.stdout.replace("\n", ""), file=sys.stdout)
            if done.returncode:
                raise SystemExit(done.stderr)


if __name__ == "__main__":
    main()
