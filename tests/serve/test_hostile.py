"""Hostile input of every kind: one clear message, the service stays up, and others are served meanwhile.

The whole of it is nightly; a part of each kind runs by default.
"""

import io
import json
import pickle
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import httpx
import pytest

from pmclip_deploy.models import DEMO
from tests.patient import PATIENT
from tests.serve.running import TOKEN, Running, running

pytest.importorskip("fastapi", reason="serving needs the extra `ward`")

from tests.imaging.test_budgets import PIXEL_DATA, SMALL, dicom, element, image, j2k, png_of, zlib_raw

LEG = (DEMO / "leg-1.dcm").read_bytes()
FRACTURE = "is there a fracture?"
SERVED_S = 10.0  # of a busy machine; what was measured is printed
PROBLEM = {"type", "title", "status", "detail", "code", "exit_code", "request_id"}
PATH = re.compile(r"(?<![\w<])/\w+/|[A-Z]:\\|\.py\b|\bat 0x")


class Watcher:
    """Somebody else, who asks about a good picture all the time."""

    def __init__(self, service: Running) -> None:
        self.seconds, self.faults, self._ends = list[float](), list[str](), threading.Event()
        self.client, self._thread = service.connect(), threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._ends.is_set():
            begun = time.monotonic()
            try:
                reply = self.client.post("/v1/answers", files={"image": LEG}, data={"questions": [FRACTURE]})
                if reply.status_code != 200 or reply.json()["answers"][0]["answer"] != "yes":
                    self.faults.append(reply.text)
            except httpx.HTTPError as error:
                self.faults.append(repr(error))
            self.seconds.append(time.monotonic() - begun)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ends.set()
        self._thread.join()
        print(f"others: {len(self.seconds)} answers, the longest took {max(self.seconds):.2f} s")
        if error is None:
            assert not self.faults and max(self.seconds) < SERVED_S, (max(self.seconds), self.faults[:3])


@pytest.fixture
def watched(service: Running) -> Iterator[Running]:
    """The service while somebody else uses it."""
    with Watcher(service):
        yield service
    assert service.client.get("/health/ready").status_code == 200


def clear(reply: httpx.Response, name: str) -> None:
    """A refusal is one sentence, which holds nothing of the machine or of a patient; an acceptance is nothing to test here."""
    assert reply.status_code < 500 or reply.status_code in (503, 504, 507), (name, reply.text)
    if reply.status_code >= 400:
        assert reply.headers["content-type"] == "application/problem+json" and set(reply.json()) == PROBLEM, (name, reply.text)
        detail = reply.json()["detail"]
        assert 10 < len(detail) < 300 and detail.isprintable() and "internal" not in detail, (name, detail)
        assert not PATH.search(detail) and "ZQX" not in reply.text.upper() and "class '" not in detail, (name, detail)


# --- files --------------------------------------------------------------------------------------------------------------------


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("leg.dcm", LEG)
    return file.getvalue()


def marked() -> bytes:
    """A radiograph with the markers of a patient."""
    from pydicom import dcmread

    dataset, out = dcmread(io.BytesIO(LEG)), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword, value in PATIENT.items():
            setattr(dataset, keyword, value)
        dataset.save_as(out, enforce_file_format=False)
    return out.getvalue()


MARKED = marked()


def mutated(seed: int) -> bytes:
    """A radiograph with some other bytes, mostly in its header, and sometimes cut."""
    chance, data = random.Random(seed), bytearray(MARKED)
    for _ in range(chance.choice([1, 2, 4, 16, 64])):
        data[chance.randrange(132, chance.choice([2500, len(data)]))] = chance.choice([0, 255, chance.randrange(256)])
    return bytes(data[: chance.randrange(len(data))] if chance.random() < 0.3 else data)


