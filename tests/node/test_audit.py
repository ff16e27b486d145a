"""The audit trail of a node: which messages it holds, what they name, and that a node without its trail does nothing.

tests/node/audit.rng is ours. Its structure was taken from the Relax NG schema of PS3.15 A.5.1.1, read in a public copy of the
standard as text, whose edition is not named. It does not say PurposeOfUse, which later editions have. Not checked against the
original: the values that the tables of A.5.3 prescribe for each message, beyond what the tests below look at.
"""

import json
import os
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import pytest

for needed in ("pynetdicom", "highdicom", "starlette", "yaml", "prometheus_client", "httpx"):
    pytest.importorskip(needed, reason="needs the extra `ward`")


from tests.certificates import certificates
from tests.command import Result, is_one_line
from tests.node.running import asked, configured, listening, sent, slices
from tests.node.test_listen import Archive, free_port

COMPREHENSIVE_3D = "1.2.840.10008.5.1.4.1.1.88.34"


def lines(folder: Path) -> list[str]:
    return [line for file in sorted(folder.glob("audit-*.xml")) for line in file.read_text("utf-8").splitlines()]


def messages(folder: Path, event: str, action: str = "") -> list[Element]:
    found = list(map(fromstring, lines(folder)))
    return [one for one in found if code(one, "EventIdentification/EventID") == event and action in ("", action_of(one))]


def code(message: Element, path: str) -> str:
    found = message.find(path)
    return "" if found is None else found.attrib["csd-code"]


def action_of(message: Element) -> str:
    return attributes(message, "EventIdentification")[0]["EventActionCode"]


def attributes(message: Element, path: str) -> list[dict[str, str]]:
    return [dict(one.attrib) for one in message.findall(path)]


def objects(message: Element) -> dict[str, str]:
    """Of each participant object: the meaning of its identifier, and the identifier."""
    found = message.findall("ParticipantObjectIdentification")
    return {one[0].attrib["originalText"]: one.attrib["ParticipantObjectID"] for one in found}


def parties(message: Element) -> dict[str, dict[str, str]]:
    """By their role."""
    return {code(one, "RoleIDCode"): dict(one.attrib) for one in message.findall("ActiveParticipant")}


def counts(message: Element) -> dict[str, int]:
    return {one.attrib.get("UID", ""): int(one.attrib["NumberOfInstances"]) for one in message.iter("SOPClass")}


def test_each_event_is_written_once_and_as_the_schema_says(tmp_path: Path) -> None:
    port = free_port()
    archive = Archive(port, COMPREHENSIVE_3D)
    to = {"to": f"dicom:PACS@127.0.0.1:{port}", "i_understand_this_is_research": "true"}
    images, other = slices(3, PatientID="PATIENT-1"), slices(1, PatientID="PATIENT-2")
    with listening(tmp_path, audit={"file": "audit.xml"}, send=[{"to": "folder:reports"}, to]) as node:
        for aet, called in (("SOMEBODY", "PMCLIP"), ("SENDER", "OTHER")):
            with pytest.raises(ConnectionError):
                sent(node.port, images, aet, called)
        assert sent(node.port, [*images, *other, images[0]]) == [0] * 5  # two studies, and a copy
        node.until(lambda: len(node.events("sent")) == 4)
        archive.status = 0x0110
        assert sent(node.port, slices(1, PatientID="PATIENT-2")) == [0]
        node.until(lambda: node.events("refused"))
        assert node.queue("export", "1", str(tmp_path / "copies")).returncode == 0
    archive.server.shutdown()

    begun, received = messages(tmp_path, "110102"), messages(tmp_path, "110104", "C")
    assert [objects(one)["Study Instance UID"] for one in begun[:2]] == [images[0].StudyInstanceUID, other[0].StudyInstanceUID]
    assert [counts(one) for one in received] == [{images[0].SOPClassUID: 3}, {images[0].SOPClassUID: 1}, {images[0].SOPClassUID: 1}]
    source = parties(received[0])["110153"]
    assert source["AlternativeUserID"] == "AETITLES=SENDER" and source["NetworkAccessPointID"] == "127.0.0.1"
    assert source["UserIsRequestor"] == "true" and parties(received[0])["110152"]["AlternativeUserID"] == "AETITLES=PMCLIP"
    copies, *reports = messages(tmp_path, "110104", "R")
    assert counts(copies) == {images[0].SOPClassUID: 1} and objects(copies) == objects(received[0])
    outcomes = [attributes(one, "EventIdentification")[0]["EventOutcomeIndicator"] for one in reports]
    assert outcomes == ["0", "0", "8"] and {tuple(counts(one)) for one in reports} == {(COMPREHENSIVE_3D,)}
    assert parties(reports[0])["110152"]["UserID"] == "PACS"

    accessed, exported = messages(tmp_path, "110103"), messages(tmp_path, "110106")
    assert sorted(sum(counts(one).values()) for one in accessed) == [1, 1, 1]  # the middle one of each series
    assert len(exported) == 4 and parties(exported[0])["110154"]["UserID"] == (tmp_path / "reports").as_uri()
    assert "@" in parties(exported[3])["110153"]["UserID"] or "@" in exported[3].findall("ActiveParticipant")[0].attrib["UserID"]
    alerts = messages(tmp_path, "110113")
    assert [code(one, "EventIdentification/EventTypeCode") for one in alerts] == ["110126"] * 2
    assert [one.findall("ActiveParticipant")[1].get("AlternativeUserID") for one in alerts] == [None, "AETITLES=SENDER"]
    activity = [code(one, "EventIdentification/EventTypeCode") for one in messages(tmp_path, "110100")]
    assert activity == ["110120", "110121"]

    text = "\n".join(lines(tmp_path))
    assert "PATIENT-" not in text and "SOMEBODY" not in text and "CompressedSamples" not in text
    hashes = {objects(one)["Patient Number"] for one in (*begun, *received, *reports, *accessed, *exported)}
    assert len(hashes) == 2 and all(re.fullmatch(r"[0-9a-f]{64}", one) for one in hashes)
    if os.name == "posix":
        files = [*tmp_path.glob("audit-*.xml"), tmp_path / "state" / "audit.key"]
        assert len(files) > 1 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    of_schema(lines(tmp_path))


