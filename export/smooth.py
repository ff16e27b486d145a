"""SmoothQuant (Xiao et al. 2023): outlier channels move from activations, where one scale serves all channels, into the weights' rows."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from pmclip_deploy.export.weights import Arrays, arrays, copied, rebuilt

ALPHA = 0.5  # of a channel's range is taken out of the activations, as a power; the paper's default
PICKS = {"Slice", "GatherND", "Squeeze"}  # take some tokens, all channels of each
APART = ".apart"  # ends the name of a tensor's copy that only matrices read

Readers = Mapping[str, list[onnx.NodeProto]]


def smoothed(
    model: onnx.ModelProto,
    largest: Mapping[str, list[float]],
    alpha: float = ALPHA,
    apart: bool = False,
    keep: Collection[str] = (),
) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """(the model, scale (W,) by the tensor it divides: none where nothing was moved); the same function up to rounding.

    For each layer norm that only matrices read, its gamma and beta are divided by s and the matrices' rows multiplied:
    s = largest|x|^alpha / largest|w|^(1 - alpha) of each channel. ``largest`` is the calibration's, of absolute values.

    With ``apart`` a norm that other nodes read too is computed twice: for those nodes, and for the matrices. BERT's are such norms: they
    stand after the sums. A norm is left as it is if all of its matrices are in ``keep``: they stay in float.
    """
    weights = arrays(model)
    nodes = [copied(node) for node in model.graph.node]
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for x in dict.fromkeys(node.input):
            readers.setdefault(x, []).append(node)
    outputs, scales, made = {x.name for x in model.graph.output}, dict[str, NDArray[Any]](), Arrays()
    doubled: set[str] = set()
    for norm in [node for node in nodes if node.op_type == "LayerNormalization"]:
        way = _way(norm.output[0], readers, weights)
        shared = way.shared or bool(outputs & set(way.tensors))
        if all(p.output[0] in keep for p in way.products) or shared > apart or not all(p.input[0] in largest for p in way.products):
            continue
        x = np.max([largest[name] for name in {p.input[0] for p in way.products}], axis=0)
        w = np.max([np.abs(weights[p.input[1]]).max(1) for p in way.products], axis=0)
        scale = (np.maximum(x, 1e-5) ** alpha / np.maximum(w, 1e-5) ** (1 - alpha)).astype(np.float32)
        for p in way.products:
            made[p.input[1]] = weights[p.input[1]] * scale[:, None]
        end = APART if shared else ""
        for i in (1, 2):
            made[norm.input[i] + end] = weights[norm.input[i]] / scale
        if shared:
            doubled |= {*way.tensors}
            for p in way.products:
                p.input[0] += APART
        scales |= dict.fromkeys((name + end for name in way.tensors), scale)
    nodes = [x for node in nodes for x in ([node, _copy_apart(node)] if node.output[0] in doubled else [node])]
    return rebuilt(model, nodes, {**weights, **made}), scales


@dataclass(frozen=True)
class _Way:
    """From a layer norm to the matrices that read it."""

    products: list[onnx.NodeProto]
    tensors: list[str]  # what the norm gives, and the tokens picked of it that products read
    shared: bool  # whether others read one of the tensors


def _way(x: str, readers: Readers, weights: Arrays) -> _Way:
    products, tensors, shared = [], [x], False
    for node in readers.get(x, []):
        if node.op_type == "MatMul" and node.input[0] == x and node.input[1] in weights:
            products.append(node)
        elif node.op_type in PICKS and node.input[0] == x and (further := _way(node.output[0], readers, weights)).products:
            products, tensors, shared = products + further.products, tensors + further.tensors, shared or further.shared
        else:
            shared = True
    return _Way(products, tensors, shared)


def _copy_apart(node: onnx.NodeProto) -> onnx.NodeProto:
    """Of a norm, with weights of its own, or of a pick, which reads the norm's copy."""
    copy = copied(node)
    for i in (1, 2) if node.op_type == "LayerNormalization" else (0,):
        copy.input[i] += APART
    copy.name += APART
    copy.output[0] += APART
    return copy