QUICK: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "a byte": lambda: b"\0",
    "HTML": lambda: b"<html><script>alert('ZQX')</script></html>",
    "a pickle": lambda: pickle.dumps({"ZQX": print}),
    "a zip": archive,
    "gzip": lambda: zlib.compress(LEG, wbits=31),
    "a path": lambda: b"../../../../etc/passwd",
    "a JSON document": lambda: json.dumps({"ZQX": [1]}).encode(),
    "a preamble": lambda: bytes(128) + b"DICM",
    "PNG's first bytes": lambda: b"\x89PNG\r\n\x1a\n",
    "JPEG's first bytes": lambda: b"\xff\xd8\xff\xe0",
    "JPEG of zeros": lambda: b"\xff\xd8\xff\xe0" + bytes(1 << 20),
    "a million frames": lambda: dicom(image(frames=10**6) + PIXEL_DATA),
    "a million frames, deflated": lambda: dicom(zlib_raw(image(frames=10**6) + PIXEL_DATA), b"1.2.840.10008.1.2.1.99"),
    "no pixels": lambda: dicom(image(65535)),
    "another transfer syntax": lambda: dicom(image() + PIXEL_DATA, b"1.2.840.10008.1.2.4.9999"),
    "a transfer syntax of text": lambda: dicom(image() + PIXEL_DATA, b"../ZQX\nZQX"),
    "a report": lambda: dicom(element(0x00080016, b"UI", b"1.2.840.10008.5.1.4.1.1.88.11") + element(0x00080060, b"CS", b"SR")),
    "a PNG bomb": lambda: png_of(8192)[:2000],
    "a PNG of another size": lambda: png_of(256)[:16] + struct.pack(">2L", 60000, 60000) + png_of(256)[24:],
    **{f"cut at {size}": lambda size=size: MARKED[:size] for size in (131, 140, 500, 1500, len(MARKED) // 2, len(MARKED) - 1)},  # type: ignore[misc]
    **{f"mutated {seed}": lambda seed=seed: mutated(seed) for seed in range(6)},  # type: ignore[misc]
    **{name: SMALL[name] for name in (
        "palette of empty segments", "lists in Window Center under a megabyte", "a list in the rescale", "sequences in sequences",
        "RLE segments", "RLE segments over one another", "a JPEG 2000 code block a sample", "frames",
    )},
}  # fmt: skip


def ask_all_ways(service: Running, data: bytes, name: str) -> int:
    """A file through each route that reads one. Returns the status of the first."""
    asked, kept = service.ask(data, FRACTURE), service.keep(data)
    replies = [asked, kept, service.client.post("/v1/classify", files={"image": data}, data={"labels": ["ct", "mr"]})]
    if kept.status_code == 201:
        about, here = kept.json(), f"/v1/images/{kept.json()['id']}"
        of_frame = f"{here}/frames/{about['frame']}"
        paths = (of_frame, f"{of_frame}/table", f"{here}/thumbnail", f"{here}/view", f"{here}/view?finding=fracture", f"{here}/patient")
        replies += [service.client.get(path) for path in paths]
        replies.append(service.client.post(f"{here}/report", json={"questions": [FRACTURE]}))
        service.client.delete(here)
    for reply in replies:
        clear(reply, name)
    assert asked.status_code < 400 or asked.json()["detail"].startswith("the upload: "), (name, asked.text)
    assert (asked.status_code < 400) == (kept.status_code < 400), name
    return asked.status_code


def test_files(watched: Running) -> None:
    found = {name: ask_all_ways(watched, make(), name) for name, make in QUICK.items()}
    for name, status in found.items():
        assert status in ((200, 415, 422) if name.startswith("mutated") else (415, 422)), (name, status)


def every_file(shared: Path, folder: Path) -> Iterator[tuple[str, bytes]]:
    yield from ((name, make()) for name, make in SMALL.items())
    faults = shared.parent / "faults"
    if faults.is_dir():
        subprocess.run([sys.executable, faults / "hostile.py", folder], check=True)
    for path in (*(shared / "dicom").rglob("*"), *faults.rglob("*"), *folder.iterdir()):
        if path.is_file():
            yield path.name, path.read_bytes()
    yield from ((f"mutated {seed}", mutated(seed)) for seed in range(6, 200))


@pytest.mark.nightly
def test_every_file_there_is(service: Running, shared: Path, tmp_path: Path) -> None:
    for name, data in every_file(shared, tmp_path):
        print(name, end=": ", flush=True)
        with Watcher(service):  # when the file is made: making some of them takes this process for seconds
            ask_all_ways(service, data, name)
    for name, data in (("PNG", png_of(8192, 16, 2)), ("JPEG 2000", j2k(3, mct=1)), ("beyond the limit", bytes(257 << 20))):
        with Watcher(service):
            clear(service.ask(data, FRACTURE), name)


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
