"""Engines from ONNX graphs: built ahead of time by TensorRT-RTX where that is installed; nothing here runs one."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper

from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.errors import BundleError, DeviceError, UsageError
from pmclip_deploy.export import engine_from_onnx as engine_from_onnx_module
from pmclip_deploy.export.engine_from_onnx import RTX_CAPABILITIES, _profiles, engine_from_onnx, layers_from_inspection
from pmclip_deploy.sessions import onnx_sha256
from pmclip_deploy.sessions.engines.session import logger

F, H = TensorProto.FLOAT, TensorProto.FLOAT16
NUMPY = {F: np.float32, H: np.float16}
rng = np.random.default_rng(0)
WIDE = rng.normal(size=(64, 32)).astype(np.float32)
KERNEL = rng.normal(size=(32, 16, 3, 3)).astype(np.float32)


@pytest.fixture
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="needs `pip install tensorrt_rtx`")


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What TensorRT logs."""
    found: list[str] = []

    def spied(trt: Any, take: Any) -> Any:
        return logger(trt, lambda message, is_error: (found.append(message), take(message, is_error)))

    monkeypatch.setattr(engine_from_onnx_module, "logger", spied)
    return found


def n(op: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), [output], output, **attributes)


def graph(
    nodes: list[Any], weights: dict[str, Any], io: int = F, opset: int = 20, shape: tuple[int, ...] = (64,), out: tuple[int, ...] = (32,)
) -> bytes:
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", io, ["B", *shape])],
        [helper.make_tensor_value_info("y", io, ["B", *out])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10 if opset > 20 else 9)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def plain() -> bytes:
    return graph([n("MatMul", "x w", "y")], {"w": WIDE})


def build(model: bytes | Path, **options: Any) -> Any:
    return engine_from_onnx(model, "tensorrt_rtx", **options)


# --- what an engine says of itself ----------------------------------------------------------------------------------------------


def test_an_engine_and_its_row(trt: Any, messages: list[str]) -> None:
    engine = build(plain(), compute_capabilities=["12.0", "8.6", "8.6"], profile=(1, 2, 4))
    assert len(engine.plan) > WIDE.nbytes and engine.version == trt.__version__ and engine.seconds > 0
    row = engine.row("image", "image.plan")
    assert (row.graph, row.file, row.backend, row.compute_capabilities) == ("image", "image.plan", "tensorrt_rtx", ("8.6", "12.0"))
    assert row.profile == (1, 2, 4) and row.onnx_sha256 == onnx_sha256({"image.onnx": hashlib.sha256(plain()).hexdigest()}, "image.onnx")
    assert engine.precisions["gemm fp32"] == 1 and "Number of target compute capabilities: 2" in messages
    assert build(plain()).compute_capabilities == RTX_CAPABILITIES


def test_a_manifest_takes_the_row(trt: Any) -> None:
    from tests.tiny.bundle import tiny_manifest

    row = build(plain()).row("image", "image.plan")
    data = tiny_manifest(target="rtx", engines=(row,)).to_json()
    assert Manifest.from_json({**data, "files": {}}).engines == (row,)


def test_weights_beside_the_graph(trt: Any, tmp_path: Path) -> None:
    model = onnx.load_model_from_string(plain())
    path = tmp_path / "image.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="image.onnx.data", size_threshold=0)
    engine, data = build(path), tmp_path / "image.onnx.data"
    assert engine.plan == build(plain()).plan  # the same weights were found
    assert engine.onnx_sha256 == onnx_sha256({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, data)}, "image.onnx")
    with pytest.raises(UsageError, match="give its path"):
        build(path.read_bytes())
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=r"image\.onnx\.data: .*cut short"):
        build(path)
    data.unlink()  # TensorRT-RTX itself would end the process here
    with pytest.raises(BundleError, match=r"image\.onnx\.data: .*missing"):
        build(path)


