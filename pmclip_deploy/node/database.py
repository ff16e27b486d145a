"""The ledger's file in SQLite: its tables, its transactions, and how an earlier version's file becomes one of this version.

An upgrade is a transaction of SQLite: a process that is killed in it leaves the file as it was. The file is changed in its place, after a
copy of it was kept beside it: to rename a database that another process may have open can corrupt it (https://sqlite.org/howtocorrupt.html).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pmclip_deploy.atomic import written
from pmclip_deploy.errors import BundleError, UsageError

FIRST = """
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
COMMITMENTS = """
CREATE TABLE commitment (
    transaction_uid TEXT PRIMARY KEY, job INTEGER NOT NULL REFERENCES job (id), destination TEXT NOT NULL, sr_class TEXT NOT NULL,
    sop TEXT NOT NULL);
CREATE INDEX commitment_of_job ON commitment (job, destination);
"""
STEPS = (FIRST, COMMITMENTS)  # the first makes version 1 of an empty file
SCHEMA = len(STEPS)


class Database:
    """One connection, used by several threads."""

    def __init__(self, file: Path, upgrade: bool = False) -> None:
        """``upgrade`` a file of an earlier version of this program. Raises what ``prepare`` does, and UsageError if it cannot be opened."""
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.touch(0o600)
            self._db = sqlite3.connect(file, timeout=60, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            prepare(self._db, file, upgrade)
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"{file}: cannot be opened ({error})", "check the folder `state` of ward.yaml") from None
        self._lock = threading.RLock()

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


def prepare(db: sqlite3.Connection, file: Path, upgrade: bool) -> None:
    """Brings ``file``, which ``db`` has open, to SCHEMA. The file before an upgrade stays beside it, as queue.db.1 for version 1.

    Raises BundleError if a later version wrote it, and UsageError if an earlier one did and ``upgrade`` is false.
    """
    version = _version(db)
    if version > SCHEMA:
        raise BundleError(f"{file}: a later version of pmclip-deploy wrote it", "install that version")
    if version == SCHEMA:
        return
    if version:
        if not upgrade:
            raise UsageError(
                f"{file}: an earlier version of pmclip-deploy wrote it", "start `pmclip-deploy listen` once, which upgrades it"
            )
        _keep(db, file.with_name(f"{file.name}.{version}"))
    db.execute("BEGIN IMMEDIATE")
    try:
        version = _version(db)  # another process may have done it
        for statement in "".join(STEPS[version:]).split(";\n"):
            if statement.strip():
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {SCHEMA}")
        _check(db, file)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _check(db: sqlite3.Connection, file: Path) -> None:
    found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise BundleError(f"{file}: is damaged ({found[:200]})", "put a copy in its place")


def _keep(db: sqlite3.Connection, copy: Path) -> None:
    with written(copy, mode=0o600) as new, closing(sqlite3.connect(new, isolation_level=None)) as kept:
        db.backup(kept)
        kept.execute("PRAGMA journal_mode = DELETE")  # one file
        _check(kept, copy)
