"""Static Q/DQ: integer convolutions for CPUs, integer convolutions and matrices for TensorRT, with ranges from a calibration.

The nodes are placed here, not by onnxruntime.quantization: its result had cosine 0.89 to fp32 on an image tower, this one up to 0.998
(docs/reference/graphs-and-precisions.md). Every graph is plain ONNX, and its bytes do not change with onnxruntime's version.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pmclip_deploy.export.calibration import CONNECTORS, Measured
from pmclip_deploy.export.weights import SMALL, Arrays, arrays, biases_of, copied, int8_from_weight, layers_of, rebuilt


@dataclass(frozen=True)
class Scheme:
    """How a target's integers look."""

    symmetric: bool  # activations int8 around zero (TensorRT), else uint8 over the range
    pairs: bool  # no two products of a pair may saturate 16 bits (CPUs without VNNI)
    bias: bool  # int32 in the graph, as a fused convolution takes it; TensorRT wants floats
    matrices: bool  # matrices too, and not convolutions alone
    connectors: bool  # what stands between integer convolutions too


CPU = Scheme(symmetric=False, pairs=True, bias=True, matrices=False, connectors=True)
TENSORRT = Scheme(symmetric=True, pairs=False, bias=False, matrices=True, connectors=False)


def int8_static(
    model: onnx.ModelProto,
    tensors: Mapping[str, Measured],
    ranges: Mapping[str, tuple[float, float]],
    scheme: Scheme,
    keep: Collection[str] = (),
) -> onnx.ModelProto:
    """Activations one scale a tensor, weights int8 with a scale per channel; the bias takes up the mean error of rounded weights.

    The layers in ``keep`` stay in float, and a connector whose layers all do. For CPUs large kernels of those are int8 in the file all the
    same, and fp32 once a session is open: it is small ones that rounding harms.
    """
    weights = arrays(model)
    layers = set(layers_of(model)) - set(keep)
    large = {n.output[0] for n in model.graph.node if n.op_type == "Conv" and n.output[0] in keep and weights[n.input[1]].size >= SMALL}
    stored = large if scheme.pairs else set()
    connected = _connected(model, layers) if scheme.connectors else set()
    bias_of = biases_of(model)
    made: Arrays = {}
    nodes: list[onnx.NodeProto] = []

    def quantised(name: str) -> str:
        if f"{name}.scale" not in made:
            made[f"{name}.scale"], made[f"{name}.zero"] = _activation(*ranges[name], scheme)
            parameters = [f"{name}.scale", f"{name}.zero"]
            nodes.append(helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}.i8"], f"{name}.quantize"))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}.i8", *parameters], [f"{name}.dq"], f"{name}.dequantize"))
        return f"{name}.dq"

    def dequantised(name: str, q: NDArray[np.generic], scale: NDArray[np.float32], axis: int) -> str:
        if f"{name}.q" not in made:
            made[f"{name}.q"], made[f"{name}.scale"], made[f"{name}.zero"] = q, scale, np.zeros(scale.shape, q.dtype)
            inputs = [f"{name}.q", f"{name}.scale", f"{name}.zero"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.dq"], f"{name}.dequantize", axis=axis))
        return f"{name}.dq"

    def widened(name: str, q: NDArray[np.generic], scale: NDArray[np.float32]) -> str:
        """By nodes that onnxruntime folds as a session opens; a DequantizeLinear would run with every picture."""
        made[f"{name}.q"], made[f"{name}.scale"] = q, scale[:, None, None, None]
        nodes.append(helper.make_node("Cast", [f"{name}.q"], [f"{name}.f32"], f"{name}.widened", to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"{name}.f32", f"{name}.scale"], [f"{name}.scaled"], f"{name}.scaled"))
        return f"{name}.scaled"

    for original in model.graph.node:
        node, name = copied(original), original.output[0]
        if name in layers | stored and original.op_type == "Conv":
            x, w, *b = original.input
            weight, mean = weights[w], np.array(tensors[x].means)  # (O, I / group, k, k), (I,)
            depthwise = weight.shape[1] == 1
            bias = weights[b[0]] if b else np.zeros(len(weight), np.float32)
            summed, least = "none", np.zeros((), np.float32)
            if name in layers:
                node.input[0] = quantised(x)
                if scheme.pairs and not depthwise:
                    summed = "neighbours" if weight.shape[2:] == (1, 1) else "any"
                if scheme.bias:
                    least = np.abs(bias) / (2**29 * made[f"{x}.scale"])  # int32 holds the bias of a channel that is all but dead
            q, scale = int8_from_weight(weight, 0, summed, least)
            lost = (weight - q * scale[:, None, None, None]).sum((2, 3), dtype=np.float64)  # (O, I / group)
            bias = bias + (lost[:, 0] * mean if depthwise else lost @ mean)
            b = b or [f"{w}.bias"]
            del node.input[2:]
            if name in stored:
                node.input[1] = widened(w, q, scale)
                made[b[0]] = bias.astype(np.float32)
                node.input.append(b[0])
                nodes.append(node)
                continue
            node.input[1] = dequantised(w, q, scale, 0)
            step = made[f"{x}.scale"] * scale  # what a fused convolution takes it for, whatever stands in the graph
            if scheme.bias:
                node.input.append(dequantised(b[0], np.round(bias / step).astype(np.int32), step, 0))
            else:
                made[b[0]] = bias.astype(np.float32)
                node.input.append(b[0])
        elif name in layers and scheme.matrices:
            x, w = original.input
            node.input[0] = quantised(x)
            q, scale = int8_from_weight(weights[w], 1)
            node.input[1] = dequantised(w, q, scale, 1)
            if name in bias_of:
                b = bias_of[name]
                made[b] = (weights[b] + np.array(tensors[x].means) @ (weights[w] - q * scale)).astype(np.float32)
        elif name in connected:
            for j in range(CONNECTORS[original.op_type]):
                node.input[j] = quantised(original.input[j])
            plain = {a.name for a in original.attribute} <= {"kernel_shape", "strides"}
            if original.op_type == "AveragePool" and plain and name in tensors and tensors[name].means:
                # The same as a depthwise convolution, for which onnxruntime has the faster kernel (2.7 ms against 0.3 in RN50).
                sides = next(tuple(a.ints) for a in original.attribute if a.name == "kernel_shape")
                ones = np.full((len(tensors[name].means), 1, *sides), 127, np.int8)
                scale = np.full(len(ones), 1 / (127 * np.prod(sides)), np.float32)
                node.op_type = "Conv"
                node.input.append(dequantised(f"{name}.weight", ones, scale, 0))
                node.attribute.append(helper.make_attribute("group", len(ones)))
        nodes.append(node)
    return rebuilt(model, nodes if scheme.symmetric else _without_clips(nodes), {**weights, **made})


