"""`listen --check`: what the configuration means, and whether each archive answers."""

from __future__ import annotations

from collections.abc import Sequence

from pmclip_deploy.console import counted
from pmclip_deploy.node.protocol import Protocol
from pmclip_deploy.node.receive import IMAGE_CLASSES, SYNTAXES
from pmclip_deploy.node.send import Later, association_with
from pmclip_deploy.node.settings import DICOM, FOLDER, Destination, Ward

NO_DESTINATION = 7  # exit code


def check(ward: Ward, protocols: Sequence[Protocol]) -> int:
    """Prints, and returns the exit code: 7 if an archive does not answer."""
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
    faults = [fault for one in ward.send if (fault := _fault(one, ward)) is not None]
    return NO_DESTINATION if faults else 0


def _fault(destination: Destination, ward: Ward) -> str | None:
    said = "a folder" if destination.kind == FOLDER else "not asked: STOW-RS has no C-ECHO"
    fault = None
    if destination.kind == DICOM:
        said, fault = _echo(destination, ward)
    print(f"destination: {destination.to}: {said}")
    return fault


def _echo(destination: Destination, ward: Ward) -> tuple[str, str | None]:
    verification = "1.2.840.10008.1.1"
    try:
        association = association_with(destination, [(verification, ["1.2.840.10008.1.2"])], ward.node.aet)
    except Later as error:
        return str(error), str(error)
    try:
        status = association.send_c_echo().get("Status")
    finally:
        association.release()
    return ("answers C-ECHO", None) if status == 0 else ("does not answer C-ECHO", "no answer")
