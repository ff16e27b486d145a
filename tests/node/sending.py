"""A sender with one report to deliver, without a node around it."""

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from socket import SO_LINGER, SOL_SOCKET, create_connection, create_server, socket
from typing import Any

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from pmclip_deploy.node.archive import CLASSES
from pmclip_deploy.node.audit import Trail
from pmclip_deploy.node.ledger import Arrival, Ledger
from pmclip_deploy.node.send import Sender
from pmclip_deploy.node.settings import Ward
from pmclip_deploy.node.work import report_file


@dataclass
class Sending:
    """``step`` tries the delivery once; ``log`` keeps what was logged."""

    sender: Sender
    ledger: Ledger
    log: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def step(self) -> tuple[str, str, float]:
        """(the delivery's state, its reason, the seconds that the try took)"""
        begun = time.monotonic()
        assert self.sender.step()
        took = time.monotonic() - begun
        (row,) = self.ledger._all("SELECT * FROM delivery")
        return row["state"], row["reason"], took

    @property
    def wait(self) -> float:
        """Seconds until the next try."""
        return float(self.ledger._one("SELECT due FROM delivery")[0] - time.time())

    def again(self) -> tuple[str, str, float]:
        assert self.ledger.retry(1)
        return self.step()


def sending(folder: Path, to: str, **options: Any) -> Sending:
    """A ledger with one job whose report, in each class, waits for ``to``."""
    research = {} if to.startswith("folder:") else {"i_understand_this_is_research": "true"}
    ward = Ward.model_validate({"state": str(folder), "protocols": ["p.yaml"], "send": [{"to": to, **research, **options}]})
    ledger = Ledger(folder / "queue.db")
    ledger.add(Arrival("1.2.3", "aa", "a.dcm", "9.1", "9.1.1", "p", 0.0, 100))
    ((job, _),) = ledger.collecting()
    ledger.set_job(job, "ready")
    taken = ledger.take()
    assert taken is not None
    made = {}
    for name, uid in CLASSES.items():
        one, sop = Dataset(), generate_uid()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.SOPClassUID, one.SOPInstanceUID, one.StudyInstanceUID, one.SeriesInstanceUID, one.Modality = uid, sop, "9.1", "9.1.2", "SR"
        (folder / "reports").mkdir(exist_ok=True)
        one.save_as(folder / "reports" / report_file(taken.id, name), enforce_file_format=True)
        made[name] = [str(sop), "9.1.2"]
    ledger.reported(taken, json.dumps(made), "bundle", [to])
    found = Sending(Sender(ward.send[0], ward, ledger, Trail(ward), lambda event, **facts: found.log.append((event, facts))), ledger)
    return found


class Peer:
    """Accepts connections, and does with each what it is told to: a function of the socket, which ends with the connection."""

    def __init__(self, behave: Any) -> None:
        self.heard, self._behave, self._ended = bytearray(), behave, threading.Event()
        self._listener = create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._run, daemon=True).start()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._listener.close()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket) -> None:
        with connection, suppress(OSError):
            self._behave(self, connection)

    def hang(self) -> None:
        self._ended.wait(600)

    def trickle(self, connection: socket, data: bytes = b"\0") -> None:
        """Byte by byte, without an end."""
        while not self._ended.wait(0.02):
            connection.sendall(data)

    @staticmethod
    def reset(connection: socket) -> None:
        """Closes with an RST."""
        connection.setsockopt(SOL_SOCKET, SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()


def relay(port: int, connection: socket, then: Any, pdus: int, part: int = 0, reads: int | None = None) -> None:
    """So many PDUs that a real peer at ``port`` says, and ``part`` bytes of the next one; then ``then(connection)``.

    The real peer hears ``reads`` parts of what is said to it, or all.
    """
    with create_connection(("127.0.0.1", port)) as real, real.makefile("rb") as said:
        over = threading.Event()

        def forth() -> None:
            heard = 0
            while heard != reads and not over.is_set():
                if select([connection], [], [], 0.02)[0]:
                    real.sendall(connection.recv(1 << 16))
                    heard += 1

        listening = threading.Thread(target=forth, daemon=True)
        listening.start()
        for _ in range(pdus):
            head = said.read(6)
            connection.sendall(head + said.read(int.from_bytes(head[2:], "big")))
        connection.sendall(said.read(part))
        over.set()
        listening.join()  # a connection that a thread reads from does not close
        then(connection)
