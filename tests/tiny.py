"""A tiny bundle with hand-made weights: its answers follow from the picture's mean and the question's words.

"plane"     axial, coronal or sagittal           "fracture"  yes where the picture is bright, else no
an unknown word   outside what was trained       only "is", "there", "a"   no kind is sure
a picture without contrast (one grey level)      no radiograph
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pmclip_deploy.bundle import Abstention, Graph, Head, Kind, Manifest, write_bundle
from pmclip_deploy.spec import Preprocess

DIM, SIZE = 8, 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "plane", "fracture", "is", "there", "a", "the", "which", "?"]
ANSWERS = ("axial", "coronal", "sagittal", "yes", "no")
OUTSIDE = "the question is outside what this model was trained on"
KINDS = (
    Kind("plane", (0, 1, 2), temperature=1.0, threshold=0.0, majority=0),
    Kind("fracture", (3, 4), temperature=1.0, threshold=0.6, majority=4),
    Kind("outside", (), reason=OUTSIDE),
)


def tiny_manifest(**changes: Any) -> Manifest:
    manifest = Manifest(
        name="tiny",
        version="0.0.1",
        precision="fp32",
        target="cpu",
        backbone="tiny",
        preprocess=Preprocess(SIZE, "squash", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        context_length=16,
        pad_id=0,
        embed_dim=DIM,
        logit_scale=10.0,
        graphs={name: Graph(f"{name}.onnx", "fp32") for name in ("image", "text", "head")},
        head=Head("lite"),
        answers=ANSWERS,
        kinds=KINDS,
        abstention=Abstention(0.5, 0.0, ((1.0, 0.5), (0.5, 0.75))),
    )
    return replace(manifest, **changes)


def tiny_files() -> dict[str, bytes]:
    graphs = {"image.onnx": _image(), "text.onnx": _text(), "head.onnx": _head()}
    return {**{name: model.SerializeToString() for name, model in graphs.items()}, "tokenizer.json": tiny_tokenizer().to_str().encode()}


def tiny_bundle(directory: Path, **changes: Any) -> Path:
    write_bundle(directory, tiny_manifest(**changes), tiny_files())
    return directory


def tiny_tokenizer() -> Tokenizer:
    """WordPiece with BERT's template; its own padding and truncation settings are the traps MiniLM's file has."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(128)
    return tokenizer


def _image() -> onnx.ModelProto:
    """embedding = [mean, variance, six random averages]"""
    kernel = np.random.default_rng(0).normal(size=(DIM - 2, 3, 8, 8)).astype(np.float32) / 8
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["pixels", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "centred"], ["squared"]),
        helper.make_node("ReduceMean", ["squared", "axes"], ["variance"], keepdims=1),
        helper.make_node("Conv", ["pixels", "kernel"], ["convolved"], strides=[8, 8]),
        helper.make_node("Relu", ["convolved"], ["rectified"]),
        helper.make_node("GlobalAveragePool", ["rectified"], ["pooled"]),
        helper.make_node("Concat", ["mean", "variance", "pooled"], ["joined"], axis=1),
        helper.make_node("Flatten", ["joined"], ["embedding"]),
    ]
    return _model(nodes, {"pixels": ("f", ["B", 3, SIZE, SIZE])}, {"embedding": ["B", DIM]}, axes=np.array([1, 2, 3]), kernel=kernel)


def _text() -> onnx.ModelProto:
    """embedding = the sum of the words' vectors: one coordinate per kind"""
    table = np.zeros((len(WORDS), DIM), np.float32)
    table[WORDS.index("plane"), 0] = table[WORDS.index("fracture"), 1] = table[WORDS.index("[UNK]"), 2] = 9
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["vectors"]),
        helper.make_node("ReduceSum", ["vectors", "axes"], ["embedding"], keepdims=0),
    ]
    return _model(nodes, {"tokens": ("i", ["B", "T"])}, {"embedding": ["B", DIM]}, table=table, axes=np.array([1]))


def _head() -> onnx.ModelProto:
    """answers from the image, kinds from the text, the radiograph's logit from the image's variance"""
    answer = np.random.default_rng(1).normal(size=(DIM, len(ANSWERS))).astype(np.float32)
    answer[:, 3:], answer[0, 3] = 0, 4.0  # yes = 4 x mean, no = 0
    kind = np.eye(DIM, len(KINDS), dtype=np.float32)
    radiograph = np.zeros((DIM, 1), np.float32)
    radiograph[1] = 100
    nodes = [
        helper.make_node("MatMul", ["image", "w_answer"], ["answer"]),
        helper.make_node("MatMul", ["text", "w_kind"], ["kind"]),
        helper.make_node("Gemm", ["image", "w_radiograph", "bias"], ["column"]),
        helper.make_node("Squeeze", ["column", "axes"], ["radiograph"]),
    ]
    inputs = {"image": ("f", ["B", DIM]), "text": ("f", ["B", DIM])}
    outputs = {"answer": ["B", len(ANSWERS)], "kind": ["B", len(KINDS)], "radiograph": ["B"]}
    weights = {"w_answer": answer, "w_kind": kind, "w_radiograph": radiograph, "bias": np.array([-0.1], np.float32), "axes": np.array([1])}
    return _model(nodes, inputs, outputs, **weights)


def _model(nodes: list[onnx.NodeProto], inputs: dict[str, Any], outputs: dict[str, Any], **weights: Any) -> onnx.ModelProto:
    types = {"f": TensorProto.FLOAT, "i": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, types[kind], shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model
