"""SmoothQuant (Xiao et al. 2023): outlier channels move from activations, where one scale serves all channels, into the weights' rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from pmclip_deploy.export.weights import Arrays, arrays, copied, rebuilt

ALPHA = 0.5  # of a channel's range is taken out of the activations, as a power; the paper's default
PICKS = {"Slice", "GatherND", "Squeeze"}  # take some tokens, all channels of each


def smoothed(
    model: onnx.ModelProto, largest: Mapping[str, list[float]], alpha: float = ALPHA
) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """(the model, scale (W,) by the tensor it divides: none where nothing was moved); the same function up to rounding.

    For each layer norm that only matrices read, its gamma and beta are divided by s and the matrices' rows multiplied:
    s = largest|x|^alpha / largest|w|^(1 - alpha) of each channel. ``largest`` is the calibration's, of absolute values.
    """
    weights = arrays(model)
    nodes = [copied(node) for node in model.graph.node]
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for x in dict.fromkeys(node.input):
            readers.setdefault(x, []).append(node)
    outputs, scales, made = {x.name for x in model.graph.output}, dict[str, NDArray[Any]](), Arrays()
    for norm in nodes:
        if norm.op_type != "LayerNormalization":
            continue
        products, tensors = _products(norm.output[0], readers, weights)
        if not products or outputs & set(tensors) or not all(x in largest for x in {p.input[0] for p in products}):
            continue
        x = np.max([largest[name] for name in {p.input[0] for p in products}], axis=0)
        w = np.max([np.abs(weights[p.input[1]]).max(1) for p in products], axis=0)
        scale = (np.maximum(x, 1e-5) ** alpha / np.maximum(w, 1e-5) ** (1 - alpha)).astype(np.float32)
        for i in (1, 2):
            made[norm.input[i]] = weights[norm.input[i]] / scale
        for p in products:
            made[p.input[1]] = weights[p.input[1]] * scale[:, None]
        scales |= dict.fromkeys(tensors, scale)
    return rebuilt(model, nodes, {**weights, **made}), scales


def _products(x: str, readers: Mapping[str, list[onnx.NodeProto]], weights: Arrays) -> tuple[list[onnx.NodeProto], list[str]]:
    """(the products of ``x``, or of some of its tokens, with matrices; those tensors): none where something else reads it."""
    products, tensors = [], [x]
    for node in readers.get(x, []):
        if node.op_type == "MatMul" and node.input[0] == x and node.input[1] in weights:
            products.append(node)
        elif node.op_type in PICKS and node.input[0] == x:
            further, more = _products(node.output[0], readers, weights)
            if not further:
                return [], []
            products, tensors = products + further, tensors + more
        else:
            return [], []
    return products, tensors
