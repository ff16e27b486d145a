"""What a bundle's graphs may hold, and files that change while they are in use. Every bundle here has right hashes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

import pmclip_deploy as pm
from pmclip_deploy.bundle.files import write_bundle
from pmclip_deploy.kernels.onnx_function import similarity_graph
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.onnx_file import weights_outside, with_weights_inside
from pmclip_deploy.sessions import SessionOptions, open_session
from tests.sources import ROOT
from tests.tiny.bundle import SIZE, facets_bundle, tiny_bundle, tiny_files, tiny_manifest

EMBEDDING = "embedding"


def graph_of(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ()) -> GraphProto:
    return helper.make_graph(nodes, "inner", [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs])


def loop(model: ModelProto, nodes: Callable[[GraphProto], object] | None = None) -> ModelProto:
    """Adds a Loop without an end before the embedding."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["state"], ["next"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", TensorProto.BOOL, []),
         helper.make_tensor_value_info("state", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("next", TensorProto.FLOAT, None)],
    )  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "forever"))
    return behind(model, helper.make_node("Loop", ["", "forever", "before"], [EMBEDDING], body=body))


def behind(model: ModelProto, *last: onnx.NodeProto) -> ModelProto:
    """Puts nodes between what made the embedding, then "before", and the output."""
    made = next(node for node in model.graph.node if EMBEDDING in node.output)
    made.output[0] = "before"
    model.graph.node.extend(last)
    return model


def branch(model: ModelProto) -> ModelProto:
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "forever"))
    same = graph_of(helper.make_node("Identity", ["before"], ["kept"]), outputs=("kept",))
    return behind(model, helper.make_node("If", ["forever"], [EMBEDDING], then_branch=same, else_branch=same))


def scan(model: ModelProto) -> ModelProto:
    body = helper.make_graph(
        [helper.make_node("Identity", ["row"], ["same"])],
        "body",
        [helper.make_tensor_value_info("row", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    return behind(model, helper.make_node("Scan", ["before"], [EMBEDDING], body=body, num_scan_inputs=1))


def in_attribute(model: ModelProto) -> ModelProto:
    """A Loop in a graph that an operator which takes none carries along."""
    inner = graph_of(helper.make_node("Loop", ["", "forever"], ["kept"], body=graph_of()))
    return behind(model, helper.make_node("Identity", ["before"], [EMBEDDING], carried=inner))


def function(model: ModelProto, name: str, domain: str, *nodes: onnx.NodeProto) -> ModelProto:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
    model.functions.append(helper.make_function(domain, name, ["x"], ["y"], nodes, opsets))
    if not any(opset.domain == domain for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


def of_function(model: ModelProto) -> ModelProto:
    """A Loop in a model-local function."""
    body = graph_of(helper.make_node("Identity", ["x"], ["y"]), outputs=("y",))
    behind(model, helper.make_node("Work", ["before"], [EMBEDDING], domain="other"))
    return function(model, "Work", "other", helper.make_node("Loop", ["", "", "x"], ["y"], body=body))


def of_our_function(model: ModelProto) -> ModelProto:
    """The same, under the name of the function that bundles may have."""
    body = graph_of(helper.make_node("Identity", ["x"], ["y"]), outputs=("y",))
    behind(model, helper.make_node("ContrastiveSimilarity", ["before"], [EMBEDDING], domain="ai.pmclip"))
    return function(model, "ContrastiveSimilarity", "ai.pmclip", helper.make_node("Loop", ["", "", "x"], ["y"], body=body))


def of_functions_without_end(model: ModelProto) -> ModelProto:
    """A function that calls itself twice."""
    calls = [helper.make_node("ContrastiveSimilarity", [a], [b], domain="ai.pmclip") for a, b in (("x", "z"), ("z", "y"))]
    behind(model, helper.make_node("ContrastiveSimilarity", ["before"], [EMBEDDING], domain="ai.pmclip"))
    return function(model, "ContrastiveSimilarity", "ai.pmclip", *calls)


def overridden(model: ModelProto) -> ModelProto:
    """A function that takes the place of an operator which bundles may have."""
    return function(model, "ReduceMean", "", helper.make_node("Identity", ["x"], ["y"]))


def of_onnxruntime(model: ModelProto) -> ModelProto:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return behind(model, helper.make_node("Sampling", ["before"], [EMBEDDING], domain="com.microsoft"))


def sparse(model: ModelProto) -> ModelProto:
    values, places = numpy_helper.from_array(np.ones(1, np.float32), "s"), numpy_helper.from_array(np.zeros(1, np.int64), "p")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4]))
    return model


@pytest.mark.parametrize(
    "change",
    [loop, branch, scan, in_attribute, of_function, of_our_function, of_functions_without_end, overridden, of_onnxruntime, sparse],
)
@pytest.mark.parametrize("file", ["image.onnx", "text.onnx"])
def test_what_might_not_end_is_refused(tmp_path: Path, change: Callable[[ModelProto], ModelProto], file: str) -> None:
    files = tiny_files()
    write_bundle(tmp_path / "b", tiny_manifest(), {**files, file: change(onnx.load_from_string(files[file])).SerializeToString()})
    with pytest.raises(pm.BundleError, match=rf"{file}: refused, .*which no bundle has; export it again") as caught:
        pm.load(tmp_path / "b")
    assert "\n" not in str(caught.value)


def outside(place: str, **more: int) -> Callable[[ModelProto], ModelProto]:
    def change(model: ModelProto) -> ModelProto:
        weight = next(weight for weight in model.graph.initializer if weight.data_type == TensorProto.FLOAT and len(weight.raw_data) > 4)
        set_external_data(weight, place, **{"offset": 0, "length": len(weight.raw_data), **more})
        weight.ClearField("raw_data")
        return model

    return change


def in_constant(model: ModelProto) -> ModelProto:
    weight = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[1], raw_data=b"0000")
    set_external_data(weight, "image.onnx.data", offset=0, length=4)
    weight.ClearField("raw_data")
    constant = helper.make_node("Constant", [], ["constant"], value=TensorProto(name="c", data_type=1, dims=[1], raw_data=bytes(4)))
    constant.attribute[0].t.CopyFrom(weight)
    return behind(model, constant, helper.make_node("Add", ["before", "constant"], [EMBEDDING]))


