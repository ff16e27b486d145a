"""The predictor: the decision's rules one by one, and the flow from a picture to an answer."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import ANSWERS, DIM, KINDS, OUTSIDE, tiny_bundle, tiny_files, tiny_manifest

import pmclip_deploy as pm
from pmclip_deploy.bundle import MANIFEST, write_bundle
from pmclip_deploy.pixels import picture_from_array
from pmclip_deploy.predictor import NEVER_SURE, NO_RADIOGRAPH, UNTRAINED, Heads, decision_from_heads

FRACTURE = "is there a fracture?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> pm.Predictor:
    return pm.load(bundle)


def picture(brightness: int = 200, contrast: int = 50) -> Any:
    noise = np.random.default_rng(0).integers(-contrast, contrast + 1, (40, 30))
    return np.clip(brightness + noise, 0, 255).astype(np.uint8)


def heads(answer: list[float], kind: list[float], radiograph: float = 1.0) -> Heads:
    return Heads(*(np.array([x], np.float32) for x in (answer, kind, radiograph)))


# --- the rules, on made-up logits ------------------------------------------------------------------------------------------------

PLANE, FRACTURES, NOWHERE = [9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]


def test_a_sure_answer() -> None:
    d = decision_from_heads(tiny_manifest(), heads([9, 9, 9, 0, 2], FRACTURES), 0)
    assert d.reason is None and [c.answer for c in d.candidates] == ["no", "yes"]
    assert d.probability == pytest.approx(1 / (1 + np.exp(-2)))
    assert sum(c.probability for c in d.candidates) == pytest.approx(1)


def test_answers_of_other_kinds_never_show() -> None:
    d = decision_from_heads(tiny_manifest(), heads([0, 1, 2, 99, 99], PLANE), 0)
    assert [c.answer for c in d.candidates] == ["sagittal", "coronal", "axial"]


def test_the_temperature_flattens() -> None:
    hot = tiny_manifest(kinds=(KINDS[0], replace(KINDS[1], temperature=2.0), KINDS[2]))
    assert decision_from_heads(hot, heads([0, 0, 0, 4, 0], FRACTURES), 0).probability == pytest.approx(1 / (1 + np.exp(-2)))


def test_rule_1_a_kind_with_a_reason_comes_first_and_offers_nothing() -> None:
    d = decision_from_heads(tiny_manifest(), heads([9, 0, 0, 0, 0], NOWHERE, radiograph=-9), 0)
    assert (d.rule, d.reason, d.candidates) == ("kind", OUTSIDE, ())
    assert d.probability == pytest.approx(1, abs=1e-3)


def test_rule_1_an_unsure_kind_abstains_but_offers_candidates() -> None:
    d = decision_from_heads(tiny_manifest(), heads([9, 0, 0, 0, 0], [0.1, 0, 0], radiograph=-9), 0)
    assert (d.rule, d.reason) == ("question", UNTRAINED) and d.candidates[0].answer == "axial"


def test_rule_3_no_radiograph_comes_before_the_confidence() -> None:
    d = decision_from_heads(tiny_manifest(), heads([0, 0, 0, 0, 0], FRACTURES, radiograph=-0.1), 0)
    assert (d.rule, d.reason) == ("radiograph", NO_RADIOGRAPH)


def test_rule_4_a_low_confidence_says_both_numbers() -> None:
    d = decision_from_heads(tiny_manifest(), heads([0, 0, 0, 0.2, 0], FRACTURES), 0)
    assert d.rule == "confidence" and d.reason == "the confidence 0.55 is under the bundle's threshold 0.60"


def test_a_threshold_of_one_is_never_reached() -> None:
    """A kind with a single answer has probability 1 and is silenced all the same."""
    kinds = tuple(replace(k, threshold=1.0, answers=k.answers[:1]) if k.reason is None else k for k in tiny_manifest().kinds)
    d = decision_from_heads(tiny_manifest(kinds=kinds), heads([0, 0, 0, 9, 0], FRACTURES), 0)
    assert d.probability == 1.0 and d.reason == NEVER_SURE


def test_a_note_of_the_kind_comes_with_the_answer(tmp_path: Path) -> None:
    kinds = tuple(replace(k, note="at even odds") for k in tiny_manifest().kinds)
    asked = pm.load(tiny_bundle(tmp_path / "bundle", kinds=kinds))
    assert asked.ask(picture(), FRACTURE).to_json()["note"] == "at even odds"
    assert asked.ask(picture(), "asdf").note is None


def test_huge_logits_stay_finite() -> None:
    d = decision_from_heads(tiny_manifest(), heads([0, 0, 0, 3e38, -3e38], [3e38, 3.1e38, 0]), 0)
    assert d.probability == 1.0


# --- the flow ------------------------------------------------------------------------------------------------------------------


def test_an_answer(predictor: pm.Predictor) -> None:
    answer = predictor.ask(picture(), FRACTURE)
    assert (answer.answer, answer.abstained, answer.reason, answer.question) == ("yes", False, None, FRACTURE)
    assert answer.probability == answer.candidates[0].probability > 0.6
    assert answer.image.format == "array" and (answer.image.rows, answer.image.columns) == (40, 30)
    assert (answer.model.bundle, answer.model.backend, answer.model.device) == ("tiny", "onnxruntime", "cpu")
    assert set(answer.timings_ms) == {"read", "preprocess", "encode", "answer", "total"}
    assert predictor.ask(picture(50), FRACTURE).answer == "no"


def test_abstentions(predictor: pm.Predictor) -> None:
    assert predictor.ask(picture(), "asdf").reason == OUTSIDE
    assert predictor.ask(picture(contrast=0), FRACTURE).reason == NO_RADIOGRAPH
    unsure = predictor.ask(picture(128), FRACTURE)
    assert unsure.answer is None and unsure.abstained and "under the bundle's threshold" in str(unsure.reason) and unsure.candidates


def test_every_form_of_the_same_picture_gives_the_same_answer(predictor: pm.Predictor, tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "p.png")
    forms = [picture(), picture_from_array(picture()), tmp_path / "p.png", str(tmp_path / "p.png")]
    assert len({predictor.ask(form, FRACTURE).probability for form in forms}) == 1


def test_a_dataset_and_its_file_give_the_same_answer(predictor: pm.Predictor) -> None:
    from pydicom import dcmread
    from pydicom.data import get_testdata_file

    path = str(get_testdata_file("CT_small.dcm"))
    one, other = predictor.ask(path, FRACTURE), predictor.ask(dcmread(path), FRACTURE)
    assert one.candidates == other.candidates and one.image.modality == "CT"


def test_many_questions_equal_one_by_one(predictor: pm.Predictor) -> None:
    questions = [FRACTURE, "which plane?", "asdf", "is there a"]
    together = predictor.ask_many(picture(), questions)
    alone = [predictor.ask(picture(), question) for question in questions]
    assert [(a.answer, a.probability) for a in together] == [(a.answer, a.probability) for a in alone]


def test_top_cuts_the_candidates(predictor: pm.Predictor) -> None:
    assert len(predictor.ask(picture(), "plane", top=2).candidates) == 2


def test_embeddings(predictor: pm.Predictor) -> None:
    assert predictor.embed_image(picture()).shape == (DIM,)
    assert predictor.embed_text(FRACTURE)[1] == 9
    assert not np.array_equal(predictor.embed_text("plane"), predictor.embed_text("fracture"))


def test_several_threads_get_the_same_answers(predictor: pm.Predictor) -> None:
    pictures = [picture(b) for b in range(60, 220, 10)]
    expected = [predictor.ask(p, FRACTURE).probability for p in pictures]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda p: predictor.ask(p, FRACTURE).probability, pictures)) == expected


@pytest.mark.parametrize("question", ["", "  \n", "\ud800"])
def test_a_question_that_is_none(predictor: pm.Predictor, question: str) -> None:
    with pytest.raises(pm.UsageError):
        predictor.ask(picture(), question)


def test_what_is_no_image(predictor: pm.Predictor) -> None:
    for image in (None, 3, [[1, 2], [3, 4]]):
        with pytest.raises(pm.UsageError, match="an image is"):
            predictor.ask(image, FRACTURE)  # type: ignore[arg-type]
    with pytest.raises(pm.UsageError, match="pass a list"):
        predictor.ask_many(picture(), FRACTURE)
    with pytest.raises(pm.UsageError, match="one or more questions"):
        predictor.ask_many(picture(), [])


def test_answers_are_json(predictor: pm.Predictor) -> None:
    document = json.loads(json.dumps(predictor.ask(picture(), FRACTURE).to_json(), allow_nan=False))
    assert list(document) == [
        "schema", "question", "answer", "probability", "abstained", "reason", "candidates", "image", "model", "timings_ms", "note",
    ]  # fmt: skip


# --- loading -------------------------------------------------------------------------------------------------------------------


def test_a_changed_byte_is_refused_on_load(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    with (tmp_path / "b" / "head.onnx").open("r+b") as file:
        file.seek(100)
        file.write(bytes([file.read(1)[0] ^ 1]))
    with pytest.raises(pm.BundleError, match=r"head\.onnx has changed"):
        pm.load(tmp_path / "b")


def broken(tmp_path: Path, changes: dict[str, bytes] | None = None, **manifest: Any) -> Path:
    write_bundle(tmp_path / "b", tiny_manifest(**manifest), {**tiny_files(), **(changes or {})})
    return tmp_path / "b"


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    for name in ("image.onnx", "tokenizer.json"):
        with pytest.raises(pm.BundleError, match=name) as caught:
            pm.load(broken(tmp_path, {name: b"\x00 not what it says\n"}))
        assert "\n" not in str(caught.value)


def test_a_graph_with_other_inputs(tmp_path: Path) -> None:
    with pytest.raises(pm.BundleError, match=r"takes .*tokens.* not .*pixels"):
        pm.load(broken(tmp_path, {"image.onnx": tiny_files()["text.onnx"]}))


def test_a_head_that_does_not_fit_its_manifest(tmp_path: Path) -> None:
    predictor = pm.load(broken(tmp_path, answers=(*ANSWERS, "one more")))
    with pytest.raises(pm.BundleError, match="does not fit"):
        predictor.ask(picture(), FRACTURE)


def test_a_size_that_does_not_fit_the_graph(tmp_path: Path) -> None:
    predictor = pm.load(broken(tmp_path, preprocess=replace(tiny_manifest().preprocess, size=48)))
    with pytest.raises(pm.BundleError, match="cannot run"):
        predictor.ask(picture(), FRACTURE)


def test_a_head_that_computes_no_numbers(predictor: pm.Predictor) -> None:
    nan = np.full((1, DIM), np.nan, np.float32)
    with pytest.raises(pm.BundleError, match="no numbers"):
        predictor.heads(nan, nan)


def test_devices(bundle: Path) -> None:
    import onnxruntime

    assert pm.load(bundle, device="cpu").model.device == "cpu"
    with pytest.raises(pm.UsageError, match="unknown device"):
        pm.load(bundle, device="tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(pm.DeviceError, match=r"has no CUDA here \(it has .*CPUExecutionProvider.*pip uninstall -y onnxruntime "):
            pm.load(bundle, device="cuda")


def test_the_model_names_its_manifest(predictor: pm.Predictor, bundle: Path) -> None:
    from hashlib import sha256

    assert predictor.model.sha256 == sha256((bundle / MANIFEST).read_bytes()).hexdigest()
