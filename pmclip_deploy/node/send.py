"""Deliveries: a report goes to each destination until that has it, refuses it, or too much time has passed."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pmclip_deploy.atomic import written
from pmclip_deploy.errors import UsageError
from pmclip_deploy.node.audit import Trail
from pmclip_deploy.node.ledger import Job, Ledger
from pmclip_deploy.node.receive import Folders
from pmclip_deploy.node.settings import DICOM, DICOM_ADDRESS, FOLDER, Destination, Ward
from pmclip_deploy.node.work import report_file
from pmclip_deploy.report.document import SR_CLASSES
from pmclip_deploy.serve.settings import token_from_file

CONNECT_S, ANSWER_S = 30.0, 120.0
LITTLE_ENDIAN = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")
CLASS_NOT_SUPPORTED = 0x0122
BUSY = (408, 425, 429, 500, 502, 503, 504, 507)


class Refused(Exception):
    """To try again would not help. The text goes to a person, and names no patient."""


class Later(Exception):
    """The next try may succeed."""


class Sender:
    """One destination."""

    def __init__(self, destination: Destination, ward: Ward, ledger: Ledger, audit: Trail, log: Callable[..., None]) -> None:
        self.destination, self.ward, self.ledger, self.audit, self.log = destination, ward, ledger, audit, log
        self.folders = Folders(ward.state)
        self._send = {FOLDER: _to_folder, DICOM: _to_archive}.get(destination.kind, _to_web)

    def step(self) -> bool:
        """Tries one delivery. Returns False if none is due."""
        found = None if self.audit.fault else self.ledger.next_delivery(self.destination.to)
        if found is None:
            return False
        job, failed, since = found
        to, name = self.destination.to, self.destination.name
        classes: list[str] = [*self.destination.sr_classes]
        files = {sr_class: self.folders.reports / report_file(job.id, sr_class) for sr_class in classes}
        try:
            how = self._send(self.destination, files, job, self.ward.node.aet)
            self.audit.sent(self.destination, files)
        except Refused as error:
            self.audit.sent(self.destination, files, str(error))
            self.ledger.set_delivery(job, to, "refused", str(error))
            self.log("refused", job=job.id, destination=name, reason=str(error))
        except (Later, OSError) as error:
            reason = str(error) if isinstance(error, Later) else error.strerror or type(error).__name__
            if time.time() - since >= self.ward.retry.give_up:
                self.ledger.set_delivery(job, to, "given_up", reason)
                self.log("given up", job=job.id, destination=name, reason=reason)
            else:
                wait = self.ward.retry.wait(failed + 1)
                self.ledger.set_delivery(job, to, "waiting", reason, time.time() + wait)
                self.log("postponed", job=job.id, destination=name, reason=reason, seconds=wait)
        except Exception as error:
            self.ledger.set_delivery(job, to, "refused", f"internal: {type(error).__name__}")
            self.log("refused", job=job.id, destination=name, reason=f"internal: {type(error).__name__}")
        else:
            self.ledger.set_delivery(job, to, "done", how)
            self.log("sent", job=job.id, destination=name, version=job.version)
        return True


def _to_folder(destination: Destination, files: Mapping[str, Path], job: Job, aet: str) -> str:
    folder, (sr_class, file) = Path(destination.rest), next(iter(files.items()))
    folder.mkdir(parents=True, exist_ok=True)
    with written(folder / f"{json.loads(job.report)[sr_class][0]}.dcm", mode=0o640) as new:
        new.write_bytes(file.read_bytes())
    return ""


# An archive, by C-STORE.


def association_with(destination: Destination, contexts: list[tuple[str, list[str]]], aet: str) -> Any:
    """An established association. Raises Later."""
    from pynetdicom import AE

    found = DICOM_ADDRESS.fullmatch(destination.rest)
    assert found is not None
    entity = AE(destination.calling or aet)
    entity.connection_timeout, entity.acse_timeout = CONNECT_S, CONNECT_S
    entity.dimse_timeout = entity.network_timeout = ANSWER_S
    for sop_class, syntaxes in contexts:
        entity.add_requested_context(sop_class, syntaxes)
    tls = (_trust(destination), found["host"]) if destination.tls else None
    made = entity.associate(found["host"].strip("[]"), int(found["port"]), ae_title=found["aet"], tls_args=tls)
    if not made.is_established:
        raise Later("the association was rejected" if made.is_rejected else "no association")
    return made


def _to_archive(destination: Destination, files: Mapping[str, Path], job: Job, aet: str) -> str:
    """The first class of ``sr_classes`` that the peer takes."""
    from pydicom import dcmread

    association = association_with(destination, [(SR_CLASSES[name], list(LITTLE_ENDIAN)) for name in files], aet)
    try:
        taken = {context.abstract_syntax for context in association.accepted_contexts}
        for sr_class, file in files.items():
            if SR_CLASSES[sr_class] not in taken:
                continue
            reply = association.send_c_store(dcmread(file))
            if "Status" not in reply:
                raise Later("no answer to C-STORE")
            status = int(reply.Status)
            if status == 0 or status >> 12 == 0xB:  # success, or stored with a warning
                return "" if status == 0 else f"stored with warning {status:04X}"
            if status >> 8 == 0xA7:
                raise Later(f"C-STORE: out of resources, {status:04X}")
            if status != CLASS_NOT_SUPPORTED:
                raise Refused(f"C-STORE: status {status:04X}")
        raise Refused("the peer accepts no SR class of sr_classes")
    finally:
        if association.is_established:
            association.release()


def _trust(destination: Destination) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=None if destination.ca is None else str(destination.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


# An archive, by STOW-RS (PS3.18 10.5).


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _to_web(destination: Destination, files: Mapping[str, Path], job: Job, aet: str) -> str:
    data, boundary = next(iter(files.values())).read_bytes(), f"pmclip-{job.id:x}-report"
    body = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode() + data + f"\r\n--{boundary}--\r\n".encode()
    headers = {
        "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
        "Accept": "application/dicom+json",
    }
    if destination.token_file is not None:
        try:
            headers["Authorization"] = f"Bearer {token_from_file(destination.token_file)}"
        except UsageError as error:
            raise Later(error.message) from None
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_trust(destination)), _NoRedirect()
    )
    request = urllib.request.Request(destination.rest, body, headers, method="POST")
    try:
        with opener.open(request, timeout=ANSWER_S) as reply:
            status = reply.status
    except urllib.error.HTTPError as error:
        status = error.code
        error.close()
    except urllib.error.URLError as error:
        reason = error.reason
        raise Later((reason.strerror if isinstance(reason, OSError) else None) or "no connection") from None
    if status in (200, 202):  # 202: stored with warnings
        return "" if status == 200 else "stored with warnings"
    if status in BUSY:
        raise Later(f"STOW-RS: status {status}")
    raise Refused(f"STOW-RS: status {status}")
