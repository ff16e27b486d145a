"""A DICOM node beside DCMTK's storescp: images a second over several associations, and the time from a study's last image to its report.

    python -m pmclip_deploy.benchmarks.node [--images 400] [--associations 4] [--rounds 3] [--studies 5]

DCMTK's storescu sends CT images of 512 x 512 pixels to each receiver in turn, first as it is, then with TCP_NODELAY for it and
for storescp. storescp writes without a sync; the node syncs each image, its folder and its row before it answers.
`benchmarks.node_archive` times a report in an archive.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pmclip_deploy.benchmarks import harness
from pmclip_deploy.errors import UsageError

QUIET_S = 2
PROTOCOL = """\
name: speed
revision: 1
match: {Modality: [CT]}
questions: [{id: modality, ask: "what imaging modality is shown?"}]
"""


def images(folder: Path, count: int, studies: int = 1) -> list[Path]:
    """CT images of 512 x 512 pixels."""
    from pydicom import dcmread
    from pydicom.data import get_testdata_file
    from pydicom.uid import generate_uid

    made, one = [], dcmread(str(get_testdata_file("CT_small.dcm", download=False)))
    pixels = np.kron(one.pixel_array, np.ones((4, 4), np.int16))
    one.Rows = one.Columns = 512
    one.PixelData = pixels.tobytes()
    folder.mkdir(parents=True)
    for number in range(count):
        if number % max(count // studies, 1) == 0:
            one.StudyInstanceUID, one.SeriesInstanceUID = generate_uid(), generate_uid()
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        one.InstanceNumber = number + 1
        one.save_as(folder / f"{number:05}.dcm", enforce_file_format=True)
        made.append(folder / f"{number:05}.dcm")
    return made


@contextmanager
def node(folder: Path, quiet_s: float, to: str = "folder:reports") -> Iterator[int]:
    """Its port. Reports go to ``folder``/reports, or to another destination."""
    folder.mkdir()
    (folder / "speed.yaml").write_text(PROTOCOL)
    ward = {
        "node": {"port": "0", "max_associations": "64"},
        "peers": [{"aet": "STORESCU", "addresses": ["127.0.0.1"]}],
        "complete": {"quiet_s": str(quiet_s)},
        "protocols": ["speed.yaml"],
        "send": [{"to": to, "i_understand_this_is_research": "true"}],
        "disk": {"refuse_below_gb": "0"},
    }
    (folder / "ward.yaml").write_text(json.dumps(ward))  # JSON is YAML
    process = subprocess.Popen([*harness.CLI, "listen", "--config", str(folder / "ward.yaml")], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield next(int(line.rsplit(" ", 1)[1]) for line in process.stderr if "Listening" in line)
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def storescp(folder: Path, nodelay: bool) -> Iterator[int]:
    folder.mkdir()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = int(bound.getsockname()[1])
    process = subprocess.Popen(["storescp", "--fork", "--output-directory", str(folder), str(port)], env=environment(nodelay))
    try:
        for _ in range(100):
            if subprocess.run(["echoscu", "127.0.0.1", str(port)], capture_output=True).returncode == 0:
                break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


def environment(nodelay: bool) -> dict[str, str]:
    """An environment for DCMTK's programs."""
    return {**os.environ, "TCP_NODELAY": str(int(nodelay))}


def seconds_to_send(port: int, files: list[Path], associations: int, nodelay: bool = False) -> float:
    begun = time.perf_counter()
    parts = [files[i::associations] for i in range(associations)]
    command = ["storescu", "-aec", "PMCLIP", "-aet", "STORESCU", "127.0.0.1", str(port)]
    senders = [subprocess.Popen([*command, *map(str, part)], env=environment(nodelay)) for part in parts]
    if any([sender.wait() for sender in senders]):
        raise SystemExit("storescu failed")
    return time.perf_counter() - begun


def seconds_to_report(port: int, reports: Callable[[], int], files: list[Path]) -> float:
    """From the answer to the last image, until there is a report more."""
    before = reports()
    seconds_to_send(port, files, 1)
    begun = time.perf_counter()
    while reports() == before:
        time.sleep(0.01)
    return time.perf_counter() - begun


def print_waits(folder: Path, studies: int, port: int, where: str, reports: Callable[[], int]) -> None:
    files = images(folder, 10 * studies, studies)
    waits = [seconds_to_report(port, reports, files[10 * i :][:10]) for i in range(studies)]
    print(f"last image to report in {where}, quiet time {QUIET_S} s: median {statistics.median(waits):.2f} s, most {max(waits):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--associations", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--studies", type=int, default=5)
    options = parser.parse_args()
    if missing := [name for name in ("storescu", "storescp", "echoscu") if shutil.which(name) is None]:
        raise UsageError(f"{missing[0]} is not installed", "Debian has it in dcmtk")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for nodelay in (False, True):
            rates = {"storescp": list[float](), "listen": list[float]()}
            for number in range(options.rounds):
                files = images(folder / f"images {nodelay} {number}", options.images)
                for name, of in rates.items():
                    at = folder / f"{name} {nodelay} {number}"
                    with storescp(at, nodelay) if name == "storescp" else node(at, 3600) as port:
                        of.append(options.images / seconds_to_send(port, files, options.associations, nodelay))
            print("with TCP_NODELAY" if nodelay else "storescu as it is")
            for name, of in rates.items():
                print(f"    {name}: {statistics.median(of):.1f} images a second (rounds {', '.join(f'{rate:.1f}' for rate in of)})")
            ratios = [ours / theirs for ours, theirs in zip(rates["listen"], rates["storescp"], strict=True)]
            print(f"    listen beside storescp: {statistics.median(ratios):.2f}", flush=True)
        with node(folder / "node", QUIET_S) as port:
            reports = folder / "node" / "reports"
            print_waits(folder / "studies", options.studies, port, "a folder", lambda: len(list(reports.glob("*.dcm"))))


if __name__ == "__main__":
    main()
