"""The state of every image, job and delivery, in SQLite. Each change is one transaction, and is on the disk when the call returns.

    image     matched | unmatched | replaced | deleted
    job       collecting -> ready -> running -> reported -> done        or failed, silent, dropped
    delivery  waiting -> done                                           or refused, given_up, dropped

A job is one report about a study by a protocol. An image that comes after a job began to run opens the next version of it. "failed",
"refused" and "given_up" wait for a person, who runs `pmclip-deploy queue retry`.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pmclip_deploy.errors import BundleError, UsageError
from pmclip_deploy.node.protocol import Candidate

SCHEMA = 1
LEASE_S = 300.0
TABLES = """
CREATE TABLE image (
    id INTEGER PRIMARY KEY, sop TEXT NOT NULL, sha256 TEXT NOT NULL, file TEXT NOT NULL, study TEXT NOT NULL, series TEXT NOT NULL,
    protocol TEXT, place REAL NOT NULL, pixels INTEGER NOT NULL, received REAL NOT NULL, copies INTEGER NOT NULL DEFAULT 1,
    state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', UNIQUE (sop, sha256));
CREATE INDEX image_of_study ON image (study, protocol);
CREATE TABLE job (
    id INTEGER PRIMARY KEY, study TEXT NOT NULL, protocol TEXT NOT NULL, version INTEGER NOT NULL, opened REAL NOT NULL,
    due REAL NOT NULL DEFAULT 0, tries INTEGER NOT NULL DEFAULT 0, bundle TEXT NOT NULL DEFAULT '', report TEXT NOT NULL DEFAULT '',
    changed REAL NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', UNIQUE (study, protocol, version));
CREATE INDEX job_by_state ON job (state, due);
CREATE TABLE delivery (
    job INTEGER NOT NULL REFERENCES job (id), destination TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0, since REAL NOT NULL,
    due REAL NOT NULL DEFAULT 0, changed REAL NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (job, destination));
CREATE INDEX delivery_by_state ON delivery (state, destination, due);
"""


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


class Ledger:
    """One file, used by several threads of this process, and by `pmclip-deploy queue` in another one."""

    def __init__(self, file: Path) -> None:
        """Raises UsageError if the file cannot be opened, and BundleError if a later version of this program wrote it."""
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.touch(0o600)
            self._db = sqlite3.connect(file, timeout=60, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"{file}: cannot be opened ({error})", "check the folder `state` of ward.yaml") from None
        self._lock = threading.RLock()
        with self._change():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA:
                raise BundleError(f"{file}: a later version of pmclip-deploy wrote it", "install that version")
            if version == 0:
                for statement in TABLES.split(";\n"):
                    if statement.strip():
                        self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA}")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended some already
                    self._db.execute("ROLLBACK")
                raise

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _one(self, query: str, *values: Any) -> Any:
        with self._lock:
            return self._db.execute(query, values).fetchone()

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
            "INSERT INTO job (study, protocol, version, opened, changed, state) VALUES (?, ?, ?, ?, ?, 'collecting')",
            (study, protocol, version, now, now),
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

    def next_delivery(self, destination: str) -> tuple[Job, int, float] | None:
        """(job, failed tries, since when it waits) of the one that is due; an earlier version of a study's report goes first."""
        row = self._one(
            "SELECT job.*, delivery.tries AS failed, delivery.since FROM delivery JOIN job ON job.id = delivery.job"
            " WHERE delivery.state = 'waiting' AND delivery.destination = ? AND delivery.due <= ? AND NOT EXISTS ("
            "  SELECT 1 FROM delivery AS d JOIN job AS j ON j.id = d.job WHERE d.state = 'waiting' AND d.destination = delivery.destination"
            "  AND j.study = job.study AND j.protocol = job.protocol AND j.version < job.version) ORDER BY delivery.due, job.id LIMIT 1",
            destination,
            time.time(),
        )
        return None if row is None else (_job(row), row["failed"], row["since"])

    def set_delivery(self, job: Job, destination: str, state: str, reason: str = "", due: float = 0.0) -> None:
        """With the last one the job is done. A failed try leaves it ``waiting``, with the time of the next."""
        now = time.time()
        with self._change():
            self._db.execute(
                "UPDATE delivery SET state = ?, reason = ?, due = ?, tries = tries + ?, changed = ?"
                " WHERE job = ? AND destination = ? AND state = 'waiting'",
                (state, reason, due, state == "waiting", now, job.id, destination),
            )
            self._close(job.id, now)

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
                " WHERE job = ? AND state IN ('refused', 'given_up', 'waiting')"
            )
            return self._db.execute(jobs, (now, job)).rowcount + self._db.execute(sends, (now, now, job)).rowcount > 0

    def drop(self, job: int) -> bool:
        """Nothing more comes of it. Returns False if it has ended already."""
        now = time.time()
        with self._change():
            sends = "UPDATE delivery SET state = 'dropped', changed = ? WHERE job = ? AND state IN ('waiting', 'refused', 'given_up')"
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
            self._db.execute(f"DELETE FROM delivery WHERE job IN ({gone})", (before,))
            count = self._db.execute(f"DELETE FROM job WHERE id IN ({gone})", (before,)).rowcount
            self._db.execute("DELETE FROM image WHERE state = 'deleted' AND NOT EXISTS (SELECT 1 FROM job WHERE job.study = image.study)")
            return count


def _job(row: Any) -> Job:
    return Job(row["id"], row["study"], row["protocol"], row["version"], row["tries"], row["report"], row["state"])
