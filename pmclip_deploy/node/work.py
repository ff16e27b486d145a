"""From a complete study to a report that lies on the disk."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from pmclip_deploy.answer import Answer
from pmclip_deploy.atomic import written
from pmclip_deploy.errors import PmclipError
from pmclip_deploy.node.audit import Trail
from pmclip_deploy.node.ledger import Job, Ledger
from pmclip_deploy.node.protocol import Candidate, Protocol, picked
from pmclip_deploy.node.receive import Folders, Quiet, reason_of
from pmclip_deploy.node.settings import Ward
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.report.document import SR_CLASSES, Asked, Previous
from pmclip_deploy.serve.problems import Problem
from pmclip_deploy.serve.readers import START_S, DecoderEnded, Reader

TRIES = 3
READ_S = 60.0  # in which a file must be decoded
MEMORY = 4 << 30  # bytes of address space of the process that decodes
PICKED = {"middle": "the middle", "all": "all", "every_n": "one of every {n}", "largest": "the largest"}


def report_file(job: int, sr_class: str) -> str:
    return f"{job}.{sr_class}.dcm"


class Worker:
    """One thread. A file that ends the decoding process costs its own place in the report, and nothing else."""

    def __init__(
        self, ward: Ward, protocols: Iterable[Protocol], ledger: Ledger, predictor: Predictor, quiet: Quiet, audit: Trail,
        log: Callable[..., None],
    ) -> None:  # fmt: skip
        self.ward, self.ledger, self.predictor, self.quiet, self.audit, self.log = ward, ledger, predictor, quiet, audit, log
        self.protocols = {protocol.name: protocol for protocol in protocols}
        self.classes = list(dict.fromkeys(name for one in ward.send for name in one.classes))
        self.folders = Folders(ward.state)
        self._reader: Reader | None = None

    def step(self) -> bool:
        """Closes studies that are complete, and makes one report. Returns False if there was none to make."""
        for job, opened in self.ledger.collecting():
            forced = time.time() - opened >= self.ward.complete.force_s
            if forced or self.quiet.seconds(job.study) >= self.ward.complete.quiet_s:
                self.ledger.set_job(job, "ready")
                self.quiet.forget(job.study)
                self.log("complete", job=job.id, version=job.version, forced=forced)
        taken = None if self.audit.fault else self.ledger.take()
        if taken is None:
            return False
        try:
            self._report(taken)
        except (OSError, sqlite3.Error) as error:  # the disk
            wait = self.ward.retry.wait(taken.tries + 1)
            self.ledger.set_job(taken, "ready", reason_of(error), time.time() + wait, tried=True)
            self.log("postponed", job=taken.id, reason=reason_of(error), seconds=wait)
        except Exception as error:
            reason = error.message if isinstance(error, PmclipError) else f"internal: {type(error).__name__}"
            self.ledger.set_job(taken, "failed", reason, tried=True)
            self.log("failed", job=taken.id, reason=reason)
        return True

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()

    def _report(self, job: Job) -> None:
        protocol = self.protocols.get(job.protocol)
        if protocol is None:
            self.ledger.set_job(job, "failed", f"ward.yaml has no protocol {job.protocol} any more")
            return
        candidates = self.ledger.candidates(job)
        chosen = picked(protocol.pick, candidates)
        self.audit.accessed(self.folders.images / self.ledger.file_of(one.id) for one in chosen)
        images = [(data, answers) for data, answers in map(self._asked(protocol), chosen) if answers]
        if not images:
            self.ledger.set_job(job, "failed", f"none of {len(chosen)} images could be read", tried=True)
            self.log("failed", job=job.id, reason="no image could be read")
            return
        if protocol.report.when == "answered" and all(one.abstained for _, answers in images for one in answers):
            self.ledger.set_job(job, "silent", "no question had an answer")
            self.log("silent", job=job.id)
            return
        before = self._previous(job)
        notes = _notes(protocol, len(candidates), len(chosen), len(images), job, self.predictor.model.sha256)
        codes = {one.ask: one.finding for one in protocol.questions if one.finding is not None}
        made = {}
        for sr_class in self.classes:
            asked = Asked(protocol.label, codes, notes, before.get(sr_class))
            data, sop, series = self._call("report_of_images", images, sr_class, asked)
            with written(self.folders.reports / report_file(job.id, sr_class), mode=0o600) as new:
                new.write_bytes(data)
            made[sr_class] = [sop, series]
        if self.ledger.reported(job, json.dumps(made), self.predictor.model.sha256, [one.to for one in self.ward.send]):
            self.log("reported", job=job.id, version=job.version, images=len(images), of=len(candidates))

    def _asked(self, protocol: Protocol) -> Callable[[Candidate], tuple[bytes, list[Answer]]]:
        questions = [question.ask for question in protocol.questions]

        def asked(one: Candidate) -> tuple[bytes, list[Answer]]:
            """No answers about a file that cannot be read."""
            data = (self.folders.images / self.ledger.file_of(one.id)).read_bytes()
            try:
                return data, self.predictor.ask_many(self._call("picture", data, None, None), questions)
            except (PmclipError, Problem) as error:
                self.log("unreadable", image=one.id, code=error.code)
                return data, []

        return asked

    def _previous(self, job: Job) -> dict[str, Previous]:
        before = self.ledger.predecessor(job)
        if before is None:
            return {}
        made = {name: uids for name, uids in json.loads(before.report).items() if name in SR_CLASSES}
        return {name: Previous(before.study, series, SR_CLASSES[name], sop) for name, (sop, series) in made.items()}

    def open(self) -> None:
        """Starts the process that decodes, if there is none."""
        if self._reader is None or not self._reader.is_alive:
            self._reader = Reader(MEMORY)
            self._reader.call(START_S, "warm_up", "highdicom.sr")

    def _call(self, name: str, *arguments: Any) -> Any:
        """A process that died by something else than the file answers the next time."""
        for _ in range(TRIES - 1):
            with suppress(DecoderEnded):
                return self._called(name, *arguments)
        return self._called(name, *arguments)

    def _called(self, name: str, *arguments: Any) -> Any:
        self.open()
        assert self._reader is not None
        return self._reader.call(READ_S, name, *arguments)


def _notes(protocol: Protocol, there: int, chosen: int, read: int, job: Job, bundle: str) -> tuple[str, ...]:
    how = PICKED[protocol.pick.choose].format(n=protocol.pick.n)
    of = f"{how} of {'each series' if protocol.pick.per == 'series' else 'the study'}, {protocol.pick.max_images} at most"
    notes = [f"Protocol {protocol.label} looked at {read} of {there} images that it matches: {of}."]
    if read < chosen:
        notes.append(f"{chosen - read} of the chosen images could not be read.")
    if job.bundle not in ("", bundle):
        notes.append("The model was changed while the study waited: this report is by the new one.")
    if job.version > 1:
        notes.append(f"Version {job.version}: images came after the earlier report, which this one replaces.")
    return tuple(notes)