def of_schema(texts: list[str]) -> None:
    etree = pytest.importorskip("lxml.etree", reason="needs lxml, of the extra `dev`")
    schema = etree.RelaxNG(etree.parse(str(Path(__file__).with_name("audit.rng"))))
    for text in texts:
        schema.assertValid(etree.fromstring(text))
    broken = texts[0].replace("EventDateTime", "EventTime")
    assert not schema.validate(etree.fromstring(broken))


def test_the_patient_id_itself_if_asked_for(tmp_path: Path) -> None:
    with listening(tmp_path, audit={"file": "audit.xml", "hash_patient_id": "false"}) as node:
        odd = '<A&"B>\u00e9'
        assert sent(node.port, [*slices(1, PatientID=odd, SpecificCharacterSet="ISO_IR 192"), *slices(1, PatientID="")]) == [0, 0]
        node.until(lambda: len(messages(tmp_path, "110104", "C")) == 2)
        assert [objects(one)["Patient Number"] for one in messages(tmp_path, "110104", "C")] == [odd, "?"]
    assert not (tmp_path / "state" / "audit.key").exists()
    of_schema(lines(tmp_path))


def test_a_node_without_its_trail_takes_nothing_and_sends_nothing(tmp_path: Path) -> None:
    """The folder of the trail goes while an archive is away, and comes back."""
    trail, away, port = tmp_path / "trail", tmp_path / "away", free_port()
    trail.mkdir()
    to = {"to": f"dicom:PACS@127.0.0.1:{port}", "i_understand_this_is_research": "true"}
    options: dict[str, Any] = {"audit": {"file": "trail/audit.xml"}, "metrics": {"port": "0"}, "send": [to], "complete": {"quiet_s": "3"}}
    with listening(tmp_path, **options) as node:
        watched = node.events("metrics")[0]["port"]
        assert sent(node.port, slices(1)) == [0]
        node.until(lambda: node.events("postponed"))
        assert sent(node.port, slices(1)) == [0]  # a job that is not complete yet
        node.until(lambda: len(messages(trail, "110104", "C")) == 2)
        trail.rename(away)
        before = lines(away)
        assert sent(node.port, slices(2)) == [0xA700, 0xA700]
        status, body = asked(watched, "ready")
        assert status == 503 and json.loads(body)["reasons"] == ["the audit file cannot be written (No such file or directory)"]
        archive = Archive(port, COMPREHENSIVE_3D)
        node.until(lambda: len(node.events("complete")) == 2)
        time.sleep(3)  # in which a report would be made
        assert "1 ready" in node.queue("show").stdout
        assert not node.events("reported")[1:] and not archive.stored and len(node.events("audit")) == 1
        away.rename(trail)
        node.until(lambda: asked(watched, "ready")[0] == 200)
        assert sent(node.port, slices(2)) == [0, 0]
        node.until(lambda: len(archive.stored) == 3)
        archive.server.shutdown()
    assert [one["reason"] for one in node.events("audit")][1:] == ["it can be written again"]
    assert lines(trail)[: len(before)] == before and len(messages(trail, "110104", "R")) == 3
    of_schema(lines(trail))


