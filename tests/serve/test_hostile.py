"""Hostile questions, bodies and connections: one clear message, the service stays up, and others are served meanwhile.

The longest are nightly; the rest runs by default.
"""

import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.serve.running import TOKEN, Running, running
from tests.serve.watcher import FRACTURE, LEG, clear

pytest.importorskip("fastapi", reason="serving needs the extra `ward`")

from tests.imaging.test_budgets import dicom, element, image

# --- questions ----------------------------------------------------------------------------------------------------------------

TEXTS = [
    "\0", "is there\0 a fracture?", "\x1b[31mis there a fracture?\x07", "\u202eerutcarf a ereht si", "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>", "'; DROP TABLE answers; --", "{0.__class__.__init__.__globals__}", "%s%n%x", "${jndi:ldap://x/y}",
    "骨折はありますか", "هل يوجد كسر؟", "Есть ли перелом?", "gibt es eine Fraktur?", "e\u0301" * 256, "🦴" * 512, "\u200b" * 512, "a" * 512,
    "is " * 170, "(" * 512, "is there a fracture? " * 20, "\ufeffis there a fracture?",
]  # fmt: skip


def test_questions(watched: Running) -> None:
    here = f"/v1/images/{watched.keep(LEG).json()['id']}"
    for reply in (watched.ask(LEG, *TEXTS), watched.client.post(f"{here}/answers", json={"questions": TEXTS})):
        assert reply.status_code == 200, reply.text
        for text, answer in zip(TEXTS, reply.json()["answers"], strict=True):
            assert answer["abstained"] == (answer["answer"] is None) and answer["question"] == text, answer
            assert answer["abstained"] or text.strip("\ufeff").replace("\0", "") == FRACTURE, answer
    assert watched.client.post(f"{here}/report", json={"questions": TEXTS}).status_code == 200
    for text in TEXTS:
        clear(watched.client.get(f"{here}/view", params={"finding": text}), text)
    clear(watched.client.post("/v1/classify", files={"image": LEG}, data={"labels": TEXTS}), "labels")
    for long in ("ZQX" * 171, "ZQX" * 350_000, "ZQX" * 700_000):
        clear(watched.ask(LEG, long), "long")
        assert watched.client.post(f"{here}/answers", json={"questions": [long]}).status_code in (400, 413)


# --- bodies -------------------------------------------------------------------------------------------------------------------


def part(name: bytes, value: bytes, more: bytes = b"") -> bytes:
    return b"--x\r\nContent-Disposition: form-data; name=" + name + more + b"\r\n\r\n" + value + b"\r\n"


PICTURE, ASKED, END = part(b"image", LEG, b"; filename=ZQX"), part(b"questions", FRACTURE.encode()), b"--x--\r\n"
FORM, TEXT, JSON = "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "application/json"
BODIES: dict[str, tuple[int, str, str, Callable[[], bytes]]] = {  # the status, the type, words of the message, and the body
    "a text for the file": (400, FORM, "send the file itself", lambda: part(b"image", b"ZQX.dcm") + ASKED + END),
    "two files": (400, FORM, "more than one image", lambda: PICTURE + PICTURE + ASKED + END),
    "a field twice": (400, FORM, "more than one frame", lambda: PICTURE + ASKED + part(b"frame", b"0") * 2 + END),
    "a field of another name": (400, FORM, "not known", lambda: PICTURE + ASKED + part(b"ZQX", b"1") + END),
    "a file for the question": (400, FORM, "questions.0", lambda: PICTURE + part(b"questions", b"ZQX", b"; filename=q") + END),
    "no end": (400, FORM, "", lambda: PICTURE[:3000]),
    "no name": (400, FORM, "cannot be parsed", lambda: b"--x\r\nContent-Disposition: form-data\r\n\r\nZQX\r\n--x--\r\n"),
    "another boundary": (400, FORM, "cannot be parsed", lambda: b"--ZQX\r\n\r\n"),
    "no boundary": (400, "multipart/form-data", "cannot be parsed", lambda: PICTURE),
    "a number of 5,000 digits": (400, FORM, "frame", lambda: PICTURE + ASKED + part(b"frame", b"9" * 5000) + END),
    "a window of nothing": (400, FORM, "window_center", lambda: PICTURE + ASKED + part(b"window_center", b"1e999") + END),
    "parts without end": (400, FORM, "cannot be parsed", lambda: ASKED * 200_000),
    "headers without end": (400, FORM, "cannot be parsed", lambda: b"--x\r\n" + b"A: ZQX\r\n" * 500_000),
    "a long header": (400, FORM, "cannot be parsed", lambda: b"--x\r\nA: " + b"ZQX" * 3_000_000),
    "almost a boundary": (400, FORM, "", lambda: part(b"image", b"\r\n--" * 3_000_000, b"; filename=i")),
    "an urlencoded form": (400, TEXT, "send the file itself", lambda: b"image=ZQX&questions=q"),
    "a large urlencoded form": (413, TEXT, "larger than 1 MiB", lambda: b"&" * (8 << 20)),
    "JSON for a form": (400, JSON, "image", lambda: b'{"image": "ZQX"}'),
    "large JSON": (413, JSON, "larger than 1 MiB", lambda: b"[" + b"0," * (8 << 20) + b"0]"),
}
DOCUMENTS: dict[str, tuple[str, bytes]] = {  # to the JSON route: words of the message, and the body
    "nothing": ("", b""),
    "no JSON": ("", b"{"),
    "an array": ("no JSON object", b"[]"),
    "nests": ("", b"[" * 100_000),
    "a number of 10,000 digits": ("", b'{"questions": ["q"], "frame": ' + b"9" * 10_000 + b"}"),
    "infinity": ("window.0", b'{"questions": ["q"], "window": [NaN, 1e999]}'),
    "half a surrogate": ("questions.0", b'{"questions": ["\\ud800 ZQX"]}'),
    "Latin-1": ("", b'{"questions": ["\xff"]}'),
    "a prototype": ("not known", b'{"__proto__": {"ZQX": 1}, "questions": ["q"]}'),
}


