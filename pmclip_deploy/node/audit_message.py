"""DICOM Audit Messages, as elements of XML (PS3.15 A.5.1)."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from ipaddress import ip_address
from xml.etree.ElementTree import Element, SubElement

CODES = {  # PS3.16
    "110037": "URI",
    "110100": "Application Activity",
    "110102": "Begin Transferring DICOM Instances",
    "110103": "DICOM Instances Accessed",
    "110104": "DICOM Instances Transferred",
    "110106": "Export",
    "110113": "Security Alert",
    "110120": "Application Start",
    "110121": "Application Stop",
    "110126": "Node Authentication",
    "110150": "Application",
    "110152": "Destination Role ID",
    "110153": "Source Role ID",
    "110154": "Destination Media",
    "110180": "Study Instance UID",
    "110182": "Node ID",
}
APPLICATION, DESTINATION, SOURCE, MEDIA = "110150", "110152", "110153", "110154"
SUCCESS, MINOR, SERIOUS = "0", "4", "8"  # EventOutcomeIndicator


def event_of(
    source: str, event: str, action: str, parties: Iterable[Element], about: Iterable[Element] = (), kind: str = "",
    outcome: str = SUCCESS, said: str = "",
) -> Element:  # fmt: skip
    """An AuditMessage that happened now. ``kind`` is the EventTypeCode, and ``said`` describes the outcome."""
    message, now = Element("AuditMessage"), datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    facts = {"EventActionCode": action, "EventDateTime": now, "EventOutcomeIndicator": outcome}
    identification = SubElement(message, "EventIdentification", facts)
    SubElement(identification, "EventID", code_of(event))
    if kind:
        SubElement(identification, "EventTypeCode", code_of(kind))
    if said:
        SubElement(identification, "EventOutcomeDescription").text = said
    message.extend(parties)
    identified = SubElement(message, "AuditSourceIdentification", {"AuditSourceID": source})
    SubElement(identified, "AuditSourceTypeCode", {"csd-code": "4"})  # an application server
    message.extend(about)
    return message


def study_of(uid: str, classes: Mapping[str, int]) -> Element:
    """``classes``: how many instances of each SOP class; "" for a class that is not known."""
    study = object_of("2", "3", code_of("110180"), uid, "Study")
    if classes:
        description = SubElement(study, "ParticipantObjectDescription")
        for sop_class, count in sorted(classes.items()):
            SubElement(description, "SOPClass", ({"UID": sop_class} if sop_class else {}) | {"NumberOfInstances": str(count)})
    return study


def patient_of(number: str) -> Element:
    return object_of("1", "1", {"csd-code": "2", "codeSystemName": "RFC-3881", "originalText": "Patient Number"}, number, "Patient")


def node_of(address: str, why: str) -> Element:
    """The subject of an alert."""
    node = object_of("2", "13", code_of("110182"), address, "Node")
    SubElement(node, "ParticipantObjectDetail", {"type": "Alert Description", "value": b64encode(why.encode()).decode()})
    return node


def media_of(uri: str) -> Element:
    media = participant(MEDIA, uri, "", uri, kind="5")
    SubElement(SubElement(media, "MediaIdentifier"), "MediaType", code_of("110037"))
    return media


def participant(
    role: str, user: str, aet: str = "", address: str = "", name: str = "", requestor: bool = False, kind: str = ""
) -> Element:  # fmt: skip
    facts = {"UserID": user, "UserIsRequestor": str(requestor).lower()}
    if aet:
        facts["AlternativeUserID"] = f"AETITLES={aet}"
    if name:
        facts["UserName"] = name
    if address:
        facts |= {"NetworkAccessPointID": address, "NetworkAccessPointTypeCode": kind or _kind(address)}
    made = Element("ActiveParticipant", facts)
    if role:
        SubElement(made, "RoleIDCode", code_of(role))
    return made


def object_of(kind: str, role: str, code: Mapping[str, str], identity: str, name: str) -> Element:
    """The schema requires a name, and the tables of the messages do not; ours is never a patient's."""
    facts = {"ParticipantObjectID": identity, "ParticipantObjectTypeCode": kind, "ParticipantObjectTypeCodeRole": role}
    made = Element("ParticipantObjectIdentification", facts)
    SubElement(made, "ParticipantObjectIDTypeCode", dict(code))
    SubElement(made, "ParticipantObjectName").text = name
    return made


def code_of(code: str) -> dict[str, str]:
    return {"csd-code": code, "codeSystemName": "DCM", "originalText": CODES[code]}


def _kind(address: str) -> str:
    """NetworkAccessPointTypeCode: 2 for an IP address, 1 for a name."""
    try:
        ip_address(address)
    except ValueError:
        return "1"
    return "2"
