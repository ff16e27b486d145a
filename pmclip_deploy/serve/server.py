"""The server: sockets, signals, TLS, and the log."""

import json
import logging
import secrets
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
from typing import TYPE_CHECKING, Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pmclip_deploy.errors import DeviceError, UsageError
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.serve.app import app_of
from pmclip_deploy.serve.guard import own_headers, refusal
from pmclip_deploy.serve.problems import Problem
from pmclip_deploy.serve.service import Service
from pmclip_deploy.serve.settings import Settings

if TYPE_CHECKING:
    from pmclip_deploy.search.index import Index

GRACE_S = 30  # in which accepted requests may end
LOOK_S = 5.0  # between two looks at a connection
MOST_HEADERS = 16 << 10  # bytes of a request's head
MOST_CONNECTIONS = 512
PROGRAM = "pmclip_deploy.serve"


class Protocol(H11Protocol):
    """Ends connections on which nothing moves, the oldest one first if there are too many, and refuses what is no HTTP as all else."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._since, self._seen = self.loop.time(), object()
        self._timer = self.loop.call_later(LOOK_S, self._look)
        if len(self.connections) > MOST_CONNECTIONS:
            others = cast("set[Protocol]", self.connections)
            min(others, key=lambda each: (each.transport.is_closing(), each.is_at_work, each._since)).transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(error)

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    @property
    def is_at_work(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _look(self) -> None:
        """The head of a request must come between two looks, and a reply must be taken, if only in part."""
        left = self.transport.get_write_buffer_size()
        seen = (id(self.cycle), left)
        if seen == self._seen and (left or not self.is_at_work):
            self.transport.abort()
        self._seen = seen
        self._timer = self.loop.call_later(LOOK_S, self._look)

    def send_400_response(self, msg: str) -> None:
        problem = Problem(400, "usage", f"this is no HTTP/1.1 request whose head is under {MOST_HEADERS >> 10} KiB")
        request_id = secrets.token_hex(8)
        headers, body = refusal(problem, request_id)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # no reply has begun
            headers += [*own_headers(request_id, ""), (b"connection", b"close")]
            for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
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
