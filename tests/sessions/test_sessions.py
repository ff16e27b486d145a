"""Which backend runs a bundle's graphs, what is said where an engine does not fit, and an engine's buffers, shapes and types."""

import json
import subprocess
import sys
from ctypes import c_byte
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pmclip_deploy import machine
from pmclip_deploy.bundle.files import write_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.types import Engine
from pmclip_deploy.cli import doctor
from pmclip_deploy.errors import DeviceError, UsageError
from pmclip_deploy.opening import session_from_bundle
from pmclip_deploy.sessions import SessionOptions, backends, cache_folder, devices, onnx_sha256, open_session
from pmclip_deploy.sessions.engines import EngineBackend, Machine, engine_backends
from pmclip_deploy.sessions.engines import session as engine_session
from pmclip_deploy.sessions.engines.replay import OnGpu, Replay, bytes_of
from pmclip_deploy.sessions.engines.session import Context, parts, profile_for
from pmclip_deploy.sessions.onnxruntime import PROVIDERS, OnnxRuntime, _provider_options
from tests.command import MAIN
from tests.sources import ROOT
from tests.tiny.bundle import DIM, SIZE, tiny_files, tiny_manifest
from tests.tree import Tree

PIXELS = np.random.default_rng(0).uniform(-1, 1, (3, 3, SIZE, SIZE)).astype(np.float32)
ROW = Engine("image", "image.plan", "tensorrt_rtx", "1.7.1.116", ("8.6", "8.9"), "linux-x86_64", "a" * 64, (1, 1, 8))
HERE = Machine("1.7.1.116", "8.9", "linux-x86_64")
DRIVER = Path("/proc/driver/nvidia/version").exists()


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[Path, Manifest]:
    """A bundle for RTX whose plan is no plan: what is before the GPU, and what comes where there is none."""
    manifest, files = tiny_manifest(target="rtx"), tiny_files()
    written = write_bundle(tmp_path / "before", manifest, files)
    onnx = onnx_sha256({name: file.sha256 for name, file in written.files.items()}, "image.onnx")
    manifest = replace(manifest, engines=(replace(ROW, onnx_sha256=onnx),))
    return tmp_path / "bundle", write_bundle(tmp_path / "bundle", manifest, {**files, "image.plan": b"no plan" * 99})


def on(monkeypatch: pytest.MonkeyPatch, here: Machine) -> None:
    monkeypatch.setattr(EngineBackend, "machine", lambda self: here)


def misfits(row: Engine, here: Machine, onnx: str) -> list[str]:
    return engine_backends()[row.backend].misfits(row, here, onnx)


# --- what fits ------------------------------------------------------------------------------------------------------------------


def test_an_engine_that_fits() -> None:
    assert misfits(ROW, HERE, "a" * 64) == []


@pytest.mark.parametrize(
    ("row", "here", "said"),
    [
        ({"version": "1.6.0.1"}, {}, "built for TensorRT-RTX 1.6.0.1, here is 1.7.1.116"),
        ({}, {"compute_capability": "7.5"}, "built for compute capability 8.6, 8.9, here is 7.5"),
        ({}, {"platform": "linux-aarch64"}, "built for platform linux-x86_64, here is linux-aarch64"),
        ({"onnx_sha256": "b" * 64}, {}, f"built for ONNX graph {'b' * 12}, here is {'a' * 12}"),
        ({"plugin_sha256": "c" * 64}, {}, f"built for plugin {'c' * 12}, here is none"),
    ],
)
def test_a_misfit_names_both_sides(row: dict[str, Any], here: dict[str, Any], said: str) -> None:
    assert misfits(replace(ROW, **row), HERE._replace(**here), "a" * 64) == [said]


