"""The predictor: the decision's rules one by one, and the flow from a picture to an answer."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pmclip_deploy as pm
from pmclip_deploy.bundle.contract import CONTRACT, contract_of
from pmclip_deploy.bundle.files import manifest_from_bundle, write_bundle
from pmclip_deploy.bundle.names import MANIFEST
from pmclip_deploy.bundle.types import Engine, Graph
from pmclip_deploy.decision.evidence import NO_RADIOGRAPH, OUTSIDE
from pmclip_deploy.decision.heads import NEVER_SURE, HeadLogits, decision_from_heads, sigmoid
from pmclip_deploy.decision.needs import graphs_of_ask
from pmclip_deploy.imaging.preprocess import grey_from_pixels
from pmclip_deploy.imaging.raster import picture_from_array
from pmclip_deploy.opening import LazyMap, session_from_bundle
from pmclip_deploy.predictor import ROWS
from tests.command import Result
from tests.tiny.bundle import ANSWERS, DIM, HEADS, KINDS, READS, tiny_bundle, tiny_files, tiny_manifest

FRACTURE = "is there a fracture?"
WORDS_HEADS = [name for name, head in HEADS.items() if head.words]


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> pm.Predictor:
    return pm.load(bundle)


def picture(brightness: int = 200, contrast: int = 50) -> Any:
    noise = np.random.default_rng(0).integers(-contrast, contrast + 1, (40, 30))
    return np.clip(brightness + noise, 0, 255).astype(np.uint8)


def heads(answer: list[float], kind: list[float], radiograph: float = 1.0) -> HeadLogits:
    return HeadLogits(*(np.array([x], np.float32) for x in (answer, kind, radiograph)))


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
    assert (d.rule, d.reason) == ("question", OUTSIDE) and d.candidates[0].answer == "axial"


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


def test_independent_answers_have_a_probability_each() -> None:
    kinds = (replace(KINDS[0], independent=True, temperature=2.0, threshold=0.6), *KINDS[1:])
    d = decision_from_heads(tiny_manifest(kinds=kinds), heads([-2, 2, 1, 9, 9], PLANE), 0)
    assert [c.answer for c in d.candidates] == ["coronal", "sagittal", "axial"] and d.reason is None
    assert [c.probability for c in d.candidates] == pytest.approx([1 / (1 + np.exp(-x / 2)) for x in (2, 1, -2)])
    unsure = decision_from_heads(tiny_manifest(kinds=kinds), heads([-2, 0.5, -9, 9, 9], PLANE), 0)
    assert unsure.rule == "confidence" and unsure.reason == "the confidence 0.56 is under the bundle's threshold 0.60"


def test_independent_answers_near_one_keep_their_order() -> None:
    kinds = (replace(KINDS[0], independent=True), *KINDS[1:])
    with np.errstate(all="raise", under="ignore"):
        d = decision_from_heads(tiny_manifest(kinds=kinds), heads([40, 3e38, 50, 0, 0], PLANE), 0)
    assert [c.answer for c in d.candidates] == ["coronal", "sagittal", "axial"] and d.candidates[1].probability == 1.0
    assert sigmoid(np.array([-3e38, -1e3, 0])).tolist() == [0, 0, 0.5]


def test_without_a_radiograph_output_no_picture_is_turned_away() -> None:
    said = replace(heads([9, 9, 9, 0, 2], FRACTURES), radiograph=None)
    strict = replace(tiny_manifest().abstention, radiograph_threshold=1e3)
    assert decision_from_heads(tiny_manifest(abstention=strict), said, 0).reason is None


def test_a_question_without_a_known_word_abstains_and_offers_candidates() -> None:
    said = replace(heads([9, 9, 9, 0, 20], FRACTURES), radiograph=None, known=np.array([False]))
    d = decision_from_heads(tiny_manifest(), said, 0)
    assert (d.rule, d.reason) == ("question", OUTSIDE) and d.candidates[0].answer == "no"
    assert decision_from_heads(tiny_manifest(), replace(said, known=np.array([True])), 0).reason is None


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
        "source", "understood_as", "worth",
    ]  # fmt: skip


# --- other heads, and none -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pm.Predictor]:
    folder = tmp_path_factory.mktemp("heads")
    return {name: pm.load(tiny_bundle(folder / name, name)) for name in WORDS_HEADS}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> pm.Predictor:
    return pm.load(tiny_bundle(tmp_path_factory.mktemp("towers") / "bundle", None))


def grey(side: int, brightness: int = 200) -> float:
    return float(grey_from_pixels(picture(brightness), side).mean())


def test_contracts() -> None:
    towers = {name: CONTRACT[name] for name in ("image", "text")}
    words = {**towers, "head": (("image", "tokens"), ("answer", "kind"))}
    assert contract_of(tiny_manifest()) == CONTRACT and contract_of(tiny_manifest(None)) == towers
    assert contract_of(tiny_manifest("blind")) == words
    assert contract_of(tiny_manifest("mevf")) == {**words, "features": (("autoencoder", "maml"), ("features",))}
    detailed = replace(tiny_manifest(), head=replace(HEADS["lite"], details=4))
    assert contract_of(detailed) == {**CONTRACT, "image": (("pixels",), ("embedding", "details"))}
    asked_through = {name: graphs_of_ask(tiny_manifest(name)) for name in (None, *HEADS)}
    assert asked_through == {
        None: ("image", "text"),
        "lite": ("image", "text", "head"),
        "mevf": ("image", "features", "head"),
        "qcr": ("features", "head"),
        "blind": ("head",),
    }


def test_what_each_head_sees(predictor: pm.Predictor, others: dict[str, pm.Predictor]) -> None:
    embedding = predictor.embed_image(picture())
    assert np.array_equal(predictor.image_features(picture()), embedding)
    seen = others["mevf"].image_features(picture())
    assert np.array_equal(seen[:DIM], embedding) and seen.dtype == np.float32
    assert seen[DIM:] == pytest.approx([grey(12), grey(16)], abs=1e-6) and grey(12) != pytest.approx(grey(16), abs=1e-6)
    assert others["qcr"].image_features(picture()) == pytest.approx([grey(16)], abs=1e-6)
    assert others["blind"].image_features(picture()).tolist() == [1]


def test_what_each_head_is_asked(predictor: pm.Predictor, others: dict[str, pm.Predictor]) -> None:
    assert np.array_equal(predictor.question_features(["plane", FRACTURE]), predictor.embed_texts(["plane", FRACTURE]))
    tokens = others["mevf"].question_features([FRACTURE, "Plane?", "a xyz a", "is there a large fracture", "xyz"])
    assert tokens.dtype == np.int64 and READS.pad_id == 6
    assert tokens.tolist() == [[0, 1, 2, 3], [5, 6, 6, 6], [2, 6, 2, 6], [0, 1, 2, 6], [6, 6, 6, 6]]
    for question in ("", " ", "\ud800"):
        with pytest.raises(pm.UsageError):
            others["mevf"].question_features([question])


def test_a_head_that_reads_words_answers(others: dict[str, pm.Predictor]) -> None:
    sure, no, plane = (others["mevf"].ask(picture(b), q) for b, q in ((200, FRACTURE), (50, FRACTURE), (200, "which plane?")))
    assert (sure.candidates[0].answer, no.candidates[0].answer, plane.answer) == ("yes", "no", "axial")
    assert sure.answer is None and sure.reason == "fracture is not validated for this model on any kind of picture"
    assert sure.probability == pytest.approx(1 / (1 + np.exp(-(8 * grey(16) - 4 + 3))), abs=1e-5)
    assert len(sure.candidates) == 5 and sum(c.probability for c in sure.candidates) > 1.5
    unsure = others["mevf"].ask(picture(128), "is there a")
    assert unsure.abstained and "under the bundle's threshold" in str(unsure.reason)
    assert others["mevf"].ask(picture(contrast=0), "which plane?").reason is None  # nothing says what is a radiograph
    assert (sure.model.backend, sure.model.device) == ("onnxruntime", "cpu") and set(sure.timings_ms) > {"preprocess", "encode"}


@pytest.mark.parametrize("name", WORDS_HEADS)
def test_a_question_of_which_no_word_is_known(others: dict[str, pm.Predictor], name: str) -> None:
    answer = others[name].ask(picture(), "asdf qwerty")
    assert answer.answer is None and answer.reason == OUTSIDE and answer.candidates[0].probability > 0.8
    assert others[name].ask(picture(), "asdf fracture").candidates[0].answer == "yes"


def test_two_branches_answer_by_the_type_of_question(others: dict[str, pm.Predictor]) -> None:
    closed, opened = others["qcr"].ask_many(picture(), [FRACTURE, "which plane?"])
    assert [c.answer for c in closed.candidates] == ["yes", "no"]
    assert [c.answer for c in opened.candidates] == ["axial", "coronal", "sagittal"]


@pytest.mark.parametrize("name", WORDS_HEADS)
def test_many_questions_in_several_threads_equal_one_by_one(others: dict[str, pm.Predictor], name: str) -> None:
    questions = [FRACTURE, "which plane?", "asdf", "is there a"]
    alone = [others[name].ask(picture(), question) for question in questions]
    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(lambda _: others[name].ask_many(picture(), questions), range(8)):
            assert [(a.answer, a.candidates, a.reason) for a in together] == [(a.answer, a.candidates, a.reason) for a in alone]


def test_more_pairs_than_go_in_one_batch(others: dict[str, pm.Predictor]) -> None:
    seen = np.random.default_rng(0).normal(size=(2 * ROWS + 3, DIM + 2)).astype(np.float32)
    asked = np.resize(others["mevf"].question_features([FRACTURE, "plane", "asdf"]), (len(seen), READS.length))
    whole = others["mevf"].head_logits(seen, asked)
    assert len(whole) == len(seen) and whole.known is not None and whole.known.tolist() == [i % 3 != 2 for i in range(len(seen))]
    for i in (0, ROWS - 1, ROWS, len(seen) - 1):
        assert whole.answer[i] == pytest.approx(others["mevf"].head_logits(seen[i : i + 1], asked[i : i + 1]).answer[0], abs=1e-5)


class Scaled:
    """A head whose logits are scaled by the batch's largest value, as dynamic quantisation does it."""

    backend, device = "numpy", "cpu"
    inputs, outputs = contract_of(tiny_manifest("blind"))["head"]

    def run(self, inputs: Any) -> dict[str, Any]:
        answer = np.tile(inputs["image"] / np.abs(inputs["image"]).max(), (1, len(ANSWERS))).astype(np.float32)
        return {"answer": answer, "kind": np.zeros((len(answer), 1), np.float32)}


