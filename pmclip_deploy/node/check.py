"""`listen --check`: what the configuration means, and whether each archive answers."""

from __future__ import annotations

from collections.abc import Sequence

from pmclip_deploy.console import counted
from pmclip_deploy.node.archive import association_with
from pmclip_deploy.node.audit import Trail
from pmclip_deploy.node.protocol import Protocol
from pmclip_deploy.node.receive import IMAGE_CLASSES, SYNTAXES
from pmclip_deploy.node.settings import DICOM, FOLDER, Destination, Ward
from pmclip_deploy.node.wire import Later, Refused, Wire

NO_DESTINATION = 7  # exit code
ANSWERS = "answers C-ECHO"
VERIFICATION = "1.2.840.10008.1.1"
CHECK_S = 60.0  # for each archive


def check(ward: Ward, protocols: Sequence[Protocol]) -> int:
    """Prints, and returns the exit code: 7 if an archive does not answer, or the audit trail cannot be written."""
    from pydicom.uid import UID

    node = ward.node
    limit = f"{counted(node.max_associations, 'association')} at most"
    print(f"node: {node.aet} on {node.host} port {node.port}, {'TLS' if node.tls else 'no TLS'}, {limit}")
    for peer in ward.peers:
        print(f"peer: {peer.aet} from {', '.join(map(str, peer.addresses))}")
    if not ward.peers:
        print("peer: none, so that every association is rejected")
    for protocol in protocols:
        print(f"protocol: {protocol.label}, {counted(len(protocol.questions), 'question')}")
    print("offered: C-ECHO; C-STORE of these classes, in these transfer syntaxes:")
    for uid in (*IMAGE_CLASSES, *SYNTAXES):
        print(f"    {uid:32} {UID(uid).name}")
    trail, code = Trail(ward), 0
    for name, fault in trail.faults():
        print(f"audit: {name}: {fault or 'can be written'}")
        code = NO_DESTINATION if fault else code
    trail.close()
    for one in ward.send:
        said = {FOLDER: "a folder", DICOM: ""}.get(one.kind, "not asked: STOW-RS has no C-ECHO") or _echo(one, ward)
        print(f"destination: {one.to}: {said}")
        code = NO_DESTINATION if one.kind == DICOM and said != ANSWERS else code
    return code


def _echo(destination: Destination, ward: Ward) -> str:
    wire = Wire()
    with wire.limited(CHECK_S):
        try:
            association = association_with(destination, {VERIFICATION: ("1.2.840.10008.1.2",)}, ward.node.aet, wire)
        except (Later, Refused) as error:
            return str(error)
        try:
            return ANSWERS if association.send_c_echo().get("Status") == 0 else "does not answer C-ECHO"
        finally:
            association.release()
