"""Where audit messages go: a file for each day, and a syslog over TLS."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections import deque
from datetime import datetime, timezone
from pathlib import Path

from pmclip_deploy.atomic import sync_folder
from pmclip_deploy.node.settings import Tls

MOST_WAITING = 1000  # messages, kept in memory while a sink does not work
CONNECT_S = 5.0
HEADER = "<85>1 {time} {host} pmclip-deploy {process} DICOM+RFC3881 - \ufeff"  # RFC 5424: facility 10, severity 5 (PS3.15 A.6)


class Sink:
    """Keeps the messages that it could not write yet, in their order."""

    name = ""

    def __init__(self) -> None:
        self.waiting, self.lost = deque[str](), 0

    def add(self, message: str) -> None:
        if len(self.waiting) < MOST_WAITING:
            self.waiting.append(message)
        else:
            self.lost += 1

    def flush(self, check: bool) -> str:
        """Why a message cannot be written, or ``check`` fails; "" if all is well."""
        try:
            if check:
                self.check()
            while self.waiting:
                self.put(self.waiting[0])
                self.waiting.popleft()
        except OSError as error:
            return f"the audit {self.name} cannot be written ({_said(error)})"
        return ""

    def check(self) -> None:
        raise NotImplementedError

    def put(self, message: str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing by default."""


class AuditFile(Sink):
    """One message a line, in a file whose name carries the day in UTC. It is on the disk when ``put`` returns."""

    name = "file"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def check(self) -> None:
        os.close(self._opened())

    def _opened(self) -> int:
        path = self.path.with_name(f"{self.path.stem}-{datetime.now(timezone.utc):%Y-%m-%d}{self.path.suffix}")
        fresh = not path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        if fresh:
            sync_folder(path.parent)
        return descriptor

    def put(self, message: str) -> None:
        descriptor, data = self._opened(), f"{message}\n".encode()
        try:
            if os.name == "posix":  # `queue export` writes too
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            if size and os.lseek(descriptor, size - 1, os.SEEK_SET) >= 0 and os.read(descriptor, 1) != b"\n":
                data = b"\n" + data  # a power cut left part of a line
            try:
                if os.write(descriptor, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


class Syslog(Sink):
    """RFC 5424 over TLS (RFC 5425). The protocol acknowledges nothing: what was sent as a connection broke may be lost."""

    name = "syslog"

    def __init__(self, address: str, ca: Path | None, tls: Tls | None) -> None:
        super().__init__()
        self.host, _, port = address.rpartition(":")
        self.port, self.ca, self.tls = int(port), ca, tls
        self._socket: ssl.SSLSocket | None = None

    def check(self) -> None:
        """A connection that the server closed is made again."""
        if self._socket is not None and _is_closed(self._socket):
            self.close()
        if self._socket is None:
            host = self.host.strip("[]")
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.tls is not None:  # a repository may ask who we are
                context.load_cert_chain(self.tls.cert, self.tls.key)
            connection = socket.create_connection((host, self.port), CONNECT_S)
            try:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                self._socket = context.wrap_socket(connection, server_hostname=host)
            except OSError:
                connection.close()
                raise

    def put(self, message: str) -> None:
        self.check()
        assert self._socket is not None
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        data = (HEADER.format(time=time, host=socket.gethostname() or "-", process=os.getpid()) + message).encode()
        try:
            self._socket.sendall(f"{len(data)} ".encode() + data)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _is_closed(connection: ssl.SSLSocket) -> bool:
    """A syslog server says nothing but that it closes."""
    connection.settimeout(0)
    try:
        return not connection.recv(1)
    except ssl.SSLWantReadError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(CONNECT_S)


def _said(error: OSError) -> str:
    """Without the path, and without a peer's words."""
    return getattr(error, "verify_message", None) or getattr(error, "reason", None) or error.strerror or type(error).__name__
