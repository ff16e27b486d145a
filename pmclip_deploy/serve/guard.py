"""What stands in front of every route: who may ask, how much, how long, and what every reply says."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from pmclip_deploy.serve.problems import MEDIA_TYPE, Problem, busy, document, of_error
from pmclip_deploy.serve.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Headers = list[tuple[bytes, bytes]]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOG = logging.getLogger("pmclip_deploy.serve")
OPEN = ("/", "/health/live", "/docs")  # without a token, as is all below /page/
POLICY = "default-src 'self'; frame-ancestors 'none'; object-src 'none'; base-uri 'none'; form-action 'self'"
POLICIES = {"/docs": f"{POLICY}; img-src 'self' data:; style-src 'self' 'unsafe-inline'"}  # Swagger UI draws its icons so
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
WORK = "/v1/"  # POST below it takes a place in the queue
MOST_TEXT = 1 << 20  # bytes of a body that is no form with a file: 32 questions in JSON take a fifth
MOST_HELD = 4  # largest uploads, of whose bytes all requests together may hold as many


class Places:
    """How many pictures are accepted and not answered yet, and the bytes of their requests."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.taken, self.is_closing = most, 0, False
        self.most_bytes, self.bytes = most_bytes, 0

    def __enter__(self) -> None:
        if self.is_closing:
            raise busy("the service is ending")
        if self.taken >= self.most:
            raise busy()
        self.taken += 1

    def __exit__(self, *error: object) -> None:
        self.taken -= 1


class Guard:
    """ASGI middleware, the outermost."""

    def __init__(self, app: App, settings: Settings, places: Places, seen: Callable[[str, int, float], None]) -> None:
        """``seen`` is told the route, the status and the seconds of each reply."""
        self.app, self.settings, self.places, self.seen = app, settings, places, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # The page's files are sent whole: Starlette refuses a wrong Range in words of its own.
        scope = {**scope, "headers": [header for header in scope["headers"] if header[0] != b"range"]}
        reply = _Reply(send, scope["path"])
        body = _Body(receive, self.settings, self.places)
        try:
            self._admit(scope)
            body.check(_headers(scope))
            if scope["method"] == "POST" and scope["path"].startswith(WORK):
                with self.places:
                    await self.app(scope, body, reply)
            else:
                await self.app(scope, body, reply)
        except Exception as error:
            if not reply.has_begun:
                await reply.refuse(of_error(error))
        finally:
            self.places.bytes -= body.read
            self._note(scope, reply)

    def _admit(self, scope: Scope) -> None:
        headers, settings = _headers(scope), self.settings
        host = headers.get("host", "")
        if _name(host) not in settings.hosts:  # a page of another site reaches 127.0.0.1 by DNS rebinding
            raise Problem(403, "host", "the Host header names no host of this service; add it with --allow-host")
        origin = headers.get("origin")
        if origin is not None and origin.lower() != f"{scope['scheme']}://{host}".lower():
            raise Problem(403, "origin", "the Origin header is of another site")
        if scope["path"] in OPEN or scope["path"].startswith("/page/"):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(token.strip().encode(), settings.token.encode()):
            raise Problem(401, "token", "send the token as `Authorization: Bearer TOKEN`", WWW_Authenticate="Bearer")

    def _note(self, scope: Scope, reply: "_Reply") -> None:
        route = getattr(scope.get("route"), "path", "other")  # the template: a path may hold what a client likes
        seconds = time.perf_counter() - reply.start
        self.seen(route, reply.status, seconds)
        LOG.info("request", extra={"facts": {"route": route, "status": reply.status, "ms": round(1e3 * seconds), "id": reply.id}})


class _Reply:
    """``send``, with the headers that every reply has."""

    def __init__(self, send: Send, path: str) -> None:
        self._send, self._path = send, path
        self.id, self.start, self.status, self.has_begun = secrets.token_hex(8), time.perf_counter(), 0, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun, self.status = True, message["status"]
            message["headers"] = [*message.get("headers", ()), *own_headers(self.id, self._path)]
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        headers, body = refusal(problem, self.id)
        await self({"type": "http.response.start", "status": problem.status_code, "headers": headers})
        await self({"type": "http.response.body", "body": body})


class _Body:
    """``receive``, which ends at the limits of size and time."""

    def __init__(self, receive: Receive, settings: Settings, places: Places) -> None:
        self._receive, self._settings, self._places = receive, settings, places
        self.read, self._most, self._done = 0, MOST_TEXT, False
        self._until = time.monotonic() + settings.timeout_s

    def check(self, headers: dict[str, str]) -> None:
        """Takes the limit from the headers. Raises a Problem if they already say that the body is over it."""
        if headers.get("content-type", "").lower().startswith("multipart/form-data"):
            self._most = self._settings.max_upload
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._most:
            raise self._too_large()

    async def __call__(self) -> Message:
        if self._done:  # whoever asks now waits for the client to leave
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._until - time.monotonic())
        except TimeoutError:
            raise Problem(408, "slow", f"the request's body took more than {self._settings.timeout_s:g} s") from None
        count = len(message.get("body", b""))
        self.read += count
        self._places.bytes += count
        self._done = not message.get("more_body", False)
        if self.read > self._most:
            raise self._too_large()
        if self._places.bytes > self._places.most_bytes:
            raise busy("other requests fill the memory")
        return message

    def _too_large(self) -> Problem:
        return Problem(413, "too_large", f"the request is larger than {self._most >> 20} MiB")


def own_headers(request_id: str, path: str) -> Headers:
    """What every reply has."""
    return _raw({**HEADERS, "X-Request-Id": request_id, "Content-Security-Policy": POLICIES.get(path, POLICY)})


def refusal(problem: Problem, request_id: str) -> tuple[Headers, bytes]:
    """The headers and the body of a refusal, without those that every reply has."""
    body = json.dumps(document(problem, request_id)).encode()
    return _raw({"Content-Type": MEDIA_TYPE, "Content-Length": str(len(body)), **(problem.headers or {})}), body


def _raw(headers: Mapping[str, str]) -> Headers:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _name(host: str) -> str:
    """Of a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
