"""From an fp32 ONNX graph to a strongly typed fp16 one: the type of every tensor stands in the graph, the only way TensorRT 11 takes it.

A product of matrices is written as casts of fp16 to fp32, MatMul, and a cast of its result to fp16. TensorRT makes that one kernel, which
reads and writes fp16 and accumulates in fp32 (its "Control of Computational Precision"). Without the cast behind it, TensorRT-RTX 1.7 folds
the weights to fp32 and multiplies in fp32: so it stands there even where the reader widens the result again. Convolutions have no such
pattern: they are plain fp16, and TensorRT chooses how they accumulate.

Q/DQ keep their scales and floats in fp32: no scale is lost, and TensorRT finds its int8 kernels all the same. Of fp16 scales TensorRT-RTX
1.7 makes a product whose integer sums are written as fp16, where they pass 65504, and multiplies two scales to an fp16 subnormal.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pmclip_deploy.export.weights import Arrays, arrays, copied, rebuilt

Ranges = Mapping[str, tuple[float, float]]

F32, F16 = TensorProto.FLOAT, TensorProto.FLOAT16
LARGEST, NORMAL = 65504.0, 2.0**-14  # of fp16: the largest value, and the least with all its bits
SAFETY = 8.0  # what is met later may be this many times larger, or smaller, than what was measured
ROUNDING = 2.0**-10  # of a weight's norm, twice what rounding costs at most: more is lost only where numbers that matter are subnormal

PRODUCTS = {"MatMul", "Gemm"}
ARITHMETIC = {"Add", "Sub", "Mul", "Sum", "Neg"}
MOVES = {
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze",
    "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
HALF = PRODUCTS | ARITHMETIC | MOVES | {"AveragePool", "Clip", "Conv", "Gelu", "LeakyRelu", "MaxPool", "Relu", "Sigmoid", "Tanh"}
SHAPES = {"Shape", "Size"}  # read either type
BOUNDED = {"LayerNormalization", "Sigmoid", "Softmax", "Tanh"}  # the size of their output says nothing of their input's


def half_from_onnx(
    model: onnx.ModelProto, ranges: Ranges | None = None, keep: Collection[str] = ()
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """(the model, the nodes in fp32 because fp16 cannot hold what they read or write, by their first output).

    In fp32 are softmax, norms, means, sums, divisions, logarithms and any operator that is not in HALF; arithmetic and moves of which only
    those or the graph's outputs read the result: so a residual stream into layer norms; and the nodes in ``keep``. The graph's inputs and
    outputs keep their types. ``ranges`` are the least and largest value of tensors over calibration data; a tensor that has none is taken
    to be as large as its neighbours. Weights that fp16 would cut to infinity or to few bits stay in fp32 with the nodes that read them.
    """
    nodes, weights, floats = list(model.graph.node), arrays(model), _of_type(model, F32)
    always = {n.output[0] for n in nodes if n.op_type not in HALF | SHAPES | {"QuantizeLinear"}}  # a quantiser draws nothing into fp32
    kept = _wide(model, weights, always | set(keep))
    lost = _lost(nodes, ranges or {}, weights, floats)
    wide = _wide(model, weights, kept | {n.output[0] for n in nodes if lost & {*n.input, *n.output}})
    typed = _Typed(dict(weights), floats, {*weights, *(x.name for x in model.graph.input)})
    for node in nodes:
        typed.add(node, node.output[0] in wide)
    for x in model.graph.output:
        typed.named(x.name, F32)
    names = tuple(n.output[0] for n in nodes if n.op_type in HALF and n.output[0] in (wide - kept) & floats)
    return rebuilt(model, typed.nodes, typed.weights), names


def rounded_from_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function in fp32, with every rounding to fp16 and every overflow.

    For onnxruntime on CPUs: where it has no fp16 kernel it computes in fp32 and drops the casts between, so it hides what a GPU will do.
    """
    halves, nodes = _of_type(model, F16), list[onnx.NodeProto]()
    for original in model.graph.node:
        node, name, op = copied(original), original.output[0], original.op_type
        if op == "Cast" and {name, node.input[0]} & halves:
            node.op_type = "Identity"
            del node.attribute[:]
        nodes.append(node)
        if name in halves and op not in MOVES:
            node.output[0] = f"{name}.exact"
            nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], f"{name}.half", to=F16))
            nodes.append(helper.make_node("Cast", [f"{name}.half"], [name], f"{name}.single", to=F32))
    return rebuilt(model, nodes, {x: w.astype(np.float32) if x in halves else w for x, w in arrays(model).items()})


