"""`infer --sr` and `--sc`: which files are written, and what is said."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file

from pmclip_deploy import extras
from pmclip_deploy.models import DEMO
from tests.command import Result, is_one_line, process
from tests.imports import loaded, run_cli
from tests.patient import PATIENT
from tests.report.making import items, said

pytest.importorskip("highdicom", reason="needs the extra `ward`")

Command = Callable[..., Result]
ASK = "is there a fracture?"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return Path(shutil.copy(str(get_testdata_file("CT_small.dcm", download=False)), tmp_path / "ZQXPATH.dcm"))


def test_one_image_one_report(command: Command, image: Path, tmp_path: Path) -> None:
    report, page = tmp_path / "report.dcm", tmp_path / "page.dcm"
    before = image.read_bytes()
    first = command("infer", image, "what imaging modality is shown?", ASK, "--sr", report, "--sc", page)
    assert first.code == 0 and f"{report}: 1 Structured Report" in " ".join(first.out.split())
    sr, sc = dcmread(report), dcmread(page)
    assert any("what imaging modality is shown? -> CT, with contrast (from the header" in text for text in said(sr))
    assert any(f"{ASK} -> no answer: fracture is validated for" in text for text in said(sr))
    assert sc.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7" and image.read_bytes() == before
    assert not any("ZQXPATH" in str(element.value) for made in (sr, sc) for element in made.iterall() if element.VR != "SQ")
    again = command("infer", image, "what imaging modality is shown?", ASK, "--sr", report, "--sc", page, "--json")
    assert dcmread(report).SOPInstanceUID == sr.SOPInstanceUID and dcmread(page).SOPInstanceUID == sc.SOPInstanceUID
    assert again.json["reports"] == [{"source": str(image), "sr": str(report), "sc": str(page)}]
    assert "reports" not in command("infer", image, ASK, "--json").json
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ZQXPATH.dcm", "page.dcm", "report.dcm"]


def test_what_a_finding_is_worth_is_in_the_report(command: Command, tmp_path: Path) -> None:
    assert command("infer", DEMO / "leg-1.dcm", ASK, "--sr", tmp_path / "report.dcm", "--prevalence", "0.1").code == 0
    report = dcmread(tmp_path / "report.dcm")
    assert "(sensitivity 0." in said(report)[1] and "if 10% of pictures have it," in said(report)[1]
    assert items(report, "Presence of property")[0].ConceptCodeSequence[0].CodeMeaning == "Present"


def test_several_images_a_folder_of_reports(command: Command, image: Path, tmp_path: Path) -> None:
    Image.new("L", (32, 32)).save(tmp_path / "picture.png")
    (tmp_path / "notes.txt").write_text("no picture")
    folder = tmp_path / "reports" / "new"
    done = command("infer", tmp_path, DEMO / "leg-1.dcm", ASK, "--sr", folder, "--sc", folder, "--json")
    assert done.code == 3 and "picture.png: is no DICOM file" in done.err
    written = done.json["reports"]
    assert [row["source"] for row in written] == [str(image), str(DEMO / "leg-1.dcm")]
    assert {Path(row[kind]) for row in written for kind in ("sr", "sc")} == set(folder.iterdir())
    for file in folder.iterdir():
        assert file.name == f"{dcmread(file).SOPInstanceUID}.dcm"
    assert len(list(folder.iterdir())) == 4
    again = command("infer", tmp_path, DEMO / "leg-1.dcm", ASK, "--sr", folder, "--sc", folder, "--json")  # its own pages are no pictures
    assert again.json["reports"] == written and len(again.json["no_pictures"]) == 1 + 4
    one = command("infer", image, ASK, "--sr", folder, "--json").json["reports"][0]
    assert one["sr"] == written[0]["sr"]


@pytest.mark.parametrize("kind", ["--sr", "--sc"])
def test_paths_that_cannot_be(command: Command, image: Path, tmp_path: Path, kind: str) -> None:
    before = image.read_bytes()
    (link := tmp_path / "link.dcm").symlink_to(image)
    (hard := tmp_path / "hard.dcm").hardlink_to(image)
    for target, reason in {
        image: "would replace the image",
        link: "would replace the image",
        hard: "would replace the image",
        tmp_path / "none" / "report.dcm": "cannot be written",
        Path("/dev/full"): "cannot be written",
    }.items():
        done = command("infer", image, ASK, kind, target)
        assert done.code == 2 and is_one_line(done.err) and reason in done.err, (target, done)
    for target in (tmp_path / "new.dcm", image):
        done = command("infer", DEMO, ASK, kind, target)
        assert done.code == 2 and is_one_line(done.err) and "a file for each image" in done.err
    assert image.read_bytes() == before and not (tmp_path / "new.dcm").exists()


def test_options_that_do_not_go_together(command: Command, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = command("infer", image, ASK, "--sr", tmp_path / "a", "--sc", tmp_path / "a")
    assert same.code == 2 and "name the same file" in same.err
    unknown = command("infer", image, ASK, "--sr", tmp_path / "a", "--sr-class", "basic")
    assert unknown.code == 2 and is_one_line(unknown.err) and "comprehensive3d, comprehensive, enhanced" in unknown.err
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    missing = command("infer", image, ASK, "--sr", tmp_path / "a")
    assert missing.code == 2 and is_one_line(missing.err) and "install the extra `ward`" in missing.err
    assert command("infer", image, ASK, "--sc", tmp_path / "a").code == 0  # a page needs no highdicom


def test_what_can_have_no_report(command: Command, image: Path, tmp_path: Path) -> None:
    Image.new("L", (32, 32)).save(tmp_path / "picture.png")
    png = command("infer", tmp_path / "picture.png", ASK, "--sr", tmp_path / "a.dcm")
    assert png.code == 3 and is_one_line(png.err) and "belongs to no study" in png.err and not png.out
    dataset = dcmread(image)
    del dataset.StudyInstanceUID
    dataset.save_as(image)
    bare = command("infer", image, ASK, "--sr", tmp_path / "a.dcm")
    assert bare.code == 3 and is_one_line(bare.err) and "no valid Study Instance UID" in bare.err and not bare.out
    assert not (tmp_path / "a.dcm").exists()


def test_nothing_of_the_patient_is_printed(image: Path, tmp_path: Path) -> None:
    dataset = dcmread(image)
    for keyword, value in PATIENT.items():
        if keyword != "StudyInstanceUID":
            dataset.add_new(keyword, "LT", value)
    dataset.save_as(tmp_path / "marked.dcm")
    for options in ([], ["--json"]):
        done = process("infer", tmp_path / "marked.dcm", ASK, "--sr", tmp_path / "a.dcm", "--sc", tmp_path / "b.dcm", "--debug", *options)
        assert done.code == 0 and "ZQX" not in done.out + done.err, done


def _modules_of_the_extra() -> set[str]:
    """Top-level modules of the packages of the extra `ward`, none of which the base install asks for."""
    asked = requires("pmclip-deploy") or []
    ward = {_name(line) for line in asked if 'extra == "ward"' in line}
    assert len(ward) >= 8 and not ward & {_name(line) for line in asked if "extra ==" not in line}
    return {module for module, packages in packages_distributions().items() if ward & set(map(_name, packages))}


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def test_without_a_report_nothing_new_is_imported(image: Path) -> None:
    plain = run_cli("infer", str(image), ASK)
    ward = _modules_of_the_extra()
    assert {"highdicom", "fastapi", "uvicorn", "multipart", "prometheus_client", "pynetdicom", "yaml"} <= ward
    assert not ward & loaded(plain) and "highdicom" in ward & loaded(run_cli("infer", str(image), ASK, "--sr", str(image.with_name("a"))))
    code = plain + "\nimport sys, json; print(json.dumps(sorted(m for m in sys.modules if 'report' in m)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert json.loads(told) == []
