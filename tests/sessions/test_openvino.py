"""OpenVINO as a backend: what it answers, what it keeps, and what is said where it is missing or refuses."""

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pmclip_deploy as pm
from pmclip_deploy.benchmarks import reference
from pmclip_deploy.cli import doctor
from pmclip_deploy.errors import BundleError, DeviceError
from pmclip_deploy.export.precisions import TENSOR_GATES
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.sessions import GraphFile, Session, SessionOptions, backends, devices, open_session
from pmclip_deploy.sessions import openvino as module
from pmclip_deploy.threads import cpu_threads
from tests.sources import ROOT
from tests.tiny.bundle import SIZE, facets_bundle, tiny_bundle, tiny_files
from tests.tiny.findings import FINDINGS

OPENVINO = SessionOptions("openvino")
DEMO = sorted((DEFAULT_BUNDLE.parents[1] / "demo").glob("*.dcm"))
QUESTIONS = ("is there a fracture?", "what body part is shown?", "what imaging modality is shown?")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it keeps what it compiled."""
    monkeypatch.setenv("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pmclip-deploy" / "openvino"


@pytest.fixture
def openvino(cache: Path) -> Any:
    if not find_spec("openvino"):
        pytest.skip("needs the extra `openvino`")
    return module.import_openvino()  # never `import openvino`, which reports


def inputs_of(session: Session, seed: int, rows: int = 3) -> dict[str, Any]:
    """Arrays that a graph's inputs take."""
    drawn, found = np.random.default_rng(seed), {}
    for name, (kind, shape) in session._first.takes.items():  # type: ignore[attr-defined]
        sizes = [rows if size.is_dynamic else size.get_length() for size in shape]
        found[name] = drawn.integers(1, 7, sizes) if kind == np.int64 else drawn.normal(0, 1, sizes).astype(kind)
    return found


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return list(found) == list(expected) and all(np.array_equal(found[name], expected[name]) for name in expected)


# --- what it answers ------------------------------------------------------------------------------------------------------------


def test_the_embedded_bundle_keeps_its_gates(openvino: Any) -> None:
    """Those that its export kept, against fp32 PyTorch."""
    predictor = pm.load(device="openvino")
    assert (predictor.model.backend, predictor.model.device, predictor.notes) == ("openvino", "cpu", [])
    figures, _ = reference.agreement(predictor)
    assert figures is not None and reference.misses(predictor.manifest.precision, figures) == []


def test_the_packaged_pictures_get_onnxruntimes_answers(openvino: Any) -> None:
    here, there = pm.load(device="openvino"), pm.load(device="cpu")
    limit = TENSOR_GATES[here.manifest.precision]["cosine_mean"]
    for film in DEMO:
        assert cosine(here.embed_image(film), there.embed_image(film)) >= limit
        for question in QUESTIONS:
            ours, theirs = here.ask(film, question), there.ask(film, question)
            assert (ours.answer, ours.reason, ours.understood_as) == (theirs.answer, theirs.reason, theirs.understood_as)
    texts = zip(here.embed_texts(QUESTIONS), there.embed_texts(QUESTIONS), strict=True)
    assert len(DEMO) == 2 and min(cosine(*pair) for pair in texts) >= limit


@pytest.mark.parametrize("made", ["lite", "mevf", "findings"])
def test_graphs_in_floats_say_what_onnxruntime_says(openvino: Any, tmp_path: Path, made: str) -> None:
    if made == "findings":
        facets_bundle(tmp_path / "bundle", FINDINGS)
    else:
        tiny_bundle(tmp_path / "bundle", made)
    graphs = sorted((tmp_path / "bundle").glob("*.onnx"))
    for graph in graphs:
        here, there = open_session(graph, OPENVINO), open_session(graph, SessionOptions("cpu"))
        inputs = inputs_of(here, 0)
        found, expected = here.run(inputs), there.run(inputs)
        assert here.inputs == there.inputs and list(found) == list(expected) == list(there.outputs)
        for name in expected:
            assert found[name].dtype == expected[name].dtype
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=f"{graph.name} {name}")
    assert graphs


def test_integers_between_q_and_dq_unless_the_bundle_is_for_a_gpu(openvino: Any, tmp_path: Path) -> None:
    graph = DEFAULT_BUNDLE / "image.onnx"

    def multiplied(integers: bool) -> set[str]:
        model = open_session(graph, OPENVINO._replace(integer_kernels=integers))._first.model  # type: ignore[attr-defined]
        nodes = [node.get_rt_info() for node in model.get_runtime_model().get_ops()]
        return {str(node["runtimePrecision"].astype(str)) for node in nodes if node["layerType"].astype(str) == "Convolution"}

    assert multiplied(True) & {"u8", "i8"} and multiplied(False) == {"f32"}


