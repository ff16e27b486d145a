"""Static Q/DQ: integer convolutions for CPUs, integer convolutions and matrices for TensorRT, with ranges from a calibration.

The nodes are placed here, not by onnxruntime.quantization: its result had cosine 0.89 to fp32 on an image tower, this one up to 0.998
(docs/reference/graphs-and-precisions.md). Every graph is plain ONNX, and its bytes do not change with onnxruntime's version.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

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
CPU_MATRICES = replace(CPU, matrices=True)  # of transformers
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
    weights, layers = arrays(model), set(layers_of(model)) - set(keep)
    large = {n.output[0] for n in model.graph.node if n.op_type == "Conv" and n.output[0] in keep and weights[n.input[1]].size >= SMALL}
    stored = large if scheme.pairs else set()
    connected = _connected(model, layers) if scheme.connectors else set()
    writer = _Writer(weights, biases_of(model), tensors, ranges, scheme)
    for original in model.graph.node:
        node, name = copied(original), original.output[0]
        if name in layers and node.op_type == "Conv":
            writer.integer_convolution(node)
        elif name in stored:
            writer.stored_convolution(node)
        elif name in layers and scheme.matrices:
            writer.matrix(node)
        elif name in connected:
            writer.connector(node)
        writer.nodes.append(node)
    nodes = writer.nodes if scheme.symmetric else _without_clips(writer.nodes)
    return rebuilt(model, nodes, {**weights, **writer.made})


@dataclass(frozen=True)
class _Kernel:
    """A convolution's weights in int8."""

    q: NDArray[np.int8]
    scale: NDArray[np.float32]  # per output channel
    bias: NDArray[np.float64]  # takes up the mean error of rounded weights
    bias_name: str


@dataclass(frozen=True)
class _Writer:
    """The nodes of the new graph, in order, and the arrays that they read beside the old ones."""

    weights: Arrays
    bias_of: Mapping[str, str]  # of matrices
    tensors: Mapping[str, Measured]
    ranges: Mapping[str, tuple[float, float]]
    scheme: Scheme
    made: Arrays = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def integer_convolution(self, node: onnx.NodeProto) -> None:
        x, w = node.input[:2]
        node.input[0] = self._quantised(x)
        kernel = self._kernel(node, x, integer=True)
        node.input[1] = self._dequantised(w, kernel.q, kernel.scale, 0)
        step = self.made[f"{x}.scale"] * kernel.scale  # what a fused convolution takes it for, whatever stands in the graph
        if self.scheme.bias:
            bias = self._dequantised(kernel.bias_name, np.round(kernel.bias / step).astype(np.int32), step, 0)
        else:
            bias = self._float_bias(kernel)
        self._set_bias(node, bias)

    def stored_convolution(self, node: onnx.NodeProto) -> None:
        """Int8 in the file alone."""
        x, w = node.input[:2]
        kernel = self._kernel(node, x, integer=False)
        node.input[1] = self._widened(w, kernel.q, kernel.scale)
        self._set_bias(node, self._float_bias(kernel))

    def matrix(self, node: onnx.NodeProto) -> None:
        x, w = node.input
        weight = self.weights[w]
        node.input[0] = self._quantised(x)
        q, scale = int8_from_weight(weight, 1, "neighbours" if self.scheme.pairs else "none")
        node.input[1] = self._dequantised(w, q, scale, 1)
        if (b := self.bias_of.get(node.output[0])) is not None:
            self.made[b] = (self.weights[b] + np.array(self.tensors[x].means) @ (weight - q * scale)).astype(np.float32)

    def connector(self, node: onnx.NodeProto) -> None:
        name = node.output[0]
        for j in range(CONNECTORS[node.op_type]):
            node.input[j] = self._quantised(node.input[j])
        plain = {a.name for a in node.attribute} <= {"kernel_shape", "strides"}
        if node.op_type == "AveragePool" and plain and name in self.tensors and self.tensors[name].means:
            # The same as a depthwise convolution, for which onnxruntime has the faster kernel (2.7 ms against 0.3 in RN50).
            sides = next(tuple(a.ints) for a in node.attribute if a.name == "kernel_shape")
            ones = np.full((len(self.tensors[name].means), 1, *sides), 127, np.int8)
            scale = np.full(len(ones), 1 / (127 * np.prod(sides)), np.float32)
            node.op_type = "Conv"
            node.input.append(self._dequantised(f"{name}.weight", ones, scale, 0))
            node.attribute.append(helper.make_attribute("group", len(ones)))

    def _kernel(self, node: onnx.NodeProto, x: str, integer: bool) -> _Kernel:
        """``x`` is what the convolution reads, in float."""
        w, *b = node.input[1:]
        weight, mean = self.weights[w], np.array(self.tensors[x].means)  # (O, I / group, k, k), (I,)
        depthwise = weight.shape[1] == 1
        bias = self.weights[b[0]] if b else np.zeros(len(weight), np.float32)
        summed, least = "none", np.zeros((), np.float32)
        if integer and self.scheme.pairs and not depthwise:
            summed = "neighbours" if weight.shape[2:] == (1, 1) else "any"
        if integer and self.scheme.bias:
            least = np.abs(bias) / (2**29 * self.made[f"{x}.scale"])  # int32 holds the bias of a channel that is all but dead
        q, scale = int8_from_weight(weight, 0, summed, least)
        lost = (weight - q * scale[:, None, None, None]).sum((2, 3), dtype=np.float64)  # (O, I / group)
        return _Kernel(q, scale, bias + (lost[:, 0] * mean if depthwise else lost @ mean), b[0] if b else f"{w}.bias")

    def _float_bias(self, kernel: _Kernel) -> str:
        self.made[kernel.bias_name] = kernel.bias.astype(np.float32)
        return kernel.bias_name

    @staticmethod
    def _set_bias(node: onnx.NodeProto, bias: str) -> None:
        del node.input[2:]
        node.input.append(bias)

    def _quantised(self, name: str) -> str:
        if f"{name}.scale" not in self.made:
            self.made[f"{name}.scale"], self.made[f"{name}.zero"] = _activation(*self.ranges[name], self.scheme)
            parameters = [f"{name}.scale", f"{name}.zero"]
            self.nodes.append(helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}.i8"], f"{name}.quantize"))
            self.nodes.append(helper.make_node("DequantizeLinear", [f"{name}.i8", *parameters], [f"{name}.dq"], f"{name}.dequantize"))
        return f"{name}.dq"

    def _dequantised(self, name: str, q: NDArray[np.generic], scale: NDArray[np.float32], axis: int) -> str:
        if f"{name}.q" not in self.made:
            self.made[f"{name}.q"], self.made[f"{name}.scale"], self.made[f"{name}.zero"] = q, scale, np.zeros(scale.shape, q.dtype)
            inputs = [f"{name}.q", f"{name}.scale", f"{name}.zero"]
            self.nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.dq"], f"{name}.dequantize", axis=axis))
        return f"{name}.dq"

    def _widened(self, name: str, q: NDArray[np.generic], scale: NDArray[np.float32]) -> str:
        """By nodes that onnxruntime folds as a session opens; a DequantizeLinear would run with every picture."""
        self.made[f"{name}.q"], self.made[f"{name}.scale"] = q, scale[:, None, None, None]
        self.nodes.append(helper.make_node("Cast", [f"{name}.q"], [f"{name}.f32"], f"{name}.widened", to=TensorProto.FLOAT))
        self.nodes.append(helper.make_node("Mul", [f"{name}.f32", f"{name}.scale"], [f"{name}.scaled"], f"{name}.scaled"))
        return f"{name}.scaled"


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