def test_a_kill_leaves_the_begin_of_what_was_acknowledged(tmp_path: Path) -> None:
    with listening(tmp_path, audit={"file": "audit.xml"}, complete={"quiet_s": "1h"}) as node:
        from pynetdicom import AE

        (image,) = slices(1)
        entity = AE("SENDER")
        entity.add_requested_context(image.SOPClassUID, image.file_meta.TransferSyntaxUID)
        association = entity.associate("127.0.0.1", node.port, ae_title="PMCLIP")
        assert association.send_c_store(image).Status == 0
        node.process.kill()
        node.process.wait(60)
        association.abort()
    (begun,) = messages(tmp_path, "110102")
    assert objects(begun)["Study Instance UID"] == image.StudyInstanceUID and not messages(tmp_path, "110104")
    (file,) = tmp_path.glob("audit-*.xml")
    file.write_text(file.read_text() + "<AuditMess")  # what a power cut may leave
    with listening(tmp_path, audit={"file": "audit.xml"}):
        pass
    texts = lines(tmp_path)
    kinds = [code(fromstring(texts[i]), "EventIdentification/EventTypeCode") for i in (texts.index("<AuditMess") + 1, -1)]
    assert kinds == ["110120", "110121"]


@pytest.mark.parametrize(
    ("audit", "said"),
    [
        ({"file": "none/audit.xml"}, "the audit file cannot be written (No such file or directory)"),
        ({"syslog": "127.0.0.1:{port}"}, "the audit syslog cannot be written (Connection refused)"),
    ],
)
def test_start_and_check_say_that_a_trail_cannot_be_written(
    tmp_path: Path, command: Callable[..., Result], audit: dict[str, str], said: str
) -> None:
    audit = {key: value.format(port=free_port()) for key, value in audit.items()}
    config = configured(tmp_path, audit=audit)
    started = command("listen", "--config", config)
    assert started.code == 2 and said in started.err and is_one_line(started.err[started.err.index("error: ") :])
    checked = command("listen", "--config", config, "--check")
    assert checked.code == 7 and said in checked.out


class Repository:
    """A syslog server over TLS that keeps what it is sent, and may be closed and opened again."""

    def __init__(self, folder: Path, port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self.received, self.listener = bytearray(), socket.create_server(("127.0.0.1", port))
        self.context, self.open = context, list[socket.socket]()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        try:
            with self.context.wrap_socket(connection, server_side=True) as secured:
                self.open.append(secured)
                while data := secured.recv(1 << 16):
                    self.received += data
        except OSError:
            pass

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for one in self.open:
            with suppress(OSError):  # the node has closed it
                one.shutdown(socket.SHUT_RDWR)

    def messages(self) -> list[str]:
        """Octet counting (RFC 5425 4.3): the length, a space, and so many bytes."""
        rest, found = bytes(self.received), list[str]()
        while rest:
            length, _, rest = rest.partition(b" ")
            found.append(rest[: int(length)].decode())
            rest = rest[int(length) :]
        return found


def test_syslog_over_tls(tmp_path: Path, command: Callable[..., Result]) -> None:
    certificates(tmp_path)
    port = free_port()
    audit = {"syslog": f"localhost:{port}", "ca": str(tmp_path / "ca.pem"), "file": "audit.xml"}
    repository = Repository(tmp_path, port)
    with listening(tmp_path, audit=audit, metrics={"port": "0"}) as node:
        watched = node.events("metrics")[0]["port"]
        assert sent(node.port, slices(1)) == [0]
        node.until(node.reports)
        repository.close()
        node.until(lambda: asked(watched, "ready")[0] == 503, 30)
        assert sent(node.port, slices(1)) == [0xA700]
        first, repository = repository, Repository(tmp_path, port)
        node.until(lambda: asked(watched, "ready")[0] == 200)
        assert sent(node.port, slices(1)) == [0]
        node.until(lambda: len(node.reports()) == 2)
    said = [*first.messages(), *repository.messages()]
    head = re.compile(r"<85>1 \d{4}-\d\d-\d\dT[\d:.]+Z \S+ pmclip-deploy \d+ DICOM\+RFC3881 - \ufeff(<AuditMessage>.*)")
    found = [head.fullmatch(one) for one in said]
    assert all(found) and [one[1] for one in found if one] == lines(tmp_path)
    strange = command("listen", "--config", configured(tmp_path, audit={"syslog": f"localhost:{port}"}), "--check")
    assert strange.code == 7 and "unable to get local issuer certificate" in strange.out
    repository.close()
