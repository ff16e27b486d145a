"""Deliveries: a report goes to each destination until that has it, refuses it, or too much time has passed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from pmclip_deploy.atomic import written
from pmclip_deploy.node import web
from pmclip_deploy.node.archive import CLASSES, LITTLE_ENDIAN, association_with, store
from pmclip_deploy.node.audit import Trail
from pmclip_deploy.node.commitment import PUSH_MODEL, answer, ask
from pmclip_deploy.node.ledger import Due, Job, Ledger
from pmclip_deploy.node.receive import Folders
from pmclip_deploy.node.settings import DICOM, FOLDER, Destination, Ward
from pmclip_deploy.node.wire import IN_TIME, Later, Refused, Wire
from pmclip_deploy.node.work import report_file

DELIVERY_S = 180.0  # after which a delivery is cut off, whatever the peer does


class Sender:
    """One destination."""

    def __init__(self, destination: Destination, ward: Ward, ledger: Ledger, audit: Trail, log: Callable[..., None]) -> None:
        self.destination, self.ward, self.ledger, self.audit, self.log = destination, ward, ledger, audit, log
        self.folders, self.wire = Folders(ward.state), Wire()
        self._send = {FOLDER: self._to_folder, DICOM: self._to_archive}.get(destination.kind, self._to_web)

    def step(self) -> bool:
        """Tries one delivery. Returns False if none is due."""
        found = None if self.audit.fault else self.ledger.next_delivery(self.destination.to)
        if found is None:
            return False
        job, to, name, retry = found.job, self.destination.to, self.destination.name, self.ward.retry
        try:
            with self.wire.limited(DELIVERY_S):
                how = self._send(found)
        except Refused as error:
            self.audit.sent(self.destination, self._made(job), str(error))
            self.ledger.set_delivery(job, to, "refused", str(error))
            self.log("refused", job=job.id, destination=name, reason=str(error))
        except (Later, OSError) as error:
            reason = self.wire.why or _reason_of(error)
            if time.time() - found.since >= retry.give_up:
                self.ledger.set_delivery(job, to, "given_up", reason)
                self.log("given up", job=job.id, destination=name, reason=reason)
            else:
                asked = error.after_s if isinstance(error, Later) else 0.0
                wait = max(retry.wait(found.failed + 1), min(asked, retry.max_s))
                self.ledger.set_delivery(job, to, "sent" if self.ledger.is_open(job, to) else "waiting", reason, time.time() + wait)
                self.log("postponed", job=job.id, destination=name, reason=reason, seconds=wait)
        except Exception as error:
            self.ledger.set_delivery(job, to, "refused", f"internal: {type(error).__name__}")
            self.log("refused", job=job.id, destination=name, reason=f"internal: {type(error).__name__}")
        else:
            if how is not None:
                self.ledger.set_delivery(job, to, "done", how)
                self.log("sent", job=job.id, destination=name, version=job.version)
        return True

    def close(self) -> None:
        """Cuts off a delivery that is on its way; the next start sends it again."""
        self.wire.close()

    def _files(self, job: Job) -> dict[str, Path]:
        """Of each class in which the report was made and may go there. Raises Refused if there is none."""
        if not (found := self._made(job)):
            raise Refused("no report was made in a class of sr_classes, which ward.yaml has changed")
        return found

    def _made(self, job: Job) -> dict[str, Path]:
        made = json.loads(job.report)
        return {one: self.folders.reports / report_file(job.id, one) for one in self.destination.classes if one in made}

    def _to_folder(self, due: Due) -> str:
        folder, (sr_class, file) = Path(self.destination.rest), next(iter(self._files(due.job).items()))
        folder.mkdir(parents=True, exist_ok=True)
        with written(folder / f"{json.loads(due.job.report)[sr_class][0]}.dcm", mode=0o640) as new:
            new.write_bytes(file.read_bytes())
        self.audit.sent(self.destination, {sr_class: file})
        return ""

    def _to_archive(self, due: Due) -> str | None:
        """None if the archive has the report, and commitment to it is awaited."""
        from pynetdicom import evt

        job, commit = due.job, self.destination.commit
        if due.sent and not commit:  # ward.yaml has changed
            return ""
        if due.sent and time.time() - due.since >= self.ward.retry.give_up:
            raise Later("stored, but no commitment came")
        files = {} if due.sent else self._files(job)
        contexts = {CLASSES[name]: LITTLE_ENDIAN for name in files} | ({PUSH_MODEL: LITTLE_ENDIAN} if commit else {})
        handlers = [(evt.EVT_N_EVENT_REPORT, answer(self.ledger, self.log))] if commit else []
        association = association_with(self.destination, contexts, self.ward.node.aet, self.wire, *handlers)
        try:
            sr_class, status = (due.sent, 0) if due.sent else store(association, files)
            if not due.sent:
                self.audit.sent(self.destination, {sr_class: files[sr_class]})
            if not commit:
                return f"stored with warning {status:04X}" if status else ""
            if not due.sent:
                self.log("sent", job=job.id, destination=self.destination.name, version=job.version)
            ask(association, self.ledger, job, self.destination.to, sr_class)
            return None
        finally:
            if association.is_established:
                association.release()

    def _to_web(self, due: Due) -> str:
        sr_class, file = next(iter(self._files(due.job).items()))
        how = web.post(self.destination, file, f"pmclip-{due.job.id:x}-report", self.wire)
        self.audit.sent(self.destination, {sr_class: file})
        return how


def _reason_of(error: Later | OSError) -> str:
    if isinstance(error, TimeoutError):
        return IN_TIME
    return str(error) if isinstance(error, Later) else error.strerror or type(error).__name__
