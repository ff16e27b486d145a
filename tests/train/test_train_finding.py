"""`train finding`: labelled pictures become a finding of a new bundle, are measured on what trained nothing, or are refused plainly."""

import csv
import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset

import pmclip_deploy as pm
from pmclip_deploy.bundle.files import manifest_from_bundle, verify_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.types import Finding, Probe, Stratum
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.questions import understood
from pmclip_deploy.questions.taught import name_of_finding, trouble
from pmclip_deploy.train import finding as F
from pmclip_deploy.train.finding_data import Defaults
from pmclip_deploy.train.findings.groups import group_of_row
from pmclip_deploy.train.lookalikes import are_in, pairs_alike, read_signatures, signature, write_signatures
from tests.command import ends_in_one_line, is_one_line
from tests.imports import loaded
from tests.tiny.bundle import facets_bundle, tiny_bundle, tiny_manifest
from tests.tiny.findings import FINDINGS

CANARY = "CANARYNAME"
DENSE = "spondylolisthesis"  # a finding that no embedded model has: here, a bright square
ASK = f"is there a {DENSE}?"
XR_HAND = ("--modality", "xr", "--region", "hand")


def picture(positive: bool, seed: int) -> np.ndarray:
    """(48, 40) u8: coarse noise, and a bright square where it is positive."""
    rng = np.random.default_rng(seed)
    pixels = np.kron(rng.integers(40, 160, (12, 10)), np.ones((4, 4))).astype(np.uint8)
    if positive:
        top, left = 4 * rng.integers(0, 5, 2)
        pixels[top : top + 24, left : left + 20] = np.kron(rng.integers(180, 256, (6, 5)), np.ones((4, 4)))
    return pixels


def write_dicom(path: Path, pixels: np.ndarray, patient: str = "", part: str = "HAND", age: str = "040Y") -> Path:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    ds.PatientName, ds.PatientID, ds.PatientAge, ds.StudyDescription = CANARY, patient and f"{CANARY}{patient}", age, CANARY
    ds.Modality, ds.BodyPartExamined = "CR", part
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, "MONOCHROME2", 8, 8, 7
    ds.PixelRepresentation, ds.WindowCenter, ds.WindowWidth = 0, 128, 256
    ds.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def write_png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def folder_of(root: Path, count: int = 40, labelled: Callable[[int], bool] = lambda i: i % 2 == 0, start: int = 0) -> Path:
    """``count`` PNGs; each is positive as it looks, and lies where ``labelled`` says."""
    for i in range(start, start + count):
        write_png(root / ("positive" if labelled(i) else "negative") / f"{i}.png", picture(i % 2 == 0, i))
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return facets_bundle(tmp_path_factory.mktemp("base") / "bundle", FINDINGS)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 DICOM files of 60 patients, two each; one is a note, and one is cut short."""
    root = tmp_path_factory.mktemp("hospital")
    for i in range(120):
        write_dicom(root / ("yes" if i // 2 % 2 else "no") / f"{i}.dcm", picture(bool(i // 2 % 2), i), str(i // 2))
    (root / "no" / "note.txt").write_text(CANARY)
    (root / "no" / "cut.dcm").write_bytes((root / "no" / "0.dcm").read_bytes()[:-900])
    return root


@pytest.fixture(scope="module")
def taught(base: Path, hospital: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one finding more, from the hospital's files."""
    out = tmp_path_factory.mktemp("taught") / "ward-7"
    F.train_finding(DENSE, hospital, out, asked=("has a vertebra slipped?",), bundle=base)
    return out


# --- from files to answers ------------------------------------------------------------------------------------------------------


