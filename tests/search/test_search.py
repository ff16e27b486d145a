"""Indexing and searching: what becomes a row, what a run that was cut off leaves, what an id is, and that no patient is in it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pmclip_deploy as pm
from pmclip_deploy.errors import BundleError, InputError, NoPictureError, UsageError
from pmclip_deploy.search.index import beside, index_from_file, locked
from pmclip_deploy.search.indexing import Journal, build_index, captions_of_file, delete_rows, images_of_folder
from tests.command import MAIN, Result, is_one_line, process
from tests.imports import HEAVY, loaded, run_cli
from tests.patient import PATIENT
from tests.tiny.bundle import tiny_bundle

SALT = b"sixteen bytes ok"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle", None)


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> pm.Predictor:
    return pm.load(bundle)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "x.index"


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 40 + 30 * seed, (40, 40)).astype(np.uint8)).save(path)
    return path


def ct(path: Path, **changes: Any) -> Path:
    from pydicom import dcmread
    from pydicom.data import get_testdata_file

    path.parent.mkdir(exist_ok=True, parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = dcmread(str(get_testdata_file("CT_small.dcm")))
        for keyword, value in changes.items():
            setattr(dataset, keyword, value)
        dataset.save_as(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures and a CT, below a folder and not, with spaces in their names; a note and a broken picture."""
    folder = tmp_path / "study"
    for seed in range(5):
        picture(folder / ("sub dir" if seed % 2 else "") / f"p {seed}.png", seed)
    ct(folder / "ct.dcm")
    (folder / "note.txt").write_text("no image")
    (folder / "zz.png").write_bytes(b"\x89PNG\r\n\x1a\n...")
    return folder


IDS = ["ct.dcm", "p 0.png", "p 2.png", "p 4.png", "sub dir/p 1.png", "sub dir/p 3.png"]


@pytest.fixture
def run(command: Callable[..., Result], bundle: Path) -> Callable[..., Result]:
    """`pmclip-deploy search ...`, with the tiny bundle."""

    def run(*arguments: str | Path) -> Result:
        with_bundle = ["--bundle", bundle] if arguments[0] in ("index", "query") and "--bundle" not in arguments else []
        return command("search", *arguments, *with_bundle)

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ids(path: Path) -> list[str]:
    return list(index_from_file(path).ids())


# --- a folder to rows ------------------------------------------------------------------------------------------------------------


def test_every_picture_becomes_a_row(predictor: pm.Predictor, folder: Path, index: Path) -> None:
    report = build_index(index, images_of_folder(predictor, folder))
    assert (report.embedded, report.known, report.other, report.broken) == (6, 0, 1, 1)
    assert report.unreadable[0]["message"].startswith(f"{folder / 'zz.png'}: ")
    opened = index_from_file(index)
    assert sorted(opened.ids()) == IDS and opened.about.bundle_sha256 == predictor.model.sha256
    row = list(opened.ids()).index("p 2.png")
    embedding = predictor.embed_image(folder / "p 2.png")
    assert opened.embeddings[row] == pytest.approx(embedding / np.linalg.norm(embedding), abs=1e-3)
    assert names(index.parent) == ["study", "x.index"]


def test_a_second_run_adds_what_is_new_and_leaves_what_is_there(predictor: pm.Predictor, folder: Path, index: Path) -> None:
    build_index(index, images_of_folder(predictor, folder))
    before = index.read_bytes()
    assert build_index(index, images_of_folder(predictor, folder)).known == 6 and index.read_bytes() == before
    picture(folder / "new.png", 9)
    picture(folder / "p 0.png", 8)  # another picture under an old name
    old = index_from_file(index).embeddings[ids(index).index("p 0.png")].copy()
    report = build_index(index, images_of_folder(predictor, folder))
    assert (report.embedded, report.known) == (1, 6) and sorted(ids(index)) == sorted([*IDS, "new.png"])
    assert np.array_equal(index_from_file(index).embeddings[ids(index).index("p 0.png")], old)
    delete_rows(index, ["p 0.png"])
    assert build_index(index, images_of_folder(predictor, folder)).embedded == 1
    assert not np.array_equal(index_from_file(index).embeddings[ids(index).index("p 0.png")], old)