def test_rtx_engines_run_on_either_system_and_others_do_not() -> None:
    there = HERE._replace(platform="windows-x86_64")
    assert misfits(ROW, there, "a" * 64) == []
    assert misfits(replace(ROW, backend="tensorrt"), there, "a" * 64) == ["built for platform linux-x86_64, here is windows-x86_64"]


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("10.3.0.26", "10.3.0.26", True),
        ("10.3.0.26", "10.4.0.1", False),
        ("10.3.0.26+", "10.3.0.26", True),
        ("10.3.0.26+", "10.13.0.1", True),
        ("10.3.0.26+", "11.1.0.2", True),
        ("10.3.0.26+", "10.2.1.99", False),
    ],
)
def test_versions(built: str, here: str, fits: bool) -> None:
    found = misfits(replace(ROW, backend="tensorrt", version=built), HERE._replace(version=here), "a" * 64)
    assert found == ([] if fits else [f"built for TensorRT {built}, here is {here}"])


# --- which session --------------------------------------------------------------------------------------------------------------


def test_auto_says_both_sides_and_runs_the_graph(
    bundle: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    on(monkeypatch, HERE._replace(version="1.8.0.5", compute_capability="12.0"))
    notes: list[str] = []
    session = session_from_bundle(*bundle, "image", notes=notes)
    expected = open_session(bundle[0] / "image.onnx", SessionOptions("cpu")).run({"pixels": PIXELS})["embedding"]
    np.testing.assert_allclose(session.run({"pixels": PIXELS})["embedding"], expected, rtol=0, atol=1e-5)
    assert session.backend == "onnxruntime" and len(notes) == 1 and "\n" not in notes[0]
    for side in ("TensorRT-RTX 1.7.1.116, here is 1.8.0.5", "capability 8.6, 8.9, here is 12.0", f"onnxruntime runs on {session.device}"):
        assert side in notes[0]
    assert capfd.readouterr() == ("", "")


def test_a_graph_without_an_engine_needs_no_note(bundle: tuple[Path, Manifest]) -> None:
    notes: list[str] = []
    assert session_from_bundle(*bundle, "head", notes=notes).backend == "onnxruntime" and notes == []


def test_an_engine_asked_for_by_name_never_falls_back(bundle: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, HERE._replace(compute_capability="7.5"))
    with pytest.raises(DeviceError, match=r"capability 8\.6, 8\.9, here is 7\.5; export it again, or pass device=\"cpu\"") as caught:
        session_from_bundle(*bundle, "image", "tensorrt_rtx")
    assert caught.value.exit_code == 6
    hint = "export it with `pmclip-deploy export --target {}`, or pass device=\"auto\""
    with pytest.raises(DeviceError, match=f"bundle tiny has no tensorrt engine of its graph image; {hint.format('tensorrt')}"):
        session_from_bundle(*bundle, "image", "tensorrt")
    with pytest.raises(DeviceError, match=f"no tensorrt_rtx engine of its graph head; {hint.format('rtx')}"):
        session_from_bundle(*bundle, "head", "tensorrt_rtx")


def test_the_first_engine_that_fits_is_taken(bundle: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, manifest = bundle
    row = manifest.engines[0]
    rows = tuple(replace(row, compute_capabilities=(capability,)) for capability in ("7.5", "8.9"))
    taken: list[Engine] = []
    monkeypatch.setattr(engine_session, "TensorRTSession", lambda backend, row, *rest: taken.append(row))
    on(monkeypatch, HERE)
    session_from_bundle(folder, replace(manifest, engines=rows), "image")
    assert taken == [rows[1]]


def test_without_the_package(bundle: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    notes: list[str] = []
    assert session_from_bundle(*bundle, "image", notes=notes).backend == "onnxruntime"
    assert "built for TensorRT-RTX 1.7.1.116, but TensorRT-RTX is not installed here" in notes[0] and "pip install tensorrt_rtx" in notes[0]
    with pytest.raises(DeviceError, match="is not installed here"):
        session_from_bundle(*bundle, "image", "tensorrt_rtx")


@pytest.mark.skipif(DRIVER, reason="this machine has an NVIDIA driver")
def test_without_a_driver(bundle: tuple[Path, Manifest], capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx"), pytest.importorskip("cuda.core")
    notes: list[str] = []
    assert session_from_bundle(*bundle, "image", notes=notes).device == "cpu"
    assert "but no NVIDIA driver answers here" in notes[0] and capfd.readouterr() == ("", "")


def test_a_plan_that_is_none(bundle: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """TensorRT-RTX refuses it before it asks for a GPU."""
    trt = pytest.importorskip("tensorrt_rtx")
    on(monkeypatch, HERE._replace(version=trt.__version__))
    monkeypatch.setattr(engine_session, "gpu", lambda: None)
    folder, manifest = bundle
    manifest = replace(manifest, engines=(replace(manifest.engines[0], version=trt.__version__),))
    with pytest.raises(DeviceError, match=r"image\.plan: TensorRT-RTX cannot load it \(.*Serialization"):
        session_from_bundle(folder, manifest, "image", "tensorrt_rtx")
    notes: list[str] = []
    assert session_from_bundle(folder, manifest, "image", notes=notes).backend == "onnxruntime" and "cannot load it" in notes[0]
    assert capfd.readouterr() == ("", "")


def test_a_bundle_for_the_cpu_stays_there(bundle: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(OnnxRuntime, "open", lambda self, graph, options: asked.append(options.device))
    folder, manifest = bundle
    for target in ("cpu", "rtx"):
        session_from_bundle(folder, replace(manifest, target=target, engines=()), "image")
    assert asked == ["cpu", "auto"]


def test_unknown_devices(bundle: tuple[Path, Manifest]) -> None:
    with pytest.raises(UsageError, match=f"unknown device 'tpu'; choose one of {', '.join(devices())}"):
        session_from_bundle(*bundle, "image", "tpu")
    with pytest.raises(UsageError, match="unknown device 'tensorrt'"):  # a graph alone has no engine
        open_session(bundle[0] / "image.onnx", SessionOptions("tensorrt"))


# --- onnxruntime's providers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [device for device in PROVIDERS if device != "cpu"])
def test_a_provider_that_is_not_there(bundle: tuple[Path, Manifest], device: str) -> None:
    import onnxruntime

    if PROVIDERS[device].name in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has {PROVIDERS[device].name}")
    with pytest.raises(DeviceError) as caught:
        session_from_bundle(*bundle, "image", device)
    assert PROVIDERS[device].device.install in str(caught.value) and "CPUExecutionProvider" in str(caught.value)
    assert caught.value.exit_code == 6


def test_no_session_has_a_provider_that_sends_inputs_away(bundle: tuple[Path, Manifest]) -> None:
    """onnxruntime's wheel for the CPU has AzureExecutionProvider too, which `doctor` lists."""
    session = open_session(bundle[0] / "image.onnx", SessionOptions("cpu"))
    assert session._session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("device", [device for device in sorted(PROVIDERS) if PROVIDERS[device].caches])
def test_a_provider_that_is_there(bundle: tuple[Path, Manifest], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    if PROVIDERS[device].name not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {PROVIDERS[device].name}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = open_session(bundle[0] / "image.onnx", SessionOptions("cpu")).run({"pixels": PIXELS})["embedding"]
    for _ in range(2):  # the second from the cache
        session = session_from_bundle(*bundle, "image", device)
        np.testing.assert_allclose(session.run({"pixels": PIXELS})["embedding"], expected, rtol=0, atol=1e-3)
    assert session.device == device


def test_caches_lie_outside_the_bundle_and_belong_to_one_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", str(tmp_path))
    options = _provider_options(PROVIDERS["ort-tensorrt"], "abc")
    folder = tmp_path / "pmclip-deploy" / "onnxruntime" / "ort-tensorrt" / "abc"
    assert folder.is_dir() and options["trt_engine_cache_path"] == str(folder) and options["trt_engine_cache_enable"] == "1"
    assert not {"trt_fp16_enable", "trt_int8_enable"} & set(options)  # either would let TensorRT choose types itself
    assert (
        _provider_options(PROVIDERS["ort-tensorrt"], None)
        == _provider_options(PROVIDERS["cuda"], "abc")
        == _provider_options(PROVIDERS["cpu"], "abc")
        == {}
    )
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", str(in_the_way))
    assert cache_folder("x") is None and _provider_options(PROVIDERS["ort-openvino"], "abc") == {}


def test_a_graphs_hash_is_of_its_weights_too() -> None:
    hashes = {"image.onnx": "1" * 64, "image.onnx.data": "2" * 64, "text.onnx": "1" * 64}
    found = {onnx_sha256({**hashes, **change}, "image.onnx") for change in ({}, {"image.onnx.data": "3" * 64}, {"image.onnx": "3" * 64})}
    assert len(found) == 3 and onnx_sha256(hashes, "text.onnx") not in found


# --- buffers, shapes, types -----------------------------------------------------------------------------------------------------

PROFILES = [
    [((1, 3, 8, 8), (1, 3, 8, 8)), ((1, 1), (1, 77))],
    [((1, 3, 8, 8), (8, 3, 8, 8)), ((1, 1), (8, 77))],
]


@pytest.mark.parametrize(("batch", "length", "profile"), [(1, 12, 0), (1, 77, 0), (2, 12, 1), (8, 77, 1)])
def test_the_profile_of_a_batch(batch: int, length: int, profile: int) -> None:
    assert profile_for({"pixels": (batch, 3, 8, 8), "tokens": (batch, length)}, PROFILES) == profile


@pytest.mark.parametrize(
    ("pixels", "tokens", "said"),
    [
        ((9, 3, 8, 8), (9, 12), r"pixels of shape \(1, 3, 8, 8\) to \(8, 3, 8, 8\), not \(9, 3, 8, 8\)"),
        ((1, 3, 9, 8), (1, 12), r"not \(1, 3, 9, 8\)"),
        ((1, 3, 8), (1, 12), r"not \(1, 3, 8\)"),
        ((0, 3, 8, 8), (0, 12), r"not \(0, 3, 8, 8\)"),
        ((1, 3, 8, 8), (1, 78), r"tokens of shape \(1, 1\) to \(8, 77\), not \(1, 78\)"),
    ],
)
def test_shapes_that_no_profile_takes(pixels: tuple[int, ...], tokens: tuple[int, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        profile_for({"pixels": pixels, "tokens": tokens}, PROFILES)


@pytest.mark.parametrize(("batch", "largest", "sizes"), [(1, 8, [1]), (8, 8, [8]), (9, 8, [4, 5]), (17, 8, [5, 6, 6]), (0, 8, [0])])
def test_a_large_batch_goes_in_even_parts(batch: int, largest: int, sizes: list[int]) -> None:
    found = parts(batch, largest)
    assert [rows.stop - rows.start for rows in found] == sizes
    assert [i for rows in found for i in range(batch)[rows]] == list(range(batch))


def test_bytes() -> None:
    assert bytes_of((2, 3, 224, 224), np.dtype(np.float32)) == 2 * 3 * 224 * 224 * 4
    assert bytes_of((1, 77), np.dtype(np.int64)) == 77 * 8


def test_types() -> None:
    """What the graphs' contract names, as TensorRT-RTX names it."""
    trt = pytest.importorskip("tensorrt_rtx")
    names = {trt.DataType.FLOAT: np.float32, trt.DataType.HALF: np.float16, trt.DataType.INT64: np.int64}
    assert {kind: trt.nptype(kind) for kind in names} == names


def test_arrays_on_the_gpu() -> None:
    """StridedMemoryView reads memory of the host alike, and needs no driver for it."""
    utils = pytest.importorskip("cuda.core.utils")
    array = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    whole = OnGpu.from_view("image", utils.StridedMemoryView(array, stream_ptr=-1), array.dtype)
    assert (whole.address, whole.shape, whole.bytes, len(whole)) == (array.ctypes.data, array.shape, array.nbytes, 4)
    part = whole[1:3]
    assert (part.address, part.shape, part.bytes) == (array[1:].ctypes.data, (2, 2, 3), array[1:3].nbytes)
    for wrong in (array.astype(np.float64), array.transpose(0, 2, 1), array[:, ::2]):
        with pytest.raises(UsageError, match="image on the GPU must be a C-contiguous array of float32"):
            OnGpu.from_view("image", utils.StridedMemoryView(wrong, stream_ptr=-1), array.dtype)


# --- what runs an engine, with memory of the host in place of the GPU's ------------------------------------------------------------


class Memory:
    """A buffer of cuda.core's; ``work`` takes what is enqueued."""

    def __init__(self, size: int) -> None:
        self.array = np.zeros(max(1, size), np.uint8)
        self.handle, self.size = self.array.ctypes.data, size

    def copy_from(self, source: "Memory", stream: Any) -> None:
        stream.work(lambda: np.copyto(self.array, source.array))

    def copy_to(self, target: "Memory", stream: Any) -> None:
        target.copy_from(self, stream)


class Stream:
    """It runs at once; one that captures keeps the work."""

    handle, open = 7, False

    def __init__(self) -> None:
        self.kept: list[Any] | None = None

    def work(self, work: Any) -> None:
        work() if self.kept is None else self.kept.append(work)

    def sync(self) -> None:
        pass


class Builder(Stream):
    """A capture: its stream is itself."""

    invalid = False

    @property
    def stream(self) -> "Builder":
        return self

    def begin_building(self, mode: str) -> None:
        self.kept, self.open = [], True

    def end_building(self) -> "Builder":
        if self.invalid:  # as cuda.core does
            raise RuntimeError("Build process encountered an error and has been invalidated. Build process must now be ended.")
        self.open = False
        return self

    def complete(self) -> Any:
        work = self.kept or []
        return SimpleNamespace(launch=lambda stream: [one() for one in work])

    def close(self) -> None:
        self.open = False


class Doubled:
    """An engine that doubles its input, and can be told to fail; an ``Execution``."""

    def __init__(self, gpu: "Gpu", shapes: tuple[tuple[int, ...], ...]) -> None:
        self.gpu, self.shapes, self.at = gpu, {"x": shapes[0], "y": shapes[0]}, dict[str, int]()

    def bind(self, name: str, address: int) -> None:
        self.at[name] = address

    def enqueue(self, stream: int) -> None:
        capture = self.gpu.builders[-1] if self.gpu.builders and self.gpu.builders[-1].open else None
        if capture is not None and self.gpu.fails:
            capture.invalid = True
            raise RuntimeError("cudaMalloc in a capture")
        count = int(np.prod(self.shapes["x"]))
        x, y = (np.frombuffer((c_byte * (4 * count)).from_address(self.at[name]), np.float32) for name in "xy")
        (capture or self.gpu.streams[0]).work(lambda: np.copyto(y, 2 * x))
        self.gpu.enqueued += 1


class Gpu:
    """In place of cuda.core and its device."""

    def __init__(self) -> None:
        self.builders, self.streams, self.enqueued, self.fails = list[Builder](), list[Stream](), 0, False
        self.LegacyPinnedMemoryResource = lambda: SimpleNamespace(allocate=Memory)

    def create_stream(self) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def create_graph_builder(self) -> Builder:
        self.builders.append(Builder())
        return self.builders[-1]

    def allocate(self, size: int, stream: Any) -> Memory:
        return Memory(size)


def replay(gpu: Gpu, captures: bool = True) -> Replay:
    kind = np.dtype(np.float32)
    return Replay(gpu, gpu, ["x"], ["y"], {"x": kind, "y": kind}, lambda shapes: Doubled(gpu, shapes), captures)


def test_an_engine_runs_plainly_then_is_captured_then_replayed() -> None:
    gpu = Gpu()
    session, drawn = replay(gpu), np.random.default_rng(0)
    for shape in ((2, 3), (2, 3), (1, 3), (2, 3), (1, 3), (2, 3)):
        x = drawn.normal(size=shape).astype(np.float32)
        np.testing.assert_array_equal(session.run([x])[0], 2 * x)
    assert (len(gpu.builders), gpu.enqueued, session.capture_error) == (2, 4, None)  # of each shape once plainly and once in a capture


@pytest.mark.parametrize("captures", [True, False])
def test_an_engine_that_cannot_be_captured_runs_plainly(captures: bool) -> None:
    gpu = Gpu()
    gpu.fails, session, x = True, replay(gpu, captures), np.ones((1, 3), np.float32)
    for _ in range(4):
        np.testing.assert_array_equal(session.run([x])[0], 2 * x)
    assert gpu.enqueued == 4 and len(gpu.builders) == captures  # it is tried once
    assert not any(builder.open for builder in gpu.builders)
    assert str(session.capture_error) == ("cudaMalloc in a capture" if captures else "None")


def test_the_error_of_a_capture_is_no_cause_of_a_later_one() -> None:
    errors = ["an allocation is not permitted in a capture"]
    context = Context(SimpleNamespace(execute_async_v3=lambda stream: not errors.append("out of memory")), {}, errors)
    context.enqueue(7)
    assert errors == ["out of memory"]


def test_contexts_share_their_activations() -> None:
    """With TensorRT-RTX's own names, where it is installed: the stand-in has no other."""
    trt = pytest.importorskip("tensorrt_rtx")
    made, calls = (
        list[Any](),
        ("nvtx_verbosity", "set_device_memory", "set_optimization_profile_async", "set_input_shape", "get_tensor_shape"),
    )
    assert all(hasattr(trt.IExecutionContext, name) for name in calls) and hasattr(trt.ICudaEngine, "device_memory_size_v2")
    assert hasattr(trt.IRuntimeConfig, "set_execution_context_allocation_strategy")

    def context(config: Any) -> Any:
        made.append(SimpleNamespace(memory=[], get_tensor_shape=lambda name: (1, 4)))
        made[-1].set_device_memory = lambda *given: made[-1].memory.append(given)
        made[-1].set_optimization_profile_async = made[-1].set_input_shape = lambda *given: True
        return made[-1]

    session = engine_session.TensorRTSession.__new__(engine_session.TensorRTSession)
    session.inputs, session._profiles, session._types = ("x",), [[((1, 4), (8, 4))]], {"x": np.dtype("f4"), "y": np.dtype("f4")}
    session._trt, session._config, session._errors = trt, trt.ExecutionContextAllocationStrategy.USER_MANAGED, []
    session._engine, session._activations = SimpleNamespace(create_execution_context=context), Memory(512)
    session._replay = replay(Gpu())
    found = [session._execution_for(((batch, 4),)) for batch in (1, 2)]
    assert [one.memory for one in made] == [[(session._activations.handle, 512)]] * 2
    assert [one.shapes for one in found] == [{"x": (1, 4), "y": (1, 4)}] * 2


# --- doctor ---------------------------------------------------------------------------------------------------------------------


def test_doctor_says_whether_an_engine_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    rtx, other = map(doctor._backend, engine_backends().values())
    assert (rtx["name"], other["name"]) == ("tensorrt_rtx", "tensorrt")
    assert other["version"] is None and "pip install tensorrt" in other["problem"]
    if find_spec("tensorrt_rtx") and find_spec("cuda") and not DRIVER:
        assert rtx["version"] and rtx["compute_capability"] is None and "no NVIDIA driver" in rtx["problem"]
    assert {"tensorrt_rtx", "tensorrt", "cuda-bindings", "cuda-core"} <= set(machine.PACKAGES)


# --- a backend is one file --------------------------------------------------------------------------------------------------------

TOY = """
from pmclip_deploy.sessions import Backend, Device, backends


class Toy(Backend):
    name, title = "toy", "Toy"
    devices = (Device("toy-wheel", "a wheel", "`pip install toy`"),)
    packages = ("toy-package",)

    def check(self):
        pass

    def version(self):
        return "4.2"

    def about(self):
        return {"wheels": 4}

    def open(self, graph, options):
        session = backends()["onnxruntime"].open(graph, options._replace(device="cpu"))
        session.backend, session.device = self.name, options.device
        return session


BACKEND = Toy()
"""


@pytest.fixture(scope="module")
def with_toy(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A copy of the package with one more file."""
    tree = Tree(tmp_path_factory.mktemp("tree"))
    tree.write("a backend", "pmclip_deploy/sessions/toy.py", TOY)
    return tree


def test_a_backend_of_one_more_file_is_known_everywhere(with_toy: Tree) -> None:
    found = json.loads(with_toy.python(MAIN, "doctor", "--json").stdout)  # of a machine that lacks something it exits with another code
    (row,) = [row for row in found["backends"] if row["name"] == "toy"]
    assert row == {"name": "toy", "devices": ["toy-wheel"], "target": None, "version": "4.2", "problem": None, "wheels": 4}
    assert found["packages"]["toy-package"] is None and [row["backend"] for row in found["engines"]] == ["tensorrt_rtx", "tensorrt"]
    assert "backend  toy 4.2: wheels 4\n" in with_toy.python(MAIN, "doctor").stdout
    assert "toy-wheel" in with_toy.runs("infer", "--help")
    code, said = with_toy.fails("infer", ROOT / "README.md", "is there a fracture?", "--device", "tpu")
    assert code == 2 and "unknown device 'tpu'; choose one of auto, cpu," in said and "toy-wheel" in said
    rows = with_toy.runs(code="from pmclip_deploy.sessions import devices_table; print(devices_table())")
    assert "| `toy-wheel` | Toy | a wheel | `pip install toy` |" in rows.splitlines()


def test_a_backend_of_one_more_file_runs_a_graph_and_a_bundle(with_toy: Tree, bundle: tuple[Path, Manifest]) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
import pmclip_deploy as pm
from pmclip_deploy.sessions import SessionOptions, backends, open_session
assert Path(pm.__file__).parent == Path(sys.argv[1], "pmclip_deploy") and backends()["toy"].available()
session = open_session(Path(sys.argv[2], "image.onnx"), SessionOptions("toy-wheel"))
print(session.backend, session.device, *session.inputs)
model = pm.load(device="toy-wheel").model
print(model.backend, model.device)
"""
    assert with_toy.runs(with_toy.folder, bundle[0], code=code).splitlines() == ["toy toy-wheel pixels", "toy toy-wheel"]


def test_the_registry_loads_no_backend() -> None:
    """Neither a backend's package nor numpy."""
    code = "import sys; from pmclip_deploy.sessions import backends; backends(); print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"numpy", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "openvino", "typer"} & set(done.stdout.split())


def test_every_backend_is_named_as_its_file() -> None:
    """So that a name in a manifest leads a reader to the code."""
    files = {path.stem for path in (ROOT / "pmclip_deploy" / "sessions").glob("*.py")} - {"__init__"}
    assert set(backends()) == files
    names = [device.name for backend in backends().values() for device in backend.devices]
    assert len(set(names)) == len(names) and "auto" not in names


# --- with a GPU -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bundle whose image tower has an engine for the GPU that is here, and its session."""
    pytest.importorskip("tensorrt_rtx"), pytest.importorskip("cuda.core")
    try:
        here = engine_backends()["tensorrt_rtx"].machine()
    except DeviceError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    from pmclip_deploy.export.engine_from_onnx import engine_from_onnx

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = tiny_files()
    engine = engine_from_onnx(files["image.onnx"], "tensorrt_rtx", compute_capabilities=[here.compute_capability], profile=(1, 1, 2))
    manifest = tiny_manifest(target="rtx", engines=(engine.row("image", "image.plan"),))
    manifest = write_bundle(tmp_path / "bundle", manifest, {**files, "image.plan": engine.plan})
    return session_from_bundle(tmp_path / "bundle", manifest, "image", "tensorrt_rtx"), tmp_path / "bundle"


def test_an_engine_runs(on_gpu: Any) -> None:
    session, folder = on_gpu
    assert (session.backend, session.device, session.inputs, session.outputs) == ("tensorrt_rtx", "cuda", ("pixels",), ("embedding",))
    expected = open_session(folder / "image.onnx", SessionOptions("cpu")).run({"pixels": PIXELS})["embedding"]
    for batch in (1, 1, 1, 2, 3, 1):  # plain, captured, replayed; another shape, and in parts
        found = session.run({"pixels": PIXELS[:batch]})["embedding"]
        assert found.shape == (batch, DIM)
        np.testing.assert_allclose(found, expected[:batch], rtol=0, atol=1e-4)


def test_an_engine_reads_arrays_that_are_on_the_gpu(on_gpu: Any) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    session, _ = on_gpu
    expected = session.run({"pixels": PIXELS})["embedding"]
    np.testing.assert_array_equal(session.run({"pixels": torch.from_numpy(PIXELS).cuda()})["embedding"], expected)
