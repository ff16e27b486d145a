"""Integer matrices whose activations are quantised as they come: the recipe for transformers on CPUs, with or without VNNI."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from pmclip_deploy.export.calibration import Measured
from pmclip_deploy.export.weights import Arrays, arrays, biases_of, copied, int8_from_weight, rebuilt


def int8_dynamic(model: onnx.ModelProto, tensors: Mapping[str, Measured], keep: Collection[str] = ()) -> onnx.ModelProto:
    """Each product with a matrix as DynamicQuantizeLinear and MatMulInteger; onnxruntime fuses the five nodes and the bias into one.

    Weights int8 with a scale per column, so that no two products of a pair saturate 16 bits; activations uint8, one scale a tensor, so
    outlier channels should be smoothed first. The bias takes up the mean error of the rounded weights.
    """
    weights = arrays(model)
    bias_of = biases_of(model)
    made: Arrays = {}
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, outputs, outputs[0], **attributes))
        return outputs[0]

    for node in model.graph.node:
        name, w = node.output[0], node.input[1] if len(node.input) > 1 else ""
        if node.op_type != "MatMul" or w not in weights or weights[w].ndim != 2 or name in keep:
            nodes.append(copied(node))
            continue
        x = node.input[0]
        q, scale = int8_from_weight(weights[w], 1, "neighbours")
        made[f"{w}.q"], made[f"{w}.scale"], made[f"{w}.zero"] = q, scale, np.zeros(scale.shape, np.int8)
        if name in bias_of and x in tensors:
            b = bias_of[name]
            made[b] = (weights[b] + np.array(tensors[x].means) @ (weights[w] - q * scale)).astype(np.float32)
        add("DynamicQuantizeLinear", [x], f"{name}.u8", f"{name}.u8.scale", f"{name}.u8.zero")
        product = add("MatMulInteger", [f"{name}.u8", f"{w}.q", f"{name}.u8.zero", f"{w}.zero"], f"{name}.i32")
        both = add("Mul", [f"{name}.u8.scale", f"{w}.scale"], f"{name}.scale")
        add("Mul", [add("Cast", [product], f"{name}.f32", to=TensorProto.FLOAT), both], name)
    return rebuilt(model, nodes, {**weights, **made})
