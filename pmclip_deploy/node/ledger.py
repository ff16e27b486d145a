"""The state of every image, job and delivery, in SQLite. Each change is one transaction, and is on the disk when the call returns.

    image     matched | unmatched | replaced | deleted
    job       collecting -> ready -> running -> reported -> done        or failed, silent, dropped
    delivery  waiting -> done, or waiting -> sent -> done                or refused, given_up, dropped

A job is one report about a study by a protocol. An image that comes after a job began to run opens the next version of it. A
delivery that is "sent" waits for the archive's storage commitment. "failed", "refused" and "given_up" wait for a person, who runs
`pmclip-deploy queue retry`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pmclip_deploy.node.database import Database
from pmclip_deploy.node.protocol import Candidate

LEASE_S = 300.0


@dataclass(frozen=True)
class Arrival:
    """An image that lies on the disk, whole."""

    sop: str
    sha256: str  # of its data set and transfer syntax
    file: str  # its name in the folder of images
    study: str
    series: str
    protocol: str | None  # None: none matches
    place: float
    pixels: int
    reason: str = ""  # why none matches


@dataclass(frozen=True)
class Job:
    id: int
    study: str
    protocol: str
    version: int
    tries: int
    report: str  # JSON: of each SR class the SOP and the Series Instance UID; "" before there is one
    state: str
    bundle: str = ""  # the hash of the one that made the report; before, of the one that would have when the job was opened


@dataclass(frozen=True)
class Due:
    """A delivery whose time has come."""

    job: Job
    failed: int  # tries, since the state changed
    since: float
    sent: str  # the SR class that the archive has, and has not committed itself to; "" if it has none


class Ledger(Database):
    """One file, used by several threads of this process, and by `pmclip-deploy queue` in another one."""

    bundle = ""  # the hash of the one that answers now

    # Images.

    def copy_of(self, sop: str, sha256: str) -> bool:
        """Whether the same bytes are there already, and are what counts for this UID; they are counted."""
        counted = "UPDATE image SET copies = copies + 1 WHERE sop = ? AND sha256 = ? AND state <> 'replaced'"
        with self._change():
            return self._db.execute(counted, (sop, sha256)).rowcount > 0

    def add(self, one: Arrival) -> bool:
        """An image, and the job that it opens or keeps open. Content that was replaced counts again. Returns False for a copy."""
        now = time.time()
        with self._change():
            added = self._db.execute(
                "INSERT INTO image (sop, sha256, file, study, series, protocol, place, pixels, received, state, reason)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (sop, sha256) DO UPDATE SET state = excluded.state, reason = excluded.reason, received = excluded.received"
                " WHERE state = 'replaced' RETURNING id",
                (*(one.sop, one.sha256, one.file, one.study, one.series, one.protocol, one.place, one.pixels, now),
                 *("unmatched" if one.protocol is None else "matched", one.reason)),
            ).fetchone()  # fmt: skip
            if added is None:  # it came first on another association
                return False
            self._db.execute(
                "UPDATE image SET state = 'replaced', reason = 'the same UID came with other content'"
                " WHERE sop = ? AND id <> ? AND state IN ('matched', 'unmatched')",
                (one.sop, added["id"]),
            )
            if one.protocol is not None:
                self._open(one.study, one.protocol, now)
        return True

    def _open(self, study: str, protocol: str, now: float) -> None:
        last = self._one("SELECT id, version, state FROM job WHERE study = ? AND protocol = ? ORDER BY version DESC", study, protocol)
        if last is not None and last["state"] in ("collecting", "ready"):
            self._db.execute("UPDATE job SET state = 'collecting', changed = ? WHERE id = ?", (now, last["id"]))
            return
        version = 1 if last is None else last["version"] + 1
        self._db.execute(
            "INSERT INTO job (study, protocol, version, opened, changed, bundle, state) VALUES (?, ?, ?, ?, ?, ?, 'collecting')",
            (study, protocol, version, now, now, self.bundle),
        )

    def candidates(self, job: Job) -> list[Candidate]:
        """The images of a job that are still here."""
        query = "SELECT id, series, sop, place, pixels FROM image WHERE study = ? AND protocol = ? AND state = 'matched'"
        return [Candidate(*row) for row in self._all(query, job.study, job.protocol)]

    def file_of(self, image: int) -> str:
        return str(self._one("SELECT file FROM image WHERE id = ?", image)[0])

    def files(self) -> set[str]:
        """Names of the files that must be there."""
        return {row[0] for row in self._all("SELECT file FROM image WHERE state <> 'deleted'")}

    def images_to_delete(self, kept_s: float, unmatched_s: float) -> list[tuple[int, str]]:
        """(id, file) of images whose jobs have all ended for so long, and of those that nobody asks about."""
        now = time.time()
        return [
            (row["id"], row["file"])
            for row in self._all(
                "SELECT id, file FROM image AS i WHERE (state IN ('unmatched', 'replaced') AND received < ?)"
                " OR (state = 'matched' AND NOT EXISTS (SELECT 1 FROM job WHERE job.study = i.study AND job.protocol = i.protocol"
                " AND (job.state NOT IN ('done', 'silent', 'dropped') OR job.changed > ?)))",
                now - unmatched_s,
                now - kept_s,
            )
        ]

    def deleted(self, images: Sequence[int]) -> None:
        with self._change():
            self._db.executemany("UPDATE image SET state = 'deleted' WHERE id = ?", [(image,) for image in images])

    # Jobs.

    def collecting(self) -> list[tuple[Job, float]]:
        """Each with the time at which its first image came."""
        return [(_job(row), row["opened"]) for row in self._all("SELECT * FROM job WHERE state = 'collecting'")]

    def set_job(self, job: Job, state: str, reason: str = "", due: float = 0.0, tried: bool = False) -> None:
        """From ``job.state``; a job that a person dropped meanwhile stays dropped."""
        with self._change():
            self._db.execute(
                "UPDATE job SET state = ?, reason = ?, due = ?, tries = tries + ?, changed = ? WHERE id = ? AND state = ?",
                (state, reason, due, tried, time.time(), job.id, job.state),
            )

    def take(self) -> Job | None:
        """A job that is ready, which then runs; its lease ends after LEASE_S."""
        now = time.time()
        with self._change():
            row = self._one("SELECT * FROM job WHERE state IN ('ready', 'running') AND due <= ? ORDER BY id LIMIT 1", now)
            if row is None:
                return None
            self._db.execute("UPDATE job SET state = 'running', due = ?, changed = ? WHERE id = ?", (now + LEASE_S, now, row["id"]))
        return replace(_job(row), state="running")

    def free_leases(self) -> None:
        """Of a process that is gone."""
        with self._change():
            self._db.execute("UPDATE job SET state = 'ready', due = 0 WHERE state = 'running'")

    def reported(self, job: Job, report: str, bundle: str, destinations: Sequence[str]) -> bool:
        """The report's files are on the disk. Returns False if the job no longer runs: another worker took it, or a person dropped it."""
        now = time.time()
        with self._change():
            changed = self._db.execute(
                "UPDATE job SET state = 'reported', reason = '', report = ?, bundle = ?, due = 0, changed = ?"
                " WHERE id = ? AND state = 'running'",
                (report, bundle, now, job.id),
            ).rowcount
            if changed:
                self._db.executemany(
                    "INSERT INTO delivery (job, destination, since, changed, state) VALUES (?, ?, ?, ?, 'waiting')",
                    [(job.id, destination, now, now) for destination in destinations],
                )
        return bool(changed)

    def predecessor(self, job: Job) -> Job | None:
        """The last earlier version that has a report."""
        row = self._one(
            "SELECT * FROM job WHERE study = ? AND protocol = ? AND version < ? AND report <> '' ORDER BY version DESC",
            job.study,
            job.protocol,
            job.version,
        )
        return None if row is None else _job(row)

    # Deliveries.

    def next_delivery(self, destination: str) -> Due | None:
        """The one that is due; an earlier version of a study's report goes first."""
        row = self._one(
            "SELECT job.*, delivery.tries AS failed, delivery.since,"
            " coalesce((SELECT sr_class FROM commitment WHERE delivery.state = 'sent'"
            "  AND job = delivery.job AND destination = delivery.destination ORDER BY rowid DESC LIMIT 1), '') AS sent"
            " FROM delivery JOIN job ON job.id = delivery.job"
            " WHERE delivery.state IN ('waiting', 'sent') AND delivery.destination = ? AND delivery.due <= ? AND NOT EXISTS ("
            "  SELECT 1 FROM delivery AS d JOIN job AS j ON j.id = d.job WHERE d.state = 'waiting' AND d.destination = delivery.destination"
            "  AND j.study = job.study AND j.protocol = job.protocol AND j.version < job.version) ORDER BY delivery.due, job.id LIMIT 1",
            destination,
            time.time(),
        )
        return None if row is None else Due(_job(row), row["failed"], row["since"], row["sent"])

    def set_delivery(self, job: Job, destination: str, state: str, reason: str = "", due: float = 0.0) -> None:
        """With the last one the job is done. A failed try leaves it ``waiting`` or ``sent``, with the time of the next."""
        now = time.time()
        with self._change():
            self._db.execute(
                "UPDATE delivery SET state = ?, reason = ?, due = ?, tries = tries + ?, changed = ?"
                " WHERE job = ? AND destination = ? AND state IN ('waiting', 'sent')",
                (state, reason, due, state in ("waiting", "sent"), now, job.id, destination),
            )
            self._close(job.id, now)

    # Storage commitment.

    def asking(self, job: Job, destination: str, transaction: str, sr_class: str, due: float) -> None:
        """The archive has the report, and will be asked to commit itself to it; it is asked again when ``due``."""
        now, sop = time.time(), json.loads(job.report)[sr_class][0]
        with self._change():
            self._db.execute("INSERT INTO commitment VALUES (?, ?, ?, ?, ?)", (transaction, job.id, destination, sr_class, sop))
            self._db.execute(
                "UPDATE delivery SET tries = CASE state WHEN 'sent' THEN tries ELSE 0 END, state = 'sent', reason = '', due = ?,"
                " changed = ? WHERE job = ? AND destination = ? AND state IN ('waiting', 'sent')",
                (due, now, job.id, destination),
            )

    def asked(self, transaction: str) -> tuple[int, str, str] | None:
        """(job, destination, SOP Instance UID) of a transaction."""
        row = self._one("SELECT job, destination, sop FROM commitment WHERE transaction_uid = ?", transaction)
        return None if row is None else tuple(row)

    def answered(self, transaction: str, state: str, reason: str) -> bool:
        """Returns False if the delivery waits for no answer any more."""
        now = time.time()
        with self._change():
            row = self._db.execute(
                "UPDATE delivery SET state = ?, reason = ?, changed = ? WHERE state = 'sent' AND (job, destination) ="
                " (SELECT job, destination FROM commitment WHERE transaction_uid = ?) RETURNING job",
                (state, reason, now, transaction),
            ).fetchone()
            if row is not None:
                self._close(row["job"], now)
        return row is not None

    def is_open(self, job: Job, destination: str) -> bool:
        """Whether its commitment is still awaited."""
        return bool(self._one("SELECT 1 FROM delivery WHERE job = ? AND destination = ? AND state = 'sent'", job.id, destination))

    def _close(self, job: int, now: float) -> None:
        self._db.execute(
            "UPDATE job SET state = 'done', changed = ? WHERE id = ? AND state = 'reported'"
            " AND NOT EXISTS (SELECT 1 FROM delivery WHERE job = job.id AND state NOT IN ('done', 'dropped'))",
            (now, job),
        )

    # For a person.

    def counts(self) -> dict[str, dict[str, int]]:
        """Of each table its states."""
        return {
            table: {row[0]: row[1] for row in self._all(f"SELECT state, count(*) FROM {table} GROUP BY state ORDER BY state")}
            for table in ("image", "job", "delivery")
        }

    def copies(self) -> int:
        """How often bytes came again."""
        return int(self._one("SELECT coalesce(sum(copies - 1), 0) FROM image")[0])

    def oldest(self) -> dict[str, float]:
        """Of each state of a job that has not ended, when the oldest one was opened."""
        query = "SELECT state, min(opened) FROM job WHERE state NOT IN ('done', 'silent', 'dropped') GROUP BY state ORDER BY state"
        return {row[0]: row[1] for row in self._all(query)}

    def rows(self, job: int | None = None) -> list[Mapping[str, Any]]:
        """Jobs that are not done, each with its deliveries that are not; or all of one job."""
        of = "job.id = ?" if job is not None else "job.state NOT IN ('done', 'silent', 'dropped') AND ? IS NULL"
        query = (
            "SELECT job.id, job.protocol, job.version, job.state, job.reason, job.tries, job.opened, job.changed, job.bundle,"
            " d.destination, d.state AS sent, d.reason AS refused, d.tries AS failed FROM job LEFT JOIN delivery AS d ON d.job = job.id"
            f" AND (d.state NOT IN ('done', 'dropped') OR ? IS NOT NULL) WHERE {of} ORDER BY job.id, d.destination"
        )
        return [dict(row) for row in self._all(query, job, job)]

    def retry(self, job: int) -> bool:
        """What is parked, or waits for its next try, is tried now. Returns False if there is nothing of the kind."""
        now = time.time()
        with self._change():
            jobs = "UPDATE job SET state = 'ready', due = 0, changed = ? WHERE id = ? AND state = 'failed'"
            sends = (
                "UPDATE delivery SET state = 'waiting', due = 0, since = ?, changed = ?"
                " WHERE job = ? AND state IN ('refused', 'given_up', 'waiting', 'sent')"
            )
            return self._db.execute(jobs, (now, job)).rowcount + self._db.execute(sends, (now, now, job)).rowcount > 0

    def drop(self, job: int) -> bool:
        """Nothing more comes of it. Returns False if it has ended already."""
        now = time.time()
        with self._change():
            sends = (
                "UPDATE delivery SET state = 'dropped', changed = ? WHERE job = ? AND state IN ('waiting', 'sent', 'refused', 'given_up')"
            )
            jobs = "UPDATE job SET state = 'dropped', changed = ? WHERE id = ? AND state NOT IN ('done', 'silent', 'dropped')"
            self._db.execute(sends, (now, job))
            return self._db.execute(jobs, (now, job)).rowcount > 0

    def reports_to_delete(self, kept_s: float) -> list[Job]:
        """Reports that every destination has had for so long."""
        rows = self._all("SELECT * FROM job WHERE state IN ('done', 'dropped') AND report <> '' AND changed < ?", time.time() - kept_s)
        return [_job(row) for row in rows]

    def purge(self, older_s: float) -> int:
        """Forgets jobs that ended so long ago, with images of theirs that are deleted. Returns the number of jobs."""
        before = time.time() - older_s
        ended = "state IN ('done', 'silent', 'dropped') AND changed < ?"
        with self._change():
            # The last report of a study stays as long as an image of it does: a late image's report names it.
            kept = "EXISTS (SELECT 1 FROM image WHERE image.study = job.study AND image.state = 'matched')"
            gone = f"SELECT id FROM job WHERE {ended} AND NOT {kept}"
            for table in ("commitment", "delivery"):
                self._db.execute(f"DELETE FROM {table} WHERE job IN ({gone})", (before,))
            count = self._db.execute(f"DELETE FROM job WHERE id IN ({gone})", (before,)).rowcount
            self._db.execute("DELETE FROM image WHERE state = 'deleted' AND NOT EXISTS (SELECT 1 FROM job WHERE job.study = image.study)")
            return count


def _job(row: Any) -> Job:
    return Job(row["id"], row["study"], row["protocol"], row["version"], row["tries"], row["report"], row["state"], row["bundle"])
