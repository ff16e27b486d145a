"""A node in a process of its own, images to send to it, and a sender."""

import json
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from pynetdicom import AE

from tests.command import MAIN, started

PROTOCOL = """\
name: any
revision: 3
match: {Modality: [CT, MR, CR, DX]}
pick: {choose: middle, max_images: 2}
questions:
  - {id: modality, ask: "what imaging modality is shown?"}
  - {id: fracture, ask: "is there a fracture?", finding: [125605004, SCT, Fracture of bone]}
"""


@dataclass
class Node:
    process: "subprocess.Popen[str]"
    port: int
    folder: Path
    lines: list[str]

    def events(self, name: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [row for row in rows if row["event"] == name]

    def until(self, done: Callable[[], Any], seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not (found := done()):
            assert time.monotonic() < end and self.process.poll() is None, "".join(self.lines)
            time.sleep(0.05)
        return found

    def reports(self) -> list[Dataset]:
        """Those in the folder of reports, the oldest version first."""
        return sorted(map(dcmread, (self.folder / "reports").glob("*.dcm")), key=lambda one: "PredecessorDocumentsSequence" in one)

    def queue(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", MAIN, "queue", *arguments, "--config", str(self.folder / "ward.yaml")]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)


def configured(folder: Path, protocol: str = PROTOCOL, **changes: Any) -> Path:
    """ward.yaml: JSON is YAML."""
    ward = {
        "node": {"port": "0"},
        "peers": [{"aet": "SENDER", "addresses": ["127.0.0.1"]}],
        "complete": {"quiet_s": "1"},
        "protocols": ["any.yaml"],
        "send": [{"to": "folder:reports"}],
        "retry": {"first_s": "0.2", "max_s": "0.5"},
        "disk": {"refuse_below_gb": "0"},
    }
    (folder / "any.yaml").write_text(protocol, "utf-8")
    (folder / "ward.yaml").write_text(json.dumps(ward | changes), "utf-8")
    return folder / "ward.yaml"


@contextmanager
def listening(folder: Path, *before: str, **changes: Any) -> Iterator[Node]:
    """``before``: what the command begins with, such as strace."""
    command = [*before, sys.executable, "-c", MAIN, "listen", "--config", str(configured(folder, **changes))]
    with started(command, r"Listening as \S+ on \S+ port (\d+)") as (process, lines, port):
        yield Node(process, int(port), folder, lines)


def slices(count: int, **changes: Any) -> list[Dataset]:
    """CT images of one series, 5 mm apart."""
    study, series, made = generate_uid(), generate_uid(), []
    for number in range(count):
        one = dcmread(str(get_testdata_file("CT_small.dcm", download=False)))
        one.StudyInstanceUID, one.SeriesInstanceUID, one.SOPInstanceUID = study, series, generate_uid()
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
        one.InstanceNumber, one.ImagePositionPatient = number + 1, [0, 0, 5 * number]
        one.update(_of(changes))
        made.append(one)
    return made


def _of(changes: dict[str, Any]) -> Dataset:
    made = Dataset()
    for keyword, value in changes.items():
        setattr(made, keyword, value)
    return made


def sent(
    port: int, images: Sequence[Dataset], aet: str = "SENDER", called: str = "PMCLIP", tls: ssl.SSLContext | None = None
) -> list[int | None]:
    """The status of each C-STORE; None where no answer came. Raises ConnectionError if there is no association."""
    entity = AE(aet)
    for sop_class, syntax in dict.fromkeys((one.SOPClassUID, one.file_meta.TransferSyntaxUID) for one in images):
        entity.add_requested_context(sop_class, syntax)
    association = entity.associate("127.0.0.1", port, ae_title=called, tls_args=tls and (tls, "localhost"))
    if not association.is_established:
        raise ConnectionError("rejected" if association.is_rejected else "no association")
    try:
        return [association.send_c_store(one).get("Status") if association.is_established else None for one in images]
    finally:
        if association.is_established:
            association.release()


def asked(port: int, what: str) -> tuple[int, str]:
    """(status, body) of /metrics, /live or /ready."""
    reply = httpx.get(f"http://127.0.0.1:{port}/{what}", trust_env=False)
    return reply.status_code, reply.text
