"""pmclip-lite's head as an fp32 ONNX graph, written straight from the weights."""

import numpy as np
import onnx
import torch
from torch import nn

from pmclip_deploy.train.graph import FLOAT, Graph, Inputs, Outputs, of_kind
from pmclip_deploy.train.heads.lite import STRENGTH, TAU, TAU_DETAILS, LiteHead


def lite_graph(head: LiteHead, dense: bool = False) -> onnx.ModelProto:
    """image (B, D + E) f32, text (B, D) f32 -> answer (B, A), kind (B, K), radiograph (B,) f32 logits.

    The memory's cases are scattered to their answers; ``dense`` multiplies with a matrix of ones instead, since TensorRT adds nothing up
    that it scatters.
    """
    g, width = Graph(), head.image.in_features

    def linear(name: str, x: str, module: nn.Linear) -> str:
        return g.linear(name, x, module.weight, module.bias)

    def mlp(name: str, x: str, module: nn.Sequential) -> str:
        first, last = of_kind(nn.Linear, module)
        return linear(f"{name}.2", g.node("Gelu", f"{name}.gelu", linear(f"{name}.0", x, first)), last)

    def normalised(x: str) -> str:  # as F.normalize
        norm = g.node("ReduceL2", f"{x}.norm", x, g.ints("last", [-1]), keepdims=1)
        return g.node("Div", f"{x}.unit", x, g.node("Max", f"{x}.norm.positive", norm, g.floats("tiny", 1e-12)))

    def unit(x: str) -> str:
        return scaled(x, normalised(x), "sqrt_width", width)

    def scaled(x: str, normal: str, name: str, count: int) -> str:
        return g.node("Mul", f"{x}.scaled", normal, g.floats(name, count**0.5))

    embedding, like = "image", None
    if head.detail is not None:
        last, middle = g.ints("last", [-1]), g.ints("width", [width])
        embedding = g.node("Slice", "image.embedding", "image", g.ints("first", [0]), middle, last)
        g.node("Slice", "details", "image", middle, g.ints("end", [width + head.details]), last)
        # Gemm, which the INT8 passes leave alone: whitening makes small differences large, and those of rounding too.
        weight, bias = g.weight("detail.weight", head.detail.weight), g.weight("detail.bias", head.detail.bias)
        shared = normalised(g.node("Gemm", "detail", "details", weight, bias, transB=1))
        alike = g.node("MatMul", "detail.similarity", shared, g.weight("detail.cases", head.detail_cases.T * (1 / TAU_DETAILS)))
        like = g.node("Softmax", "like", alike, axis=-1)  # (B, N)
    image, text = unit(embedding), unit("text")
    fused = g.node(
        "Mul", "fused", g.node("Relu", "fused.relu", linear("fused.image", image, head.image)), linear("fused.text", text, head.text)
    )
    look = g.node("MatMul", "look", image, g.weight("look.weight", head.look.weight.T))
    trained = g.node("Sum", "trained", linear("answer.fused", fused, head.answer), look, mlp("prior", text, head.prior))

    # The memory: softmax over the cases, scattered to the columns that each case speaks for.
    answers, (cases, slots) = len(head.balance), head.slots.shape
    keys = g.weight("cases", head.cases.T * (1 / (TAU * width**0.5)))  # (D, N); "image" is already scaled by sqrt(D)
    g.node("Softmax", "near", g.node("MatMul", "similarity", image, keys), axis=-1)  # (B, N)
    real = _dense(g, head, like) if dense else _scattered(g, image, cases, slots, answers, head, like)
    log = g.node("Log", "memory.log", g.node("Add", "memory.positive", real, g.floats("least", 1e-6)))
    memory = g.node("Sub", "memory", log, g.weight("balance", head.balance))
    padded = g.node("Pad", "trained.padded", trained, g.ints("padding", [0, 0, 0, answers - head.answer.out_features]))
    g.node("Add", "answer", padded, g.node("Mul", "memory.scaled", memory, g.floats("strength", STRENGTH)))
    g.node("Identity", "kind", mlp("kinds", text, head.kind))
    evidence = image
    if details := of_kind(nn.Linear, head.radiograph)[0].in_features - width:
        detail = scaled("detail", "detail.unit", "sqrt_details", details)
        evidence = g.node("Concat", "evidence", image, detail, axis=-1)
    g.node("Squeeze", "radiograph", mlp("radiographs", evidence, head.radiograph), g.ints("last", [-1]))
    kinds = of_kind(nn.Linear, head.kind)[-1].out_features
    outputs: Outputs = {"answer": ["B", len(head.balance)], "kind": ["B", kinds], "radiograph": ["B"]}
    inputs: Inputs = {name: (FLOAT, ["B", wide]) for name, wide in (("image", width + head.details), ("text", width))}
    return g.model("head", inputs, outputs)


def _dense(g: Graph, head: LiteHead, like: str | None) -> str:
    """near, like (B, N) -> (B, A): how often each case speaks for each answer, as a matrix."""
    answers, trained = len(head.balance), head.answer.out_features
    ones = torch.zeros(len(head.slots), answers + 1).scatter_add_(1, head.slots, torch.ones(head.slots.shape))
    if like is None:
        return g.node("MatMul", "density", "near", g.weight("speaks", ones[:, :answers]))
    near = g.node("MatMul", "density.near", "near", g.weight("speaks", ones[:, :trained]))
    return g.node("Concat", "density", near, g.node("MatMul", "density.like", like, g.weight("alike", ones[:, trained:answers])), axis=1)


def _scattered(g: Graph, image: str, cases: int, slots: int, answers: int, head: LiteHead, like: str | None) -> str:
    """near, like (B, N) -> (B, A)."""
    batch = g.node("Shape", "batch", image, start=0, end=1)
    columns = g.node("Concat", "columns.shape", batch, g.ints("columns.count", [cases * slots]), axis=0)
    column = g.node("Expand", "columns", g.constant("slots", head.slots.reshape(1, -1).numpy().astype(np.int32)), columns)

    def flat(name: str) -> str:
        each = g.node("Unsqueeze", f"{name}.each", name, g.ints("last", [-1]))
        wide = g.node("Expand", f"{name}.wide", each, g.ints("slots.count", [1, 1, slots]))
        return g.node("Reshape", f"{name}.flat", wide, g.ints("flat", [0, -1]))

    spread = flat("near")
    if like is not None:
        untrained = g.constant("untrained", (head.slots.reshape(1, -1) >= head.answer.out_features).numpy())
        spread = g.node("Where", "spread", untrained, flat(like), spread)
    sums = g.node("Concat", "sums.shape", batch, g.ints("sums.count", [answers + 1]), axis=0)
    empty = g.node("Expand", "empty", g.floats("zero", 0.0), sums)
    density = g.node("ScatterElements", "density", empty, column, spread, axis=1, reduction="add")
    return g.node("Slice", "density.real", density, g.ints("first", [0]), g.ints("answers", [answers]), g.ints("columns.axis", [1]))
