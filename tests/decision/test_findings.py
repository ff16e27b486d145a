"""A bundle with the graph "findings", from a picture to a printed answer and its map."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file

import pmclip_deploy as pm
from pmclip_deploy.bundle.files import manifest_from_bundle, write_bundle
from pmclip_deploy.bundle.types import Finding
from pmclip_deploy.decision.evidence import FACETS
from tests.tiny.bundle import facets_bundle
from tests.tiny.findings import FINDINGS, HAND

SMALL = replace(
    FINDINGS,
    preprocess=replace(FINDINGS.preprocess, size=32),
    findings=(Finding("fracture", (replace(HAND, threshold=0.0),), map_hits=0.7), FINDINGS.findings[1]),
)
FRACTURE = "is there a fracture?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return facets_bundle(tmp_path_factory.mktemp("findings") / "bundle", SMALL)


def film(brightness: int) -> np.ndarray:
    """(64, 64) u8 around a brightness, brighter on the left."""
    noise = np.random.default_rng(3).integers(-30, 31, (64, 64))
    noise[:, :16] += 25
    return np.clip(brightness + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("brightness", "answer"), [(190, "yes"), (60, "no")])
def test_a_finding_is_answered_with_what_it_is_worth(folder: Path, brightness: int, answer: str) -> None:
    given = pm.load(folder).ask(film(brightness), FRACTURE)
    assert given.answer == answer and given.worth is not None and given.worth.found == (answer == "yes")
    document = json.loads(json.dumps(given.to_json(), allow_nan=False))
    assert document["worth"]["right_of_yes"] == [24, 32] and document["understood_as"]["finding"] == "fracture"


def test_a_mirrored_picture_gets_the_same_answer(folder: Path) -> None:
    predictor = pm.load(folder)
    straight, mirrored = (predictor.ask(x, FRACTURE) for x in (film(150), film(150)[:, ::-1]))
    assert straight.probability == pytest.approx(mirrored.probability, abs=1e-6)


def test_without_the_graph_the_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del data["graphs"]["findings"]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(pm.BundleError, match="findings"):
        manifest_from_bundle(broken)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"auroc": float("nan")}, "NaN"),
        ({"threshold": 1e300}, "threshold"),
        ({"yes": [40, 32]}, "contradict"),
        ({"auroc_ci95": [0.99, 0.2]}, "contradict"),
        ({"positives": 0}, "contradict"),
        ({"slope": -1.0}, "slope"),
        ({"region": "nose"}, "region"),
    ],
)
def test_a_stratum_that_cannot_be_is_refused(folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    data["findings"]["findings"][0]["strata"][0] |= change
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(pm.BundleError, match=said):
        manifest_from_bundle(broken)


def test_infer_prints_what_was_measured_and_follows_the_prevalence(run: Any, folder: Path, tmp_path: Path) -> None:
    Image.fromarray(film(190)).save(tmp_path / "film.png")
    printed = run("infer", tmp_path / "film.png", FRACTURE, "--bundle", folder)
    assert printed.code == 0
    assert "24 of 32 such answers were right" in " ".join(re.sub("[│]", " ", printed.out).split()) and "%" not in printed.out
    rare = run("infer", tmp_path / "film.png", FRACTURE, "--bundle", folder, "--prevalence", "0.05", "--json").answer
    assert rare["worth"]["prevalence"] == 0.05 and 0 < rare["worth"]["predictive_value"] < 24 / 32


def test_age_opens_what_was_validated_on_children(run: Any, tmp_path: Path) -> None:
    pneumonia = replace(FINDINGS.findings[1], strata=(replace(HAND, children=True),))
    chest = replace(SMALL, findings=(pneumonia,))
    folder = facets_bundle(tmp_path / "bundle", chest)
    Image.fromarray(film(190)).save(tmp_path / "film.png")
    asked = ("infer", tmp_path / "film.png", "is there pneumonia?", "--bundle", folder, "--json")
    assert "--age" in run(*asked).answer["reason"]
    assert run(*asked, "--age", "7").answer["answer"] is not None
    grown = run(*asked, "--age", "43")
    said = {key: value for key, value in grown.answer.items() if key not in ("timings_ms", "model", "image")}
    assert said["answer"] is None and "43" not in json.dumps(said)


def test_the_picture_that_the_model_saw_is_saved_with_its_map(run: Any, folder: Path, tmp_path: Path) -> None:
    bordered = np.pad(film(190), 60)
    Image.fromarray(bordered).save(tmp_path / "film.png")
    for question, mode in ((FRACTURE, "RGB"), ("in what plane is this?", "L")):
        saved = run("infer", tmp_path / "film.png", question, "--bundle", folder, "--save-picture", tmp_path / "seen.png")
        assert saved.code == 0, saved.err
        with Image.open(tmp_path / "seen.png") as picture:
            assert picture.size == (32, 32) and picture.mode == mode
    red = pm.load(folder).model_view(film(190), "fracture").astype(int)
    assert (red[:, :, 0] - red[:, :, 2])[:, :6].mean() > (red[:, :, 0] - red[:, :, 2])[:, 20:].mean() > 0


@pytest.mark.parametrize(
    ("arguments", "said"), [(("--save-picture", "seen.jpg"), ".png"), (("--save-picture", "/nowhere/seen.png"), "cannot be written")]
)
def test_a_picture_that_cannot_be_saved(run: Any, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    """The command says so before it opens the bundle."""
    Image.fromarray(film(190)).save(tmp_path / "film.png")
    failed = run("infer", tmp_path / "film.png", FRACTURE, "--bundle", tmp_path / "no bundle", *arguments)
    assert failed.code == 2 and said in failed.err and failed.err.count("\n") == 1


def test_the_picture_of_a_finding_that_is_not_there(folder: Path) -> None:
    with pytest.raises(pm.UsageError, match="no finding"):
        pm.load(folder).model_view(film(190), "scoliosis")


def test_a_picture_of_another_family_than_a_finding_was_measured_on_is_not_looked_at(folder: Path) -> None:
    """The file says CT, and the finding is validated for plain films: the graph is not even opened. Of a film it is."""
    ct, opened = dcmread(get_testdata_file("CT_small.dcm")), []
    for modality in ("CT", "DX"):
        predictor = pm.load(folder)
        ct.Modality = modality
        given = predictor.ask(ct, FRACTURE)
        opened.append("findings" in dict.keys(predictor._sessions))
        assert (given.answer is None) == ("the file says CT" in (given.reason or "")) == (modality == "CT")
    assert opened == [False, True]


# --- questions whose embeddings are kept -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return facets_bundle(tmp_path_factory.mktemp("kept") / "bundle", asked=tuple({question for _, question in FACETS.values()}))


def test_a_bundle_that_keeps_its_questions_opens_no_text_tower(kept: Path) -> None:
    """In a process of its own: neither the tower nor the package of tokenizers is loaded."""
    code = (
        "import sys, numpy, pmclip_deploy as pm; predictor = pm.load(sys.argv[1]);"
        "answer = predictor.ask(numpy.random.default_rng(0).integers(0, 256, (64, 64), numpy.uint8), 'what organ system is shown?');"
        "print(answer.answer, 'tokenizers' in sys.modules, sorted(dict.keys(predictor._sessions)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(kept)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[0] == "musculoskeletal False ['head', 'image']", done.stderr


def test_other_texts_open_the_tower_when_they_are_asked_for(kept: Path) -> None:
    predictor = pm.load(kept)
    assert predictor.embed_text("which plane").shape == (8,) and not np.array_equal(predictor.embed_text("which plane"), np.ones(8))
    assert np.array_equal(predictor.question_features([FACETS["plane"][1]]), np.ones((1, 8)))


@pytest.mark.parametrize("content", [b"", b"no array", np.ones(3).tobytes()])
def test_kept_questions_that_are_no_numbers(kept: Path, tmp_path: Path, content: bytes) -> None:
    manifest = manifest_from_bundle(kept)
    names = [name for name in manifest.files if name != "asked.npy"]
    write_bundle(tmp_path / "bundle", manifest, {**{name: kept / name for name in names}, "asked.npy": content})
    with pytest.raises(pm.BundleError, match=r"asked\.npy"):
        pm.load(tmp_path / "bundle").ask(film(100), "what organ system is shown?")
