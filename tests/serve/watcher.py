"""Somebody else who uses the service while hostile input comes, and what a clear refusal is."""

import re
import threading
import time
from types import TracebackType

import httpx

from pmclip_deploy.models import DEMO
from tests.serve.running import Running

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


def clear(reply: httpx.Response, name: str) -> None:
    """A refusal is one sentence, which holds nothing of the machine or of a patient; an acceptance is nothing to test here."""
    assert reply.status_code < 500 or reply.status_code in (503, 504, 507), (name, reply.text)
    if reply.status_code >= 400:
        assert reply.headers["content-type"] == "application/problem+json" and set(reply.json()) == PROBLEM, (name, reply.text)
        detail = reply.json()["detail"]
        assert 10 < len(detail) < 300 and detail.isprintable() and "internal" not in detail, (name, detail)
        assert not PATH.search(detail) and "ZQX" not in reply.text.upper() and "class '" not in detail, (name, detail)
