"""The node as a whole: its threads, its log, and how it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import IO, Any

from pmclip_deploy.errors import UsageError
from pmclip_deploy.node.audit import Trail
from pmclip_deploy.node.ledger import Ledger
from pmclip_deploy.node.protocol import Protocol
from pmclip_deploy.node.receive import Folders, Quiet, Receiver, break_off
from pmclip_deploy.node.send import Sender
from pmclip_deploy.node.settings import Ward
from pmclip_deploy.node.work import Worker, report_file
from pmclip_deploy.predictor import Predictor

POLL_S = 0.1
SWEEP_S = 10.0
UNMATCHED_S = 86400.0  # for which images that nobody asks about are kept
FINISH_S, CUT_S = 10.0, 5.0  # in which the threads may finish what they are at; in which they end when their connections are cut


def log(event: str, **facts: Any) -> None:
    """A line of JSON: states, sizes and times; never a text of a peer."""
    sys.stderr.write(json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n")  # at once: several threads write
    sys.stderr.flush()


def only_our_words() -> None:
    """Nothing that a library prints, since it may quote a peer or a patient: no log, no warning, no traceback of a thread."""
    logging.disable()
    warnings.simplefilter("ignore")

    def ended(fault: threading.ExceptHookArgs) -> None:  # of pynetdicom's threads alone: ours catch all
        log("association ended", kind=fault.exc_type.__name__)
        break_off(fault.thread)

    threading.excepthook = ended


@contextmanager
def alone(ward: Ward) -> Any:
    """Raises UsageError if another process listens with the same state."""
    Folders(ward.state).make()
    file: IO[str] = (ward.state / "lock").open("a")
    with file:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"{ward.state}: another `listen` uses this state", "give each its own `state` in ward.yaml") from None
        yield


class Node:
    """Runs until ``stop``. What it was doing then goes on with the next start."""

    def __init__(self, ward: Ward, protocols: Sequence[Protocol], predictor: Predictor) -> None:
        self.ward, self.ledger, self.quiet = ward, Ledger(ward.state / "queue.db", upgrade=True), Quiet()
        self.ledger.bundle = predictor.model.sha256
        self._stopped, self._threads = threading.Event(), list[threading.Thread]()
        self.audit = Trail(ward, log)
        self.receiver = Receiver(ward, protocols, self.ledger, self.quiet, self.audit, log)
        self.worker = Worker(ward, protocols, self.ledger, predictor, self.quiet, self.audit, log)
        self.senders = [Sender(one, ward, self.ledger, self.audit, log) for one in ward.send]

    def run(self, started: Callable[[int], None]) -> None:
        """``started`` is told the port. Raises UsageError if it cannot be listened on, or the audit trail cannot be written."""
        with self.audit.running():
            self._run(started)

    def _run(self, started: Callable[[int], None]) -> None:
        self.worker.open()
        only_our_words()
        left = Folders(self.ward.state).sweep(self.ledger)
        self.ledger.free_leases()
        log("started", swept=left)
        node = self.ward.node
        try:
            port = self.receiver.open()
        except OSError as error:
            raise UsageError(f"{node.host} port {node.port}: {error.strerror}", "choose another host or port in ward.yaml") from None
        steps = [self.worker.step, *(sender.step for sender in self.senders), self.audit.step]
        if self.ward.metrics is not None:
            self._watch(self.ward.metrics.port)
        self._threads = [threading.Thread(target=self._loop, args=(step,), daemon=True) for step in steps]
        for thread in self._threads:
            thread.start()
        started(port)
        while not self._stopped.wait(SWEEP_S):
            self.sweep()
        self.receiver.close()
        self._join(FINISH_S)
        for sender in self.senders:
            sender.close()
        self._join(CUT_S)
        self.ledger.close()
        self.worker.close()
        log("stopped")

    def stop(self) -> None:
        self._stopped.set()

    def _join(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0))

    def _watch(self, port: int) -> None:
        from pmclip_deploy.node.metrics import Facts, serve

        try:
            facts = Facts(self.ward, self.ledger, self.receiver, self.worker.predictor.model)
            log("metrics", port=serve(facts, self.faults, port))
        except OSError as error:
            raise UsageError(f"metrics: port {port}: {error.strerror}", "choose another port in ward.yaml") from None

    def faults(self) -> list[str]:
        """Why the node cannot take or send images now."""
        found = [] if self.receiver.has_room else ["the disk is nearly full"]
        found += [self.audit.fault] if self.audit.fault else []
        return found + ([] if all(thread.is_alive() for thread in self._threads) else ["a thread has ended"])

    def sweep(self) -> None:
        """Deletes what is kept no longer: a row says so before the file goes."""
        disk, folders = self.ward.disk, Folders(self.ward.state)
        kept = 0.0 if disk.retention_images == "on_sent" else float(disk.retention_images)
        gone = self.ledger.images_to_delete(kept, UNMATCHED_S)
        self.ledger.deleted([image for image, _ in gone])
        for _, name in gone:
            (folders.images / name).unlink(missing_ok=True)
        for job in self.ledger.reports_to_delete(disk.retention_reports):
            for sr_class in json.loads(job.report):
                (folders.reports / report_file(job.id, sr_class)).unlink(missing_ok=True)

    def _loop(self, step: Callable[[], bool]) -> None:
        while not self._stopped.is_set():
            try:
                busy = step()
            except Exception as error:  # the ledger's disk, most likely: nothing was changed
                log("error", kind=type(error).__name__)
                busy = False
            if not busy:
                self._stopped.wait(POLL_S)


@contextmanager
def ended_by_signals(node: Node) -> Any:
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), lambda *_: node.stop()) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
