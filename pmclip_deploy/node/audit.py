"""The audit trail: who gave images, who got reports, and who was refused (PS3.15 A.5), in a file, to a syslog, or both.

What cannot be written stops the node: it takes no image, computes nothing and sends nothing until the trail works again.
"""

from __future__ import annotations

import errno
import getpass
import hmac
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element, tostring

from pmclip_deploy.atomic import written
from pmclip_deploy.errors import UsageError
from pmclip_deploy.imaging.elements import printable_uid, text_of
from pmclip_deploy.node.audit_message import (
    APPLICATION,
    DESTINATION,
    MINOR,
    SERIOUS,
    SOURCE,
    SUCCESS,
    event_of,
    media_of,
    node_of,
    participant,
    patient_of,
    study_of,
)  # fmt: skip
from pmclip_deploy.node.audit_sinks import AuditFile, Sink, Syslog
from pmclip_deploy.node.settings import DICOM, DICOM_ADDRESS, FOLDER, Destination, Ward

RETRY_S, CHECK_S = 1.0, 5.0  # between looks at a trail that does not work, and at one that does

Subject = tuple[str, str]  # Study Instance UID, and the patient as the trail names it


class Trail:
    """Does nothing if ward.yaml has no `audit`. Several threads use it."""

    def __init__(self, ward: Ward, log: Callable[..., None] = lambda *_, **__: None) -> None:
        self.ward, self.log = ward, log
        self.fault = ""  # why messages cannot be written now
        self._lock, self._next = threading.RLock(), 0.0
        self._transfers = dict[tuple[Any, Subject], Counter[tuple[str, str]]]()  # by association: (action, SOP class)
        self._sinks = list[Sink]()
        if ward.audit is not None and ward.audit.file is not None:
            self._sinks.append(AuditFile(ward.audit.file))
        if ward.audit is not None and ward.audit.syslog is not None:
            self._sinks.append(Syslog(ward.audit.syslog, ward.audit.ca, ward.node.tls))

    @contextmanager
    def running(self) -> Iterator[None]:
        """The application starts and stops. Raises UsageError if that cannot be written at the start."""
        us = [self._us(APPLICATION)]
        try:
            self._event("110100", "E", us, kind="110120")
        except OSError:
            raise UsageError(f"audit: {self.fault}", "check `audit` in ward.yaml") from None
        try:
            yield
        finally:
            self._end(list(self._transfers))
            with suppress(OSError):
                self._event("110100", "E", us, kind="110121")
            self._flush()
            if lost := sum(len(sink.waiting) + sink.lost for sink in self._sinks):
                self.log("audit", reason="the node ends, and messages were not written", lost=lost)
            self.close()

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def faults(self) -> list[tuple[str, str]]:
        """Of the file and the syslog: (its name, why it cannot be written, or "")."""
        return [(sink.name, sink.flush(check=True)) for sink in self._sinks]

    def step(self) -> bool:
        """Writes what ended associations transferred, and looks now and then whether the trail works. Returns False."""
        with self._lock:
            self._end([key for key in self._transfers if not (key[0].is_established and key[0].is_alive())])
            if self._sinks and time.monotonic() >= self._next:
                self._flush(check=True)
                self._next = time.monotonic() + (RETRY_S if self.fault else CHECK_S)
        return False

    # What happened. An event that cannot be written raises OSError; it is written as soon as the trail works again.

    @contextmanager
    def receiving(self, association: Any, sop_class: str, file: Path, action: str) -> Iterator[None]:
        """An instance that the body keeps: the first of a study on an association begins a transfer, which ends with the association.

        ``action`` is C for a new instance, and R for one that was here already.
        """
        if not self._sinks:
            yield
            return
        if self.fault:
            raise self._unwritten()
        key = (association, self._subject(file)[0])
        if key not in self._transfers:
            self._event("110102", "E", self._peer_and_us(association), self._about(key[1], {}))
        yield
        with self._lock:
            self._transfers.setdefault(key, Counter())[action, sop_class] += 1

    def accessed(self, files: Iterable[Path]) -> None:
        """Images that the model is about to see."""
        for subject, classes in self._by_subject(files).items():
            self._event("110103", "R", [self._us(APPLICATION)], self._about(subject, classes))

    def sent(self, destination: Destination, files: Mapping[str, Path], refused: str = "") -> None:
        """A report that a destination took or refused. ``files`` has one for each class that was offered."""
        if destination.kind == FOLDER:
            self.exported(Path(destination.rest), list(files.values())[:1])
            return
        for subject, classes in self._by_subject(list(files.values())[:1]).items():
            about = self._about(subject, classes if len(files) == 1 else {"": 1})
            parties = [self._us(SOURCE), participant(DESTINATION, *_address_of(destination))]
            self._event("110104", "R", parties, about, outcome=SERIOUS if refused else SUCCESS, said=refused)

    def exported(self, folder: Path, files: Sequence[Path], person: bool = False) -> None:
        """Reports to a folder, by this process or by the person who runs it."""
        who = [participant(SOURCE, f"{_login()}@{socket.gethostname()}", requestor=True)] if person else []
        for subject, classes in self._by_subject(files).items():
            parties = [*who, self._us(SOURCE, requestor=not person), media_of(folder.absolute().as_uri())]
            self._event("110106", "R", parties, self._about(subject, classes))

    def refused(self, address: str, aet: str, why: str) -> None:
        """A peer; its AE title is written if ward.yaml has it, since others may be any text."""
        known = aet if any(peer.aet == aet for peer in self.ward.peers) else ""
        parties = [self._us(APPLICATION), participant("", known or address, known, address)]
        with suppress(OSError):
            self._event("110113", "E", parties, [node_of(address, why)], kind="110126", outcome=MINOR)

    def _us(self, role: str, requestor: bool = True) -> Element:
        return participant(role, str(os.getpid()), self.ward.node.aet, socket.gethostname(), "pmclip-deploy", requestor)

    def _peer_and_us(self, association: Any) -> list[Element]:
        peer = association.requestor
        aet = str(peer.primitive.calling_ae_title)
        return [participant(SOURCE, aet, aet, str(peer.address), requestor=True), self._us(DESTINATION, requestor=False)]

    def _about(self, subject: Subject, classes: Mapping[str, int]) -> list[Element]:
        return [study_of(subject[0], classes), patient_of(subject[1])]

    def _subject(self, file: Path) -> tuple[Subject, str]:
        """(the study and the patient, the SOP class) of a DICOM file. What cannot be read is "?"."""
        from pydicom import dcmread

        try:
            data = dcmread(file, stop_before_pixels=True, specific_tags=["SOPClassUID", "PatientID", "StudyInstanceUID"])
        except Exception:  # pydicom raises many kinds for what a peer may send
            return ("?", "?"), ""
        study, patient, sop_class = (text_of(data, keyword) for keyword in ("StudyInstanceUID", "PatientID", "SOPClassUID"))
        return (printable_uid(study) or "?", self._patient(patient)), printable_uid(sop_class)

    def _by_subject(self, files: Iterable[Path]) -> dict[Subject, Counter[str]]:
        found = dict[Subject, Counter[str]]()
        for file in files if self._sinks else ():
            subject, sop_class = self._subject(file)
            found.setdefault(subject, Counter())[sop_class] += 1
        return found

    def _patient(self, number: str) -> str:
        if not number:
            return "?"
        if self.ward.audit is not None and self.ward.audit.hash_patient_id:
            with self._lock:  # the first one makes the key
                return hmac.digest(self._key, number.encode("utf-8", "replace"), "sha256").hex()
        return "".join(c if c.isprintable() else "?" for c in number)

    @cached_property
    def _key(self) -> bytes:
        """Made once per state. With it, anybody can tell whether a hash is that of a Patient ID."""
        path = self.ward.state / "audit.key"
        if not path.exists():
            with written(path, mode=0o600) as new:
                new.write_bytes(secrets.token_bytes(32))
        return path.read_bytes()

    # Writing.

    def _event(
        self, event: str, action: str, parties: list[Element], about: Sequence[Element] = (), kind: str = "", outcome: str = SUCCESS,
        said: str = "",
    ) -> None:  # fmt: skip
        """It is written, or waits, in which case this raises OSError."""
        if not self._sinks:
            return
        source = f"{self.ward.node.aet}@{socket.gethostname()}"
        message = tostring(event_of(source, event, action, parties, about, kind, outcome, said), "unicode")
        with self._lock:
            for sink in self._sinks:
                sink.add(message)
            if not self.fault:  # else `step` looks again
                self._flush()
            if self.fault:
                raise self._unwritten()

    def _unwritten(self) -> OSError:
        return OSError(errno.EIO, self.fault)

    def _flush(self, check: bool = False) -> None:
        before, self.fault = self.fault, next(filter(None, [sink.flush(check) for sink in self._sinks]), "")
        if bool(before) != bool(self.fault):
            self.log("audit", reason=self.fault or "it can be written again", lost=sum(sink.lost for sink in self._sinks))

    def _end(self, keys: Iterable[tuple[Any, Subject]]) -> None:
        for key in keys:
            counts = self._transfers.pop(key)
            for action in sorted({action for action, _ in counts}):
                classes = {sop_class: count for (one, sop_class), count in counts.items() if one == action}
                with suppress(OSError):
                    self._event("110104", action, self._peer_and_us(key[0]), self._about(key[1], classes))


def _address_of(destination: Destination) -> tuple[str, str, str]:
    """(user, AE title, address). A URL may hold a secret."""
    if destination.kind == DICOM and (found := DICOM_ADDRESS.fullmatch(destination.rest)):
        return found["aet"], found["aet"], found["host"].strip("[]")
    host = urlsplit(destination.rest).hostname or "?"
    return host, "", host


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user without a name
        return str(os.getuid()) if hasattr(os, "getuid") else "?"
