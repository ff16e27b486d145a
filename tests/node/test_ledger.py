"""The ledger: states, versions, copies, leases, and the order of deliveries."""

import os
import re
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")

from pmclip_deploy.errors import BundleError, UsageError
from pmclip_deploy.node.database import FIRST, SCHEMA
from pmclip_deploy.node.ledger import Arrival, Job, Ledger
from tests.sources import ROOT

ONE = Arrival("1.2.3", "aa", "a.dcm", "9.1", "9.1.1", "p", 0.0, 100)
OUT, PACS = "folder:out", "dicom:PACS@h:104"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "queue.db")


def run(ledger: Ledger) -> Job:
    for job, _ in ledger.collecting():
        ledger.set_job(job, "ready")
    job = ledger.take()
    assert job is not None
    return job


def test_a_study_has_one_job_until_it_runs_and_a_late_image_opens_the_next_version(ledger: Ledger) -> None:
    assert ledger.add(ONE) and ledger.add(replace(ONE, sop="1.2.4", sha256="bb"))
    assert [job.version for job, _ in ledger.collecting()] == [1]
    first = run(ledger)
    assert len(ledger.candidates(first)) == 2 and ledger.predecessor(first) is None
    assert ledger.add(replace(ONE, sop="1.2.5", sha256="cc"))
    assert ledger.reported(first, "r1", "bundle", [OUT])
    second = run(ledger)
    assert second.version == 2 and len(ledger.candidates(second)) == 3
    before = ledger.predecessor(second)
    assert before is not None and before.report == "r1"


def test_an_image_that_comes_before_the_job_runs_makes_it_wait_again(ledger: Ledger) -> None:
    ledger.add(ONE)
    ((job, _),) = ledger.collecting()
    ledger.set_job(job, "ready")
    ledger.add(replace(ONE, sop="1.2.4", sha256="bb"))
    assert ledger.take() is None and [job.version for job, _ in ledger.collecting()] == [1]


def test_copies_are_counted_and_other_content_of_a_uid_replaces(ledger: Ledger) -> None:
    ledger.add(ONE)
    first = run(ledger)
    ledger.reported(first, "r1", "b", [OUT])
    assert ledger.copy_of("1.2.3", "aa") and not ledger.add(ONE) and not ledger.copy_of("1.2.3", "bb")
    assert ledger.collecting() == [] and len(ledger.candidates(first)) == 1
    ledger.add(replace(ONE, sha256="bb", file="b.dcm"))
    second = run(ledger)
    assert second.version == 2 and [ledger.file_of(one.id) for one in ledger.candidates(second)] == ["b.dcm"]
    assert ledger.counts()["image"] == {"matched": 1, "replaced": 1} and ledger.files() == {"a.dcm", "b.dcm"}


def test_content_that_comes_back_counts_again(ledger: Ledger) -> None:
    ledger.add(ONE)
    ledger.add(replace(ONE, sha256="bb", file="b.dcm"))
    ledger.reported(run(ledger), "r1", "b", [OUT])
    assert not ledger.copy_of("1.2.3", "aa") and ledger.add(ONE)
    second = run(ledger)
    assert second.version == 2 and [ledger.file_of(one.id) for one in ledger.candidates(second)] == ["a.dcm"]
    assert ledger.copy_of("1.2.3", "aa") and ledger.copies() == 1