def without_location(model: ModelProto) -> ModelProto:
    """Says where it lies, and not that it lies outside."""
    model = outside("image.onnx.data")(model)
    for weight in model.graph.initializer:
        weight.ClearField("data_location")
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (outside("../outside.data"), r"lies in '\.\./outside\.data', not in 'image\.onnx\.data'"),
        (outside("/etc/passwd"), "lies in '/etc/passwd'"),
        (outside("./image.onnx.data"), r"lies in '\./image\.onnx\.data'"),
        (outside("text.onnx.data"), r"lies in 'text\.onnx\.data'"),
        (outside(""), "lies in ''"),
        (outside("image.onnx.data", offset=1 << 60), "beyond the end"),
        (outside("image.onnx.data", length=4), "another size than its shape"),
        (in_constant, "a node's own constant|lies in"),
        (without_location, "no usable place"),
    ],
)
def test_a_weight_elsewhere_is_refused(tmp_path: Path, change: Callable[[ModelProto], ModelProto], reason: str) -> None:
    (tmp_path / "outside.data").write_bytes(bytes(1 << 16))
    files = tiny_files()
    model = change(onnx.load_from_string(files["image.onnx"]))
    data = {f"{name}.onnx.data": bytes(1 << 16) for name in ("image", "text")}
    write_bundle(tmp_path / "b", tiny_manifest(), {**files, **data, "image.onnx": model.SerializeToString()})
    with pytest.raises(pm.BundleError, match=reason):
        pm.load(tmp_path / "b")


