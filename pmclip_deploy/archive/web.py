"""A DICOMweb service: what it holds by QIDO-RS, and an instance by WADO-RS (PS3.18 10.4, 10.6)."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import count
from typing import Any

from pmclip_deploy.errors import InputError, UsageError

PAGE = 500  # of a search
MOST = 1 << 30  # bytes of an instance, or of a page
SECONDS = 60.0
STUDY, SERIES, INSTANCE = "0020000D", "0020000E", "00080018"
UID = re.compile(r"[0-9.]{1,64}")


def instances(base: str) -> Iterator[str]:
    """The address of every instance, a study at a time. Raises InputError if the service does not answer as one."""
    base = base.rstrip("/")
    if "?" in base or "#" in base:
        raise UsageError("the DICOMweb address has a query", "give the address of the service, such as http://pacs/dicom-web")
    return _instances(base)


def _instances(base: str) -> Iterator[str]:
    for study in _found(f"{base}/studies?"):
        of_study = f"{base}/studies/{_uid(study, STUDY)}"
        for one in _found(f"{of_study}/instances?"):
            yield f"{of_study}/series/{_uid(one, SERIES)}/instances/{_uid(one, INSTANCE)}"


def retrieved(address: str) -> bytes:
    """The DICOM file of an instance, in the transfer syntax that it is stored in."""
    kind, body = _got(address, 'multipart/related; type="application/dicom"; transfer-syntax=*')
    boundary = re.search(r'boundary="?([^";]{1,200})"?', kind)
    start = body.find(b"\r\n\r\n")
    if boundary is None or start < 0:
        raise InputError("the image: the service sent no DICOM file", "check the address")
    return body[start + 4 : body.find(b"\r\n--" + boundary[1].encode(), start)]


def _found(query: str) -> Iterator[Any]:
    for page in count():
        _, body = _got(f"{query}limit={PAGE}&offset={page * PAGE}", "application/dicom+json")
        try:
            found = json.loads(body) if body else []
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list):
            raise InputError("the DICOMweb service sent no list", "check the address")
        yield from found
        if len(found) < PAGE:
            return


def _uid(item: Any, tag: str) -> str:
    try:
        uid = str(item[tag]["Value"][0])
    except (KeyError, IndexError, TypeError):
        uid = ""
    if not UID.fullmatch(uid):
        raise InputError("the DICOMweb service sent an item without a UID", "check the service")
    return uid


def _got(address: str, accept: str) -> tuple[str, bytes]:
    """(content type, body). Proxy settings of the environment do not count."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(address, headers={"Accept": accept}), timeout=SECONDS) as reply:
            body = reply.read(MOST + 1)
            kind = reply.headers.get("Content-Type", "")
    except urllib.error.HTTPError as error:
        error.close()
        raise InputError(f"the DICOMweb service answered with status {error.code}", "check the address") from None
    except (OSError, ValueError) as error:
        reason = getattr(getattr(error, "reason", error), "strerror", None) or type(error).__name__
        raise InputError(f"the DICOMweb service does not answer ({reason})", "check the address") from None
    if len(body) > MOST:
        raise InputError(f"the DICOMweb service sent more than {MOST >> 20} MiB", "get the image in another way")
    return kind, body