def test_dicom_files_become_a_finding_that_answers(run: Any, base: Path, hospital: Path, tmp_path: Path) -> None:
    out = tmp_path / "ward-7"
    made = run("train", "finding", DENSE, "--images", hospital, "--output", out, "--bundle", base, "--ask", "has a vertebra slipped?")
    assert made.code == 0, made.err
    assert f"120 pictures, 60 with {DENSE}, in 60 groups: Patient ID, hashed and forgotten (120)" in made.out
    assert "such answers were right (sensitivity" in made.out and "not signed" in made.out and "bundle ward-7" in made.out
    assert "they cannot be read (1)" in made.out and "cut.dcm" in made.err
    assert verify_bundle(out).name == "ward-7"

    new = {yes: write_dicom(tmp_path / f"new{yes}.dcm", picture(yes, 1000 + yes)) for yes in (True, False)}
    for question in (ASK, f"{DENSE}?", f"any {DENSE}", "has a vertebra slipped?", "vertebra slipped?"):
        for yes, file in new.items():
            answer = run("infer", file, question, "--bundle", out, "--json").answer
            assert answer["answer"] == ("yes" if yes else "no"), (question, yes, answer)
            assert answer["worth"]["finding"] == DENSE and answer["worth"]["stratum"] == "plain films of the hand or wrist"
            assert answer["understood_as"]["finding"] == DENSE and answer["model"]["bundle"] == "ward-7"
    assert run("infer", new[True], f"is there no {DENSE}?", "--bundle", out, "--json").answer["answer"] == "no"
    elsewhere = write_dicom(tmp_path / "foot.dcm", picture(True, 5), part="FOOT")
    refused = run("infer", elsewhere, ASK, "--bundle", out, "--json").answer
    assert refused["answer"] is None and "is validated for plain films of the hand or wrist" in refused["reason"]
    narrower = run("infer", new[True], f"is there a severe {DENSE}?", "--bundle", out, "--json").answer
    assert narrower["answer"] is None and '"severe"' in narrower["reason"]

    listed = run("questions", "--bundle", out, "--json").json["questions"]
    worth = next(row["worth"] for row in listed if row["question"] == "has a vertebra slipped?")
    assert worth.startswith("yes: in validation on")
    assert "vertebra slipped" in run("questions", "--bundle", out).out
    assert f"taught:   {DENSE}, measured on 120 pictures" in run("bundle", "show", out).out
    seen = tmp_path / "seen.png"
    assert run("infer", new[True], ASK, "--bundle", out, "--save-picture", seen).code == 0 and seen.is_file()
    for content in (made.out, made.err, *(file.read_bytes().decode("latin-1") for file in out.iterdir())):
        assert CANARY not in content


def test_the_old_findings_answer_as_before(base: Path, taught: Path, tmp_path: Path) -> None:
    file = write_dicom(tmp_path / "new.dcm", picture(True, 77))
    ask = ["is there a fracture?", "what imaging modality is this?", "is this a hand?"]
    before, after = (pm.load(folder, "cpu").ask_many(file, ask) for folder in (base, taught))
    assert [(a.answer, a.probability, a.reason) for a in before] == [(a.answer, a.probability, a.reason) for a in after]


def test_what_is_measured_is_out_of_fold(base: Path, tmp_path: Path) -> None:
    """Random labels: a model that validated on what it was fitted to would look perfect."""
    rng = random.Random(3)
    labels = [rng.random() < 0.5 for _ in range(120)]
    images = folder_of(tmp_path / "random", 120, lambda i: labels[i])
    measured, manifest = F.train_finding(DENSE, images, tmp_path / "out", bundle=base, defaults=Defaults("xr", "hand"))
    (stratum,) = measured.strata
    assert manifest is None and 0.3 < stratum.auroc < 0.7 and not (tmp_path / "out").exists()


