"""The network that looks for findings as an fp32 ONNX graph, written straight from the weights."""

import math

import numpy as np
import onnx
from torch import nn

from pmclip_deploy.train.backbones.efficientnet import trunk_graph
from pmclip_deploy.train.findings.net import MIDDLE, PLACES, FindingsNet
from pmclip_deploy.train.graph import FLOAT, Graph, Outputs, padding_of


def findings_graph(net: FindingsNet, size: int) -> onnx.ModelProto:
    """FindingsNet: pixels (B, 3, S, S) f32 -> finding (B, F), region (B, R), places (B, F, S / 16, S / 16) f32 logits.

    Its linear layers are Gemm, which the INT8 passes leave alone: small, and what a picture gets must not depend on the batch.
    """
    g = Graph()
    *stages, x = trunk_graph(g, net.trunk, size)

    def convolution(name: str, x: str, module: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> str:
        pads = padding_of(module)
        if norm is None:
            assert module.bias is not None
            return g.kernel(name, x, module, module.weight, module.bias, pads)
        return g.node("Relu", f"{name}.relu", g.convolution(name, x, module, norm, pads))

    def linear(name: str, x: str, module: nn.Linear) -> str:
        weight, bias = g.weight(f"{name}.weight", module.weight), g.weight(f"{name}.bias", module.bias)
        return g.node("Gemm", name, x, weight, bias, transB=1)

    twice = g.constant("twice", np.array([1, 1, 2, 2], np.float32))
    deep = g.node(
        "Resize", "deep.twice", convolution("deep", x, net.deep), "", twice,
        mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    fused = g.node("Relu", "fused.relu", g.node("Add", "fused", deep, convolution("fine", stages[MIDDLE], net.fine)))
    fused = convolution("point", convolution("depth", fused, net.depth, net.depth_norm), net.point, net.point_norm)
    convolution("places", fused, net.place)
    local = g.node("ReduceLogSumExp", "local.sum", "places", g.ints("sides", [2, 3]), keepdims=0)
    local = g.node("Sub", "local", local, g.floats("log_places", math.log(PLACES)))
    seen = g.node("Flatten", "seen", g.node("GlobalAveragePool", "seen.pool", x))
    both, mean = g.node("Add", "both", linear("pooled", seen, net.pool), local), "mean" if net.boxed.any() else "finding"
    g.node("Mul", mean, both, g.floats("half", 0.5))
    if net.boxed.any():
        highest = g.node("ReduceMax", "highest", "places", g.ints("sides", [2, 3]), keepdims=0)
        g.node("Add", "finding", mean, g.node("Mul", "highest.boxed", highest, g.weight("boxed", net.boxed)))
    linear("region", seen, net.region)
    findings = net.pool.out_features
    places: list[str | int] = ["B", findings, size // 16, size // 16]
    outputs: Outputs = {"finding": ["B", findings], "region": ["B", net.region.out_features], "places": places}
    return g.model("findings", {"pixels": (FLOAT, ["B", 3, size, size])}, outputs)
