"""What a destination may do to a delivery: each try ends in a bounded time, with a state and a reason, and never turns into a loop."""

import json
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import create_connection, socket
from typing import Any

import pytest

for needed in ("pynetdicom", "highdicom", "starlette", "yaml"):
    pytest.importorskip(needed, reason="needs the extra `ward`")

from pydicom import dcmread
from pynetdicom import AE, evt

from pmclip_deploy.node import archive, send, web
from pmclip_deploy.node.archive import CLASSES
from pmclip_deploy.report.document import SR_CLASSES
from tests.certificates import certificates
from tests.node.running import listening, sent, slices
from tests.node.sending import Peer, Sending, relay, sending

IN_TIME = "no answer in time"


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # pynetdicom's threads die of garbage


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time-outs of seconds in place of minutes."""
    monkeypatch.setattr(archive, "CONNECT_S", 0.3)
    monkeypatch.setattr(archive, "ANSWER_S", 0.6)
    monkeypatch.setattr(web, "CONNECT_S", 0.3)
    monkeypatch.setattr(web, "ANSWER_S", 0.6)
    monkeypatch.setattr(send, "DELIVERY_S", 1.0)


def at(folder: Path, peer: Any, **options: Any) -> Sending:
    return sending(folder, f"dicom:PACS@127.0.0.1:{peer.port}", **options)


class Archive:
    """A storage SCP of pynetdicom that answers with ``status``."""

    def __init__(self, *classes: str, port: int = 0, require: bool = False) -> None:
        self.stored, self.status = list[Any](), 0
        entity = AE("PACS")
        entity.require_called_aet = require
        for name in classes or SR_CLASSES:
            entity.add_supported_context(CLASSES[name])
        self.server: Any = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)])
        self.port = int(self.server.server_address[1])

    def _store(self, event: Any) -> int:
        self.stored.append(event.dataset)
        return self.status

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()


def test_an_archive_that_is_away_comes_back(tmp_path: Path) -> None:
    with Archive() as gone:
        port = gone.port
    one = sending(tmp_path, f"dicom:PACS@127.0.0.1:{port}")
    for tries in (1, 2, 3):
        one.ledger._db.execute("UPDATE delivery SET due = 0")
        assert one.step()[:2] == ("waiting", "no association") and 0.9 < one.wait / (10 * 2 ** (tries - 1)) <= 1
    with Archive(port=port) as back:
        assert not one.sender.step()  # not before its time
        assert one.again()[:2] == ("done", "") and len(back.stored) == 1 and one.ledger.counts()["job"] == {"done": 1}
    assert not one.sender.step() and [event for event, _ in one.log] == ["postponed"] * 3 + ["sent"]


def test_an_archive_that_does_not_know_us_is_asked_again_until_it_is_given_up(tmp_path: Path) -> None:
    with Archive(require=True) as strict:
        one = sending(tmp_path, f"dicom:OTHER@127.0.0.1:{strict.port}")
        assert one.step()[:2] == ("waiting", "rejected: called AE title not recognized")
        one.ledger._db.execute("UPDATE delivery SET due = 0, since = 0")
        assert one.step()[:2] == ("given_up", "rejected: called AE title not recognized") and not one.sender.step()


def test_the_next_class_is_sent_and_none_is_no_loop(tmp_path: Path) -> None:
    with Archive("enhanced") as only:
        one = at(tmp_path, only, sr_classes=["comprehensive3d", "enhanced"])
        assert one.step()[:2] == ("done", "") and only.stored[0].SOPClassUID == SR_CLASSES["enhanced"]
        (tmp_path / "b").mkdir()
        two = at(tmp_path / "b", only, sr_classes=["comprehensive3d", "comprehensive"], sc="allowed")
        assert two.step()[:2] == ("refused", "the peer accepts no class that is offered") and not two.sender.step()


def test_a_page_goes_to_an_archive_that_takes_no_report(tmp_path: Path) -> None:
    with Archive("sc") as only:
        assert at(tmp_path, only, sc="allowed").step()[:2] == ("done", "") and only.stored[0].SOPClassUID == CLASSES["sc"]
    (tmp_path / "b").mkdir()
    one = sending(tmp_path / "b", "dicom:PACS@127.0.0.1:1", sr_classes=["enhanced"])
    one.ledger._db.execute("UPDATE job SET report = '{}'")
    assert one.step()[:2] == ("refused", "no report was made in a class of sr_classes, which ward.yaml has changed")


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        (0xA700, "waiting", "C-STORE: out of resources, A700"),
        (0x0110, "refused", "C-STORE: status 0110"),
        (0xA900, "refused", "C-STORE: status A900"),
        (0x0122, "refused", "the peer accepts no class that is offered"),
        (0xB000, "done", "stored with warning B000"),
    ],
)
def test_what_a_status_means(tmp_path: Path, status: int, state: str, reason: str) -> None:
    with Archive() as peer:
        peer.status = status
        assert at(tmp_path, peer).step()[:2] == (state, reason)


def says(data: bytes) -> Callable[[Peer, socket], None]:
    def behave(peer: Peer, connection: socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(data)
        peer.hang()

    return behave


def trickles(data: bytes) -> Callable[[Peer, socket], None]:
    def behave(peer: Peer, connection: socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(data)
        peer.trickle(connection)

    return behave


SILENT = {
    "says nothing": says(b""),
    "says a part of a PDU": says(b"\2\0\0\0"),
    "says the head of a long PDU": says(b"\2\0\0\0\xff\xff"),
    "sends a PDU without an end": trickles(b"\2\0\xff\xff\xff\xff"),
    "says garbage": says(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "says garbage without an end": trickles(b"\xff" * 20),
    "says an empty A-ASSOCIATE-AC": says(b"\2\0\0\0\0\0"),
    "answers with P-DATA": says(b"\4\0\0\0\0\x0a\0\0\0\6\1\3abcd"),
    "releases at once": says(b"\5\0\0\0\0\4\0\0\0\0"),
    "closes": lambda peer, connection: connection.close(),
    "resets": lambda peer, connection: peer.reset(connection),
}


@pytest.mark.parametrize("behave", SILENT.values(), ids=SILENT.keys())
def test_instead_of_an_association(tmp_path: Path, behave: Any, short: None) -> None:
    with Peer(behave) as peer:
        state, reason, took = at(tmp_path, peer).step()
        assert state == "waiting" and reason in ("no association", IN_TIME) and took < 3


AFTER = {
    "hangs": lambda peer, connection: peer.hang(),
    "resets": lambda peer, connection: peer.reset(connection),
    "closes": lambda peer, connection: connection.close(),
    "says garbage": lambda peer, connection: connection.sendall(b"\xff" * 100) or peer.hang(),
    "sends a PDU without an end": lambda peer, connection: connection.sendall(b"\4\0\0\xff\xff\xff") or peer.trickle(connection),
    "aborts": lambda peer, connection: connection.sendall(b"\7\0\0\0\0\4\0\0\0\0") or peer.hang(),
}


@pytest.mark.parametrize("behave", AFTER.values(), ids=AFTER.keys())
@pytest.mark.parametrize("part", [30, pytest.param(0, marks=pytest.mark.nightly)])
def test_in_the_middle_of_c_store(tmp_path: Path, behave: Any, part: int, short: None) -> None:
    """A real archive's words go through, up to its A-ASSOCIATE-AC or so many bytes of its answer to C-STORE. Then its connection fails."""
    with Archive() as real:

        def relayed(peer: Peer, connection: socket) -> None:
            relay(real.port, connection, lambda connection: behave(peer, connection), 1, part)

        with Peer(relayed) as peer:
            state, reason, took = at(tmp_path, peer).step()
            assert state == "waiting" and took < 3
            assert reason in ("no answer to C-STORE", "the association ended before C-STORE", IN_TIME)