def test_a_refusal_says_what_is_missing(run: Any, base: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    images = folder_of(tmp_path / "weak", 60, lambda i: (i % 2 == 0) != (rng.random() < 0.3))  # three of ten labels are wrong
    refused = run("train", "finding", DENSE, "--images", images, "--output", tmp_path / "out", "--bundle", base, *XR_HAND)
    assert refused.code == 5 and ends_in_one_line(refused.err) and not (tmp_path / "out").exists(), refused.err
    assert "not answered" in refused.out and "0.70 is needed" in refused.err
    assert "more pictures" in refused.err
    document = run("train", "finding", DENSE, "--images", images, "--output", tmp_path / "out", "--bundle", base, *XR_HAND, "--json")
    assert document.code == 5 and document.json["bundle"] is None
    (stratum,) = document.json["metrics"]["strata"]
    assert stratum["reason"] and (stratum["pictures_missing"] is None or stratum["pictures_missing"] > 0)


def test_several_findings_stand_side_by_side(run: Any, taught: Path, tmp_path: Path) -> None:
    images, two = folder_of(tmp_path / "png", 60, start=500), tmp_path / "two"
    arguments = ("--images", images, *XR_HAND, "--bundle", taught)
    assert run("train", "finding", "Foreign body", *arguments, "--output", two).code == 0
    manifest = manifest_from_bundle(two)
    assert [probe.finding.name for probe in manifest.probes] == [DENSE, "foreign body"] and manifest.name == "two"
    file = write_dicom(tmp_path / "new.dcm", picture(True, 77))
    answers = pm.load(two, "cpu").ask_many(file, [ASK, "is there a foreign body?", "foreign bodies?"])
    assert [a.answer for a in answers] == ["yes"] * 3
    assert answers[0].probability == pm.load(taught, "cpu").ask(file, ASK).probability

    again = run("train", "finding", DENSE, *arguments[:-1], two, "--output", tmp_path / "three")
    assert again.code == 2 and is_one_line(again.err) and "--replace" in again.err
    assert run("train", "finding", DENSE, *arguments[:-1], two, "--output", two, "--replace").code == 0  # in its own place
    replaced = manifest_from_bundle(two)
    assert [probe.finding.name for probe in replaced.probes] == ["foreign body", DENSE]
    assert replaced.probes[0] == manifest.probes[1] and replaced.probes[1].finding.strata[0].n == 60
    assert pm.load(two, "cpu").ask(file, "foreign body?").probability == answers[1].probability


@pytest.mark.parametrize("kind", [None, "mevf"])
def test_a_bundle_of_another_kind_learns_a_finding_too(kind: str | None, hospital: Path, tmp_path: Path) -> None:
    """Towers alone, and a head that reads questions itself: the finding is answered by what the file says."""
    F.train_finding(DENSE, hospital, tmp_path / "out", bundle=tiny_bundle(tmp_path / "base", kind))
    predictor = pm.load(tmp_path / "out", "cpu")
    files = [write_dicom(tmp_path / f"{yes}.dcm", picture(yes, 1000 + yes)) for yes in (True, False)]
    assert [predictor.ask(file, ASK).answer for file in files] == ["yes", "no"]
    assert predictor.questions() == (f"is there {DENSE}?",)
    own, other = predictor.ask_many(files[0], [ASK, "which plane"])
    assert own.answer == "yes" and (other.answer == "axial" if kind else "no head" in (other.reason or ""))
    bare = predictor.ask(picture(True, 1), ASK)
    assert bare.answer is None and "the file does not say what this picture shows" in (bare.reason or "")


def test_strata_are_measured_each_by_itself(base: Path, tmp_path: Path) -> None:
    """Hands can be told, feet have random labels, and of heads there are too few; CT is another kind of picture."""
    rng = random.Random(1)
    for i in range(180):
        part = ("HAND", "FOOT", "SKULL")[0 if i < 80 else 1 if i < 160 else 2]
        label = bool(i % 2) if part != "FOOT" else rng.random() < 0.5
        write_dicom(tmp_path / "in" / str(int(label)) / f"{i}.dcm", picture(bool(i % 2), i), str(i), part)
    measured, manifest = F.train_finding(DENSE, tmp_path / "in", tmp_path / "out", bundle=base)
    by = {stratum.region: stratum for stratum in measured.strata}
    assert manifest is not None and by["hand"].reason is None and by["leg"].reason is not None and set(by) == {"hand", "leg"}
    assert measured.small == {("xr", "skull"): (10, 10)}
    foot = pm.load(tmp_path / "out", "cpu").ask(write_dicom(tmp_path / "foot.dcm", picture(True, 9), part="FOOT"), ASK)
    assert foot.answer is None


def test_children_are_told_by_the_files_or_by_the_option(base: Path, tmp_path: Path) -> None:
    for i in range(80):
        write_dicom(tmp_path / "in" / str(i % 2) / f"{i}.dcm", picture(bool(i % 2), i), str(i), age="004Y")
    measured, _ = F.train_finding(DENSE, tmp_path / "in", tmp_path / "out", bundle=base)
    assert measured.strata[0].children
    predictor = pm.load(tmp_path / "out", "cpu")
    grown, small = (write_dicom(tmp_path / f"{age}.dcm", picture(True, 7), age=age) for age in ("040Y", "004Y"))
    assert predictor.ask(small, ASK).answer == "yes" and "children alone" in (predictor.ask(grown, ASK).reason or "")
    by_option, _ = F.train_finding(
        DENSE, folder_of(tmp_path / "png"), tmp_path / "png-out", bundle=base, defaults=Defaults("xr", "hand", children=True)
    )
    assert by_option.strata[0].children


def test_a_ct_finding_is_for_ct(base: Path, tmp_path: Path) -> None:
    """The graph of findings tells the regions of plain films alone: a picture that says nothing of itself is no CT of the hand."""
    F.train_finding(DENSE, folder_of(tmp_path / "in", 60), tmp_path / "out", bundle=base, defaults=Defaults("ct", "hand"))
    predictor = pm.load(tmp_path / "out", "cpu")
    assert predictor.ask(picture(True, 4), ASK).answer is None
    file = write_dicom(tmp_path / "ct.dcm", picture(True, 4))
    assert "and the file says plain film" in (predictor.ask(file, ASK).reason or "")


# --- groups, doubles, contamination ---------------------------------------------------------------------------------------------


def test_copies_and_look_alikes(base: Path, tmp_path: Path) -> None:
    images = folder_of(tmp_path / "in", 60)
    shutil.copy(images / "positive" / "0.png", images / "negative" / "contradicts.png")
    shutil.copy(images / "positive" / "2.png", images / "positive" / "copy.png")
    large = Image.open(images / "positive" / "4.png").resize((160, 192), Image.Resampling.BICUBIC)
    large.save(images / "positive" / "larger.png")
    large.save(images / "negative" / "larger-too.jpg", quality=95)
    measured, _ = F.train_finding(DENSE, images, tmp_path / "out", bundle=base, defaults=Defaults("xr", "hand"))
    samples = measured.samples
    assert samples.left_out == {"the same picture has both labels": 2, "they are copies of others": 1}
    assert len(samples.positive) == 61 and len(set(samples.group.tolist())) == 59
    assert samples.disagreeing == 2 and samples.grouped == {"each file by itself": 61}


def test_a_tables_groups_count(run: Any, base: Path, tmp_path: Path) -> None:
    """A spreadsheet's own CSV: a byte order mark, semicolons, columns that are none of ours; the groups are not told."""
    images, table = folder_of(tmp_path / "in", 60), tmp_path / "table.csv"
    files = sorted(images.rglob("*.png"))
    rows = [(f"in/{file.parent.name}/{file.name}", file.parent.name, f"{CANARY}{i % 30}") for i, file in enumerate(files)]
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=";").writerows([("Name", "Path", "LABEL", "group"), *((CANARY, *row) for row in rows)])
    out = tmp_path / "out"
    made = run("train", "finding", DENSE, "--images", table, "--output", out, "--bundle", base, *XR_HAND)
    assert made.code == 0 and "in 30 groups: the table's groups (60)" in made.out
    assert all(CANARY not in text for text in (made.out, made.err, *(f.read_bytes().decode("latin-1") for f in out.iterdir())))


