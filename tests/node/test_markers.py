"""What names a patient, or is a peer's text, comes out of a node nowhere: log, metrics, queue, names of files, and audit trail.

Markers stand in every element of text, private and nested ones too, in UIDs, in names of files, in what peers say of themselves and
in what archives answer. The node has no log levels, so that there is no more to switch on. What may come out is said below.
"""

import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

for needed in ("pynetdicom", "highdicom", "starlette", "yaml", "prometheus_client", "httpx"):
    pytest.importorskip(needed, reason="needs the extra `ward`")

import pydicom
from pydicom import DataElement, Dataset, dcmread
from pydicom.datadict import DicomDictionary
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit
from pynetdicom import AE, evt
from pynetdicom.pdu_primitives import UserIdentityNegotiation

from tests.node.running import Node, asked, listening, sent, slices
from tests.node.test_audit import COMPREHENSIVE_3D, free_port
from tests.node.test_hostile import mutations, pdus, stored, thrown

TEXTS = {"AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UR", "UT"}
NUMBERS = {"DS", "IS"}
NEEDED = {  # to be received, matched and read
    "SpecificCharacterSet", "Modality", "PhotometricInterpretation", "PixelPresentation", "LossyImageCompression", "TimezoneOffsetFromUTC",
}  # fmt: skip
UID = "7770001777"  # stands in every UID
SAFE = "1.2.777000777"  # in Study Instance UIDs of images that are read


@pytest.fixture(autouse=True)
def no_checks_on_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("reading_validation_mode", "_writing_validation_mode"):
        monkeypatch.setattr(pydicom.config.settings, mode, pydicom.config.IGNORE)


def marked(vrs: set[str], **changes: Any) -> Dataset:
    """A CT image with a marker in each element of these VRs that the dictionary has, and in each UID but that of the class."""
    (image,) = slices(1)
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if tag >> 16 > 2 and vr in vrs and keyword and keyword not in NEEDED:
            marker = f"ZQX{keyword[:12].upper()}"
            image[tag] = DataElement(tag, vr, "1" if vr in NUMBERS else marker)
            if vr in NUMBERS:
                image[tag]._value = marker  # pydicom refuses it
        elif tag >> 16 > 2 and vr == "UI" and "Class" not in keyword and keyword and keyword not in image:
            image[tag] = DataElement(tag, vr, f"1.2.{UID}.{tag}")
    item = Dataset()
    item[0x00100010] = DataElement(0x00100010, "PN", "ZQXNESTED")
    item[0x00091001] = DataElement(0x00091001, "UT", "ZQXNESTEDPRIVATE")
    image[0x00081115] = DataElement(0x00081115, "SQ", [item])
    for tag, vr in ((0x00090010, "LO"), (0x00091001, "PN"), (0x00091002, "UT"), (0x00091003, "UN")):
        image[tag] = DataElement(tag, vr, "ZQXPRIVATE" if vr != "UN" else b"ZQXUNKNOWN")
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"1.2.{UID}.{time.monotonic_ns()}"
    image.SeriesInstanceUID, image.StudyInstanceUID = f"1.2.{UID}.1", f"{SAFE}.{len(changes)}"
    image.file_meta.SourceApplicationEntityTitle = "ZQXSOURCE"
    for keyword, value in changes.items():
        setattr(image, keyword, value)
    return image


def of_file(folder: Path, image: Dataset) -> Dataset:
    file = folder / "ZQXFILE^NAME.dcm"
    image.save_as(file, enforce_file_format=True)
    return dcmread(file)


def crashing(folder: Path) -> Iterator[Dataset]:
    """Taken, and never read."""
    yield marked(TEXTS | NUMBERS, Rows=128)
    yield marked(TEXTS, BitsAllocated=7)
    yield marked(TEXTS, StudyInstanceUID="ZQXSTUDY")
    yield marked(TEXTS, Modality="ZQXMODALITY", PhotometricInterpretation="ZQXCOLOURS")
    broken = marked(TEXTS, PixelData=encapsulate([b"\xff\xd8\xff\xfe\x00\x12ZQXJPEGCOMMENT\0\0\xff\xd9"]))
    broken["PixelData"].VR, broken.file_meta.TransferSyntaxUID = "OB", JPEGBaseline8Bit
    yield of_file(folder, broken)


def mutated(image: Dataset, count: int) -> Iterator[bytes]:
    file = BytesIO()
    image.save_as(file)
    data = file.getvalue()[144 + int.from_bytes(file.getvalue()[140:144], "little") :]
    for one in mutations(b"\0\0\0\0\0\0" + data, 3, count):
        yield one[6:]


def refused(port: int, aet: str, called: str) -> None:
    entity = AE(aet)
    entity.implementation_version_name = "ZQXVERSION"
    entity.add_requested_context("1.2.840.10008.1.1")
    identity = UserIdentityNegotiation()
    identity.user_identity_type, identity.primary_field, identity.secondary_field = 2, b"ZQXUSER", b"ZQXPASSWORD"
    association = entity.associate("127.0.0.1", port, ae_title=called, ext_neg=[identity])
    assert association.is_rejected


