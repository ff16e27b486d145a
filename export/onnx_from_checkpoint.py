"""From a checkpoint to fp32 ONNX graphs, written straight from the weights: no exporter, so the bytes depend on the weights alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from open_clip import CLIP, CustomTextCLIP
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from pmclip_deploy.errors import BundleError
from pmclip_deploy.export import clip_graphs, head_graphs
from pmclip_deploy.export.graph import Graph, Inputs, Outputs, of_kind, padding_of
from pmclip_deploy.spec import BACKBONES, Backbone
from pmclip_deploy.train.findings.net import MIDDLE, PLACES, FindingsNet
from pmclip_deploy.train.heads.lite import STRENGTH, TAU, TAU_DETAILS, LiteHead
from pmclip_deploy.train.heads.mevf import MEVF
from pmclip_deploy.train.heads.qcr import QCR
from pmclip_deploy.train.heads.vision import ImageFeatures
from pmclip_deploy.train.towers import DETAILED, GRID, embedding_and_details, towers_from_checkpoint, under
from pmclip_deploy.train.vqa_heads import head_from_tensors

Head = LiteHead | MEVF | QCR


@dataclass(frozen=True)
class Modules:
    """A checkpoint as PyTorch modules in eval mode: what every graph is measured against."""

    folder: Path
    meta: dict[str, Any]  # checkpoint.json
    backbone: Backbone
    clip: CLIP | CustomTextCLIP
    head: Head | None  # without one a bundle embeds, and answers nothing
    findings: FindingsNet | None = None


def modules_from_checkpoint(folder: Path) -> Modules:
    """Raises BundleError where the checkpoint is missing or doesn't fit its backbone, its head or its findings."""
    clip, meta, tensors = towers_from_checkpoint(folder)
    weights, of_head, of_findings = folder / "model.safetensors", under(tensors, "head"), under(tensors, "findings")
    head, findings = None, None
    try:
        if of_head:
            head = head_from_tensors(of_head, meta) if "head" in meta else LiteHead.from_tensors(of_head)
    except MISFITS as error:
        raise BundleError(f"{weights}: no head that fits ({_last_line(error)}); train it with `pmclip-deploy train vqa`") from None
    try:
        if of_findings or "findings" in meta:
            findings = FindingsNet.from_tensors(of_findings)
            if (size := meta["findings"]["preprocess"]["size"]) % SIDE:
                raise ValueError(f"pictures of {size} pixels; their side is a multiple of {SIDE}")
    except MISFITS as error:
        raise BundleError(f"{weights}: no findings that fit ({_last_line(error)}); make the checkpoint again") from None
    return Modules(folder, meta, BACKBONES[meta["backbone"]], clip, head, findings)


MISFITS = (KeyError, TypeError, ValueError, RuntimeError)
SIDE = 32  # pixels that a place of the last stage takes: the middle stage's map must be twice as wide as the last one's