def test_what_the_tower_learned_from_does_not_validate(base: Path, tmp_path: Path) -> None:
    images, known = folder_of(tmp_path / "in", 80), tmp_path / "known"
    shutil.copytree(base, known)
    seen = sorted(images.rglob("*.png"))[:10]
    write_signatures(known, [seen[0], tmp_path / "missing.png"])
    write_signatures(known, seen)
    assert len(read_signatures(known)) == 10
    manifest = manifest_from_bundle(known)
    from pmclip_deploy.bundle.files import write_bundle

    write_bundle(tmp_path / "with", manifest, {name: known / name for name in (*manifest.files, "seen.npy")})
    measured, made = F.train_finding(DENSE, images, tmp_path / "out", bundle=tmp_path / "with", defaults=Defaults("xr", "hand"))
    assert measured.contamination_checked and measured.samples.left_out == {"the image tower learned from them": 10}
    assert made is not None and "seen.npy" in made.files  # the next finding is checked too
    without, _ = F.train_finding(DENSE, images, tmp_path / "other", bundle=base, defaults=Defaults("xr", "hand"))
    assert not without.contamination_checked


def test_signatures_outlast_a_copy_and_tell_pictures_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [np.kron(rng.integers(0, 256, (20, 16)), np.ones((12, 12))).astype(np.uint8) for _ in range(40)]
    bits = np.stack([signature(pixels) for pixels in pictures])
    changed = []
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels).resize((96, 120)).save(tmp_path / f"{i}.jpg", quality=50)
        changed.append(signature(np.asarray(Image.open(tmp_path / f"{i}.jpg"))))
    assert are_in(np.stack(changed), bits).mean() > 0.9 and not pairs_alike(bits)
    assert pairs_alike(np.concatenate([bits, bits[:1]])) == [(0, 40)]
    assert not are_in(bits, np.zeros((0, 32), np.uint8)).any()


