"""The graphs of OpenAI's backbones against open_clip in PyTorch: every batch, every length, and faults that must not pass."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("open_clip")
pytest.importorskip("transformers")

from open_clip import CLIP

from pmclip_deploy.errors import ParityError
from pmclip_deploy.export.gates import gate
from pmclip_deploy.export.parity import tensor_difference
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.base import Backbone
from tests.tiny import clip as tiny_clip
from tests.tiny.clip import pictures

GRAPHS = ("image", "text")
LARGE = [pytest.param(name, marks=pytest.mark.nightly) for name in ("RN50x4", "ViT-B/16", "ViT-L/14", "ViT-L/14@336")]
START, END = 49406, 49407
Tensor = torch.Tensor


class Model(NamedTuple):
    backbone: Backbone
    clip: CLIP


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    tiny_clip.add_tiny(tmp_path_factory.mktemp("configs"))
    yield
    tiny_clip.remove_tiny()


def lively(name: str) -> Model:
    return Model(BACKBONES[name], tiny_clip.lively(name))


@pytest.fixture(scope="module", params=["tiny", "tiny-resnet"])
def model(request: pytest.FixtureRequest) -> Model:
    return lively(request.param)


def graph(model: Model, name: str) -> Any:
    with torch.inference_mode():
        return (model.backbone.image_graph if name == "image" else model.backbone.text_graph)(model.clip)


def run(proto: Any, x: Tensor) -> Any:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["embedding"], {session.get_inputs()[0].name: x.numpy()})[0]


@torch.inference_mode()
def reference(model: Model, name: str, x: Tensor) -> Any:
    return (model.clip.encode_image(x) if name == "image" else model.clip.encode_text(x)).numpy()


def texts(*lengths: int, width: int = 77) -> Tensor:
    """Tokens with their end mark at ``length - 1``, then padding."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[0], row[length - 1] = START, END
        row[1 : length - 1] = torch.randint(1, START, (length - 2,), generator=generator)
    return tokens


def inputs_for(model: Model, name: str) -> Tensor:
    return pictures(model.backbone.preprocess.size, 3) if name == "image" else texts(77, 5, 30)


def check(expected: Any, got: Any) -> None:
    """The product's own gate, on embeddings whose values are around 1 and whose rows differ."""
    assert 0.1 < expected.std() < 10 and got.shape == expected.shape
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert (unit @ unit.T)[~np.eye(len(unit), dtype=bool)].max(initial=-1) < 0.98
    gate("fp32", {"tensors": {"embedding": tensor_difference(expected, got)}, "answers": None})


@pytest.mark.slow("backbones of real size")
@pytest.mark.parametrize("name", ["RN50", "ViT-B/32", *LARGE])
def test_a_real_backbone_equals_pytorch(name: str) -> None:
    check_backbone(lively(name))


@pytest.mark.parametrize(("name", "gelu"), [("ViT-L/14", False), ("ViT-L/14-gelu", True), ("ViT-L/14@336", False)])
def test_a_large_backbone_with_two_layers_equals_pytorch(name: str, gelu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, name, tiny_clip.shallow(name, tmp_path))
    model = lively(name)
    check_backbone(model)
    for part in GRAPHS:
        assert ("Gelu" in {node.op_type for node in graph(model, part).graph.node}) is gelu


def check_backbone(model: Model) -> None:
    for part, x in {"image": pictures(model.backbone.preprocess.size, 2), "text": texts(12, 7, width=12)}.items():
        check(reference(model, part, x), run(graph(model, part), x))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("count", [1, 3])
def test_every_batch_equals_pytorch(model: Model, name: str, count: int) -> None:
    x = inputs_for(model, name)[:count]
    check(reference(model, name, x), run(graph(model, name), x))


def test_a_text_is_the_same_at_every_length(model: Model) -> None:
    proto, tokens = graph(model, "text"), texts(3, 3)
    expected = CLIP.encode_text(model.clip, tokens).detach().numpy()  # open_clip's own, which takes 77 only
    check(expected, run(proto, tokens))
    for length in (3, 12, 77):
        np.testing.assert_allclose(run(proto, tokens[:, :length]), expected, rtol=0, atol=2e-5)


def test_what_follows_the_end_mark_is_not_read(model: Model) -> None:
    proto, tokens = graph(model, "text"), texts(9, 20)
    other = tokens.clone()
    other[0, 9:] = 17
    np.testing.assert_array_equal(run(proto, tokens), run(proto, other))
    other[0, 1:8] += 1
    assert np.abs(run(proto, tokens) - run(proto, other))[0].max() > 0.01


@pytest.mark.parametrize("name", GRAPHS)
def test_the_last_layer_computes_one_token(model: Model, name: str) -> None:
    """And equals the full computation, which PyTorch does, far below the gate."""
    x = inputs_for(model, name)
    proto = graph(model, name)
    np.testing.assert_allclose(run(proto, x), reference(model, name, x), rtol=0, atol=2e-5)
    typed = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph.value_info
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in typed}
    one = ["layer.1.q", "layer.1.up"] if "layer.1.q" in shapes else ["pool.q"]
    assert all(shapes[node][1] == 1 for node in one)
    assert "layer.0.up" not in shapes or shapes["layer.0.up"][1] != 1


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_are_plain_small_and_the_same_twice(model: Model, name: str) -> None:
    proto = graph(model, name)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version == 9 and [(x.domain, x.version) for x in proto.opset_import] == [("", 20)]
    assert {n.domain for n in proto.graph.node} == {""} and not proto.functions
    assert not {n.op_type for n in proto.graph.node} & {"BatchNormalization", "Cast", "Identity", "Expand", "Where", "If", "Loop"}
    read = {x for n in proto.graph.node for x in n.input}
    assert {w.name for w in proto.graph.initializer} <= read
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "B"
    assert proto.SerializeToString() == graph(Model(model.backbone, copy.deepcopy(model.clip)), name).SerializeToString()


def swap_channels(model: Model, protos: dict[str, Any]) -> str:
    clip = copy.deepcopy(model.clip)
    clip.visual.conv1.weight.copy_(clip.visual.conv1.weight.flip(1))
    protos["image"] = graph(Model(model.backbone, clip), "image")
    return "image"


def gelu_for_quickgelu(model: Model, protos: dict[str, Any]) -> str:
    found = [n for n in protos["text"].graph.node if n.name.endswith(".gelu")]
    assert found
    for node in found:
        node.op_type = "Gelu"
        del node.input[1]
    return "text"


def see_later_tokens(model: Model, protos: dict[str, Any]) -> str:
    mask = next(w for w in protos["text"].graph.initializer if w.name == "later")
    mask.CopyFrom(onnx.numpy_helper.from_array(np.zeros((77, 77), np.float32), "later"))
    return "text"


def forget_a_scale(model: Model, protos: dict[str, Any]) -> str:
    clip = copy.deepcopy(model.clip)
    clip.transformer.resblocks[0].attn.in_proj_weight[: clip.transformer.width] *= 4  # the square root of the heads' width
    protos["text"] = graph(Model(model.backbone, clip), "text")
    return "text"


@pytest.mark.parametrize("fault", [swap_channels, gelu_for_quickgelu, see_later_tokens, forget_a_scale])
def test_a_planted_fault_misses_the_gate(model: Model, fault: Any) -> None:
    protos = {name: graph(model, name) for name in GRAPHS}
    name = fault(model, protos)
    x = inputs_for(model, name)
    with pytest.raises(ParityError):
        check(reference(model, name, x), run(protos[name], x))
