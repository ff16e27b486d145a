"""A model repository of Triton Inference Server: what is written, what a check finds, and that its answers are the bundle's."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

pytest.importorskip("tritonclient", reason="needs the extra `triton`")

import pmclip_deploy as pm
from pmclip_deploy.export.triton import CONFIG, MODEL, config_from_file, repository_from_bundle
from pmclip_deploy.export.triton_check import check_repository
from pmclip_deploy.models import DEFAULT_BUNDLE, DEMO
from pmclip_deploy.triton import sha256_key, version_of
from tests.command import Result
from tests.tiny.bundle import HEADS, facets_bundle, tiny_bundle, tiny_manifest
from tests.tiny.findings import FINDINGS

PICTURES = [np.random.default_rng(seed).integers(0, 256, (40, 30), np.uint8) for seed in range(3)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the embedded model."""
    folder = tmp_path_factory.mktemp("triton") / "pmclip-lite"
    repository_from_bundle(DEFAULT_BUNDLE, folder, instances=2, threads=3, device="gpu")
    return folder


@pytest.mark.parametrize("kind", [None, *HEADS, "facets"])
def test_each_kind_of_bundle_answers_through_its_repository(kind: str | None, tmp_path: Path) -> None:
    bundle = facets_bundle(tmp_path / "bundle", FINDINGS) if kind == "facets" else tiny_bundle(tmp_path / "bundle", kind)
    repository_from_bundle(bundle, tmp_path / "repository")
    checked = check_repository(tmp_path / "repository", bundle, PICTURES)
    assert checked.of_answers == 0 and checked.of_ensemble < 1e-5
    assert (checked.answers > 0) == (kind is not None)
    assert ("pmclip_findings" in checked.repository.configs) == (kind == "facets")
    assert ("pmclip_seen" in checked.repository.configs) == (kind == "mevf")  # the others look through one graph, or none


def test_the_embedded_model_answers_as_ask(real: Path) -> None:
    checked = check_repository(real, DEFAULT_BUNDLE, [DEMO / "leg-1.dcm", DEMO / "leg-2.dcm"])
    assert checked.answers > 20 and checked.of_answers <= 1e-5 and checked.of_ensemble <= 1e-5


@pytest.mark.nightly
def test_200_pictures_are_answered_as_ask_answers_them(real: Path, shared: Path) -> None:
    images = [*sorted((shared / "fracatlas" / "images").iterdir())[:100], *sorted((shared / "vqa-med-2019" / "images").iterdir())[:100]]
    checked = check_repository(real, DEFAULT_BUNDLE, images)
    assert checked.pictures == 200 and checked.answers >= 2000 and checked.of_answers <= 1e-5 and checked.of_ensemble <= 1e-3


def test_what_a_configuration_says(real: Path) -> None:
    image, findings, ensemble = (config_from_file(real / name / CONFIG) for name in ("pmclip_image", "pmclip_findings", "pmclip"))
    manifest = pm.load().manifest
    assert list(image.version_policy.specific.versions) == [version_of(manifest)] == [1000]
    assert image.parameters[sha256_key(1000)].string_value == ensemble.parameters[sha256_key(1000)].string_value == pm.load().model.sha256
    assert (image.max_batch_size, findings.max_batch_size, ensemble.max_batch_size) == (1, 16, 1)  # the first has DynamicQuantizeLinear
    assert list(ensemble.input[0].dims) == [2, 3, 256, 256]  # a picture and its mirror image
    text = (real / "pmclip_findings" / CONFIG).read_text()
    queue = ["max_queue_delay_microseconds: 3000", "max_queue_size: 256", "timeout_action: REJECT", "default_timeout_microseconds: 2000000"]
    for said in (*queue, 'backend: "onnxruntime"', "kind: KIND_GPU", "count: 2", "zero_data: true"):
        assert re.search(rf"^ *{said}$", text, re.M), said
    assert findings.parameters["intra_op_thread_count"].string_value == "3"
    graph = real / "pmclip_findings" / "1000"
    assert (graph / MODEL).read_bytes() == (DEFAULT_BUNDLE / "findings.onnx").read_bytes()
    assert (graph / "findings.onnx.data").read_bytes() == (DEFAULT_BUNDLE / "findings.onnx.data").read_bytes()