def test_deleting_is_all_or_nothing(predictor: pm.Predictor, folder: Path, index: Path) -> None:
    build_index(index, images_of_folder(predictor, folder))
    before = index.read_bytes()
    with pytest.raises(UsageError, match=r"no row with the id nowhere\.png, so nothing was deleted"):
        delete_rows(index, ["p 0.png", "nowhere.png", "neither.png"])
    assert index.read_bytes() == before
    delete_rows(index, ["p 0.png", "sub dir/p 1.png", "p 0.png"])
    assert sorted(ids(index)) == [IDS[0], *IDS[2:4], IDS[5]]
    delete_rows(index, ids(index))
    assert ids(index) == [] and predictor.search(index, text="fracture") == []
    assert build_index(index, images_of_folder(predictor, folder)).embedded == 6


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes")
def test_a_name_that_is_no_unicode(run: Any, tmp_path: Path, index: Path) -> None:
    picture(tmp_path / "odd" / "a.png", 1).rename(os.fsdecode(os.fsencode(tmp_path / "odd") + b"/caf\xe9\n.png"))
    assert run("index", tmp_path / "odd", "--output", index).code == 0
    assert ids(index) == ["caf\\xe9\n.png"]
    assert "caf\\xe9 .png" in run("query", index, "fracture").out
    assert run("query", index, "fracture", "--json").json["matches"][0]["id"] == "caf\\xe9\n.png"


def test_what_is_whole_and_no_picture_is_not_broken(predictor: pm.Predictor, tmp_path: Path, index: Path) -> None:
    study = tmp_path / "study"
    ct(study / "report.dcm", Modality="SR")
    picture(study / "a.png", 1)
    whole = ct(tmp_path / "whole.dcm").read_bytes()
    (study / "cut.dcm").write_bytes(whole[: len(whole) - 30000])
    (study / "empty.dcm").touch()
    report = build_index(index, images_of_folder(predictor, study))
    assert (report.embedded, report.other, report.broken) == (1, 1, 2)
    with pytest.raises(NoPictureError):
        predictor.embed_image(study / "report.dcm")


def test_a_folder_that_cannot_be_listed_is_broken(
    predictor: pm.Predictor, folder: Path, index: Path, run: Any, unlisted: Any
) -> None:
    unlisted(folder / "sub dir")
    report = build_index(index, images_of_folder(predictor, folder))
    assert (report.embedded, report.other, report.broken) == (4, 1, 2)
    assert report.unreadable[0]["message"] == f"{folder / 'sub dir'}: a folder that cannot be listed (Permission denied)"
    result = run("index", folder / "sub dir", "--output", index)
    assert result.code == 3 and is_one_line(result.err) and "cannot be listed" in result.err


