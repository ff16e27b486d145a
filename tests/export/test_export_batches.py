"""Towers of exported bundles, a transformer's and a ResNet's: pictures and texts in batches say what they say alone, bit for bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmclip_deploy import beside
from pmclip_deploy.errors import InputError
from pmclip_deploy.export.pack import bundle_from_checkpoint
from pmclip_deploy.opening import load
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.towers import BATCH
from tests.tiny import clip as tiny_clip

PARTS = ("chest", "skull", "leg", "neck")
TEXTS = [f"{what} of the {part}{' and hand' * n}" for n in range(8) for what in ("ct", "film") for part in PARTS]


@pytest.fixture(scope="module", params=["tiny", "tiny-resnet"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    tiny_clip.add_tiny(tmp_path_factory.mktemp("configs"))
    folder = tmp_path_factory.mktemp("checkpoints") / "checkpoint"
    yield tiny_clip.checkpoint(folder, request.param, tiny_clip.lively(request.param))
    tiny_clip.remove_tiny()


@pytest.fixture(scope="module", params=["fp32", "int8"])
def bundle(request: pytest.FixtureRequest, checkpoint: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output, images = tmp_path_factory.mktemp("bundles") / "bundle", pictures if request.param == "int8" else None
    bundle_from_checkpoint(checkpoint, output, request.param, calibration_images=images)
    return output


def embedded(predictor: Predictor, images: list[Any]) -> list[bytes | str]:
    rows = predictor.embeddings_of_images(images)
    return [str(row) if isinstance(row, InputError) else row.tobytes() for row in rows]


@pytest.mark.slow("exports four bundles")
@pytest.mark.parametrize("size", [2, 3, 16])
def test_towers_say_the_same_in_batches(bundle: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    drawn = np.random.default_rng(0)
    images: list[Any] = [drawn.integers(0, 100 + i, (40, 44)).astype(np.uint8) for i in range(69)]
    images[5] = b"no picture"
    monkeypatch.setattr(beside, "cpu_threads", lambda: 1)
    one = load(bundle, "cpu")
    one.towers.sizes = dict.fromkeys(BATCH, 1)
    monkeypatch.setattr(beside, "cpu_threads", lambda: 3)
    many = load(bundle, "cpu")
    many.towers.sizes = dict.fromkeys(BATCH, size)
    alone = embedded(one, images)
    assert embedded(many, images) == alone and [i for i, row in enumerate(alone) if isinstance(row, str)] == [5]
    texts = b"".join(one.towers.of_text(text).tobytes() for text in TEXTS)
    assert many.embed_texts(TEXTS).tobytes() == one.embed_texts(TEXTS).tobytes() == texts
    quantises = {name: many.towers.quantises(name) for name in BATCH}
    graphs = {name: (bundle / one.manifest.graphs[name].file).read_bytes() for name in BATCH}
    assert quantises == {name: b"DynamicQuantizeLinear" in graph for name, graph in graphs.items()}
    assert all(many.towers._batches(name).size == 1 for name in BATCH if quantises[name])
