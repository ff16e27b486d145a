"""Images through a node to a real archive, while processes are killed: none lost, and one current report a study."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("pynetdicom", "highdicom", "starlette", "yaml"):
    pytest.importorskip(needed, reason="needs the extra `ward`")

from tests.node import chain
from tests.report import orthanc


@pytest.mark.nightly
@pytest.mark.parametrize(("studies", "images", "kills"), [(5, 8, 6), (50, 20, 50)])
def test_one_current_report_a_study_whatever_is_killed(tmp_path: Path, studies: int, images: int, kills: int) -> None:
    command = [*orthanc.apart(), sys.executable, chain.__file__, tmp_path, *map(str, (studies, images, kills))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    print(found)
    assert found["acknowledged"] == studies * images == sum(found["counts"]["image"].values())
    assert set(found["counts"]["job"]) == {"done"} and found["integrity"] == "ok" and found["missing"] == 0
    assert len(found["current"]) == studies
    assert all(len(notes) == 1 and f"of {images} images" in notes[0] for notes in found["current"])
