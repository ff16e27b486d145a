"""The ledger: states, versions, copies, leases, and the order of deliveries."""

import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from pmclip_deploy.errors import BundleError
from pmclip_deploy.node.ledger import Arrival, Job, Ledger

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
    assert found is not None and found[0].id == other.id  # not the second version of what still waits
    ledger.set_delivery(first, OUT, "done")
    assert [row["job"] for row in ledger._all("SELECT job FROM delivery WHERE state = 'done'")] == [first.id]
    found = ledger.next_delivery(OUT)
    assert found is not None and found[0].id == second.id
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
        db.execute("PRAGMA user_version = 2")
    with pytest.raises(BundleError, match="a later version of pmclip-deploy wrote it"):
        Ledger(tmp_path / "queue.db")
    assert (tmp_path / "queue.db").stat().st_mode & 0o077 == 0