def test_what_else_is_asked_changes_no_quantised_answer(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "b", "blind")
    seen, asked = np.array([[1], [4]], np.float32), np.zeros((2, READS.length), np.int64)
    said = {}
    for precision in ("fp32", "int8"):
        manifest = tiny_manifest("blind")
        manifest = replace(manifest, graphs={**manifest.graphs, "head": Graph("head.onnx", precision)})
        said[precision] = pm.Predictor(path, manifest, {"head": Scaled()}, {}).head_logits(seen, asked).answer[:, 0].tolist()
    assert said == {"fp32": [0.25, 1], "int8": [1, 1]}


def test_towers_alone_embed_and_answer_nothing(towers: pm.Predictor, predictor: pm.Predictor) -> None:
    assert np.array_equal(towers.embed_image(picture()), predictor.embed_image(picture()))
    assert np.array_equal(towers.embed_text(FRACTURE), predictor.embed_text(FRACTURE))
    image, question = lambda: towers.image_features(picture()), lambda: towers.question_features([FRACTURE])
    for ask in (lambda: towers.ask("nowhere.dcm", FRACTURE), image, question):
        with pytest.raises(pm.UsageError, match=r"bundle tiny has no head.*pmclip-deploy classify.*search.*train vqa") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_infer(tmp_path: Path, command: Callable[..., Result]) -> None:
    Image.fromarray(picture()).save(tmp_path / "p.png")
    for name in (None, *WORDS_HEADS):
        tiny_bundle(tmp_path / str(name), name)
    ask = ["infer", str(tmp_path / "p.png"), "which plane?", "asdf", "--bundle"]
    code, out, err = command(*ask, tmp_path / "None")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "has no head" in err
    for name in WORDS_HEADS:
        done = command(*ask, tmp_path / name, "--json")
        assert done.code == 0 and [answer["answer"] for answer in done.json["answers"]] == ["axial", None] and done.err == ""
        code, out, _ = command(*ask, tmp_path / name)
        assert code == 0 and "no answer: the question is outside" in out


