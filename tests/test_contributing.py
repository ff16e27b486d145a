"""CONTRIBUTING's table is true: the files that it names are all that a dataset, a precision, a command and a finding need.

Each toy is added to a copy of the sources, and a command of that copy uses it. A backbone: tests/train/test_backbones.py. A backend:
tests/sessions/test_sessions.py.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmclip_deploy.models import DEFAULT_CHECKPOINT
from tests.command import MAIN
from tests.sources import ROOT
from tests.tiny.bundle import facets_bundle
from tests.tiny.findings import FINDINGS, HAND
from tests.train.test_train_finding import DENSE, XR_HAND, folder_of
from tests.tree import Tree, written


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    made = Tree(tmp_path_factory.mktemp("tree"))
    made.write("a backbone", "train/backbones/toy.py", (ROOT / "tests" / "tiny" / "backbone.py").read_text(encoding="utf-8"))
    return made


@pytest.fixture(scope="module")
def checkpoint(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the toy backbone, which is small."""
    pytest.importorskip("torch", reason="training needs the extra `train`")
    pytest.importorskip("open_clip", reason="training needs the extra `train`")
    folder = tmp_path_factory.mktemp("checkpoint")
    tree.runs("import", folder / "toy.safetensors", "--output", folder / "toy", code=f"{WEIGHTS}; {MAIN}")
    return folder / "toy"


WEIGHTS = """
import sys
import torch
from safetensors.torch import save_file
from pmclip_deploy.train.backbones import BACKBONES
torch.manual_seed(0)
save_file({f"toy.{name}": x for name, x in BACKBONES["toy"].build().state_dict().items()}, sys.argv[2])"""


def picture(path: Path, seed: int, bar: bool = False) -> None:
    pixels = np.random.default_rng(seed).integers(20, 120, (90, 70), dtype=np.uint8)
    if bar:
        pixels[30:45, 20:50] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


# --- a command ------------------------------------------------------------------------------------------------------------------

COMMAND = '''
from typing import Annotated

import typer

from pmclip_deploy.errors import UsageError


def toy(wheels: Annotated[int, typer.Argument(help="How many.")]) -> None:
    """Count the wheels of a toy."""
    if wheels < 0:
        raise UsageError("a toy has no fewer than 0 wheels", "give another number")
    print(f"a toy of {wheels} wheels")
'''


def test_a_command(tree: Tree) -> None:
    tree.write("a command", "pmclip_deploy/cli/toy.py", COMMAND)
    tree.edit("a command", "pmclip_deploy/cli/app.py", ("COMMANDS = {", 'COMMANDS = {\n    "toy": "toy.toy",'))
    assert tree.runs("toy", 4) == "a toy of 4 wheels\n"
    assert "Count the wheels of a toy." in tree.runs("--help")
    code, said = tree.fails("toy", "--", -1)
    assert code == 2 and "a toy has no fewer than 0 wheels; give another number" in said


# --- a dataset ------------------------------------------------------------------------------------------------------------------

DATASET = '''
from pathlib import Path

from pmclip_deploy.train.datasets.schema import Layout, Question, is_there, lines_from_text, question_from_text


def questions_from_toy(folder: Path, split: str) -> list[Question]:
    rows = [line.split(";") for _, line in lines_from_text(folder / f"{split}.toy")]
    return [question_from_text(folder / "images" / image, question, answer, "abnormality") for image, question, answer in rows]


LAYOUT: Layout[Question] = Layout(
    "Toy", "train.toy", lambda folder: tuple(s for s in ("train", "test") if is_there(folder / f"{s}.toy")), questions_from_toy
)
'''


