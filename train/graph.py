"""An ONNX graph under construction: nodes and weights in the order they are added, and the layers that several towers share."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

FLOAT, INT64 = int(TensorProto.FLOAT), int(TensorProto.INT64)
OPSET, IR_VERSION = 20, 9  # Gelu is an operator from 20 on; onnxruntime 1.20 reads both

Inputs = dict[str, tuple[int, list[str | int]]]  # name to (type, shape)
Outputs = dict[str, list[str | int]]  # name to shape, all f32
Layer = TypeVar("Layer", bound=nn.Module)


@dataclass
class Graph:
    """A node's output bears the node's name."""

    order: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        return self.nodes(op, [name], *inputs, **attributes)[0]

    def nodes(self, op: str, outputs: list[str], *inputs: str, **attributes: Any) -> list[str]:
        self.order.append(helper.make_node(op, inputs, outputs, outputs[0], **attributes))
        return outputs

    def weight(self, name: str, tensor: Tensor) -> str:
        return self.constant(name, tensor.contiguous().numpy().astype(np.float32))

    def floats(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, np.float32))

    def ints(self, name: str, value: int | list[int]) -> str:
        return self.constant(name, np.array(value, np.int64))

    def constant(self, name: str, array: NDArray[Any]) -> str:
        self.weights[name] = numpy_helper.from_array(array, name)
        return name

    def linear(self, name: str, x: str, weight: Tensor, bias: Tensor) -> str:
        """PyTorch's, with a weight of (out, in)."""
        product = self.node("MatMul", f"{name}.matmul", x, self.weight(f"{name}.weight", weight.T))
        return self.node("Add", name, product, self.weight(f"{name}.bias", bias))

    def norm(self, name: str, x: str, module: nn.LayerNorm) -> str:
        weight, bias = self.weight(f"{name}.weight", module.weight), self.weight(f"{name}.bias", module.bias)
        return self.node("LayerNormalization", name, x, weight, bias, epsilon=module.eps)

    def convolution(self, name: str, x: str, conv: nn.Conv2d, norm: nn.BatchNorm2d, pads: tuple[int, int]) -> str:
        """A square convolution with its batch norm folded in; ``pads`` are of each axis, begin and end."""
        factor, shift = affine_from_norm(norm)
        if conv.bias is not None:
            shift = shift + conv.bias * factor
        return self.kernel(name, x, conv, conv.weight * factor[:, None, None, None], shift, pads)

    def kernel(self, name: str, x: str, conv: nn.Conv2d, weight: Tensor, bias: Tensor, pads: tuple[int, int]) -> str:
        """A square convolution as ``conv``, with other weights."""
        begin, end = pads
        return self.node(
            "Conv", name, x, self.weight(f"{name}.weight", weight), self.weight(f"{name}.bias", bias),
            kernel_shape=list(conv.kernel_size), strides=list(conv.stride), pads=[begin, begin, end, end], group=conv.groups,
        )  # fmt: skip

    def attention(self, name: str, q: str, k: str, v: str, heads: int, width: int, mask: str | None = None) -> str:
        """(B, Q, W), (B, T, W), (B, T, W) -> (B, Q, W); the query comes scaled, ``mask`` is added to the scores (B, H, Q, T)."""
        shape = self.ints("heads_shape", [0, 0, heads, width // heads])
        q, k, v = (
            self.node("Transpose", f"{name}.{part}.heads", self.node("Reshape", f"{name}.{part}.split", x, shape), perm=perm)
            for part, x, perm in (("q", q, [0, 2, 1, 3]), ("k", k, [0, 2, 3, 1]), ("v", v, [0, 2, 1, 3]))
        )
        if mask is None:
            scores = self.node("MatMul", f"{name}.scores", q, k)
        else:
            scores = self.node("Add", f"{name}.scores", self.node("MatMul", f"{name}.scores.matmul", q, k), mask)
        attended = self.node("MatMul", f"{name}.attended", self.node("Softmax", f"{name}.softmax", scores, axis=-1), v)
        merged = self.node("Transpose", f"{name}.merged", attended, perm=[0, 2, 1, 3])
        return self.node("Reshape", f"{name}.joined", merged, self.ints("joined_shape", [0, 0, width]))

    def first(self, name: str, x: str) -> str:
        """(B, T, W) -> (B, 1, W)."""
        return self.node("Slice", name, x, self.ints("zero", [0]), self.ints("second", [1]), self.ints("tokens_axis", [1]))

    def token(self, x: str) -> str:
        """(B, 1, W) -> (B, W)."""
        return self.node("Squeeze", "token", x, self.ints("tokens_axis", [1]))

    def model(self, name: str, inputs: Inputs, outputs: Outputs) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.order,
            name,
            [helper.make_tensor_value_info(x, kind, shape) for x, (kind, shape) in inputs.items()],
            [helper.make_tensor_value_info(x, FLOAT, shape) for x, shape in outputs.items()],
            list(self.weights.values()),
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="pmclip-deploy"
        )
        onnx.checker.check_model(model, full_check=True)
        return model


def scaled(stacked: Tensor, heads: int) -> Tensor:
    """The query's third of a weight or bias of query, key and value, times 1 / sqrt(d)."""
    width = len(stacked) // 3
    return torch.cat([stacked[:width] * (width // heads) ** -0.5, stacked[width:]])


def affine_from_norm(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """-> (factor, shift), each (C,): what the norm does to a channel in eval mode."""
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return factor, norm.bias - norm.running_mean * factor


def of_kind(kind: type[Layer], modules: Iterable[nn.Module]) -> list[Layer]:
    """The modules of this kind: torch does not tell the types of what a container holds."""
    return [module for module in modules if isinstance(module, kind)]


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    """Begin and end of each axis of a square convolution."""
    side = conv.padding[0]
    assert isinstance(side, int)  # and no name, like "same"
    return side, side