def _activation(low: float, high: float, scheme: Scheme) -> tuple[NDArray[np.float32], NDArray[np.generic]]:
    """(scale, zero point)"""
    if scheme.symmetric:
        return np.array(max(-low, high, 1e-8) / 127, np.float32), np.array(0, np.int8)
    scale = np.float32(max(high - low, 1e-8) / 255)
    return np.array(scale), np.array(np.clip(np.round(-low / scale), 0, 255), np.uint8)


def _connected(model: onnx.ModelProto, layers: set[str]) -> set[str]:
    """The connectors among convolutions of which at least one is an integer one, so that values stay in integers between them."""
    weights = {w.name for w in model.graph.initializer}
    integer: dict[str, bool] = {}  # tensor of the convolutional part to whether an integer layer is near
    connected = set()
    for node in model.graph.node:
        name, inputs = node.output[0], [x for x in node.input if x in integer]
        if node.op_type == "Conv":
            integer[name] = name in layers
        elif node.op_type in ("Relu", "Clip") and inputs:
            integer[name] = integer[node.input[0]]
        elif node.op_type in CONNECTORS and inputs and not set(node.input[: CONNECTORS[node.op_type]]) & weights:
            integer[name] = any(integer[x] for x in inputs)
            if integer[name]:
                connected.add(name)
    return connected


def _without_clips(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """A Clip or Relu that only a QuantizeLinear to uint8 reads is left out: its range does the work, and the convolution fuses."""
    readers: dict[str, list[str]] = {}
    for node in nodes:
        for x in node.input:
            readers.setdefault(x, []).append(node.op_type)
    clips = [n for n in nodes if n.op_type in ("Clip", "Relu")]
    source = {n.output[0]: n.input[0] for n in clips if readers.get(n.output[0]) == ["QuantizeLinear"]}
    for node in nodes:
        if node.op_type == "QuantizeLinear":
            node.input[0] = source.get(node.input[0], node.input[0])
    return [node for node in nodes if node.output[0] not in source]
