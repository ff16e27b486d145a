"""What a tuning chooses, when it is used, and the life of its file. How it is measured: tests/benchmarks/test_tune.py."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pmclip_deploy as pm
from pmclip_deploy import tuning
from pmclip_deploy.bundle.files import verify_bundle
from pmclip_deploy.cli.app import COMMANDS
from pmclip_deploy.errors import UsageError
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.sessions import SessionOptions, backends
from pmclip_deploy.sessions import onnxruntime as ort
from pmclip_deploy.threads import processor
from pmclip_deploy.towers import STEP
from pmclip_deploy.tuning import Choice, Plan, choices_of, forget, plan_for, save, save_own, tuning_file
from tests.imports import run_cli
from tests.tiny.bundle import tiny_bundle

CACHE = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
PIXELS = np.zeros((20, 20), np.uint8)
ONE_THREAD = Choice("cpu", threads=1)
PLANS = [Plan({}, 500.0, 9.0, 9.0), Plan({"image": ONE_THREAD, "text": ONE_THREAD}, 100.0, 3.0, 3.0)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "pmclip-deploy"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A bundle of this test alone."""
    return tiny_bundle(tmp_path / "bundle")


def content_of(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*")}


# --- what it chooses ------------------------------------------------------------------------------------------------------------

DEFAULT, SOON = Plan({}, 600.0, 10.0, 10.0), Plan({"image": ONE_THREAD}, 500.0, 20.0, 20.0)
FAST = Plan({"text": ONE_THREAD}, 900.0, 4.0, 6.0)
IN_BATCHES = Plan({"image": ONE_THREAD._replace(batch=16)}, 900.0, 11.0, 2.0)


@pytest.mark.parametrize(
    ("plans", "items", "chosen"),
    [
        ([DEFAULT, SOON, FAST], 1, SOON),
        ([DEFAULT, SOON, FAST], 0, SOON),  # an empty folder
        ([DEFAULT, SOON, FAST], 9, DEFAULT),  # 680 ms, beside 660, of which the opening counts more since it varies
        ([DEFAULT, SOON, FAST], 100, FAST),
        ([DEFAULT, SOON, FAST], None, FAST),
        ([DEFAULT], None, DEFAULT),
        ([DEFAULT, Plan({"image": ONE_THREAD}, 590.0, 10.0, 10.0)], 1, DEFAULT),  # too little to be sure
        ([DEFAULT, Plan({"image": ONE_THREAD}, 560.0, 10.0, 10.0)], 1, Plan({"image": ONE_THREAD}, 560.0, 10.0, 10.0)),
        ([DEFAULT, Plan({"text": ONE_THREAD}, 600.0, 10.0, 10.0)], None, DEFAULT),
        ([DEFAULT, IN_BATCHES, FAST], None, IN_BATCHES),  # 11 x 2 is less than 10 x 10 and 4 x 6
        ([DEFAULT, IN_BATCHES, FAST], 2000, FAST),
    ],
)
def test_the_choice_for_so_many_pictures(plans: list[Plan], items: int | None, chosen: Plan) -> None:
    assert plan_for(plans, items) == chosen


# --- when it is used ------------------------------------------------------------------------------------------------------------


def threads_of(predictor: pm.Predictor) -> int:
    return int(predictor._sessions["image"]._session.get_session_options().intra_op_num_threads)  # type: ignore[attr-defined]


def test_it_is_used_and_named_and_a_device_by_name_wins(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "cpu_threads", lambda: 2)
    before, plain = content_of(own), pm.load(own).ask(PIXELS, "is there a fracture?")
    save(own, PLANS)
    tuned = pm.load(own)
    assert (threads_of(tuned), threads_of(pm.load(own, "cpu")), tuned.notes) == (1, 2, [])
    assert str(tuned.model) == "tiny 0.0.1, fp32, onnxruntime on cpu" and tuned.model == plain.model
    answer = tuned.ask(PIXELS, "is there a fracture?")
    assert (answer.answer, answer.probability) == (plain.answer, pytest.approx(plain.probability))
    assert content_of(own) == before and verify_bundle(own)


def test_batches_that_were_chosen(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture's embedding has the same bits whatever is beside it; a text's whether it is alone or not."""
    save(own, [PLANS[0], Plan({name: Choice("cpu", batch=4) for name in ("image", "text")}, 100.0, 3.0, 1.0)])
    plain, tuned = pm.load(own, "cpu"), pm.load(own)
    pictures = [np.random.default_rng(seed).integers(0, 255, (20, 20 + seed)).astype(np.uint8) for seed in range(11)]
    texts = [f"is there a fracture{' ?' * (i % 5)}{' a' * (i // 5)}" for i in range(11)]
    assert tuned.towers.tuned == {"image": 4, "text": 4} and plain.towers.tuned == {}
    whole, asked = tuned.embed_images(pictures), tuned.embed_texts(texts)
    for some in (range(11), range(10, -1, -1), [7], [2, 9, 4], [1, 3, 5, 7, 9]):
        assert np.array_equal(tuned.embed_images(pictures[i] for i in some), whole[list(some)])
        tuned.towers.forget_texts()
        assert np.array_equal(tuned.embed_texts([texts[i] for i in some]), asked[list(some)])
    assert np.allclose(whole, plain.embed_images(pictures), atol=1e-5) and np.allclose(asked, plain.embed_texts(texts), atol=1e-5)
    assert np.array_equal(list(tuned.features_of_images(pictures)), whole)
    lengths = ({p.towers.tokens(text).shape[1] for text in texts} for p in (tuned, plain))
    assert [{length % STEP for length in of} == {0} for of in lengths] == [True, False]


def test_the_count_of_pictures_decides(own: Path, command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, seen = tmp_path / "pictures", list[int | None]()
    monkeypatch.setattr("pmclip_deploy.opening.choices_of", lambda path, items, notes: seen.append(items) or {})
    asked.mkdir()
    for name in "ab":
        pm.load(own)  # None: as many as one likes
        (asked / f"{name}.png").write_bytes(PNG)
    one = asked / "a.png"
    for arguments in (
        ["infer", one, "is there a fracture?"],
        ["infer", asked, "is there a fracture?"],
        ["infer", asked, one, "which plane?"],
    ):
        assert command(*arguments, "--bundle", own).code == 0
    assert command("classify", asked, "ct", "mri", "--bundle", own).code == 0
    assert seen == [None, None, 1, 2, 3, 2]


PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU\x00\x00\x00\nIDATx\x9cc\xf8\x0f\x00\x01\x01"
    b"\x01\x00\x1b\xb6\xeeV\x00\x00\x00\x00IEND\xaeB`\x82"
)


def test_what_went_since_is_said_and_runs_as_before(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that refuses a graph, once the tuning itself is known to fit."""
    save(own, [PLANS[0], Plan({"image": Choice("cuda", batch=4), "text": ONE_THREAD}, 1.0, 1.0, 1.0)])
    predictor = pm.load(own)
    if predictor.model.device == "cuda":
        pytest.skip("has a GPU")
    (note,) = predictor.notes
    assert "has no CUDA here" in note and note.endswith("; meanwhile the graph image runs as without a tuning")
    assert predictor.ask(PIXELS, "is there a fracture?").model.backend == "onnxruntime"
    assert predictor.towers.tuned == {}  # nobody looked at batches in what runs instead


def test_without_a_tuning_nothing_is_read_and_one_module_imported(own: Path, tmp_path: Path) -> None:
    code = """
import json, sys
opened, seen = [], set()
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
import pmclip_deploy as pm
pm.load(sys.argv[1], sys.argv[2], single_use=True).embed_image(sys.argv[3])
print(json.dumps([sorted(opened), sorted(sys.modules)]))
"""
    (tmp_path / "a.png").write_bytes(PNG)
    runs = [[sys.executable, "-c", code, str(own), device, str(tmp_path / "a.png")] for device in ("cpu", "auto")]
    subprocess.run(runs[0], check=True, capture_output=True)  # compiles modules
    (files, modules), (with_auto, all_modules) = (json.loads(subprocess.run(x, check=True, capture_output=True).stdout) for x in runs)
    assert {*with_auto} <= {*files} and {*all_modules} <= {*modules}


def test_help_loads_as_little_as_before() -> None:
    from tests.imports import HEAVY, loaded

    assert "tune" in COMMANDS and not loaded(run_cli("tune", "--help")) & HEAVY


# --- its file -------------------------------------------------------------------------------------------------------------------


def test_it_stands_beside_the_bundle_and_the_embedded_ones_in_the_cache(own: Path, cache: Path) -> None:
    assert tuning_file(own) is None and tuning_file(DEFAULT_BUNDLE) is None
    file = save(own, PLANS)
    assert file.parent == own.with_name("bundle.tuning") and tuning_file(own) == file
    assert choices_of(own, None, []) == PLANS[1].graphs == choices_of(own, 1, [])
    assert save(DEFAULT_BUNDLE, PLANS).is_relative_to(cache / "tuning")
    link = own.with_name("current")
    link.symlink_to(own)
    assert tuning_file(link) == file
    document = json.loads(file.read_text())
    assert (document["schema"], document["processor"]) == ("pmclip-deploy/tuning/2", processor())
    assert document["versions"] == {"onnxruntime": backends()["onnxruntime"].version()}


def test_where_nothing_can_be_written_beside_it_goes_to_the_cache(own: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save_own(own, PLANS)
    own.with_name("bundle.tuning").write_text("in the way")
    file = save(own, PLANS)
    assert file == old and file.is_relative_to(cache / "tuning") and choices_of(own, None, []) == PLANS[1].graphs
    own.with_name("bundle.tuning").unlink()
    assert save(own, PLANS).parent == own.with_name("bundle.tuning") and not old.exists()  # one that came first would hide it
    monkeypatch.setenv(CACHE, str(own / "manifest.json"))
    with pytest.raises(UsageError, match=r"the tuning cannot be written .*; set XDG_CACHE_HOME"):
        save_own(own, PLANS)


def test_the_users_own_comes_first_and_forget_removes_both(own: Path, cache: Path, command: Callable[..., Any]) -> None:
    beside, mine = save(own, PLANS), save_own(own, [PLANS[0]])
    assert tuning_file(own) == mine and choices_of(own, None, []) == {}
    (beside.parent / "of another processor.json").write_text("{}")
    assert forget(own) == [mine, beside] and forget(own) == []
    assert not mine.parent.exists() and [file.name for file in beside.parent.iterdir()] == ["of another processor.json"]
    save(own, PLANS)
    done = command("tune", own, "--forget")
    assert (done.code, done.err) == (0, "") and done.out == f"removed {beside}\n"
    assert command("tune", own, "--forget", "--json").json == {"schema": "pmclip-deploy/tune/1", "bundle": str(own), "removed": []}
    assert command("tune", own.with_name("none"), "--forget").code == 4


def changed(document: dict[str, Any], **fields: Any) -> str:
    return json.dumps({**document, **fields})


BROKEN: dict[str, Callable[[dict[str, Any]], str]] = {
    "is not used (onnxruntime has no bf16 here)": lambda d: changed(d, plans=planned(between="bf16")),
    "is not used (it was made with onnxruntime 1.0, and here is": lambda d: changed(d, versions={"onnxruntime": "1.0"}),
    "is not used (it was made for other content of the bundle)": lambda d: changed(d, bundle_sha256="0" * 64),
    "is not used (its schema is not pmclip-deploy/tuning/2)": lambda d: changed(d, schema="pmclip-deploy/tuning/1"),
    "is not used (it names the device 'tpu')": lambda d: changed(d, plans=planned(device="tpu")),
    "is not used (it names the device 'auto')": lambda d: changed(d, plans=planned(device="auto")),
    "is not used (it names 1000000000 threads)": lambda d: changed(d, plans=planned(threads=10**9)),
    "is not used (it names 0 threads)": lambda d: changed(d, plans=planned(threads=0)),
    "is not used (it names True threads)": lambda d: changed(d, plans=planned(threads=True)),
    "is not used (it names batches of 65)": lambda d: changed(d, plans=planned(batch=65)),
    "is not used (it names batches of 1)": lambda d: changed(d, plans=planned(batch=1)),
    "is not used (it names batches of True)": lambda d: changed(d, plans=planned(batch=True)),
    "is not used (it has more than 65536 bytes)": lambda d: changed(d, more="x" * 70_000),
    "is not used (its plans are not as tune writes them)": lambda d: changed(d, plans=[]),
    "is not used (tune did not write it so)": lambda d: changed(d, plans=planned(device=["cpu"])),
}
NOT_WRITTEN_SO = [
    "null", "[]", "{}", '"x"', "[" * 30_000, '{"schema": "pmclip-deploy/tuning/2"}', "", "\x00", "{" * 30_000,
    '{"schema": "pmclip-deploy/tuning/2", "plans": [{"graphs": {}, "first_ms": 1' + "0" * 400 + ', "next_ms": 1, "batch_ms": 1}]}',
    '{"schema": "pmclip-deploy/tuning/2", "plans": [{"graphs": {}, "first_ms": NaN, "next_ms": 1, "batch_ms": 1}]}',
    '{"schema": "pmclip-deploy/tuning/2", "plans": [{"graphs": {}, "first_ms": "1", "next_ms": 1, "batch_ms": 1}]}',
    '{"schema": "pmclip-deploy/tuning/2", "plans": [{"graphs": [], "first_ms": 1, "next_ms": 1, "batch_ms": 1}]}',
    '{"schema": "pmclip-deploy/tuning/2", "plans": [{"graphs": {}, "first_ms": 1, "next_ms": 1, "batch_ms": 1}],'
    ' "processor": "\\u001b[31m"}',
]  # fmt: skip


def planned(**choice: Any) -> list[dict[str, Any]]:
    graphs = {"image": {**ONE_THREAD._asdict(), **choice}}
    return [{"graphs": of, **dict.fromkeys(("first_ms", "next_ms", "batch_ms"), ms)} for of, ms in (({}, 9.0), (graphs, 1.0))]


@pytest.mark.parametrize("said", BROKEN)
def test_what_does_not_fit_is_said_in_one_line_and_not_used(own: Path, command: Callable[..., Any], said: str, tmp_path: Path) -> None:
    file = save(own, PLANS)
    file.write_text(BROKEN[said](json.loads(file.read_text())))
    notes = pm.load(own).notes
    assert (
        len(notes) == 1
        and notes[0].startswith(f"{file} {said}")
        and notes[0].endswith("run `pmclip-deploy tune` again, or remove the file")
    )
    (tmp_path / "a.png").write_bytes(PNG)
    done = command("infer", tmp_path / "a.png", "is there a fracture?", "--bundle", own, "--json")
    assert done.code == 0 and done.err.count("\n") == 1 and done.answer["model"]["between"] == "f32"


@pytest.mark.parametrize("content", NOT_WRITTEN_SO, ids=range(len(NOT_WRITTEN_SO)))
def test_a_broken_file_is_not_used(own: Path, content: str) -> None:
    save(own, PLANS).write_text(content)
    notes = list[str]()
    assert choices_of(own, None, notes) == {} and len(notes) <= 1 and "\n" not in "".join(notes)
    assert len(notes) == 1 or "u001b" in content  # of another processor, as far as it says


def test_what_is_no_file_is_no_tuning(own: Path) -> None:
    file = save(own, PLANS)
    for make in (os.mkfifo, Path.mkdir) if hasattr(os, "mkfifo") else (Path.mkdir,):
        file.unlink() if file.is_file() else None
        make(file)  # type: ignore[operator]
        assert choices_of(own, None, []) == {}
        file.rmdir() if file.is_dir() else file.unlink()


def test_another_processors_is_left_alone(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(own, PLANS)
    monkeypatch.setattr(tuning, "processor", lambda: "another; avx2; 4 threads")
    notes = list[str]()
    assert tuning_file(own) is None and choices_of(own, None, notes) == {} and save(own, PLANS[:1]) != file
    file.replace(file.with_name(tuning._name()))  # copied by hand
    assert choices_of(own, None, notes) == {} and notes == []


def test_a_bundle_that_was_exported_again_has_a_stale_one(own: Path, tmp_path: Path) -> None:
    save(own, PLANS)
    tiny_bundle(own, "mevf")
    notes = list[str]()
    assert choices_of(own, None, notes) == {} and "other content of the bundle" in notes[0]
    mine = save_own(own, PLANS)
    tiny_bundle(own)
    assert tuning_file(own) != mine  # by the bundle's own hash


def test_writers_and_readers_at_once_see_whole_files(own: Path) -> None:
    save(own, PLANS)

    def work(i: int) -> list[str]:
        notes = list[str]()
        if i % 3 == 0:
            save(own, PLANS)
        elif choices_of(own, None, notes) != PLANS[1].graphs:
            notes.append("it is not whole")
        return notes

    with ThreadPoolExecutor(8) as pool:
        assert [note for notes in pool.map(work, range(240)) for note in notes] == []
    assert [file.suffix for file in own.with_name("bundle.tuning").iterdir()] == [".json"]


def test_precisions_are_what_each_backend_has() -> None:
    assert all(backend.between()[0] == "f32" for backend in backends().values()) and SessionOptions().between == "f32"
