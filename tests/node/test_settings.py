"""ward.yaml and protocols: what is read, and one line for each fault."""

import re
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("yaml")

from pydicom import Dataset

from pmclip_deploy.errors import UsageError
from pmclip_deploy.node.protocol import Candidate, Pick, Protocol, picked, protocols_from_files, values_of
from pmclip_deploy.node.receive import IMAGE_CLASSES, SYNTAXES
from pmclip_deploy.node.settings import Retry, ward_from_file
from tests.command import Result
from tests.sources import ROOT

LEAST = "protocols: [p.yaml]\nsend: [{to: 'folder:out'}]\n"
ASK = "name: p\nrevision: 1\nmatch: {Modality: [CT]}\nquestions: [{id: q, ask: 'is there a fracture?'}]\n"


def test_the_first_files_are_read(tmp_path: Path, command: Callable[..., Result]) -> None:
    assert command("ward", "init", tmp_path / "w").code == 0
    ward = ward_from_file(tmp_path / "w" / "ward.yaml")
    (protocol,) = protocols_from_files(ward.protocols)
    assert ward.peers == [] and ward.node.host == "127.0.0.1" and ward.complete.force_s == 1800
    assert ward.state == tmp_path / "w" / "state" and ward.send[0].to == f"folder:{tmp_path / 'w' / 'reports'}"
    assert protocol.exclude["BurnedInAnnotation"] == ["YES"]  # and not true, which YAML 1.1 makes of it
    again = command("ward", "init", tmp_path / "w")
    assert again.code == 2 and "exists already" in again.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "protocols: Field required"),
        (LEAST + "nodes: {}", "nodes: Extra inputs are not permitted"),
        (LEAST + "node: {ports: 1}", r"node\.ports: Extra inputs"),
        (LEAST + "node: {port: 70000}", r"node\.port: "),
        (LEAST + "node: {aet: 'longer than sixteen'}", r"node\.aet: "),
        (LEAST + "peers: [{aet: A, addresses: [10.0.0.256]}]", r"peers\.0\.addresses\.0\."),
        (LEAST + "complete: {quiet_s: soon}", r"quiet_s: must be a duration"),
        (LEAST + "complete: {quiet_s: 1}\ncomplete: {quiet_s: 2}", "line 4: a key stands there twice"),
        (LEAST.replace("folder:out", "dicom:PACS"), "must be folder:PATH"),
        (LEAST.replace("folder:out", "dicom:PACS@h:104"), "i_understand_this_is_research"),
        (LEAST.replace("'folder:out'", "'folder:out', commit: true"), "sc and commit are for a dicom: destination alone"),
        (LEAST.replace("[{to: 'folder:out'}]", "[{to: 'folder:out'}, {to: 'folder:./out'}]"), "stands there twice"),
        ("a: [", "line 1: "),
        ("- 1", "the file: "),
        ("&a [*a]", "line 1: "),
    ],
)  # fmt: skip
def test_faults_of_ward_yaml(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "ward.yaml").write_text(text)
    with pytest.raises(UsageError, match=said) as caught:
        ward_from_file(tmp_path / "ward.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Modality", "Modalities", "there is no attribute 'Modalities'"),
        ("Modality", "PixelData", "PixelData has no text or number"),
        ("id: q", "id: 'longer than sixteen'", r"questions\.0\.id"),
        ("questions: [", "questions: [{id: q, ask: x}, ", "two questions have the same id"),
        ("revision: 1", "revision: one", "revision: "),
    ],
)
def test_faults_of_a_protocol(tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(ASK.replace(old, new))
    with pytest.raises(UsageError, match=said):
        protocols_from_files([tmp_path / "p.yaml"])


def test_what_matches() -> None:
    dataset = Dataset()
    dataset.Modality, dataset.ImageType, dataset.BodyPartExamined = " cr", ["DERIVED", "SECONDARY"], None
    values = values_of(dataset, ["Modality", "ImageType", "BodyPartExamined", "ViewPosition"])

    def takes(match: dict[str, list[str]], exclude: dict[str, list[str]]) -> bool:
        return Protocol(name="p", revision=1, match=match, exclude=exclude, questions=[{"id": "q", "ask": "?"}]).takes(values)

    assert takes({"Modality": ["DX", "CR"]}, {}) and not takes({"Modality": ["C"]}, {})
    assert takes({"BodyPartExamined": ["CHEST", ""], "ViewPosition": [""]}, {}) and not takes({"BodyPartExamined": ["CHEST"]}, {})
    assert not takes({}, {"ImageType": ["SECONDARY"]}) and not takes({}, {"ImageType": ["derived&secondary"]})
    assert takes({}, {"ImageType": ["DERIVED&PRIMARY"]}) and not takes({"Modality": ["CR"]}, {"ViewPosition": [""]})


def test_what_is_picked_does_not_depend_on_the_order_of_arrival() -> None:
    images = [Candidate(i, "s" if i < 5 else "t", f"1.{i}", place, 10 * i) for i, place in enumerate((2.0, 0.0, 1.0, -1.0, 3.0, 7.0))]
    for order in permutations(images):
        assert [one.place for one in picked(Pick(max_images=5), order)] == [1.0, 7.0]
        assert [one.place for one in picked(Pick(choose="all", per="study", max_images=2), order)] == [0.0, 3.0]
        assert [one.id for one in picked(Pick(choose="largest"), order)] == [4, 5]
    assert [one.place for one in picked(Pick(choose="every_n", n=2, max_images=9), images)] == [0.0, 2.0, 7.0]
    assert picked(Pick(), []) == []


def test_waits_grow_to_their_limit() -> None:
    assert [Retry().wait(n) for n in (1, 2, 3, 8, 10_000)] == [10, 20, 40, 900, 900]


def test_the_conformance_statement_lists_what_is_offered() -> None:
    page = (ROOT / "docs" / "reference" / "conformance.md").read_text("utf-8")
    listed = re.findall(r"(?m)^\| .* \| (1\.2\.840[\d.]+) \|$", page)
    assert listed == [*IMAGE_CLASSES, *SYNTAXES]
