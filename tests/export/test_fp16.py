"""The fp16 pass: parity of every graph, what stays in fp32, planted overflow and underflow, Q/DQ, and engines of TensorRT-RTX."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("open_clip")
pytest.importorskip("transformers")

from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pmclip_deploy.export.calibration import measured_from_feeds
from pmclip_deploy.export.engine_from_onnx import engine_from_onnx
from pmclip_deploy.export.fp16_from_onnx import LARGEST, NORMAL, SAFETY, half_from_onnx, rounded_from_half
from pmclip_deploy.export.head_graphs import features_graph, head_graph
from pmclip_deploy.export.int8_static import TENSORRT, int8_static
from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint, onnx_from_modules
from pmclip_deploy.export.precisions import TENSOR_GATES
from pmclip_deploy.export.probes import sample_pictures
from pmclip_deploy.export.weights import arrays
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.findings.films import PREPROCESS
from tests.export import test_head_graphs as heads
from tests.tiny import clip as tiny_clip

F, H = TensorProto.FLOAT, TensorProto.FLOAT16
GATE = TENSOR_GATES["fp16"]["cosine"]
LITE = Path(__file__).parents[2] / "pmclip_deploy" / "models" / "pmclip-lite" / "checkpoint"
SUMS = {"Softmax", "LayerNormalization", "ReduceL2", "ReduceSum", "ReduceMean", "GlobalAveragePool", "Div", "Log", "Exp", "MatMul"}
TOWERS = [(name, part) for name in ("tiny", "tiny-resnet") for part in ("image", "text")]
Values = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    tiny_clip.add_tiny(tmp_path_factory.mktemp("configs"))
    yield
    tiny_clip.remove_tiny()


def tower(name: str, part: str) -> tuple[Any, Values]:
    """(the graph, what it reads)"""
    clip, backbone = tiny_clip.lively(name), BACKBONES[name]
    with torch.inference_mode():
        graph = backbone.image_graph(clip) if part == "image" else backbone.text_graph(clip)
    tokens = np.zeros((3, 20), np.int64)
    for row, length in zip(tokens, (20, 5, 12), strict=True):
        row[:length] = [49406, *np.random.default_rng(length).integers(1, 49406, length - 2), 49407]
    return graph, {"pixels": tiny_clip.pictures(backbone.preprocess.size, 3).numpy()} if part == "image" else {"tokens": tokens}


def run(model: Any, feed: Values) -> Values:
    """Q/DQ as floats: what the graph means, whatever this CPU's integers do."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def cosine(a: Values, b: Values) -> float:
    """The least of any row of any output; 1 of two rows of zeros, and -1 where one is not finite."""
    least = 1.0
    for name in a:
        x, y = (v[name].reshape(len(v[name]), -1).astype(np.float64) for v in (a, b))
        assert b[name].dtype == np.float32
        if not np.isfinite(y).all():
            return -1.0
        lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        least = min(least, *np.where(lengths > 0, (x * y).sum(1) / np.maximum(lengths, 1e-30), np.array_equal(x, y)))
    return least


def parity(graph: Any, half: Any, feed: Values) -> float:
    """Of what onnxruntime makes of the fp16 graph, and of what a GPU will: the lesser."""
    expected = run(graph, feed)
    return min(cosine(expected, run(half, feed)), cosine(expected, run(rounded_from_half(half), feed)))


def measured(model: Any, feed: Values) -> dict[str, tuple[float, float]]:
    rows = [{name: x[i : i + 1] for name, x in feed.items()} for i in range(len(next(iter(feed.values()))))]
    return {name: tensor.ranges["max"] for name, tensor in measured_from_feeds(model, rows).items()}


def types(model: Any) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.output, *graph.value_info]}
    return found | {w.name: w.data_type for w in graph.initializer}


def floats(names: Any, of: dict[str, int]) -> set[int]:
    return {of[x] for x in names if x} & {F, H}


