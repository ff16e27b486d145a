"""From fp32 graphs to INT8 ones: static Q/DQ for the convolutional tower, int8 weights for the transformer, fp16 storage for the rest.

The Q/DQ nodes are placed here, not by onnxruntime.quantization: its result had cosine 0.84 to fp32 on this image tower, this one 0.996
(docs/export.md). Every graph is plain ONNX, and its bytes do not change with onnxruntime's version.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

TAIL = 1e-4  # of an image's activations lies outside its range, on either side
SAMPLE = 100_000  # values of one tensor that a percentile is taken of

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Calibration:
    """What static quantisation must know of the data; calibration.json holds it."""

    checkpoint: str  # sha256 of the model.safetensors it was made from
    images: dict[str, str]  # name to sha256
    float_convolutions: int  # how many of the first convolutions stay in float
    ranges: dict[str, tuple[float, float]]  # tensor to its smallest and largest value
    means: dict[str, list[float]]  # a convolution's input to its mean per channel

    def to_json(self) -> dict[str, Any]:
        return {"schema": "pmclip-deploy/calibration/1", **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Calibration":
        """Raises ValueError, KeyError or TypeError where ``data`` is none."""
        ranges = {name: (float(low), float(high)) for name, (low, high) in data["ranges"].items()}
        means = {name: [float(x) for x in mean] for name, mean in data["means"].items()}
        return cls(str(data["checkpoint"]), dict(data["images"]), int(data["float_convolutions"]), ranges, means)


def activations_from_images(
    model: onnx.ModelProto, tensors: Iterable[NDArray[np.float32]], step: Callable[[], None] = lambda: None
) -> tuple[dict[str, tuple[float, float]], dict[str, list[float]]]:
    """(ranges, means) of every tensor that is quantised; ``tensors`` are (3, S, S)."""
    convolved = {node.input[0] for node in model.graph.node if node.op_type == "Conv"}
    wanted = sorted({x for node in model.graph.node if node.op_type in INPUTS for x in node.input[: INPUTS[node.op_type]]})
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    inner = [name for name in wanted if name != "pixels"]
    probe.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inner)
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])

    lows, highs = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0.0)  # zero is in every range: padding must be exact
    sums: dict[str, NDArray[np.float64]] = {}
    count = 0
    for tensor in tensors:
        values = dict(zip(inner, session.run(inner, {"pixels": tensor[None]}), strict=True), pixels=tensor[None])
        for name, value in values.items():
            flat = value.ravel()[:: max(1, value.size // SAMPLE)]
            low, high = np.quantile(flat, [TAIL, 1 - TAIL])
            lows[name], highs[name] = min(lows[name], float(low)), max(highs[name], float(high))
            if name in convolved:
                sums[name] = sums.get(name, 0) + value.mean((0, 2, 3), dtype=np.float64)
        count += 1
        step()
    ranges = {name: (_short(lows[name]), _short(highs[name])) for name in wanted}
    return ranges, {name: [_short(x / count) for x in total] for name, total in sorted(sums.items())}


def int8_image(model: onnx.ModelProto, calibration: Calibration) -> onnx.ModelProto:
    """Activations uint8, asymmetric, per tensor; weights int8, symmetric, per channel; the bias takes up the mean error of rounded weights.

    The first convolutions stay in float: few channels and large activations make them most of the error.
    """
    weights = arrays(model)
    convolutions = [i for i, node in enumerate(model.graph.node) if node.op_type == "Conv"]
    keep = calibration.float_convolutions
    start = convolutions[keep] if keep < len(convolutions) else len(model.graph.node)
    made: Arrays = {}
    nodes: list[onnx.NodeProto] = []

    def quantised(name: str) -> str:
        if f"{name}.scale" not in made:
            low, high = calibration.ranges[name]
            scale = np.float32(max(high - low, 1e-8) / 255)
            made[f"{name}.scale"], made[f"{name}.zero"] = np.array(scale), np.array(np.clip(np.round(-low / scale), 0, 255), np.uint8)
            parameters = [f"{name}.scale", f"{name}.zero"]
            nodes.append(helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}.u8"], f"{name}.quantize"))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}.u8", *parameters], [f"{name}.dq"], f"{name}.dequantize"))
        return f"{name}.dq"

    def dequantised(name: str, q: NDArray[Any], scale: NDArray[np.float32], axis: int) -> str:
        made[f"{name}.q"], made[f"{name}.scale"], made[f"{name}.zero"] = q, scale, np.zeros(scale.shape, q.dtype)
        inputs = [f"{name}.q", f"{name}.scale", f"{name}.zero"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.dq"], f"{name}.dequantize", axis=axis))
        return f"{name}.dq"

    for i, original in enumerate(model.graph.node):
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if i >= start and node.op_type in INPUTS:
            for j in range(INPUTS[node.op_type]):
                node.input[j] = quantised(original.input[j])
        if i >= start and node.op_type == "Conv":
            x, w, b = original.input
            weight = weights[w]  # (O, I / group, k, k)
            depthwise = weight.shape[1] == 1
            summed = "none" if depthwise else "neighbours" if weight.shape[2:] == (1, 1) else "any"
            least = np.abs(weights[b]) / (2**29 * made[f"{x}.scale"])  # int32 holds the bias of a channel that is all but dead
            q, scale = int8_from_weight(weight, 0, summed, least)
            lost = (weight - q * scale[:, None, None, None]).sum((2, 3), dtype=np.float64)  # (O, I / group)
            mean = np.array(calibration.means[x])
            bias = weights[b] + (lost[:, 0] * mean if depthwise else lost @ mean)
            step = made[f"{x}.scale"] * scale  # what a fused convolution takes it for, whatever stands in the graph
            node.input[1] = dequantised(w, q, scale, 0)
            node.input[2] = dequantised(b, np.round(bias / step).astype(np.int32), step, 0)
        elif i >= start and node.op_type == "MatMul":
            node.input[1] = dequantised(original.input[1], *int8_from_weight(weights[original.input[1]], 1, "neighbours"), 1)
        nodes.append(node)
    return _rebuilt(model, _without_clips(nodes), {**weights, **made})


def int8_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Matrices int8, a scale per column; the word table int8, a scale per row. Activations stay float in the graph.

    onnxruntime (seen in 1.32) computes such a MatMul in integers, with a scale per token and 32 channels: about as fast as
    DynamicQuantizeLinear and MatMulInteger, ten times nearer to fp32, the same whatever else is in the batch, and without
    16-bit sums that could overflow. One without that kernel widens the weights.
    """
    weights = arrays(model)
    made: Arrays = {}
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(op, inputs, [output], output, **attributes))

    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        name, inputs = node.output[0], node.input
        if node.op_type == "MatMul" and inputs[1] in weights:
            w = inputs[1]
            made[f"{w}.q"], made[f"{w}.scale"] = int8_from_weight(weights[w], 1)
            made[f"{w}.zero"] = np.zeros(made[f"{w}.scale"].shape, np.int8)
            add("DequantizeLinear", [f"{w}.q", f"{w}.scale", f"{w}.zero"], f"{w}.dq", axis=1)
            node.input[1] = f"{w}.dq"
            nodes.append(node)
        elif node.op_type == "Gather" and inputs[0] in weights:
            table, index = inputs
            made[f"{table}.q"], scale = int8_from_weight(weights[table], 0)
            made[f"{table}.scale"] = scale[:, None]
            add("Gather", [f"{table}.q", index], f"{name}.i8")
            add("Gather", [f"{table}.scale", index], f"{name}.scale")
            add("Cast", [f"{name}.i8"], f"{name}.f32", to=TensorProto.FLOAT)
            add("Mul", [f"{name}.f32", f"{name}.scale"], name)
        else:
            nodes.append(node)
    return _rebuilt(model, nodes, {**weights, **made})