@pytest.fixture(scope="module")
def dataset(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree.write("a dataset", "train/datasets/toy.py", DATASET)
    tree.edit(
        "a dataset",
        "train/datasets/__init__.py",
        ("shards, slake, vqa_med", "shards, slake, toy, vqa_med"),
        ("slake.LAYOUT)", "slake.LAYOUT, toy.LAYOUT)"),
    )
    folder = tmp_path_factory.mktemp("dataset")
    for split, count in (("train", 12), ("test", 4)):
        for i in range(count):
            picture(folder / "images" / f"{split}{i}.png", 100 * count + i, i % 2 == 0)
        lines = [f"{split}{i}.png;is there a bar?;{'no' if i % 2 else 'yes'}\n" for i in range(count)]
        (folder / f"{split}.toy").write_text("".join(lines))
    return folder


def test_a_dataset(tree: Tree, dataset: Path, tmp_path: Path) -> None:
    found = json.loads(tree.runs("train", "report", "--data", dataset, "--json"))
    assert found["dataset"] == "Toy" and found["splits"]["train"]["answers"]["closed"]["majority_share"] == 0.5
    assert [(name, of["questions"], of["images_missing"]) for name, of in found["splits"].items()] == [("train", 12, 0), ("test", 4, 0)]
    code, said = tree.fails("train", "report", "--data", tmp_path)
    assert code == 3 and "; Toy (train.toy);" in said


@pytest.mark.slow("imports a checkpoint and trains a head, each in a process of its own")
def test_a_head_is_trained_on_a_dataset(tree: Tree, dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    words = [f"{word} {' '.join(f'{draw.gauss(0, 1):.3f}' for _ in range(6))}\n" for word in ("is", "there", "a", "bar")]
    (tmp_path / "glove.txt").write_text("".join(words))
    arguments = ("--head", "mevf", "--glove", tmp_path / "glove.txt", "--epochs", 1, "--batch-size", 4, "--hidden", 16, "--threads", 1)
    tree.runs("train", "vqa", "--data", dataset, "--clip", checkpoint, "--output", tmp_path / "head", *arguments)
    meta = json.loads((tmp_path / "head" / "checkpoint.json").read_text())
    assert sorted(meta["answers"]) == ["no", "yes"] and meta["backbone"] == "toy"


# --- a precision ----------------------------------------------------------------------------------------------------------------

PRECISION = '''
from pmclip_deploy.export.precisions.base import Precision, Recipe


def cut(model):
    """Weights of 16 bits: those of bfloat16."""
    import numpy as np
    from onnx import ModelProto, TensorProto

    out = ModelProto()
    out.CopyFrom(model)
    for weight in out.graph.initializer:
        if weight.data_type == TensorProto.FLOAT:
            weight.raw_data = (np.frombuffer(weight.raw_data, np.uint32) & 0xFFFF0000).tobytes()
    return out


def recipes(work):
    yield Recipe({name: cut(model) for name, model in work.graphs.items()}, precisions=dict.fromkeys(work.graphs, "NAME"))


PRECISION = Precision("NAME", 16, GATE, recipes)
'''


@pytest.mark.slow("imports a checkpoint, exports it twice and asks, each in a process of its own")
def test_a_precision(tree: Tree, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="export needs the extra `export`")
    for name, gate in (("toy", '{"cosine": 0.99}'), ("exact", '{"max_abs": 0}')):
        tree.write("a precision", f"export/precisions/{name}.py", PRECISION.replace("NAME", name).replace("GATE", gate))
    assert "fp32, exact, fp16, toy, int8." in tree.runs("export", "--help")
    export = ("export", checkpoint, "--precision")
    document = json.loads(tree.runs(*export, "toy", "--output", tmp_path / "toy", "--json"))
    assert document["precision"] == "toy" and 0.99 < document["parity"]["tensors"]["image"]["cosine"] <= 1
    code, said = tree.fails(*export, "exact", "--output", tmp_path / "exact")
    assert code == 5 and "exact misses parity with fp32 PyTorch: " in said and not (tmp_path / "exact").exists()
    code, said = tree.fails(*export, "toy", "--output", tmp_path / "calibrated", "--calibration-images", tmp_path)
    assert code == 2 and "are for --precision int8" in said
    picture(tmp_path / "bar.png", 1, bar=True)
    done = json.loads(tree.runs("classify", tmp_path / "bar.png", "white", "black", "--bundle", tmp_path / "toy", "--json"))
    (labels,) = done["classifications"]
    assert labels["model"]["precision"] == "toy" and len(labels["labels"]) == 2


# --- a finding ------------------------------------------------------------------------------------------------------------------

FINDING = "a finding of the embedded model"


@pytest.fixture(scope="module")
def with_finding(tree: Tree) -> Tree:
    """``toyoma``, of which Kermany's layout says something and the others nothing."""
    tree.edit(
        FINDING,
        "train/findings/films.py",
        ('FINDINGS = ("fracture", "pneumonia")', 'FINDINGS = ("fracture", "pneumonia", "toyoma")'),
        ('== "pneumonia"),', '== "pneumonia", toyoma=row["labels"]["cause"] == "toy"),'),
        ("NO_RADIOLOGY, HELD_OUT, SEED = 900, 200, 11", "NO_RADIOLOGY, HELD_OUT, SEED = 8, 3, 11"),  # to be done sooner
    )
    tree.edit(FINDING, "pmclip_deploy/questions/lexicon.txt", ("\n[finding]\n", "\n[finding]\ntoyoma: toyoma, toy shadow\n"))
    tree.edit(FINDING, "pmclip_deploy/decision/rules.py", ('COUNTED = ("fracture",)', 'COUNTED = ("fracture", "toyoma")'))
    return tree


def test_a_finding_is_asked_for(with_finding: Tree, tmp_path: Path) -> None:
    of = replace(FINDINGS.findings[0], name="toyoma", strata=(replace(HAND, threshold=0.0),))
    bundle = facets_bundle(tmp_path / "bundle", replace(FINDINGS, findings=(*FINDINGS.findings, of)))
    assert "is there a toyoma?" in with_finding.runs("questions", "--bundle", bundle)
    Image.fromarray(np.random.default_rng(0).integers(200, 256, (40, 30)).astype(np.uint8)).save(tmp_path / "bright.png")
    for question, said in (("is there a toyoma?", "yes"), ("is there no toy shadow?", "no")):
        (answer,) = json.loads(with_finding.runs("infer", tmp_path / "bright.png", question, "--bundle", bundle, "--json"))["answers"]
        assert answer["understood_as"]["finding"] == "toyoma" and answer["answer"] == said, answer


@pytest.mark.nightly  # three folds and the whole, of a network of real size
def test_a_finding_is_trained_and_measured(with_finding: Tree, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training needs the extra `train`")
    rows = []
    for i in range(18):
        name = f"person{i}_virus_{i}.png"
        picture(tmp_path / "kermany" / "images" / name, i, i % 3 == 0)
        labels = {"finding": "pneumonia" if i % 2 else "normal", "cause": None if i % 3 else "toy"}
        rows.append({"image": f"images/{name}", "group": f"Pperson{i}", "original_size": [70, 90], "labels": labels})
    (tmp_path / "kermany" / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--checkpoint", DEFAULT_CHECKPOINT, "--folds", 3, "--epochs", 1, "--batch-size", 2, "--threads", 1)
    with_finding.runs("train", "findings", "--data", tmp_path / "kermany", "--output", tmp_path / "out", *arguments)
    meta = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    assert [of["name"] for of in meta["findings"]["findings"]] == ["fracture", "pneumonia", "toyoma"]
    assert [s["region"] for s in meta["findings"]["findings"][2]["strata"]] == ["chest"]
    assert meta["metrics"]["findings toyoma"]["n"] == 18


def test_a_finding_of_a_bundle_needs_no_file(tree: Tree, tmp_path: Path) -> None:
    assert written("a finding of a bundle of yours").startswith("nothing: ")
    base, out = facets_bundle(tmp_path / "base", FINDINGS), tmp_path / "ward-7"
    pictures = folder_of(tmp_path / "pictures", 80)
    tree.runs("train", "finding", DENSE, "--images", pictures, "--bundle", base, "--output", out, *XR_HAND)
    assert DENSE in tree.runs("questions", "--bundle", out)
