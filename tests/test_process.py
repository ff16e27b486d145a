"""Nothing of the process changes on import or while files are read, but what onnxruntime's reports need: it may be somebody's server."""

import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom import misc as pydicom_misc
from pydicom.data import get_testdata_file

import pmclip_deploy as pm
from pmclip_deploy import process
from pmclip_deploy.imaging import dicom, raster
from pmclip_deploy.imaging.dicom import picture_from_dicom
from pmclip_deploy.imaging.read import picture_from_path
from tests.tiny.bundle import tiny_bundle

EXTENDED, LOSSLESS = "JPGExtended.dcm", "JPEG-LL.dcm"


def shipped(name: str) -> str:
    return str(get_testdata_file(name, download=False))


# --- the environment and file descriptor 2 -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> pm.Predictor:
    return pm.load(tiny_bundle(tmp_path_factory.mktemp("process") / "bundle"))


@pytest.mark.parametrize("name", [EXTENDED, LOSSLESS, "MR_small_jp2klossless.dcm", "SC_rgb_jpeg_gdcm.dcm"])
def test_a_predictor_leaves_the_environment_and_stderr_alone(predictor: pm.Predictor, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(process, "taken_over", False)  # a command that a test before this one ran in this process took it over
    environment, swapped = dict(os.environ), list[Any]()
    monkeypatch.setattr(os, "dup2", lambda *of: swapped.append(of))
    predictor.ask(shipped(name), "is there a fracture")
    predictor.embed_image(shipped(name))
    assert dict(os.environ) == environment and not swapped


def test_the_command_line_keeps_libjpeg_quiet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(process, "taken_over", True)
    picture_from_dicom(shipped(EXTENDED))
    assert capfd.readouterr() == ("", "")
    os.write(2, b"back")
    assert capfd.readouterr().err == "back"


def test_a_library_changes_one_variable_alone(tmp_path: Path) -> None:
    """In a process of its own: import, load once, read; with and without the command line around it."""
    code = """
import json, os, sys
before = dict(os.environ)
import pmclip_deploy as pm
if sys.argv[3] == "cli":
    from pmclip_deploy.process import take_over
    take_over()
predictor = pm.load(sys.argv[1], single_use=True)
predictor.ask(sys.argv[2], "is there a fracture")
from pmclip_deploy.imaging.decoders import frame, gdcm, jpeg2000
print(json.dumps(sorted(name for name in os.environ.keys() | before if os.environ.get(name) != before.get(name))))
"""
    bundle = tiny_bundle(tmp_path / "bundle")
    mine = ("OPJ_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ORT_DISABLE_TELEMETRY")
    environment = {name: value for name, value in os.environ.items() if name not in mine}
    for who, changed in (("library", ["ORT_DISABLE_TELEMETRY"]), ("cli", sorted(mine))):
        command = [sys.executable, "-c", code, str(bundle), shipped(LOSSLESS), who]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
        assert json.loads(done.stdout) == changed


# --- warnings and logs -------------------------------------------------------------------------------------------------------------


@contextmanager
def reading_elsewhere(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, read: Any) -> Iterator[None]:
    """Another thread is in the middle of a file."""
    inside, go_on, failed = threading.Event(), threading.Event(), list[BaseException]()
    original = getattr(module, name)

    def waiting(*arguments: Any) -> Any:
        inside.set()
        assert go_on.wait(30)
        pydicom_misc.warn_and_log("NAME^OF A PATIENT")
        return original(*arguments)

    def run() -> None:
        try:
            read()
        except BaseException as error:
            failed.append(error)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, waiting)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert inside.wait(30)
            yield
        finally:
            go_on.set()
            thread.join(30)
    assert not failed


@pytest.mark.parametrize("kind", ["DICOM", "PNG"])
def test_who_warns_while_another_thread_reads_is_heard(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, kind: str
) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "x.png")
    path, module, name = {
        "DICOM": (shipped("CT_small.dcm"), dicom, "layout_from_dataset"),
        "PNG": (str(tmp_path / "x.png"), raster, "_pixels_from_image"),
    }[kind]
    picture_from_path(path)
    with warnings.catch_warnings(record=True) as heard, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        filters, level = list(warnings.filters), logging.getLogger("pydicom").getEffectiveLevel()
        with reading_elsewhere(monkeypatch, module, name, lambda: picture_from_path(path)):
            assert warnings.filters == filters and logging.getLogger("pydicom").getEffectiveLevel() == level
            warnings.warn("mine", stacklevel=1)
            pydicom_misc.warn_and_log("of my own pydicom")
            logging.getLogger("pydicom").warning("my own log")
            dcmread(shipped("CT_small.dcm")).BitsStored  # noqa: B018
            Image.warnings.warn("of my own Pillow", stacklevel=1)  # type: ignore[attr-defined]
    said = [str(one.message) for one in heard]
    assert said == ["mine", "of my own pydicom", "of my own Pillow"]
    assert Path(heard[0].filename).name == Path(heard[2].filename).name == "test_process.py"
    assert "my own log" in caplog.text and "NAME" not in caplog.text


def test_a_reading_thread_is_silent_from_its_first_file_on() -> None:
    """In a process of its own, where no parser has been imported: whatever files pydicom ships, nothing is warned or logged."""
    code = """
import json, logging, sys, warnings
from pathlib import Path
said = []
class Heard(logging.Handler):
    def emit(self, record):
        said.append(record.name)
logging.getLogger().addHandler(Heard())
logging.getLogger().setLevel(logging.DEBUG)
logging.getLogger("PIL").setLevel(logging.INFO)
import numpy, onnxruntime
import pmclip_deploy.imaging.read as reader
from pmclip_deploy.errors import InputError
from importlib.util import find_spec
read = 0
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for path in sorted((Path(find_spec("pydicom").origin).parent / "data" / "test_files").glob("*.dcm")):
        try:
            reader.picture_from_path(path)
            read += 1
        except InputError:
            pass
said += [one.category.__name__ + " in " + Path(one.filename).name for one in caught if one.category is not DeprecationWarning]
print(json.dumps([read, sorted(set(said))]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    read, said = json.loads(done.stdout)
    assert read > 20 and said == []


def test_every_parser_that_warns_is_known() -> None:
    """A new pydicom, Pillow or pylibjpeg may warn from other files."""
    import re
    from importlib.util import find_spec

    from pmclip_deploy.imaging.quiet import LOGGERS, MODULES

    warn, log = set(), set()
    for package in ("pydicom", "openjpeg", "jpeg_ls"):
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        root = Path(spec.origin).parent
        for file in root.rglob("*.py"):
            name = ".".join([package, *file.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
            if re.search(r"\.(tests|examples|data|cli|encoders|overlays|waveforms|pixel_data_handlers|sr|util)\b|conftest|jsonrep", name):
                continue
            content = file.read_text(encoding="utf-8")
            warn |= {name} if re.search(r"^\s+warnings\.warn\(", content, re.MULTILINE) else set()
            log |= {of if of else name for of in re.findall(r"getLogger\((?:\"([\w.]+)\"|__name__)\)", content)}
    assert warn <= set(MODULES) and log <= set(LOGGERS)
