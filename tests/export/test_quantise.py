"""The INT8 passes: ranges, smoothing, static Q/DQ, dynamic matrices, and sums that must not saturate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("open_clip")

from onnx import TensorProto, numpy_helper
from torch import nn

from pmclip_deploy.export.calibration import Calibration, Measured, entropy_range, measured_from_feeds, mse_range
from pmclip_deploy.export.int8_dynamic import int8_dynamic
from pmclip_deploy.export.int8_static import CPU, TENSORRT, Scheme, int8_static
from pmclip_deploy.export.smooth import smoothed
from pmclip_deploy.export.weights import arrays, half_stored, int8_blocks, int8_from_weight, int8_tables, layers_of
from pmclip_deploy.spec import METHODS
from pmclip_deploy.train.graph import Graph

RNG = np.random.default_rng(0)
WIDTH = 64


def run(model: Any, x: Any, fused: bool = True) -> Any:
    """Where Q/DQ is not ``fused`` into integer kernels, floats show what a graph means whatever this CPU's integers do."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", str(int(not fused)))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def cosine(a: Any, b: Any) -> float:
    a, b = a.reshape(len(a), -1).astype(np.float64), b.reshape(len(b), -1).astype(np.float64)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def transformer_layer(outliers: float = 1.0) -> Any:
    """x (B, T, W) -> norm -> two matrices with QuickGELU. ``outliers`` scales eight of the norm's channels, and the matrix back."""
    torch.manual_seed(0)
    norm, up, down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
    with torch.no_grad():
        norm.weight[:8] *= outliers
        norm.bias[:8] *= outliers
        up.weight[:, :8] /= outliers
    g = Graph()
    with torch.inference_mode():
        y = g.linear("up", g.norm("norm", "x", norm), up.weight, up.bias)
        y = g.node("Mul", "gelu", y, g.node("Sigmoid", "gate", y))
        g.linear("out", y, down.weight, down.bias)
    return g.model("layer", {"x": (TensorProto.FLOAT, ["B", "T", WIDTH])}, {"out": ["B", "T", WIDTH]})