def _config(name: str, old: str, new: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        file = folder / name / CONFIG
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return edit


def _other_sha256(folder: Path) -> None:
    file = folder / "pmclip_text" / CONFIG
    file.write_text(re.sub(r'(sha256_1"\s+value {\s+string_value: ")', r"\g<1>00", file.read_text()))


def _other_weights(folder: Path) -> None:
    model = onnx.load(str(folder / "pmclip_image/1" / MODEL))
    kernel = model.graph.initializer[-1]
    kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel) + 1, kernel.name))
    onnx.save(model, str(folder / "pmclip_image/1" / MODEL))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "misspelt": (_config("pmclip_text", "dynamic_batching", "dynamic_batchin"), r"pmclip_text/config.pbtxt: \d+:\d+ .*\"dynamic_batchin\""),
    "name": (_config("pmclip_text", '"pmclip_text"', '"pmclip_txt"'), "its name is 'pmclip_txt'"),
    "version": (_config("pmclip_text", "versions: [1]", "versions: [1, 2]"), "version_policy names 2, and there is no such folder"),
    "sha256": (_other_sha256, "has the sha256 00"),
    "input name": (_config("pmclip_text", '"tokens"', '"token"'), r"its inputs are \['token'\], and the graph's are \['tokens'\]"),
    "type": (_config("pmclip_text", "TYPE_INT64", "TYPE_INT32"), "input tokens is TYPE_INT32"),
    "dims": (_config("pmclip_text", "dims: [8]", "dims: [9]"), r"output embedding has the dimensions \[9\]"),
    "graph": (_other_weights, "model.onnx: is not the graph of the bundle"),
    "no graph": (lambda folder: (folder / "pmclip_head/1" / MODEL).unlink(), "model.onnx: missing"),
    "nobody makes": (_config("pmclip", 'value: "text_embedding"', 'value: "t"'), "text_embedding is made by no step"),
    "types": (_config("pmclip", "TYPE_INT64", "TYPE_FP32"), "tokens does not fit the input tokens of pmclip_text"),
    "circle": (_config("pmclip", 'key: "tokens"\n      value: "tokens"', 'key: "tokens"\n      value: "kind"'), "is made in a circle"),
    "twice": (_config("pmclip", 'value: "text_embedding"', 'value: "image_embedding"'), "image_embedding is made twice"),
    "output": (_config("pmclip", 'name: "probability"', 'name: "share"'), "output share is made by no step"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_check_names_what_is_broken(fault: str, bundle: Path, tmp_path: Path, command: Callable[..., Result]) -> None:
    repository_from_bundle(bundle, folder := tmp_path / "repository")
    edit, said = BROKEN[fault]
    edit(folder)
    ended = command("export", "triton-check", folder, "--bundle", bundle)
    assert ended.code == 4 and re.search(said, ended.err) and ended.err.count("\n") == 1, ended.err


def test_a_graph_whose_rows_depend_on_each_other_has_no_batch(tmp_path: Path) -> None:
    repository_from_bundle(DEFAULT_BUNDLE, tmp_path)
    _config("pmclip_image", "max_batch_size: 1", "max_batch_size: 8")(tmp_path)
    with pytest.raises(pm.BundleError, match="max_batch_size is 8, and a row of this graph depends on its batch"):
        check_repository(tmp_path, DEFAULT_BUNDLE, PICTURES)


def test_an_earlier_version_stays_and_one_line_goes_back(bundle: Path, tmp_path: Path) -> None:
    later = tiny_bundle(tmp_path / "later", version="0.2.0", logit_scale=11.0)
    for one in (bundle, later):
        repository_from_bundle(one, folder := tmp_path / "repository")
    assert sorted(path.name for path in (folder / "pmclip_head").iterdir()) == ["1", "2000", CONFIG]
    check_repository(folder, later, PICTURES)
    with pytest.raises(pm.BundleError, match=r"version_policy names \[2000\], and the bundle is version 1"):
        check_repository(folder, bundle, PICTURES)
    for file in folder.glob(f"*/{CONFIG}"):
        file.write_text(file.read_text().replace("versions: [2000]", "versions: [1]"))
    check_repository(folder, bundle, PICTURES)


def test_an_earlier_version_of_other_tensors_is_refused(bundle: Path, tmp_path: Path) -> None:
    repository_from_bundle(bundle, tmp_path / "repository")
    with pytest.raises(pm.UsageError, match="holds version 1, whose pmclip_"):
        repository_from_bundle(tiny_bundle(tmp_path / "other", "qcr", version="2.0.0"), tmp_path / "repository")


def test_a_folder_with_something_else_is_refused(bundle: Path, tmp_path: Path, command: Callable[..., Result]) -> None:
    (tmp_path / "notes.txt").write_text("keep")
    ended = command("export", "triton", bundle, "--output", tmp_path)
    assert ended.code == 4 and "so it is not overwritten" in ended.err and (tmp_path / "notes.txt").read_text() == "keep"


def test_the_commands_beside_export(bundle: Path, tmp_path: Path, command: Callable[..., Result]) -> None:
    wrote = command("export", "triton", bundle, "--output", tmp_path / "r", "--instances", 2)
    assert wrote.code == 0 and re.fullmatch(r"wrote .*/r: 5 models, version 1\n", wrote.out), wrote
    checked = command("export", "triton-check", tmp_path / "r", "--bundle", bundle)
    assert checked.code == 0 and "equal those of the bundle" in checked.out
    assert "pmclip: ensemble, version 1, max_batch_size 16\n" in checked.out
    assert command("export", "triton", bundle, "--output", tmp_path / "r", "--device", "tpu").code == 2
    assert command("export", "triton", bundle).code == 2 and command("export", "triton-check", tmp_path / "nothing").code == 4
    help = command("export", "--help").out  # as it was
    assert "[CHECKPOINT]" in help and "--precision" in help


@pytest.mark.parametrize(("version", "number"), [("0.1.0", 1000), ("1.2.3", 1002003), ("0.0.0", 1), ("2024-05", 1)])
def test_a_version_is_a_number(version: str, number: int) -> None:
    assert version_of(tiny_manifest(version=version)) == number
