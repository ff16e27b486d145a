"""The command line as a user meets it: exit codes, one-line errors, a clean stdout, no patient, no network."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pmclip_deploy as pm
from pmclip_deploy import console, machine, opening
from pmclip_deploy.bundle.files import verify_bundle
from pmclip_deploy.cli import doctor, infer
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.imaging.images import picture_from_image
from pmclip_deploy.sessions.onnxruntime import OnnxRuntime
from tests.command import MAIN, is_one_line, process
from tests.full_disk import files_no_longer_than
from tests.patient import PATIENT
from tests.sources import ROOT
from tests.tiny.bundle import KINDS, tiny_bundle

FRACTURE = "is there a fracture?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures and a CT, one of them in a subfolder, and a note that is no image."""
    from pydicom.data import get_testdata_file

    folder = tmp_path_factory.mktemp("study")
    (folder / "sub").mkdir()
    noise = np.random.default_rng(0).integers(160, 256, (40, 30)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "bright.png")
    Image.fromarray(255 - noise).save(folder / "sub" / "dark.jpg")
    shutil.copy(str(get_testdata_file("CT_small.dcm")), folder / "ct.dcm")
    (folder / "note.txt").write_text("no image")
    return folder


# --- infer ---------------------------------------------------------------------------------------------------------------------


def test_infer_json_is_the_contract(run: Any, folder: Path) -> None:
    result = run("infer", folder / "ct.dcm", FRACTURE, "--json")
    assert result.code == 0 and result.err == ""
    assert list(result.json) == ["schema", "answers", "unreadable", "no_pictures"]
    assert (result.json["schema"], result.json["unreadable"], result.json["no_pictures"]) == ("pmclip-deploy/answers/2", [], [])
    assert {key: sorted(value) if isinstance(value, dict) else type(value).__name__ for key, value in result.answer.items()} == {
        "schema": "str",
        "question": "str",
        "answer": "str",
        "probability": "float",
        "abstained": "bool",
        "reason": "NoneType",
        "candidates": "list",
        "image": sorted(
            ["source", "format", "modality", "frame", "frames", "rows", "columns", "transfer_syntax", "photometric", "window", "warnings"]
        ),
        "model": sorted(["bundle", "version", "precision", "backend", "device", "sha256", "between"]),
        "timings_ms": sorted(["read", "preprocess", "encode", "answer", "total"]),
        "note": "NoneType",
        "source": "str",
        "understood_as": sorted(["kind", "form", "finding", "polarity", "asked", "qualifiers", "context", "corrected", "needs"]),
        "worth": "NoneType",
    }
    assert result.answer["schema"] == "pmclip-deploy/answer/1" and result.answer["image"]["modality"] == "CT"