def check_types(model: Any) -> None:
    """Sums in fp32, products of fp16 between casts, every cast once and none for nothing."""
    onnx.checker.check_model(model, full_check=True)
    of, made = types(model), {x: node for node in model.graph.node for x in node.output}
    assert {x.type.tensor_type.elem_type for x in model.graph.output} == {F}
    casts = [n for n in model.graph.node if n.op_type == "Cast" and n.attribute[0].i in (F, H)]
    assert len({(n.input[0], n.attribute[0].i) for n in casts}) == len(casts)
    assert all(of[n.input[0]] != n.attribute[0].i for n in casts)
    for node in model.graph.node:
        if node.op_type in SUMS:
            assert floats([*node.input, *node.output], of) == {F}, node.name
        if node.op_type == "MatMul":
            assert all(made[x].op_type == "Cast" and of[made[x].input[0]] == H for x in node.input)
            (reader,) = (n for n in model.graph.node if node.output[0] in n.input)
            assert reader.op_type == "Cast" and reader.attribute[0].i == H
        if node.op_type in ("Conv", "Relu", "Gelu"):
            assert floats([*node.input, *node.output], of) == {H}, node.name
        if node.op_type == "Cast" and node.attribute[0].i == H and node.input[0] in made:
            before = made[node.input[0]]
            assert before.op_type != "Cast" or of[before.input[0]] != H, node.name


# Parity


@pytest.mark.parametrize(("name", "part"), TOWERS)
def test_towers_equal_fp32(name: str, part: str) -> None:
    graph, feed = tower(name, part)
    before = graph.SerializeToString()
    half, above = half_from_onnx(graph, measured(graph, feed))
    assert above == () and half_from_onnx(graph)[0] == half and graph.SerializeToString() == before
    check_types(half)
    assert half.ByteSize() < 0.53 * graph.ByteSize()
    assert 0.9999 < parity(graph, half, feed) < 1


@pytest.mark.slow("image towers of real size, at three precisions each")
@pytest.mark.parametrize("name", [pytest.param("ViT-B/32", marks=pytest.mark.nightly), "RN50"])
def test_a_real_image_tower_equals_fp32(name: str) -> None:
    graph, feed = tower(name, "image")
    feed = {"pixels": feed["pixels"][:2]}
    half, above = half_from_onnx(graph, measured(graph, feed))
    assert above == ()
    assert half.ByteSize() < 0.501 * graph.ByteSize()
    assert parity(graph, half, feed) > GATE


@pytest.mark.slow("the four graphs of the embedded model, at three precisions each")
def test_pmclip_lite_equals_fp32() -> None:
    modules = modules_from_checkpoint(LITE)
    graphs = onnx_from_modules(modules)
    pixels = [tensor_from_pixels(picture_from_path(p).pixels, modules.backbone.preprocess) for p in sample_pictures()[:3]]
    tokens = np.random.default_rng(0).integers(1000, 7000, (3, 12))
    tokens[1, 5:] = modules.backbone.pad_id
    feeds: dict[str, Values] = {"image": {"pixels": np.stack(pixels)}, "text": {"tokens": tokens}}
    image, text = (run(graphs[name], feeds[name]) for name in ("image", "text"))
    feeds["head"] = {"image": np.concatenate([image["embedding"], image["details"]], 1), "text": text["embedding"]}
    seen = [tensor_from_pixels(picture_from_path(p).pixels, PREPROCESS) for p in sample_pictures()[:3]]
    feeds["findings"] = {"pixels": np.stack(seen)}
    for name, graph in graphs.items():
        half, above = half_from_onnx(graph, measured(graph, feeds[name]))
        assert above == ()
        check_types(half)
        assert half.ByteSize() < 0.52 * graph.ByteSize()
        assert parity(graph, half, feeds[name]) > GATE


@pytest.mark.parametrize("kind", heads.KINDS)
def test_heads_and_their_features_equal_fp32(kind: str) -> None:
    head = heads.head_of(kind, heads.features_of("clip+ae+maml"), depth=2)
    (_, grey, maml), tokens = heads.inputs_of(head.features, 3), heads.tokens_of(3)
    image = heads.seen_by(head.features, heads.inputs_of(head.features, 3)).astype(np.float32)
    for graph, feed in (
        (head_graph(head), {"image": image, "tokens": tokens.numpy()}),
        (features_graph(head.features), {"autoencoder": grey.numpy(), "maml": maml.numpy()}),
    ):
        half, above = half_from_onnx(graph, measured(graph, feed))
        assert above == ()
        check_types(half)
        assert parity(graph, half, feed) > GATE