def test_bodies(watched: Running) -> None:
    here = f"/v1/images/{watched.keep(LEG).json()['id']}/answers"
    for name, (status, kind, words, make) in BODIES.items():
        reply = watched.client.post("/v1/answers", content=make(), headers={"Content-Type": kind})
        clear(reply, name)
        assert reply.status_code == status and words in reply.json()["detail"], (name, reply.text)
    for name, (words, body) in DOCUMENTS.items():
        reply = watched.client.post(here, content=body, headers={"Content-Type": JSON})
        clear(reply, name)
        assert reply.status_code == 400 and words in reply.json()["detail"], (name, reply.text)
    said = watched.client.post(here, content=b'{"questions": ["q"]}', headers={"Content-Type": TEXT})  # as `curl -d` sends it
    assert said.status_code == 400 and "Content-Type: application/json" in said.json()["detail"]


# --- connections --------------------------------------------------------------------------------------------------------------

OURS = f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n".encode()
GET, POST = b"GET /v1/model HTTP/1.1\r\n" + OURS, b"POST /v1/answers HTTP/1.1\r\n" + OURS + f"Content-Type: {FORM}\r\n".encode()
REQUESTS: dict[str, tuple[int, bytes]] = {
    "bytes": (400, bytes(range(256)) * 4),
    "TLS": (400, bytes.fromhex("16030100a5010000a10303") + bytes(200)),
    "HTTP/2": (403, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "no Host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "two Hosts": (400, b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n"),
    "another Host": (403, b"GET / HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n"),
    "a header of a megabyte": (400, GET + b"X: " + b"a" * (1 << 20) + b"\r\n\r\n"),
    "100,000 headers": (400, GET + b"a: b\r\n" * 100_000 + b"\r\n"),
    "a path of a megabyte": (400, b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\n" + OURS + b"\r\n"),
    "a path that climbs": (404, b"GET /page/../../settings.py HTTP/1.1\r\n" + OURS + b"\r\n"),
    "a path that climbs in code": (404, b"GET /page/%2e%2e%2f%2e%2e%2fsettings.py HTTP/1.1\r\n" + OURS + b"\r\n"),
    "a path with NUL": (404, b"GET /page/app.js%00 HTTP/1.1\r\n" + OURS + b"\r\n"),
    "a path of a folder": (404, b"GET /page/ HTTP/1.1\r\n" + OURS + b"\r\n"),
    "an address of another host": (404, b"GET http://evil/v1/model HTTP/1.1\r\n" + OURS + b"\r\n"),
    "a proxy's method": (404, b"CONNECT evil:80 HTTP/1.1\r\n" + OURS + b"\r\n"),
    "a method of its own": (405, b"ZQX /v1/model HTTP/1.1\r\n" + OURS + b"\r\n"),
    "a range that is none": (200, b"GET /page/app.js HTTP/1.1\r\n" + OURS + b"Range: bytes=7-3\r\n\r\n"),
    "a length of letters": (400, POST + b"Content-Length: abc\r\n\r\nxx"),
    "a length below 0": (400, POST + b"Content-Length: -1\r\n\r\nxx"),
    "two lengths": (400, POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nxxx"),
    "a length beyond all": (413, POST + b"Content-Length: 99999999999999999999\r\n\r\nxxx"),
    "a length of 5,000 digits": (400, POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nxxx"),
    "a length and chunks": (400, POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n"),
    "chunks of no size": (400, POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nxx\r\n"),
    "another coding": (400, POST + b"Transfer-Encoding: gzip\r\n\r\nxxx"),
    "Expect without a token": (401, POST.replace(TOKEN.encode(), b"ZQX") + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n"),
    "an upgrade": (200, GET.replace(b"close", b"upgrade, close") + b"Upgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n"),
}  # fmt: skip


def opened(service: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(service.url).port), timeout=30)


def sent(service: Running, data: bytes) -> bytes:
    """All that comes back until the service closes the connection."""
    with opened(service) as connection:
        came = b""
        with suppress(OSError):  # it was refused before its end
            connection.sendall(data)
        with suppress(ConnectionResetError):  # of what was sent too much
            while more := connection.recv(1 << 16):
                came += more
        return came


def test_requests(watched: Running) -> None:
    for name, (status, data) in REQUESTS.items():
        head, _, body = sent(watched, data).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), (name, head, body)
        assert b"cache-control: no-store" in head.lower() and b"x-request-id" in head.lower(), (name, head)
        headers = httpx.Headers([tuple(line.split(": ", 1)) for line in head.decode().split("\r\n")[1:]])
        clear(httpx.Response(status, headers=headers, content=body[: int(headers["content-length"])]), name)
    many = sent(watched, b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n" * 29 + GET + b"\r\n")
    assert many.count(b'{"status":"ok"}') == 29 and b'"pmclip-deploy/model/1"' in many


def test_slow_clients(watched: Running) -> None:
    """More connections than the service keeps, that send half a head; and many that send half a body."""
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(opened(watched)).sendall(POST + b"Content-Length: 1000\r\n\r\n" + PICTURE[:100])
        for _ in range(520):
            stack.enter_context(opened(watched)).sendall(b"GET / HTTP/1.1\r\nHost: loc")
        for _ in range(3):
            with watched.connect() as another:
                assert another.get("/health/live").status_code == 200
                assert another.post("/v1/answers", files={"image": LEG}, data={"questions": [FRACTURE]}).status_code == 200


@pytest.mark.nightly
def test_connections_on_which_nothing_moves_are_ended(watched: Running) -> None:
    """Half a head, half a second head, and a large reply that is not taken."""
    large = dicom(image(4096) + element(0x7FE00010, b"OW", b"")[:8] + struct.pack("<L", 1 << 25)) + bytes(1 << 25)
    here = f"/v1/images/{watched.keep(large).json()['id']}/frames/0"
    alive = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    taken = f"GET {here} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
    with ExitStack() as stack:
        waiting = [stack.enter_context(opened(watched)) for _ in range(3)]
        for connection, data in zip(waiting, (b"GET /", alive + b"GET /", taken), strict=True):
            connection.sendall(data)
        time.sleep(13)
        for connection in waiting:
            with pytest.raises(OSError):  # reset, or a broken pipe
                for _ in range(200):
                    connection.sendall(b"x")
                    time.sleep(0.01)


@pytest.mark.nightly
def test_uploads_that_fill_the_memory_are_refused(tmp_path: Path) -> None:
    head = POST + b"Content-Length: 1000000\r\n\r\n" + part(b"image", b"", b"; filename=i")[:-2]
    with running(tmp_path, "--max-upload-mb", "1") as service, ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(opened(service)).sendall(head + bytes(950_000))
        time.sleep(0.5)  # until they are read
        reply = service.ask(LEG + bytes(500_000), FRACTURE)
        assert reply.status_code == 503 and reply.headers["retry-after"] == "1" and "fill the memory" in reply.json()["detail"]
        assert service.ask(LEG, FRACTURE).status_code == 200
        stack.close()
        until = time.monotonic() + 10
        while service.ask(LEG + bytes(500_000), FRACTURE).status_code != 200:
            assert time.monotonic() < until
