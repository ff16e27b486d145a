"""A node in a process of its own: what it takes, what it refuses, and what it sends."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

for needed in ("pynetdicom", "highdicom", "starlette", "yaml", "prometheus_client", "httpx"):
    pytest.importorskip(needed, reason="needs the extra `ward`")

from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from pynetdicom import AE, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode
from pynetdicom.sop_class import ComprehensiveSRStorage  # type: ignore[attr-defined]

from tests.certificates import certificates
from tests.node import small_disk
from tests.node.running import asked, listening, sent, slices
from tests.report.making import items, said
from tests.tiny.bundle import tiny_bundle


def test_a_study_gets_one_report_and_late_images_a_new_version(tmp_path: Path) -> None:
    images = slices(5)
    with listening(tmp_path) as node:
        order = [images[i] for i in (3, 0, 4, 0, 1)]
        halves = [threading.Thread(target=sent, args=(node.port, part)) for part in (order[:3], order[3:])]
        for half in halves:
            half.start()
        for half in halves:
            half.join()
        (first,) = node.until(node.reports)
        (row,) = [item for item in items(first, "Source of Measurement")][:1]
        assert row.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == images[3].SOPInstanceUID  # of 0, 1, 3, 4 the middle
        assert "PredecessorDocumentsSequence" not in first and first.StudyInstanceUID == images[0].StudyInstanceUID
        assert sum("looked at 1 of 4 images" in text for text in said(first)) == 1
        assert sent(node.port, [images[0]]) == [0]  # once more
        assert sent(node.port, [images[2]]) == [0]
        node.until(lambda: len(node.reports()) == 2)
        _, second = node.reports()
        named = second.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
        assert named.ReferencedSOPInstanceUID == first.SOPInstanceUID and second.SeriesInstanceUID == first.SeriesInstanceUID
        finding = [item.ConceptCodeSequence[0].CodeValue for item in items(second, "Finding")]
        assert finding == ["125605004"] and any("protocol=any@3" in item.TextValue for item in items(second, "Algorithm Parameters"))
        shown = node.queue("show")
        assert shown.returncode == 0 and "image: 5 matched" in shown.stdout and "job: 2 done" in shown.stdout
    assert node.process.returncode == 0 and node.events("stopped")
    text = "".join(node.lines)
    assert not [uid for uid in (images[0].StudyInstanceUID, images[0].PatientID, images[0].PatientName) if str(uid) in text]


def test_a_study_that_waits_meets_a_new_bundle_and_a_new_program(tmp_path: Path) -> None:
    """The ledger is of version 1 when the second node starts."""
    with listening(tmp_path, complete={"quiet_s": "1h"}) as node:
        assert sent(node.port, slices(1)) == [0]
    with closing(sqlite3.connect(tmp_path / "state" / "queue.db")) as ledger:
        ledger.executescript("DROP TABLE commitment; PRAGMA user_version = 1")
    assert "an earlier version" in node.queue("show").stderr
    bundle = tiny_bundle(tmp_path / "tiny")
    with listening(tmp_path, bundle=str(bundle)) as node:
        (report,) = node.until(node.reports)
        assert "The model was changed while the study waited: this report is by the new one." in said(report)
        (named,) = {item.TextValue for item in items(report, "Algorithm Parameters")}
        assert hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest() in named
        assert sent(node.port, slices(1)) == [0]
        node.until(lambda: len(node.reports()) == 2)
        assert sum("The model was changed" in text for one in node.reports() for text in said(one)) == 1
    assert (tmp_path / "state" / "queue.db.1").exists()


def test_who_may_connect_and_what_is_taken(tmp_path: Path) -> None:
    """While connections that say nothing are open."""
    with listening(tmp_path) as node:
        silent = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(100)]
        (image,) = slices(1)
        for aet, called in (("SOMEBODY", "PMCLIP"), ("SENDER", "OTHER")):
            with pytest.raises(ConnectionError, match="rejected"):
                sent(node.port, [image], aet, called)
        assert sent(node.port, slices(1, StudyInstanceUID="")) == [0xC000]
        (empty,) = slices(1)
        del empty.PixelData
        assert sent(node.port, [empty]) == [0xC000]
        (other,) = slices(1)
        (broken,) = slices(1)
        broken.BitsAllocated = 7
        assert sent(node.port, [other]) == [0] and sent(node.port, [broken]) == [0]
        (nobodys,) = slices(1, Modality="OT")
        assert sent(node.port, [nobodys]) == [0]
        sr = dcmread(str(get_testdata_file("reportsi.dcm", download=False)))
        with pytest.raises(ConnectionError):  # no context is accepted
            sent(node.port, [sr])
        node.until(lambda: node.events("failed") and node.reports())
        assert node.events("failed")[0]["reason"] == "no image could be read" and len(node.reports()) == 1
        assert "1 unmatched" in node.queue("show").stdout
        assert node.queue("retry", "2").returncode == 0 and node.queue("retry", "99").returncode == 2
        node.until(lambda: len(node.events("failed")) == 2)
        assert node.queue("drop", "2").returncode == 0 and "failed" not in node.queue("show").stdout
        other_class(node.port)
        for one in silent:
            one.close()


def other_class(port: int) -> None:
    """The request says another class than the data set."""
    (image,), mr = slices(1), "1.2.840.10008.5.1.4.1.1.4"
    entity = AE("SENDER")
    entity.add_requested_context(mr, image.file_meta.TransferSyntaxUID)
    association = entity.associate("127.0.0.1", port, ae_title="PMCLIP")
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = mr, image.SOPInstanceUID
    request.DataSet = BytesIO(encode(image, False, True) or b"")
    association._reactor_checkpoint.clear()
    association.dimse.send_msg(request, association.accepted_contexts[0].context_id)
    _, reply = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    association.release()
    assert reply.Status == 0xA900


def test_a_full_disk_is_said_and_nothing_is_kept(tmp_path: Path) -> None:
    with listening(tmp_path, disk={"refuse_below_gb": "1000000"}, metrics={"port": "0"}) as node:
        assert sent(node.port, slices(2)) == [0xA700, 0xA700]
        node.until(lambda: node.events("refused"))
        port = node.events("metrics")[0]["port"]
        assert asked(port, "live")[0] == 200 and asked(port, "other")[0] == 404
        assert asked(port, "ready") == (503, '{"ready": false, "reasons": ["the disk is nearly full"]}')
        status, text = asked(port, "metrics")
        assert status == 200 and 'pmclip_dicom_stored_total{status="A700"} 2.0' in text and "pmclip_dicom_associations 0.0" in text
    assert list((tmp_path / "state" / "images").iterdir()) == list((tmp_path / "state" / "incoming").iterdir()) == []


@pytest.mark.nightly
def test_a_small_disk_fills_and_empties(tmp_path: Path) -> None:
    apart = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    done = subprocess.run([*apart, sys.executable, small_disk.__file__, tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print(found)
    assert found["statuses"]["A700"] > 0 and found["statuses"]["ready 503"] > 0 and "none" not in found["statuses"]
    assert found["left"] == 0 and found["ready"] == 200 and found["statuses"]["0000"] == 450 == sum(found["counts"]["image"].values())


def test_tls_needs_a_certificate_of_the_client_and_a_silent_one_holds_up_nobody(tmp_path: Path) -> None:
    certificates(tmp_path)
    tls = {"cert": str(tmp_path / "server.pem"), "key": str(tmp_path / "server.key"), "ca": str(tmp_path / "ca.pem")}
    with listening(tmp_path, node={"port": "0", "tls": tls}, metrics={"port": "0"}) as node:
        silent = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(20)]
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        with pytest.raises(ConnectionError):
            sent(node.port, slices(1))  # without TLS
        with pytest.raises(ConnectionError):
            sent(node.port, slices(1), tls=context)
        context.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
        assert sent(node.port, slices(1), tls=context) == [0]
        assert re.search(r"(?m)^pmclip_cert_expiry_seconds 1", asked(node.events("metrics")[0]["port"], "metrics")[1])
        for one in silent:
            one.close()


def test_two_nodes_do_not_share_a_state(tmp_path: Path, command: Any) -> None:
    with listening(tmp_path):
        second = command("listen", "--config", tmp_path / "ward.yaml")
        assert second.code == 2 and "another `listen` uses this state" in second.err


class Archive:
    """A storage SCP that takes these classes, and answers what it is told to."""

    def __init__(self, port: int, *classes: str) -> None:
        self.stored, self.status = list[Any](), 0
        entity = AE("PACS")
        for sop_class in classes:
            entity.add_supported_context(sop_class)
        self.server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)])

    def _store(self, event: Any) -> int:
        self.stored.append(event.dataset)
        return self.status


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def test_an_archive_that_is_away_is_full_and_takes_another_class(tmp_path: Path) -> None:
    port = free_port()
    of = {"to": f"dicom:PACS@127.0.0.1:{port}", "sr_classes": ["comprehensive3d", "comprehensive"], "i_understand_this_is_research": "true"}
    with listening(tmp_path, send=[of]) as node:
        assert sent(node.port, slices(1)) == [0]
        node.until(lambda: len(node.events("postponed")) > 1)
        archive = Archive(port, ComprehensiveSRStorage)
        archive.status = 0xA700
        node.until(lambda: archive.stored)
        archive.status = 0
        node.until(lambda: node.events("sent"))
        assert {one.SOPClassUID for one in archive.stored} == {ComprehensiveSRStorage}
        assert len({one.SOPInstanceUID for one in archive.stored}) == 1  # the same report each time
        archive.status = 0x0110
        assert sent(node.port, slices(1)) == [0]
        node.until(lambda: node.events("refused"))
        assert "status 0110" in node.queue("show").stdout
        archive.server.shutdown()
        archive = Archive(port, "1.2.840.10008.5.1.4.1.1.7")
        assert node.queue("retry", "2").returncode == 0
        node.until(lambda: len(node.events("refused")) > 1 or node.events("postponed")[2:])
        archive.server.shutdown()


def test_an_archive_that_takes_no_report_gets_a_page(tmp_path: Path) -> None:
    """About two images, and a new page when an image came late."""
    archive, images = Archive(port := free_port(), "1.2.840.10008.5.1.4.1.1.7"), slices(3)
    images[1].SeriesInstanceUID = images[2].SeriesInstanceUID = generate_uid()
    of = {"to": f"dicom:PACS@127.0.0.1:{port}", "sc": "allowed", "i_understand_this_is_research": "true"}
    with listening(tmp_path, send=[of]) as node:
        assert sent(node.port, images[:2]) == [0, 0]
        node.until(lambda: node.events("sent"))
        assert sent(node.port, images[2:]) == [0]
        node.until(lambda: len(node.events("sent")) == 2)
    archive.server.shutdown()
    first, second = archive.stored
    named = [[one.ReferencedSOPInstanceUID for one in page.SourceImageSequence] for page in (first, second)]
    assert sorted(named[0]) == sorted(one.SOPInstanceUID for one in images[:2]) and len(named[1]) == 2
    assert first.StudyInstanceUID == images[0].StudyInstanceUID and first.SeriesInstanceUID == second.SeriesInstanceUID
    assert first.SOPInstanceUID != second.SOPInstanceUID and len(first.PixelData) == first.Rows * first.Columns
    if shutil.which("dciodvfy"):
        checked = subprocess.run(["dciodvfy", "-new", tmp_path / "state" / "reports" / "1.sc.dcm"], capture_output=True, text=True)
        assert "SCImage\n" in checked.stderr and "Error" not in checked.stderr


KILLS = 2


def test_what_was_acknowledged_outlives_a_kill(tmp_path: Path) -> None:
    """At any moment: all that was answered with 0x0000 is in the one current report's study."""
    images, acknowledged, kills = slices(60), set[str](), 0
    while len(acknowledged) < len(images) or kills < KILLS:
        with listening(tmp_path, complete={"quiet_s": "2"}) as node:
            if kills < KILLS:
                threading.Timer(0.3 + 0.2 * kills, node.process.send_signal, (signal.SIGKILL,)).start()
            for image in images:
                if image.SOPInstanceUID not in acknowledged or kills < KILLS:
                    try:
                        if sent(node.port, [image]) == [0]:
                            acknowledged.add(image.SOPInstanceUID)
                    except (ConnectionError, OSError):
                        break
            if kills < KILLS:
                node.process.wait(60)
                kills += 1
                continue
            node.until(node.reports)
            node.until(lambda: "job: " in (text := node.queue("show").stdout) and "collecting" not in text and "reported" not in text)
            assert f"image: {len(images)} matched" in node.queue("show").stdout
    versions = node.reports()
    replaced = {
        one.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        for one in versions
        if "PredecessorDocumentsSequence" in one
    }
    current = [one for one in versions if one.SOPInstanceUID not in replaced]
    assert len(current) == 1 and any(f"of {len(images)} images" in text for text in said(current[0]))