def test_a_change_that_a_full_disk_ends_leaves_the_ledger_as_it_was(ledger: Ledger) -> None:
    pages = ledger._one("PRAGMA page_count")[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        for number in range(1000):
            ledger.add(replace(ONE, sop=str(number), study=str(number)))
    before = ledger.counts()
    ledger._db.execute("PRAGMA max_page_count = 100000")
    assert ledger.add(replace(ONE, sop="x", study="x")) and ledger.counts()["image"]["matched"] == before["image"].get("matched", 0) + 1


def test_what_no_protocol_matches_opens_no_job(ledger: Ledger) -> None:
    ledger.add(replace(ONE, protocol=None, reason="no protocol matches"))
    assert ledger.collecting() == [] and ledger.counts()["image"] == {"unmatched": 1}
    assert ledger.images_to_delete(1e9, 60) == [] and ledger.images_to_delete(1e9, -1) == [(1, "a.dcm")]


def test_a_job_runs_once_and_again_after_its_process_is_gone(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.add(ONE)
    job = run(ledger)
    assert ledger.take() is None and Ledger(tmp_path / "queue.db").take() is None
    ledger.free_leases()
    assert ledger.take() == job and ledger.take() is None
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 301)
    assert ledger.take() is not None  # whoever ran it has lost it
    ledger.drop(job.id)
    assert not ledger.reported(job, "r", "b", [OUT])
    ledger.set_job(job, "failed", "no image could be read")
    assert ledger.counts()["job"] == {"dropped": 1}


def test_versions_of_a_study_arrive_in_their_order_and_destinations_do_not_wait_for_each_other(ledger: Ledger) -> None:
    ledger.add(ONE)
    first = run(ledger)
    ledger.reported(first, "r1", "b", [OUT, PACS])
    ledger.add(replace(ONE, sop="1.2.4", sha256="bb"))
    second = run(ledger)
    ledger.reported(second, "r2", "b", [OUT, PACS])
    ledger.add(replace(ONE, sop="7", sha256="7", study="8"))
    other = run(ledger)
    ledger.reported(other, "r3", "b", [PACS])
    ledger.set_delivery(first, PACS, "waiting", "no association", time.time() + 60)
    found = ledger.next_delivery(PACS)
    assert found is not None and found.job.id == other.id  # not the second version of what still waits
    ledger.set_delivery(first, OUT, "done")
    assert [row["job"] for row in ledger._all("SELECT job FROM delivery WHERE state = 'done'")] == [first.id]
    found = ledger.next_delivery(OUT)
    assert found is not None and found.job.id == second.id
    ledger.set_delivery(second, OUT, "done")
    assert ledger.next_delivery(OUT) is None and ledger.counts()["job"] == {"reported": 3}
    ledger.set_delivery(other, PACS, "done")
    assert ledger.counts()["job"] == {"done": 1, "reported": 2}


def test_a_person_retries_and_drops(ledger: Ledger) -> None:
    ledger.add(ONE)
    job = run(ledger)
    ledger.reported(job, "r", "b", [OUT, PACS])
    ledger.set_delivery(job, OUT, "done")
    ledger.set_delivery(job, PACS, "refused", "the peer accepts no SR class")
    assert ledger.next_delivery(PACS) is None and ledger.rows()[0]["refused"] == "the peer accepts no SR class"
    assert ledger.retry(job.id) and ledger.next_delivery(PACS) is not None
    assert ledger.drop(job.id) and ledger.next_delivery(PACS) is None and not ledger.drop(job.id) and not ledger.retry(job.id)
    assert ledger.rows() == [] and len(ledger.rows(job.id)) == 2
    ledger.set_delivery(job, PACS, "done")  # by a sender that was at it meanwhile
    assert ledger.counts()["job"] == {"dropped": 1}


def test_images_go_when_all_jobs_of_their_study_have_ended_for_long_enough(ledger: Ledger) -> None:
    ledger.add(ONE)
    job = run(ledger)
    ledger.reported(job, "r", "b", [OUT])
    assert ledger.images_to_delete(-1, 1e9) == []
    ledger.set_delivery(job, OUT, "done")
    assert ledger.images_to_delete(60, 1e9) == [] and ledger.images_to_delete(-1, 1e9) == [(1, "a.dcm")]
    assert ledger.purge(-1) == 0  # a late image's report must name this one
    ledger.deleted([1])
    assert ledger.purge(60) == 0 and ledger.purge(-1) == 1 and ledger.counts() == {"image": {}, "job": {}, "delivery": {}}


def test_a_later_versions_file_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / "queue.db").close()
    with sqlite3.connect(tmp_path / "queue.db") as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    with pytest.raises(BundleError, match="a later version of pmclip-deploy wrote it"):
        Ledger(tmp_path / "queue.db", upgrade=True)
    assert (tmp_path / "queue.db").stat().st_mode & 0o077 == 0


def test_a_commitment_is_of_a_delivery_that_was_sent(ledger: Ledger) -> None:
    ledger.add(ONE)
    job = run(ledger)
    ledger.reported(job, '{"enhanced": ["1.9", "1.8"]}', "b", [PACS])
    job = replace(job, report='{"enhanced": ["1.9", "1.8"]}')
    ledger.set_delivery(job, PACS, "waiting", "no association")
    ledger.asking(job, PACS, "2.1", "enhanced", 0.0)
    due = ledger.next_delivery(PACS)
    assert due is not None and (due.sent, due.failed) == ("enhanced", 0) and ledger.asked("2.1") == (job.id, PACS, "1.9")
    ledger.set_delivery(job, PACS, "sent", "N-ACTION: busy")
    ledger.asking(job, PACS, "2.2", "enhanced", 0.0)
    due = ledger.next_delivery(PACS)
    assert due is not None and due.failed == 1 and ledger.is_open(job, PACS)
    assert not ledger.answered("2.3", "done", "") and ledger.answered("2.1", "done", "committed") and not ledger.answered("2.2", "done", "")
    assert ledger.counts()["job"] == {"done": 1} and ledger.next_delivery(PACS) is None
    ledger.deleted([1])
    assert ledger.purge(-1) == 1 and ledger.asked("2.1") is None


