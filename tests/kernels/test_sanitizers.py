"""The kernels in C++ under the sanitizers for addresses, undefined behaviour and threads."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.sources import ROOT


@pytest.mark.nightly  # compiles the C++ with each sanitizer
@pytest.mark.parametrize("kernel_source", ["similarity", "pixels"])
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(sanitizer: str, kernel_source: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("needs a C++ compiler")
    command = [
        compiler,
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        "-O1",
        "-g",
        "-std=c++17",
        "-pthread",
        "-ffp-contract=fast",
    ]
    program, empty = tmp_path / "driver", tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    if subprocess.run([*command, str(empty), "-o", str(program)], capture_output=True).returncode or subprocess.run([program]).returncode:
        pytest.skip(f"the compiler lacks -fsanitize={sanitizer}")
    sources = [str(ROOT / "kernels" / f"{kernel_source}.cpp"), str(ROOT / "tests" / "kernels" / f"{kernel_source}_driver.cpp")]
    built = subprocess.run([*command, f"-I{ROOT / 'kernels'}", *sources, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