# --- loading -------------------------------------------------------------------------------------------------------------------


def test_a_changed_byte_is_refused_on_load(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    with (tmp_path / "b" / "head.onnx").open("r+b") as file:
        file.seek(100)
        file.write(bytes([file.read(1)[0] ^ 1]))
    with pytest.raises(pm.BundleError, match=r"head\.onnx has changed"):
        pm.load(tmp_path / "b")


def test_a_graph_is_parsed_only_when_it_is_verified(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    manifest, opened = manifest_from_bundle(bundle), list[Any]()
    for name in manifest.files:  # of the right size, and no graph or tokenizer
        (tmp_path / "b" / name).write_bytes(bytes(manifest.files[name].bytes))
    monkeypatch.setattr("pmclip_deploy.onnx_file.weights_outside", lambda *names: opened.append(names))
    monkeypatch.setattr("pmclip_deploy.tokens.tokenizer_from_text", lambda *names: opened.append(names))
    with pytest.raises(pm.BundleError, match="has changed"):
        pm.load(tmp_path / "b")
    assert not opened


def test_a_graph_opens_while_others_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = tiny_bundle(tmp_path / "bundle", None), Event()
    largest = max(manifest_from_bundle(path).files.items(), key=lambda file: file[1].bytes)[0]
    first = next(name for name in ("image", "text") if not largest.startswith(name))

    def reads(file: Path, expected: Any) -> bytes:
        assert file.name != largest or opened.wait(20)
        return file.read_bytes()

    def opens(path: Path, manifest: Any, name: str, **others: Any) -> Any:
        if name == first:
            opened.set()
        return session_from_bundle(path, manifest, name, **others)

    monkeypatch.setattr("pmclip_deploy.bundle.files._content", reads)
    monkeypatch.setattr("pmclip_deploy.opening.session_from_bundle", opens)
    pm.load(path)
    assert opened.is_set()


NO_GRAPH = b"\x00 not what it says\n"


def broken(tmp_path: Path, changes: dict[str, bytes] | None = None, kind: str | None = "lite", **manifest: Any) -> Path:
    write_bundle(tmp_path / "b", tiny_manifest(kind, **manifest), {**tiny_files(kind), **(changes or {})})
    return tmp_path / "b"


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    for name in ("image.onnx", "text.onnx", "head.onnx", "tokenizer.json"):
        with pytest.raises(pm.BundleError, match=name) as caught:
            pm.load(broken(tmp_path, {name: NO_GRAPH}))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["image.onnx", "features.onnx", "head.onnx", "words.json"])
def test_what_a_question_needs_is_opened_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(pm.BundleError, match=name):
        pm.load(broken(tmp_path, {name: NO_GRAPH}, kind="mevf"))


@pytest.mark.parametrize(("kind", "idle"), [("mevf", ["text.onnx", "tokenizer.json"]), ("blind", ["image.onnx", "text.onnx"])])
def test_what_is_not_needed_is_not_opened(tmp_path: Path, kind: str, idle: list[str]) -> None:
    predictor = pm.load(broken(tmp_path, dict.fromkeys(idle, NO_GRAPH), kind=kind))
    assert predictor.ask(picture(), FRACTURE).candidates[0].answer == "yes"
    if "image.onnx" not in idle:
        predictor.embed_image(picture())
    for _ in range(2):
        with pytest.raises(pm.BundleError, match=r"text\.onnx|tokenizer\.json"):
            predictor.embed_text(FRACTURE)
    if "image.onnx" in idle:
        with pytest.raises(pm.BundleError, match=r"image\.onnx"):
            predictor.embed_image(picture())


@pytest.mark.parametrize("broke", ["text.onnx", "tokenizer.json"])
def test_what_opens_behind_towers_alone_fails_where_it_is_needed(tmp_path: Path, broke: str) -> None:
    predictor = pm.load(broken(tmp_path, {broke: NO_GRAPH}, kind=None))
    assert np.isfinite(predictor.embed_image(picture())).all()
    for _ in range(2):
        with pytest.raises(pm.BundleError, match=broke):
            predictor.embed_text(FRACTURE)


def test_towers_alone_open_both_and_wait_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_open, opened = Event(), list[str]()

    def opens(path: Path, manifest: Any, name: str, **others: Any) -> Any:
        if name == "text":
            assert may_open.wait(20)
        opened.append(name)
        return session_from_bundle(path, manifest, name, **others)

    monkeypatch.setattr("pmclip_deploy.opening.session_from_bundle", opens)
    predictor = pm.load(tiny_bundle(tmp_path / "bundle", None))
    assert opened == ["image"]
    may_open.set()
    predictor.embed_text(FRACTURE)
    assert opened == ["image", "text"]


def test_what_is_opened_later_is_checked_like_the_rest(tmp_path: Path) -> None:
    predictor = pm.load(broken(tmp_path, {"text.onnx": tiny_files("mevf")["image.onnx"]}, kind="mevf"))
    with pytest.raises(pm.BundleError, match=r"text\.onnx: takes .*pixels.* not .*tokens"):
        predictor.embed_text(FRACTURE)


def test_things_are_opened_once_and_do_not_wait_for_each_other() -> None:
    opened, opening, release = [], Event(), Event()

    def opens(name: str) -> object:
        opened.append(name)
        if name == "slow":
            opening.set()
            assert release.wait(10)
        return object()

    things = LazyMap(opens, ("slow", "quick"))
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(things.__getitem__, "slow") for _ in range(3)]
        try:
            assert opening.wait(10) and pool.submit(things.__getitem__, "quick").result(5)
        finally:
            release.set()
        assert len({id(future.result(10)) for future in slow}) == 1
    assert sorted(opened) == ["quick", "slow"]