def test_a_weight_in_the_graphs_own_file_is_read_from_there(tmp_path: Path) -> None:
    files, place = tiny_files(), bytes(64)
    model = onnx.load_from_string(files["image.onnx"])
    weight = next(weight for weight in model.graph.initializer if weight.data_type == TensorProto.FLOAT and len(weight.raw_data) > 4)
    data = place + weight.raw_data
    model = outside("image.onnx.data", offset=len(place), length=len(weight.raw_data))(model)
    write_bundle(tmp_path / "b", tiny_manifest(), {**files, "image.onnx": model.SerializeToString(), "image.onnx.data": data})
    picture = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE)
    expected = pm.load(tiny_bundle(tmp_path / "c"), "cpu").embed_image(picture)
    assert np.array_equal(pm.load(tmp_path / "b", "cpu").embed_image(picture), expected)
    (tmp_path / "b" / "image.onnx.data").unlink()
    with pytest.raises(pm.BundleError, match=r"image\.onnx\.data.*missing"):
        open_session(tmp_path / "b" / "image.onnx", SessionOptions("cpu"))


def test_every_graph_of_the_embedded_bundle_passes() -> None:
    for path in sorted(DEFAULT_BUNDLE.glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        there = [weight for weight in model.graph.initializer if weight.data_location == TensorProto.EXTERNAL]
        found = weights_outside(path.read_bytes(), f"{path.name}.data")
        assert [(x.name, x.data_type, list(x.dims)) for x in found] == [(x.name, x.data_type, list(x.dims)) for x in there]
        data = path.with_name(f"{path.name}.data")
        inside = onnx.load_from_string(with_weights_inside(path.read_bytes(), data.name, data.read_bytes()))
        for weight in inside.graph.initializer:
            del weight.external_data[:]  # of no effect where data_location says that the weight is inside
            weight.ClearField("data_location")
        whole = onnx.load(path)
        for weight in whole.graph.initializer:
            weight.ClearField("data_location")
        assert inside == whole
    assert weights_outside(similarity_graph(3, 4, 2).SerializeToString(), "labels.onnx.data") == []


@pytest.mark.parametrize(
    "content", [b"\x3a", b"\x3a\x05", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x0b", b"\x80" * 1_000_000]
)
def test_what_is_no_protobuf_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="no ONNX file"):
        weights_outside(content, "x.onnx.data")


def test_a_cut_graph_is_refused_or_whole() -> None:
    content = tiny_files()["image.onnx"]
    for end in range(len(content)):
        try:
            weights_outside(content[:end], "x.onnx.data")
        except ValueError as error:
            assert "no ONNX file" in str(error)


IN_USE = """
import sys
from pathlib import Path
import numpy as np
import pmclip_deploy as pm

folder, how = Path(sys.argv[1]), sys.argv[2]
predictor, picture = pm.load(folder, sys.argv[3]), np.arange(96 * 96, dtype=np.uint16).reshape(96, 96)
before = predictor.ask(picture, "is there a fracture?", ignore_header=True).candidates, predictor.embed_image(picture).tolist()
for file in folder.iterdir():
    with file.open("r+b") as opened:
        opened.truncate(0) if how == "truncate" else opened.write(b"<" * file.stat().st_size)
assert before == (predictor.ask(picture, "is there a fracture?", ignore_header=True).candidates, predictor.embed_image(picture).tolist())
try:
    predictor.embed_text("a ct")  # of a graph that is opened when it is first needed
except pm.BundleError as error:
    assert "has changed" in str(error)
else:
    sys.exit("opened what had changed")
"""


@pytest.mark.parametrize("device", ["cpu", "openvino"])
@pytest.mark.parametrize("how", ["truncate", "overwrite"])
def test_a_bundle_that_is_overwritten_in_place_while_in_use(tmp_path: Path, how: str, device: str) -> None:
    if device == "openvino" and not find_spec("openvino"):
        pytest.skip("needs the extra `openvino`")
    shutil.copytree(DEFAULT_BUNDLE, tmp_path / "b")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", IN_USE, tmp_path / "b", how, device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_array_that_changes_before_it_is_read(tmp_path: Path) -> None:
    facets_bundle(tmp_path / "b", asked=("what plane?",))
    predictor = pm.load(tmp_path / "b", "cpu")
    content = (tmp_path / "b" / "asked.npy").read_bytes()
    (tmp_path / "b" / "asked.npy").write_bytes(content[:-4] + np.float32(-1).tobytes())
    with pytest.raises(pm.BundleError, match=r"asked\.npy has changed"):
        predictor.question_features(["what plane?"])