class Web(BaseHTTPRequestHandler):
    """A web archive that refuses, in the words of a patient."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(409, "ZQXREASON")
        self.send_header("Warning", "ZQXWARNING")
        self.end_headers()
        self.wfile.write(b"ZQXBODY")

    def log_message(self, *_: Any) -> None:
        pass


def archive(port: int, seen: list[Dataset]) -> Any:
    """It takes the first report, and refuses others with a marker in its words."""

    def store(event: Any) -> Any:
        seen.append(event.dataset)
        answer = Dataset()
        answer.Status, answer.ErrorComment, answer.OffendingElement = 0x0110 if len(seen) > 1 else 0, "ZQXCOMMENT", 0x00100010
        return answer

    entity = AE("PACS")
    entity.implementation_version_name = "ZQXVERSION"
    entity.add_supported_context(COMPREHENSIVE_3D)
    return entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])


def test_markers_come_out_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    port, seen, said, names = free_port(), list[Dataset](), list[str](), set[str]()
    web = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    pacs = archive(port, seen)
    sends = [f"dicom:PACS@127.0.0.1:{port}", f"stow:http://127.0.0.1:{web.server_address[1]}/studies"]
    options: dict[str, Any] = {
        "audit": {"file": "audit.xml"},
        "metrics": {"port": "0"},
        "send": [{"to": "folder:reports"}, *({"to": to, "i_understand_this_is_research": "true"} for to in sends)],
    }
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            names.update(path.name for path in (tmp_path / "state").rglob("*"))

    watching = threading.Thread(target=watch, daemon=True)
    with listening(tmp_path, **options) as node:
        watching.start()
        everything(node, tmp_path)
        watched = node.events("metrics")[0]["port"]
        said += [asked(watched, what)[1] for what in ("metrics", "ready", "live", "ZQXNOTHING")]
        for arguments in (
            ["show"],
            ["show", "--json"],
            ["retry", "2"],
            ["drop", "3"],
            ["drop", "999"],
            ["export", "1", str(tmp_path / "out")],
        ):
            done = node.queue(*arguments)
            said += [done.stdout, done.stderr]
        ended.set()
        watching.join()
    pacs.shutdown()
    web.shutdown()
    names |= {path.name for folder in ("state", "reports", "out") for path in (tmp_path / folder).rglob("*")}
    printed = capfd.readouterr()

    patient = f"{seen[0].PatientName} {seen[0].PatientID}"
    assert patient == "ZQXPATIENTNAME ZQXPATIENTID" and len(names) > 15  # reports name the patient: archives need it
    assert len(seen) > 1 and len(node.events("rejected")) > 1 and node.events("failed") and len(node.events("refused")) > 3
    trail = "\n".join(file.read_text("utf-8") for file in tmp_path.glob("audit-*.xml"))
    assert SAFE in trail and trail.count('"110113"') == len(node.events("rejected"))  # the trail names studies, by their UIDs
    for text in ("".join(node.lines), printed.out, printed.err, *said, *names, trail):
        at = max(text.upper().find("ZQX"), text.find(UID))
        assert at < 0, text[max(at - 500, 0) : at + 100]
    for text in ("".join(node.lines), printed.out, *said, *names):
        assert SAFE not in text
    states = b"".join(file.read_bytes() for file in (tmp_path / "state").glob("queue.db*"))
    assert UID.encode() in states and set(re.findall(rb"ZQX[A-Z]+", states)) == {b"ZQXSTUDY"}  # the ledger has UIDs, and no other text


def everything(node: Node, folder: Path) -> None:
    """Images that are read, images that are not, refused peers, and streams that break off."""
    assert sent(node.port, [of_file(folder, marked(TEXTS))]) == [0]
    node.until(lambda: len(node.events("sent")) == 2 and node.events("refused"))  # to the folder and the archive; not to the web
    refused(node.port, "ZQXCALLING", "PMCLIP")
    refused(node.port, "SENDER", "ZQXCALLED")
    statuses = [status for image in crashing(folder) for status in sent(node.port, [image])]
    assert statuses == [0] * 5  # they are kept, and said to be unreadable later
    assert 0 in stored(node.port, mutated(image := marked(TEXTS, StudyInstanceUID=f"{SAFE}.9"), 30), image)
    with socket.create_connection(("127.0.0.1", node.port)) as peer:
        peer.sendall(b"ZQXSTREAM" * 100)
    for stream in mutations(request(), 5, 20):
        thrown(node.port, stream)
    node.until(lambda: node.events("failed"))
    time.sleep(2.5)  # later reports are made and refused
    node.until(lambda: "collecting" not in (text := node.queue("show").stdout) and "running" not in text)


def request() -> bytes:
    """What a peer writes to ask for an association."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        entity = AE("ZQXCALLING")
        entity.add_requested_context("1.2.840.10008.1.1")
        entity.acse_timeout = 0.5
        asking = threading.Thread(target=entity.associate, args=("127.0.0.1", listener.getsockname()[1]), kwargs={"ae_title": "ZQXCALLED"})
        asking.start()
        peer, _ = listener.accept()
        with peer:
            heard = peer.recv(1 << 16)
        asking.join()
    assert pdus(heard)
    return heard