def test_signatures_go_with_a_checkpoint_into_its_bundle(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from types import SimpleNamespace

    from pmclip_deploy.export import contents
    from pmclip_deploy.train.checkpoint import save_checkpoint

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "tokenizer.json").write_text("{}")
    write_signatures(first, [picture(True, 1)])
    save_checkpoint(second, {"x": torch.zeros(2)}, {"name": "second"}, first / "tokenizer.json")
    assert (read_signatures(second) == read_signatures(first)).all()
    modules: Any = SimpleNamespace(folder=second, tokenizer="{}", meta={"name": "second"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contents, "words_of", lambda modules: None)
        assert set(contents.files_as_they_are(modules)) == {"tokenizer.json", "seen.npy"}


# --- what is refused ------------------------------------------------------------------------------------------------------------


def table_of(root: Path, text: str) -> Path:
    (root / "table.csv").write_text(text)
    return root / "table.csv"


def one_patient(root: Path) -> Path:
    for i in range(40):
        write_dicom(root / "in" / str(i % 2) / f"{i}.dcm", picture(bool(i % 2), i), "anonymous")
    return root / "in"


def broken_files(root: Path) -> Path:
    images = folder_of(root / "in", 60)
    for i in range(4):
        (images / "positive" / f"broken{i}.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    return images


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (lambda root: root / "missing", "cannot be read"),
        (lambda root: root, "has no sub-folders"),
        (lambda root: folder_of(root / "in", 40, lambda i: True), "0 pictures without it; 20 of each are needed, so 20 are missing"),
        (lambda root: folder_of(root / "in", 24), "12 pictures with the finding; 20 of each are needed, so 8 are missing"),
        (lambda root: folder_of(root / "in" / "misc").parent, "has the sub-folder 'misc'"),
        (lambda root: table_of(root, "file,class\na.png,yes\n"), "does not name the columns path and label"),
        (lambda root: table_of(root, ""), "does not name the columns path and label"),
        (lambda root: table_of(root, f"path,label\na.png,{CANARY}\n"), "line 2: its label is none of"),
        (lambda root: table_of(root, "path,label\n,yes\n"), "line 2: names no file"),
        (lambda root: table_of(root, "\n".join(["path,label", *(f"{i}.png,{i % 2}" for i in range(40))])), "40 of 40 files cannot be read"),
        (lambda root: table_of(root, "path,label\n\0"), ""),
        (broken_files, "4 of 64 files cannot be read, more than 5%"),
        (one_patient, "too few patients: 1 groups have the finding"),
    ],
)
def test_what_cannot_be_learned_from(images: Any, said: str, run: Any, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = run("train", "finding", DENSE, "--images", images(tmp_path), "--output", out, "--bundle", base, *XR_HAND)
    assert refused.code == 3 and ends_in_one_line(refused.err) and said in refused.err, refused.err
    assert refused.out == "" and not out.exists() and CANARY not in refused.err


def test_pictures_that_do_not_say_what_they_show(run: Any, base: Path, tmp_path: Path) -> None:
    refused = run("train", "finding", DENSE, "--images", folder_of(tmp_path / "in"), "--output", tmp_path / "out", "--bundle", base)
    assert refused.code == 3 and "--modality and --region" in refused.err


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fracture", (), "looks for fracture already"),
        ("fx", (), "looks for fracture already"),
        ("normal", (), "asks for something else already"),
        ("hand", (), "asks for something else already"),
        ("no finding", (), "asks for something else already"),
        ("气胸", (), "English words"),
        (DENSE, ("--ask", f"is there no {DENSE}?"), "so that a yes says that it is there"),
        (DENSE, ("--ask", "is this normal?"), "asks for something else already"),
        (DENSE, ("--region", "toe"), "choose one of hand"),
        (DENSE, ("--name", "pmclip-lite"), "is not called pmclip-lite"),
        (DENSE, ("--name", "a/b"), "is no name"),
    ],
)
def test_names_and_options(name: str, options: tuple[str, ...], said: str, run: Any, base: Path, tmp_path: Path) -> None:
    images = folder_of(tmp_path / "in")
    refused = run("train", "finding", name, "--images", images, "--output", tmp_path / "out", "--bundle", base, *XR_HAND, *options)
    assert refused.code == 2 and is_one_line(refused.err) and said in refused.err, refused.err
    assert not (tmp_path / "out").exists()


