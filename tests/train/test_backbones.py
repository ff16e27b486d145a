"""What a backbone is stands in one file: another file adds one, and nothing outside ``train/backbones/`` asks which one it has."""

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytest.importorskip("open_clip", reason="training needs the extra `train`")

from safetensors.torch import load_file

from pmclip_deploy.export.precisions import PRECISIONS
from pmclip_deploy.train.backbones import BACKBONES, DEFAULT
from tests.sources import FOLDERS, ROOT
from tests.tiny import clip as tiny_clip
from tests.tree import Tree

ITS_OWN = ("train/backbones/", "pmclip_deploy/models/")
PEERS = ("benchmarks/peers.py", "benchmarks/systems.py")


def sources() -> Iterator[tuple[str, ast.Module]]:
    for top in FOLDERS:
        for folder, _, names in os.walk(ROOT / top):  # which follows no links
            for name in sorted(names):
                path = Path(folder, name)
                if name.endswith(".py") and not (at := path.relative_to(ROOT).as_posix()).startswith(ITS_OWN):
                    yield at, ast.parse(path.read_text(encoding="utf-8"))


def imported_from(tree: ast.Module, packages: set[str]) -> set[str]:
    """The names under which a file has modules, classes and functions of ``packages``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in packages:
            names |= {of.asname or of.name for of in node.names}
        elif isinstance(node, ast.Import):
            names |= {of.asname or of.name.split(".")[0] for of in node.names if of.name.split(".")[0] in packages}
    return names


def class_tests(tree: ast.Module, names: set[str]) -> list[int]:
    """The lines that ask whether something is of a class among ``names``."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    asked = [n for n in calls if n.func.id in ("isinstance", "issubclass")]
    return [n.lineno for n in asked if any(isinstance(x, ast.Name) and x.id in names for x in ast.walk(n.args[1]))]


def test_the_walk_finds_what_it_looks_for() -> None:
    imports, tests = "import timm.layers\nfrom open_clip import CLIP as C\n", "isinstance(x, (int, C))\nisinstance(x, timm.layers.Y)\n"
    tree = ast.parse(f"{imports}{tests}isinstance(x, int)")
    assert class_tests(tree, imported_from(tree, {"open_clip", "timm"})) == [3, 4]


def test_nothing_else_asks_for_a_backbones_name_or_class() -> None:
    found, seen = [], 0
    for at, tree in sources():
        seen += 1
        found += [f"{at}:{line}" for line in class_tests(tree, imported_from(tree, {"open_clip", "timm"}))]
        if at not in PEERS:
            found += [f"{at}:{n.lineno}" for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in list(BACKBONES)]
    assert not found and seen > 150
    assert DEFAULT in BACKBONES


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A copy of the sources with one file more."""
    made = Tree(tmp_path_factory.mktemp("tree"))
    made.write("a backbone", "train/backbones/toy.py", (ROOT / "tests" / "tiny" / "backbone.py").read_text(encoding="utf-8"))
    return made


@pytest.mark.nightly  # imports, trains, exports three precisions and asks, each in a process of its own
def test_one_file_adds_a_backbone(tree: Tree, tmp_path: Path) -> None:
    """It is imported, trained with its own loss, exported at each precision behind the gates, and asked."""
    pytest.importorskip("onnx", reason="export needs the extra `export`")
    published, images = tmp_path / "published.safetensors", tiny_clip.captions(tmp_path / "data")
    made = tree.runs(published, code=WEIGHTS)
    assert made.strip() == str(tree.folder / "pmclip_deploy" / "train" / "backbones" / "toy.py")
    found = json.loads(tree.runs("import", published, "--output", tmp_path / "toy", "--json"))
    assert (found["backbone"], found["kind"]) == ("toy", "toy")
    trained = tmp_path / "trained"
    tree.runs("train", "clip", "--from", tmp_path / "toy", "--data", images, "--output", trained,
              "--epochs", 1, "--batch-size", 8, "--learning-rate", 1e-3, "--threads", 1)  # fmt: skip
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "toy", trained))
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    measured = json.loads((trained / "checkpoint.json").read_text())["metrics"]["retrieval_validation"]
    assert measured["validation_loss"] > 10  # its own loss: the contrastive one of 6 pairs would be about log 6
    for precision in PRECISIONS:
        calibration = ["--calibration-images", images / "images"] if precision == "int8" else []
        tree.runs("export", trained, "--precision", precision, "--output", tmp_path / precision, *calibration)
        assert json.loads((tmp_path / precision / "manifest.json").read_text())["backbone"] == "toy"
    picture = images / "images" / "val0.png"
    (answer,) = json.loads(tree.runs("classify", picture, "white", "black", "--bundle", tmp_path / "int8", "--json"))["classifications"]
    assert {row["label"] for row in answer["labels"]} == {"white", "black"}


WEIGHTS = """
import inspect, sys
import torch
from safetensors.torch import save_file
from pmclip_deploy.train.backbones import BACKBONES
torch.manual_seed(0)
save_file({f"toy.{name}": x for name, x in BACKBONES["toy"].build().state_dict().items()}, sys.argv[1])
print(inspect.getfile(type(BACKBONES["toy"])))
"""