def test_a_graph_with_other_inputs(tmp_path: Path) -> None:
    with pytest.raises(pm.BundleError, match=r"takes .*tokens.* not .*pixels"):
        pm.load(broken(tmp_path, {"image.onnx": tiny_files()["text.onnx"]}))
    with pytest.raises(pm.BundleError, match=r"features\.onnx: takes .*autoencoder.* not .*maml"):
        pm.load(broken(tmp_path, {"features.onnx": tiny_files("qcr")["features.onnx"]}, kind="mevf"))
    with pytest.raises(pm.BundleError, match=r"head\.onnx: takes .*text.* not .*tokens"):
        pm.load(broken(tmp_path, {"head.onnx": tiny_files()["head.onnx"]}, kind="mevf"))


def test_a_head_that_does_not_fit_its_manifest(tmp_path: Path) -> None:
    predictor = pm.load(broken(tmp_path, answers=(*ANSWERS, "one more")))
    with pytest.raises(pm.BundleError, match="does not fit"):
        predictor.ask(picture(), FRACTURE)
    kinds = tiny_manifest("qcr").kinds
    with pytest.raises(pm.BundleError, match="does not fit"):
        pm.load(broken(tmp_path, kind="qcr", kinds=(*kinds, kinds[0]))).ask(picture(), FRACTURE)
    with pytest.raises(pm.BundleError, match=r"head\.onnx: .*cannot run"):  # it sees more than the head takes
        pm.load(broken(tmp_path, {"head.onnx": tiny_files("qcr")["head.onnx"]}, kind="mevf")).ask(picture(), FRACTURE)