def test_each_write_is_on_the_disk_before_the_answer(tmp_path: Path) -> None:
    """fsync of the file, rename, fsync of the folder, fdatasync of the ledger's log, then C-STORE-RSP."""
    if not shutil.which("strace"):
        pytest.skip("needs strace (Linux; Debian: apt-get install strace)")
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,rename,renameat,renameat2,sendto,sendmsg"
    with listening(tmp_path, "strace", "-f", "-qq", "-y", "-e", "signal=none", "-e", calls, "-o", str(trace)) as node:
        if node.process.poll() is not None:
            pytest.skip("strace may not trace here")
        before = len(trace.read_text().splitlines())
        assert sent(node.port, slices(1)) == [0]
        os.kill(int(re.match(r"\d+", trace.read_text())[0]), signal.SIGTERM)  # type: ignore[index]
        node.process.wait(60)
    lines = trace.read_text().splitlines()[before:]

    def at(pattern: str, after: int = -1) -> int:
        return next(i for i, line in enumerate(lines) if i > after and re.search(pattern, line))

    file = at(r"fsync\(\d+<[^>]*/incoming/")
    moved = at(r"rename\w*\(.*/incoming/.*/images/", file)
    folder = at(r"fsync\(\d+<[^>]*/images>", moved)
    ledger = at(r"fdatasync\(\d+<[^>]*queue\.db-wal>", folder)
    answers = [i for i, line in enumerate(lines) if re.search(r"send(to|msg)\(\d+<(TCP|socket)", line)]
    assert answers and not [i for i in answers if file < i < ledger] and max(answers) > ledger