def convolutions(scale: float = 1.0) -> Any:
    """Two convolutions with ReLU, a skip and an average pool, as a bottleneck has them."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
    norm = nn.BatchNorm2d(16).eval()
    g = Graph()
    with torch.inference_mode():
        first.weight.mul_(scale)
        x = g.node("Relu", "first.relu", g.convolution("first", "x", first, norm, (1, 1)))
        y = g.convolution("second", x, second, norm, (0, 0))
        y = g.node("Relu", "sum.relu", g.node("Add", "sum", y, x))
        g.node("AveragePool", "out", y, kernel_shape=[2, 2], strides=[2, 2])
    return g.model("block", {"x": (TensorProto.FLOAT, ["B", 3, 16, 16])}, {"out": ["B", 16, 8, 8]})


def tokens(count: int = 6) -> Any:
    return RNG.normal(size=(count, 5, WIDTH)).astype(np.float32)


def pictures(count: int = 6) -> Any:
    return RNG.normal(size=(count, 3, 16, 16)).astype(np.float32)


def measured(model: Any, x: Any) -> dict[str, Measured]:
    return measured_from_feeds(model, ({"x": row[None]} for row in x))


def ranges(tensors: dict[str, Measured], method: str = "max") -> Any:
    return {name: t.ranges[method] for name, t in tensors.items() if method in t.ranges}


# Calibration.


def test_what_layers_read_is_measured_in_full_and_the_rest_by_its_range() -> None:
    x = pictures()
    of = measured(convolutions(), x)
    assert set(of["x"].ranges) == set(of["first.relu"].ranges) == set(METHODS) and set(of["sum"].ranges) == {"max"}
    assert of["x"].ranges["max"] == pytest.approx((x.min(), x.max()), rel=1e-5)
    np.testing.assert_allclose(of["x"].means, x.mean((0, 2, 3)), atol=1e-5)
    assert of["first.relu"].ranges["max"][0] == 0 and not of["x"].largest
    of = measured(transformer_layer(), tokens())
    assert len(of["norm"].largest) == len(of["norm"].means) == WIDTH and len(of["gelu"].largest) == 4 * WIDTH


def test_zero_lies_in_every_range() -> None:
    """Padding must be exact."""
    of = measured(convolutions(), pictures() + 9)
    assert all(low <= 0 <= high for low, high in of["x"].ranges.values())


@pytest.mark.parametrize("find", [entropy_range, mse_range])
def test_a_rare_outlier_is_clipped(find: Callable[[Any, Any], tuple[float, float]]) -> None:
    sample = np.append(RNG.normal(size=500_000), 60).astype(np.float32)
    low, high = find(sample, np.array([sample.min(), 60.0]))
    assert high < 45 and low <= 0
    even = RNG.uniform(-1, 1, 20_000).astype(np.float32)  # nothing to clip
    low, high = find(even, np.array([-1.0, 1.0]))
    assert low < -0.9 and high > 0.9


def test_mse_finds_the_least_error_of_its_steps() -> None:
    sample = np.append(RNG.normal(size=500_000), [25]).astype(np.float32)
    low, high = mse_range(sample, np.array([sample.min(), 25.0]))

    def error(low: float, high: float) -> float:
        step = (high - low) / 255
        return float(np.square(np.clip(np.round((sample - low) / step), 0, 255) * step + low - sample).mean())

    assert error(low, high) < error(float(sample.min()), 25.0)


def test_a_calibration_survives_json() -> None:
    of = Measured({"max": (-1.5, 2.25)}, [0.5], [1.0, 2.0])
    calibration = Calibration("0" * 64, {"a.png": "1" * 64}, 9, {"image": {"x": of}}, {"cpu": ["image/first"]})
    assert Calibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration
    for broken in ({}, calibration.to_json() | {"schema": "pmclip-deploy/calibration/1"}, calibration.to_json() | {"tensors": 3}):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            Calibration.from_json(broken)


# Smoothing.


def test_smoothing_is_the_same_function() -> None:
    model, x = transformer_layer(40), tokens()
    smooth, scales = smoothed(model, {name: t.largest for name, t in measured(model, x).items() if t.largest})
    assert set(scales) == {"norm"}
    np.testing.assert_allclose(run(smooth, x), run(model, x), atol=2e-5)
    assert run(model, x).std() > 0.05


def test_outlier_channels_break_the_plain_recipe_and_not_the_smoothed_one() -> None:
    model, x = transformer_layer(60), tokens()
    of = measured(model, x)
    smooth, _ = smoothed(model, {name: t.largest for name, t in of.items() if t.largest})
    plain, better = (cosine(run(int8_dynamic(m, {}), x), run(model, x)) for m in (model, smooth))
    assert plain < 0.99 < 0.999 < better
    assert cosine(run(int8_dynamic(transformer_layer(1), {}), x), run(transformer_layer(1), x)) > 0.999  # it was the outliers


def test_a_norm_that_something_else_reads_is_left_alone() -> None:
    """BERT's, after the sum: the skip reads it too."""
    model = transformer_layer()
    model.graph.node.append(onnx.helper.make_node("Add", ["out", "norm"], ["sum"], "sum"))
    model.graph.output[0].name = "sum"
    smooth, scales = smoothed(model, {name: t.largest for name, t in measured(model, tokens()).items() if t.largest})
    assert not scales and smooth.SerializeToString() == smoothed(model, {})[0].SerializeToString()


# Static Q/DQ.


@pytest.mark.parametrize("scheme", [CPU, TENSORRT])
def test_static_is_near(scheme: Scheme) -> None:
    for model, x in ((convolutions(), pictures()), (transformer_layer(), tokens())):
        of = measured(model, x)
        got = run(int8_static(model, of, ranges(of), scheme), x, fused=scheme is CPU)
        assert cosine(got, run(model, x)) > 0.999


