"""Orthanc takes our reports by C-STORE and STOW-RS, and gives them back as they were."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread

from pmclip_deploy.report.capture import capture_from_answers
from pmclip_deploy.report.document import SR_CLASSES, bytes_of, report_from_answers
from tests.report import orthanc
from tests.report.making import ANSWERS, answer, ct
from tests.report.test_document import CHARSETS

pytest.importorskip("highdicom", reason="needs the extra `ward`")


def sources() -> list[Dataset]:
    made = []
    for number, path in enumerate(CHARSETS):
        of, source = dcmread(path, force=True), ct()
        source.SpecificCharacterSet, source.PatientName = of.get("SpecificCharacterSet", ""), of.PatientName
        source.SOPInstanceUID, source.PatientID = f"1.2.3.{number + 1}", f"patient {number}"
        source.StudyInstanceUID, source.SeriesInstanceUID = f"1.2.4.{number + 1}", f"1.2.5.{number + 1}"
        made.append(source)
    return made


def test_orthanc_gives_back_what_it_was_sent(tmp_path: Path) -> None:
    reports = [report_from_answers(ct(), ANSWERS, sr_class=name) for name in SR_CLASSES]
    reports += [report_from_answers(source, ANSWERS) for source in sources()]
    reports += [report_from_answers(ct(), [answer("骨折はありますか？")]), capture_from_answers(ct(), ANSWERS)]
    sent = {report.SOPInstanceUID: dcmread(io.BytesIO(bytes_of(report))) for report in reports}
    files = [tmp_path / f"{number}.dcm" for number in range(len(reports))]
    for file, report in zip(files, reports, strict=True):
        file.write_bytes(bytes_of(report))
    (tmp_path / "orthanc").mkdir()
    command = [*orthanc.apart(), sys.executable, orthanc.__file__, tmp_path / "orthanc", *files]
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode() + (tmp_path / "orthanc" / "log").read_text(errors="replace")[-2000:]
    for way, kept in json.loads(done.stdout).items():
        back = [dcmread(io.BytesIO(base64.b64decode(content))) for content in kept.values()]
        assert {dataset.SOPInstanceUID: dataset for dataset in back} == sent, way