def test_a_peer_that_reads_nothing(tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than fits into the buffers of a connection. Only the delivery's own clock can end it."""
    monkeypatch.setattr(archive, "ANSWER_S", 30.0)
    with Archive() as real, Peer(lambda peer, connection: relay(real.port, connection, lambda _: peer.hang(), 1, reads=1)) as peer:
        one = at(tmp_path, peer)
        file = next((tmp_path / "reports").glob("*.comprehensive3d.dcm"))
        large = dcmread(file)
        large.add_new(0x00420011, "OB", bytes(32 << 20))
        large.save_as(file)
        state, reason, took = one.step()
        assert (state, reason) == ("waiting", IN_TIME) and took < 3


def test_a_delivery_is_done_if_the_archive_hangs_after_its_answer(tmp_path: Path, short: None) -> None:
    with Archive() as real:

        def relayed(peer: Peer, connection: socket) -> None:
            relay(real.port, connection, lambda connection: peer.trickle(connection, b"\4"), 2)

        with Peer(relayed) as peer:
            state, reason, took = at(tmp_path, peer).step()
            assert (state, reason) == ("done", "") and took < 3 and len(real.stored) == 1


DCMTK = {
    "--refuse": ("waiting", "rejected: no reason given"),
    "--abort-during": ("waiting", "no answer to C-STORE"),
    "--abort-after": ("waiting", "no answer to C-STORE"),
    "--sleep-during": ("waiting", "no answer to C-STORE"),
    "--ignore": ("done", ""),
}


@pytest.mark.parametrize(("option", "state", "reason"), [(option, *found) for option, found in DCMTK.items()], ids=DCMTK.keys())
def test_dcmtk(tmp_path: Path, option: str, state: str, reason: str, short: None) -> None:
    if shutil.which("storescp") is None:
        pytest.skip("storescp is not installed; Debian has it in dcmtk")
    with socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = int(bound.getsockname()[1])
    command = ["storescp", "--output-directory", tmp_path, option, *(["60"] if option.startswith("--sleep") else []), str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            one = sending(tmp_path, f"dicom:PACS@127.0.0.1:{port}")
            found = one.step()
            while found[1] == "no association":  # it does not listen yet
                time.sleep(0.05)
                found = one.again()
            assert found[:2] == (state, reason)
        finally:
            process.kill()


# Web archives.

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/dicom+json\r\n"


def http(data: bytes, then: Any = None) -> Callable[[Peer, socket], None]:
    def behave(peer: Peer, connection: socket) -> None:
        while not peer.heard.endswith(b"-report--\r\n"):
            peer.heard += connection.recv(1 << 16)
        connection.sendall(data)
        if then is not None:
            then(peer, connection)

    return behave


def failed(reason: int) -> bytes:
    body = json.dumps({"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [reason]}}]}}).encode()
    return b"Content-Length: %d\r\n\r\n" % len(body) + body


ANSWERS: dict[str, tuple[Any, str, str]] = {
    "stores": (http(OK + b"\r\n"), "done", ""),
    "warns": (http(b"HTTP/1.1 202 Accepted\r\n\r\n"), "done", "stored with warnings"),
    "does not store": (http(OK + failed(0x0110)), "refused", "STOW-RS: status 200, failure 0110"),
    "conflicts": (http(b"HTTP/1.1 409 Conflict\r\n\r\n"), "refused", "STOW-RS: status 409"),
    "conflicts, being full": (http(b"HTTP/1.1 409 Conflict\r\n" + failed(0xA700)), "waiting", "STOW-RS: status 409, failure A700"),
    "wants another token": (http(b"HTTP/1.1 401 Unauthorized\r\n\r\n"), "waiting", "STOW-RS: status 401"),
    "is elsewhere": (
        http(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n"),
        "refused",
        "STOW-RS: status 302, a redirect: give the address that it leads to",
    ),
    "answers at great length": (http(OK + b"\r\n", lambda peer, c: [c.sendall(b"[" * (1 << 20)) for _ in range(2000)]), "done", ""),
    "answers without an end": (http(OK + b"\r\n", lambda peer, c: peer.trickle(c)), "done", ""),
    "hangs": (http(b"", lambda peer, c: peer.hang()), "waiting", IN_TIME),
    "does not read": (lambda peer, c: peer.hang(), "waiting", IN_TIME),
    "sends a head without an end": (http(OK, lambda peer, c: peer.trickle(c, b"X: y\r\n")), "done", ""),
    "sends a line without an end": (http(b"HTTP/1.1 2", lambda peer, c: peer.trickle(c, b"0")), "waiting", IN_TIME),
    "says continue without an end": (
        http(b"", lambda peer, c: peer.trickle(c, b"HTTP/1.1 100 Continue\r\n\r\n")),
        "waiting",
        IN_TIME,
    ),
    "says garbage": (http(b"\0\xff\r\n\r\n"), "waiting", "no answer that is HTTP"),
    "closes": (http(b""), "waiting", "no answer that is HTTP"),
    "resets": (http(b"", lambda peer, c: peer.reset(c)), "waiting", "Connection reset by peer"),
}


@pytest.mark.parametrize(("behave", "state", "reason"), ANSWERS.values(), ids=ANSWERS.keys())
def test_a_web_archive(tmp_path: Path, behave: Any, state: str, reason: str, short: None) -> None:
    with Peer(behave) as peer:
        found = sending(tmp_path, f"stow:http://127.0.0.1:{peer.port}/studies?x=1").step()
        assert found[:2] == (state, reason) and found[2] < 3
        assert not peer.heard or peer.heard.startswith(b"POST /studies?x=1 HTTP/1.1\r\n")


def over_tls(folder: Path, behave: Any) -> Callable[[Peer, socket], None]:
    certificates(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")

    def wrapped(peer: Peer, connection: socket) -> None:
        with context.wrap_socket(connection, server_side=True) as inside:
            behave(peer, inside)

    return wrapped


def test_a_web_archive_over_tls(tmp_path: Path) -> None:
    with Peer(over_tls(tmp_path, ANSWERS["stores"][0])) as peer:
        one = sending(tmp_path, f"stow:https://localhost:{peer.port}/studies", ca=str(tmp_path / "ca.pem"))
        assert one.step()[:2] == ("done", "") and peer.heard.startswith(b"POST /studies HTTP/1.1\r\n")
        (tmp_path / "b").mkdir()
        state, reason, _ = sending(tmp_path / "b", f"stow:https://localhost:{peer.port}/studies").step()
        assert state == "waiting" and "CERTIFICATE_VERIFY_FAILED" in reason


@pytest.mark.parametrize("to", ["stow:https://localhost:{}/studies", "dicom:PACS@localhost:{}"])
def test_bytes_without_an_end_over_tls(tmp_path: Path, to: str, short: None) -> None:
    behave = ANSWERS["sends a line without an end"][0] if to.startswith("stow") else SILENT["sends a PDU without an end"]
    with Peer(over_tls(tmp_path, behave)) as peer:
        tls = {} if to.startswith("stow") else {"tls": "true"}
        state, reason, took = sending(tmp_path, to.format(peer.port), ca=str(tmp_path / "ca.pem"), **tls).step()
        assert (state, reason) == ("waiting", IN_TIME) and took < 3


@pytest.mark.parametrize(("said", "wait"), [(b"30", 30), (b"86400", 900), (b"soon", 10), (b"1" * 500, 900)])
def test_a_web_archive_says_when(tmp_path: Path, said: bytes, wait: float) -> None:
    with Peer(http(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: " + said + b"\r\n\r\n")) as peer:
        one = sending(tmp_path, f"stow:http://127.0.0.1:{peer.port}/studies")
        assert one.step()[:2] == ("waiting", "STOW-RS: status 503") and 0 < wait - one.wait < 2


def test_a_stop_cuts_off_what_is_being_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((archive, "CONNECT_S"), (archive, "ANSWER_S"), (web, "ANSWER_S"), (send, "DELIVERY_S")):
        monkeypatch.setattr(module, name, 60.0)
    with Peer(SILENT["says the head of a long PDU"]) as slow, Peer(ANSWERS["hangs"][0]) as other:
        (tmp_path / "web").mkdir()
        both = [at(tmp_path, slow), sending(tmp_path / "web", f"stow:http://127.0.0.1:{other.port}/studies")]
        steps = [threading.Thread(target=one.sender.step, daemon=True) for one in both]
        for step in steps:
            step.start()
        time.sleep(0.3)
        assert all(step.is_alive() for step in steps)
        for one in both:
            one.sender.close()
        for one, step in zip(both, steps, strict=True):
            step.join(2)
            assert not step.is_alive() and one.ledger.rows()[0]["refused"] == "the node stopped"


@pytest.mark.nightly  # the node gives its threads 10 s
def test_a_node_stops_whatever_its_peers_do(tmp_path: Path) -> None:
    """A destination hangs, and a sender has sent the beginning of a PDU."""
    with Peer(SILENT["says nothing"]) as peer:
        to = {"to": f"dicom:PACS@127.0.0.1:{peer.port}", "i_understand_this_is_research": "true"}
        with listening(tmp_path, send=[to, {"to": "folder:reports"}]) as node, create_connection(("127.0.0.1", node.port)) as half:
            half.sendall(b"\1\0\0")
            assert sent(node.port, slices(1)) == [0]
            node.until(lambda: node.events("sent"))  # to the folder
            node.process.terminate()
            assert node.process.wait(40) == 0
            assert node.events("postponed")[0]["reason"] == "the node stopped" and node.events("stopped")


@pytest.mark.nightly
def test_the_time_outs_as_they_are(tmp_path: Path) -> None:
    """At most 180 s, and a margin for a busy machine."""
    (tmp_path / "web").mkdir()
    (tmp_path / "silent").mkdir()
    with Peer(SILENT["sends a PDU without an end"]) as slow, Peer(ANSWERS["sends a line without an end"][0]) as web_archive:
        tries = [at(tmp_path, slow), sending(tmp_path / "web", f"stow:http://127.0.0.1:{web_archive.port}/studies")]
        with Peer(SILENT["says nothing"]) as silent:
            tries.append(at(tmp_path / "silent", silent))
            with ThreadPoolExecutor() as pool:
                found = [step.result(300) for step in [pool.submit(one.step) for one in tries]]
    assert [one[:2] for one in found] == [("waiting", IN_TIME), ("waiting", IN_TIME), ("waiting", "no association")]
    assert 29 < found[2][2] < 60 and all(took < 190 for _, _, took in found)
