"""An archive, by C-STORE."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmclip_deploy.node.settings import DICOM_ADDRESS, Destination
from pmclip_deploy.node.wire import Later, Refused, Wire
from pmclip_deploy.report.capture import SECONDARY_CAPTURE
from pmclip_deploy.report.document import SR_CLASSES

CONNECT_S, ANSWER_S = 30.0, 120.0  # for a connection and for an association; for an answer to C-STORE
LITTLE_ENDIAN = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")
CLASSES = {**SR_CLASSES, "sc": SECONDARY_CAPTURE}
CLASS_NOT_SUPPORTED = 0x0122
NO_CLASS = "the peer accepts no class that is offered"
REJECTIONS = {  # source, reason (PS3.8 9.3.4)
    (1, 2): "application context not supported",
    (1, 3): "calling AE title not recognized",
    (1, 7): "called AE title not recognized",
    (3, 1): "temporary congestion",
    (3, 2): "local limit exceeded",
}


def association_with(destination: Destination, contexts: Mapping[str, tuple[str, ...]], aet: str, wire: Wire, *handlers: Any) -> Any:
    """An established association; ``contexts``: transfer syntaxes of each class. Raises Later, and Refused if none is accepted."""
    from pynetdicom import AE, evt

    found = DICOM_ADDRESS.fullmatch(destination.rest)
    assert found is not None
    entity = AE(destination.calling or aet)
    entity.connection_timeout, entity.acse_timeout = CONNECT_S, CONNECT_S
    entity.dimse_timeout = entity.network_timeout = ANSWER_S
    for sop_class, syntaxes in contexts.items():
        entity.add_requested_context(sop_class, list(syntaxes))
    bound = [(evt.EVT_CONN_OPEN, lambda event: wire.take(event.assoc.dul.socket.socket)), *handlers]
    try:
        tls = (trust(destination), found["host"]) if destination.tls else None
        made = entity.associate(found["host"].strip("[]"), int(found["port"]), ae_title=found["aet"], tls_args=tls, evt_handlers=bound)
    except OSError as error:  # no such name, or no such file of certificates
        raise Later(error.strerror or "no connection") from None
    if made.is_rejected:
        said: Any = made.acceptor.primitive
        raise Later(f"rejected: {REJECTIONS.get((said.result_source, said.diagnostic), 'no reason given')}")
    if made.rejected_contexts and not made.accepted_contexts:  # pynetdicom has ended it
        raise Refused(NO_CLASS)
    if not made.is_established:
        raise Later("no association")
    return made


def store(association: Any, files: Mapping[str, Path]) -> tuple[str, int]:
    """(the first class of ``files`` that the peer takes, the status). Raises Later or Refused."""
    from pydicom import dcmread

    taken = {context.abstract_syntax for context in association.accepted_contexts}
    for sr_class, file in files.items():
        if CLASSES[sr_class] not in taken:
            continue
        dataset = dcmread(file)
        if not association.is_established:
            raise Later("the association ended before C-STORE")
        reply = association.send_c_store(dataset)
        if "Status" not in reply:
            raise Later("no answer to C-STORE")
        status = int(reply.Status)
        if status == 0 or status >> 12 == 0xB:  # success, or stored with a warning
            return sr_class, status
        if status >> 8 == 0xA7:
            raise Later(f"C-STORE: out of resources, {status:04X}")
        if status != CLASS_NOT_SUPPORTED:
            raise Refused(f"C-STORE: status {status:04X}")
    raise Refused(NO_CLASS)


def trust(destination: Destination) -> ssl.SSLContext:
    """Raises OSError."""
    context = ssl.create_default_context(cafile=None if destination.ca is None else str(destination.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