def test_profiles(trt: Any) -> None:
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1)
    network.add_input("tokens", trt.int64, (-1, -1)), network.add_input("image", trt.float32, (-1, 8))

    def shapes(batch: tuple[int, int, int]) -> list[Any]:
        profiles = _profiles(builder, network, batch, (1, 12, 77))
        return [[[tuple(shape) for shape in profile.get_shape(name)] for name in ("tokens", "image")] for profile in profiles]

    assert shapes((1, 1, 8)) == [[[(1, 1), (1, 12), (8, 77)], [(1, 8), (1, 8), (8, 8)]]]
    assert shapes((2, 4, 8)) == [[[(2, 1), (4, 12), (8, 77)], [(2, 8), (4, 8), (8, 8)]]]
    assert shapes((1, 4, 8)) == [[[(1, 1), (1, 12), (1, 77)], [(1, 8)] * 3], [[(1, 1), (4, 12), (8, 77)], [(1, 8), (4, 8), (8, 8)]]]


def test_the_same_bytes_twice(trt: Any, tmp_path: Path) -> None:
    """In this process and in another. Convolutions may name a few of their tensors otherwise: docs/reference/engines.md."""
    model = tmp_path / "model.onnx"
    model.write_bytes(graph(*SANDWICH, io=H))
    code = (
        "import hashlib, sys; from pathlib import Path; from pmclip_deploy.export.engine_from_onnx import engine_from_onnx\n"
        "print(hashlib.sha256(engine_from_onnx(Path(sys.argv[1]), 'tensorrt_rtx').plan).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, timeout=120, check=True).stdout.strip()
    assert {hashlib.sha256(build(model).plan).hexdigest() for _ in range(2)} == {other}


# --- the patterns that the precisions are written in ----------------------------------------------------------------------------

SANDWICH = (
    [n("Cast", "x", "xf", to=F), n("Cast", "w", "wf", to=F), n("MatMul", "xf wf", "m"), n("Cast", "m", "y", to=H)],
    {"w": WIDE.astype(np.float16)},
)


def test_a_product_in_fp32_between_casts_is_one_in_fp16(trt: Any) -> None:
    assert build(graph(*SANDWICH, io=H)).precisions == build(graph([n("MatMul", "x w", "y")], SANDWICH[1], io=H)).precisions
    assert build(graph(*SANDWICH, io=H)).precisions == {"gemm fp16": 1}


def test_what_stands_between_a_product_and_its_cast_keeps_it_in_fp32(trt: Any) -> None:
    """So a bias is added after the cast, and a softmax gets casts of its own."""

    def product(nodes: list[Any], bias: int) -> set[str]:
        found = build(graph(nodes, {**SANDWICH[1], "b": np.ones(32, NUMPY[bias])}, io=H)).precisions
        return {name.split()[1] for name in found if not name.startswith("kgen")}

    head = SANDWICH[0][:-1]
    assert product([*head, n("Add", "m b", "a"), n("Cast", "a", "y", to=H)], F) == {"fp32"}
    assert product([*head, n("Cast", "m", "mh", to=H), n("Add", "mh b", "y")], H) == {"fp16"}


def test_attention_in_fp16_with_its_softmax_in_fp32(trt: Any) -> None:
    nodes = [
        n("Transpose", "x", "t", perm=[0, 2, 1]),
        *(n("Cast", source, f"{source}f", to=F) for source in ("x", "t")),
        n("MatMul", "xf tf", "m"),
        n("Cast", "m", "mh", to=H),
        n("Cast", "mh", "mf", to=F),
        n("Softmax", "mf", "s", axis=-1),
        n("Cast", "s", "sh", to=H),
        n("Cast", "sh", "sf", to=F),
        n("Cast", "x", "vf", to=F),
        n("MatMul", "sf vf", "o"),
        n("Cast", "o", "y", to=H),
    ]
    assert build(graph(nodes, {}, io=H, shape=(50, 64), out=(50, 64))).precisions["gemm fp16"] == 2


def test_a_layer_norm_in_fp32_between_casts(trt: Any) -> None:
    nodes = [
        n("Cast", "x", "xf", to=F),
        n("LayerNormalization", "xf g b", "l", axis=-1),
        n("Cast", "l", "lh", to=H),
        n("MatMul", "lh w", "y"),
    ]
    engine = build(graph(nodes, {"g": np.ones(64, np.float32), "b": np.zeros(64, np.float32), **SANDWICH[1]}, io=H))
    assert engine.precisions["gemm fp16"] == 1
    norm = next(layer for layer in engine.layers if "Sqrt" in layer.name)
    assert norm.inputs == ("fp16", "fp32", "fp32") and norm.outputs == ("fp16",)


@pytest.mark.parametrize("opset", [20, 21])
@pytest.mark.parametrize("scales", [F, H])
@pytest.mark.parametrize("op", ["MatMul", "Conv"])
def test_int8_with_scales_of_either_width(trt: Any, op: str, scales: int, opset: int) -> None:
    """Symmetric, weights per channel; input, scales and output all of one type, as ONNX asks before opset 23."""
    weight, axis = (WIDE, 1) if op == "MatMul" else (KERNEL, 0)
    scale = (np.abs(weight).max(tuple(i for i in range(weight.ndim) if i != axis)) / 127).astype(NUMPY[scales])
    shaped = scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    weights = {
        "q": np.clip(np.round(weight / shaped), -127, 127).astype(np.int8),
        "scale": scale,
        "zeros": np.zeros(32, np.int8),
        "step": np.array(0.02, NUMPY[scales]),
        "zero": np.array(0, np.int8),
    }
    nodes = [
        n("QuantizeLinear", "x step zero", "xq"),
        n("DequantizeLinear", "xq step zero", "xd"),
        n("DequantizeLinear", "q scale zeros", "w", axis=axis),
        n(op, "xd w", "y", **({} if op == "MatMul" else {"pads": [1, 1, 1, 1]})),
    ]
    shape, out = ((64,), (32,)) if op == "MatMul" else ((16, 14, 14), (32, 14, 14))
    engine = build(graph(nodes, weights, io=scales, opset=opset, shape=shape, out=out))
    assert engine.precisions["gemm int8" if op == "MatMul" else "correlation int8"] == 1


@pytest.mark.parametrize("name", ["tiny", "tiny-resnet"])
@pytest.mark.parametrize("part", ["image", "text"])
def test_the_towers_of_clip(trt: Any, clips: dict[str, Any], name: str, part: str) -> None:
    from pmclip_deploy.train.backbones import BACKBONES

    backbone = BACKBONES[name]
    model = (backbone.image_graph if part == "image" else backbone.text_graph)(clips[name])
    engine = build(model.SerializeToString())
    products = {kind: count for kind, count in engine.precisions.items() if kind.startswith(("gemm", "correlation"))}
    assert products and all(kind.endswith("fp32") for kind in products)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    torch = pytest.importorskip("torch")
    pytest.importorskip("open_clip"), pytest.importorskip("transformers")
    from pmclip_deploy.train.backbones import BACKBONES
    from tests.tiny import clip as tiny_clip

    tiny_clip.add_tiny(tmp_path_factory.mktemp("configs"))
    torch.manual_seed(0)
    yield {name: BACKBONES[name].build().eval().requires_grad_(False) for name in ("tiny", "tiny-resnet")}
    tiny_clip.remove_tiny()


# --- what is refused ------------------------------------------------------------------------------------------------------------


def test_a_node_that_tensorrt_cannot_take_is_named(trt: Any) -> None:
    weights = {"step": np.array(0.02, np.float32), "zero": np.array(3, np.int8), "w": WIDE}
    nodes = [n("QuantizeLinear", "x step zero", "xq"), n("DequantizeLinear", "xq step zero", "xd"), n("MatMul", "xd w", "y")]
    with pytest.raises(BundleError, match=r"node xq \[QuantizeLinear\] \(.*[Nn]on-zero zero point"):
        build(graph(nodes, weights))
    scatter = [n("ScatterElements", "x i u", "s", axis=1, reduction="add"), n("MatMul", "s w", "y")]
    weights = {"i": np.zeros((1, 1), np.int64), "u": np.ones((1, 1), np.float32), "w": WIDE}
    with pytest.raises(BundleError, match=r"node s \[ScatterElements\]") as caught:  # TensorRT-RTX's own error has no node here
        build(graph(scatter, weights))
    assert "\n" not in str(caught.value)


def test_a_gpu_that_cannot_compute_it_is_named(trt: Any) -> None:
    with pytest.raises(BundleError, match=r"no engine for 7\.5 \(.*Turing.*another precision or other GPUs"):
        build(plain(), compute_capabilities=["7.5"])


@pytest.mark.parametrize("content", [b"no graph", None])
def test_no_graph(tmp_path: Path, content: bytes | None, trt: Any) -> None:
    path = tmp_path / "image.onnx"
    if content:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"image\.onnx: no ONNX graph"):
        build(path)