def first_version(file: Path) -> None:
    """A file of version 1 with two jobs, whose last changes lie in its log, as a process leaves it that was killed."""
    db = sqlite3.connect(file, isolation_level=None)
    db.executescript(f"PRAGMA journal_mode = WAL; {FIRST} PRAGMA user_version = 1; PRAGMA wal_checkpoint")
    for job in (1, 2):
        db.execute("INSERT INTO job VALUES (?, '9.1', 'p', ?, 0, 0, 0, '', 'r', 0, 'reported', '')", (job, job))
        db.execute("INSERT INTO delivery VALUES (?, ?, 3, 0, 0, 0, 'waiting', 'no association')", (job, PACS))
    for ending in ("", "-wal"):
        shutil.copy(f"{file}{ending}", f"{file}.killed{ending}")
    db.close()  # merges its log
    for ending in ("", "-wal"):
        Path(f"{file}.killed{ending}").replace(f"{file}{ending}")
    assert Path(f"{file}-wal").stat().st_size > 0


def versions(*files: Path) -> list[int]:
    found = []
    for file in files:
        with closing(sqlite3.connect(file)) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert db.execute("SELECT count(*) FROM delivery WHERE state = 'waiting'").fetchone() == (2,)
            found += db.execute("PRAGMA user_version").fetchone()
    return found


def test_an_earlier_versions_file_is_upgraded_by_listen_alone_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "queue.db"
    first_version(file)
    with pytest.raises(UsageError, match="an earlier version of pmclip-deploy wrote it; start `pmclip-deploy listen` once"):
        Ledger(file)
    ledger = Ledger(file, upgrade=True)
    due = ledger.next_delivery(PACS)
    assert due is not None and due.job.id == 1
    ledger.asking(replace(due.job, report='{"enhanced": ["1.9", "1.8"]}'), PACS, "2.1", "enhanced", 0.0)
    ledger.close()
    Ledger(file, upgrade=True).close()
    kept = tmp_path / "queue.db.1"
    assert versions(kept) == [1] and kept.stat().st_mode & 0o077 == 0 and sorted(tmp_path.glob("*.1-*")) == []
    # docs/howto/listen.md: back to the earlier program without the copy
    back = re.search(r"(?s)```sql\n(.*?)```", (ROOT / "docs" / "howto" / "listen.md").read_text("utf-8"))
    assert back is not None
    with closing(sqlite3.connect(file)) as db:
        db.executescript(back[1])
    assert versions(file) == [1]
    with closing(sqlite3.connect(file)) as now, closing(sqlite3.connect(kept)) as then:
        tables = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"
        assert now.execute(tables).fetchall() == then.execute(tables).fetchall()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_upgrade_that_is_killed_leaves_a_file_that_opens(tmp_path: Path) -> None:
    """Killed before each statement of SQLite that the upgrade executes, on the file and on its copy."""
    seen, number = set[tuple[int, bool]](), 0
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        file, kept = folder / "queue.db", folder / "queue.db.1"
        first_version(file)
        if (child := os.fork()) == 0:
            upgrade_until(file, number)
        _, status = os.waitpid(child, 0)
        (version,) = versions(file)
        seen.add((version, kept.exists()))
        assert not kept.exists() or versions(kept) == [1]
        Ledger(file, upgrade=True).close()
        assert versions(file, kept) == [2, 1]
        if not os.WIFSIGNALED(status):
            break
        number += 1
    assert number > 10 and seen == {(1, False), (1, True), (2, True)}


def upgrade_until(file: Path, number: int) -> None:
    """Ends this process before statement ``number``."""
    connect, left = sqlite3.connect, [number]

    def count(_: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def traced(*arguments: Any, **named: Any) -> Any:
        made = connect(*arguments, **named)
        made.set_trace_callback(count)
        return made

    try:
        sqlite3.connect = traced  # type: ignore[assignment]
        Ledger(file, upgrade=True)
    finally:
        os._exit(0)
