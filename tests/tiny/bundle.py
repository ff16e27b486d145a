"""A tiny bundle with hand-made weights: its answers follow from the picture's mean and the question's words.

"plane"     axial, coronal or sagittal           "fracture"  yes where the picture is bright, else no
an unknown word   outside what was trained       only "is", "there", "a"   no kind is sure
a picture without contrast (one grey level)      no radiograph

Other kinds of bundle: None has towers alone. The heads "mevf", "qcr" and "blind" read words themselves and see the picture's mean
grey level (after the image's embedding, in place of it, and not at all); "plane" and "fracture" choose among the answers.
"""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pmclip_deploy.bundle.files import write_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.types import Abstention, Findings, Graph, Head, Kind, Words
from pmclip_deploy.decision.evidence import OUTSIDE
from pmclip_deploy.spec import Preprocess

DIM, SIZE = 8, 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "plane", "fracture", "is", "there", "a", "the", "which", "?"]
ANSWERS = ("axial", "coronal", "sagittal", "yes", "no")
KINDS = (
    Kind("plane", (0, 1, 2), temperature=1.0, threshold=0.0, majority=0),
    Kind("fracture", (3, 4), temperature=1.0, threshold=0.6, majority=4),
    Kind("outside", (), reason=OUTSIDE),
)


DICTIONARY = ["is", "there", "a", "fracture", "which", "plane"]  # the padding's number follows the last
READS = Words(length=4, pad_id=len(DICTIONARY))
HEADS = {
    "lite": Head("lite"),
    "mevf": Head("mevf", READS, {"autoencoder": 16, "maml": 12}),
    "qcr": Head("qcr", READS, {"autoencoder": 16}, clip=False),
    "blind": Head("mevf", READS, {}, clip=False),
}
BOTH = Kind("any", (0, 1, 2, 3, 4), threshold=0.6, independent=True)
TYPES = (Kind("closed", (0, 1), threshold=0.6, independent=True), Kind("open", (2, 3, 4), independent=True))


def tiny_manifest(kind: str | None = "lite", **changes: Any) -> Manifest:
    head = None if kind is None else HEADS[kind]
    graphs = ["image", "text", *(["head"] if head else []), *(["features"] if head and head.grey else [])]
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
        graphs={name: Graph(f"{name}.onnx", "fp32") for name in graphs},
        head=head,
        answers=() if kind is None else (*ANSWERS[3:], *ANSWERS[:3]) if kind == "qcr" else ANSWERS,
        kinds={None: (), "lite": KINDS, "qcr": TYPES}.get(kind, (BOTH,)),
        abstention=Abstention(0.5, 0.0, ((1.0, 0.5), (0.5, 0.75))) if kind == "lite" else Abstention(0.0, 0.0),
    )
    return replace(manifest, **changes)


def tiny_files(kind: str | None = "lite") -> dict[str, bytes]:
    manifest = tiny_manifest(kind)
    graphs, head = {"image": _image(), "text": _text()}, manifest.head
    if head:
        graphs["head"] = _words_head(manifest) if head.words else _head()
    if head and head.grey:
        graphs["features"] = _features(manifest)
    files = {manifest.graphs[name].file: model.SerializeToString() for name, model in graphs.items()}
    tokenizers = {"tokenizer.json": tiny_tokenizer(), **({"words.json": tiny_words()} if head and head.words else {})}
    return {**files, **{name: tokenizer.to_str().encode() for name, tokenizer in tokenizers.items()}}


def tiny_bundle(directory: Path, kind: str | None = "lite", **changes: Any) -> Path:
    write_bundle(directory, tiny_manifest(kind, **changes), tiny_files(kind))
    return directory


FACET_ANSWERS = (
    "xr - plain film", "ct noncontrast", "axial", "lateral", "musculoskeletal", "breast", "contrast", "noncontrast", "t1", "t2",
)  # fmt: skip
FACET_KINDS = tuple(Kind(name, (2 * i, 2 * i + 1)) for i, name in enumerate(("modality", "plane", "organ", "contrast", "weighting")))


def facets_bundle(directory: Path, findings: Findings | None = None, asked: tuple[str, ...] = ()) -> Path:
    """A bundle whose kinds are those that decision/ knows: it takes every picture for a lateral plain film of bones.

    With ``findings`` it has that graph: a finding's logit is the mean brightness, from -1 to 1, and so is each region's; the map is
    brighter where the picture is.
    """
    graphs = {name: Graph(f"{name}.onnx", "fp32") for name in ("image", "text", "head", *(["findings"] if findings else []))}
    manifest = tiny_manifest(answers=FACET_ANSWERS, kinds=FACET_KINDS, findings=findings, graphs=graphs, asked=asked)
    files = {**tiny_files(), "head.onnx": _facets_head().SerializeToString()}
    if findings:
        files["findings.onnx"] = _findings_graph(findings).SerializeToString()
    if asked:
        content = io.BytesIO()
        np.save(content, np.ones((len(asked), DIM), np.float32))
        files["asked.npy"] = content.getvalue()
    write_bundle(directory, manifest, files)
    return directory