def _last_line(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else (str(error).splitlines() or [""])[-1].strip()


@torch.inference_mode()
def onnx_from_modules(modules: Modules, dense: bool = False) -> dict[str, onnx.ModelProto]:
    """The graphs "image" and "text", and of "features", "head" and "findings" what there is, in fp32; ``dense`` as TensorRT takes them."""
    clip, backbone, head = modules.clip, modules.backbone, modules.head
    if isinstance(clip, CustomTextCLIP):
        details = head.details if isinstance(head, LiteHead) else 0
        graphs = {"image": image_graph(clip, backbone, details), "text": text_graph(clip, backbone)}
    else:
        graphs = {"image": clip_graphs.image_graph(clip, backbone), "text": clip_graphs.text_graph(clip, backbone)}
    if isinstance(head, LiteHead):
        graphs["head"] = head_graph(head, dense)
    elif head is not None:
        if (features := head_graphs.features_graph(head.features)) is not None:
            graphs["features"] = features
        graphs["head"] = head_graphs.head_graph(head)
    if modules.findings is not None:
        graphs["findings"] = findings_graph(modules.findings, modules.meta["findings"]["preprocess"]["size"])
    return graphs


def functions_of(modules: Modules) -> dict[str, Callable[..., Any]]:
    """What each graph computes, in PyTorch: the same inputs in the same order, the same outputs."""
    clip, head = modules.clip, modules.head
    functions: dict[str, Callable[..., Any]] = {"image": clip.encode_image, "text": clip.encode_text}
    if isinstance(head, LiteHead):
        functions["head"] = head
        if head.details:
            functions["image"] = partial(embedding_and_details, clip)
    elif head is not None:
        functions |= {"features": partial(_features, head.features), "head": partial(_answers, head)}
    if modules.findings is not None:
        functions["findings"] = modules.findings
    return functions


def _features(features: ImageFeatures, *grey: Tensor) -> Tensor:
    """The networks' part of what the head sees; ``grey`` is the auto-encoder's picture, then MAML's, as far as they are there."""
    given = iter(grey)
    encoded = None if features.autoencoder is None else features.autoencoder.encode(next(given))
    objects, _ = features(torch.zeros(len(grey[0]), features.clip_dim), encoded, None if features.maml is None else next(given))
    seen: Tensor = objects[:, 0, features.clip_dim :]
    return seen


def _answers(head: MEVF | QCR, seen: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(answer logits, logits of the kinds of question): one kind for MEVF; closed and open for QCR, whose answers stand in that order."""
    objects, states = seen[:, None], head.question(tokens)[1]
    if isinstance(head, MEVF):
        return head.answer(head.attention(objects, states)), torch.zeros(len(seen), 1)
    joined = objects, states, head.condition(tokens)
    return torch.cat([head.closed(*joined), head.open(*joined)], dim=1), head.kind(tokens)


def image_graph(clip: CustomTextCLIP, backbone: Backbone, details: int = 0) -> onnx.ModelProto:
    """timm's EfficientNet, its features pooled and projected; with ``details``, their number, those of ``embedding_and_details`` too."""
    g, size = Graph(), backbone.preprocess.size
    outputs: Outputs = {"embedding": ["B", backbone.embed_dim]}
    stages = _trunk(g, clip.visual.trunk, size)
    x = g.node("Flatten", "flatten", g.node("GlobalAveragePool", "pool", stages[-1]))
    g.node("MatMul", "embedding", x, g.weight("proj.weight", clip.visual.head.proj.weight.T))
    if details:
        place = size // 16 // GRID
        grid = g.node("AveragePool", "grid", stages[DETAILED], kernel_shape=[place, place], strides=[place, place])
        left = g.node("Slice", "grid.left", grid, g.ints("first", [0]), g.ints("half", [GRID // 2]), g.ints("columns", [3]))
        g.node("Flatten", "details", left)
        outputs["details"] = ["B", details]
    return g.model("image", {"pixels": (TensorProto.FLOAT, ["B", 3, size, size])}, outputs)


def findings_graph(net: FindingsNet, size: int) -> onnx.ModelProto:
    """FindingsNet: pixels (B, 3, S, S) f32 -> finding (B, F), region (B, R), places (B, F, S / 16, S / 16) f32 logits.

    Its linear layers are Gemm, which the INT8 passes leave alone: small, and what a picture gets must not depend on the batch.
    """
    g = Graph()
    *stages, x = _trunk(g, net.trunk, size)

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
    return g.model("findings", {"pixels": (TensorProto.FLOAT, ["B", 3, size, size])}, outputs)


def text_graph(clip: CustomTextCLIP, backbone: Backbone) -> onnx.ModelProto:
    """BERT with a mean over the tokens that are not padding, and a linear projection."""
    g, bert = Graph(), clip.text.transformer
    heads, width = bert.config.num_attention_heads, bert.config.hidden_size

    real = g.node(
        "Cast",
        "real",
        g.node("Not", "not_pad", g.node("Equal", "is_pad", "tokens", g.ints("pad_id", backbone.pad_id))),
        to=TensorProto.FLOAT,
    )
    real = g.node("Unsqueeze", "mask", real, g.ints("last", [-1]))  # (B, T, 1): 1 for a token, 0 for padding
    # -1e4 where the key is padding: its weight after the softmax is exactly 0 in fp32.
    masked = g.node("Mul", "mask.scaled", g.node("Sub", "mask.less_one", real, g.floats("one", 1)), g.floats("ten_thousand", 1e4))
    masked = g.node("Reshape", "mask.keys", masked, g.ints("keys_shape", [0, 1, 1, -1]))  # (B, 1, 1, T)

    e = bert.embeddings
    words = g.node("Gather", "words", g.weight("words.weight", e.word_embeddings.weight), "tokens")
    places = e.position_embeddings.weight[: backbone.context_length] + e.token_type_embeddings.weight[0]
    length = g.node("Shape", "length", "tokens", start=1, end=2)
    places = g.node("Slice", "places", g.weight("places.weight", places), g.ints("zero", [0]), length, g.ints("zero", [0]))
    x = g.norm("embeddings.norm", g.node("Add", "embeddings", words, places), e.LayerNorm)

    for i, layer in enumerate(bert.encoder.layer):
        name, a = f"layer.{i}", layer.attention
        parts = [a.self.query, a.self.key, a.self.value]
        scale = torch.ones(3 * width)
        scale[:width] = (width // heads) ** -0.5  # folded into the query
        weight = torch.cat([p.weight for p in parts]) * scale[:, None]
        qkv = g.linear(f"{name}.qkv", x, weight, torch.cat([p.bias for p in parts]) * scale)  # (B, T, 3W)
        q, k, v = g.nodes("Split", [f"{name}.{p}" for p in "qkv"], qkv, axis=-1, num_outputs=3)
        joined = g.attention(name, q, k, v, heads, width, masked)
        out = g.linear(f"{name}.attention.out", joined, a.output.dense.weight, a.output.dense.bias)
        x = g.norm(f"{name}.attention.norm", g.node("Add", f"{name}.attention.skip", out, x), a.output.LayerNorm)
        up = g.linear(f"{name}.up", x, layer.intermediate.dense.weight, layer.intermediate.dense.bias)
        down = g.linear(f"{name}.down", g.node("Gelu", f"{name}.gelu", up), layer.output.dense.weight, layer.output.dense.bias)
        x = g.norm(f"{name}.norm", g.node("Add", f"{name}.skip", down, x), layer.output.LayerNorm)

    tokens_axis = g.ints("tokens_axis", [1])
    total = g.node("ReduceSum", "sum", g.node("Mul", "unpadded", x, real), tokens_axis, keepdims=0)
    count = g.node("ReduceSum", "count", real, tokens_axis, keepdims=0)
    g.node("MatMul", "embedding", g.node("Div", "mean", total, count), g.weight("proj.weight", clip.text.proj.weight.T))
    return g.model("text", {"tokens": (TensorProto.INT64, ["B", "T"])}, {"embedding": ["B", backbone.embed_dim]})


def head_graph(head: LiteHead, dense: bool = False) -> onnx.ModelProto:
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
    if head.detail is not None and of_kind(nn.Linear, head.radiograph)[0].in_features > width:
        detail = scaled("detail", "detail.unit", "sqrt_details", head.detail.out_features)
        evidence = g.node("Concat", "evidence", image, detail, axis=-1)
    g.node("Squeeze", "radiograph", mlp("radiographs", evidence, head.radiograph), g.ints("last", [-1]))
    kinds = of_kind(nn.Linear, head.kind)[-1].out_features
    outputs: Outputs = {"answer": ["B", len(head.balance)], "kind": ["B", kinds], "radiograph": ["B"]}
    inputs: Inputs = {name: (TensorProto.FLOAT, ["B", wide]) for name, wide in (("image", width + head.details), ("text", width))}
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


def _trunk(g: Graph, trunk: Any, size: int) -> list[str]:
    """timm's EfficientNet without squeeze-and-excitation, from "pixels": what each stage gives, and last what its last convolution does.

    Batch norms are folded, "same" padding is resolved for the one size.
    """
    x, size = _convolution(g, "conv_stem", "pixels", trunk.conv_stem, trunk.bn1, size)
    stages = []
    for i, stage in enumerate(trunk.blocks):
        for j, block in enumerate(stage):
            name, start = f"blocks.{i}.{j}", x
            # (convolution, its norm), in order: DepthwiseSeparableConv has no conv_pwl, InvertedResidual has all three.
            norms = iter([block.bn1, block.bn2, getattr(block, "bn3", None)])
            order = ("conv_pw", "conv_dw", "conv_pwl") if hasattr(block, "conv_pwl") else ("conv_dw", "conv_pw")
            for layer in order:
                x, size = _convolution(g, f"{name}.{layer}", x, getattr(block, layer), next(norms), size)
            if block.has_skip:
                x = g.node("Add", f"{name}.add", x, start)
        stages.append(x)
    return [*stages, _convolution(g, "conv_head", x, trunk.conv_head, trunk.bn2, size)[0]]


def _convolution(g: Graph, name: str, x: str, conv: nn.Conv2d, norm: nn.BatchNorm2d, size: int) -> tuple[str, int]:
    """Convolution, batch norm and activation as Conv and Clip; gives the output's name and its side."""
    (kernel, _), (stride, _) = conv.kernel_size, conv.stride
    if isinstance(conv, Conv2dSame):  # TensorFlow's rule: the output has ceil(size / stride) pixels, the odd one is padded at the end
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        begin, end = total // 2, total - total // 2
    else:
        begin, end = padding_of(conv)
    x = g.convolution(name, x, conv, norm, (begin, end))
    act = getattr(norm, "act", None)
    if isinstance(act, nn.ReLU6):
        x = g.node("Clip", f"{name}.relu6", x, g.floats("zero", 0), g.floats("six", 6))
    elif not isinstance(act, nn.Identity):
        raise NotImplementedError(f"{name}: activation {act}")
    return x, (size + begin + end - kernel) // stride + 1