def half_stored(model: onnx.ModelProto) -> onnx.ModelProto:
    """Float matrices and kernels stored as fp16, as the checkpoint has them, and computed in fp32: a session widens them once."""
    weights = arrays(model)
    made = {name: w.astype(np.float16) for name, w in weights.items() if w.ndim > 1 and w.dtype == np.float32}
    casts = [helper.make_node("Cast", [f"{name}.half"], [name], f"{name}.widened", to=TensorProto.FLOAT) for name in made]
    kept = {name: w for name, w in weights.items() if name not in made}
    return _rebuilt(model, [*casts, *model.graph.node], {**kept, **{f"{name}.half": w for name, w in made.items()}})


INPUTS = {"Conv": 1, "Add": 2, "GlobalAveragePool": 1, "MatMul": 1}  # quantised in the image tower: how many inputs are activations


def arrays(model: onnx.ModelProto) -> Arrays:
    return {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}


def int8_from_weight(
    weight: NDArray[np.float32], axis: int, summed: str = "none", least: NDArray[np.float32] | float = 1e-14
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(int8, a scale per channel along ``axis``, at least ``least``).

    A CPU without VNNI adds u8 x s8 products in pairs, in 16 bits that saturate. ``summed`` says which of a channel's weights may
    meet in such a pair: "none" (depthwise kernels, which widen first), "neighbours" (a row of a matrix), "any". Two of them then add
    up to 127, give or take the rounding, and 255 x 128 fits; two of opposite sign cannot overflow.
    """
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    largest = np.abs(rows).max(1)
    if summed == "any":
        largest = 2 * largest
    elif summed == "neighbours":
        left, right = rows[:, :-1], rows[:, 1:]
        largest = np.maximum(largest, np.where(left * right > 0, np.abs(left + right), 0).max(1, initial=0))
    scale = np.maximum(largest / np.float32(127), np.maximum(least, np.float32(1e-14))).astype(np.float32)
    shape = [1] * weight.ndim
    shape[axis] = -1
    return np.round(weight / scale.reshape(shape)).astype(np.int8), scale


def _without_clips(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """A Clip that only a QuantizeLinear reads is left out where the uint8 range does its work, so that the convolution before it fuses."""
    readers: dict[str, list[str]] = {}
    for node in nodes:
        for x in node.input:
            readers.setdefault(x, []).append(node.op_type)
    source = {n.output[0]: n.input[0] for n in nodes if n.op_type == "Clip" and readers[n.output[0]] == ["QuantizeLinear"]}
    for node in nodes:
        if node.op_type == "QuantizeLinear":
            node.input[0] = source.get(node.input[0], node.input[0])
    return [node for node in nodes if node.output[0] not in source]


def _rebuilt(model: onnx.ModelProto, nodes: list[onnx.NodeProto], weights: Arrays) -> onnx.ModelProto:
    """The model with other nodes, and of the weights those that they read, in that order."""
    used = dict.fromkeys(x for node in nodes for x in node.input if x in weights)
    graph = helper.make_graph(
        nodes, model.graph.name, model.graph.input, model.graph.output, [numpy_helper.from_array(weights[name], name) for name in used]
    )
    rebuilt = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version, producer_name=model.producer_name)
    onnx.checker.check_model(rebuilt, full_check=True)
    return rebuilt


def _short(x: float) -> float:
    """Six digits: what calibration.json holds is what is used."""
    return float(f"{x:.6g}")
