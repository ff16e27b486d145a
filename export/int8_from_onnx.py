"""From fp32 graphs to INT8 ones: which recipe each graph takes on each target."""

from collections.abc import Collection, Mapping

import numpy as np
import onnx

from pmclip_deploy.export.calibration import Calibration, Measured
from pmclip_deploy.export.fp16_from_onnx import half_from_onnx
from pmclip_deploy.export.int8_dynamic import int8_dynamic
from pmclip_deploy.export.int8_static import CPU, CPU_MATRICES, TENSORRT, int8_static
from pmclip_deploy.export.smooth import APART, smoothed
from pmclip_deploy.export.weights import half_stored, int8_blocks, int8_tables, layers_of

Graphs = dict[str, onnx.ModelProto]


def int8_from_graphs(graphs: Graphs, calibration: Calibration, method: str, target: str, keep: Collection[str] = ()) -> Graphs:
    """``keep`` names layers as GRAPH/LAYER that stay above INT8; fp16 is what everything else is stored in, or computed in on a GPU."""
    kept = {name: [layer.partition("/")[2] for layer in keep if layer.startswith(f"{name}/")] for name in graphs}
    make = _for_cpu if target == "cpu" else _for_gpu
    return {name: make(model, calibration.of_graphs.get(name, {}), method, kept[name]) for name, model in graphs.items()}


def int8_layers(graphs: Graphs, target: str) -> list[str]:
    """GRAPH/LAYER of all that may be quantised on this target."""
    return [f"{name}/{layer}" for name, model in graphs.items() if target == "cpu" or name in TOWERS for layer in layers_of(model)]


TOWERS = ("image", "text", "findings")


def _for_cpu(model: onnx.ModelProto, tensors: Mapping[str, Measured], method: str, keep: Collection[str]) -> onnx.ModelProto:
    """Convolutions static, with an attention pool's matrices; transformers static if norms can be smoothed; a head's steps dynamic; other
    matrices a scale per 32 channels."""
    operators = {node.op_type for node in model.graph.node}
    if "Conv" in operators:
        scheme = CPU_MATRICES if "Softmax" in operators else CPU
        return half_stored(int8_dynamic(int8_static(model, tensors, _ranges(tensors, method), scheme, keep), tensors, keep))
    if smoothed(model, _largest(tensors))[1]:
        smooth, divided = _smooth(model, tensors, keep)
        return half_stored(int8_tables(int8_static(smooth, divided, _ranges(divided, method), CPU_MATRICES, keep)))
    if model.graph.name == "head" and "tokens" in {x.name for x in model.graph.input}:  # recurrent: states lie between -1 and 1
        return half_stored(int8_tables(int8_dynamic(model, tensors, keep)))
    return int8_tables(int8_blocks(model, keep))


def _for_gpu(model: onnx.ModelProto, tensors: Mapping[str, Measured], method: str, keep: Collection[str]) -> onnx.ModelProto:
    """Towers as Q/DQ, the rest of them and the small head in fp16."""
    if model.graph.name not in TOWERS:
        return half_from_onnx(model, _ranges(tensors, "max"))[0]
    smooth, divided = _smooth(model, tensors, keep)
    return half_from_onnx(int8_static(smooth, divided, _ranges(divided, method), TENSORRT, keep), _ranges(divided, "max"))[0]


def _smooth(
    model: onnx.ModelProto, tensors: Mapping[str, Measured], keep: Collection[str]
) -> tuple[onnx.ModelProto, dict[str, Measured]]:
    """(the smoothed model, what a calibration of it would say)"""
    smooth, scales = smoothed(model, _largest(tensors), apart=True, keep=keep)
    return smooth, _divided(tensors, scales)


def _largest(tensors: Mapping[str, Measured]) -> dict[str, list[float]]:
    return {name: t.largest for name, t in tensors.items() if t.largest}


def _ranges(tensors: Mapping[str, Measured], method: str) -> dict[str, tuple[float, float]]:
    return {name: t.ranges[method] for name, t in tensors.items() if method in t.ranges}


def _divided(tensors: Mapping[str, Measured], scales: Mapping[str, np.ndarray]) -> dict[str, Measured]:
    """What a calibration of the smoothed graph would say: of the divided tensors the largest value, whatever the method."""
    out = dict(tensors)
    for name, scale in scales.items():
        of = tensors.get(name.removesuffix(APART))
        if of is None or not of.largest:  # no matrix reads it
            continue
        largest = np.array(of.largest) / scale
        bound = float(largest.max())
        out[name] = Measured(dict.fromkeys(of.ranges, (-bound, bound)), (np.array(of.means) / scale).tolist(), largest.tolist())
    return out
