"""Bundles of OpenAI's backbones, with and without MEVF's and QCR's heads, at every precision; and faults that must not pass a gate."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("open_clip")
pytest.importorskip("transformers")

from onnx import numpy_helper

from pmclip_deploy.benchmarks.outliers import plant
from pmclip_deploy.bundle.files import manifest_from_bundle, verify_bundle, write_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import MANIFEST, WORDS
from pmclip_deploy.errors import BundleError, InputError, ParityError
from pmclip_deploy.evaluation.evaluate import bundle_answerer, figures
from pmclip_deploy.evaluation.rows import Row, pictures_of
from pmclip_deploy.export import pack, recipes
from pmclip_deploy.export.gates import gate
from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint, onnx_from_modules
from pmclip_deploy.export.pack import bundle_from_checkpoint
from pmclip_deploy.export.parity import parity_of_bundle
from pmclip_deploy.export.probes import sample_pictures
from pmclip_deploy.export.recipes import without_islands
from pmclip_deploy.export.records import CALIBRATION
from pmclip_deploy.export.sensitivity import effects_of_layers
from pmclip_deploy.opening import load, session_from_bundle
from pmclip_deploy.train.heads.answering import checkpoint_answerer
from tests.tiny import clip as tiny_clip

PRECISIONS = ("fp32", "fp16", "int8")
QUESTIONS = ("is there a fracture?", "what modality is the image in?", "which plane?", "what organ is in the image?")


@pytest.fixture(scope="module", autouse=True)
def configs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("configs")
    tiny_clip.add_tiny(folder)
    yield folder
    tiny_clip.remove_tiny()


@pytest.fixture(scope="module")
def pictures(pictures: Path) -> Path:
    """With questions about them."""
    rows = [
        {"image": f"{path.stem}.png", "question": q, "answer": "yes", "answer_type": "closed" if "is" in q else "open"}
        for path in sample_pictures()
        for q in QUESTIONS
    ]
    (pictures / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pictures


@pytest.fixture(scope="module", params=["tiny", "tiny-resnet", "tiny mevf", "tiny-resnet qcr"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, _, kind = request.param.partition(" ")
    folder = tmp_path_factory.mktemp("checkpoints") / "checkpoint"
    model = tiny_clip.lively(name)
    return tiny_clip.head_checkpoint(folder, name, kind, model=model) if kind else tiny_clip.checkpoint(folder, name, model)


def exported(checkpoint: Path, output: Path, precision: str, target: str, pictures: Path, **more: Any) -> Manifest:
    more |= {"calibration_images": pictures} if precision == "int8" else {}
    return bundle_from_checkpoint(checkpoint, output, precision, target=target, **more).manifest


@pytest.mark.slow("makes 24 bundles")
@pytest.mark.parametrize("target", ["cpu", "rtx"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_bundle_passes_its_gates_and_opens(checkpoint: Path, pictures: Path, tmp_path: Path, precision: str, target: str) -> None:
    made = exported(checkpoint, tmp_path / "bundle", precision, target, pictures, data=pictures / "rows.jsonl", images=pictures)
    assert verify_bundle(tmp_path / "bundle") == made and made.precision == precision and made.target == target
    predictor = load(tmp_path / "bundle", "cpu")
    assert predictor.embed_image(pictures / "CT_small.png").shape == (32,) and predictor.embed_text("ct").shape == (32,)
    if made.head is None:
        assert set(made.graphs) == {"image", "text"} and made.parity["answers"] is None
    else:
        assert predictor.ask(pictures / "CT_small.png", QUESTIONS[0]).candidates
        assert made.parity["answers"]["n"] == len(QUESTIONS) * len(sample_pictures()) and set(made.parity["answers"]["by"]["type"])
    layers = [x for graph in made.graphs.values() for x in graph.float_layers]
    assert precision != "fp32" or not layers
    if precision == "int8":
        assert any(graph.precision == "int8" for graph in made.graphs.values())


def test_int8_is_small(tmp_path: Path, pictures: Path) -> None:
    folder = tiny_clip.checkpoint(tmp_path / "checkpoint", "tiny", tiny_clip.lively("tiny"))
    sizes = {}
    for precision in PRECISIONS:
        made = exported(folder, tmp_path / precision, precision, "cpu", pictures)
        sizes[precision] = sum(file.bytes for name, file in made.files.items() if name.endswith(".data"))
    assert sizes["fp16"] < 0.51 * sizes["fp32"] and sizes["int8"] < 0.3 * sizes["fp32"]


@pytest.mark.parametrize("kind", ["mevf", "qcr"])
def test_a_bundle_answers_as_its_checkpoint_does(kind: str, tmp_path: Path, pictures: Path) -> None:
    folder = tiny_clip.head_checkpoint(tmp_path / "checkpoint", "tiny", kind, model=tiny_clip.lively("tiny"))
    meta = json.loads((folder / "checkpoint.json").read_text())
    meta |= {"trained_on": [], "provenance": {"head": {"seed": 1}}}
    (folder / "checkpoint.json").write_text(json.dumps(meta))
    exported(folder, tmp_path / "bundle", "fp32", "cpu", pictures)
    rows = [Row(path.name, q, "yes") for path in sorted(pictures.glob("*.png")) for q in QUESTIONS]
    picture = pictures_of(rows)[1]
    of_checkpoint = checkpoint_answerer(folder, rows, pictures)[0](picture)
    of_bundle = bundle_answerer(load(tmp_path / "bundle"), rows, pictures)(picture)
    assert list(of_bundle.answers) == list(of_checkpoint.answers) and len(set(of_bundle.answers)) > 1
    np.testing.assert_allclose(of_bundle.probability, of_checkpoint.probability, atol=1e-4)
    assert of_bundle.kinds == of_checkpoint.kinds
    document = figures(rows, lambda x: of_bundle, {})[0]
    assert 0 <= document["accuracy"] <= 1


# What an export keeps, and what it takes from before.


@pytest.mark.slow("ranks every layer")
def test_layers_stay_in_float_until_the_gates_pass_and_stay_so(tmp_path: Path, pictures: Path) -> None:
    folder = tiny_clip.checkpoint(tmp_path / "checkpoint", "tiny-resnet", tiny_clip.lively("tiny-resnet"))
    strict = {"int8": {"cosine_mean": 0.9999}}
    made = bundle_from_checkpoint(folder, tmp_path / "a", "int8", calibration_images=pictures, gates=strict)
    kept = [f"{name}/{layer}" for name, graph in made.manifest.graphs.items() for layer in graph.float_layers]
    ranked = [e.layer for e in made.effects]
    graphs = onnx_from_modules(modules_from_checkpoint(folder))
    steps = [set(without_islands(graphs, ranked[: 2**i])) for i in range(len(ranked).bit_length())]
    assert 0 < len(kept) <= len(ranked) and set(kept) in [*steps, set(ranked)]  # the most harmful ones, and what lies between
    assert made.effects == sorted(made.effects, key=lambda e: (-e.effect, e.layer)) and made.effects[0].effect > made.effects[-1].effect
    again = bundle_from_checkpoint(folder, tmp_path / "b", "int8", gates=strict)
    assert again.effects == []  # known from before
    for name in made.manifest.files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()


def test_layers_that_no_answer_reads_are_ranked_last_and_not_run(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[str] = []

    def effects(predictor_of: Any, sessions: Any, layers: Any, *others: Any, **more: Any) -> Any:
        run.extend(layers)
        return effects_of_layers(predictor_of, sessions, layers, *others, **more)

    monkeypatch.setattr(recipes, "effects_of_layers", effects)
    folder = tiny_clip.head_checkpoint(tmp_path / "checkpoint", "tiny", "mevf", model=tiny_clip.lively("tiny"))
    made = bundle_from_checkpoint(folder, tmp_path / "bundle", "int8", calibration_images=pictures, ranked=True)
    of_text = [e for e in made.effects if e.layer.startswith("text/")]
    assert of_text and made.effects[-len(of_text) :] == of_text and {e.effect for e in of_text} == {0.0}
    assert all(e.effect > 0 for e in made.effects[: -len(of_text)])
    assert sorted(run) == sorted(e.layer for e in made.effects[: -len(of_text)])


def test_short_runs_between_two_convolutions_in_float_stay_in_float_too() -> None:
    nodes = [onnx.helper.make_node("Conv", [f"c{i}", "w"], [f"c{i + 1}"]) for i in range(12)]
    graphs = {"image": onnx.helper.make_model(onnx.helper.make_graph(nodes, "image", [], []))}
    name = "image/c{}".format
    assert set(without_islands(graphs, [name(4), name(7), name(12)])) == {name(i) for i in (1, 2, 3, 4, 5, 6, 7, 12)}
    assert without_islands(graphs, []) == []


def test_planted_outliers_do_not_change_what_a_tower_computes() -> None:
    tower, x = tiny_clip.lively("tiny").visual, tiny_clip.pictures(32, 3)
    with torch.inference_mode():
        before, largest = tower(x), tower.transformer.resblocks[0].ln_1.weight.abs().max()
        plant(tower)
        torch.testing.assert_close(tower(x), before, rtol=1e-3, atol=1e-4)
    assert tower.transformer.resblocks[0].ln_1.weight.abs().max() > 10 * largest


@pytest.mark.parametrize(("name", "strict", "unpacked"), [
    ("tiny", False, {"image", "text"}), ("tiny-resnet", False, {"text"}), ("tiny", True, set()),
])  # fmt: skip
def test_a_process_that_asks_once_gets_the_same_numbers(
    name: str, strict: bool, unpacked: set[str], tmp_path: Path, pictures: Path
) -> None:
    """Weights are left unpacked only where all of a graph is integer products; ``strict`` gates keep layers of both towers in float."""
    folder = tiny_clip.checkpoint(tmp_path / "checkpoint", name, tiny_clip.lively(name))
    gates = {"int8": {"cosine_mean": 0.99997 if strict else 0.99}}
    made = bundle_from_checkpoint(folder, tmp_path / "bundle", "int8", calibration_images=pictures, gates=gates)
    assert all(bool(graph.float_layers) == strict for graph in made.manifest.graphs.values())
    for graph in ("image", "text"):
        session = session_from_bundle(tmp_path / "bundle", made.manifest, graph, single_use=True)
        options = session._session.get_session_options()
        assert options.get_session_config_entry("session.disable_prepacking") == str(int(graph in unpacked))
    packed, once = (load(tmp_path / "bundle", single_use=single_use) for single_use in (False, True))
    picture = sorted(pictures.glob("*.png"))[0]
    np.testing.assert_array_equal(packed.embed_image(picture), once.embed_image(picture))
    np.testing.assert_array_equal(packed.embed_texts(QUESTIONS), once.embed_texts(QUESTIONS))


def test_one_calibration_serves_every_target(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_clip.checkpoint(tmp_path / "checkpoint", "tiny", tiny_clip.lively("tiny"))
    exported(folder, tmp_path / "cpu", "int8", "cpu", pictures)
    table = json.loads(gzip.decompress((folder / CALIBRATION).read_bytes()))
    assert set(table["kept"]) == {"cpu"} and len(table["images"]) == len(list(pictures.glob("*.png")))
    monkeypatch.setattr("pmclip_deploy.export.recipes.measured_from_feeds", lambda *of: pytest.fail("measured again"))
    exported(folder, tmp_path / "rtx", "int8", "rtx", pictures)
    after = json.loads(gzip.decompress((folder / CALIBRATION).read_bytes()))
    assert set(after["kept"]) == {"cpu", "rtx"} and after["tensors"] == table["tensors"]


def test_answers_are_not_measured_twice(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_clip.head_checkpoint(tmp_path / "checkpoint", "tiny", "mevf", model=tiny_clip.lively("tiny"))
    data = {"data": pictures / "rows.jsonl", "images": pictures}
    first = exported(folder, tmp_path / "a", "fp32", "cpu", pictures, **data)
    monkeypatch.setattr("pmclip_deploy.export.reference.outputs_for", lambda *of: pytest.fail("asked again"))
    assert exported(folder, tmp_path / "b", "fp32", "cpu", pictures, **data).parity == first.parity
    assert exported(folder, tmp_path / "c", "fp32", "cpu", pictures).parity == first.parity


@pytest.mark.nightly  # ranks every layer
def test_the_report_is_written(tmp_path: Path, pictures: Path, command: Any) -> None:
    folder = tiny_clip.checkpoint(tmp_path / "checkpoint", "tiny", tiny_clip.lively("tiny"))
    options = ["--calibration-images", pictures, "--report", tmp_path / "report.html", "--rank-layers", "--json"]
    code, out, err = command("export", folder, "--output", tmp_path / "out", *options)
    assert code == 0, err
    document, page = json.loads(out), (tmp_path / "report.html").read_text()
    assert document["parity"]["answers"] is None and document["engines"] == {}
    assert "layer.0.up" in page and "<svg" in page and "passed" in page


def test_a_report_without_the_ranking_quantises_no_layer_alone(
    tmp_path: Path, pictures: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "effects_of_layers", lambda *of, **more: pytest.fail("ranked unasked"))
    folder = tiny_clip.checkpoint(tmp_path / "checkpoint", "tiny", tiny_clip.lively("tiny"))
    options = ["--calibration-images", pictures, "--report", tmp_path / "report.html"]
    code, _, err = command("export", folder, "--output", tmp_path / "out", *options)
    assert code == 0 and "passed" in (tmp_path / "report.html").read_text()
    said = [line.partition(" (")[0] for line in err.splitlines()]  # a line a stage, since this is no terminal
    wanted = ["Reading the checkpoint", "Writing its graphs in fp32", "Calibrating the image tower", "Comparing with fp32"]
    wanted += ["Measuring the speed"]
    assert [line for line in said if line in wanted] == wanted
    for more in (["--rank-layers"], ["--precision", "fp16", "--rank-layers", "--report", tmp_path / "r.html"]):
        code, _, err = command("export", folder, "--output", tmp_path / "out", *more)
        assert code == 2 and "--rank-layers is for the --report of an INT8 bundle" in err


def test_what_is_wrong_at_the_start_is_said_before_any_work(
    tmp_path: Path, pictures: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_clip.checkpoint(tmp_path / "checkpoint", "tiny", tiny_clip.lively("tiny"))
    (tmp_path / "none").mkdir()
    (tmp_path / "q.jsonl").write_text('{"image": "no.png", "question": "q", "answer": "a"}')
    monkeypatch.setattr(pack, "onnx_from_modules", lambda *of, **more: pytest.fail("worked before it looked"))
    for code, said, *options in (
        (2, "has no calibration.json.gz for these weights; pass --calibration-images FOLDER"),
        (3, "none: no images (.jpg, .png, .dcm) to calibrate on", "--calibration-images", tmp_path / "none"),
        (2, "has no findings to calibrate", "--calibration-findings", pictures),
        (3, "no.png is missing", "--calibration-images", pictures, "--data", tmp_path / "q.jsonl", "--images", pictures),
        (2, "r.html: the report cannot be written", "--calibration-images", pictures, "--report", tmp_path / "nowhere" / "r.html"),
    ):
        made = command("export", folder, "--output", tmp_path / "out", *options)
        assert made.code == code and said in made.err


def test_a_finished_calibration_outlives_ctrl_c(tmp_path: Path, pictures: Path) -> None:
    folder = tiny_clip.checkpoint(tmp_path / "checkpoint", "tiny", tiny_clip.lively("tiny"))

    def cut_off(items: Any, what: str) -> Any:
        if what.startswith("Comparing"):
            raise KeyboardInterrupt
        return items

    with pytest.raises(KeyboardInterrupt):
        bundle_from_checkpoint(folder, tmp_path / "cut", "int8", calibration_images=pictures, progress=cut_off)
    assert not (tmp_path / "cut").exists() and (folder / "calibration.json.gz").is_file()

    def stages(items: Any, what: str) -> Any:
        assert not what.startswith("Calibrating")
        return items

    made = bundle_from_checkpoint(folder, tmp_path / "again", "int8", progress=stages)
    other = tiny_clip.checkpoint(tmp_path / "other", "tiny", tiny_clip.lively("tiny"))
    whole = bundle_from_checkpoint(other, tmp_path / "whole", "int8", calibration_images=pictures)
    assert made.manifest.files == whole.manifest.files
    assert (folder / "calibration.json.gz").read_bytes() == (other / "calibration.json.gz").read_bytes()


# Faults.


class Fault:
    """A bundle of one tiny model whose files and manifest may be changed before it is written."""

    def __init__(self, checkpoint: Path, bundle: Path) -> None:
        self.modules, self.bundle = modules_from_checkpoint(checkpoint), bundle
        self.manifest = manifest_from_bundle(bundle)
        self.files: dict[str, bytes | Path] = {name: (bundle / name).read_bytes() for name in self.manifest.files}

    def graph(self, name: str) -> Any:
        return onnx.load(self.bundle / f"{name}.onnx")

    def put(self, name: str, model: Any) -> None:
        self.files[f"{name}.onnx"] = model.SerializeToString()
        self.files.pop(f"{name}.onnx.data", None)

    def measured(self, output: Path) -> None:
        write_bundle(output, self.manifest, self.files)
        precision, parity = parity_of_bundle(output, self.modules)
        gate(precision, parity)


def wrong_mean(fault: Fault) -> None:
    p = fault.manifest.preprocess
    fault.manifest = replace(fault.manifest, preprocess=replace(p, mean=(p.mean[0], p.mean[1], p.mean[2] + 0.05)))


def other_resize(fault: Fault) -> None:
    fault.manifest = replace(fault.manifest, preprocess=replace(fault.manifest.preprocess, resize="squash"))


def swapped_channels(fault: Fault) -> None:
    model = fault.graph("image")
    model.graph.node.insert(0, onnx.helper.make_node("Gather", ["pixels", "bgr"], ["pixels.bgr"], axis=1))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "bgr"))
    for node in list(model.graph.node)[1:]:
        node.input[:] = ["pixels.bgr" if x == "pixels" else x for x in node.input]
    fault.put("image", model)


def broken_scale(fault: Fault) -> None:
    """Of the activations between two layers, one of a thirtieth of the right size: most of them are clipped."""
    model = fault.graph("image")
    scales = [n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    for weight in model.graph.initializer:
        if weight.name == scales[len(scales) // 2]:
            weight.CopyFrom(numpy_helper.from_array(np.array(numpy_helper.to_array(weight) / 30), weight.name))
    fault.put("image", model)


def truncated_vocabulary(fault: Fault) -> None:
    data = json.loads(fault.files["tokenizer.json"])  # type: ignore[arg-type]
    data["model"]["merges"] = data["model"]["merges"][:2000]
    fault.files["tokenizer.json"] = json.dumps(data).encode()


def words_in_another_order(fault: Fault) -> None:
    data = json.loads(fault.files[WORDS])  # type: ignore[arg-type]
    vocabulary = data["model"]["vocab"]
    vocabulary["fracture"], vocabulary["modality"] = vocabulary["modality"], vocabulary["fracture"]
    fault.files[WORDS] = json.dumps(data).encode()


def no_numbers(fault: Fault) -> None:
    model = fault.graph("head")
    next(n for n in model.graph.node if "answer" in n.output).output[0] = "answer.finite"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(np.inf), "infinite"))
    model.graph.node.append(onnx.helper.make_node("Add", ["answer.finite", "infinite"], ["answer"]))
    fault.put("head", model)


def answers_swapped(fault: Fault) -> None:
    model = fault.graph("head")
    next(n for n in model.graph.node if "answer" in n.output).output[0] = "answer.right"
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 0, *range(2, 7)]), "order"))
    model.graph.node.append(onnx.helper.make_node("Gather", ["answer.right", "order"], ["answer"], axis=1))
    fault.put("head", model)


def row_in_zeros(graph: str, table: str, row: int) -> Callable[[Fault], None]:
    def plant(fault: Fault) -> None:
        model = fault.graph(graph)
        for weight in model.graph.initializer:
            if weight.name == table:
                rows = numpy_helper.to_array(weight).copy()
                rows[row] = 0
                weight.CopyFrom(numpy_helper.from_array(rows, table))
        fault.put(graph, model)

    return plant


def another_case(fault: Fault) -> None:
    data = json.loads(fault.files["tokenizer.json"])  # type: ignore[arg-type]
    parts = data["normalizer"]["normalizers"]
    data["normalizer"]["normalizers"] = [part for part in parts if part["type"] != "Lowercase"]
    assert len(parts) > len(data["normalizer"]["normalizers"])
    fault.files["tokenizer.json"] = json.dumps(data).encode()


def other_scale(fault: Fault) -> None:
    fault.manifest = replace(fault.manifest, logit_scale=10 * fault.manifest.logit_scale)


def labels_swapped(fault: Fault) -> None:
    a, b, *others = fault.manifest.labels
    fault.manifest = replace(fault.manifest, labels=(b, a, *others))


LABELS = ("ct", "mri", "plain film")
position_lost, word_lost = row_in_zeros("text", "places.weight", 60), row_in_zeros("text", "words.weight", 40000)
own_word_lost = row_in_zeros("head", "question.words.weight", 5)


@pytest.mark.parametrize(
    ("fault", "precision", "said"),
    [
        (answers_swapped, "fp32", "head/answers to answer: a column is off"),
        (own_word_lost, "fp32", "words/head.question.words: a row is off"),
        (word_lost, "fp32", "words/text.words: a row is off"),
        (position_lost, "fp32", "words/text.embeddings: a row is off"),
        (another_case, "fp32", "tokenizer.json of the bundle"),
        (other_scale, "fp32", "logit_scale of the bundle"),
        (labels_swapped, "fp32", "kept/labels.npy: a row is off"),
        (wrong_mean, "fp32", "pixels differ by up to"),
        (other_resize, "fp32", "pixels differ"),
        (swapped_channels, "fp32", "image cosine"),
        (swapped_channels, "int8", "image cosine_mean"),
        (broken_scale, "int8", "image cosine_mean"),
        (truncated_vocabulary, "fp32", "tokens are equal in"),
        (words_in_another_order, "fp32", "words are equal in"),
        (no_numbers, "fp32", "computes NaN or infinity"),
    ],
)
def test_a_planted_fault_fails_the_gate(fault: Callable[[Fault], None], precision: str, said: str, tmp_path: Path, pictures: Path) -> None:
    name = "tiny-resnet" if precision == "int8" else "tiny"
    model = tiny_clip.lively(name)
    folder = tmp_path / "checkpoint"
    if fault in (words_in_another_order, no_numbers, answers_swapped, own_word_lost):
        tiny_clip.head_checkpoint(folder, name, "mevf", model=model)
    else:
        tiny_clip.checkpoint(folder, name, model)
    exported(folder, tmp_path / "bundle", precision, "cpu", pictures, labels=LABELS if fault is labels_swapped else ())
    planted = Fault(folder, tmp_path / "bundle")
    planted.measured(tmp_path / "as it was")
    fault(planted)
    with pytest.raises(ParityError, match=said) as caught:
        planted.measured(tmp_path / "faulty")
    assert caught.value.exit_code == 5


def test_an_overflow_of_fp16_fails_the_gate_unless_the_ranges_show_it(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer a hundred thousand times as large, and the next as much smaller: the same function in fp32."""
    model = tiny_clip.lively("tiny")
    with torch.no_grad():
        mlp = model.visual.transformer.resblocks[0].attn.out_proj
        model.visual.transformer.resblocks[0].attn.in_proj_weight[128:].mul_(3e4)
        model.visual.transformer.resblocks[0].attn.in_proj_bias[128:].mul_(3e4)
        mlp.weight.div_(3e4)
    folder = tiny_clip.checkpoint(tmp_path / "checkpoint", "tiny", model)
    made = exported(folder, tmp_path / "seen", "fp16", "rtx", pictures)
    assert made.graphs["image"].float_layers
    plain = recipes.half_from_onnx
    monkeypatch.setattr(recipes, "half_from_onnx", lambda model, ranges: plain(model, None))
    with pytest.raises(ParityError, match="image cosine"):
        exported(folder, tmp_path / "unseen", "fp16", "rtx", pictures)
    assert not (tmp_path / "unseen").exists()


def test_another_models_bundle_is_named_so(tmp_path: Path, pictures: Path) -> None:
    a = tiny_clip.checkpoint(tmp_path / "a", "tiny", tiny_clip.lively("tiny"))
    b = tiny_clip.checkpoint(tmp_path / "b", "tiny-resnet", tiny_clip.lively("tiny-resnet"))
    exported(a, tmp_path / "bundle", "fp32", "cpu", pictures)
    with pytest.raises(BundleError, match="is not of checkpoint"):
        parity_of_bundle(tmp_path / "bundle", modules_from_checkpoint(b))


def test_nothing_to_calibrate_on_is_one_line(tmp_path: Path) -> None:
    folder = tiny_clip.checkpoint(tmp_path / "checkpoint", "tiny")
    with pytest.raises(InputError, match="no images"):
        bundle_from_checkpoint(folder, tmp_path / "out", "int8", calibration_images=tmp_path)
    assert not (tmp_path / "out").exists()
