"""The README's console blocks are run as they stand, and must print what they show, but for numbers that vary."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file

from pmclip_deploy.models import DEFAULT_BUNDLE
from tests.sources import ROOT

BLOCKS = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


def words(text: str) -> list[str]:
    """What must be equal: words, with digits and everything that frames a table taken out."""
    return re.sub(r"[\d.]+|[^\w\s/?'-]", " ", text).split()


@pytest.mark.skipif(not BLOCKS, reason="the README shows no output before the model is embedded")
@pytest.mark.parametrize("block", BLOCKS, ids=[b.splitlines()[0][2:50] for b in BLOCKS])
def test_readme_console_block(block: str, tmp_path: Path) -> None:
    if not (DEFAULT_BUNDLE / "manifest.json").is_file():
        pytest.skip("needs the embedded bundle")
    shutil.copy(str(get_testdata_file("CT_small.dcm")), tmp_path / "scan.dcm")
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, _, shown = part.partition("\n")
        arguments = shlex.split(command)
        assert arguments[0] == "pmclip-deploy", "console blocks show the project's own command"
        binary = str(Path(sys.executable).with_name("pmclip-deploy"))
        # 100 columns, as the README's blocks were made
        env = {**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run([binary, *arguments[1:]], cwd=tmp_path, env=env, capture_output=True, encoding="utf-8", timeout=120)
        assert done.returncode == 0, done.stderr
        assert words(shown) == words(done.stdout)


def test_readme_shows_the_main_job() -> None:
    if not (DEFAULT_BUNDLE / "manifest.json").is_file():
        pytest.skip("needs the embedded bundle")
    assert BLOCKS[0].startswith("$ pmclip-deploy demo") and "pmclip-deploy infer" in BLOCKS[0]


def test_readme_python_example(tmp_path: Path) -> None:
    if not (DEFAULT_BUNDLE / "manifest.json").is_file():
        pytest.skip("needs the embedded bundle")
    shutil.copy(str(get_testdata_file("CT_small.dcm")), tmp_path / "scan.dcm")
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
