"""Many items at once say what they say one by one, to the last bit, whatever the threads and the size of a batch."""

import gc
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from pydicom.data import get_testdata_file

import pmclip_deploy as pm
from pmclip_deploy import beside, process
from pmclip_deploy.benchmarks.tune_batches import sees_others, why_not
from pmclip_deploy.beside import chunks, made, side_by_side
from pmclip_deploy.console import print_error
from pmclip_deploy.imaging import picture
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.search.indexing import build_index, captions_of_file, images_of_folder
from pmclip_deploy.sessions import SessionOptions, open_session
from pmclip_deploy.towers import BATCH, ENOUGH, KEPT, Batches, TunedBatches
from tests.command import Result

DICOM = ("CT_small.dcm", "emri_small.dcm", "JPEG-LL.dcm", "JPGExtended.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm")
ABOUT = ("a ct", "plane", "which fracture", "is there a fracture ? a")
TEXTS = [f"{about} of the {place}" for about in ABOUT for place in ("chest", "left hand", "a", "plane")]
SIZES = (1, 2, 3, 16)


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(beside, "cpu_threads", lambda: request.param)
    return int(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DICOM files, one of them of several frames and two that GDCM decodes, and pictures; in the middle what is broken or no picture."""
    folder = tmp_path_factory.mktemp("mixed")
    for name in DICOM:
        shutil.copy(get_testdata_file(name, download=False), folder)
    for seed in range(5):
        noise = np.random.default_rng(seed).integers(0, 200 + 10 * seed, (40 + seed, 50)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"K {seed}.{'jpg' if seed % 2 else 'png'}")
    (folder / "K 2 broken.png").write_bytes((folder / "K 2.png").read_bytes()[:300])
    (folder / "CT_small broken.dcm").write_bytes((folder / "CT_small.dcm").read_bytes()[:9000])
    (folder / "L note.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module", params=["tiny", "shipped"])
def path(request: pytest.FixtureRequest, bundle: Path) -> Path | None:
    return bundle if request.param == "tiny" else None


# --- items side by side ------------------------------------------------------------------------------------------------------------


def test_results_come_in_order_and_an_error_is_its_items(threads: int) -> None:
    def make(item: int) -> int:
        time.sleep(0.002 * (item % 3))  # so that later ones are done before earlier ones
        if item == 5:
            raise pm.InputError("five")
        return item * item

    found = list(side_by_side(make, range(20)))
    assert str(found.pop(5)) == "five" and found == [i * i for i in range(20) if i != 5]
    with pytest.raises(pm.InputError, match="five"):
        [made(x) for x in side_by_side(make, range(20))]
    assert list(side_by_side(make, [])) == [] and list(side_by_side(make, [3])) == [9]


@pytest.mark.parametrize("error", [pm.BundleError("broken"), KeyboardInterrupt()])
def test_another_error_is_raised_in_its_turn_and_no_thread_stays(threads: int, error: BaseException) -> None:
    done = list[int]()

    def make(item: int) -> int:
        if item == 7:
            raise error
        return item

    with pytest.raises(type(error)):
        for found in side_by_side(make, range(100)):
            done.append(made(found))
    assert done == list(range(7)) and no_thread_stays()


def test_few_items_are_begun_ahead(threads: int) -> None:
    taken = list[int]()

    def items() -> Iterator[int]:
        for i in count():
            taken.append(i)
            yield i

    each = side_by_side(lambda item: item, items())
    for i in range(10):
        assert next(each) == i and len(taken) <= i + 2 + 2 * threads
    each.close()  # type: ignore[attr-defined]
    assert no_thread_stays()


def test_chunks() -> None:
    assert list(chunks(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]] and list(chunks([], 3)) == []


def test_an_error_is_printed_while_another_thread_decodes(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """GDCM's thread has file descriptor 2 lead nowhere: a message waits until it is back."""
    monkeypatch.setattr(process, "taken_over", True)
    inside, printed = threading.Event(), threading.Event()

    def write() -> None:
        assert inside.wait(30)
        print_error("what is broken")
        printed.set()

    writer = threading.Thread(target=write)
    writer.start()
    with process.native_stderr_off():
        inside.set()
        assert not printed.wait(0.2)
    writer.join(30)
    assert capfd.readouterr().err == "error: what is broken\n"


@pytest.mark.parametrize("name", ["JPEG-LL.dcm", "large.png"])
def test_one_decode_at_a_time_of_gdcm_and_of_large_pictures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(beside, "cpu_threads", lambda: 4)
    inside, most = list[int](), list[int]()
    Image.new("L", (200, 300), 9).save(tmp_path / "large.png")

    def counted(decode: Callable[..., Any]) -> Callable[..., Any]:
        def decoding(*arguments: Any) -> Any:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()
            return decode(*arguments)

        return decoding

    if name == "large.png":
        monkeypatch.setattr(picture, "LARGE", 200 * 300 - 1)
        monkeypatch.setattr(PngImageFile, "load", counted(PngImageFile.load))
        file = tmp_path / name
    else:
        monkeypatch.setattr(process, "native_stderr_off", lambda off=process.native_stderr_off: counted(off)())
        file = folder / name
    read = [made(x).pixels for x in side_by_side(picture_from_path, [str(file)] * 8)]
    assert len(most) >= 8 and max(most) == 1 and all(np.array_equal(x, read[0]) for x in read)


# --- batches -----------------------------------------------------------------------------------------------------------------------


def no_thread_stays() -> bool:
    gc.collect()  # an error that was caught may still hold the iterator
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
    for thread in workers:
        thread.join(30)
    return not any(thread.is_alive() for thread in workers)


def graph(tmp_path: Path, mixes: bool) -> Any:
    """embedding = x + its square, or the largest of all rows"""
    nodes = [
        helper.make_node("ReduceMax", ["tokens"], ["other"], axes=[0, 1]) if mixes else helper.make_node("Mul", ["tokens"] * 2, ["other"]),
        helper.make_node("Add", ["tokens", "other"], ["embedding"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "T"]) for name in ("tokens", "embedding")]
    model = helper.make_model(
        helper.make_graph(nodes, "rows", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    onnx.save(model, tmp_path / "rows.onnx")
    session, shapes = open_session(tmp_path / "rows.onnx", SessionOptions("cpu")), list[tuple[int, ...]]()
    run = session.run

    def counted(inputs: Any) -> Any:
        shapes.append(inputs["tokens"].shape)
        return run(inputs)

    session.run = counted  # type: ignore[method-assign]
    return session, shapes


def rows(number: int, length: int = 999) -> list[NDArray[np.float32]]:
    return list(np.random.default_rng(number).normal(size=(number, 1, length)).astype(np.float32))


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_graph_with_rows_apart_has_batches(tmp_path: Path, size: int) -> None:
    session, shapes = graph(tmp_path, mixes=False)
    batches, of = Batches(session, size, quantises=False), rows(2 * size + 1)
    found = [row for part in chunks(of, size) for row in batches.run(part)]
    assert shapes == [(1, 999)] * size + [(size, 999)] * 2 + [(1, 999)]  # seen to be equal, then used; what is left is no batch
    assert all(np.array_equal(row, session.run({"tokens": x})["embedding"][0]) for row, x in zip(found, of, strict=True))
    parts = -(-ENOUGH // (7 * size))
    for _ in range(parts + 2):
        batches.run(rows(size, 7))
    tried = [(1, 7)] * size + [(size, 7)]  # another shape is seen for itself, and few numbers prove little
    assert [x for x in shapes if x[1] == 7] == tried * parts + [(size, 7)] * 2
    assert batches.run([]) == []


@pytest.mark.parametrize("quantises", [False, True])
def test_a_graph_that_mixes_rows_has_none(tmp_path: Path, quantises: bool) -> None:
    session, shapes = graph(tmp_path, mixes=True)
    batches, of = Batches(session, 4, quantises), rows(12)
    found = [row for part in chunks(of, 4) for row in batches.run(part)]
    assert batches.size == 1 and [x for x in shapes if x[0] > 1] == ([] if quantises else [(4, 999)])
    assert all(np.array_equal(row, session.run({"tokens": x})["embedding"][0]) for row, x in zip(found, of, strict=True))


def test_a_graph_that_quantises_by_its_rows_is_known_by_its_content(tmp_path: Path, bundle: Path) -> None:
    shipped, tiny = pm.load(), pm.load(bundle)
    assert {name: shipped.towers.quantises(name) for name in BATCH} == {"image": True, "text": False}
    assert {name: tiny.towers.quantises(name) for name in BATCH} == {"image": False, "text": False}
    shipped.towers.sizes["image"] = 16
    assert shipped.towers._batches("image").size == 1


@pytest.mark.parametrize("fills", [False, True])
def test_a_tuned_batch_runs_at_once(tmp_path: Path, fills: bool) -> None:
    session, shapes = graph(tmp_path, mixes=False)
    batches, of = TunedBatches(session, 4, fills), rows(9)
    found = [row for part in chunks(of, 4) for row in batches.run(part)]
    assert shapes == [(4, 999), (4, 999), (4 if fills else 1, 999)]
    assert all(np.array_equal(row, session.run({"tokens": x})["embedding"][0]) for row, x in zip(found, of, strict=True))
    assert batches.run([]) == []


@pytest.mark.parametrize("mixes", [False, True])
def test_tune_sees_whether_rows_see_each_other(tmp_path: Path, mixes: bool) -> None:
    session, _ = graph(tmp_path, mixes)
    assert sees_others("text", session, 16, [*rows(9, 70), *rows(7, 3)]) is mixes


def test_tune_gives_no_batches_to_what_quantises_a_batch_as_a_whole(bundle: Path) -> None:
    shipped = pm.load()
    assert "shares its scales" in str(why_not(shipped, "image", shipped._sessions["image"], 16))
    tiny = pm.load(bundle)
    assert [why_not(tiny, name, tiny._sessions[name], 16) for name in BATCH] == [None, None]


def test_few_texts_are_kept(bundle: Path) -> None:
    predictor = pm.load(bundle)
    texts = [f"plane {'the ' * (i % 3)}{'a ' * (i // 3)}" for i in range(0, 3 * KEPT, 2)]
    assert len(predictor.embed_texts(texts)) == len(texts) > KEPT == len(predictor.towers._kept)


# --- the same answers ----------------------------------------------------------------------------------------------------------------


def with_sizes(path: Path | None, size: int) -> pm.Predictor:
    predictor = pm.load(path)
    predictor.towers.sizes = dict.fromkeys(BATCH, size)
    return predictor


@pytest.mark.parametrize("size", SIZES)
def test_embeddings(path: Path | None, folder: Path, threads: int, size: int) -> None:
    one, many, files = pm.load(path), with_sizes(path, size), sorted(folder.iterdir())
    for file, row in zip(files, many.embeddings_of_images(files), strict=True):
        if isinstance(row, pm.InputError):
            with pytest.raises(pm.InputError) as alone:
                one.embed_image(file)
            assert (str(row), row.code) == (str(alone.value), alone.value.code)
        else:
            assert row.tobytes() == one.embed_image(file).tobytes()
    whole = [file for file in files if "broken" not in file.name and file.suffix != ".txt"]
    assert many.embed_images(whole).tobytes() == b"".join(one.embed_image(file).tobytes() for file in whole)
    for _ in range(2):  # once computed, once kept
        assert many.embed_texts(TEXTS * 2).tobytes() == 2 * b"".join(one.embed_text(text).tobytes() for text in TEXTS)
    with pytest.raises(pm.InputError):
        many.embed_images(files)
    with pytest.raises(pm.UsageError, match="one or more"):
        many.embed_images([])


@pytest.mark.parametrize("size", SIZES)
def test_an_index_has_the_same_bytes(path: Path | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    (tmp_path / "captions.txt").write_text("\n".join([*TEXTS, TEXTS[0]]))
    made_of = dict[int, list[Any]]()
    for workers, of in ((1, 1), (3, size)):
        monkeypatch.setattr(beside, "cpu_threads", lambda workers=workers: workers)
        predictor, made_of[workers] = with_sizes(path, of), []
        sources = {"images": images_of_folder(predictor, folder), "texts": captions_of_file(predictor, tmp_path / "captions.txt")}
        for name, source in sources.items():
            file = tmp_path / f"{name}-{workers}.index"
            made_of[workers] += [build_index(file, source), file.read_bytes()]
    assert made_of[1] == made_of[3] and made_of[1][0].broken == 2 and made_of[1][2].known == 1


def without_times(rows: list[Any]) -> list[Any]:
    return [{name: value for name, value in json.loads(json.dumps(row)).items() if name != "timings_ms"} for row in rows]


def test_a_folder_is_answered_as_its_files_are(command: Callable[..., Result], path: Path | None, folder: Path, threads: int) -> None:
    one, asked, expected, errors = pm.load(path), ["is there a fracture?", "which plane?"], list[Any](), list[str]()
    files = [file for file in sorted(folder.iterdir()) if file.suffix != ".txt"]
    for file in files:
        try:
            answers = [answer.to_json() for answer in one.ask_many(file, asked)]
            expected.append((answers, one.classify(file, asked).to_json()))
        except pm.InputError as error:
            errors.append(f"error: {error}")
    for i, (name, key) in enumerate((("infer", "answers"), ("classify", "classifications"))):
        wanted = without_times([row for each in expected for row in (each[i] if i == 0 else [each[i]])])
        for paths in ([folder], files):
            done = command(name, *paths, *asked, "--json", *([] if path is None else ["--bundle", path]))
            assert without_times(done.json[key]) == wanted and done.code == 3
            assert done.err.splitlines()[:2] == errors
            assert [Path(x["source"]).name for x in done.json["unreadable"]] == ["CT_small broken.dcm", "K 2 broken.png"]


def test_evaluate(command: Callable[..., Result], bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [file.name for file in sorted(folder.iterdir()) if "broken" not in file.name and file.suffix != ".txt"]
    rows = [{"image": x, "question": q, "answer": "no"} for x in names for q in ("is there a fracture?", "which plane?", "the a plane")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = []
    for workers in (1, 3):
        monkeypatch.setattr(beside, "cpu_threads", lambda workers=workers: workers)
        documents.append(command("evaluate", "--data", tmp_path / "rows.jsonl", "--images", folder, "--bundle", bundle, "--json").json)
    assert documents[0] == documents[1] and documents[0]["n"] == len(rows)


def test_ctrl_c_in_a_worker_ends_the_command(bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "cpu_threads", lambda: 3)
    predictor, seen = pm.load(bundle), count()
    real = predictor.towers.tensor

    def interrupted(image: Any) -> Any:
        if next(seen) == 4:
            os.kill(os.getpid(), 2)  # to the main thread, as a terminal's
        return real(image)

    monkeypatch.setattr(predictor.towers, "tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "x.index", images_of_folder(predictor, folder))
    assert no_thread_stays() and not (tmp_path / "x.index").exists()
    monkeypatch.setattr(predictor.towers, "tensor", real)
    report = build_index(tmp_path / "x.index", images_of_folder(predictor, folder))
    assert report.embedded + report.known == len(DICOM) + 5 and report.broken == 2
