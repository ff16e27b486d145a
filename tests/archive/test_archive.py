"""An archive to rows: each row is right, none is lost or doubled however a run ends, and no patient is in them."""

import hmac
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="needs the extra `archive`")

import pyarrow.parquet as pq

import pmclip_deploy as pm
from pmclip_deploy.archive import engines, worker
from pmclip_deploy.archive.engines import Size, local
from pmclip_deploy.archive.listing import Item, items_of
from pmclip_deploy.archive.output import Output
from pmclip_deploy.archive.run import Report, build_archive
from pmclip_deploy.archive.tables import About, schema_of
from pmclip_deploy.benchmarks.archive import batches
from pmclip_deploy.child import Child
from pmclip_deploy.errors import BundleError, DeviceError, InputError, UsageError
from pmclip_deploy.search.index import index_from_file, locked, unit
from pmclip_deploy.tuning import Choice, Plan, save_own
from tests.archive.poison import PoisonedOnRay
from tests.command import MAIN, Result, is_one_line
from tests.patient import PATIENT
from tests.report import orthanc
from tests.search.test_search import ct, picture
from tests.sources import ROOT

QUESTIONS = ("what imaging modality is this?", "is there a fracture?")
SALT = b"sixteen bytes ok"


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> pm.Predictor:
    return pm.load(bundle)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six pictures, a CT, a note and a broken picture."""
    folder = tmp_path / "source"
    for seed in range(6):
        picture(folder / ("sub" if seed % 2 else "") / f"p {seed}.png", seed)
    ct(folder / "ct.dcm")
    (folder / "note.txt").write_text("no image")
    (folder / "zz.png").write_bytes(b"\x89PNG\r\n\x1a\n...")
    return folder


@pytest.fixture
def make(predictor: pm.Predictor, bundle: Path) -> Callable[..., Report]:
    def make(source: object, out: Path, what: str = "embed", salt: bytes | None = None, **options: Any) -> Report:
        model, size = predictor.model, options.pop("size", Size(2, 2))
        ids = "path" if salt is None else "uid"
        about = About(what, model.bundle, model.version, model.precision, model.sha256, ids, "", QUESTIONS if what == "ask" else ())
        options = {"engine": here, "bundle": bundle, **options}
        return build_archive(str(source), out, about, predictor.manifest, size, threads=1, salt=salt, **options)

    return make


def here(job: worker.Job, files: Any, size: Size) -> Iterator[worker.Done]:
    """An engine in this process: others take long to import what they need."""
    one = worker.Worker(job)
    yield from map(one.run, engines.items_of_files(files, size.batch))
    one.close()


def rows(out: Path) -> dict[str, Any]:
    """By id; there is one row each."""
    found = pq.read_table(out).to_pylist()
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


# --- rows ------------------------------------------------------------------------------------------------------------------------


def test_embeddings(make: Callable[..., Report], predictor: pm.Predictor, source: Path, tmp_path: Path) -> None:
    assert make(source, tmp_path / "out") == Report(listed=9, known=0, computed=9, failed=2)
    found = rows(tmp_path / "out")
    assert set(found) == {*(f"{'sub/' if seed % 2 else ''}p {seed}.png" for seed in range(6)), "ct.dcm", "note.txt", "zz.png"}
    for id, row in found.items():
        if id in ("note.txt", "zz.png"):
            assert row["embedding"] is None and row["frame"] is None
            assert row["status"] == ("no picture" if id == "note.txt" else "unreadable")
            assert row["reason"].startswith("the image: ") and str(tmp_path) not in row["reason"]
        else:
            expected = unit(predictor.embed_image(source / id), id)
            assert (row["status"], row["frame"]) == ("ok", 0) and np.array_equal(np.array(row["embedding"], np.float16), expected)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_archive.json", "part-00000.parquet"]


def test_batches_that_tune_chose(
    make: Callable[..., Report], bundle: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is the same, however the images are divided among workers, and where some of them cannot be read."""
    monkeypatch.setenv("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_own(bundle, [Plan({}, 9.0, 9.0, 9.0), Plan({"image": Choice("cpu", batch=4)}, 1.0, 1.0, 1.0)])
    tuned = pm.load(bundle)
    assert tuned.towers.tuned == {"image": 4}
    made = [make(source, tmp_path / str(size), device="auto", size=Size(1, size)) and rows(tmp_path / str(size)) for size in (2, 9, 64)]
    assert made[0] == made[1] == made[2] and {row["status"] for row in made[0].values()} == {"ok", "no picture", "unreadable"}
    read = [id for id, row in made[0].items() if row["status"] == "ok"]
    embeddings = tuned.embed_images(source / id for id in read)
    assert all(np.array_equal(np.array(made[0][id]["embedding"], np.float16), unit(x, id)) for id, x in zip(read, embeddings, strict=True))


def test_answers(make: Callable[..., Report], predictor: pm.Predictor, source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "out", "ask")
    found = pq.read_table(tmp_path / "out").to_pylist()
    assert len(found) == 7 * 2 + 2
    for row in found:
        if row["status"] not in ("ok", "abstained"):
            assert row["question"] is None
            continue
        answer = predictor.ask(source / row["id"], row["question"])
        assert (row["answer"], row["source"], row["reason"], row["note"]) == (answer.answer, answer.source, answer.reason, answer.note)
        assert row["probability"] == (None if answer.probability is None else np.float32(answer.probability))


def test_findings_with_their_strata(shared: Path, tmp_path: Path) -> None:
    """The embedded model, on two radiographs."""
    predictor, folder = pm.load(), tmp_path / "films"
    folder.mkdir()
    for file in sorted((shared / "fracatlas" / "images").iterdir())[:2]:
        (folder / file.name).symlink_to(file)
    model = predictor.model
    about = About("findings", model.bundle, model.version, model.precision, model.sha256, "path")
    build_archive(str(folder), tmp_path / "out", about, predictor.manifest, Size(1, 8))
    for row in pq.read_table(tmp_path / "out").to_pylist():
        answer = predictor.ask(folder / row["id"], f"is there {'a ' if row['finding'] == 'fracture' else ''}{row['finding']}?")
        assert row["answer"] == answer.answer
        if answer.worth is not None:
            assert row["stratum"] == answer.worth.stratum and row["sensitivity"] == np.float32(answer.worth.sensitivity)


def test_no_patient_anywhere(make: Callable[..., Report], tmp_path: Path) -> None:
    """The ids are hashes of UIDs; what cannot be read has a hash of its path."""
    for number in range(3):
        ct(tmp_path / "in" / f"ZQXFILE{number}.dcm", **PATIENT, SOPInstanceUID=f"1.2.3.{number}")
    (tmp_path / "in" / "ZQXBROKEN.dcm").write_bytes((tmp_path / "in" / "ZQXFILE0.dcm").read_bytes()[:9000])
    make(tmp_path / "in", tmp_path / "out", "ask", salt=SALT)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    held = b"".join(path.read_bytes() for path in files) + json.dumps(pq.read_table(tmp_path / "out").to_pylist()).encode()
    assert b"ZQX" not in held and b"1.2.3." not in held and len(set(pq.read_table(tmp_path / "out")["id"].to_pylist())) == 4


# --- sources ---------------------------------------------------------------------------------------------------------------------


def test_lists_and_dicomdirs(source: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("source/ct.dcm\nsource/sub/p 1.png\nsource/gone.png\n")
    assert [item.id for item in items_of(str(tmp_path / "list.txt"))] == [
        str(tmp_path / "source" / name) for name in ("ct.dcm", "sub/p 1.png", "gone.png")
    ]
    from pydicom.fileset import FileSet

    files = FileSet()
    files.add(ct(source / "one.dcm"))
    files.write(tmp_path / "disc")
    (item,) = items_of(str(tmp_path / "disc" / "DICOMDIR"))
    assert Path(item.source).is_file() and Path(item.source) == tmp_path / "disc" / item.id


def test_what_orthanc_holds_by_dicomweb(predictor: pm.Predictor, bundle: Path, tmp_path: Path) -> None:
    files = [ct(tmp_path / f"{n}.dcm", SOPInstanceUID=f"1.2.3.{n}", StudyInstanceUID=f"1.2.4.{n % 2}", PatientName="ZQX") for n in range(3)]
    (tmp_path / "salt").write_bytes(SALT)
    command = [*orthanc.apart(), sys.executable, "-m", "tests.archive.orthanc_web", tmp_path / "orthanc", bundle, tmp_path / "out"]
    done = subprocess.run([*command, tmp_path / "salt", *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert (first["computed"], first["failed"], second["known"], second["computed"]) == (3, 0, 3, 0)
    expected = {hmac.digest(SALT, f"1.2.3.{n}".encode(), "sha256").hex(): file for n, file in enumerate(files)}
    found = rows(tmp_path / "out")
    assert set(found) == set(expected)
    for id, row in found.items():
        assert np.array_equal(np.array(row["embedding"], np.float16), unit(predictor.embed_image(expected[id]), id))


@pytest.mark.parametrize("name", ["gone", "ct.dcm", "empty"])
def test_sources_that_are_none(make: Callable[..., Report], source: Path, name: str, tmp_path: Path) -> None:
    (source / "empty").mkdir()
    with pytest.raises(UsageError if name == "ct.dcm" else InputError):
        make(source / name, tmp_path / "out")


def test_a_hundred_thousand_files_are_listed_in_little_memory(predictor: pm.Predictor, tmp_path: Path) -> None:
    about = About("embed", "b", "1", "int8", "0" * 64, "path")
    (tmp_path / "out").mkdir()
    output = Output(tmp_path / "out", about, schema_of(about, 8))
    output.list(Item(str(i), str(i), i) for i in range(5000))
    before = peak_memory()
    files, new, count = output.list(Item(f"folder/{i:07}.dcm", f"/archive/folder/{i:07}.dcm", i) for i in range(100_000))
    assert (new, count, len(files)) == (100_000, 100_000, 25) and peak_memory() - before < 16 << 10
    assert [len(items) for items in engines.items_of_files(files[:1], 1000)] == [1000] * 4 + [96]


def peak_memory() -> int:
    """KiB"""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- runs that end early -----------------------------------------------------------------------------------------------------------


def test_a_second_run_computes_what_is_new(make: Callable[..., Report], source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "out", engine=local)
    before = rows(tmp_path / "out")
    picture(source / "new.png", 9)
    picture(source / "p 0.png", 11)  # it changed: both pictures have a row
    assert make(source, tmp_path / "out") == Report(listed=10, known=8, computed=2, failed=0)
    found = pq.read_table(tmp_path / "out").to_pylist()
    assert Counter(row["id"] for row in found) == Counter([*before, "new.png", "p 0.png"])


@pytest.mark.parametrize("kills", [(6,), pytest.param((6, 12, 18), marks=pytest.mark.nightly)])
def test_killed_runs_lose_and_double_nothing(bundle: Path, tmp_path: Path, kills: tuple[int, ...]) -> None:
    """The driver is killed when so many of 20 batches lie there; its workers end by themselves."""
    for seed in range(40):
        picture(tmp_path / "in" / f"{seed}.png", seed % 7)
    out = tmp_path / "out"
    command = [sys.executable, "-c", MAIN, "archive", "embed", tmp_path / "in", "--out", out, "--batch", "2", "--workers", "2"]
    command += ["--bundle", bundle]
    kept = 0
    for least in kills:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            if batches(out) >= least:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = least
    done = subprocess.run([*command, "--json"], capture_output=True, timeout=120)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["listed"] == 40 and report["known"] >= 2 * kept
    assert len(rows(out)) == 40 and sorted(path.name for path in out.iterdir() if path.suffix != ".parquet") == ["_archive.json"]


def test_a_kill_between_a_part_and_its_batches_doubles_nothing(
    make: Callable[..., Report], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse_batches)
        with pytest.raises(BundleError):
            make(source, tmp_path / "out")
    assert [*(tmp_path / "out").glob("part-*")] and [*(tmp_path / "out").glob(".run/*/*.parquet")]
    assert make(source, tmp_path / "out").known == 9
    assert len(rows(tmp_path / "out")) == 9


def refuse_batches(path: Path, missing_ok: bool = False) -> None:
    if path.suffix == ".parquet":
        raise OSError(5, "Input/output error")
    if path.exists():
        path.rename(path.with_name(f"{path.name}.gone"))


def test_a_file_that_ends_its_decoder_is_a_row(
    make: Callable[..., Report], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(source / "ends-decoder.png", 1)
    monkeypatch.setattr(worker, "DECODER", "tests.archive.poison")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert make(source, tmp_path / "out").failed == 3
    row = rows(tmp_path / "out")["ends-decoder.png"]
    assert (row["status"], row["reason"]) == ("killed", "the process that decoded it ended twice")


def test_an_image_that_ends_its_worker_is_a_row(
    make: Callable[..., Report], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(source / "ends-worker.png", 1)
    monkeypatch.setattr(engines, "WORKER", "tests.archive.poison")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    make(source, tmp_path / "out", size=Size(1, 4), engine=local)
    found = rows(tmp_path / "out")
    assert found["ends-worker.png"]["status"] == "killed" and sum(row["status"] == "ok" for row in found.values()) == 7


def test_a_process_imports_nothing_from_the_folder_it_runs_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pydicom.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    child = Child("pmclip_deploy.archive.reading")
    child.call(60, "warm_up")
    child.close()


def test_what_the_folder_may_hold(make: Callable[..., Report], source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "out")
    with pytest.raises(UsageError, match="holds another archive: its command, questions differ"):
        make(source, tmp_path / "out", "ask")
    with pytest.raises(UsageError, match="is not empty, and holds no archive"):
        make(source, source)
    with locked(tmp_path / "out" / "_archive"), pytest.raises(BundleError, match="another process is writing to it"):
        make(source, tmp_path / "out")


# --- the command, the index, and Ray -----------------------------------------------------------------------------------------------


def test_an_index_of_an_archive(command: Callable[..., Result], bundle: Path, source: Path, tmp_path: Path) -> None:
    """It is the one that `search index` makes of the images."""
    of_archive, of_images, out = tmp_path / "a.index", tmp_path / "b.index", tmp_path / "out"
    assert command("archive", "embed", source, "--out", out, "--workers", "1", "--bundle", bundle).code == 0
    assert command("search", "index", out, "--output", of_archive).out.endswith("a.index: 7 embedded\n")
    command("search", "index", source, "--output", of_images, "--bundle", bundle)
    ours, theirs = ({index.id(row): bytes(index.embeddings[row].data) for row in range(len(index))} for index in
                    (index_from_file(of_archive), index_from_file(of_images)))  # fmt: skip
    assert ours == theirs and index_from_file(of_archive).about == index_from_file(of_images).about
    assert command("search", "index", out, "--output", of_archive).out.endswith("0 embedded, 7 skipped because the index has their ids\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("embed", "-Q", "is this a CT?"), "--question go together"),
        (("ask",), "--question go together"),
        (("dream",), "is unknown"),
        (("embed", "--num-gpus", "1"), "are for --engine ray"),
        (("embed", "--ids", "uid"), "go together"),
        (("embed", "--engine", "spark"), "is unknown"),
    ],
)
def test_mistakes_of_usage(command: Callable[..., Result], source: Path, arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    made = command("archive", arguments[0], source, "--out", tmp_path / "out", *arguments[1:])
    assert made.code == 2 and said in made.err and is_one_line(made.err) and not (tmp_path / "out").exists()


def test_a_ray_cluster_that_is_not_there(command: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    if find_spec("ray") is None:  # an import would be one too early for the cluster of the next test
        pytest.skip("needs the extra `ray`")
    for address in ("127.0.0.1:1", "nonsense"):
        made = command("archive", "embed", source, "--out", tmp_path / "out", "--engine", "ray", "--ray-address", address)
        told = f"{address}: no Ray cluster took this process in; check --ray-address"
        assert made.code == 6 and told in made.err and made.err.count("\n") == 2  # after "9 images to do"


@pytest.mark.nightly  # starts a Ray cluster
def test_rays_rows_equal_the_local_ones(
    make: Callable[..., Report], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("ray") is None:
        pytest.skip("needs the extra `ray`")
    from functools import partial

    on_ray = partial(engines.on_ray, address=None, cpus=1, gpus=0)
    assert make(source, tmp_path / "ray", "ask", engine=on_ray) == make(source, tmp_path / "local", "ask", engine=local)
    tables = [pq.read_table(tmp_path / name) for name in ("ray", "local")]
    first, second = (table.sort_by([("key", "ascending"), ("question", "ascending")]).replace_schema_metadata() for table in tables)
    assert first.equals(second)
    with pytest.raises(DeviceError, match="has 1 CPUs and 99 GPUs"):  # Ray would wait for such a machine
        make(source, tmp_path / "gpus", engine=partial(engines.on_ray, address=None, cpus=1, gpus=99))
    picture(source / "ends-worker.png", 1)
    monkeypatch.setattr(engines, "RayWorker", PoisonedOnRay)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    make(source, tmp_path / "poison", size=Size(1, 4), engine=on_ray)
    assert rows(tmp_path / "poison")["ends-worker.png"]["status"] == "killed"
