"""MEVF and QCR as fp32 ONNX graphs, written straight from the weights: what their own networks see of an image, and the head.

The recurrent networks are twelve steps of plain operators. ONNX's GRU and LSTM run as fast in fp32 and build in TensorRT-RTX too, but hide
their matrices from int8, which makes the steps 4 times as fast on a CPU (hidden 1024, batch 1).
"""

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.train.graph import Graph, Inputs, affine_from_norm, of_kind, padding_of
from pmclip_deploy.train.heads.bilinear import BAN, SAN, BilinearPooling, Stack
from pmclip_deploy.train.heads.mevf import MEVF
from pmclip_deploy.train.heads.qcr import QCR, Branch, ConditionedQuestion
from pmclip_deploy.train.heads.vision import AUTOENCODER_SIZE, MAML_SIZE, AutoEncoder, ImageFeatures, MamlNetwork
from pmclip_deploy.train.heads.words import LENGTH, QuestionEmbedding


@torch.inference_mode()
def features_graph(features: ImageFeatures) -> onnx.ModelProto | None:
    """autoencoder (B, 1, 128, 128) f32, maml (B, 1, 84, 84) f32, both in 0..1 -> features (B, F) f32, the MAML network's first.

    Only the inputs of the networks that ``features`` has; None where it has neither.
    """
    g, parts, sides = Graph(), list[str](), dict[str, int]()
    if features.autoencoder is not None and features.convert is not None:
        code = g.node("Flatten", "code", _encoder(g, features.autoencoder))
        parts, sides = [_linear(g, "convert", code, features.convert)], {"autoencoder": AUTOENCODER_SIZE}
    if features.maml is not None:
        parts, sides = [_maml(g, features.maml), *parts], {**sides, "maml": MAML_SIZE}
    if not parts:
        return None
    g.node("Concat", "features", *parts, axis=1)
    inputs: Inputs = {name: (TensorProto.FLOAT, ["B", 1, side, side]) for name, side in sides.items()}
    return g.model("features", inputs, {"features": ["B", features.dim - features.clip_dim]})


@torch.inference_mode()
def head_graph(head: MEVF | QCR) -> onnx.ModelProto:
    """image (B, V) f32, tokens (B, 12) i64 -> answer (B, A) f32 logits, kind (B, K) f32 logits.

    ``image`` is CLIP's embedding and the features, joined: the one object of the picture. MEVF's kind is (B, 1) zeros; QCR's are closed
    and open, and the closed answers stand before the open ones.
    """
    g = Graph()
    answers, kinds = _mevf(g, head) if isinstance(head, MEVF) else _qcr(g, head)
    inputs: Inputs = {"image": (TensorProto.FLOAT, ["B", head.features.dim]), "tokens": (TensorProto.INT64, ["B", LENGTH])}
    return g.model("head", inputs, {"answer": ["B", answers], "kind": ["B", kinds]})


def _mevf(g: Graph, head: MEVF) -> tuple[int, int]:
    _, states = _states(g, "question", head.question)
    if isinstance(head.attention, SAN):
        joint = _san(g, "attention", states[-1], head.attention)
    else:
        joint = _ban(g, "attention", *_object(g), _joined(g, "question", states), head.attention)
    shape = g.node("Concat", "kind.shape", g.node("Shape", "batch", "image", start=0, end=1), g.ints("one", [1]), axis=0)
    g.node("Expand", "kind", g.floats("zero", 0), shape)
    return _classifier(g, "answer", joint, head.answer), 1


def _qcr(g: Graph, head: QCR) -> tuple[int, int]:
    picture = _object(g)
    states = _joined(g, "question", _states(g, "question", head.question)[1])
    condition = _conditioned(g, "condition", head.condition)

    def branch(name: str, of: Branch) -> int:
        joint = _ban(g, f"{name}.attention", *picture, states, of.attention)
        return _classifier(g, f"{name}.answer", g.node("Mul", f"{name}.conditioned", joint, condition), of.answer)

    answers = branch("closed", head.closed) + branch("open", head.open)
    g.node("Concat", "answer", "closed.answer", "open.answer", axis=1)
    _conditioned(g, "kind", head.kind)
    return answers, 2


