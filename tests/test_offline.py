"""Nothing leaves the machine: no look-up, no connection, and no file outside the places that docs/reference/network-and-files.md lists.

`PMCLIP_ALIVE=60 pytest tests/test_offline.py` keeps each process alive for a minute. Left alone, onnxruntime asks for a host after 9 s.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pydicom.data import get_testdata_file

from pmclip_deploy.benchmarks.harness import SYSTEMS
from tests.sources import ROOT, modules

ALIVE = float(os.environ.get("PMCLIP_ALIVE", "12"))  # seconds
QUESTION = "what imaging modality is shown?"
CALLS = (
    "trace=socket,connect,sendto,sendmsg,sendmmsg,openat,?openat2,?open,?creat,?mkdir,mkdirat,?mknod,mknodat,?link,linkat,?symlink,"
    "symlinkat,?rename,?renameat,renameat2,?io_uring_setup"
)

# The command in a process that goes on after it, since what reports to its maker waits before it does.
COMMAND = """
import sys, time
from pmclip_deploy.cli.app import main
sys.argv, alive = ["pmclip-deploy", *sys.argv[2:]], float(sys.argv[1])
try:
    main()
finally:
    time.sleep(alive)
"""
API = """
import sys, time
import pmclip_deploy as pm
predictor, end = pm.load(), time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    assert predictor.ask(sys.argv[2], sys.argv[3]).candidates
    time.sleep(0.2)
"""
TALKS = """
import contextlib, pathlib, socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.connect(("127.0.0.1", 9))
with contextlib.suppress(OSError):
    socket.getaddrinfo("nowhere.invalid", 443)