def test_an_unknown_gpu(trt: Any) -> None:
    with pytest.raises(UsageError, match=r"knows no GPU '8\.7'; choose among 7\.5, 8\.0, 8\.6, 8\.9, 12\.0"):
        build(plain(), compute_capabilities=["8.9", "8.7"])


@pytest.mark.parametrize(
    ("backend", "options", "said"),
    [
        ("cuda", {}, "choose one of tensorrt_rtx, tensorrt"),
        ("tensorrt_rtx", {"timing_cache": Path("cache")}, "for the target tensorrt"),
        ("tensorrt_rtx", {"version_compatible": True}, "for the target tensorrt"),
        ("tensorrt_rtx", {"strip_weights": True}, "for the target tensorrt"),
        ("tensorrt", {"version_compatible": True, "strip_weights": True}, "choose one of the two"),
        ("tensorrt_rtx", {"profile": (1, 9, 8)}, "batches .* in that order"),
        ("tensorrt_rtx", {"profile": (0, 1, 8)}, "from 1 on"),
        ("tensorrt_rtx", {"text_lengths": (12, 1, 77)}, "text lengths"),
    ],
)
def test_options_that_do_not_fit(backend: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        engine_from_onnx(plain(), backend, **options)


@pytest.mark.parametrize("backend", ["tensorrt_rtx", "tensorrt"])
def test_a_backend_that_is_not_installed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(DeviceError, match=f"is not installed here .*`pip install {backend}`") as caught:
        engine_from_onnx(plain(), backend)
    assert caught.value.exit_code == 6


def test_tensorrt_without_a_gpu(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX in TensorRT's place: what is asked of either is the same up to here."""
    pytest.importorskip("cuda.core")
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    with pytest.raises(DeviceError, match="no NVIDIA driver answers here"):
        engine_from_onnx(plain(), "tensorrt")


# --- progress and Ctrl-C --------------------------------------------------------------------------------------------------------------


def test_progress(trt: Any) -> None:
    steps: list[tuple[str, int, int]] = []
    build(plain(), progress=lambda *step: steps.append(step))
    assert steps[-1][0] == "Building engine" and all(1 <= done <= of for _, done, of in steps)


def test_what_progress_raises_ends_the_build(trt: Any, messages: list[str]) -> None:
    steps = 0

    def stop(phase: str, done: int, of: int) -> None:
        nonlocal steps
        steps += 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(plain(), progress=stop)
    assert steps == 1 and any("BuildCanceled" in message for message in messages)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
@pytest.mark.parametrize("at", ["Parsing node", "Building graph"])
def test_ctrl_c_ends_the_build(trt: Any, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Sent from the log, where TensorRT swallows what is raised."""
    found: list[str] = []

    def spied(trt: Any, take: Any) -> Any:
        return logger(trt, interrupt)

    def interrupt(message: str, is_error: bool) -> None:
        if message.startswith(at) and not any(message.startswith(at) for message in found):
            os.kill(os.getpid(), signal.SIGINT)
        found.append(message)

    monkeypatch.setattr(engine_from_onnx_module, "logger", spied)
    with pytest.raises(KeyboardInterrupt):
        build(plain())
    assert any(message.startswith(at) for message in found) and ("BuildCanceled" in " ".join(found)) == (at == "Building graph")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and build(plain()).plan


def test_a_build_in_another_thread(trt: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(build, plain()).result().plan


# --- TensorRT's inspector -------------------------------------------------------------------------------------------------------

TENSORRT_10 = """\
Layers:
Name: conv1 + relu, LayerType: CaskConvolution, Inputs: [ { Name: x, Location: Device, Dimensions: [1,3,8,8], Format/Datatype: \
Row major linear INT8 format }], Outputs: [ { Name: y, Location: Device, Dimensions: [1,4,8,8], Format/Datatype: Half }], TacticName: t
Name: signal, LayerType: signal, Inputs: [], Outputs: [], TacticName: , StreamId: 0, Metadata:

Bindings: x, y
"""


def test_inspections_are_read() -> None:
    first, second = layers_from_inspection(TENSORRT_10)
    assert (first.name, first.kind, first.inputs, first.outputs) == ("conv1 + relu", "CaskConvolution", ("int8",), ("fp16",))
    assert first.precision == "int8" and second.inputs == () and layers_from_inspection("conv1\nrelu") == ()
