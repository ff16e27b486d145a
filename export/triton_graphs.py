"""The graphs of a model repository that are not the bundle's own: an image tower over groups, what a head sees, and calibration."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.types import Kind

OPSET, IR = 20, 9  # as of the bundle's graphs
DYNAMIC = "DynamicQuantizeLinear"

Shapes: TypeAlias = Mapping[str, Sequence[str | int]]


def rows_depend(model: onnx.ModelProto) -> bool:
    """Whether a row's numbers depend on the other rows of its batch: DynamicQuantizeLinear has one scale for a whole tensor."""
    return any(node.op_type == DYNAMIC for node in model.graph.node)


def over_groups(model: onnx.ModelProto) -> onnx.ModelProto:
    """(B, P, ...) -> (B, P, ...): the same graph, which computes the P rows of all groups together.

    A server batches groups, and never parts one: a picture stays with its mirror image, and they share their scales as they do here.
    """
    grouped, before, after = onnx.ModelProto(), list[onnx.NodeProto](), list[onnx.NodeProto]()
    grouped.CopyFrom(model)
    graph = grouped.graph
    lead = helper.make_node("Shape", [graph.input[0].name], ["groups/lead"], start=0, end=2)
    for value in [*graph.input, *graph.output]:
        name, rows = value.name, f"groups/{value.name}"
        for node in graph.node:
            node.input[:] = [rows if x == name else x for x in node.input]
            node.output[:] = [rows if x == name else x for x in node.output]
        is_input = value in graph.input
        given, made, start, head = (name, rows, 2, "groups/all") if is_input else (rows, name, 1, "groups/lead")
        (before if is_input else after).extend(
            [
                helper.make_node("Shape", [given], [f"{rows}/tail"], start=start),
                helper.make_node("Concat", [head, f"{rows}/tail"], [f"{rows}/shape"], axis=0),
                helper.make_node("Reshape", [given, f"{rows}/shape"], [made]),
            ]
        )
        shape = value.type.tensor_type.shape
        dims = [onnx.TensorShapeProto.Dimension(dim_param="B"), onnx.TensorShapeProto.Dimension(dim_param="P"), *list(shape.dim)[1:]]
        shape.CopyFrom(onnx.TensorShapeProto(dim=dims))
    graph.initializer.append(numpy_helper.from_array(np.array([-1]), "groups/all"))
    nodes = [lead, *before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    return grouped


def seen_graph(widths: Mapping[str, int], details: bool) -> onnx.ModelProto:
    """What a head sees of an image, of the outputs of the graphs that look at it, as PictureGraphs.seen_from_inputs makes it.

    (B, D) each -> image (B, V). With ``details`` embedding and details, (B, P, D) each, become means over P.
    """
    nodes, parts, weights = list[onnx.NodeProto](), list(widths), dict[str, np.ndarray]()
    if details:
        first, second = parts
        nodes = [
            helper.make_node("ReduceL2", [first, "last"], ["length"], keepdims=1),
            helper.make_node("Max", ["length", "least"], ["divisor"]),
            helper.make_node("Div", [first, "divisor"], ["unit"]),
            helper.make_node("ReduceMean", ["unit", "group"], ["direction"], keepdims=0),
            helper.make_node("ReduceMean", [second, "group"], ["mean"], keepdims=0),
        ]
        parts, weights = ["direction", "mean"], {"last": np.array([2]), "group": np.array([1]), "least": np.array(1e-12, np.float32)}
    nodes.append(helper.make_node("Concat", parts, ["image"], axis=1))
    inputs: Shapes = {name: ["B", "P", width] if details else ["B", width] for name, width in widths.items()}
    return _model("seen", nodes, inputs, {"image": ["B", sum(widths.values())]}, weights)


def answer_graph(manifest: Manifest) -> onnx.ModelProto:
    """answer (B, A), kind (B, K) logits -> probability (B, M), kind_probability (B, K).

    ``probability`` has the answers of each kind of question in turn, calibrated by the kind's temperature: Manifest.kinds, in their order.
    """
    kinds = [kind for kind in manifest.kinds if kind.answers]
    nodes, weights = _calibration(kinds)
    nodes.append(helper.make_node("Softmax", ["kind"], ["kind_probability"], axis=1))
    inputs: Shapes = {"answer": ["B", len(manifest.answers)], "kind": ["B", len(manifest.kinds)]}
    outputs: Shapes = {"probability": ["B", sum(len(kind.answers) for kind in kinds)], "kind_probability": ["B", len(manifest.kinds)]}
    return _model("answer", nodes, inputs, outputs, weights)


def _calibration(kinds: Sequence[Kind]) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    names = [f"logits/{i}" for i in range(len(kinds))]
    shares = [f"shares/{i}" for i in range(len(kinds))]
    nodes = [
        helper.make_node("Gather", ["answer", "places"], ["chosen"], axis=1),
        helper.make_node("Div", ["chosen", "temperatures"], ["scaled"]),
        helper.make_node("Split", ["scaled", "sizes"], names, axis=1),
        *(
            helper.make_node("Sigmoid", [name], [share]) if kind.independent else helper.make_node("Softmax", [name], [share], axis=1)
            for kind, name, share in zip(kinds, names, shares, strict=True)
        ),
        helper.make_node("Concat", shares, ["probability"], axis=1),
    ]
    return nodes, {
        "places": np.array([place for kind in kinds for place in kind.answers]),
        "temperatures": np.array([kind.temperature for kind in kinds for _ in kind.answers], np.float32),
        "sizes": np.array([len(kind.answers) for kind in kinds]),
    }


def _model(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Shapes,
    outputs: Shapes,
    weights: Mapping[str, np.ndarray],
) -> onnx.ModelProto:
    ins, outs = ([helper.make_tensor_value_info(x, TensorProto.FLOAT, shape) for x, shape in of.items()] for of in (inputs, outputs))
    graph = helper.make_graph(nodes, name, ins, outs, [numpy_helper.from_array(array, x) for x, array in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