def _states(g: Graph, name: str, question: QuestionEmbedding) -> tuple[str, list[str]]:
    """-> words (B, 12, E), twelve states, each (B, H). What the words give is one product for all steps; the first step knows no state."""
    table = torch.cat([table.weight for table in of_kind(nn.Embedding, question.tables)], dim=1)
    words, cell = g.node("Gather", f"{name}.words", g.weight(f"{name}.words.weight", table), "tokens"), question.recurrent
    parameters: list[Tensor] = [cell.get_parameter(of) for of in ("weight_ih_l0", "bias_ih_l0", "weight_hh_l0")]
    weight, bias, matrix = parameters
    if isinstance(cell, nn.LSTM):
        weight, bias, matrix = (_sigmoids_first(x) for x in (weight, bias + cell.get_parameter("bias_hh_l0"), matrix))
    flat = g.node("Reshape", f"{name}.input.flat", g.linear(f"{name}.input", words, weight, bias), g.ints("flat", [0, -1]))
    steps = g.nodes("Split", [f"{name}.{t}.input" for t in range(LENGTH)], flat, axis=1, num_outputs=LENGTH)
    turned = g.weight(f"{name}.state.weight", matrix.T)
    return words, _gru(g, name, steps, turned, cell) if isinstance(cell, nn.GRU) else _lstm(g, name, steps, turned, cell)


def _gru(g: Graph, name: str, steps: list[str], matrix: str, cell: nn.GRU) -> list[str]:
    """h' = (1 - z) n + z h with n = tanh(input + r (W h + b)), so the state's bias stays with the state."""
    hidden, bias = cell.hidden_size, cell.get_parameter("bias_hh_l0")
    sizes, every = g.ints(f"{name}.sizes", [2 * hidden, hidden]), g.weight(f"{name}.state.bias", bias)
    state, states = g.weight(f"{name}.start", torch.zeros(hidden)), list[str]()
    seen = [g.weight(f"{name}.start.gates", bias[: 2 * hidden]), g.weight(f"{name}.start.new", bias[2 * hidden :])]
    for t, given in enumerate(steps):
        at = f"{name}.{t}"
        if t:
            product = g.node("Add", f"{at}.state", g.node("MatMul", f"{at}.state.matmul", state, matrix), every)
            seen = g.nodes("Split", [f"{at}.state.gates", f"{at}.state.new"], product, sizes, axis=1)
        gates, new = g.nodes("Split", [f"{at}.input.gates", f"{at}.input.new"], given, sizes, axis=1)
        gates = g.node("Sigmoid", f"{at}.gates", g.node("Add", f"{at}.gates.sum", gates, seen[0]))
        reset, update = g.nodes("Split", [f"{at}.reset", f"{at}.update"], gates, axis=1, num_outputs=2)
        new = g.node("Tanh", f"{at}.new", g.node("Add", f"{at}.new.sum", new, g.node("Mul", f"{at}.kept", reset, seen[1])))
        old = g.node("Mul", f"{at}.old", update, g.node("Sub", f"{at}.difference", state, new))
        state = g.node("Add", at, new, old)
        states.append(state)
    return states


def _lstm(g: Graph, name: str, steps: list[str], matrix: str, cell: nn.LSTM) -> list[str]:
    sizes = g.ints(f"{name}.sizes", [3 * cell.hidden_size, cell.hidden_size])
    memory, states = "", list[str]()
    for t, total in enumerate(steps):
        at = f"{name}.{t}"
        if t:
            total = g.node("Add", f"{at}.sum", total, g.node("MatMul", f"{at}.state.matmul", states[-1], matrix))
        gates, new = g.nodes("Split", [f"{at}.gates.sum", f"{at}.new.sum"], total, sizes, axis=1)
        parts = [f"{at}.{gate}" for gate in ("admit", "keep", "show")]
        admit, keep, show = g.nodes("Split", parts, g.node("Sigmoid", f"{at}.gates", gates), axis=1, num_outputs=3)
        new = g.node("Mul", f"{at}.admitted", admit, g.node("Tanh", f"{at}.new", new))
        memory = g.node("Add", f"{at}.memory", new, g.node("Mul", f"{at}.old", keep, memory)) if t else new
        states.append(g.node("Mul", at, show, g.node("Tanh", f"{at}.memory.tanh", memory)))
    return states