def test_the_embedded_model_and_foreign_folders_are_left_alone(run: Any, base: Path, tmp_path: Path) -> None:
    images = folder_of(tmp_path / "in")
    arguments = ("train", "finding", DENSE, "--images", images, "--bundle", base, *XR_HAND)
    assert run(*arguments, "--output", images).code == 4 and len(list(images.rglob("*.png"))) == 40
    assert run(*arguments, "--output", DEFAULT_BUNDLE).code == 2


# --- questions, manifest, power -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "finding", "polarity"),
    [
        (ASK, DENSE, True),
        (f"{DENSE}?", DENSE, True),
        (f"no {DENSE}?", DENSE, False),
        (f"free of {DENSE}?", DENSE, False),
        ("has a vertebra slipped?", DENSE, True),
        ("is there a slipped disk?", None, True),
        ("elbow fracture?", "elbow fracture", True),
        ("elbow fractures?", "elbow fracture", True),
        ("is there a fracture?", "fracture", True),
        ("zzyzx?", "zzyzx", True),
        ("are there zzyzxes?", None, True),
    ],
)
def test_what_a_bundle_was_taught_is_understood(question: str, finding: str | None, polarity: bool) -> None:
    taught = ((DENSE, ("has a vertebra slipped?",)), ("elbow fracture", ()), ("zzyzx", ()))
    intent = understood(question, taught)
    assert (intent.finding if finding else None) == finding and intent.polarity == polarity
    assert intent.answerable == (finding is not None) or finding is None
    assert understood("zzyzx?").kind != "finding"  # what one bundle was taught is no word of another's


@pytest.mark.parametrize(("name", "canonical"), [("PTX", "pneumothorax"), ("Hardware", "implant"), ("Elbow  Fracture", "elbow fracture")])
def test_a_name_is_the_lexicons_where_it_knows_it(name: str, canonical: str) -> None:
    assert name_of_finding(name) == canonical and trouble(canonical, ()) is None


STRATUM = Stratum("mr", "spine", 100, 30, 0.9, (0.85, 0.95), threshold=1.0, yes=(24, 32), no=(62, 68), slope=2.0, intercept=-2.0)
PROBE = Probe(Finding(DENSE, (STRATUM,)), ("has a vertebra slipped?",))


