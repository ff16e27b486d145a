"""The wheel: small enough to carry to a workstation, complete, and free of what the runtime must not need."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.sources import ROOT, modules

BUILDS = pytest.mark.slow("builds a wheel and compiles its kernel")
MODELS = ROOT / "pmclip_deploy" / "models"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")  # a copy, so that the build leaves nothing in the checkout
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("needs a git checkout")
    for name in names.stdout.splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(ROOT / name)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run([*command, "--no-build-isolation"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_packages_listed_are_the_folders_with_an_init() -> None:
    listed = re.search(r"^packages = (\[.*?\])", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    folders = [path.parent.relative_to(ROOT) for path in modules() if path.name == "__init__.py"]
    found = {".".join(path.parts) if path.parts[0] == "pmclip_deploy" else ".".join(("pmclip_deploy", *path.parts)) for path in folders}
    assert listed and sorted(ast.literal_eval(listed[1])) == sorted(found)


@BUILDS
def test_wheel_is_under_80_mb(wheel: Path) -> None:
    assert wheel.stat().st_size < 80e6


@BUILDS
def test_wheel_holds_the_runtime_its_model_and_the_mapped_packages(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"pmclip_deploy/{n}/__init__.py" for n in ("cli", "sessions", "models", "train", "export", "benchmarks", "kernels")} <= names
    assert {f"pmclip_deploy/models/{p.relative_to(MODELS)}" for p in [*MODELS.rglob("pmclip-lite/*/*"), *MODELS.glob("demo/*")]} <= names
    assert "pmclip_deploy/train/phrases/out_of_scope.txt" in names
    assert not [n for n in names if n.startswith(("tests/", "train/", "export/", "kernels/"))]
    assert len(names) == len(zipfile.ZipFile(wheel).namelist())  # nothing twice, though links lead to the mapped folders


@BUILDS
def test_wheel_holds_the_kernel_compiled_where_a_compiler_is(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "pmclip_deploy/kernels/similarity_tile.h" in names  # and its sources, to read and to build again
    if shutil.which("g++"):
        assert [n for n in names if n.startswith("pmclip_deploy/kernels/_similarity") and n.endswith((".so", ".pyd"))]


@BUILDS
def test_installs_without_a_compiler(source: Path, tmp_path: Path) -> None:
    missing = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
    shutil.rmtree(source / "build", ignore_errors=True)  # what the wheel's build compiled
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", str(tmp_path), str(source)], capture_output=True, text=True, env=missing)
    assert done.returncode == 0, done.stderr
    code = "import pmclip_deploy.kernels as k; print(k.__file__); print(k.implementation())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert str(tmp_path) in told.stdout and "NumPy" in told.stdout, told.stdout + told.stderr


@BUILDS
def test_base_install_needs_neither_torch_nor_gpl_code(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        metadata = Parser().parsestr(file.read(next(n for n in file.namelist() if n.endswith("METADATA"))).decode())
    base = [r.lower() for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert base and not [r for r in base if r.startswith(("torch", "open", "timm", "transformers", "pylibjpeg-libjpeg", "onnx>", "onnx<"))]
