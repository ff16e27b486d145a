"""The library as its user meets it: what ``dir`` shows, short reprs that name nobody, and examples that run."""

import doctest
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.data import get_testdata_file

import pmclip_deploy as pm
from pmclip_deploy.models import DEMO

TYPES = [name for name in pm.__all__ if name != "load"]


@pytest.fixture
def scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that holds scan.dcm, as for the examples of the documentation (docs/conf.py)."""
    shutil.copy(str(get_testdata_file("CT_small.dcm")), tmp_path / "scan.dcm")
    monkeypatch.chdir(tmp_path)
    return "scan.dcm"


def examples_of(name: str) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(getattr(pm, name), name, globs={}) if test.examples]


@pytest.mark.parametrize("name", pm.__all__)
def test_the_examples_run(name: str, scan: str) -> None:
    tests, said = examples_of(name), list[str]()
    assert any(test.name == name for test in tests), f"{name} has no example"
    for test in tests:
        doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


def test_dir_shows_all_that_is_public() -> None:
    assert {name for name in dir(pm) if not name.startswith("__")} == {*pm.__all__} and "__version__" in dir(pm)
    assert all(getattr(pm, name).__doc__ for name in pm.__all__)
    assert pm.__all__ == sorted(pm.__all__, key=lambda name: (name.islower(), name))


def test_every_type_that_a_result_holds_is_public(scan: str) -> None:
    predictor = pm.load()
    asked = predictor.question_features(["is this a CT?"])
    answers = [
        predictor.ask(DEMO / "leg-1.dcm", "is there a displaced fracture?"),
        predictor.ask(DEMO / "leg-1.dcm", "is there a fracture?"),
    ]
    results = [
        *answers,
        predictor.classify(scan, ["ct", "mri"]),
        predictor.detect_findings(scan),
        predictor.head_logits(predictor.image_features(scan)[None], asked),
    ]
    met: set[str] = set()
    for result in results:
        met |= types_in(result)
    assert met == {
        "Answer",
        "Candidate",
        "Classification",
        "HeadLogits",
        "ImageInfo",
        "Intent",
        "Label",
        "ModelInfo",
        "Qualifier",
        "FindingScores",
        "Worth",
    }
    assert met <= set(pm.__all__)


def types_in(thing: Any) -> set[str]:
    """The classes of ours in a result."""
    if isinstance(thing, (tuple, list)):
        return set[str]().union(*map(types_in, thing))
    if isinstance(thing, dict):
        return types_in(list(thing.values()))
    if type(thing).__module__.startswith("pmclip_deploy"):
        return {type(thing).__name__}.union(*map(types_in, vars(thing).values()))
    return set()


def test_reprs_are_short_and_name_nobody(tmp_path: Path) -> None:
    named = tmp_path / "DOE^JANE.dcm"
    shutil.copy(DEMO / "leg-1.dcm", named)
    predictor = pm.load()
    answers = predictor.ask_many(named, ["is there a displaced fracture of DOE^JANE?", "is there a fracture?", "how is DOE^JANE?"])
    done = predictor.classify(named, ["ct", "mri"])
    seen = predictor.detect_findings(named)
    heads = predictor.head_logits(np.repeat(predictor.image_features(named)[None], 2, 0), predictor.question_features(["a", "b"]))
    things = [
        predictor,
        predictor.model,
        *answers,
        *answers[1].candidates,
        answers[1].image,
        answers[1].worth,
        done,
        done.labels[0],
        seen,
        heads,
    ]
    for thing in things:
        assert len(repr(thing)) < 300 and "DOE" not in repr(thing) and "\n" not in repr(thing), repr(thing)
        assert repr(thing).startswith(f"{type(thing).__name__}(")
