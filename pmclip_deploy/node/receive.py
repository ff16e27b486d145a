"""The storage SCP: an image is acknowledged when it and its row lie on the disk, and not before."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from pmclip_deploy.atomic import sync_folder
from pmclip_deploy.errors import InputError
from pmclip_deploy.header.raw import STORAGE, strings_of
from pmclip_deploy.imaging.decoders.frame import CODECS
from pmclip_deploy.imaging.dicom_file import image_from_file, reading
from pmclip_deploy.imaging.elements import order_in_series, text_of, whole_number
from pmclip_deploy.node.audit import Trail
from pmclip_deploy.node.commitment import PUSH_MODEL, answer
from pmclip_deploy.node.ledger import Arrival, Ledger
from pmclip_deploy.node.protocol import Protocol, keywords_of, values_of
from pmclip_deploy.node.server import IDLE_S, SILENT_S, server_class
from pmclip_deploy.node.settings import Ward
from pmclip_deploy.node.wire import cut
from pmclip_deploy.report.source import MAKER

NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99")
SYNTAXES = (*NATIVE, *CODECS)  # docs/reference/dicom.md
_TAILS = (
    *("1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "1.3.1", "2", "2.1", "2.2", "3", "3.1", "4", "4.1", "4.3", "4.4", "5", "6", "6.1", "6.2"),
    *("7", "7.1", "7.2", "7.3", "7.4", "12.1", "12.1.1", "12.2", "12.2.1", "13.1.1", "13.1.2", "13.1.3", "20", "128", "128.1", "130"),
)
IMAGE_CLASSES = tuple(STORAGE + tail for tail in _TAILS)  # radiology images, and Secondary Capture (PS3.4 B.5)

# Statuses of C-STORE (PS3.4 B.2.3).
STORED, FULL, MISMATCH, NO_IMAGE = 0x0000, 0xA700, 0xA900, 0xC000
REJECT = {"calling": (1, 1, 3), "called": (1, 1, 7), "busy": (2, 3, 2)}  # result, source, reason (PS3.8 9.3.4)
WHY = {"calling": "the calling AE title and its address are not in peers", "called": "the called AE title is not that of the node"}
MOST_CONNECTIONS = 1000  # also those that have asked for nothing yet


@dataclass(frozen=True)
class Folders:
    """Of a node's state. All are readable by their owner only."""

    state: Path

    @property
    def incoming(self) -> Path:
        return self.state / "incoming"  # what is being received

    @property
    def images(self) -> Path:
        return self.state / "images"

    @property
    def reports(self) -> Path:
        return self.state / "reports"

    def make(self) -> None:
        for folder in (self.state, self.incoming, self.images, self.reports):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def sweep(self, ledger: Ledger) -> int:
        """Deletes what a process that was killed left behind: it was never acknowledged. Returns the number of files."""
        known = ledger.files()
        left = [*self.incoming.iterdir(), *(path for path in self.images.iterdir() if path.name not in known)]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)


