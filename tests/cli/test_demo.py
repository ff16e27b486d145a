"""The demo: what the embedded model says to its pictures against what is true of them, its films, and what it claims of its training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

import pmclip_deploy as pm
from pmclip_deploy.bundle.files import manifest_from_bundle
from pmclip_deploy.cli.demo import was_held_out
from pmclip_deploy.errors import InputError
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.models import DEFAULT_BUNDLE, DEMO
from pmclip_deploy.train.findings.groups import kept_for_demo
from tests.command import Result

FILMS = json.loads((DEMO / "films.json").read_text(encoding="utf-8"))["films"]


@pytest.mark.skipif(not (DEFAULT_BUNDLE / "manifest.json").is_file(), reason="needs the embedded bundle")
def test_every_answer_of_the_embedded_model_is_true(tmp_path: Path, command: Callable[..., Result]) -> None:
    done = command("demo", "--output", tmp_path / "demo", "--json")
    document = done.json
    assert done.code == 0 and document["schema"] == "pmclip-deploy/demo/1" and "CC BY 4.0" in document["credit"]
    said = {(Path(a["image"]["source"]).name, a["question"]): a for picture in document["pictures"] for a in picture["answers"]}
    assert not {key: a["answer"] for key, a in said.items() if not a["right"]}
    assert [said[film["file"], "is there a fracture?"]["answer"] for film in FILMS] == ["yes", "no"]
    assert said["ct.dcm", "is there a fracture?"]["abstained"]
    seen = [picture_from_path(picture["picture_seen"]).pixels for picture in document["pictures"]]
    red = [pixels.ndim == 3 and bool((pixels[..., 0].astype(int) - pixels[..., 1] > 60).any()) for pixels in seen]
    assert red == [True, False, False]
    assert document["kept_apart"] == was_held_out(manifest_from_bundle(DEFAULT_BUNDLE).provenance, {f["group"] for f in FILMS})


@pytest.mark.skipif(not (DEFAULT_BUNDLE / "manifest.json").is_file(), reason="needs the embedded bundle")
def test_the_map_points_into_the_box_of_the_films_publishers() -> None:
    pytest.importorskip("open_clip", reason="training needs the extra `train`")
    from pmclip_deploy.train.findings.strata import placed

    predictor, picture = pm.load(), picture_from_path(DEMO / FILMS[0]["file"])
    seen = predictor.detect_findings(picture)
    assert seen is not None
    places, (box,) = seen.places["fracture"], FILMS[0]["boxes"]
    row, column = np.unravel_index(places.argmax(), places.shape)
    left, top, right, bottom = placed(box, picture.pixels, len(places))
    assert left <= column + 0.5 <= right and top <= row + 0.5 <= bottom


def test_films_are_small_name_nobody_and_are_read_by_the_base_install() -> None:
    for film in FILMS:
        dataset = pydicom.dcmread(DEMO / film["file"])
        assert (DEMO / film["file"]).stat().st_size < 150_000
        assert (dataset.Modality, dataset.BodyPartExamined, dataset.PatientIdentityRemoved) == ("CR", "LEG", "YES")
        assert str(dataset.PatientName) == "Anonymous" and not dataset.PatientBirthDate and "CC BY 4.0" in dataset.DerivationDescription
        assert all(str(e.value).startswith("2.25.") for e in dataset if e.VR == "UI" and e.keyword.endswith("InstanceUID"))
        assert dataset.file_meta.TransferSyntaxUID.is_compressed is False
        assert kept_for_demo(film["group"])


def test_films_are_fracatlas_as_the_script_writes_them(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="training needs the extra `train`")
    from pmclip_deploy.train.findings import demo

    assert demo.main(["--data", str(shared / "fracatlas"), "--output", str(tmp_path)]) == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in DEMO.iterdir()}
    for film in FILMS:
        source = shared / "fracatlas" / "images" / f"{film['source'].split()[1]}.jpg"
        assert np.array_equal(picture_from_path(DEMO / film["file"]).pixels, picture_from_path(source).pixels)


def test_the_choice_is_neither_the_easiest_nor_the_hardest() -> None:
    pytest.importorskip("open_clip", reason="training needs the extra `train`")
    from pmclip_deploy.train.findings.demo import chosen

    def row(name: str, group: str, fractured: bool, side: float = 0.2, **labels: int) -> dict[str, Any]:
        known = dict.fromkeys(("hand", "leg", "hip", "shoulder", "mixed", "hardware", "multiscan"), 0)
        boxes = [[0.1, 0.1, side, side]] if fractured else []
        return {"image": f"images/{name}", "group": group, "labels": {**known, "frontal": 1, "fractured": fractured, "leg": 1, **labels},
                "boxes": boxes}  # fmt: skip

    rows = [row(f"yes{i}", f"g{i}", True) for i in range(5)]
    rows += [row(f"no{i}{k}", f"g{i}", False) for i in range(5) for k in range(5)]
    logits = {f"yes{i}": 1.0 + i for i in range(5)} | {f"no{i}{k}": -1.0 - k for i in range(5) for k in range(5)}
    assert chosen(rows, logits, {"leg": 0.0, "hand": 0.0}) == ("yes2", "no22")
    logits["yes2"] = -1.0  # a wrong answer
    assert chosen(rows, logits, {"leg": 0.0, "hand": 0.0})[0] in ("yes1", "yes3")
    rows[3] = row("yes3", "g3", True, side=0.1)  # too small to be seen
    assert chosen(rows, logits, {"leg": 0.0, "hand": 0.0})[0] == "yes1"
    with pytest.raises(InputError, match="no fractured film fits"):
        chosen([row("a", "g", True, hardware=1)], {"a": 1.0}, {"leg": 0.0, "hand": 0.0})


@pytest.mark.parametrize(
    ("provenance", "apart"),
    [
        ({}, False),
        ({"findings": {}}, False),
        ({"findings": {"kept_apart": ["fa0159"]}}, True),
        ({"findings": {"kept_apart": ["fa0001"]}}, False),
        ({"findings": {"kept_apart": ["fa0159"]}, "radiograph": {"data": ["fracatlas"]}}, False),
        ({"findings": {"kept_apart": ["fa0159"]}, "radiograph": {"kept_apart": ["fa0159", "fa0001"]}, "vqa": {}}, True),
    ],
)
def test_what_is_claimed_of_training_stands_in_the_provenance(provenance: dict[str, Any], apart: bool) -> None:
    assert was_held_out(provenance, {"fa0159"}) is apart


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, command: Callable[..., Result]) -> None:
    (tmp_path / "file").touch()
    code, out, err = command("demo", "--output", tmp_path / "file")
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and "give another --output" in err
