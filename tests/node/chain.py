"""Run in a network namespace of its own: studies go through a node to Orthanc, while node, decoding process and Orthanc are killed.

Usage: python chain.py FOLDER STUDIES IMAGES KILLS.  Prints what came out, as JSON.
"""

import base64
import io
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from pydicom import Dataset, dcmread

from tests.node.running import Node, listening, sent, slices
from tests.report import orthanc

TO = {"to": f"dicom:ORTHANC@127.0.0.1:{orthanc.DICOM}", "i_understand_this_is_research": "true"}
OPTIONS: dict[str, Any] = {
    "node": {"port": "11112", "max_associations": "20"},
    "complete": {"quiet_s": "3"},
    "send": [TO],
    "retry": {"first_s": "0.5", "max_s": "2"},
}


class Running:
    """The node and Orthanc; each is started again when it was killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        self._nodes, self._archives = ExitStack(), ExitStack()
        self.start_archive()
        self.start_node()

    def start_node(self) -> None:
        self._nodes.close()
        self.node: Node = self._nodes.enter_context(listening(self.folder, **OPTIONS))

    def start_archive(self) -> None:
        self._archives.close()
        self.archive = self._archives.enter_context(orthanc.running(self.folder / "orthanc"))

    def kill(self, what: str) -> None:
        with self.lock:
            if what == "node":
                self.node.process.send_signal(signal.SIGKILL)
                self.node.process.wait()
                self.start_node()
            elif what == "archive":
                self.archive.send_signal(signal.SIGKILL)
                self.archive.wait()
                self.start_archive()
            else:
                subprocess.run(["pkill", "-KILL", "-P", str(self.node.process.pid)], check=False)

    def close(self) -> None:
        self._nodes.close()
        self._archives.close()


def main() -> None:
    folder, (studies, count, kills) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    orthanc.loopback_up()
    chance = random.Random(7)
    images = [image for _ in range(studies) for image in slices(count)]
    queue = [*images, *chance.sample(images, len(images) // 10)]  # some come twice
    chance.shuffle(queue)
    running, acknowledged, begun = Running(folder), set[str](), time.monotonic()
    done = threading.Event()

    def send() -> None:
        while True:
            with running.lock:
                part = [queue.pop() for _ in range(min(10, len(queue)))]
            if not part:
                return
            try:
                statuses = sent(running.node.port, part)
            except (ConnectionError, OSError):
                statuses = [None] * len(part)
            for image, status in zip(part, statuses, strict=True):
                if status == 0:
                    acknowledged.add(image.SOPInstanceUID)
                else:
                    queue.insert(0, image)
            if None in statuses:
                time.sleep(0.5)

    senders = [threading.Thread(target=send) for _ in range(4)]
    for sender in senders:
        sender.start()
    for number in range(kills):
        time.sleep(chance.uniform(0.5, 3))
        running.kill(("node", "reader", "archive")[number % 3])
    for sender in senders:
        sender.join()
    done.set()
    end = time.monotonic() + 900
    while time.monotonic() < end:
        counts = json.loads(running.node.queue("show", "--json").stdout)["counts"]
        if set(counts["job"]) <= {"done", "failed"}:
            break
        time.sleep(1)
    kept = [dcmread(io.BytesIO(base64.b64decode(content))) for content in orthanc.kept().values()]
    with sqlite3.connect(folder / "state" / "queue.db") as ledger:
        (integrity,) = ledger.execute("PRAGMA integrity_check").fetchone()
    took = round(time.monotonic() - begun)
    print(json.dumps({"acknowledged": len(acknowledged), "counts": counts, "seconds": took, "integrity": integrity, **told(kept)}))
    running.close()


def told(reports: list[Dataset]) -> dict[str, Any]:
    """Of each study, the reports that no other one replaces, and the images that these are about."""
    current, replaced = dict[str, list[str]](), set[str]()
    for one in reports:
        for before in one.get("PredecessorDocumentsSequence", []):
            replaced.add(before.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
    for one in reports:
        if one.SOPInstanceUID not in replaced:
            texts = [item.get("TextValue", "") for item in one.ContentSequence[-1].ContentSequence]
            current.setdefault(one.StudyInstanceUID, []).extend(text for text in texts if "images that it matches" in text)
    there = {one.SOPInstanceUID for one in reports}
    return {"reports": len(reports), "current": sorted(current.values()), "missing": len(replaced - there)}


if __name__ == "__main__":
    main()
