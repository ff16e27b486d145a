"""The server: sockets, signals, TLS, and the log."""

import json
import logging
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pmclip_deploy.errors import DeviceError, UsageError
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.serve.app import Service, app_of
from pmclip_deploy.serve.settings import Settings

if TYPE_CHECKING:
    from pmclip_deploy.search.index import Index

GRACE_S = 30  # in which accepted requests may end
FIRST_BYTES_S = 10  # in which a connection must have sent the head of a request
MOST_HEADERS = 16 << 10  # bytes of a request's head
MOST_CONNECTIONS = 512
PROGRAM = "pmclip_deploy.serve"


class Protocol(H11Protocol):
    """Closes a connection whose first request does not come."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._first = self.loop.call_later(FIRST_BYTES_S, self._end_if_silent)

    def connection_lost(self, error: Exception | None) -> None:
        self._first.cancel()
        super().connection_lost(error)

    def _end_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT lets accepted requests end; a second one does not."""

    def __init__(self, config: uvicorn.Config, service: Service, started: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self._when_started = service, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._when_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, which ends the process by the signal afterwards; this one ends with exit code 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
        before = {name: signal.signal(getattr(signal, name), self.handle_exit) for name in names}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.places.is_closing = True
        self.force_exit = self.should_exit
        self.should_exit = True


def serve(predictor: Predictor, settings: Settings, index: "Index | None", started: Callable[[str], None]) -> None:
    """Runs until a signal ends it. ``started`` is told the address. Raises UsageError if the port or the certificate cannot be used."""
    log_to_stderr()
    bound = bound_socket(settings)
    settings = replace(settings, port=bound.getsockname()[1])
    service = Service(predictor, settings, index)
    config = uvicorn.Config(
        app_of(service),
        host=settings.host,
        port=settings.port,
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MOST_HEADERS,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_S,
        backlog=256,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        ssl_ca_certs=None if settings.client_ca is None else str(settings.client_ca),
        ssl_cert_reqs=ssl.CERT_NONE if settings.client_ca is None else ssl.CERT_REQUIRED,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError):
        raise UsageError("the TLS certificate or its key cannot be used", "give PEM files that belong together") from None
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    server = Server(config, service, lambda: started(settings.url))
    server.run(sockets=[bound])
    if not server.started:
        raise DeviceError("the service did not start", "look at the log above")


def bound_socket(settings: Settings) -> socket.socket:
    """Raises UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        if sys.platform != "win32":
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        reason = error.strerror or "cannot be used"
        raise UsageError(f"{settings.host} port {settings.port}: {reason}", "choose another --host or --port") from None
    return opened


class JsonLines(logging.Formatter):
    """Facts that this program chose, and never another library's message: it may quote a request."""

    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", {}) if record.name.startswith(PROGRAM) else {"from": record.name}
        event = record.getMessage() if record.name.startswith(PROGRAM) else "message"
        return json.dumps({"time": round(time.time(), 3), "level": record.levelname.lower(), "event": event, **facts})


def log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(PROGRAM).setLevel(logging.INFO)