def test_a_manifest_keeps_probes() -> None:
    manifest = tiny_manifest(probes=(PROBE,))
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))).probes == (PROBE,)
    assert "probes" not in tiny_manifest().to_json()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"probes": (PROBE, PROBE)}, "two of its findings have one name"),
        ({"probes": (replace(PROBE, finding=Finding(DENSE, (replace(STRATUM, family="photograph"),))),)}, "family"),
        ({"probes": (replace(PROBE, finding=Finding(DENSE, (replace(STRATUM, region="other"),))),)}, "region"),
    ],
)
def test_a_manifest_with_wrong_probes(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Manifest.from_json(json.loads(json.dumps(tiny_manifest(**changes).to_json())))


def test_weights_that_were_tampered_with(run: Any, taught: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(taught, broken)
    content = bytearray((broken / "probes.npy").read_bytes())
    content[-1] ^= 1
    (broken / "probes.npy").write_bytes(content)
    refused = run("infer", write_dicom(tmp_path / "a.dcm", picture(True, 1)), ASK, "--bundle", broken)
    assert refused.code == 4 and "probes.npy has changed" in refused.err


def test_the_standard_error_is_hanleys_and_mcneils() -> None:
    """Their example: 0.893 of 51 abnormal and 58 normal CTs has a standard error of 0.032 (Radiology 143:29, 1982, table III)."""
    assert F._half_width(0.893, 51, 58) / 1.96 == pytest.approx(0.032, abs=0.001)


def test_the_number_of_pictures_that_are_missing() -> None:
    weak = replace(STRATUM, n=100, positives=30, auroc=0.77, auroc_ci95=(0.66, 0.87))
    missing = F.pictures_missing(weak)
    assert missing is not None and 50 < missing < 200
    more = (100 + missing) / 100
    assert 0.77 - 0.11 / math.sqrt(more) == pytest.approx(0.70, abs=0.01)  # the interval shrinks with the root of the number
    assert f"about {missing} more pictures like these" in F.advice(weak)
    assert F.pictures_missing(replace(weak, auroc_ci95=(0.70, 0.8))) == 0
    balanced = replace(weak, auroc_ci95=(0.75, 0.8))
    assert "more surely" in F.advice(balanced) and "two or more pictures without" in F.advice(replace(balanced, positives=45))
    for hopeless in (0.70, 0.60, 0.701):
        assert F.pictures_missing(replace(weak, auroc=hopeless, auroc_ci95=(0.5, 0.8))) is None
        assert "not expected to help" in F.advice(replace(weak, auroc=hopeless, auroc_ci95=(0.5, 0.8)))
    assert F.pictures_missing(replace(weak, auroc=1.0, auroc_ci95=(0.6, 1.0))) is not None


def test_the_ridge_is_fishers_discriminant() -> None:
    rng = np.random.default_rng(0)
    positive = np.arange(400) % 4 == 0
    x = rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5)) + positive[:, None] * np.array([1, 0, 0, 0, 0.5])
    weights = F._ridge(x, positive)[0, :-1]
    within = sum(np.cov(x[rows].T, bias=True) for rows in (positive, ~positive))
    fisher = np.linalg.solve(within, x[positive].mean(0) - x[~positive].mean(0))
    assert weights @ fisher / np.linalg.norm(weights) / np.linalg.norm(fisher) == pytest.approx(1, abs=1e-3)


def test_no_torch_is_needed() -> None:
    assert not loaded("import pmclip_deploy.train.finding, pmclip_deploy.cli.train_finding") & {"torch", "open_clip", "onnx", "safetensors"}


# --- real films -----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (DEFAULT_BUNDLE / "manifest.json").is_file(), reason="needs the embedded bundle")
def test_shoulder_films_as_if_they_were_a_hospitals(run: Any, shared: Path, tmp_path: Path) -> None:
    """FracAtlas's shoulder films: 51 of 270 fractured. Whether that is enough is for the figures to say; both ways must be plain."""
    if not (shared / "fracatlas" / "labels.jsonl").is_file():
        pytest.skip("needs FracAtlas in PMCLIP_SHARED/fracatlas")
    rows = [json.loads(line) for line in (shared / "fracatlas" / "labels.jsonl").read_text().splitlines()]
    table = tmp_path / "shoulder.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "group"))
        for row in rows:
            if row["labels"]["shoulder"]:
                writer.writerow((shared / "fracatlas" / row["image"], row["labels"]["fractured"], group_of_row(row)))
    out = tmp_path / "hospital"
    arguments = ("--images", table, "--modality", "xr", "--region", "shoulder", "--output", out)
    done = run("train", "finding", "shoulder fracture", *arguments, "--json")
    metrics = done.json["metrics"]
    left_out = metrics["left_out"].get("the image tower learned from them", 0)
    assert metrics["pictures"] + left_out == 270
    for stratum in metrics["strata"]:
        assert 0.65 < stratum["auroc"] < 0.90
        assert (stratum["reason"] is None) == (done.code == 0)
    if done.code == 0:
        yes = next(row for row in rows if row["labels"]["shoulder"] and row["labels"]["fractured"])
        answer = run("infer", shared / "fracatlas" / yes["image"], "shoulder fracture?", "--bundle", out, "--json").answer
        assert answer["understood_as"]["finding"] == "shoulder fracture"
        assert answer["worth"] is None or answer["worth"]["stratum"] == "plain films of the shoulder"
    else:
        assert done.code == 5 and ends_in_one_line(done.err) and not out.exists()
        assert "more pictures like these" in done.err or "not expected to help" in done.err