def _sigmoids_first(rows: Tensor) -> Tensor:
    """Of the LSTM's i, f, g, o, as PyTorch has them, the g goes last."""
    i, f, new, o = rows.chunk(4)
    return torch.cat([i, f, o, new])


def _joined(g: Graph, name: str, states: list[str]) -> str:
    """-> (B, 12, H)"""
    return g.node("Reshape", f"{name}.states", g.node("Concat", f"{name}.joined", *states, axis=1), g.ints("steps", [0, LENGTH, -1]))


def _object(g: Graph) -> tuple[str, str]:
    """-> (the picture's one object (B, 1, V), 1 or, where it is all zeros and so padding to the attention, 0 (B, 1, 1))"""
    picture = g.node("Unsqueeze", "object", "image", g.ints("second", [1]))
    largest = g.node("ReduceMax", "object.largest", g.node("Abs", "object.sizes", picture), g.ints("last", [-1]))
    return picture, g.node("Sign", "object.there", largest)


def _ban(g: Graph, name: str, picture: str, there: str, states: str, ban: BAN) -> str:
    """(B, 1, V), (B, 1, 1), (B, 12, Q) -> (B, Q). Of one object the weights are a softmax over the words, which are all alike for padding.

    A glimpse adds the same to every word, so the sum over the words takes it twelve times.
    """
    second, poolings = g.ints("second", [1]), of_kind(BilinearPooling, ban.pooling)
    maps = of_kind(nn.Linear, [*ban.attention.image, *(layer for pooling in poolings for layer in pooling.image)])
    image = g.linear(f"{name}.image", picture, torch.cat([m.weight for m in maps]), torch.cat([m.bias for m in maps]))
    sizes, names = g.ints(f"{name}.image.sizes", [len(m.bias) for m in maps]), [f"{name}.image.{i}" for i in range(len(maps))]
    seen, *pooled = g.nodes("Split", names, g.node("Relu", f"{name}.image.relu", image), sizes, axis=2)  # each (B, 1, R)

    (question,) = of_kind(nn.Linear, ban.attention.question)
    asked = _rectified(g, f"{name}.words", states, question)  # (B, 12, R)
    glimpses = g.node("Mul", f"{name}.glimpses", seen, g.weight(f"{name}.glimpses.weight", ban.attention.glimpse.weight))  # (B, G, R)
    scores = g.node("MatMul", f"{name}.scores", glimpses, g.node("Transpose", f"{name}.words.turned", asked, perm=[0, 2, 1]))
    weights = g.node("Softmax", f"{name}.weights", g.node("Mul", f"{name}.scores.there", scores, there), axis=-1)  # (B, G, 12)
    names = [f"{name}.weights.{i}" for i in range(len(pooled))]
    questions = of_kind(nn.Linear, [layer for pooling in poolings for layer in pooling.question])
    residuals = of_kind(nn.Linear, [layer for layers in of_kind(nn.Sequential, ban.residual) for layer in layers])
    added = ""
    for i, weight in enumerate(g.nodes("Split", names, weights, axis=1, num_outputs=len(pooled))):
        at = f"{name}.{i}"
        words = g.node("Add", f"{at}.states", states, added) if added else states
        mean = g.node("MatMul", f"{at}.mean", weight, _rectified(g, f"{at}.words", words, questions[i]))  # (B, 1, Q)
        residual = _linear(g, f"{at}.residual", g.node("Mul", f"{at}.joint", pooled[i], mean), residuals[i])
        added = g.node("Add", f"{at}.added", added, residual) if added else residual
    times = g.node("Mul", f"{name}.added", added, g.floats("words", LENGTH))
    return g.node("Squeeze", name, g.node("Add", f"{name}.sum", g.node("ReduceSum", f"{name}.states", states, second), times), second)


def _san(g: Graph, name: str, last: str, san: SAN) -> str:
    """(B, Q) -> (B, Q). Of one object the weight is 1 in every stack, so all stacks are one product."""
    stacks = of_kind(Stack, san.stacks)
    weight = sum((stack.image.weight for stack in stacks), torch.zeros(()))
    seen = g.node("MatMul", f"{name}.image", "image", g.weight(f"{name}.image.weight", weight.T))
    return g.node("Add", name, _linear(g, f"{name}.question", last, stacks[0].question), seen)