def _of_type(model: onnx.ModelProto, kind: int) -> set[str]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.output, *graph.value_info]}
    kinds |= {w.name: w.data_type for w in graph.initializer}
    return {name for name, of in kinds.items() if of == kind}


def _wide(model: onnx.ModelProto, weights: Arrays, given: set[str]) -> set[str]:
    """``given``, and arithmetic and moves of activations whose result only such nodes and the graph's outputs read."""
    readers: dict[str, list[str]] = {x.name: ["output"] for x in model.graph.output}
    for node in model.graph.node:
        for x in node.input:
            readers.setdefault(x, []).append(node.output[0])
    wide = {*given, "output"}
    for node in reversed(model.graph.node):
        follows = node.op_type in ARITHMETIC or (node.op_type in MOVES and node.input[0] not in weights)
        if follows and wide.issuperset(r for x in node.output for r in readers.get(x, ["nobody"])):
            wide.add(node.output[0])
    return wide - {"output"}


def _lost(nodes: list[onnx.NodeProto], ranges: Ranges, weights: Arrays, floats: set[str]) -> set[str]:
    """Tensors and weights that fp16 cannot hold; with a margin, but for what is moved out of weights and always the same (masks)."""
    fixed = {*weights}
    for node in nodes:
        if node.op_type in MOVES and fixed >= floats & {*node.input}:
            fixed |= {*node.output}
    lost = {name for name, ends in ranges.items() if name not in fixed and not _held(float(np.abs(ends).max()))}
    unknown = (floats | {n.output[0] for n in nodes if n.op_type == "QuantizeLinear"}) - {*ranges, *fixed}
    grown = lost
    while grown:
        near = {x for n in nodes if n.op_type not in BOUNDED and lost & {*n.input, *n.output} for x in (*n.input, *n.output)}
        grown = near & unknown - lost
        lost = lost | grown
    return lost | {name for name, w in weights.items() if name in floats and not _fits(w)}


def _held(largest: float) -> bool:
    return largest == 0 or NORMAL * SAFETY <= largest <= LARGEST / SAFETY


def _fits(w: NDArray[np.float32]) -> bool:
    return bool(np.linalg.norm(_half(w).astype(np.float64) - w) <= ROUNDING * np.linalg.norm(w.astype(np.float64)))


def _half(w: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return w.astype(np.float16)


@dataclass
class _Typed:
    """The nodes so far, and the names under which tensors are there: a tensor's own in fp32, with .f16 behind it in fp16."""

    weights: Arrays
    floats: set[str]
    there: set[str]
    halves: set[str] = field(default_factory=set)  # what nodes give in fp16
    dequantised: set[str] = field(default_factory=set)
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def add(self, original: onnx.NodeProto, wide: bool) -> None:
        node, op = copied(original), original.op_type
        half = not wide and (op in HALF or (op in SHAPES and node.input[0] in self.halves))
        integer = half and op in PRODUCTS | {"Conv"} and self.dequantised >= {*node.input[:2]}
        product = half and op in PRODUCTS and not integer
        for i, x in enumerate(node.input):
            node.input[i] = self.rounded(x) if product else self.named(x, F16 if half and not integer else F32)
        for i, x in enumerate(node.output):
            if half and x in self.floats:
                self.halves.add(x)
                node.output[i] = f"{x}.f16"
        if op == "DequantizeLinear":
            self.dequantised.add(node.output[0])
        self.there |= {*node.output}
        self.nodes.append(node)
        if (product or integer) and node.output[0] != original.output[0]:
            name, node.output[0] = node.output[0], f"{original.output[0]}.accumulated"
            self.cast(node.output[0], name, F16)

    def named(self, x: str, kind: int) -> str:
        """The tensor in this type, which is made where it isn't there yet."""
        name = f"{x}.f16" if kind == F16 and x in self.floats else x
        if x not in self.floats or name in self.there:
            return name
        if x in self.weights:
            self.weights[name] = _half(self.weights[x])
            self.there.add(name)
        else:
            self.cast(x if kind == F16 else f"{x}.f16", name, kind)
        return name

    def rounded(self, x: str) -> str:
        """In fp32, what fp16 holds of it."""
        if x not in self.floats or x in self.halves:
            return self.named(x, F32)
        half, name = self.named(x, F16), f"{x}.rounded"
        if name not in self.there:
            self.cast(half, name, F32)
        return name

    def cast(self, x: str, name: str, kind: int) -> None:
        self.there.add(name)
        self.nodes.append(helper.make_node("Cast", [x], [name], f"{name}.cast", to=kind))