@pytest.mark.slow("starts a process for each hash seed")
def test_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    graph, _ = tower("tiny", "image")
    (tmp_path / "image.onnx").write_bytes(graph.SerializeToString())
    code = (
        "import hashlib, onnx, sys; from pmclip_deploy.export.fp16_from_onnx import half_from_onnx\n"
        "model, above = half_from_onnx(onnx.load(sys.argv[1]), {'layer.0.v': (-1e5, 1)})\n"
        "print(above, hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "image.onnx")]
    said = {subprocess.run(command, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout for seed in "123"}
    assert len(said) == 1 and "layer.0.v.split" in said.pop()


# What fp16 cannot hold

VALUES = ("layer.0.qkv.weight", "layer.0.qkv.bias", "layer.0.out.weight")  # the values' third, and what reads them
STEM = ("stem.1.weight", "stem.1.bias", "stem.2.weight")


def planted(graph: Any, names: tuple[str, str, str], factor: float) -> None:
    """One layer ``factor`` times as large, and the next as much smaller: the same function in fp32."""
    weights = {w.name: w for w in graph.graph.initializer}
    for name, by in zip(names, (factor, factor, 1 / factor), strict=True):
        array = numpy_helper.to_array(weights[name]).copy()
        array[..., 2 * array.shape[-1] // 3 if "qkv" in name else 0 :] *= np.float32(by)
        weights[name].CopyFrom(numpy_helper.from_array(array, name))


@pytest.mark.parametrize(
    ("name", "names", "factor", "kept"),
    [("tiny", VALUES, 3e4, "layer.0.v.heads"), ("tiny-resnet", STEM, 3e5, "stem.1.relu"), ("tiny-resnet", STEM, 1e-7, "stem.1.relu")],
)
def test_ranges_keep_in_fp32_what_fp16_would_break(name: str, names: tuple[str, str, str], factor: float, kept: str) -> None:
    graph, feed = tower(name, "image")
    expected = run(graph, feed)
    planted(graph, names, factor)
    assert cosine(expected, run(graph, feed)) > 0.99999
    assert parity(graph, half_from_onnx(graph)[0], feed) < GATE
    half, above = half_from_onnx(graph, measured(graph, feed))
    assert kept in above and len(above) < 10 and types(half)[kept] == F and names[2] in arrays(half)
    assert parity(graph, half, feed) > GATE


def test_onnxruntime_hides_an_overflow_that_the_rounded_graph_shows() -> None:
    """Why there is a rounded graph; where this fails, the fp16 graph itself can be measured."""
    graph, feed = tower("tiny-resnet", "image")
    planted(graph, STEM, 3e5)
    half = half_from_onnx(graph)[0]
    assert cosine(run(graph, feed), run(half, feed)) > GATE and cosine(run(graph, feed), run(rounded_from_half(half), feed)) == -1


@pytest.mark.parametrize("part", ["image", "text"])
def test_the_rounded_graph_is_what_the_fp16_graph_means(part: str) -> None:
    """By ONNX's own evaluator, which sums in another order: nearer to it than fp32 is, and than what onnxruntime makes of fp16."""
    graph, feed = tower("tiny", part)
    half = half_from_onnx(graph)[0]
    (expected,) = ReferenceEvaluator(half).run(None, feed)
    rounded, hidden, exact = (np.abs(run(x, feed)["embedding"] - expected).mean() for x in (rounded_from_half(half), half, graph))
    assert rounded < 0.6 * min(hidden, exact) and exact > 1e-4


def test_a_tensor_without_a_range_is_like_its_neighbours() -> None:
    """As where a calibration knows only what layers read."""
    graph, feed = tower("tiny", "image")
    planted(graph, VALUES, 3e4)
    read = {n.input[0] for n in graph.graph.node if n.op_type == "MatMul" and n.input[1] in arrays(graph)}
    half, above = half_from_onnx(graph, {name: ends for name, ends in measured(graph, feed).items() if name in read})
    assert {"layer.0.qkv", "layer.0.v.heads", "layer.0.joined"} <= {*above} and not {"layer.0.up", "layer.1.kv"} & {*above}
    assert parity(graph, half, feed) > GATE


def small(weight: Any = None) -> Any:
    """x (B, 4) -> product -> Relu -> product; its names are their outputs."""
    weight = np.eye(4, dtype=np.float32) if weight is None else weight
    nodes = [("MatMul", ["x", "w"], "p"), ("Relu", ["p"], "r"), ("MatMul", ["r", "v"], "y")]
    return made(nodes, {"w": weight, "v": np.eye(4, dtype=np.float32)})


def made(nodes: list[Any], weights: Values) -> Any:
    """A graph of (operator, inputs, output) from x to y, both (B, 4) f32."""
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], output, **dict(*more)) for op, inputs, output, *more in nodes],
        "small",
        [helper.make_tensor_value_info("x", F, ["B", 4])],
        [helper.make_tensor_value_info("y", F, ["B", 4])],
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize(
    ("low", "high", "above"),
    [
        (0, 1, ()),
        (0, 0.99 * LARGEST / SAFETY, ()),
        (0, 1.01 * LARGEST / SAFETY, ("p", "r")),
        (-1.01 * LARGEST / SAFETY, 0, ("p", "r")),
        (0, float("nan"), ("p", "r")),
        (0, 1.01 * NORMAL * SAFETY, ()),
        (-0.99 * NORMAL * SAFETY, 0, ("p", "r")),
        (0, 0, ()),
    ],
)
def test_the_margin(low: float, high: float, above: tuple[str, ...]) -> None:
    """Of what the first product writes: it and its reader."""
    half, found = half_from_onnx(small(), {"x": (-1, 1), "p": (low, high), "r": (0, 1), "y": (0, 1)})
    assert found == above and types(half)["p" if above else "p.f16"] == (F if above else H)


