"""ContrastiveSimilarity as an ONNX model-local function: plain operators for any runtime, under a name that one with the kernel knows."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DOMAIN, NAME = "ai.pmclip", "ContrastiveSimilarity"
OPSET, IR_VERSION = 20, 9

Values = dict[str, tuple[int, list[str | int]]]  # name to (type, shape)


def contrastive_similarity_function() -> onnx.FunctionProto:
    """image (B, D), bank (N, D), logit_scale () -> score (B, k), index (B, k) i64, log_sum_exp (B); k is an attribute."""
    nodes: list[onnx.NodeProto] = []

    def add(op: str, output: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def constant(name: str, value: object, dtype: type) -> str:
        return add("Constant", name, value=numpy_helper.from_array(np.array(value, dtype)))

    zero, one, lowest = (constant(n, v, np.float32) for n, v in (("zero", 0), ("one", 1), ("lowest", -np.inf)))
    last, first, none = constant("last", [1], np.int64), constant("first", [0, 0, 0], np.int64), constant("none", -1, np.int64)

    def unit(x: str) -> tuple[str, str]:
        """(rows of length 1, or zeros; which have a direction). Of a row that is not finite its product with 0 is not 0."""
        rows = add("Cast", f"{x}.f32", x, to=TensorProto.FLOAT)
        finite = add("Equal", f"{x}.finite", add("ReduceSum", f"{x}.nothing", add("Mul", f"{x}.times0", rows, zero), last), zero)
        largest = add("ReduceMax", f"{x}.largest", add("Abs", f"{x}.abs", rows), last)
        usable = add("And", f"{x}.usable", finite, add("Greater", f"{x}.nonzero", largest, zero))
        kept = add("Where", f"{x}.kept", usable, rows, zero)
        scaled = add("Div", f"{x}.scaled", kept, add("Where", f"{x}.divisor", usable, largest, one))  # no square overflows
        length = add("ReduceL2", f"{x}.length", scaled, last)
        return add("Div", f"{x}.unit", scaled, add("Where", f"{x}.norm", usable, length, one)), usable

    (a, known), (b, usable) = unit("image"), unit("bank")
    cosine = add("MatMul", "cosine", a, add("Transpose", "bank.columns", b, perm=[1, 0]))
    both = add("And", "both", known, add("Transpose", "usable", usable, perm=[1, 0]))
    scores = add("Where", "scores", both, add("Mul", "scaled", cosine, "logit_scale"), lowest)  # (B, N)
    # As many more columns as are asked for, so that the bank may hold fewer.
    k = add("Constant", "k")
    nodes[-1].attribute.append(onnx.AttributeProto(name="value_ints", ref_attr_name="k", type=onnx.AttributeProto.INTS))
    wide = add("Pad", "padded", scores, add("Concat", "pads", first, k, axis=0), lowest)
    nodes.append(helper.make_node("TopK", [wide, k], ["score", "place"], "topk", axis=1))
    add("Where", "index", add("Greater", "found", "score", lowest), "place", none)
    largest = add("ReduceMax", "largest", wide, last)
    shift = add("Where", "shift", add("Greater", "any", largest, lowest), largest, zero)  # -inf less -inf is no number
    total = add("ReduceSum", "total", add("Exp", "exp", add("Sub", "shifted", wide, shift)), last)
    add("Squeeze", "log_sum_exp", add("Add", "log_sum_exp.column", add("Log", "log", total), shift), last)
    return helper.make_function(
        DOMAIN, NAME, ["image", "bank", "logit_scale"], ["score", "index", "log_sum_exp"], nodes,
        [helper.make_opsetid("", OPSET)], ["k"],
    )  # fmt: skip


def similarity_graph(rows: int, dim: int, k: int) -> onnx.ModelProto:
    """A graph of that one node: image (B, ``dim``), bank (``rows``, ``dim``), logit_scale () -> score, index, log_sum_exp."""
    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    node = helper.make_node(NAME, ["image", "bank", "logit_scale"], ["score", "index", "log_sum_exp"], "similarity", domain=DOMAIN, k=[k])
    inputs: Values = {"image": (f32, ["B", dim]), "bank": (f32, [rows, dim]), "logit_scale": (f32, [])}
    outputs: Values = {"score": (f32, ["B", k]), "index": (i64, ["B", k]), "log_sum_exp": (f32, ["B"])}
    taken, given = ([helper.make_tensor_value_info(name, *of) for name, of in values.items()] for values in (inputs, outputs))
    graph = helper.make_graph([node], "labels", taken, given)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        graph, opset_imports=opsets, functions=[contrastive_similarity_function()], ir_version=IR_VERSION, producer_name="pmclip-deploy"
    )