class Quiet:
    """How long nothing of a study came, on any association. An association that is receiving keeps the study of its last image open."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self._lock = threading.Lock()
        self._touched = dict[str, float]()
        self._studies = dict[int, str]()  # by association

    def stored(self, association: int, study: str) -> None:
        with self._lock:
            self._studies[association] = study
            self._touched[study] = time.monotonic()

    def receiving(self, association: int) -> None:
        with self._lock:
            if (study := self._studies.get(association)) is not None:
                self._touched[study] = time.monotonic()

    def ended(self, association: int) -> None:
        with self._lock:
            self._studies.pop(association, None)

    def seconds(self, study: str) -> float:
        """A study of which nothing came since the start of this process is quiet since then."""
        with self._lock:
            return time.monotonic() - self._touched.get(study, self.begun)

    def forget(self, study: str) -> None:
        with self._lock:
            self._touched.pop(study, None)


class Receiver:
    """Takes images from the peers of ward.yaml."""

    def __init__(
        self, ward: Ward, protocols: Sequence[Protocol], ledger: Ledger, quiet: Quiet, audit: Trail, log: Callable[..., None]
    ) -> None:
        self.ward, self.protocols, self.ledger, self.quiet, self.audit, self.log = ward, protocols, ledger, quiet, audit, log
        self.folders = Folders(ward.state)
        self.statuses = Counter[int]()
        self._keywords = keywords_of(protocols)
        self._parsing = threading.Lock()  # pydicom's warnings are caught for the whole process
        self._bytes = Counter[int]()  # by association, of the image that it is sending
        self._was_full = False
        self._server: Any = None

    # The association.

    def open(self) -> int:
        """Listens, and returns the port. Raises OSError."""
        import tempfile

        from pynetdicom import AE, _config, evt
        from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

        tempfile.tempdir = str(self.folders.incoming)  # where pynetdicom writes as it receives
        _config.STORE_RECV_CHUNKED_DATASET = True
        _config.LOG_HANDLER_LEVEL = "none"
        node = self.ward.node
        entity = AE(node.aet)
        entity.maximum_associations, entity.maximum_pdu_size = MOST_CONNECTIONS, node.max_pdu
        entity.acse_timeout, entity.dimse_timeout, entity.network_timeout = SILENT_S, IDLE_S, IDLE_S
        entity.add_supported_context(Verification)
        for sop_class in IMAGE_CLASSES:
            entity.add_supported_context(sop_class, list(SYNTAXES))
        if any(one.commit for one in self.ward.send):  # the peer is SCP, and says so by role selection
            entity.add_supported_context(PUSH_MODEL, scu_role=False, scp_role=True)
        handlers: Any = [
            (evt.EVT_REQUESTED, self._requested),
            (evt.EVT_DATA_RECV, self._received),
            (evt.EVT_C_ECHO, lambda event: STORED),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_N_EVENT_REPORT, answer(self.ledger, self.log)),
            (evt.EVT_CONN_CLOSE, self._closed),
        ]
        of_server = server_class(lambda address: self.audit.refused(address, "", "the TLS handshake failed"))
        server = entity.make_server((node.host, node.port), ssl_context=self._tls(), evt_handlers=handlers, server_class=of_server)
        entity._servers.append(server)
        self._server = server
        threading.Thread(target=server.serve_forever, name="listener", daemon=True).start()
        return int(server.server_address[1])

    def close(self, grace_s: float = 5.0) -> None:
        """Takes no new association, and lets those that there are end."""
        if self._server is None:
            return
        self._server.shutdown()
        end = time.monotonic() + grace_s
        while self.associations and time.monotonic() < end:
            time.sleep(0.05)
        left = self._server.active_associations
        for association in left:
            association.abort(block=False)  # to block is to wait for a peer that has sent half a PDU
        time.sleep(0.2 if left else 0)
        for association in left:
            if association.dul.socket is not None and association.dul.socket.socket is not None:
                cut(association.dul.socket.socket)
        self._server.server_close()

    def _tls(self) -> ssl.SSLContext | None:
        tls = self.ward.node.tls
        if tls is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(tls.cert, tls.key)
        if tls.ca is not None:
            context.load_verify_locations(tls.ca)
            context.verify_mode = ssl.CERT_REQUIRED if tls.require_client else ssl.CERT_OPTIONAL
        return context

    def _requested(self, event: Any) -> None:
        association, requestor = event.assoc, event.assoc.requestor
        calling, called = requestor.primitive.calling_ae_title, requestor.primitive.called_ae_title
        address = ip_address(str(requestor.address).partition("%")[0])
        known = any(peer.aet == calling and any(address in network for network in peer.addresses) for peer in self.ward.peers)
        reason = "calling" if not known else "called" if called != self.ward.node.aet else None
        if reason is None and self.associations >= self.ward.node.max_associations:
            reason = "busy"
        if reason is None:
            return
        self.log("rejected", reason=reason)
        if reason != "busy":
            self.audit.refused(str(address), calling, WHY[reason])
        association.acse.send_reject(*REJECT[reason])
        association.kill()

    def _received(self, event: Any) -> None:
        key = id(event.assoc)
        self.quiet.receiving(key)
        self._bytes[key] += len(event.data)
        if self._bytes[key] > self.ward.node.max_instance_mb << 20:
            self.log("aborted", reason="an image is larger than max_instance_mb")
            event.assoc.abort()

    def _closed(self, event: Any) -> None:
        self.quiet.ended(id(event.assoc))
        self._bytes.pop(id(event.assoc), None)

    @property
    def associations(self) -> int:
        """Those that are established: not every one that ends says so."""
        return 0 if self._server is None else sum(one.is_established for one in self._server.active_associations)

    # The image.

    @property
    def has_room(self) -> bool:
        """After an image was refused, there is room again from a tenth more than ``refuse_below_gb`` on."""
        mark = self.ward.disk.refuse_below_gb * 1e9
        return shutil.disk_usage(self.ward.state).free >= (1.1 * mark if self._was_full else mark)

    def _store(self, event: Any) -> int:
        self._bytes.pop(id(event.assoc), None)
        try:
            status = self._stored(event)
        except (OSError, sqlite3.Error) as error:  # the disk
            self.log("refused", reason=reason_of(error))
            status = FULL
        self.statuses[status] += 1
        return status

    def _stored(self, event: Any) -> int:
        self._was_full = not self.has_room
        if self._was_full:
            self.log("refused", reason="the disk is nearly full")
            return FULL
        path, request = Path(event.dataset_path), event.request
        sha256 = _sha256(path, event.context.transfer_syntax)
        sop, of_class = str(request.AffectedSOPInstanceUID), str(request.AffectedSOPClassUID)
        if self.ledger.copy_of(sop, sha256):
            with self.audit.receiving(event.assoc, of_class, path, "R"):
                return STORED
        try:
            arrival, sop_class = self._arrival(path, sha256)
        except InputError:
            self.log("refused", reason="no DICOM image that can be read")
            return NO_IMAGE
        if (arrival.sop, sop_class) != (sop, of_class):
            self.log("refused", reason="the data set is of another class or instance than the request")
            return MISMATCH
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with self.audit.receiving(event.assoc, of_class, path, "C"):
            path.replace(self.folders.images / arrival.file)
            sync_folder(self.folders.images)
            if self.ledger.add(arrival):
                self.quiet.stored(id(event.assoc), arrival.study)
        return STORED

    def _arrival(self, path: Path, sha256: str) -> tuple[Arrival, str]:
        """(the image, its SOP Class UID). Raises InputError if it holds no picture, or lacks a UID."""
        with self._parsing, reading("the image") as stack:
            image = image_from_file(str(path), stack)
            dataset = image.dataset
            if image.file is None or image.vr == "float":
                raise InputError("the image: has no pixels")
            sop, study, series = (text_of(dataset, f"{level}InstanceUID") for level in ("SOP", "Study", "Series"))
            if not (sop and study and series):
                raise InputError("the image: lacks a UID")
            protocol, reason = self._protocol(dataset, values_of(dataset, self._keywords))
            pixels = whole_number(dataset, "Rows", 0) * whole_number(dataset, "Columns", 0)
            name = hashlib.sha256(f"{sop}\0{sha256}".encode()).hexdigest()[:40] + ".dcm"  # never a peer's text as a path
            return Arrival(sop, sha256, name, study, series, protocol, order_in_series(dataset), pixels, reason), text_of(
                dataset, "SOPClassUID"
            )

    def _protocol(self, dataset: Any, values: Mapping[str, tuple[str, ...]]) -> tuple[str | None, str]:
        if strings_of(dataset, 0x00080070) == (MAKER.upper(),):
            return None, "our own report"
        found = next((protocol.name for protocol in self.protocols if protocol.takes(values)), None)
        return found, "" if found else "no protocol matches"


def break_off(thread: Any) -> None:
    """Ends the association of a thread that died of what a peer sent; pynetdicom leaves it open, and its place taken."""
    association = getattr(thread, "assoc", None)
    if association is not None:
        association.is_aborted, association.is_established, association._kill = True, False, True
        with suppress(OSError):
            thread.socket.close()


def reason_of(error: OSError | sqlite3.Error) -> str:
    """What a disk's or the ledger's error may be told as."""
    return getattr(error, "strerror", None) or f"the disk failed ({type(error).__name__})"


def _sha256(path: Path, syntax: str) -> str:
    """Of the transfer syntax and the data set, without the file meta information, which is ours."""
    digest = hashlib.sha256(syntax.encode())
    with path.open("rb") as file:
        file.seek(132)
        head = file.read(12)  # (0002,0000) UL 4: the length of the group
        file.seek(144 + int.from_bytes(head[8:12], "little"))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