def test_a_file_that_may_not_be_looked_at_is_broken(
    predictor: pm.Predictor, folder: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder that can be listed and not entered."""
    stat = Path.stat

    def refuses(path: Path, **how: Any) -> os.stat_result:
        if path.parent == folder / "sub dir":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", refuses)
    report = build_index(index, images_of_folder(predictor, folder))
    assert (report.embedded, report.broken) == (4, 3) and "permission" in report.unreadable[0]["message"]


# --- uids ------------------------------------------------------------------------------------------------------------------------


def test_ids_from_uids(predictor: pm.Predictor, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "ct.dcm", folder / "copy.dcm")
    uid = "1.2.3.4.5.6.7890"
    ct(folder / "other.dcm", SOPInstanceUID=uid)
    report = build_index(tmp_path / "x", images_of_folder(predictor, folder, SALT))
    assert (report.embedded, report.known, report.other) == (2, 1, 7)
    build_index(tmp_path / "y", images_of_folder(predictor, folder, SALT))
    build_index(tmp_path / "z", images_of_folder(predictor, folder, SALT[::-1]))
    assert ids(tmp_path / "x") == ids(tmp_path / "y") and not set(ids(tmp_path / "x")) & set(ids(tmp_path / "z"))
    assert all(len(id) == 64 and not set(id) - set("0123456789abcdef") for id in ids(tmp_path / "x"))
    data = (tmp_path / "x").read_bytes()
    assert uid.encode() not in data and SALT not in data and SALT.hex().encode() not in data and b"ct.dcm" not in data
    with pytest.raises(UsageError, match="another salt"):
        build_index(tmp_path / "x", images_of_folder(predictor, folder, SALT[::-1]))


def test_the_hmac_is_the_usual_one(predictor: pm.Predictor, tmp_path: Path, index: Path) -> None:
    import hmac

    ct(tmp_path / "a" / "x.dcm", SOPInstanceUID="1.2.3")
    build_index(index, images_of_folder(predictor, tmp_path / "a", SALT))
    assert ids(index) == [hmac.new(SALT, b"1.2.3", "sha256").hexdigest()]


def test_a_file_without_a_uid_is_broken(predictor: pm.Predictor, tmp_path: Path, index: Path) -> None:
    ct(tmp_path / "a" / "x.dcm", SOPInstanceUID="")
    report = build_index(index, images_of_folder(predictor, tmp_path / "a", SALT))
    assert report.broken == 1 and "no SOP Instance UID" in report.unreadable[0]["message"] and not index.exists()


def test_salts(run: Any, folder: Path, index: Path, tmp_path: Path) -> None:
    (tmp_path / "salt").write_bytes(SALT)
    (tmp_path / "short").write_bytes(SALT[:-1])
    (tmp_path / "c.txt").write_text("plane")
    uid = ("--output", index, "--ids", "uid")
    for code, arguments in [
        (2, ["index", folder, *uid]),
        (2, ["index", folder, *uid, "--salt-file", tmp_path / "short"]),
        (2, ["index", folder, "--output", index, "--salt-file", tmp_path / "salt"]),
        (2, ["index", folder, "--output", index, "--ids", "name"]),
        (2, ["index", tmp_path / "c.txt", *uid, "--salt-file", tmp_path / "salt"]),
        (3, ["index", folder, *uid, "--salt-file", tmp_path / "nowhere"]),
        (0, ["index", folder, *uid, "--salt-file", tmp_path / "salt"]),
    ]:
        result = run(*arguments)
        assert result.code == code and (code == 0 or is_one_line(result.err)), result.err
    assert result.out == f"{index}: 1 embedded, 7 files are no DICOM pictures\n"


# --- captions --------------------------------------------------------------------------------------------------------------------


def test_captions_of_text(predictor: pm.Predictor, tmp_path: Path, index: Path) -> None:
    (tmp_path / "c.txt").write_text("\ufeffa fracture\r\n\n which plane \na fracture\nthe\n", encoding="utf-8")
    report = build_index(index, captions_of_file(predictor, tmp_path / "c.txt"))
    assert (report.embedded, report.known, report.broken) == (2, 1, 1)  # "the" has the embedding zero in the tiny tower
    assert ids(index) == ["a fracture", "which plane"] and index_from_file(index).about.embedded == "text"
    assert predictor.search(index, text="fracture")[0].id == "a fracture"


def test_captions_of_json_lines(predictor: pm.Predictor, tmp_path: Path, index: Path) -> None:
    bad = [
        "[]",
        "{",
        '{"id": "x"}',
        '{"caption": 3}',
        '{"caption": " "}',
        '{"caption": "plane", "id": ""}',
        '{"caption": "\\ud800"}',
        "[" * 5000,
    ]
    good = [{"caption": "plane", "id": "fig 1"}, {"caption": "fracture"}, {"caption": "plane", "id": "fig 2", "more": 1}]
    lines = [*bad[:4], *map(json.dumps, good), *bad[4:]]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    report = build_index(index, captions_of_file(predictor, tmp_path / "c.jsonl"))
    assert (report.embedded, report.broken) == (3, len(bad)) and ids(index) == ["fig 1", "fracture", "fig 2"]
    assert report.unreadable[0]["message"].startswith(f"{tmp_path / 'c.jsonl'}, line 1: ")


def test_captions_that_cannot_be_read(predictor: pm.Predictor, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        captions_of_file(predictor, tmp_path / "c.txt")
    with pytest.raises(InputError, match="cannot be read"):
        captions_of_file(predictor, tmp_path)


def test_an_index_stays_of_one_kind(predictor: pm.Predictor, folder: Path, tmp_path: Path, index: Path) -> None:
    build_index(index, images_of_folder(predictor, folder))
    (tmp_path / "c.txt").write_text("plane")
    with pytest.raises(UsageError, match=r"holds images with ids of kind path.*choose another"):
        build_index(index, captions_of_file(predictor, tmp_path / "c.txt"))
    with pytest.raises(UsageError, match="of kind uid"):
        build_index(index, images_of_folder(predictor, folder, SALT))


# --- a run that is cut off ---------------------------------------------------------------------------------------------------------

SLOW = """
import time
from pmclip_deploy.predictor import Predictor
embed = Predictor.embed_image
Predictor.embed_image = lambda self, image: (time.sleep(0.05), embed(self, image))[1]
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_killed_goes_on(run: Any, bundle: Path, tmp_path: Path, index: Path, sent: signal.Signals) -> None:
    for seed in range(30):
        picture(tmp_path / "many" / f"{seed:02}.png", seed % 7)
    journal, command = beside(index, "part"), ["search", "index", tmp_path / "many", "--output", index, "--bundle", bundle]
    child = subprocess.Popen([sys.executable, "-c", SLOW + MAIN, *map(str, command)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 6:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(sent)
    _, said = child.communicate(timeout=60)
    assert not index.exists() and child.returncode == (-9 if sent == signal.SIGKILL else 128 + sent)
    assert sent != signal.SIGINT or b"Run the same command to continue." in said
    with journal.open("ab") as file:
        file.write(b'{"id": "29.png", "embedd')  # torn
    kept = journal.read_bytes().count(b"\n") - 1
    assert 5 <= kept < 30
    result = run(*command[1:], "--json")
    assert (result.code, result.err) == (0, "") and (result.json["embedded"], result.json["known"]) == (30 - kept, kept)
    assert sorted(ids(index)) == [f"{seed:02}.png" for seed in range(30)] and not journal.exists()
    assert names(tmp_path) == ["many", "x.index"]
    assert run("index", tmp_path / "many", "--output", tmp_path / "again.index").code == 0
    assert np.array_equal(index_from_file(index).embeddings, index_from_file(tmp_path / "again.index").embeddings)


def test_any_torn_end_of_a_journal_is_cut_off(predictor: pm.Predictor, folder: Path, tmp_path: Path, index: Path) -> None:
    source, part = images_of_folder(predictor, folder), beside(index, "part")
    with Journal(part, source.about) as journal:
        for i, name in enumerate(IDS[:3]):
            journal.add(name, np.eye(8, dtype=np.float16)[i])
    whole = part.read_bytes()
    head = whole.index(b"\n") + 1
    for end in [*range(0, head, 20), head - 1, *range(head, len(whole), 11), len(whole)]:
        for after in (b"", b"\0\0\0\n", b"{}\n", b'{"id": "p 4.png", "embedding": "AAAA"}\n'):
            part.write_bytes(whole[:end] + (after if end >= head else b""))
            with Journal(part, source.about) as journal:
                count = whole[:end].count(b"\n") - 1 if end >= head else 0
                assert journal.ids == set(IDS[:count])
                journal.add("new", np.eye(8, dtype=np.float16)[7])
            with Journal(part, source.about) as journal:
                assert journal.ids == {*IDS[:count], "new"}
                ((rows, names),) = journal.chunks(without=frozenset())
                assert names == [*IDS[:count], "new"] and np.array_equal(rows, np.eye(8)[[*range(count), 7]])


def test_a_changed_character_of_a_journal_makes_no_row(predictor: pm.Predictor, folder: Path, tmp_path: Path, index: Path) -> None:
    build_index(tmp_path / "right.index", images_of_folder(predictor, folder))
    right, source = index_from_file(tmp_path / "right.index"), images_of_folder(predictor, folder)
    with Journal(beside(index, "part"), source.about) as journal:
        for id, row in zip(right.ids(), right.embeddings, strict=True):
            journal.add(id, row)
    whole = beside(index, "part").read_bytes()
    lines = whole.splitlines(keepends=True)
    place = whole.index(b'"embedding": "') + 20
    for changed in (
        whole[:place] + (b"B" if whole[place : place + 1] == b"A" else b"A") + whole[place + 1 :],
        whole.replace(b'"id": "', b'"id": "x', 1),
        b"".join([*lines[:2], lines[1], *lines[2:]]),  # a row twice
        b"".join([lines[0], lines[2], lines[1], *lines[3:]]),
        b"".join([lines[0], *lines[2:]]),
        lines[0] + lines[1].replace(b', "sha256"', b', "sha257"') + b"".join(lines[2:]),
    ):
        assert changed != whole
        beside(index, "part").write_bytes(changed)
        build_index(index, source)
        made = index_from_file(index)
        rows = dict(zip(made.ids(), made.embeddings.tolist(), strict=True))
        assert len(made) == len(right) and rows == dict(zip(right.ids(), right.embeddings.tolist(), strict=True))
        del made
        index.unlink()


def test_a_journal_that_changes_during_a_run_is_no_index(predictor: pm.Predictor, folder: Path, index: Path) -> None:
    with Journal(beside(index, "part"), images_of_folder(predictor, folder).about) as journal:
        for i, id in enumerate("abc"):
            journal.add(id, np.eye(8, dtype=np.float16)[i])
        journal.path.write_bytes(journal.path.read_bytes().replace(b'"id": "b"', b'"id": "d"'))
        with pytest.raises(BundleError, match="another program changed it"):
            list(journal.chunks(without=frozenset()))


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
def test_a_journal_is_private(predictor: pm.Predictor, folder: Path, index: Path) -> None:
    with Journal(beside(index, "part"), images_of_folder(predictor, folder).about):
        assert beside(index, "part").stat().st_mode & 0o777 == 0o600


def test_a_journal_of_another_run_is_refused(predictor: pm.Predictor, folder: Path, index: Path) -> None:
    with Journal(beside(index, "part"), images_of_folder(predictor, folder, SALT).about) as journal:
        journal.add("a", np.eye(8, dtype=np.float16)[0])
    before = beside(index, "part").read_bytes()
    with pytest.raises(BundleError, match=r"x\.index\.part: an unfinished run with another bundle or other settings"):
        build_index(index, images_of_folder(predictor, folder))
    assert beside(index, "part").read_bytes() == before and not index.exists()


def test_a_journal_without_rows_does_not_stay(predictor: pm.Predictor, folder: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predictor, "embeddings_of_images", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_index(index, images_of_folder(predictor, folder))
    assert names(index.parent) == ["study"]


def test_a_journal_that_outlived_its_index_is_harmless(predictor: pm.Predictor, folder: Path, index: Path, monkeypatch: Any) -> None:
    """The process died after the index appeared and before the journal went."""
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        build_index(index, images_of_folder(predictor, folder))
    assert beside(index, "part").exists()
    picture(folder / "new.png", 9)
    assert build_index(index, images_of_folder(predictor, folder)).embedded == 1
    assert sorted(ids(index)) == sorted([*IDS, "new.png"]) and not beside(index, "part").exists()


def test_a_full_disk_keeps_the_journal(predictor: pm.Predictor, folder: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(BundleError, match="No space left"):
            build_index(index, images_of_folder(predictor, folder))
    assert not index.exists()
    assert build_index(index, images_of_folder(predictor, folder)).known == 6 and sorted(ids(index)) == IDS


def test_a_second_writer_is_refused(run: Any, predictor: pm.Predictor, folder: Path, index: Path) -> None:
    build_index(index, images_of_folder(predictor, folder))
    with locked(index):
        for arguments in (["index", folder, "--output", index], ["delete", index, "ct.dcm"]):
            result = run(*arguments)
            assert result.code == 4 and is_one_line(result.err) and "another process is writing" in result.err
        assert run("query", index, "fracture").code == 0


# --- searching -------------------------------------------------------------------------------------------------------------------


def test_search(predictor: pm.Predictor, folder: Path, index: Path) -> None:
    build_index(index, images_of_folder(predictor, folder))
    opened = index_from_file(index)
    for name in IDS:
        best = predictor.search(opened, image=folder / name, k=1)[0]
        assert best.score == pytest.approx(1, abs=1e-3) and best.id == name
    by_text = predictor.search(str(index), text="plane", k=99)
    assert sorted(m.id for m in by_text) == IDS and [m.score for m in by_text] == sorted((m.score for m in by_text), reverse=True)
    brightest = max(IDS, key=lambda name: predictor.embed_image(folder / name)[0] / np.linalg.norm(predictor.embed_image(folder / name)))
    assert by_text[0].id == brightest  # the tiny text tower's "plane" points at the picture's mean
    array = np.asarray(Image.open(folder / "p 2.png"))
    assert predictor.search(opened, image=array, k=2) == predictor.search(opened, image=folder / "p 2.png", k=2)


def test_search_arguments(predictor: pm.Predictor, folder: Path, index: Path) -> None:
    build_index(index, images_of_folder(predictor, folder))
    for wrong in ({}, {"image": folder / "ct.dcm", "text": "x"}, {"text": "plane", "k": 0}, {"text": " "}):
        with pytest.raises(UsageError):
            predictor.search(index, **wrong)
    with pytest.raises(InputError, match="the query: its embedding has no direction"):
        predictor.search(index, text="the")


def test_an_index_of_another_bundle(run: Any, folder: Path, index: Path, tmp_path: Path) -> None:
    assert run("index", folder, "--output", index).code == 3  # zz.png
    other = tiny_bundle(tmp_path / "other", name="other")
    for arguments in (["query", index, "plane"], ["index", folder, "--output", index]):
        result = run(*arguments, "--bundle", other)
        assert result.code == 4 and is_one_line(result.err) and result.out == ""
        for digest in (pm.load(other).model.sha256, index_from_file(index).about.bundle_sha256):
            assert digest[:12] in result.err


# --- the command line --------------------------------------------------------------------------------------------------------------


def test_index_query_show_delete(run: Any, folder: Path, index: Path, predictor: pm.Predictor) -> None:
    result = run("index", folder, "--output", index)
    assert result.code == 3 and result.out == f"{index}: 6 embedded, 1 file is no picture, 1 could not be read\n"
    reason = f"{folder / 'zz.png'}: the PNG file is broken"
    assert result.err == f"error: {reason}; save or copy it again\n"
    assert run("index", folder, "--output", index, "--json").json == {
        "schema": "pmclip-deploy/indexing/1",
        "index": str(index),
        "embedded": 0,
        "known": 6,
        "other": 1,
        "broken": 1,
        "unreadable": [
            {
                "schema": "pmclip-deploy/unreadable/1",
                "source": str(folder / "zz.png"),
                "code": "input",
                "message": reason,
                "hint": "save or copy it again",
            }
        ],
    }
    (folder / "zz.png").unlink()
    again = run("index", folder, "--output", index)
    assert again.code == 0 and again.out == f"{index}: 0 embedded, 6 skipped because the index has their ids, 1 file is no picture\n"
    shown = run("query", index, folder / "p 2.png", "--k", "2")
    assert shown.code == 0 and "1.000" in shown.out and shown.out.count(".png") + shown.out.count(".dcm") == 2
    found = run("query", index, folder / "ct.dcm", "--frame", "0", "--window", "40", "400", "--json").json
    assert list(found) == ["schema", "query", "matches", "index", "model", "timings_ms"] and found["schema"] == "pmclip-deploy/search/1"
    assert found["query"] == {"image": str(folder / "ct.dcm")} and set(found["timings_ms"]) == {"index", "search", "total"}
    assert len(found["matches"]) == 6 and set(found["matches"][0]) == {"id", "score"} and found["model"]["sha256"] == predictor.model.sha256
    assert run("query", index, "plane", "--json").json["query"] == {"text": "plane"}
    about = run("show", index, "--json").json
    assert about == {"schema": "pmclip-deploy/index/1", **found["index"]} and (about["rows"], about["dim"], about["verified"]) == (
        6,
        8,
        True,
    )
    assert "6 images, 8 numbers each" in run("show", index).out
    assert run("delete", index, "p 0.png", "ct.dcm", "--json").json["deleted"] == 2
    assert run("show", index, "--json").json["rows"] == 4 and run("delete", index, "p 2.png").code == 0


def test_exit_codes(run: Any, folder: Path, index: Path, tmp_path: Path) -> None:
    run("index", folder, "--output", index)
    (tmp_path / "empty").mkdir()
    (tmp_path / "useless").mkdir()
    (tmp_path / "useless" / "a.txt").write_text("x")
    (tmp_path / "useless" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "cut.index").write_bytes(index.read_bytes()[:-1])
    assert run("query", index, " ").err == 'error: the text is empty; give one, for example "chest x-ray"\n'
    cases = [
        (3, ["index", tmp_path / "empty", "--output", tmp_path / "e"]),
        (3, ["index", tmp_path / "useless", "--output", tmp_path / "e"]),
        (3, ["index", tmp_path / "nowhere", "--output", tmp_path / "e"]),
        (2, ["index", folder / "ct.dcm", "--output", tmp_path / "e"]),
        (2, ["index", folder]),
        (4, ["index", folder, "--output", tmp_path / "no" / "folder"]),
        (2, ["index", folder, "--output", tmp_path]),
        (4, ["index", folder, "--output", tmp_path / "cut.index"]),
        (3, ["query", index, "nowhere.dcm"]),
        (3, ["query", index, "scans/nowhere"]),
        (3, ["query", index, "ct/mri"]),
        (2, ["query", index, folder / "ct.dcm", "--text", "--frame", "0"]),
        (3, ["query", index, folder]),
        (3, ["query", index, f"{folder}/"]),
        (2, ["query", index, "which", "plane"]),
        (4, ["query", index, folder / "ct.dcm", folder / "p 0.png"]),  # the first of two images is no index
        (3, ["query", index, folder / "zz.png"]),
        (2, ["query", index, ""]),
        (2, ["query", index, "plane", "--k", "0"]),
        (2, ["query", index, "plane", "--frame", "0"]),
        (4, ["query", tmp_path / "nowhere", "plane"]),
        (4, ["query", tmp_path / "cut.index", "plane"]),
        (4, ["show", tmp_path / "cut.index"]),
        (4, ["show", folder / "ct.dcm"]),
        (4, ["delete", tmp_path / "cut.index", "x"]),
        (2, ["delete", index, "x"]),
        (2, ["delete", index]),
    ]
    before = names(tmp_path)
    for code, arguments in cases:
        result = run(*arguments)
        assert (result.code, result.out) == (code, "") and is_one_line(result.err), (arguments, result.err)
    assert names(tmp_path) == before


def test_a_text_may_look_like_a_file(run: Any, folder: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("index", folder, "--output", index)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plane").mkdir()
    refused = run("query", index, "plane")
    assert refused.code == 3 and is_one_line(refused.err) and "plane: is a folder, not an image" in refused.err and "--text" in refused.err
    assert run("query", index, "plane", "--text", "--json").json["query"] == {"text": "plane"}
    picture(tmp_path / "fracture.png", 1).rename("fracture")
    assert run("query", index, "fracture", "--json").json["query"] == {"image": "fracture"}
    for text in ("fracture", "ct/mri", "plane.png"):
        assert run("query", index, text, "--text", "--json").json["query"] == {"text": text}


def test_control_characters_in_an_id_do_not_reach_the_terminal(run: Any, tmp_path: Path, index: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"caption": "plane", "id": "\x1b[2Ja\nb"}))
    run("index", tmp_path / "c.jsonl", "--output", index)
    for arguments in (["query", index, "plane"], ["delete", index, "\x1b[2J"]):
        result = run(*arguments)
        assert "\x1b" not in result.out + result.err
    assert run("query", index, "plane", "--json").json["matches"][0]["id"] == "\x1b[2Ja\nb"


@pytest.mark.parametrize("command", [[], ["index"], ["query"], ["delete"], ["show"]])
def test_help_loads_next_to_nothing(command: list[str]) -> None:
    assert not loaded(run_cli("search", *command, "--help")) & HEAVY


def test_a_pipe_gets_no_progress_bar(folder: Path, bundle: Path, index: Path) -> None:
    result = process("search", "index", folder, "--output", index, "--bundle", bundle, "--json")
    assert result.code == 3 and result.json["embedded"] == 6 and is_one_line(result.err) and "\r" not in result.err


def test_no_patient_attribute_is_stored_or_printed(bundle: Path, tmp_path: Path) -> None:
    study, uid = tmp_path / "study", "1.2.826.0.99999"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = ct(study / "a.dcm", **PATIENT, SOPInstanceUID=uid).read_bytes()
        ct(study / "b.dcm", **PATIENT, SOPInstanceUID=uid + ".1", ImageType=["ZQXTYPE"], PixelRepresentation=7, Rows=0)
    (study / "c.dcm").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "salt").write_bytes(SALT)
    common = ("search", "index", study, "--bundle", bundle, "--output")
    for name, options in (("p.index", []), ("u.index", ["--ids", "uid", "--salt-file", tmp_path / "salt"])):
        path = tmp_path / name
        # the journal stays where the index cannot be written
        code = "import os; os.fsync = lambda handle: (_ for _ in ()).throw(OSError(5, 'x'))\n" + MAIN
        cut = subprocess.run([sys.executable, "-c", code, *map(str, [*common, path, *options])], capture_output=True, timeout=60)
        assert cut.returncode == 4 and beside(path, "part").exists()
        seen = beside(path, "part").read_bytes() + cut.stdout + cut.stderr
        result = process(*common, path, *options, "--debug", PYTHONWARNINGS="always")
        asked = process("search", "query", path, study / "a.dcm", "--bundle", bundle, "--json")
        assert (result.code, asked.code, len(ids(path))) == (3, 0, 1), result.err + asked.err
        seen += path.read_bytes() + (result.out + result.err + asked.out + asked.err).encode()
        assert b"ZQX" not in seen and b"18990102" not in seen and uid.encode() not in seen and SALT not in seen
