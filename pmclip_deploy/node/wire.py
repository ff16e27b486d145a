"""The connection of a delivery, which a peer cannot keep open for as long as it likes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from socket import SHUT_RDWR, socket

IN_TIME, STOPPED = "no answer in time", "the node stopped"


class Later(Exception):
    """The next try may succeed, and not before ``after_s`` seconds have passed."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class Refused(Exception):
    """To try again would not help. The text goes to a person, and names no patient."""


class Wire:
    """One connection at a time. To cut it ends what reads from it or writes to it, in whichever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket | None = None
        self._is_closed = False
        self.why = ""  # it was cut

    @contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """A socket's own time-out starts anew with each byte; this one does not."""
        with self._lock:
            self.why = STOPPED if self._is_closed else ""
        timer = threading.Timer(seconds, self._cut, (IN_TIME,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._lock:
                self._socket = None

    def take(self, connection: socket) -> None:
        """The connection is made."""
        with self._lock:
            self._socket = connection
            if self.why:
                cut(connection)

    def close(self) -> None:
        """Cut, and cut whatever is connected from now on."""
        self._is_closed = True
        self._cut(STOPPED)

    def _cut(self, why: str) -> None:
        with self._lock:
            self.why = why
            if self._socket is not None:
                cut(self._socket)


def cut(connection: socket) -> None:
    """Wakes every thread that reads from it or writes to it. ``SSLSocket.shutdown`` would let a thread read on without TLS."""
    with suppress(OSError):
        socket.shutdown(connection, SHUT_RDWR)
