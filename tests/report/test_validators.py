"""What other people's programs say of our reports: dicom3tools' dciodvfy, DCMTK's dsrdump and dsr2html, PixelMed's DicomSRValidator."""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pydicom
import pydicom.data
import pytest

import pmclip_deploy as pm
from pmclip_deploy.errors import InputError
from pmclip_deploy.models import DEMO
from pmclip_deploy.report.capture import capture_from_answers
from pmclip_deploy.report.document import SR_CLASSES, bytes_of, report_from_answers
from pmclip_deploy.report.source import header_from_path
from tests.report.making import ANSWERS, answer, ct
from tests.report.test_document import CHARSETS, HOSTILE, raw

pytest.importorskip("highdicom", reason="needs the extra `ward`")

QUESTIONS = ["what imaging modality is shown?", "is there a fracture?", "in what plane is this image?"]
PIXELMED = Path("/usr/share/java/pixelmed.jar")
LIMITS = [f"-Djdk.xml.{name}=0" for name in ("xpathTotalOpLimit", "xpathExprOpLimit", "xpathExprGrpLimit")]  # its XPath is over Java 17's


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed; Debian has it in dicom3tools, dcmtk or default-jdk-headless")


def written(folder: Path, name: str, report: pydicom.Dataset) -> Path:
    (folder / name).write_bytes(bytes_of(report))
    return folder / name


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of each file that can be read and referred to, of pydicom's wheel and the real data: its report and its page."""
    from tests.sources import SHARED

    folder, predictor, made = tmp_path_factory.mktemp("reports"), pm.load(), dict[str, tuple[Path, Path]]()
    wheel = Path(pydicom.data.__file__).parent
    for number, path in enumerate([*sorted(wheel.rglob("*.dcm")), *sorted((SHARED / "dicom").glob("*")), *sorted(DEMO.glob("*.dcm"))]):
        try:
            answers = predictor.ask_many(path, QUESTIONS)
        except InputError:
            continue
        header = header_from_path(path)
        try:
            report = report_from_answers(header, answers)
        except InputError as error:
            assert "StudyInstanceUID" not in header and "no valid Study Instance UID" in str(error)
            continue
        page = written(folder, f"{number}-sc.dcm", capture_from_answers(header, answers))
        made[f"{number}-{path.name}"] = (written(folder, f"{number}-sr.dcm", report), page)
    return made


def errors_of(files: Iterable[Path]) -> dict[str, list[str]]:
    """What dciodvfy calls an error, by the file's name."""
    found = dict[str, list[str]]()
    for file in files:
        said = subprocess.run(["dciodvfy", "-new", file], capture_output=True).stderr.decode(errors="replace")
        assert "SR\n" in said or "SCImage\n" in said, said  # it recognised the class
        if errors := [line for line in said.splitlines() if "Error" in line]:
            found[file.name] = errors
    return found


def pixelmed(files: list[Path]) -> None:
    """Fails on an error. One process for all files: its templates take 10 s to compile."""
    need("javac")
    if not PIXELMED.is_file():
        pytest.skip(f"{PIXELMED} is not there; Debian has it in pixelmed-apps")
    program = Path(__file__).with_name("ValidateReports.java")
    done = subprocess.run(["java", *LIMITS, "-cp", PIXELMED, program, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Found Root Template TID_1500") == done.stdout.count("Root Template Validation Complete") == len(files)
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.startswith("Error")]
    warned = {line.rpartition("/")[2] for line in lines if line.startswith("Warning")}
    assert warned <= {'CODE (121052,DCM,"Presence of property"): Content Item not in template'}  # TID 1501 has it since


def test_there_are_many_reports(reports: dict[str, tuple[Path, Path]]) -> None:
    assert len(reports) >= 60


def test_dciodvfy_finds_no_error(reports: dict[str, tuple[Path, Path]]) -> None:
    need("dciodvfy")
    assert not errors_of(file for pair in reports.values() for file in pair)


def test_dcmtk_shows_question_and_answer(reports: dict[str, tuple[Path, Path]]) -> None:
    need("dsrdump", "dsr2html")
    for report, _ in reports.values():
        dumped = subprocess.run(["dsrdump", "+Pl", report], capture_output=True)
        assert dumped.returncode == 0 and b"E: " not in dumped.stderr, dumped.stderr
        page = subprocess.run(["dsr2html", report], capture_output=True)
        assert page.returncode == 0, page.stderr
        for question in QUESTIONS:
            assert f"{question} -> ".encode() in dumped.stdout
            assert f"{question} -&gt; ".encode() in page.stdout


def test_every_class_and_a_hostile_header_are_valid(tmp_path: Path) -> None:
    need("dciodvfy")
    files = [written(tmp_path, f"{name}.dcm", report_from_answers(ct(), ANSWERS, sr_class=name)) for name in SR_CLASSES]
    for number, (keyword, value, vr) in enumerate(HOSTILE):
        source = ct()
        raw(source, keyword, value, vr)
        files.append(written(tmp_path, f"{number}-{keyword}.dcm", report_from_answers(source, ANSWERS)))
    source, request = ct(), pydicom.Dataset()
    request.RequestedProcedureID, source.RequestAttributesSequence = "RP1", [request]
    source.PatientIdentityRemoved, source.DeidentificationMethod, source.TimezoneOffsetFromUTC = "YES", "by hand", "+0100"
    files.append(written(tmp_path, "request.dcm", report_from_answers(source, ANSWERS)))
    for question in ("a\\b\nc\x00\x1b[31m", "q" * 5000, "骨折はありますか？"):
        files.append(written(tmp_path, f"{len(files)}.dcm", report_from_answers(ct(), [answer(question)])))
        files.append(written(tmp_path, f"{len(files)}-sc.dcm", capture_from_answers(ct(), [answer(question)])))
    assert not errors_of(files)


@pytest.mark.parametrize("path", CHARSETS)
def test_every_character_set_is_valid(path: str, tmp_path: Path) -> None:
    need("dciodvfy")
    of, source = pydicom.dcmread(path, force=True), ct()
    source.SpecificCharacterSet, source.PatientName = of.get("SpecificCharacterSet", ""), of.PatientName
    assert not errors_of([written(tmp_path, "report.dcm", report_from_answers(source, ANSWERS))])


@pytest.mark.slow("PixelMed's validator compiles its templates")
def test_pixelmed_finds_no_error_in_any_shape_of_content(tmp_path: Path) -> None:
    shapes = {name: report_from_answers(ct(), ANSWERS, sr_class=name) for name in SR_CLASSES}
    shapes["one"] = report_from_answers(ct(), [answer("骨折はありますか？")], prevalence=0.1)
    enhanced = ct()
    enhanced.SOPClassUID, enhanced.Modality = "1.2.840.10008.5.1.4.1.1.2.1", "XX"
    shapes["frames"] = report_from_answers(enhanced, [answer("is this a CT?", "yes", image=pm.ImageInfo("", "dicom", frame=2, frames=5))])
    pixelmed([written(tmp_path, f"{name}.dcm", report) for name, report in shapes.items()])


@pytest.mark.nightly
def test_pixelmed_finds_no_error_in_any_report(reports: dict[str, tuple[Path, Path]]) -> None:
    pixelmed([report for report, _ in reports.values()])