@pytest.mark.parametrize(
    ("weight", "above"),
    [
        (np.eye(4) * 7e4, ("p",)),  # infinite
        (np.full((4, 4), 1e-6), ("p",)),  # four bits are left
        (np.full((4, 4), 1e-9), ("p",)),  # none
        (np.eye(4) + 1e-9, ()),  # zeros that do not matter beside a one
        (np.full((4, 4), -1e4), ()),
        (np.zeros((4, 4)), ()),
    ],
)
def test_weights_that_fp16_cannot_hold(weight: Any, above: tuple[str, ...]) -> None:
    half, found = half_from_onnx(small(weight.astype(np.float32)))
    assert found == above and ("w" in arrays(half)) == bool(above) and ("w.f16" in arrays(half)) != bool(above)


def test_what_is_kept_is_kept_and_not_reported() -> None:
    graph, feed = tower("tiny", "image")
    half, above = half_from_onnx(graph, keep=("layer.0.up.matmul", "layer.1.down.matmul"))
    assert above == ()
    whole = {n.output[0] for n in half.graph.node if n.op_type == "MatMul" and n.input[1] in arrays(half)}
    assert whole == {"layer.0.up.matmul", "layer.1.down.matmul"}
    assert parity(graph, half, feed) > GATE


def test_an_operator_it_does_not_know_stays_in_fp32() -> None:
    """Between fp16 ones, before one that reads two of them, and with integers and booleans around."""
    nodes = [
        ("MatMul", ["x", "w"], "p"),
        ("Relu", ["p"], "r"),
        ("Softplus", ["r"], "s"),
        ("Greater", ["s", "r"], "g"),
        ("Where", ["g", "s", "p"], "c"),
        ("Shape", ["r"], "shape"),
        ("Reshape", ["c", "shape"], "d"),
        ("Relu", ["d"], "e"),
        ("Atan", ["e"], "f"),
        ("Relu", ["f"], "y"),
    ]
    graph = made(nodes, {"w": np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)})
    half, _ = half_from_onnx(graph)
    check_types(half)
    of = types(half)
    assert {of[x] for x in ("s", "c", "f", "y")} == {F} and {of[x] for x in ("r.f16", "d.f16", "e.f16")} == {H}
    assert [n.input[0] for n in half.graph.node if n.op_type == "Shape"] == ["r.f16"]
    feed = {"x": np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)}
    assert parity(graph, half, feed) > GATE


# Q/DQ