def test_tensorrt_gets_signed_integers_around_zero_and_float_biases() -> None:
    model, x = convolutions(), pictures()
    of = measured(model, x)
    made = int8_static(model, of, ranges(of), TENSORRT)
    weights = arrays(made)
    zeros = [weights[n.input[2]] for n in made.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert zeros and all(z.dtype == np.int8 and not z.any() for z in zeros)
    convs = [n for n in made.graph.node if n.op_type == "Conv"]
    assert all(weights[n.input[2]].dtype == np.float32 for n in convs)
    assert {n.op_type for n in made.graph.node} >= {"Relu"}  # zero is not the least of signed integers


def test_a_layer_that_is_kept_stays_float_and_its_neighbours_do_not() -> None:
    model, x = convolutions(), pictures()
    of = measured(model, x)
    made = int8_static(model, of, ranges(of), CPU, ["first"])
    conv = {n.name: n for n in made.graph.node if n.op_type == "Conv"}
    assert conv["first"].input[0] == "x" and conv["second"].input[0].endswith(".dq")
    whole = int8_static(model, of, ranges(of), CPU, ["first", "second"])
    assert not {n.op_type for n in whole.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    np.testing.assert_array_equal(run(whole, x), run(model, x))


def test_large_kernels_of_layers_in_float_are_int8_in_the_file_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convolutions(), pictures()
    tensors, layers = measured(model, x), layers_of(model)
    first, second = (next(n.input[1] for n in model.graph.node if n.output[0] == name) for name in layers)
    monkeypatch.setattr("pmclip_deploy.export.int8_static.SMALL", 16 * 3 * 3 * 3)  # the first kernel's size; the second is smaller
    for scheme, stored in ((CPU, {f"{first}.q"}), (TENSORRT, set())):
        made = int8_static(model, tensors, ranges(tensors), scheme, layers)
        assert {name for name, w in arrays(made).items() if w.dtype == np.int8} == stored
        assert (first in arrays(made)) == (not stored) and second in arrays(made)
        assert "QuantizeLinear" not in {n.op_type for n in made.graph.node}
        np.testing.assert_allclose(run(made, x), run(model, x), atol=0.02 if stored else 1e-6)
    mean = (run(int8_static(model, tensors, ranges(tensors), CPU, layers), x) - run(model, x)).mean((0, 2, 3))
    assert np.abs(mean).max() < 1e-3  # the bias took it up


def test_an_average_pool_between_integer_convolutions_becomes_one() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
    g = Graph()
    with torch.inference_mode():
        x = g.node("Relu", "first.relu", g.convolution("first", "x", first, nn.BatchNorm2d(16).eval(), (1, 1)))
        x = g.node("AveragePool", "pool", x, kernel_shape=[2, 2], strides=[2, 2])
        g.convolution("out", x, second, nn.BatchNorm2d(8).eval(), (0, 0))
    model, x = g.model("block", {"x": (TensorProto.FLOAT, ["B", 3, 16, 16])}, {"out": ["B", 8, 8, 8]}), pictures()
    tensors = measured(model, x)
    made = int8_static(model, tensors, ranges(tensors), CPU)
    assert [n.op_type for n in made.graph.node if "Linear" not in n.op_type] == ["Conv"] * 3
    assert cosine(run(made, x), run(model, x)) > 0.999
    floating = int8_static(model, tensors, ranges(tensors), CPU, keep={"first", "out"})
    assert "AveragePool" in [n.op_type for n in floating.graph.node]
    engine = int8_static(model, tensors, ranges(tensors), TENSORRT)
    assert "AveragePool" in [n.op_type for n in engine.graph.node]


def test_the_bias_takes_up_the_mean_error() -> None:
    model, x = convolutions(), pictures(12) + 2
    of = measured(model, x)
    without = {name: Measured(t.ranges, [0.0] * len(t.means), t.largest) for name, t in of.items()}
    reference = run(model, x)
    off = [np.abs((run(int8_static(model, m, ranges(of), CPU), x) - reference).mean((0, 2, 3))).mean() for m in (of, without)]
    assert off[0] < 0.7 * off[1]


def test_a_wrong_scale_is_seen() -> None:
    model, x = convolutions(), pictures()
    of = measured(model, x)
    made = int8_static(model, of, ranges(of), CPU)
    scale = next(w for w in made.graph.initializer if w.name == "first.relu.scale")
    scale.CopyFrom(numpy_helper.from_array(np.float32(numpy_helper.to_array(scale) / 8), scale.name))
    assert cosine(run(made, x), run(model, x)) < 0.99


# Dynamic matrices, blocks, tables.


def test_dynamic_matrices_fuse_into_one_kernel_each(tmp_path: Path) -> None:
    model, x = transformer_layer(), tokens()
    made = int8_dynamic(model, measured(model, x))
    assert cosine(run(made, x), run(model, x)) > 0.999
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimised = [n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert optimised.count("DynamicQuantizeMatMul") == 2 and "MatMulInteger" not in optimised


def test_matrices_in_blocks_and_tables_are_near_and_small() -> None:
    model, x = transformer_layer(), tokens()
    made = int8_blocks(model)
    assert cosine(run(made, x), run(model, x)) > 0.999 and made.ByteSize() < 0.4 * model.ByteSize()
    g = Graph()
    g.node("Gather", "out", g.constant("table", RNG.normal(size=(600, 48)).astype(np.float32)), "x")
    words = g.model("words", {"x": (TensorProto.INT64, ["B", "T"])}, {"out": ["B", "T", 48]})
    ids = RNG.integers(0, 600, (3, 7))
    assert cosine(run(int8_tables(words), ids), run(words, ids)) > 0.9999
    assert "table.q" in arrays(int8_tables(words))


def test_half_stored_keeps_what_fp16_cannot_hold() -> None:
    model = transformer_layer()
    weight = next(w for w in model.graph.initializer if w.name == "up.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1e6, weight.name))
    made = arrays(half_stored(model))
    assert "up.weight" in made and "out.weight.half" in made


@pytest.mark.parametrize("name", ["up.matmul", "out.matmul"])
def test_kept_layers_of_the_other_recipes(name: str) -> None:
    model = transformer_layer()
    assert layers_of(model) == ["up.matmul", "out.matmul"]
    for made in (int8_dynamic(model, {}, [name]), int8_blocks(model, [name])):
        left = [n for n in made.graph.node if n.op_type == "MatMul" and n.output[0] == name and n.input[1] in arrays(model)]
        assert len(left) == 1


# Saturation: CPUs without VNNI add two u8 x s8 products in 16 bits.


@pytest.mark.parametrize("seed", range(3))
def test_no_pair_of_weights_saturates_16_bits(seed: int) -> None:
    """Follows from the weights: 255 x (a + b) must fit for two that are added."""
    weight = np.random.default_rng(seed).normal(size=(8, 33)).astype(np.float32)
    q, scale = int8_from_weight(weight, 0, "neighbours")
    wide = q.astype(int)
    assert (255 * (np.maximum(wide[:, :-1], 0) + np.maximum(wide[:, 1:], 0))).max() <= 32767
    assert (255 * (np.minimum(wide[:, :-1], 0) + np.minimum(wide[:, 1:], 0))).min() >= -32768
    assert np.abs(int8_from_weight(weight, 0, "any")[0].astype(int)).max() <= 64
    assert np.abs(weight - q * scale[:, None]).max() <= scale.max() / 2 + 1e-6


def without_vnni() -> bool:
    path = Path("/proc/cpuinfo")
    flags = path.read_text() if path.is_file() else ""
    return " avx2" in flags and "vnni" not in flags


@pytest.mark.skipif(not without_vnni(), reason="needs an x86 CPU with AVX2 and without VNNI")
def test_the_full_range_saturates_here_and_ours_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, not reasoned: bright inputs and weights of one sign, where pairs add up."""
    g = Graph()
    weight = torch.from_numpy(RNG.uniform(0.9, 1, (WIDTH, WIDTH)).astype(np.float32))
    with torch.inference_mode():
        g.node("MatMul", "out", "x", g.weight("weight", weight))
    model = g.model("bright", {"x": (TensorProto.FLOAT, ["B", "T", WIDTH])}, {"out": ["B", "T", WIDTH]})
    x = RNG.uniform(0, 1, (4, 5, WIDTH)).astype(np.float32)
    reference = run(model, x)
    assert np.abs(run(int8_dynamic(model, {}), x) / reference - 1).max() < 0.02
    monkeypatch.setattr("pmclip_deploy.export.int8_dynamic.int8_from_weight", lambda w, axis, summed: int8_from_weight(w, axis, "none"))
    assert np.abs(run(int8_dynamic(model, {}), x) / reference - 1).max() > 0.1


def test_a_channel_that_is_all_but_dead_keeps_its_bias() -> None:
    weight = np.array([[0.5, -0.25], [1e-12, 0]], np.float32)
    q, scale = int8_from_weight(weight, 0, least=np.float32([1e-9, 1e-9]))
    np.testing.assert_array_equal(q, [[127, -64], [0, 0]])
    np.testing.assert_allclose(scale, [0.5 / 127, 1e-9])
