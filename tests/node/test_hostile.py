"""What a broken or hostile peer sends: the node goes on, keeps its memory, and serves the others."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

for needed in ("pynetdicom", "highdicom", "starlette", "yaml"):
    pytest.importorskip(needed, reason="needs the extra `ward`")

from pydicom import Dataset

from tests.node.running import Node, asked, listening, sent, slices


def recorded(node: Node) -> bytes:
    """What a sender of one image writes, from its A-ASSOCIATE-RQ to its A-RELEASE-RQ."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        heard, port = bytearray(), listener.getsockname()[1]

        def relay() -> None:
            client, _ = listener.accept()
            with client, socket.create_connection(("127.0.0.1", node.port)) as server:
                back = threading.Thread(target=copy, args=(server, client, bytearray()))
                back.start()
                copy(client, server, heard)
                back.join()

        relaying = threading.Thread(target=relay)
        relaying.start()
        assert sent(port, slices(1)) == [0]
        relaying.join()
        return bytes(heard)


def copy(source: socket.socket, sink: socket.socket, heard: bytearray) -> None:
    try:
        while data := source.recv(1 << 16):
            heard += data
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def mutations(stream: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Bits turned, lengths and types overwritten, parts cut out, doubled, or made up; most of them near the beginning of a PDU."""
    chance, starts = random.Random(seed), pdus(stream)
    for _ in range(count):
        data = bytearray(stream)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = min(chance.choice(starts) + int(chance.expovariate(1 / 40)), len(data) - 1)
            match chance.randrange(5):
                case 0:
                    data[at] ^= 1 << chance.randrange(8)
                case 1:
                    data[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1"))
                case 2:
                    del data[at : at + chance.choice((1, 2, 6, 500))]
                case 3:
                    data[at:at] = data[at : at + chance.choice((1, 6, 70, 5000))]
                case 4:
                    data[at : at + 8] = chance.randbytes(8)
        yield bytes(data[: chance.randrange(len(data))] if chance.random() < 0.2 else data)


def pdus(stream: bytes) -> list[int]:
    starts, at = list[int](), 0
    while at + 6 <= len(stream):
        starts.append(at)
        at += 6 + int.from_bytes(stream[at + 2 : at + 6], "big")
    return starts


def thrown(port: int, data: bytes) -> None:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as peer:
            peer.settimeout(0.2)
            peer.sendall(data)
            while peer.recv(1 << 16):
                pass
    except OSError:
        pass


def resident(node: Node) -> int:
    """KiB"""
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def attacked(folder: Path, count: int) -> None:
    options = {"node": {"port": "0", "max_associations": "100"}, "complete": {"quiet_s": "1h"}, "metrics": {"port": "0"}}
    with listening(folder, **options) as node:
        stream, waits, memory, ended = recorded(node), list[float](), list[int](), threading.Event()
        attacks = mutations(stream, 1, count)
        lock = threading.Lock()

        def attack() -> None:
            while True:
                with lock:
                    data = next(attacks, None)
                if data is None:
                    return
                thrown(node.port, data)

        attackers = [threading.Thread(target=attack) for _ in range(4)]
        for attacker in attackers:
            attacker.start()
        while any(attacker.is_alive() for attacker in attackers):
            begun = time.monotonic()
            assert sent(node.port, slices(1)) == [0]
            waits.append(time.monotonic() - begun)
            memory.append(resident(node))
            ended.wait(0.3)
        assert node.process.poll() is None and not node.events("error")
        early = memory[len(memory) // 10]  # its threads are there by then
        print(f"{count} streams; {len(waits)} images of others served, at most {max(waits):.2f} s; {early} to {memory[-1]} KiB")
        assert max(waits) < 10 and (count < 1000 or memory[-1] < 1.05 * early)
        port = node.events("metrics")[0]["port"]
        node.until(lambda: "\npmclip_dicom_associations 0.0\n" in asked(port, "metrics")[1])  # none keeps its place
        shown = node.queue("show").stdout
        assert "matched" in shown and not list((folder / "state" / "incoming").glob("*.dcm"))[4:]


def test_mutated_streams(tmp_path: Path) -> None:
    attacked(tmp_path, 40)


@pytest.mark.nightly
def test_many_mutated_streams(tmp_path: Path) -> None:
    attacked(tmp_path, 20_000)


def mutated_sets(seed: int, count: int) -> Iterator[bytes]:
    file = BytesIO()
    slices(1)[0].save_as(file)
    data = file.getvalue()[144 + int.from_bytes(file.getvalue()[140:144], "little") :]
    chance = random.Random(seed)
    for _ in range(count):
        made = bytearray(data)
        for _ in range(chance.choice((1, 2, 5))):
            at = chance.randrange(min(len(made), 1600))
            made[at : at + 4] = chance.choice((chance.randbytes(4), b"\xff\xff\xff\xff", b"SQ\0\0", b"UN\0\0", b"\0\0\0\0"))
        yield bytes(made)


def stored(port: int, data_sets: Iterator[bytes], image: Dataset | None = None) -> list[int]:
    """The status that each data set got, sent as what ``image`` is, by default a CT image."""
    from pynetdicom import AE
    from pynetdicom.dimse_primitives import C_STORE

    image = image or slices(1)[0]
    statuses, association = list[int](), None
    for data in data_sets:
        if association is None or not association.is_established:
            entity = AE("SENDER")
            entity.add_requested_context(image.SOPClassUID, image.file_meta.TransferSyntaxUID)
            association = entity.associate("127.0.0.1", port, ae_title="PMCLIP")
        request = C_STORE()
        request.MessageID, request.Priority, request.DataSet = 1, 2, BytesIO(data)
        request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
        association._reactor_checkpoint.clear()
        association.dimse.send_msg(request, association.accepted_contexts[0].context_id)
        _, reply = association.dimse.get_msg(block=True)
        association._reactor_checkpoint.set()
        statuses.append(reply.Status)
    if association is not None:
        association.release()
    return statuses


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.nightly)])
def test_mutated_data_sets(tmp_path: Path, count: int) -> None:
    with listening(tmp_path) as node:
        statuses = stored(node.port, mutated_sets(2, count))
        assert len(statuses) == count and set(statuses) <= {0, 0xA900, 0xC000} and len(set(statuses)) > 1
        assert sent(node.port, slices(1)) == [0]
        node.until(node.reports)
        assert not node.events("error")
        assert not [line for line in node.lines[1:] if not line.startswith("{") and "Listening" not in line]  # nobody else's words