(pathlib.Path.home() / "id").write_text("x")
(pathlib.Path.home() / "id").unlink()
"""


@dataclass(frozen=True)
class Traced:
    code: int
    said: str
    network: list[str]  # calls of strace that reach, or look for, another machine
    elsewhere: list[str]  # what was written outside the folders that it was given
    left: set[str]  # files in these folders at the end


class Process:
    """One process and its children under strace, with nothing of this one's environment that would keep a library silent."""

    def __init__(self, folder: Path, code: str, *arguments: object) -> None:
        self.folder, self.trace = folder, folder / "trace"
        self.own = {name: folder / name for name in ("home", "cache", "config", "data", "state", "tmp", "out")}
        for path in self.own.values():
            path.mkdir(parents=True)
        of = {"HOME": "home", "TMPDIR": "tmp", **{f"XDG_{n.upper()}_HOME": n for n in ("cache", "config", "data", "state")}}
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        # pydicom imports requests where it is installed, as it is beside the documentation's tools. Its urllib3 then opens a socket, to no
        # one, to learn whether there is IPv6. A plain install has no requests, and these processes have none.
        plain = folder / "plain"
        plain.mkdir()
        (plain / "requests.py").write_text("raise ImportError('a plain install has no requests')\n")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(plain), os.environ.get("PYTHONPATH"))))
        environment |= {name: str(self.own[path]) for name, path in of.items()} | {"PYTHONDONTWRITEBYTECODE": "1"}
        command = ["strace", "-f", "--seccomp-bpf", "-qq", "-y", "-s", "512", "-e", "signal=none", "-e", CALLS, "-o", str(self.trace)]
        command += [sys.executable, "-c", code, *map(str, arguments)]
        self._process = subprocess.Popen(
            command, env=environment, cwd=self.own["out"], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def ended(self) -> Traced:
        said = self._process.communicate(timeout=ALIVE + 400)[0]
        lines = self.trace.read_text(errors="replace").splitlines()
        left = {str(path.relative_to(self.folder)) for own in self.own.values() for path in own.rglob("*")}
        given = tuple(f"{self.own[name]}/" for name in ("out", "tmp"))
        written = [path for path in map(self._written, lines) if path and not f"{path}/".startswith((*given, "/dev/", "/proc/"))]
        return Traced(self._process.returncode, said, [line for line in lines if _reaches_out(line)], written, left)

    def _written(self, line: str) -> str | None:
        """The last path of a call that makes or may change a file; what failed counts too."""
        call = re.match(r"\d+ +(\w+)\(", line)
        paths = re.findall(r'(?:<([^<>]*)>, )?"([^"]*)"', line)
        if not call or not paths or (call[1].startswith("open") and not re.search(r"O_(WRONLY|RDWR|CREAT)", line)):
            return None
        if not call[1].startswith(("open", "creat", "mk", "link", "symlink", "rename")):
            return None
        return os.path.normpath(self.own["out"] / paths[-1][0] / paths[-1][1])


def _reaches_out(line: str) -> bool:
    if re.search(r"/etc/resolv\.conf|/run/nscd|/systemd/resolve", line):  # a look-up, by whoever answers it
        return True
    return "io_uring_setup(" in line or bool(re.search(r"(socket\(|sa_family=)(?!AF_UNIX|AF_LOCAL)", line))


@pytest.fixture(scope="module")
def strace() -> None:
    if not shutil.which("strace"):
        pytest.skip("needs strace (Linux; Debian: apt-get install strace)")
    tried = subprocess.run(["strace", "-f", "--seccomp-bpf", "-qq", "-o", os.devnull, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()[:100]}")


@pytest.fixture(scope="module")
def traced(strace: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traced]:
    """All at once: they sleep most of the time."""
    images = tmp_path_factory.mktemp("images")
    for name in ("CT_small.dcm", "MR_small.dcm"):
        shutil.copy(str(get_testdata_file(name, download=False)), images)
    jobs: dict[str, tuple[object, ...]] = {
        "infer": (COMMAND, ALIVE, "infer", images, QUESTION, "is there a fracture?"),
        "bench": (COMMAND, ALIVE, "bench", "--seconds", 1, "--output", "rows.jsonl", "--submit-file", "bench.json"),
        "search index": (COMMAND, ALIVE, "search", "index", images, "--output", "x.index"),
        "python": (API, ALIVE, images / "CT_small.dcm", QUESTION),
    }
    if find_spec("openvino"):
        jobs["infer --device openvino"] = (*jobs["infer"], "--device", "openvino")
    begun = {name: Process(tmp_path_factory.mktemp(name), *map(str, job)) for name, job in jobs.items()}
    return {name: process.ended() for name, process in begun.items()}


def test_openvino_leaves_what_it_compiled_and_nothing_else(traced: dict[str, Traced]) -> None:
    if "infer --device openvino" not in traced:
        pytest.skip("needs the extra `openvino`")
    done = traced["infer --device openvino"]
    assert done.code == 0, done.said
    folder = "cache/pmclip-deploy/openvino"
    outside = [path for path in done.elsewhere if f"/{folder}/" not in f"{path}/" and not path.endswith(("/cache", "/cache/pmclip-deploy"))]
    assert done.network == [] and outside == []
    blobs = [path for path in done.left if re.fullmatch(rf"{folder}/[0-9a-f]{{64}}/[0-9a-f]{{16}}\.blob", path)]
    kept = {str(parent) for path in blobs for parent in [Path(path), *Path(path).parents][:-2]}
    assert done.left == kept and len(blobs) >= 2


@pytest.mark.slow("waits longer than onnxruntime does before it reports")
@pytest.mark.parametrize(
    ("name", "files"),
    [("infer", set()), ("bench", {"out/rows.jsonl", "out/bench.json"}), ("search index", {"out/x.index"}), ("python", set())],
)
def test_nothing_leaves_and_nothing_is_left(traced: dict[str, Traced], name: str, files: set[str]) -> None:
    done = traced[name]
    assert done.code == 0, done.said
    assert done.network == [] and done.elsewhere == []
    assert done.left == files


def test_a_process_that_talks_is_caught(strace: None, tmp_path: Path) -> None:
    done = Process(tmp_path, TALKS).ended()
    assert done.code == 0, done.said
    assert [line for line in done.network if "AF_INET" in line and "127.0.0.1" in line]
    assert [line for line in done.network if "resolv" in line or "nscd" in line]
    assert done.elsewhere == [str(tmp_path / "home" / "id")] and done.left == set()


# --- processes that strace did not see --------------------------------------------------------------------------------------------


def fresh(code: str, tmp_path: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """CI keeps onnxruntime silent whatever happens, so that no test is what reports."""
    inherited = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment = {**inherited, "HOME": str(tmp_path), "CI": "true", "COLUMNS": "100", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)


# Says what the variable is each time onnxruntime is imported, before the first line of it runs; others look whether it is there.
WATCHED = """
import os, sys
from importlib.machinery import PathFinder
class Watch:
    def find_spec(name, path=None, target=None):
        if name == "onnxruntime":
            spec = PathFinder.find_spec(name, path)
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (print("IMPORT", os.environ.get("ORT_DISABLE_TELEMETRY")), run(module))
            return spec
sys.meta_path.insert(0, Watch)
"""
WHOLE = """
import importlib, pkgutil, pmclip_deploy
for module in pkgutil.walk_packages(pmclip_deploy.__path__, "pmclip_deploy.", onerror=lambda name: None):
    try:
        if not module.name.endswith("._similarity"):  # a library, no module of Python's
            importlib.import_module(module.name)
    except ModuleNotFoundError as error:  # of an extra that is not here
        assert not error.name.startswith("pmclip_deploy"), error
assert "onnxruntime" not in sys.modules
"""
IMPORTS = {
    "load": "import pmclip_deploy; pmclip_deploy.load()",
    "doctor": "sys.argv = ['pmclip-deploy', 'doctor']\nfrom pmclip_deploy.cli.app import main\ntry: main()\nexcept SystemExit: pass",
    "every module": WHOLE + "from pmclip_deploy.sessions import backends; backends()['onnxruntime'].version()",
}


@pytest.mark.parametrize(("name", "was"), [("load", "0"), ("load", ""), ("load", "1"), ("doctor", "0"), ("every module", "0")])
def test_the_variable_is_set_when_onnxruntime_is_imported_and_whatever_it_was(tmp_path: Path, name: str, was: str) -> None:
    done = fresh(WATCHED + IMPORTS[name], tmp_path, ORT_DISABLE_TELEMETRY=was)
    assert done.returncode == 0 and re.findall("^IMPORT .*", done.stdout, re.M) == ["IMPORT 1"], done.stderr


@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_one_place_imports_each_package_that_reports(package: str) -> None:
    """What is imported elsewhere would report. A peer's process, benchmarks/systems.py, silences both as its first step."""
    found = set[str]()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [x.name for x in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            if any(name.partition(".")[0] == package for name in names) and not getattr(node, "level", 0):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {f"pmclip_deploy/sessions/{package}.py", "benchmarks/systems.py"}


def test_importing_the_package_changes_no_variable(tmp_path: Path) -> None:
    code = "import os; before = dict(os.environ); import pmclip_deploy; assert os.environ == before"
    assert fresh(code, tmp_path).returncode == 0


def test_onnxruntime_imported_first_is_said(tmp_path: Path) -> None:
    code = "import onnxruntime, pmclip_deploy; pmclip_deploy.load()"
    assert "RuntimeWarning: onnxruntime was imported before pmclip_deploy" in fresh(code, tmp_path).stderr
    assert "RuntimeWarning" in fresh(code, tmp_path, ORT_DISABLE_TELEMETRY="0").stderr
    for silent in ("1", "true"):
        assert not fresh(code, tmp_path, ORT_DISABLE_TELEMETRY=silent).stderr


def test_peers_are_kept_silent_too(tmp_path: Path) -> None:
    """By its path, in an environment without this package, as benchmarks.compare runs it."""
    code = f"""
import os, runpy, sys
sys.stdin = open(os.devnull)
runpy.run_path({str(SYSTEMS)!r}, run_name="__main__")
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1" and "pmclip_deploy" not in sys.modules
try:
    import openvino_telemetry
except ImportError:
    sys.exit(0)
sys.exit(1)
"""
    done = fresh(code, tmp_path)
    assert done.returncode == 0, done.stderr


def installed_for(name: str, without: str | None = None) -> set[str]:
    """The distributions that ``name`` brings here, itself included; ``without`` and what only that brings left out."""
    found, wanted = set[str](), [name]
    while wanted:
        if (one := re.sub(r"[-_.]+", "-", wanted.pop()).lower()) not in found and one != without:
            found.add(one)
            needs = map(Requirement, distribution(one).requires or ())
            wanted += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return found


def test_what_comes_with_tokenizers_alone_is_never_loaded(tmp_path: Path) -> None:
    """A network client among it: everything works where it is not installed, and docs/reference/network-and-files.md names all of it."""
    needed = installed_for("pmclip-deploy", without="huggingface-hub")
    unused = installed_for("pmclip-deploy") - needed
    assert "huggingface-hub" in unused
    docs = (Path(__file__).parents[1] / "docs" / "howto" / "install-offline.md").read_text(encoding="utf-8")
    (removed,) = re.findall(r"rm -f wheels/\{([\w,]+)\}-\*\.whl", docs)
    listed = {name.replace("_", "-") for name in removed.split(",")}
    assert unused <= listed and not listed & needed

    modules = sorted({m for m, names in packages_distributions().items() if unused & {re.sub(r"[-_.]+", "-", n).lower() for n in names}})
    assert {"huggingface_hub", "hf_xet"} <= set(modules)
    scan = str(get_testdata_file("CT_small.dcm", download=False))
    index, pictures = str(tmp_path / "x.index"), tmp_path / "pictures"
    pictures.mkdir()
    shutil.copy(scan, pictures)
    search = ["search", "index", str(pictures), "--output", index]
    for command in (["infer", scan, QUESTION], search, ["search", "query", index, "a ct"], ["classify", scan, "ct", "mri"], ["doctor"]):
        code = f"import sys\nsys.modules.update(dict.fromkeys({modules}))\nsys.argv = {['pmclip-deploy', *command]}\n"
        done = fresh(code + "from pmclip_deploy.cli.app import main; main()", tmp_path)
        assert done.returncode == 0, done.stderr