def _facets_head() -> onnx.ModelProto:
    """answers that do not depend on the picture: of each kind the first one, of planes the second; the radiograph as in ``_head``"""
    bias = np.array([3, 0, 0, 3, 3, 0, 3, 0, 3, 0], np.float32)
    radiograph = np.zeros((DIM, 1), np.float32)
    radiograph[1] = 100
    nodes = [
        helper.make_node("Gemm", ["image", "w_answer", "answers"], ["answer"]),
        helper.make_node("MatMul", ["text", "w_kind"], ["kind"]),
        helper.make_node("Gemm", ["image", "w_radiograph", "bias"], ["column"]),
        helper.make_node("Squeeze", ["column", "axes"], ["radiograph"]),
    ]
    inputs = {"image": ("f", ["B", DIM]), "text": ("f", ["B", DIM])}
    outputs = {"answer": ["B", len(bias)], "kind": ["B", len(FACET_KINDS)], "radiograph": ["B"]}
    weights = {
        "w_answer": np.zeros((DIM, len(bias)), np.float32),
        "answers": bias,
        "w_kind": np.zeros((DIM, len(FACET_KINDS)), np.float32),
        "w_radiograph": radiograph,
        "bias": np.array([-0.1], np.float32),
        "axes": np.array([1]),
    }
    return _model(nodes, inputs, outputs, **weights)


def _findings_graph(findings: Findings) -> onnx.ModelProto:
    side, of, regions = findings.preprocess.size, len(findings.findings), len(findings.regions)
    scale = np.where(np.array(findings.regions) == "hand", 100, -100).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),  # (B, 1) of channels and places
        helper.make_node("Unsqueeze", ["mean", "last"], ["column"]),
        helper.make_node("Expand", ["column", "findings_shape"], ["finding"]),
        helper.make_node("Abs", ["column"], ["magnitude"]),
        helper.make_node("Add", ["magnitude", "one"], ["positive"]),
        helper.make_node("Mul", ["positive", "scale"], ["region"]),
        helper.make_node("ReduceMean", ["pixels", "channel"], ["grey"], keepdims=1),
        helper.make_node("AveragePool", ["grey"], ["pooled"], kernel_shape=[side // 4, side // 4], strides=[side // 4, side // 4]),
        helper.make_node("Expand", ["pooled", "places_shape"], ["places"]),
    ]
    outputs = {"finding": ["B", of], "region": ["B", regions], "places": ["B", of, 4, 4]}
    constants = {
        "axes": np.array([1, 2, 3]),
        "last": np.array([1]),
        "channel": np.array([1]),
        "one": np.array(1, np.float32),
        "scale": scale,
    }
    shapes = {"findings_shape": np.array([1, of]), "places_shape": np.array([1, of, 1, 1])}
    return _model(nodes, {"pixels": ("f", ["B", 3, side, side])}, outputs, **constants, **shapes)


def tiny_words() -> Tokenizer:
    """The dictionary of a head that reads words: an unknown one is padding."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*DICTIONARY, "[PAD]"])}, unk_token="[PAD]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", "")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


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


def _features(manifest: Manifest) -> onnx.ModelProto:
    """features = each network's picture's mean, MAML's first"""
    assert manifest.head
    grey = manifest.head.grey
    names = sorted(grey, reverse=True)
    nodes = [helper.make_node("ReduceMean", [name, "axes"], [f"mean_{name}"], keepdims=0) for name in names]
    nodes.append(helper.make_node("Concat", [f"mean_{name}" for name in names], ["features"], axis=1))
    inputs = {name: ("f", ["B", 1, side, side]) for name, side in grey.items()}
    return _model(nodes, inputs, {"features": ["B", len(names)]}, axes=np.array([2, 3]))


def _words_head(manifest: Manifest) -> onnx.ModelProto:
    """ "plane" lifts its three answers, "fracture" yes and no; what is seen last, the mean grey level, is for yes and against no"""
    assert manifest.head
    width = (DIM * manifest.head.clip + len(manifest.head.grey)) or 1
    place = {answer: i for i, answer in enumerate(manifest.answers)}
    seen, bias = np.zeros((width, len(place)), np.float32), np.zeros(len(place), np.float32)
    seen[-1, [place["yes"], place["no"]]], bias[[place["yes"], place["no"]]] = (8, -8), (-4, 4)
    words = np.zeros((len(DICTIONARY) + 1, len(place)), np.float32)
    words[DICTIONARY.index("plane"), [place[answer] for answer in ANSWERS[:3]]] = 5, 4, 3
    words[DICTIONARY.index("fracture"), [place["yes"], place["no"]]] = 3
    kinds = np.zeros((len(DICTIONARY) + 1, len(manifest.kinds)), np.float32)
    kinds[DICTIONARY.index("plane"), -1] = 5 if len(manifest.kinds) > 1 else 0
    nodes = [
        helper.make_node("Gemm", ["image", "w_seen", "bias"], ["from_image"]),
        helper.make_node("Gather", ["w_words", "tokens"], ["of_words"]),
        helper.make_node("ReduceSum", ["of_words", "axes"], ["from_words"], keepdims=0),
        helper.make_node("Add", ["from_image", "from_words"], ["answer"]),
        helper.make_node("Gather", ["w_kinds", "tokens"], ["kinds"]),
        helper.make_node("ReduceSum", ["kinds", "axes"], ["kind"], keepdims=0),
    ]
    inputs = {"image": ("f", ["B", width]), "tokens": ("i", ["B", READS.length])}
    outputs = {"answer": ["B", len(place)], "kind": ["B", len(manifest.kinds)]}
    return _model(nodes, inputs, outputs, w_seen=seen, bias=bias, w_words=words, w_kinds=kinds, axes=np.array([1]))


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
