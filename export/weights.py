"""Weights in fewer bits, and what every pass needs: a model's arrays, and the model rebuilt with other nodes."""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Arrays = dict[str, NDArray[Any]]


def arrays(model: onnx.ModelProto) -> Arrays:
    return {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}


def rebuilt(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], weights: Arrays) -> onnx.ModelProto:
    """The model with other nodes, and of the weights those that they read, in that order; it is checked when a bundle is made of it."""
    nodes = list(nodes)
    used = dict.fromkeys(x for node in nodes for x in node.input if x in weights)
    graph = helper.make_graph(
        nodes, model.graph.name, model.graph.input, model.graph.output, [numpy_helper.from_array(weights[name], name) for name in used]
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version, producer_name=model.producer_name)


def copied(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def layers_of(model: onnx.ModelProto) -> list[str]:
    """The layers that can be quantised, by the name of their product: convolutions, and products with one matrix of weights."""
    sides = {w.name: len(w.dims) for w in model.graph.initializer}
    wanted = {"Conv": 4, "MatMul": 2}
    return [n.output[0] for n in model.graph.node if n.op_type in wanted and sides.get(n.input[1]) == wanted[n.op_type]]


def biases_of(model: onnx.ModelProto) -> dict[str, str]:
    """A product's name to the bias that is added to it, and to nothing else."""
    weights, readers = {w.name for w in model.graph.initializer}, Counter(x for n in model.graph.node for x in n.input)
    added = [n.input for n in model.graph.node if n.op_type == "Add"]
    return {x: b for x, b in added if b in weights and readers[b] == 1}


def int8_from_weight(
    weight: NDArray[np.float32], axis: int, summed: str = "none", least: NDArray[np.float32] | float = 1e-14
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(int8, a scale per channel along ``axis``, at least ``least``).

    A CPU without VNNI adds u8 x s8 products in pairs, in 16 bits that saturate. ``summed`` says which of a channel's weights may
    meet in such a pair: "none" (depthwise kernels, which widen first; TensorRT), "neighbours" (a row of a matrix), "any". Two of
    them then add up to 127, give or take the rounding, and 255 x 128 fits; two of opposite sign cannot overflow.
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


def int8_blocks(model: onnx.ModelProto, keep: Collection[str] = ()) -> onnx.ModelProto:
    """Matrices int8, a scale per column; activations stay float in the graph.

    onnxruntime (seen in 1.32) computes such a MatMul in integers, with a scale per token and 32 channels: ten times nearer to fp32
    than one scale for all of them, the same whatever else is in the batch. With VNNI it is as fast as the dynamic recipe; without, slower
    than fp32 (docs/tried/quantisation.md). One without that kernel widens the weights.
    """
    weights = arrays(model)
    made: Arrays = {}
    nodes: list[onnx.NodeProto] = []
    for original in model.graph.node:
        node = copied(original)
        w = original.input[1] if len(original.input) > 1 else ""
        if original.op_type == "MatMul" and w in weights and weights[w].ndim == 2 and original.output[0] not in keep:
            if f"{w}.q" not in made:  # a recurrent network's steps share one matrix
                made[f"{w}.q"], made[f"{w}.scale"] = int8_from_weight(weights[w], 1)
                made[f"{w}.zero"] = np.zeros(made[f"{w}.scale"].shape, np.int8)
                inputs = [f"{w}.q", f"{w}.scale", f"{w}.zero"]
                nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{w}.dq"], f"{w}.dq", axis=1))
            node.input[1] = f"{w}.dq"
        nodes.append(node)
    return rebuilt(model, nodes, {**weights, **made})


def int8_tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """Tables that a Gather reads, of words, become int8 with a scale per row."""
    weights = arrays(model)
    made: Arrays = {}
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(op, inputs, [output], output, **attributes))

    for original in model.graph.node:
        table = original.input[0] if original.op_type == "Gather" else ""
        if table not in weights or weights[table].ndim != 2 or weights[table].dtype != np.float32 or weights[table].size < SMALL:
            nodes.append(copied(original))
            continue
        name, index = original.output[0], original.input[1]
        made[f"{table}.q"], scale = int8_from_weight(weights[table], 0)
        made[f"{table}.scale"] = scale[:, None]
        add("Gather", [f"{table}.q", index], f"{name}.i8")
        add("Gather", [f"{table}.scale", index], f"{name}.scale")
        add("Cast", [f"{name}.i8"], f"{name}.f32", to=TensorProto.FLOAT)
        add("Mul", [f"{name}.f32", f"{name}.scale"], name)
    return rebuilt(model, nodes, {**weights, **made})


SMALL = 1 << 14  # values of a table or a matrix that is not worth the nodes


def half_stored(model: onnx.ModelProto) -> onnx.ModelProto:
    """Float matrices and kernels stored as fp16, as the checkpoint has them, and computed in fp32: a session widens them once.

    Vectors stay as they are, scales among them, which fp16 may be too narrow for.
    """
    weights = arrays(model)
    made = {name: w.astype(np.float16) for name, w in weights.items() if w.dtype == np.float32 and _is_wide(w) and _fits_half(w)}
    casts = [helper.make_node("Cast", [f"{name}.half"], [name], f"{name}.widened", to=TensorProto.FLOAT) for name in made]
    kept = {name: w for name, w in weights.items() if name not in made}
    return rebuilt(model, [*casts, *model.graph.node], {**kept, **{f"{name}.half": w for name, w in made.items()}})


def _is_wide(w: NDArray[np.float32]) -> bool:
    return w.size > max(w.shape, default=1)


def _fits_half(w: NDArray[np.float32]) -> bool:
    return bool(np.abs(w).max(initial=0) <= np.finfo(np.float16).max)
