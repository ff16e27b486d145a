"""The static INT8 recipe of transformer towers: what is quantised, how near it stays with outlier channels, what backends fuse."""

from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("open_clip")

from torch import nn

from pmclip_deploy.benchmarks.outliers import plant
from pmclip_deploy.bundle.files import manifest_from_bundle
from pmclip_deploy.export.calibration import Calibration, Measured, measured_from_feeds
from pmclip_deploy.export.int8_from_onnx import int8_from_graphs
from pmclip_deploy.export.pack import bundle_from_checkpoint
from pmclip_deploy.export.precisions import TENSOR_GATES
from pmclip_deploy.export.smooth import APART, smoothed
from pmclip_deploy.export.weights import arrays, int8_tables, layers_of
from pmclip_deploy.sessions import SessionOptions, open_session
from pmclip_deploy.sessions import openvino as openvino_module
from pmclip_deploy.spec import METHODS
from pmclip_deploy.train.backbones import BACKBONES
from tests.tiny import biomed
from tests.tiny import clip as tiny_clip

GATE = TENSOR_GATES["int8"]["cosine_mean"]


class Made(NamedTuple):
    fp32: Any
    feeds: list[dict[str, Any]]  # the first half was calibrated on
    tensors: dict[str, Measured]


def calibrated(fp32: Any, feeds: list[dict[str, Any]]) -> Made:
    return Made(fp32, feeds, measured_from_feeds(fp32, feeds[: len(feeds) // 2]))


def int8(made: Made, target: str = "cpu", keep: tuple[str, ...] = ()) -> Any:
    name = made.fp32.graph.name
    calibration = Calibration("0" * 64, {}, 0, {name: made.tensors})
    return int8_from_graphs({name: made.fp32}, calibration, METHODS[0], target, [f"{name}/{layer}" for layer in keep])[name]


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    tiny_clip.add_tiny(tmp_path_factory.mktemp("configs"))
    yield
    tiny_clip.remove_tiny()


@pytest.fixture(scope="module")
def tiny(registered: None) -> dict[str, Made]:
    """A ViT and a causal text tower, both with outlier channels."""
    model, backbone = tiny_clip.lively("tiny"), BACKBONES["tiny"]
    for tower, last in ((model.visual, model.visual.ln_post), (model, model.ln_final)):
        plant(SimpleNamespace(transformer=tower.transformer, ln_post=last))
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(1000, 30000, (1, 4 + i % 9), generator=generator) for i in range(16)]
    with torch.inference_mode():
        return {
            "image": calibrated(backbone.image_graph(model), [{"pixels": x[None].numpy()} for x in tiny_clip.pictures(32, 16)]),
            "text": calibrated(backbone.text_graph(model), [{"tokens": x.numpy()} for x in tokens]),
        }


@pytest.fixture(scope="module")
def bert() -> Made:
    """BiomedCLIP's text tower, whose norms stand after the sums, with outlier channels."""
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(1000, 30000, (1, 4 + i % 9), generator=generator) for i in range(16)]
    with torch.inference_mode():
        graph = biomed.shallow().text_graph(biomed.lively())
    return calibrated(graph, [{"tokens": x.numpy()} for x in tokens])


def opened(model: Any, folder: Path, device: str = "cpu") -> Any:
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    return open_session(folder / "graph.onnx", SessionOptions(device))


def embedded(model: Any, feeds: list[dict[str, Any]], folder: Path, device: str = "cpu") -> Any:
    session = opened(model, folder, device)
    return np.concatenate([session.run(feed)["embedding"] for feed in feeds])


def cosines(a: Any, b: Any) -> Any:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(params=["image", "text", "bert"])
def made(request: pytest.FixtureRequest, tiny: dict[str, Made], bert: Made) -> Made:
    return bert if request.param == "bert" else tiny[request.param]


# What is quantised.


def test_products_with_weights_are_quantised_and_nothing_else(made: Made) -> None:
    model, layers = int8(made), set(layers_of(made.fp32))
    nodes, weights = list(model.graph.node), arrays(model)
    source = {x: node for node in nodes for x in node.output}
    readers = {x: [node for node in nodes if x in node.input] for x in source}
    for node in nodes:
        if node.op_type == "DequantizeLinear":
            assert all(reader.op_type == "MatMul" and reader.output[0] in layers for reader in readers[node.output[0]])
        if node.op_type == "QuantizeLinear":
            assert source[node.input[0]].op_type not in ("Softmax", "Add", "MatMul")
            assert [reader.op_type for reader in readers[node.output[0]]] == ["DequantizeLinear"]
            assert weights[node.input[1]].ndim == 0 and weights[node.input[2]].dtype == np.uint8
        if node.output[0] in layers:
            assert node.op_type == "MatMul" and [source[x].op_type for x in node.input] == ["DequantizeLinear"] * 2
    assert layers <= source.keys()
    assert not {node.op_type for node in nodes} & {"DynamicQuantizeLinear", "MatMulInteger"}


def test_weights_do_not_saturate_without_vnni(made: Made) -> None:
    """A bundle for CPUs is to run on any."""
    model = int8(made)
    layers = {n.output[0]: n for n in model.graph.node}
    for layer in layers_of(made.fp32):
        q = arrays(model)[layers[layers[layer].input[1]].input[0]].astype(int)  # (I, O)
        for half in (np.maximum(q, 0), np.maximum(-q, 0)):
            assert q.any() and (255 * (half[:-1] + half[1:])).max() <= 32767 + 1


def test_a_layer_that_is_kept_is_in_float_and_smoothed_with_its_norm(made: Made, tmp_path: Path) -> None:
    first, *others = layers_of(made.fp32)
    model = int8(made, keep=(first,))
    read = {n.output[0]: list(n.input) for n in model.graph.node}
    assert not read[first][0].endswith(".dq") and all(read[other][0].endswith(".dq") for other in others)
    whole = int8(made, keep=(first, *others))
    kinds = Counter(node.op_type for node in whole.graph.node)
    assert not kinds["QuantizeLinear"] and kinds["LayerNormalization"] == len(norms(made.fp32))  # nothing computed twice for floats
    expected = embedded(int8_tables(made.fp32), made.feeds, tmp_path)  # tables of words are int8 all the same
    assert cosines(embedded(whole, made.feeds, tmp_path), expected).min() > 0.9999


def norms(model: Any) -> list[str]:
    return [node.output[0] for node in model.graph.node if node.op_type == "LayerNormalization"]


# How near it stays, and that a backend fuses it.


def test_both_backends_keep_the_gate_with_outlier_channels(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = embedded(made.fp32, made.feeds, tmp_path), int8(made)
    devices = ["cpu", *(["openvino"] if find_spec("openvino") else [])]
    for device in devices:
        assert cosines(embedded(model, made.feeds, tmp_path, device), expected).mean() >= GATE
    monkeypatch.setattr("pmclip_deploy.export.int8_from_onnx.smoothed", lambda model, largest, apart=False, keep=(): (model, {"": 1}))
    assert cosines(embedded(int8(made), made.feeds, tmp_path), expected).mean() < GATE  # it was the outliers


def test_onnxruntime_fuses_each_product(made: Made, tmp_path: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 3
    ort.InferenceSession(int8(made).SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert kinds["MatMulIntegerToFloat"] == len(layers_of(made.fp32)) and not kinds["DequantizeLinear"]


@pytest.mark.skipif(not find_spec("openvino"), reason="needs the extra `openvino`")
def test_openvino_computes_each_product_in_integers(made: Made, tmp_path: Path) -> None:
    openvino_module.import_openvino()
    nodes = [node.get_rt_info() for node in opened(int8(made), tmp_path, "openvino")._first.model.get_runtime_model().get_ops()]
    products = [node for node in nodes if node["layerType"].astype(str) == "FullyConnected"]
    assert len(products) == len(layers_of(made.fp32))
    assert {node["runtimePrecision"].astype(str) for node in products} <= {"u8", "i8"}


def test_a_batch_says_what_its_rows_say(made: Made, tmp_path: Path) -> None:
    """Ranges are the calibration's, so no row's integers depend on another row. Floats between them may round by rows."""
    (name,) = made.feeds[0]
    rows = [feed for feed in made.feeds if feed[name].shape == made.feeds[0][name].shape]
    session = opened(int8(made), tmp_path)
    together = session.run({name: np.concatenate([feed[name] for feed in rows])})["embedding"]
    alone = np.concatenate([session.run(feed)["embedding"] for feed in rows])
    assert len(rows) > 1 and cosines(together, alone).min() > 0.9999


# Norms that others read too.


def test_berts_norms_are_computed_twice_and_it_is_the_same_function(bert: Made, tmp_path: Path) -> None:
    largest = {name: t.largest for name, t in bert.tensors.items() if t.largest}
    model, scales = smoothed(bert.fp32, largest, apart=True)
    copies = [name for name in norms(model) if name.endswith(APART)]
    assert copies and {*copies} <= scales.keys() and len(norms(model)) == len(norms(bert.fp32)) + len(copies)
    np.testing.assert_allclose(embedded(model, bert.feeds, tmp_path), embedded(bert.fp32, bert.feeds, tmp_path), atol=1e-4)
    assert APART not in str(smoothed(bert.fp32, largest)[0].graph.node)


def test_a_tower_whose_norms_are_all_shared_stays_as_it_is() -> None:
    """As pmclip-lite's text tower, whose shipped bytes hold weights in blocks."""
    from pmclip_deploy.train.graph import FLOAT, Graph

    torch.manual_seed(0)
    norm, linear, g = nn.LayerNorm(32), nn.Linear(32, 32), Graph()
    with torch.inference_mode():
        x = g.norm("norm", "x", norm)
        g.node("Add", "out", x, g.linear("linear", x, linear.weight, linear.bias))
    model = g.model("text", {"x": (FLOAT, ["B", "T", 32])}, {"out": ["B", "T", 32]})
    kinds = Counter(n.op_type for n in int8(calibrated(model, [{"x": np.ones((1, 3, 32), np.float32)}] * 2)).graph.node)
    assert kinds["DequantizeLinear"] == 1 and not kinds["QuantizeLinear"] + kinds["DynamicQuantizeLinear"]


def test_the_manifest_names_the_layers_that_fell_back(tmp_path: Path) -> None:
    """The most harmful first, by the ranking; each is a product of floats in the graph, and the others are integers."""
    folder = tiny_clip.checkpoint(tmp_path / "checkpoint", "tiny", tiny_clip.lively("tiny"))
    pictures = tiny_clip.captions(tmp_path / "captions", 8, 1) / "images"
    gates = {"int8": {"cosine_mean": 0.9999}}
    bundle_from_checkpoint(folder, tmp_path / "bundle", "int8", calibration_images=pictures, gates=gates)
    kept = {name: graph.float_layers for name, graph in manifest_from_bundle(tmp_path / "bundle").graphs.items()}
    assert any(kept.values())
    for name, layers in kept.items():
        model = onnx.load(tmp_path / "bundle" / f"{name}.onnx")
        integer = {n.output[0] for n in model.graph.node if n.op_type == "MatMul" and n.input[0].endswith(".dq")}
        floats = {n.output[0] for n in model.graph.node if n.op_type == "MatMul" and n.input[1].endswith(".weight")}
        assert {*layers} == floats and not integer & floats