def test_a_size_that_does_not_fit_the_graph(tmp_path: Path) -> None:
    predictor = pm.load(broken(tmp_path, preprocess=replace(tiny_manifest().preprocess, size=48)))
    with pytest.raises(pm.BundleError, match="cannot run"):
        predictor.ask(picture(), FRACTURE)


def test_a_head_that_computes_no_numbers(predictor: pm.Predictor, others: dict[str, pm.Predictor]) -> None:
    nan = np.full((1, DIM), np.nan, np.float32)
    with pytest.raises(pm.BundleError, match="NaN or infinity"):
        predictor.head_logits(nan, nan)
    with pytest.raises(pm.BundleError, match="NaN or infinity"):
        others["blind"].head_logits(nan[:, :1], others["blind"].question_features([FRACTURE]))


def test_devices(bundle: Path) -> None:
    import onnxruntime

    assert pm.load(bundle, device="cpu").model.device == "cpu"
    with pytest.raises(pm.UsageError, match="unknown device"):
        pm.load(bundle, device="tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(pm.DeviceError, match=r"has no CUDA here \(it has .*CPUExecutionProvider.*pip uninstall -y onnxruntime "):
            pm.load(bundle, device="cuda")


def test_engines_that_do_not_run_here(tmp_path: Path, command: Callable[..., Result]) -> None:
    engines = tuple(
        Engine(graph, "x.engine", "tensorrt_rtx", "0.0.1", ("8.6",), "linux-x86_64", "0" * 64, (1, 1, 8)) for graph in ("image", "text")
    )
    path = tmp_path / "b"
    write_bundle(path, tiny_manifest("mevf", target="rtx", engines=engines), {**tiny_files("mevf"), "x.engine": b"plan"})
    predictor = pm.load(path)
    assert predictor.model.backend == "onnxruntime" and predictor.ask(picture(), FRACTURE).candidates[0].answer == "yes"
    (note,) = predictor.notes
    assert "has no engine that runs here" in note and "0.0.1" in note
    predictor.embed_text("plane")
    assert len(predictor.notes) == 2
    with pytest.raises(pm.DeviceError, match="has no engine that runs here"):
        pm.load(path, device="tensorrt_rtx")
    Image.fromarray(picture()).save(tmp_path / "p.png")
    done = command("infer", tmp_path / "p.png", "which plane?", "--bundle", path, "--json")
    assert done.code == 0 and done.answer["answer"] == "axial" and done.err == note.replace('device="cpu"', "--device cpu") + "\n"


def test_the_model_names_its_manifest(predictor: pm.Predictor, bundle: Path) -> None:
    from hashlib import sha256

    assert predictor.model.sha256 == sha256((bundle / MANIFEST).read_bytes()).hexdigest()