def _conditioned(g: Graph, name: str, module: ConditionedQuestion) -> str:
    """-> (B, the last layer's outputs)"""
    words, steps = _states(g, name, module.question)
    states = _joined(g, name, steps)
    pairs = [(layer.weight, layer.bias) for layer in (module.value, module.gate)]
    weight, bias = (torch.cat(both) for both in zip(*pairs, strict=True))
    both = g.linear(f"{name}.gated", g.node("Concat", f"{name}.both", words, states, axis=2), weight, bias)
    value, gate = g.nodes("Split", [f"{name}.value", f"{name}.gate"], both, axis=2, num_outputs=2)
    gated = g.node("Mul", f"{name}.open", g.node("Tanh", f"{name}.tanh", value), g.node("Sigmoid", f"{name}.sigmoid", gate))
    scores = g.node("MatMul", f"{name}.scores", gated, g.weight(f"{name}.scores.weight", module.score.weight[0]))  # (B, 12)
    weights = g.node("Unsqueeze", f"{name}.weights", g.node("Softmax", f"{name}.softmax", scores, axis=-1), g.ints("second", [1]))
    x = g.node("Squeeze", f"{name}.mean", g.node("MatMul", f"{name}.attended", weights, states), g.ints("second", [1]))
    first, second, third = of_kind(nn.Linear, module.layers)
    x = _rectified(g, f"{name}.second", _rectified(g, f"{name}.first", x, first), second)
    return _linear(g, name, x, third)


def _classifier(g: Graph, name: str, x: str, layers: nn.Sequential) -> int:
    """-> how many answers"""
    hidden, last = of_kind(nn.Linear, layers)
    _linear(g, name, _rectified(g, f"{name}.hidden", x, hidden), last)
    return len(last.bias)


def _linear(g: Graph, name: str, x: str, layer: nn.Linear) -> str:
    return g.linear(name, x, layer.weight, layer.bias)


def _rectified(g: Graph, name: str, x: str, layer: nn.Linear) -> str:
    return g.node("Relu", f"{name}.relu", _linear(g, name, x, layer))


def _encoder(g: Graph, network: AutoEncoder) -> str:
    """autoencoder -> (B, 16, 32, 32)"""
    x = "autoencoder"
    for i, conv in enumerate((network.conv1, network.conv2, network.conv3), 1):
        name = f"encoder.{i}"
        assert conv.bias is not None
        x = g.node("Relu", f"{name}.relu", g.kernel(name, x, conv, conv.weight, conv.bias, padding_of(conv)))
        if i < 3:
            x = g.node("MaxPool", f"{name}.pool", x, kernel_shape=[2, 2], strides=[2, 2])
    return x


def _maml(g: Graph, network: MamlNetwork) -> str:
    """maml -> (B, 64)

    Each norm stands behind a ReLU, so it goes into what follows: its factor into the next kernel, its shift into what that kernel makes of
    it, which differs at the border, where zeros lie beyond and no shift. After the last norm comes the mean over places.
    """
    x, side, factor, shift = "maml", MAML_SIZE, torch.ones(1), None
    layers = zip(of_kind(nn.Conv2d, network.convolutions), of_kind(nn.BatchNorm2d, network.norms), strict=True)
    for i, (conv, norm) in enumerate(layers, 1):
        name = f"maml.{i}"
        assert conv.bias is not None
        x = g.kernel(name, x, conv, conv.weight * factor[:, None, None], conv.bias, padding_of(conv))
        if shift is not None:
            places = F.conv2d(shift[:, None, None].expand(-1, side, side), conv.weight, None, conv.stride, padding_of(conv))
            x = g.node("Add", f"{name}.shifted", x, g.weight(f"{name}.shift", places))
        x, side = g.node("Relu", f"{name}.relu", x), -(-side // 2)
        factor, shift = affine_from_norm(norm)
    assert shift is not None
    mean = g.node("Flatten", "maml.flat", g.node("GlobalAveragePool", "maml.mean", x))
    scaled = g.node("Mul", "maml.scaled", mean, g.weight("maml.factor", factor))
    return g.node("Add", "maml.features", scaled, g.weight("maml.shift", shift))