def test_one_picture_is_asked_about_once_and_several_are_not(run: Any, folder: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    opened = opening.load_while
    monkeypatch.setattr(opening, "load_while", lambda *given, **how: (seen.append(how["single_use"]), opened(*given, **how))[1])
    one, two = folder / "bright.png", folder / "ct.dcm"
    for images in ([one], [one, two], [folder]):
        run("infer", *images, FRACTURE, "--bundle", bundle)
    assert seen == [True, False, False]


def test_a_note_is_printed_once_below_the_table(run: Any, folder: Path, tmp_path: Path) -> None:
    noted = tiny_bundle(tmp_path / "noted", kinds=tuple(replace(kind, note="at even odds") for kind in KINDS))
    assert verify_bundle(noted).kinds[0].note == "at even odds"
    result = run("infer", folder / "bright.png", FRACTURE, "which plane", "--bundle", noted)
    assert result.out.count("note:  at even odds\n") == 1
    assert run("infer", folder / "bright.png", FRACTURE, "--json", "--bundle", noted).answer["note"] == "at even odds"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_at_once(folder: Path, bundle: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = process("infer", tmp_path / "pipe", FRACTURE, "--bundle", bundle)
    assert result.code == 3 and is_one_line(result.err) and "a pipe" in result.err


def test_infer_for_a_person(run: Any, folder: Path) -> None:
    result = run("infer", folder / "bright.png", FRACTURE, "which plane", "asdf")
    assert result.code == 0 and result.err == ""
    for said in (
        "yes",
        "Confidence",
        "no answer: the question is outside",
        "PNG, 30 x 40",
        "tiny 0.0.1, fp32, onnxruntime on cpu",
        "total",
    ):
        assert said in result.out
    assert result.out.count("Research use only; not a medical device.") == 1


def test_frames_are_told_as_a_range(folder: Path, tmp_path: Path) -> None:
    from pydicom import dcmread

    dataset = dcmread(folder / "ct.dcm")
    dataset.NumberOfFrames, dataset.PixelData = 30, dataset.PixelData * 30
    dataset.save_as(tmp_path / "many.dcm")
    read = picture_from_image(tmp_path / "many.dcm").info
    assert infer._image_line(read).startswith("DICOM, CT, 128 x 128, frame 15 (the file has frames 0 to 29), window")
    for frames, said in ((1, "1 frame of 128 x 128 needs 32768 bytes"), (2, "2 frames of 128 x 128 need 65536 bytes")):
        dataset.NumberOfFrames, dataset.PixelData = frames, bytes(100)
        dataset.save_as(tmp_path / "cut.dcm")
        with pytest.raises(InputError, match=said):
            picture_from_image(tmp_path / "cut.dcm")
    assert "frame" not in infer._image_line(picture_from_image(folder / "ct.dcm").info)


def test_infer_shows_questions_as_they_are(run: Any, folder: Path) -> None:
    result = run("infer", folder / "bright.png", "[bold]is[/bold] \x1b[31mthere")
    assert result.code == 0 and "[bold]is[/bold]" in result.out and "\x1b" not in result.out


def test_many_questions_and_files_are_a_list_in_order(run: Any, folder: Path) -> None:
    result = run("infer", folder / "bright.png", folder / "sub" / "dark.jpg", FRACTURE, "plane", "--json")
    assert [(Path(a["image"]["source"]).name, a["question"]) for a in result.json["answers"]] == [
        ("bright.png", FRACTURE),
        ("bright.png", "plane"),
        ("dark.jpg", FRACTURE),
        ("dark.jpg", "plane"),
    ]
    assert [a["answer"] for a in result.json["answers"][::2]] == ["yes", "no"]


def test_a_folder_is_all_its_images_and_says_what_is_none(run: Any, folder: Path) -> None:
    result = run("infer", folder, FRACTURE, "--json")
    assert result.code == 0
    assert [Path(a["image"]["source"]).name for a in result.json["answers"]] == ["bright.png", "ct.dcm", "dark.jpg"]
    assert result.err == f"{folder}: 1 file is no picture\n" and result.json["no_pictures"] == [str(folder / "note.txt")]
    assert run("infer", folder, FRACTURE, "-q").err == run("--quiet", "infer", folder, FRACTURE).err == ""
    assert not console.quiet  # of the process: whoever calls the command line from Python goes on with notes


def test_quiet_has_no_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [1, 2, 3]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert console.progress(items, "Asking") is not items
    monkeypatch.setattr(console, "quiet", True)
    assert console.progress(items, "Asking") is items


def _broken(folder: Path, whole: bytes) -> list[str]:
    """A file of each kind of picture that cannot be read; their paths in order."""
    from pydicom import dcmread
    from pydicom.encaps import encapsulate

    pixels, head = whole.index(b"\xe0\x7f\x10\x00"), whole.index(b"DICM") + 4
    files = {
        "cut_in_the_pixels.dcm": whole[: pixels + 500],
        "cut_before_the_pixels.dcm": whole[:pixels],
        "cut_in_the_header.dcm": whole[: pixels // 2],
        "cut_in_the_meta.dcm": whole[: head + 30],
        "cut_in_the_preamble.dcm": whole[:60],
        "cut_after_the_preamble": whole[: pixels // 2],
        "empty.dcm": b"",
        "text.PNG": b"no picture",
        "scan.tif": b"II*\0" + bytes(200),
        "undecodable.dcm": b"",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    dataset = dcmread(folder.parent / "whole.dcm")
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG-2
    dataset.PixelData = encapsulate([bytes(100)])
    dataset.save_as(folder / "undecodable.dcm")
    return sorted(str(folder / name) for name in files)


def test_each_picture_that_cannot_be_read_is_listed_apart_from_files_that_are_none(run: Any, folder: Path, tmp_path: Path) -> None:
    from pydicom import dcmread

    study = tmp_path / "study"
    study.mkdir()
    shutil.copy(folder / "ct.dcm", tmp_path / "whole.dcm")
    broken = _broken(study, (tmp_path / "whole.dcm").read_bytes())
    shutil.copy(folder / "ct.dcm", study / "a.dcm")
    report = dcmread(folder / "ct.dcm")
    report.Modality, report.SOPClassUID = "SR", "1.2.840.10008.5.1.4.1.1.88.11"
    del report.PixelData
    report.save_as(study / "report.dcm")
    (study / "note.txt").write_text("no image")
    if hasattr(os, "mkfifo"):  # POSIX: a link to nothing is a picture that cannot be read, and a pipe is nothing
        (study / "link.dcm").symlink_to(study / "nowhere.dcm")
        (study / "link.txt").symlink_to(study / "nowhere.txt")
        os.mkfifo(study / "pipe.dcm")
        broken = sorted([*broken, str(study / "link.dcm")])
    (study / "._a.dcm").write_bytes(b"\0\5\x16\7" + bytes(300))  # as macOS writes beside a file
    none = sorted(str(study / name) for name in ("._a.dcm", "note.txt", "report.dcm"))
    result = run("infer", study, FRACTURE, "--json")
    assert result.code == 3 and [a["image"]["source"] for a in result.json["answers"]] == [str(study / "a.dcm")]
    assert [x["source"] for x in result.json["unreadable"]] == broken and result.json["no_pictures"] == none
    assert all(set(x) == {"schema", "source", "code", "message", "hint"} for x in result.json["unreadable"])
    *errors, note = result.err.splitlines()
    assert errors == [f"error: {x['message']}; {x['hint']}" for x in result.json["unreadable"]]
    assert note == f"{study}: 3 files are no pictures"
    shown = run("infer", study, FRACTURE, "-q")
    assert shown.code == 3 and shown.err.splitlines() == errors and shown.out.count("a.dcm") == 1
    (study / "a.dcm").unlink()
    result = run("infer", study, FRACTURE, "--json")
    assert result.code == 3 and result.json["answers"] == [] and [x["source"] for x in result.json["unreadable"]] == broken
    assert run("infer", study, FRACTURE).out == ""


def test_a_folder_that_cannot_be_listed_is_said_and_exits_with_3(run: Any, folder: Path, unlisted: Any) -> None:
    unlisted(folder / "sub")
    result = run("infer", folder, FRACTURE, "--json")
    assert result.code == 3 and [Path(a["image"]["source"]).name for a in result.json["answers"]] == ["bright.png", "ct.dcm"]
    assert result.err.startswith(f"error: {folder / 'sub'}: a folder that cannot be listed") and result.err.count("\n") == 2
    assert [x["source"] for x in result.json["unreadable"]] == [str(folder / "sub")]
    result = run("infer", folder / "sub", FRACTURE)
    assert result.code == 3 and is_one_line(result.err) and "cannot be listed" in result.err


def test_the_document_has_one_shape(run: Any, folder: Path, tmp_path: Path) -> None:
    """The same keys, and a list, for one picture or many, one question or many, none readable or all."""
    (tmp_path / "cut.dcm").write_bytes((folder / "ct.dcm").read_bytes()[:5000])
    given = [[folder / "ct.dcm"], [folder / "sub"], [folder], [folder / "ct.dcm", folder / "bright.png"], [tmp_path]]
    for images in given:
        for questions in ([FRACTURE], [FRACTURE, "which plane?"]):
            document = run("infer", *images, *questions, "--json").json
            assert document["schema"] == "pmclip-deploy/answers/2" and isinstance(document["answers"], list)
            assert list(document) == ["schema", "answers", "unreadable", "no_pictures"]


def test_the_reference_shows_how_to_read_both_schemas(run: Any, folder: Path) -> None:
    page = (ROOT / "docs" / "reference" / "json.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(def answers_of.*?)```", page, re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    new = run("infer", folder, FRACTURE, "--json").json
    for old in (new["answers"][0], new["answers"]):  # as schema 1 had it for one answer, and for several
        assert names["answers_of"](old) == (old if isinstance(old, list) else [old])
    assert names["answers_of"](new) == new["answers"]


@pytest.mark.parametrize("quote", [False, True])
def test_answers_are_written_to_a_file_as_they_come(run: Any, folder: Path, tmp_path: Path, quote: bool) -> None:
    study = tmp_path / ('a, "b"\nc' if quote else "study")
    shutil.copytree(folder, study)
    (study / "cut.dcm").write_bytes((folder / "ct.dcm").read_bytes()[:5000])
    document = run("infer", study, FRACTURE, "which plane?", "--json").json
    csv_file, lines_file = tmp_path / "answers.csv", tmp_path / "answers.JSONL"
    csv_file.write_text("old")
    for file in (csv_file, lines_file):
        done = run("infer", study, FRACTURE, "which plane?", "--output", file)
        assert done.code == 3 and "cut.dcm" in done.err and done.out.startswith(f"{file}: 6 answers about 3 pictures\n")
    with csv_file.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in lines_file.read_text("utf-8").splitlines()]
    told = [{key: value for key, value in line.items() if key != "timings_ms"} for line in lines]
    assert told == [{k: v for k, v in x.items() if k != "timings_ms"} for x in [*document["answers"], *document["unreadable"]]]
    *answered, cut = rows
    for row, answer in zip(answered, document["answers"], strict=True):
        assert (row["image"], row["question"], row["source"]) == (answer["image"]["source"], answer["question"], answer["source"])
        assert (row["answer"] or None, row["reason"] or None) == (answer["answer"], answer["reason"]) and not row["error"]
        assert (float(row["probability"]) if row["probability"] else None) == answer["probability"]
    assert cut["image"] == str(study / "cut.dcm") and cut["error"] == document["unreadable"][0]["message"] and not cut["question"]


@pytest.mark.parametrize("name", ["answers.txt", "answers", "nowhere/answers.csv", "folder.csv"])
def test_an_output_that_cannot_be_is_refused_before_the_model_is_opened(run: Any, folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.csv").mkdir()
    result = run("infer", folder, FRACTURE, "--output", tmp_path / name, "--bundle", tmp_path / "no-bundle")
    assert result.code == 2 and is_one_line(result.err) and result.out == ""


def test_a_full_disk_ends_an_output_in_one_line(run: Any, folder: Path, tmp_path: Path) -> None:
    with files_no_longer_than(300):
        result = run("infer", folder, FRACTURE, "--output", tmp_path / "x.jsonl")
    assert result.code == 2 and is_one_line(result.err) and "cannot be written" in result.err


def test_one_unreadable_file_of_several_does_not_stop_the_rest(run: Any, folder: Path) -> None:
    result = run("infer", folder / "note.txt", folder / "bright.png", FRACTURE, "--json")
    assert result.code == 3 and is_one_line(result.err) and "note.txt" in result.err
    assert [a["answer"] for a in result.json["answers"]] == ["yes"]
    assert [x["source"] for x in result.json["unreadable"]] == [str(folder / "note.txt")]


def test_a_folder_without_images(run: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "note.txt", tmp_path)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path, tmp_path / "empty"):
        result = run("infer", path, FRACTURE, "--json")
        assert result.code == 3 and is_one_line(result.err) and "without readable images" in result.err and result.out == ""


def test_options_reach_the_reader(run: Any, folder: Path) -> None:
    result = run("infer", folder / "ct.dcm", "plane", "--window", "-600", "1500", "--top", "1", "--json")
    assert result.answer["image"]["window"] == [-600, 1500] and len(result.answer["candidates"]) == 1
    assert run("infer", folder / "ct.dcm", "plane", "--frame", "7").code == 3


@pytest.mark.parametrize(
    ("arguments", "images", "questions"),
    [
        (["a.png", "q"], ["a.png"], ["q"]),
        (["a.png", "b.png", "plane", "modality?"], ["a.png", "b.png"], ["plane", "modality?"]),
        (["a.png", "is there a fracture?", "asdf"], ["a.png"], ["is there a fracture?", "asdf"]),
        (["a.png", "which plane", "asdf"], ["a.png"], ["which plane", "asdf"]),
        (["a.png", "fracture", "which plane"], ["a.png"], ["fracture", "which plane"]),
        (["a.png", "what is the patient's name", "any fracture"], ["a.png"], ["what is the patient's name", "any fracture"]),
        (["dir", "is it a/b, or c?"], ["dir"], ["is it a/b, or c?"]),
        (["a.png", "q" * 5000], ["a.png"], ["q" * 5000]),
        (["a.png", "nul\0"], ["a.png"], ["nul\0"]),
    ],
)
def test_images_come_first_then_questions(
    arguments: list[str], images: list[str], questions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Path(name).touch()
    Path("dir").mkdir()
    assert infer.split_arguments(arguments) == ([Path(i) for i in images], questions)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nowhere.dcm", "q"], InputError),
        (["a.png", "nowhere.dcm", "q"], InputError),
        (["a.png", "scans/nowhere", "q"], InputError),
        (["a.png", "q", "late.DCM"], InputError),
        (["a.png", "q", "a.png"], UsageError),
        (["a.png"], UsageError),
        (["a.png", ""], UsageError),
        (["a.png", "q", " "], UsageError),
        (["", "q"], InputError),
        (["nowhere", "is there a fracture?"], InputError),
        (["a.png", "is", "there", "a", "fracture"], UsageError),
        (["a.png", "b", "is", "there", "a", "fracture?"], UsageError),
        (["a.png", "is", "there a fracture"], UsageError),
        (["a.png", "is there", "a fracture?"], UsageError),
        (["is there a fracture?"], UsageError),
        (["is", "there", "a", "fracture", "a.png"], UsageError),
    ],
)
def test_arguments_that_are_wrong(arguments: list[str], error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").touch()
    with pytest.raises(error):
        infer.split_arguments(arguments)


@pytest.mark.parametrize(
    "words", ["is there a fracture", "is it broken?", "what plane", "'is there a fracture?'", "“is there a fracture?”"]
)
def test_a_question_without_quotes_is_one_helpful_line(run: Any, folder: Path, words: str) -> None:
    result = run("infer", folder / "ct.dcm", *words.split())
    assert result.code == 2 and is_one_line(result.err) and result.out == ""
    plain = words.strip("'“”")
    assert f'"{plain}"' in result.err and "quotes" in result.err


@pytest.mark.parametrize("words", [["is there a fracture?"], ["which plane"], ["is", "there", "a", "fracture"], [FRACTURE, "which plane?"]])
def test_a_question_without_a_picture_says_what_is_missing(run: Any, words: list[str]) -> None:
    result = run("infer", *words)
    assert result.code == 2 and is_one_line(result.err) and "no image given" in result.err and "infer scan.dcm" in result.err


# --- exit codes and errors -----------------------------------------------------------------------------------------------------


def test_exit_codes(run: Any, folder: Path, bundle: Path, tmp_path: Path) -> None:
    image = folder / "bright.png"
    cases = [
        (2, ["infer"]),
        (2, ["infer", image]),
        (2, ["infer", image, ""]),
        (2, ["infer", image, FRACTURE, "--nope"]),
        (2, ["infer", image, FRACTURE, "--frame", "-1"]),
        (2, ["infer", image, FRACTURE, "--device", "tpu"]),
        (2, ["nope"]),
        (3, ["infer", "nowhere.dcm", FRACTURE]),
        (3, ["infer", folder / "note.txt", FRACTURE]),
        (3, ["evaluate", "--data", "nowhere.jsonl", "--images", folder]),
        (4, ["infer", image, FRACTURE, "--bundle", tmp_path]),
        (4, ["bundle", "show", tmp_path / "nowhere"]),
        (4, ["bundle", "verify", tmp_path]),
    ]
    for code, arguments in cases:
        result = run(*arguments)
        assert (result.code, result.out) == (code, "") and is_one_line(result.err), (arguments, result.err)


def test_no_device(run: Any, folder: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    result = run("infer", folder / "bright.png", FRACTURE, "--device", "cuda")
    assert result.code == 6 and is_one_line(result.err) and "CPUExecutionProvider" in result.err


def test_a_hint_names_options_here_and_parameters_in_python(run: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(pm.DeviceError) as caught:
        pm.load(device="cuda")
    assert caught.value.hint.endswith('or pass device="cpu"')
    assert run("infer", folder / "ct.dcm", "which plane?", "--device", "cuda").err.endswith("or pass --device cpu\n")


@pytest.mark.parametrize(
    "given", [("infer", "ct.dcm", "which plane?", "--bundle"), ("bundle", "show"), ("bundle", "verify"), ("questions", "--bundle")]
)
def test_a_bundle_that_is_not_there_has_the_same_next_step_everywhere(run: Any, folder: Path, given: tuple[str, ...]) -> None:
    none = folder / "none"
    result = run(*(folder / word if word == "ct.dcm" else word for word in given), none)
    assert (result.code, result.err) == (
        4, f"error: {none}: no such bundle folder; check the path, or build one with `pmclip-deploy export`\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("file", "step"),
    [("config.json", "published weights need `pmclip-deploy import "), ("checkpoint.json", "it is a checkpoint; `pmclip-deploy export ")],
)
def test_another_folder_in_place_of_a_bundle_is_named(run: Any, folder: Path, file: str, step: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    result = run("infer", folder / "ct.dcm", "which plane?", "--bundle", tmp_path)
    assert result.code == 4 and f"missing, so this folder is no bundle; {step}{tmp_path}" in result.err


@pytest.mark.parametrize(
    ("file", "step"),
    [
        ("config.json", "`pmclip-deploy import {} --output CHECKPOINT` makes a checkpoint of them"),
        ("open_clip_config.json", "`pmclip-deploy import {} --output CHECKPOINT` makes a checkpoint of them"),
        ("manifest.json", "it is a bundle; give the checkpoint that it was exported from"),
        (None, "a checkpoint is a folder made by `pmclip-deploy train` or `import`"),
    ],
)
def test_another_folder_in_place_of_a_checkpoint_is_named(run: Any, file: str | None, step: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs the extra `export`")
    pytest.importorskip("open_clip", reason="needs the extra `export`")
    if file is not None:
        (tmp_path / file).write_text("{}")
    result = run("export", tmp_path, "--output", tmp_path / "out")
    assert result.code == 4 and "checkpoint.json: not found; " in result.err and step.format(tmp_path) in result.err


def test_a_weights_file_in_place_of_a_checkpoint_is_named(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs the extra `export`")
    pytest.importorskip("open_clip", reason="needs the extra `export`")
    (tmp_path / "w.pt").write_bytes(b"x")
    result = run("export", tmp_path / "w.pt", "--output", tmp_path / "out")
    assert result.code == 4 and "w.pt: a file, not the folder of a checkpoint; if these are published weights, `pmclip-dep" in result.err


def test_a_bug_of_ours_is_one_line_and_debug_shows_where(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quoted = "DOE^" + "JOHN"  # a foreign message may quote the file

    def bug(arguments: list[str]) -> None:
        raise RuntimeError(quoted)

    monkeypatch.setattr(infer, "split_arguments", bug)
    result = run("infer", folder / "ct.dcm", FRACTURE)
    assert result.code == 1 and is_one_line(result.err) and "internal: RuntimeError" in result.err and "--debug" in result.err
    for arguments in (["--debug", "infer", "x", "y"], ["infer", "x", "y", "--debug"]):
        result = run(*arguments)
        assert result.code == 1 and "split_arguments" in result.err and "DOE" not in result.err + result.out


def test_an_interrupt_is_130(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "split_arguments", interrupt)
    result = run("infer", "x", "y")
    assert result.code == 130 and "Traceback" not in result.err


def test_control_characters_in_a_name_do_not_reach_the_terminal(run: Any) -> None:
    result = run("infer", "\x1b[2Jx\n.dcm", FRACTURE)
    assert result.code == 3 and is_one_line(result.err) and "\x1b" not in result.err


def test_version_and_no_arguments(run: Any) -> None:
    assert run("--version").out.startswith("pmclip-deploy ")
    result = run()
    assert result.code == 2 and "infer" in result.err + result.out


# --- the other commands --------------------------------------------------------------------------------------------------------


def test_bundle_show(run: Any, bundle: Path) -> None:
    assert run("bundle", "show", bundle, "--json").json == json.loads((bundle / "manifest.json").read_text())
    shown = run("bundle", "show", bundle).out
    assert "tiny 0.0.1, fp32 for cpu" in shown and "image.onnx" in shown


def test_bundle_verify(run: Any, bundle: Path, tmp_path: Path) -> None:
    assert run("bundle", "verify", bundle).code == 0
    assert run("bundle", "verify", bundle, "--json").json["verified"] is True
    shutil.copytree(bundle, tmp_path / "b")
    with (tmp_path / "b" / "text.onnx").open("ab") as file:
        file.write(b"x")
    result = run("bundle", "verify", tmp_path / "b")
    assert result.code == 4 and is_one_line(result.err) and "text.onnx has changed" in result.err and result.out == ""
    result = run("bundle", "verify", tmp_path / "b", "--json")
    assert result.code == 4 and is_one_line(result.err) and len(result.json["problems"]) == 1 and not result.json["verified"]


def test_evaluate(run: Any, folder: Path, tmp_path: Path) -> None:
    rows = [{"image": name, "question": FRACTURE, "answer": "yes"} for name in ("bright.png", "sub/dark.jpg")]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("evaluate", "--data", tmp_path / "d.jsonl", "--images", folder, "--json")
    assert result.code == 0 and result.err == "" and result.json["accuracy"] == 0.5
    assert result.json["schema"] == "pmclip-deploy/evaluation/1" and result.json["baselines"]["question_only"] is None
    shown = run("evaluate", "--data", tmp_path / "d.jsonl", "--images", folder).out
    assert "0.500" in shown and "not measured" in shown
    assert result.json["training_rows"] is None and result.json["counts"]["vqa-med-2019"]["accuracy"] == 0.5
    assert "vqa-med-2019: as the challenge" in " ".join(shown.split()) and "question only: the most" not in shown
    (tmp_path / "train.jsonl").write_text(json.dumps({**rows[0], "answer": "yes"}))
    command = ("evaluate", "--data", tmp_path / "d.jsonl", "--images", folder)
    beside = run(*command, "--json").json
    assert beside["training_rows"] == {"source": str(tmp_path / "train.jsonl"), "n": 1}
    assert beside["baselines"]["question_only"]["accuracy"] == 1
    assert "question only: the most frequent answer among 1 question of" in run(*command).out


def test_evaluate_counts_a_dataset_as_its_own_people_do(run: Any, folder: Path, tmp_path: Path) -> None:
    med, rad = tmp_path / "med", tmp_path / "rad"
    for images in (med / "VQAMed2019_Test_Images", rad / "images"):
        images.mkdir(parents=True)
        shutil.copy(folder / "bright.png", images / "synpic1.png")
    (med / "VQAMed2019_Test_Questions_w_Ref_Answers.txt").write_text(f"synpic1.png|abnormality|{FRACTURE}|a mass#yes (a fine one)\n")
    of_med = run("evaluate", "--data", med, "--json").json
    challenge = of_med["counts"]["vqa-med-2019"]
    assert (of_med["accuracy"], challenge["accuracy"], challenge["bleu"]) == (0, 1, 1) and of_med["training_rows"] is None
    about = {"image": "synpic1.png", "question": FRACTURE, "answer_type": "CLOSED", "question_type": "PRES"}
    rows = [
        {**about, "answer": "Yes", "phrase_type": "test_freeform", "official_split": "test"},
        {**about, "answer": "no", "phrase_type": "test_para", "official_split": "test"},
        {**about, "answer": "yes", "phrase_type": "freeform", "official_split": "train"},
    ]
    (rad / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    of_rad = run("evaluate", "--data", rad, "--json").json
    assert {name: (count["n"], count["accuracy"]) for name, count in of_rad["counts"].items()} == {
        "mevf": (1, 1),
        "mevf-all": (2, 0.5),
        "qcr": (2, 0.5),
    }
    assert of_rad["training_rows"] == {"source": f"the training part of {rad}", "n": 1} and "normalisation" in of_rad["definition"]


@pytest.mark.parametrize(
    ("installed", "driver", "providers", "said"),
    [
        (("onnxruntime", "onnxruntime-gpu"), None, [], "overwrite each other"),
        (("onnxruntime",), "NVRM 570", ["CPUExecutionProvider"], "for the CPU alone"),
        (("onnxruntime-gpu",), "NVRM 570", ["CUDAExecutionProvider"], None),
        (("onnxruntime",), None, ["CPUExecutionProvider"], None),
    ],
)
def test_doctor_says_how_to_get_the_gpu(
    run: Any, monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], driver: str | None, providers: list[str], said: str | None
) -> None:
    monkeypatch.setattr(machine, "version", lambda name: "1.0" if name in installed else None)
    monkeypatch.setattr(doctor, "_gpu", lambda: {"nvidia_driver": driver, "nvidia_smi": None})
    monkeypatch.setattr(OnnxRuntime, "about", lambda self: {"providers": providers, "threads": 1})
    advice, printed = run("doctor", "--json").json["backend"]["advice"], run("doctor").out
    assert (said is None and advice is None and "advice" not in printed) or (said in advice and "pip uninstall -y" in printed)


def test_doctor(run: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pmclip_deploy import kernels, models
    from pmclip_deploy.imaging.decoders.frame import CODECS

    monkeypatch.setattr(models, "DEFAULT_BUNDLE", bundle)
    result = run("doctor", "--json")
    assert result.code == 0 and result.json["ok"] and result.json["bundle"]["verified"]
    assert {d["uid"] for d in result.json["dicom"]} > set(CODECS) and all(d["readable"] for d in result.json["dicom"])
    assert "infer works here" in run("doctor").out
    assert result.json["similarity"] == kernels.implementation() and f"similarity in {kernels.implementation()}" in run("doctor").out
    monkeypatch.setattr(models, "DEFAULT_BUNDLE", bundle / "nowhere")
    result = run("doctor", "--json")
    assert result.code == 4 and not result.json["ok"] and "no such bundle" in result.json["bundle"]["problem"]


# --- as a process --------------------------------------------------------------------------------------------------------------


def test_the_process(folder: Path, bundle: Path) -> None:
    result = process("infer", folder / "ct.dcm", FRACTURE, "--json", "--bundle", bundle)
    assert result.code == 0 and result.err == "" and result.answer["answer"]
    result = process("infer", folder / "ct.dcm", FRACTURE, "--bundle", bundle, PYTHONIOENCODING="ascii", COLUMNS="60")
    assert result.code == 0 and result.err == "" and "\x1b" not in result.out
    result = process("infer", folder / "note.txt", FRACTURE, "--bundle", bundle)
    assert result.code == 3 and is_one_line(result.err) and result.out == ""


@pytest.mark.parametrize(
    "command",
    [
        ["bundle", "show", "BUNDLE"],  # print
        ["infer", "PICTURE", FRACTURE, "--bundle", "BUNDLE"],  # rich, and an end without interpreter teardown
        ["infer", "PICTURE", FRACTURE, "--bundle", "BUNDLE", "--json"],
        ["questions", "--bundle", "BUNDLE"],  # rich
        ["--help"],
        ["--version"],
    ],
)
def test_a_reader_that_leaves_is_no_error(folder: Path, bundle: Path, command: list[str]) -> None:
    told = {"BUNDLE": str(bundle), "PICTURE": str(folder / "ct.dcm")}
    command = [sys.executable, "-c", MAIN, *(told.get(word, word) for word in command)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout and child.stderr
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(60) == 141


def test_an_error_that_nobody_reads_is_no_bug_either(bundle: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", MAIN, "infer", "nowhere.dcm", FRACTURE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdout
    child.stdout.close()
    assert child.wait(60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", [["bundle", "show", "BUNDLE"], ["questions", "--bundle", "BUNDLE"], ["--help"]])
def test_a_full_disk_behind_stdout_is_no_bug(bundle: Path, command: list[str]) -> None:
    command = [sys.executable, "-c", MAIN, *(str(bundle) if word == "BUNDLE" else word for word in command)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1 and is_one_line(done.stderr) and "No space left" in done.stderr and "internal" not in done.stderr


@pytest.mark.parametrize("words", [[], ["infer"], ["search"], ["search", "query"], ["train", "vqa"]])
def test_h_is_help(command: Any, words: list[str]) -> None:
    short = command(*words, "-h")
    assert short == command(*words, "--help") and short.code == 0 and "Usage" in short.out


def test_shells_complete_commands_and_options() -> None:
    """As the script of --show-completion asks."""
    for words, wanted in (
        ("pmclip-deploy inf", "infer"),
        ("pmclip-deploy search que", "query"),
        ("pmclip-deploy infer --save", "--save-picture"),
    ):
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_PMCLIP_DEPLOY_COMPLETE": "complete_bash"}
        done = process(**asked)
        assert done.code == 0 and done.out.split() == [wanted], done.err


@pytest.mark.skipif(sys.platform == "win32", reason="no file descriptors to close")
def test_an_answer_needs_no_stderr(folder: Path, bundle: Path) -> None:
    command = [sys.executable, "-c", MAIN, "infer", str(folder / "bright.png"), FRACTURE, "--json", "--bundle", str(bundle)]
    for closed in (1, 2):
        done = subprocess.run(["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command], capture_output=True, timeout=60, check=False)
        assert done.returncode == 0 and done.stderr == b""
    assert json.loads(done.stdout)["answers"][0]["question"] == FRACTURE


BLOCKED = """
import os, sys
def hook(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.client")):
        os.write(2, f"network: {event}".encode())
        os._exit(99)
sys.addaudithook(hook)
"""


def test_infer_works_without_the_network(folder: Path, bundle: Path, tmp_path: Path) -> None:
    """Python's own sockets are cut by an audit hook; where user namespaces are allowed, all sockets by an empty one."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    probe = [sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 9))"]
    assert subprocess.run(probe, env=environment, capture_output=True).returncode == 99
    unshare = ["unshare", "--net", "--map-root-user"]
    able = shutil.which("unshare") and subprocess.run([*unshare, "true"], capture_output=True).returncode == 0
    command = [*(unshare if able else []), sys.executable, "-c", MAIN, "infer", str(folder / "ct.dcm"), FRACTURE, "--json"]
    done = subprocess.run([*command, "--bundle", str(bundle)], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_no_patient_attribute_is_ever_printed(folder: Path, bundle: Path, tmp_path: Path) -> None:
    import warnings

    from pydicom import dcmread

    dataset = dcmread(folder / "ct.dcm")
    broken = dcmread(folder / "ct.dcm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for scan in (dataset, broken):
            for keyword, value in PATIENT.items():
                setattr(scan, keyword, value)
        broken.PixelData = broken.PixelData[:100]
        broken.ImageType = ["ZQXTYPE"]
        dataset.save_as(tmp_path / "scan.dcm")
        broken.save_as(tmp_path / "broken.dcm")
    truncated = (tmp_path / "scan.dcm").read_bytes()
    (tmp_path / "truncated.dcm").write_bytes(truncated[: len(truncated) // 2])
    for name, code in (("scan.dcm", 0), ("broken.dcm", 3), ("truncated.dcm", 3)):
        for options in ([], ["--json", "--debug"]):
            result = process("infer", tmp_path / name, FRACTURE, "--bundle", bundle, *options, PYTHONWARNINGS="always")
            assert result.code == code, result.err
            assert "ZQX" not in result.out + result.err and "18990102" not in result.out + result.err


def test_long_work_says_what_begins_where_stderr_is_no_terminal(run: Any, folder: Path, tmp_path: Path) -> None:
    row = json.dumps({"image": "bright.png", "question": FRACTURE, "answer": "yes"})
    for count, said in ((99, ""), (100, "Encoding images\nEncoding questions\n")):
        (tmp_path / "d.jsonl").write_text("\n".join([row] * count))
        result = run("evaluate", "--data", tmp_path / "d.jsonl", "--images", folder, "--json")
        assert (result.code, result.err) == (0, said)
    (tmp_path / "c.txt").write_text("\n".join(f"fracture {i}" for i in range(100)))
    result = run("search", "index", tmp_path / "c.txt", "--output", tmp_path / "i.safetensors")
    assert (result.code, result.err) == (0, "Embedding (100)\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["infer", "CT", FRACTURE, "--xyzzy"], "No such option: --xyzzy. See pmclip-deploy infer --help"),
        (["infer", "CT", FRACTURE, "--window", "1"], "Option '--window' requires 2 arguments. See pmclip-deploy infer --help"),
        (["infers"], "No such command 'infers'. Did you mean 'infer'? See pmclip-deploy --help"),
        (["infer", "", FRACTURE], "'': no such file or folder; check the path"),
        (["infer", "CT", FRACTURE, "--frame", "1"], "CT: frame 1 was asked for and the file has only frame 0; leave the frame out"),
        (
            ["infer", "CT", FRACTURE, "--window", "nan", "5"],
            "CT: the window asked for is no center with a positive width; give two numbers, the width above 0",
        ),
        (["classify", "CT", "--template", "", "ct", "mri"], "the template '' has no {}; "),
    ],
)
def test_messages_of_wrong_usage_are_whole_sentences(command: Any, folder: Path, words: list[str], said: str) -> None:
    ct = str(folder / "ct.dcm")
    failed = command(*(ct if word == "CT" else word for word in words))
    assert failed.code in (2, 3) and is_one_line(failed.err) and failed.err.startswith(f"error: {said.replace('CT', ct)}")
