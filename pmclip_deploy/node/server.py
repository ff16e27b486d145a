"""The server of connections below pynetdicom's associations."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import suppress
from selectors import EVENT_READ, DefaultSelector
from socket import socket
from typing import Any, cast

SILENT_S = 10.0  # in which a connection must say who it is
IDLE_S = 60.0


def _readable(connection: socket, seconds: float) -> bool:
    with DefaultSelector() as waiting:
        waiting.register(connection, EVENT_READ)
        return bool(waiting.select(seconds))


def server_class(refused: Callable[[str], None]) -> Any:
    """pynetdicom's, with the TLS handshake in the connection's own thread, and no association before a client says something.

    A silent client holds up no other: pynetdicom's threads for an association poll all the time. ``refused`` is told an address.
    """
    from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

    class Handler(RequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # ssl.SSLError is one
                if isinstance(self.request, ssl.SSLSocket):
                    self.request.settimeout(SILENT_S)
                    try:
                        self.request.do_handshake()
                    except ssl.SSLError:
                        refused(self.client_address[0])
                        raise
                self.request.settimeout(IDLE_S)  # for the rest of a PDU
                if _readable(self.request, SILENT_S):
                    super().handle()
                    return
            self.server.shutdown_request(self.request)

    class Server(ThreadedAssociationServer):
        daemon_threads, request_queue_size = True, 256

        def handle_error(self, *_: Any) -> None:
            """Nothing: socketserver would print the error, whose text may quote a peer."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            named["request_handler"] = Handler
            super().__init__(*arguments, **named)

        def get_request(self) -> Any:
            connection, address = cast(socket, self.socket).accept()
            if self.ssl_context:
                connection = self.ssl_context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            return connection, address

    return Server
