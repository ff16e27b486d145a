"""A web archive, by STOW-RS (PS3.18 10.5). A redirect is not followed: it would carry the token elsewhere."""

from __future__ import annotations

import json
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

from pmclip_deploy.errors import UsageError
from pmclip_deploy.node.archive import ANSWER_S, CONNECT_S, trust
from pmclip_deploy.node.settings import Destination
from pmclip_deploy.node.wire import Later, Refused, Wire
from pmclip_deploy.serve.settings import token_from_file

AGAIN = (401, 403, 408, 425, 429, 500, 502, 503, 504, 507)  # 401 and 403: until somebody puts a new token into its file
MOST = 1 << 16  # bytes of an answer that are read


def post(destination: Destination, file: Path, boundary: str, wire: Wire) -> str:
    """What the archive says of a report that it stored: "" or a warning. Raises Later, Refused or OSError."""
    body = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    headers = {
        "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
        "Accept": "application/dicom+json",
        "Connection": "close",
    }
    if destination.token_file is not None:
        try:
            headers["Authorization"] = f"Bearer {token_from_file(destination.token_file)}"
        except UsageError as error:
            raise Later(error.message) from None
    address = urlsplit(destination.rest)
    host = address.hostname or ""
    if address.scheme == "https":
        connection: HTTPConnection = HTTPSConnection(host, address.port, timeout=CONNECT_S, context=trust(destination))
    else:
        connection = HTTPConnection(host, address.port, timeout=CONNECT_S)
    content, after_s = b"", 0.0
    try:
        connection.connect()
        wire.take(connection.sock)
        connection.sock.settimeout(ANSWER_S)
        connection.request("POST", address._replace(scheme="", netloc="", fragment="").geturl() or "/", body, headers)
        reply = connection.getresponse()
        status, wait = reply.status, reply.getheader("Retry-After", "")
        after_s = float(wait) if wait.isascii() and wait.isdigit() else 0.0
        with suppress(OSError, HTTPException):  # its status is what counts
            content = reply.read(MOST)
    except HTTPException:
        raise Later("no answer that is HTTP") from None
    finally:
        connection.close()
    reason = _failure(content)
    if status in (200, 202) and reason is None:
        return "" if status == 200 else "stored with warnings"  # 202
    said = f"STOW-RS: status {status}" + ("" if reason is None else f", failure {reason:04X}")
    if status in AGAIN or (reason or 0) >> 8 == 0xA7:
        raise Later(said, after_s)
    raise Refused(f"{said}, a redirect: give the address that it leads to" if status // 100 == 3 else said)


def _failure(content: bytes) -> int | None:
    """The Failure Reason (0008,1197) of the instance, if Failed SOP Sequence (0008,1198) of the answer has one."""
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        return int(json.loads(content)["00081198"]["Value"][0]["00081197"]["Value"][0]) & 0xFFFF
    return None
