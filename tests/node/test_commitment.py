"""Storage commitment: asked for after C-STORE, and answered on the same association, on a new one, late, or never."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

for needed in ("pynetdicom", "highdicom", "starlette", "yaml"):
    pytest.importorskip(needed, reason="needs the extra `ward`")

from pydicom import Dataset
from pynetdicom import AE, _config, evt
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation

from pmclip_deploy.node import commitment
from pmclip_deploy.node.commitment import INSTANCE, PUSH_MODEL
from pmclip_deploy.node.receive import Folders, Quiet, Receiver
from pmclip_deploy.node.send import Sender
from pmclip_deploy.node.settings import Ward
from pmclip_deploy.report.document import SR_CLASSES
from tests.node import commit_chain
from tests.node.sending import Sending, sending
from tests.report import orthanc


class Archive:
    """Takes reports and requests for commitment. ``answers`` says how: "same" or "new" association, or "not"."""

    def __init__(self, answers: str = "same", action: int = 0, failure: int | None = None, offers: bool = True) -> None:
        self.answers, self.action, self.failure = answers, action, failure
        self.stored, self.asked, self.replies = list[str](), list[Dataset](), list[int]()
        self.node = 0  # port of the node, for a new association
        entity = AE("PACS")
        for uid in SR_CLASSES.values():
            entity.add_supported_context(uid)
        if offers:
            entity.add_supported_context(PUSH_MODEL)
        handlers: Any = [(evt.EVT_C_STORE, self._store), (evt.EVT_N_ACTION, self._act)]
        self.server: Any = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        self.port = int(self.server.server_address[1])

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()

    def _store(self, event: Any) -> int:
        self.stored.append(event.request.AffectedSOPInstanceUID)
        return 0

    def _act(self, event: Any) -> tuple[int, None]:
        assert (event.request.RequestedSOPInstanceUID, event.action_type) == (INSTANCE, 1)
        self.asked.append(event.action_information)
        if self.answers != "not" and not self.action:
            say = {"same": self.say, "new": lambda *_: self.call()}[self.answers]
            threading.Thread(target=say, args=(event.assoc, 0.2)).start()
        return self.action, None

    def report(self) -> tuple[Dataset, int]:
        said, items = Dataset(), self.asked[-1].ReferencedSOPSequence
        said.TransactionUID = self.asked[-1].TransactionUID
        if self.failure is None:
            said.ReferencedSOPSequence = items
            return said, 1
        for item in items:
            item.FailureReason = self.failure
        said.FailedSOPSequence = items
        return said, 2

    def say(self, association: Any, wait: float = 0, **changes: str) -> None:
        time.sleep(wait)
        said, kind = self.report()
        for keyword, value in changes.items():
            setattr(said, keyword, value)
        reply, _ = association.send_n_event_report(said, kind, PUSH_MODEL, INSTANCE)
        self.replies.append(reply.Status)

    def call(self, aet: str = "PACS", role: bool = True, **changes: str) -> None:
        """On an association to the node, as its SCP."""
        entity, chosen = AE(aet), SCP_SCU_RoleSelectionNegotiation()
        entity.add_requested_context(PUSH_MODEL)
        chosen.sop_class_uid, chosen.scu_role, chosen.scp_role = PUSH_MODEL, False, True
        made = entity.associate("127.0.0.1", self.node, ae_title="PMCLIP", ext_neg=[chosen] if role else [])
        assert made.is_established
        try:
            if not role:  # it says nothing of roles, and is taken for the SCP all the same
                made._accepted_cx[1]._as_scp = True
            self.say(made, **changes)
        finally:
            made.release()


def asking(folder: Path, archive: Archive, **options: Any) -> Sending:
    return sending(folder, f"dicom:PACS@127.0.0.1:{archive.port}", commit="true", **options)


def delivery(one: Sending) -> tuple[str, str]:
    (row,) = one.ledger._all("SELECT state, reason FROM delivery")
    return tuple(row)


def test_on_the_same_association(tmp_path: Path) -> None:
    with Archive() as archive:
        one = asking(tmp_path, archive, sr_classes=["enhanced"])
        assert one.step()[:2] == ("done", "committed") and archive.replies == [0] and one.ledger.counts()["job"] == {"done": 1}
        (item,) = archive.asked[0].ReferencedSOPSequence
        assert (item.ReferencedSOPClassUID, [item.ReferencedSOPInstanceUID]) == (SR_CLASSES["enhanced"], archive.stored)
        assert [event for event, _ in one.log] == ["sent", "committed"] and not one.sender.step()


def test_a_report_that_the_archive_does_not_keep(tmp_path: Path) -> None:
    with Archive(failure=0x0112) as archive:
        one = asking(tmp_path, archive)
        assert one.step()[:2] == ("refused", "not committed: 0112, no such object instance")
        archive.failure = None
        assert one.again()[:2] == ("done", "committed") and len(archive.stored) == 2  # sent again
        assert archive.asked[0].TransactionUID != archive.asked[1].TransactionUID


@pytest.mark.parametrize(
    ("options", "state", "reason"),
    [
        ({"offers": False}, "refused", "stored, but the peer offers no storage commitment"),
        ({"action": 0x0122}, "refused", "stored, but N-ACTION: 0122, referenced SOP class not supported"),
        ({"action": 0x0213}, "sent", "N-ACTION: 0213, resource limitation"),
    ],
)
def test_an_archive_that_does_not_commit(tmp_path: Path, options: Any, state: str, reason: str) -> None:
    with Archive(**options) as archive:
        one = asking(tmp_path, archive)
        assert one.step()[:2] == (state, reason) and len(archive.stored) == 1
        assert state != "sent" or 9 < one.wait <= 10


def test_an_archive_that_does_not_answer_is_asked_again_and_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commitment, "SAME_S", 0.1)
    with Archive("not") as archive:
        one = asking(tmp_path, archive)
        assert one.step()[:2] == ("sent", "") and 3590 < one.wait <= 3600 and not one.sender.step()
        one.ledger._db.execute("UPDATE delivery SET due = 0")
        assert one.step()[:2] == ("sent", "") and one.wait > 3590
        assert len(archive.stored) == 1 and len({str(ask.TransactionUID) for ask in archive.asked}) == 2
        one.ledger._db.execute("UPDATE delivery SET due = 0, since = 0")
        sender, plain = one.sender, one.sender.destination.model_copy(update={"commit": False})
        without = Sender(plain, sender.ward, one.ledger, sender.audit, sender.log)
        assert one.step()[:2] == ("given_up", "stored, but no commitment came") and not one.sender.step()
        one.ledger._db.execute("UPDATE delivery SET state = 'sent', due = 0")
        assert without.step() and delivery(one) == ("done", "")  # commit was taken out of ward.yaml


def test_on_a_new_association_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a peer may answer, and only about what was asked. The first transaction counts after a second one was begun."""
    for module, name in ((tempfile, "tempdir"), (_config, "STORE_RECV_CHUNKED_DATASET"), (_config, "LOG_HANDLER_LEVEL")):
        monkeypatch.setattr(module, name, getattr(module, name))  # the receiver sets them for its process
    monkeypatch.setattr(commitment, "SAME_S", 0.1)
    with Archive("not") as archive:
        one = asking(tmp_path, archive)
        one.step()
        first = archive.asked[0]
        one.ledger._db.execute("UPDATE delivery SET due = 0")
        one.step()
        ward = Ward.model_validate(
            one.sender.ward.model_dump() | {"node": {"port": "0"}, "peers": [{"aet": "PACS", "addresses": ["127.0.0.1"]}]}
        )
        Folders(ward.state).make()
        receiver = Receiver(ward, [], one.ledger, Quiet(), one.sender.audit, one.sender.log)
        archive.node = receiver.open()
        try:
            with pytest.raises(AssertionError):
                archive.call(aet="OTHER")
            archive.call(TransactionUID="1.2.3")
            archive.asked[-1] = first
            kept, first.ReferencedSOPSequence[0].ReferencedSOPInstanceUID = first.ReferencedSOPSequence[0].ReferencedSOPInstanceUID, "1.2.4"
            archive.call()
            assert archive.replies == [0x0114, 0x0114] and delivery(one) == ("sent", "")
            first.ReferencedSOPSequence[0].ReferencedSOPInstanceUID = kept
            archive.call()
            assert archive.replies[2:] == [0] and delivery(one) == ("done", "committed")
            archive.call(role=False)  # once more
            assert archive.replies[3:] == [0] and [event for event, _ in one.log].count("committed") == 1
        finally:
            receiver.close()


@pytest.mark.slow("Orthanc and a node start")
def test_orthanc_commits_itself(tmp_path: Path) -> None:
    done = subprocess.run(
        [*orthanc.apart(), sys.executable, commit_chain.__file__, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["events"] == ["sent", "committed"] and found["counts"]["delivery"] == {"done": 1} and found["kept"] == 1
    assert found["lost"] == "refused not committed: 0112, no such object instance"
