"""Storage commitment, push model (PS3.4 Annex J), as SCU: an archive says that it keeps a report for good.

It says so with N-EVENT-REPORT, on the association that asked or on one of its own to the node. The transaction is in the ledger before the
archive is asked, since its answer may come first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pmclip_deploy.node.archive import CLASSES
from pmclip_deploy.node.ledger import Job, Ledger
from pmclip_deploy.node.wire import Later, Refused

PUSH_MODEL, INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
ASK = 1  # Action Type ID
AGAIN_S = 3600.0  # after which an archive that has not answered is asked again
SAME_S = 3.0  # in which its answer may come on the association that asked
BUSY = (0x0110, 0x0213)  # processing failure, resource limitation
FAILURES = {  # PS3.3 C.14.1.1
    0x0110: "processing failure",
    0x0112: "no such object instance",
    0x0119: "class and instance conflict",
    0x0122: "referenced SOP class not supported",
    0x0131: "duplicate transaction UID",
    0x0213: "resource limitation",
}
TAKEN, NO_SUCH_ARGUMENT = 0x0000, 0x0114


def ask(association: Any, ledger: Ledger, job: Job, destination: str, sr_class: str) -> None:
    """N-ACTION about the report of a class. Raises Later or Refused."""
    from pydicom import Dataset
    from pydicom.uid import generate_uid

    if PUSH_MODEL not in {context.abstract_syntax for context in association.accepted_contexts}:
        raise Refused("stored, but the peer offers no storage commitment")
    wanted, item = Dataset(), Dataset()
    wanted.TransactionUID = generate_uid(None)  # at random
    item.ReferencedSOPClassUID = CLASSES[sr_class]
    ledger.asking(job, destination, wanted.TransactionUID, sr_class, time.time() + AGAIN_S)
    asked = ledger.asked(wanted.TransactionUID)
    assert asked is not None
    item.ReferencedSOPInstanceUID = asked[2]
    wanted.ReferencedSOPSequence = [item]
    if not association.is_established:
        raise Later("the association ended before N-ACTION")
    reply, _ = association.send_n_action(wanted, ASK, PUSH_MODEL, INSTANCE)
    if "Status" not in reply:
        raise Later("no answer to N-ACTION")
    status = int(reply.Status)
    if status in BUSY:
        raise Later(f"N-ACTION: {_named(status)}")
    if status:
        raise Refused(f"stored, but N-ACTION: {_named(status)}")
    end = time.monotonic() + SAME_S
    while ledger.is_open(job, destination) and association.is_established and time.monotonic() < end:
        time.sleep(0.02)


def answer(ledger: Ledger, log: Callable[..., None]) -> Callable[[Any], tuple[int, None]]:
    """A handler of N-EVENT-REPORT. What is about none of our transactions changes nothing."""

    def handle(event: Any) -> tuple[int, None]:
        said = event.event_information
        transaction = str(said.get("TransactionUID", ""))
        asked = ledger.asked(transaction)
        if asked is None:
            return NO_SUCH_ARGUMENT, None
        job, destination, sop = asked
        kept = {str(one.get("ReferencedSOPInstanceUID", "")) for one in said.get("ReferencedSOPSequence", None) or []}
        lost = {
            str(one.get("ReferencedSOPInstanceUID", "")): one.get("FailureReason", 0) for one in said.get("FailedSOPSequence", None) or []
        }
        if sop in lost:
            reason = f"not committed: {_named(int(lost[sop] or 0))}"
            if ledger.answered(transaction, "refused", reason):
                log("refused", job=job, destination=destination, reason=reason)
        elif sop in kept:
            if ledger.answered(transaction, "done", "committed"):
                log("committed", job=job, destination=destination)
        else:
            return NO_SUCH_ARGUMENT, None
        return TAKEN, None

    return handle


def _named(status: int) -> str:
    return f"{status:04X}, {FAILURES[status]}" if status in FAILURES else f"status {status:04X}"