def test_floats_are_f32_whatever_the_processor_has(openvino: Any) -> None:
    session = open_session(DEFAULT_BUNDLE / "head.onnx", OPENVINO)
    properties = {name: session._first.model.get_property(name) for name in ("INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS")}  # type: ignore[attr-defined]
    assert properties == {"INFERENCE_PRECISION_HINT": openvino.Type.f32, "INFERENCE_NUM_THREADS": cpu_threads()}


def test_several_threads_run_one_session(openvino: Any, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle")
    session = open_session(tmp_path / "bundle" / "image.onnx", OPENVINO)
    asked = [inputs_of(session, seed, 1 + seed % 3) for seed in range(24)]
    expected = [session.run(inputs) for inputs in asked]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            found = list(pool.map(session.run, asked))
            assert all(same(one, other) for one, other in zip(found, expected, strict=True))
    assert same(expected[0], session.run(asked[0]))  # what was returned is not written to by later runs


FIRST_TYPES = """
import sys, threading
from pmclip_deploy.sessions.openvino import core, import_openvino
sys.setswitchinterval(1e-6)
barrier = threading.Barrier(8)
def first():
    barrier.wait()
    core()
    import_openvino().Type.f32.to_dtype()
for thread in [threading.Thread(target=first) for _ in range(8)]:
    thread.start()
"""


def test_threads_that_open_the_first_graphs_do_not_wait_for_each_other(openvino: Any) -> None:
    subprocess.run([sys.executable, "-c", FIRST_TYPES], check=True, timeout=60)


# --- what it keeps --------------------------------------------------------------------------------------------------------------


def test_what_it_compiled_is_kept_by_the_graphs_hash(openvino: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tiny_files()
    for name in ("image.onnx", "text.onnx"):
        (tmp_path / name).write_bytes(files[name])
    read: list[Path] = []

    def graph(name: str, sha256: str | None) -> GraphFile:
        return GraphFile(tmp_path / name, sha256, read=lambda path: read.append(path) or path.read_bytes())  # type: ignore[func-returns-value]

    def opened(of: GraphFile, **options: Any) -> Any:
        return module.BACKEND.open(of, OPENVINO._replace(**options))

    first = opened(graph("image.onnx", "a" * 64))
    inputs = inputs_of(first, 0)
    (kept,) = cache.rglob("*.*")
    assert kept.parent == cache / ("a" * 64) and kept.suffix == ".blob" and kept.stat().st_mode & 0o77 == 0
    again = opened(graph("image.onnx", "a" * 64))
    assert len(read) == 1 and (again.inputs, again.outputs) == (first.inputs, first.outputs)
    assert same(again.run(inputs), first.run(inputs))
    opened(graph("text.onnx", "b" * 64))
    opened(graph("image.onnx", "a" * 64), integer_kernels=False)
    assert len(read) == 3 and len(list(cache.rglob("*.blob"))) == 3  # of each graph, and of each way to compute it, its own
    opened(graph("image.onnx", None))
    assert len(read) == 4 and len(list(cache.rglob("*.blob"))) == 3  # a graph without a hash is not kept

    monkeypatch.setattr(module.import_openvino(), "__version__", "another")
    opened(graph("image.onnx", "a" * 64))
    assert len(read) == 5


@pytest.mark.parametrize("damage", ["cut", "a byte", "empty", "of another processor", "a folder"])
def test_what_is_kept_and_unusable_is_compiled_again(openvino: Any, cache: Path, tmp_path: Path, damage: str) -> None:
    (tmp_path / "image.onnx").write_bytes(tiny_files()["image.onnx"])
    graph = GraphFile(tmp_path / "image.onnx", "a" * 64)
    first = module.BACKEND.open(graph, OPENVINO)
    (kept,) = cache.rglob("*.blob")
    whole = kept.read_bytes()
    if damage == "a folder":
        kept.unlink()
        kept.mkdir()
    else:
        other = whole[32:].replace(b"isa=", b"isb=")
        kept.write_bytes(
            {
                "cut": whole[:-10],
                "a byte": whole[:500] + bytes([whole[500] ^ 1]) + whole[501:],
                "empty": b"",
                "of another processor": hashlib.sha256(other).digest() + other,
            }[damage]
        )
    inputs = inputs_of(first, 0)
    assert same(module.BACKEND.open(graph, OPENVINO).run(inputs), first.run(inputs))
    assert kept.is_dir() or kept.read_bytes()[32:100] == whole[32:100]


def test_where_nothing_can_be_kept_it_compiles(openvino: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", str(tmp_path / "file"))
    tiny_bundle(tmp_path / "bundle")
    assert pm.load(tmp_path / "bundle", "openvino").ask(np.zeros((20, 20), np.uint8), "is there a fracture?")


# --- errors ---------------------------------------------------------------------------------------------------------------------


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    module._core.cache_clear()
    tiny_bundle(tmp_path / "bundle")
    with pytest.raises(DeviceError, match=r"OpenVINO cannot be loaded .*; install it with `pip install openvino`") as caught:
        pm.load(tmp_path / "bundle", "openvino")
    assert "\n" not in str(caught.value)
    done = command("infer", DEMO[0], "is there a fracture?", "--device", "openvino")
    assert done.code == 6 and done.err.count("\n") == 1 and "pip install openvino" in done.err
    row = doctor._backend(module.BACKEND)
    assert row["version"] is None and row["threads"] is None and "pip install openvino" in row["problem"]


def test_doctor(openvino: Any) -> None:
    row = doctor._backend(module.BACKEND)
    assert row == {
        "name": "openvino",
        "devices": ["openvino"],
        "target": None,
        "version": openvino.__version__,
        "problem": None,
        "threads": cpu_threads(),
    }


def test_auto_stays_with_onnxruntime() -> None:
    assert devices()["auto"] is devices()["cpu"] is backends()["onnxruntime"]


def test_a_graph_that_it_refuses(openvino: Any, tmp_path: Path) -> None:
    """One that the check of graphs lets through: it reads no functions."""
    from pmclip_deploy.kernels.onnx_function import similarity_graph

    (tmp_path / "labels.onnx").write_bytes(similarity_graph(3, 4, 2).SerializeToString())
    said = r'labels\.onnx: OpenVINO cannot load it \(.+ContrastiveSimilarity.*\); pass device="cpu"'
    with pytest.raises(DeviceError, match=said) as caught:
        open_session(tmp_path / "labels.onnx", OPENVINO)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 6
    (tmp_path / "cut.onnx").write_bytes(b"\x3a\x05")
    with pytest.raises(BundleError, match="no ONNX file"):
        open_session(tmp_path / "cut.onnx", OPENVINO)


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (np.zeros((1, 3, SIZE, SIZE + 1), np.float32), rf"not float32 of shape \(1, 3, {SIZE}, {SIZE + 1}\)"),
        (np.zeros((3, SIZE, SIZE), np.float32), rf"not float32 of shape \(3, {SIZE}, {SIZE}\)"),
        (np.zeros((1, 3, SIZE, SIZE)), r"not float64 of shape"),
        (None, "not nothing"),
    ],
)
def test_inputs_that_a_graph_does_not_take(openvino: Any, tmp_path: Path, pixels: Any, said: str) -> None:
    """OpenVINO runs them, and says something."""
    tiny_bundle(tmp_path / "bundle")
    session = open_session(tmp_path / "bundle" / "image.onnx", OPENVINO)
    rows = "1" if pixels is not None and len(pixels) == 1 else r"\?"  # what was compiled for one, or for any number
    with pytest.raises(BundleError, match=rf"its input 'pixels' is float32 of shape \[{rows},3,{SIZE},{SIZE}\], {said}"):
        session.run({} if pixels is None else {"pixels": pixels})


def test_a_graph_of_pictures_is_compiled_for_the_batches_that_were_announced(openvino: Any, cache: Path, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle")
    graph = GraphFile(tmp_path / "bundle" / "image.onnx", "a" * 64)
    here, there = module.BACKEND.open(graph, OPENVINO._replace(rows=(1, 4))), open_session(graph.path, SessionOptions("cpu"))
    pixels = np.random.default_rng(0).normal(size=(5, 3, SIZE, SIZE)).astype(np.float32)
    for _ in range(2):
        for count in (4, 1, 3, 5):  # 3 and 5 share what takes any number
            found, expected = (session.run({"pixels": pixels[:count]})["embedding"] for session in (here, there))
            assert np.allclose(found, expected, atol=1e-4)
    assert set(here._models) == {1, 4, None} and len(list(cache.rglob("*.blob"))) == 3  # type: ignore[attr-defined]
    text = open_session(tmp_path / "bundle" / "text.onnx", OPENVINO)
    assert set(text._models) == {None}  # type: ignore[attr-defined]  # texts have any length


# --- its import -----------------------------------------------------------------------------------------------------------------

IMPORT = """
import sys
from pmclip_deploy.sessions import backends
assert not [name for name in sys.modules if name.startswith("openvino")]
assert backends()["openvino"].available()
assert not {"openvino.tools", "openvino.tools.ovc", "openvino_telemetry"} & set(sys.modules)
"""


def test_its_import_reaches_nothing_that_reports(openvino: Any) -> None:
    """What strace sees: tests/test_offline.py."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
