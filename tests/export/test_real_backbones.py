"""Every family of backbones in its published shape, with a head, at every precision for every target. All of it is nightly.

With `-s` each bundle's least cosines are printed: docs/measured/export.md has them.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("open_clip")
pytest.importorskip("transformers")

from open_clip.modified_resnet import ModifiedResNet

from pmclip_deploy.export.engines import EngineOptions
from pmclip_deploy.export.pack import bundle_from_checkpoint
from pmclip_deploy.export.precisions import PRECISIONS
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import towers_from_checkpoint
from pmclip_deploy.train.importing import import_weights
from tests.tiny import biomed, hub, pmc, siglip
from tests.tiny import clip as tiny_clip

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("ranked_on_two_pictures")]

OPENAI = ("RN50", "RN50x4", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336")
# The files of a model as they are published, written into a folder: what `import` reads.
PUBLISHED: dict[str, Callable[[Path], Path]] = {
    "BiomedCLIP": lambda folder: biomed.hub_folder(folder, biomed.lively(12)),
    "PMC-CLIP": lambda folder: pmc.source_of("checkpoint", pmc.folder_of("checkpoint", folder, 12)),
    "PMC-CLIP-parts": lambda folder: pmc.folder_of("parts", folder, 12),
    "SigLIP-B/16@224": lambda folder: siglip.hub_folder(folder, "SigLIP-B/16@224", 12),
    "SigLIP2-B/16@224": lambda folder: siglip.hub_folder(folder, "SigLIP2-B/16@224", 12, resample=2),
    "MedSigLIP": lambda folder: siglip.hub_folder(folder, "MedSigLIP", 27, resample=2),
}
HEADS = {"cpu": "mevf", "rtx": "qcr"}  # of a target


@pytest.mark.parametrize("target", HEADS)
@pytest.mark.parametrize("name", OPENAI)
def test_openais_backbones_export_at_every_precision(name: str, target: str, pictures: Path, tmp_path: Path) -> None:
    model = tiny_clip.lively(name, shown(name, pictures))
    check(tiny_clip.head_checkpoint(tmp_path / "head", name, HEADS[target], 1024, model), target, pictures, tmp_path / "bundle")


@pytest.mark.parametrize("target", HEADS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_whole_backbone_exports_at_every_precision(name: str, target: str, pictures: Path, tmp_path: Path) -> None:
    """MedSigLIP takes 9 GB of disk and 16 GB of memory."""
    check(imported(name, PUBLISHED[name](tmp_path / "hub"), target, pictures, tmp_path), target, pictures, tmp_path / "bundle")


@pytest.mark.parametrize("target", HEADS)
def test_medsiglip_with_two_of_its_layers(target: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 27 layers in each tower two: all else is as published."""
    monkeypatch.setitem(BACKBONES, "MedSigLIP", siglip.shallow("MedSigLIP"))
    published = siglip.hub_folder(tmp_path / "hub", "MedSigLIP", resample=2)
    check(imported("MedSigLIP", published, target, pictures, tmp_path), target, pictures, tmp_path / "bundle")


@pytest.mark.parametrize("target", HEADS)
@pytest.mark.parametrize("name", hub.MODELS)
def test_every_kind_of_open_clip_config(name: str, target: str, pictures: Path, tmp_path: Path) -> None:
    """Small models, towers alone."""
    import_weights(hub.folder_of(name, tmp_path / "hub", hub.model_of(name, tmp_path / "bert")), tmp_path / "checkpoint")
    check(tmp_path / "checkpoint", target, pictures, tmp_path / "bundle")


def imported(name: str, published: Path, target: str, pictures: Path, folder: Path) -> Path:
    """The checkpoint of the towers with the target's head; what made them is removed, for it may be gigabytes."""
    import_weights(published, folder / "towers")
    siglip.lively.cache_clear()
    rmtree(folder / "hub")
    model, tokenizer = towers_from_checkpoint(folder / "towers")[0], (folder / "towers" / "tokenizer.json").read_text(encoding="utf-8")
    if isinstance(model.visual, ModifiedResNet):
        tiny_clip.look_at(model.visual, shown(name, pictures))
        tiny_clip.calm(model.visual)
    return tiny_clip.head_checkpoint(folder / "head", name, HEADS[target], 1024, model, tokenizer)


def shown(name: str, pictures: Path) -> torch.Tensor:
    real = [tensor_from_pixels(picture_from_path(path).pixels, BACKBONES[name].preprocess) for path in sorted(pictures.glob("*.png"))]
    return torch.from_numpy(np.stack(real))


def check(checkpoint: Path, target: str, pictures: Path, bundle: Path) -> None:
    """Every gate is kept; for RTX an engine of each graph is built, if its builder is here."""
    ahead = EngineOptions("tensorrt_rtx", ("8.9",)) if target == "rtx" and find_spec("tensorrt_rtx") else None
    for precision, of in PRECISIONS.items():
        calibrated = {"calibration_images": pictures} if of.calibrated else {}
        made = bundle_from_checkpoint(checkpoint, bundle, precision, target=target, engines=ahead, **calibrated).manifest
        assert (made.precision, made.target) == (precision, target)
        assert {engine.graph for engine in made.engines} == (set(made.graphs) if ahead else set())
        least = ", ".join(f"{graph} {of['cosine']:.5f} of {of['n']}" for graph, of in made.parity["tensors"].items())
        print(f"\n{made.backbone} {precision} {target}: least cosine {least}; {sum(of.bytes for of in made.files.values()) / 1e6:.0f} MB")