@pytest.mark.parametrize("name", ["tiny", "tiny-resnet"])
def test_int8_with_fp16_around_it(name: str) -> None:
    graph, feed = tower(name, "image")
    tensors = measured_from_feeds(graph, [{"pixels": x[None]} for x in feed["pixels"]])
    ranges = {tensor: of.ranges["max"] for tensor, of in tensors.items()}
    kept = ("layer.1.up.matmul", "stage.2.0.2")
    int8 = int8_static(graph, tensors, ranges, TENSORRT, kept)
    half, above = half_from_onnx(int8, ranges)
    onnx.checker.check_model(half, full_check=True)
    of, inside = types(half), {x: node for node in half.graph.node for x in node.output}
    assert above == ()
    for op in ("QuantizeLinear", "DequantizeLinear"):
        found = [n for n in half.graph.node if n.op_type == op]
        assert len(found) == sum(n.op_type == op for n in int8.graph.node)
        assert all(of[n.input[1]] == F for n in found)  # no scale is rounded
    for node in half.graph.node:
        if any(inside[x].op_type == "DequantizeLinear" for x in node.input[:2] if x in inside):
            assert node.op_type in ("MatMul", "Conv") and all(inside[x].op_type == "DequantizeLinear" for x in node.input[:2])
            (reader,) = (n for n in half.graph.node if node.output[0] in n.input)
            assert reader.op_type == "Cast" and of[reader.output[0]] == H
        if node.op_type in ("Relu", "Sigmoid", "AveragePool") or node.name in ("layer.0.gelu", "layer.0.joined"):
            assert floats([*node.input, *node.output], of) == {H}, node.name
    large = [name for name, w in arrays(half).items() if w.dtype == np.float32 and w.ndim > 1 and name != "places"]
    assert large == [], "floats that are not in fp16"
    assert parity(int8, half, feed) > GATE
    assert parity(graph, half, feed) > 0.99


# Engines


def engine(model: Any) -> Any:
    pytest.importorskip("tensorrt_rtx", reason="needs `pip install tensorrt_rtx`")
    return engine_from_onnx(model.SerializeToString(), "tensorrt_rtx", compute_capabilities=["8.9"])


def in_fp32(built: Any) -> list[str]:
    """Products and convolutions, alone or fused; the rest are kernels of additions, norms and moves."""
    return [x.name for x in built.layers if x.inputs and x.precision == "fp32" and x.kind in ("gemm", "correlation", "runtime_fusion")]


@pytest.mark.parametrize("name", ["tiny", "tiny-resnet"])
def test_an_engine_multiplies_in_fp16(name: str) -> None:
    graph, _ = tower(name, "image")
    half, _ = half_from_onnx(graph)
    assert in_fp32(engine(graph)) and not in_fp32(engine(half))
    uncast(half, "embedding.matmul" if name == "tiny-resnet" else "embedding")
    assert in_fp32(engine(half)), "a product that is not cast back may now be left so"


def uncast(model: Any, name: str) -> None:
    """What the product gives is read in fp32, as it comes."""
    nodes = [n for n in model.graph.node if n.output[0] not in (f"{name}.f16", name)]
    for node in nodes:
        if node.output[0] == f"{name}.accumulated":
            node.output[0] = name
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@pytest.mark.nightly
def test_an_engine_of_the_real_image_tower() -> None:
    """Half the size, every product in fp16, attention fused."""
    graph, _ = tower("ViT-B/32", "image")
    built = engine(half_from_onnx(graph)[0])
    assert not in_fp32(built) and built.precisions["gemm fp16"] > 12
    assert sum("mha" in layer.name for layer in built.layers) >= 12
    assert len(built.plan) < 0.53 * graph.ByteSize()


@pytest.mark.parametrize("name", ["tiny", "tiny-resnet"])
def test_an_engine_of_int8_with_fp16_around_it(name: str) -> None:
    graph, feed = tower(name, "image")
    tensors = measured_from_feeds(graph, [{"pixels": x[None]} for x in feed["pixels"]])
    ranges = {tensor: of.ranges["max"] for tensor, of in tensors.items()}
    int8 = int8_static(graph, tensors, ranges, TENSORRT)
    built = engine(half_from_onnx(int8, ranges)[0])
    assert not in_fp32(built)
    products = [layer for layer in built.layers if layer.kind in ("gemm", "correlation") and layer.precision == "int8"]
    assert len(products) > 10 and all("fp16" not in layer.outputs for layer in products)  # integer sums would overflow it
