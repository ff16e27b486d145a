"""SigLIP's graphs and bundles against transformers: every batch and length, padding that is read, heads, and every precision."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("open_clip")
pytest.importorskip("transformers")

from torch.nn import functional as F
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pmclip_deploy.bundle.files import verify_bundle
from pmclip_deploy.export.pack import bundle_from_checkpoint
from pmclip_deploy.export.probes import QUESTIONS, TEXTS
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.opening import load
from pmclip_deploy.tokens import tokens_from_text
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import towers_from_checkpoint
from pmclip_deploy.train.importing import import_weights
from tests.command import Result
from tests.export.test_clip_graphs import check, run
from tests.tiny import clip as tiny_clip
from tests.tiny import siglip

NAME, LENGTH = "SigLIP-B/16@224", 64
LABELS = ("ct of the abdomen", "mri of the brain", "x-ray of the chest with a large pneumothorax on the left")


@pytest.fixture(scope="module", autouse=True)
def two_layers() -> Iterator[None]:
    """Of the towers' 12 layers two: all else is as published."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, NAME, siglip.shallow(NAME))
        yield


@pytest.fixture(scope="module")
def checkpoint(two_layers: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    import_weights(siglip.hub_folder(folder / "hub", NAME), folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def graphs(checkpoint: Path) -> dict[str, Any]:
    backbone, model = BACKBONES[NAME], towers_from_checkpoint(checkpoint)[0]
    with torch.inference_mode():
        return {"image": backbone.image_graph(model), "text": backbone.text_graph(model)}


def texts(*lengths: int) -> Any:
    """Tokens, the end mark, then padding to the longest, which is the same mark."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.ones(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.randint(3, 32000, (length - 1,), generator=generator)
    return tokens


@torch.inference_mode()
def of_transformers(model: Any, tokens: Any) -> Any:
    return model.get_text_features(input_ids=F.pad(tokens, (0, LENGTH - tokens.shape[1]), value=1)).pooler_output.numpy()


def test_every_batch_and_length_equals_transformers(graphs: dict[str, Any]) -> None:
    model = siglip.lively(NAME)
    for count in (1, 3):
        x = tiny_clip.pictures(224, count)
        with torch.inference_mode():
            check(model.get_image_features(pixel_values=x).pooler_output.numpy(), run(graphs["image"], x))
    for lengths in ((3,), (LENGTH, 5, 30), (20, 12), (1,)):
        check(of_transformers(model, texts(*lengths)), run(graphs["text"], texts(*lengths)))


def test_padding_is_read_and_the_graph_pads(graphs: dict[str, Any]) -> None:
    tokens = texts(12, 12)
    for length in (20, LENGTH):
        longer = F.pad(tokens, (0, length - 12), value=1)
        np.testing.assert_allclose(run(graphs["text"], longer), run(graphs["text"], tokens), rtol=0, atol=2e-5)
    longer[:, -1] = 7
    assert np.abs(run(graphs["text"], longer) - run(graphs["text"], tokens)).max() > 0.01


@pytest.mark.nightly  # bundles whose word table is of real size
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_bundles_say_what_transformers_says(
    precision: str, checkpoint: Path, pictures: Path, tmp_path: Path, command: Callable[..., Result]
) -> None:
    bundle, calibrated = tmp_path / "bundle", {"calibration_images": pictures} if precision == "int8" else {}
    made = bundle_from_checkpoint(checkpoint, bundle, precision, labels=LABELS, **calibrated).manifest
    assert verify_bundle(bundle) == made and (made.backbone, made.precision, made.context_length) == (NAME, precision, LENGTH)
    assert (made.logit_scale, made.logit_bias) == (117.4045, siglip.BIAS)
    assert precision != "int8" or all(made.graphs[name].precision == "int8" for name in ("image", "text"))
    model, predictor, files = siglip.lively(NAME), load(bundle, "cpu"), sorted(pictures.glob("*.png"))
    image, text = embedded(model, [picture_from_path(x).pixels for x in files], checkpoint, list(LABELS), 3)
    least = {"fp32": 0.99999, "fp16": 0.9999, "int8": 0.97}[precision]
    for of, ours in zip((image, text), (np.stack([predictor.embed_image(x) for x in files]), predictor.embed_texts(LABELS)), strict=True):
        assert F.cosine_similarity(of, torch.from_numpy(ours)).numpy().min() > least
    logits = 117.4045 * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T + siglip.BIAS
    for labels in ((), LABELS):  # the bundle's own, and given ones
        done = command("classify", files[0], *labels, "--bundle", bundle, "--json")
        found = {row["label"]: row for row in done.json["classifications"][0]["labels"]}
        assert done.code == 0 and set(found) == set(LABELS)
        for i, label in enumerate(LABELS):
            assert found[label]["share"] is None
            if precision == "fp32":
                assert found[label]["score"] == pytest.approx(float(logits[0, i]), abs=2e-3)
                assert found[label]["probability"] == pytest.approx(float(logits[0, i].sigmoid()), rel=2e-3)
    index = tmp_path / "index"
    assert command("search", "index", pictures, "--output", index, "--bundle", bundle).code == 0
    found = command("search", "query", index, files[0], "--bundle", bundle, "--k", 1, "--json")
    assert found.code == 0 and files[0].name in found.json["matches"][0]["id"]


@torch.inference_mode()
def embedded(model: Any, pictures: list[Any], checkpoint: Path, said: list[str], resample: int) -> tuple[Any, Any]:
    """(image, text), as transformers computes them of pictures and tokens."""
    size, pad_id = model.config.vision_config.image_size, 0 if model.config.text_config.vocab_size == 256000 else 1
    half, side = [0.5] * 3, {"height": size, "width": size}
    processor = SiglipImageProcessorPil(resample=resample, size=side, image_mean=half, image_std=half)
    coloured = [x if x.ndim == 3 else np.repeat(x[:, :, None], 3, 2) for x in pictures]
    pixels = [torch.from_numpy(np.asarray(processor(x, input_data_format="channels_last")["pixel_values"][0]))[None] for x in coloured]
    tokens = torch.from_numpy(tokens_from_text(checkpoint / "tokenizer.json", said, LENGTH, pad_id, LENGTH))
    image = [model.get_image_features(pixel_values=x).pooler_output for x in pixels]
    return torch.cat(image), torch.cat([model.get_text_features(input_ids=x[None]).pooler_output for x in tokens])


@pytest.mark.nightly  # two bundles with heads
@pytest.mark.parametrize(("head", "precision", "target"), [("mevf", "int8", "cpu"), ("qcr", "int8", "rtx")])
def test_heads_stand_on_its_towers(head: str, precision: str, target: str, checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    tokenizer = (checkpoint / "tokenizer.json").read_text(encoding="utf-8")
    folder = tiny_clip.head_checkpoint(tmp_path / "head", NAME, head, model=towers_from_checkpoint(checkpoint)[0], tokenizer=tokenizer)
    bundle_from_checkpoint(folder, tmp_path / "bundle", precision, target=target, calibration_images=pictures)
    assert load(tmp_path / "bundle", "cpu").ask(pictures / "CT_small.png", "is there a fracture?").candidates


@pytest.mark.nightly  # the whole models: docs/measured/export.md has their figures
@pytest.mark.parametrize(("name", "layers", "resample"), [("SigLIP2-B/16@224", 12, 2), ("MedSigLIP", 2, 2), ("MedSigLIP", 27, 2)])
def test_the_whole_model_equals_transformers(
    name: str, layers: int, resample: int, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 pictures and 20 texts, through import and export; 9 GB of disk and 16 GB of memory for all 27 layers of MedSigLIP."""
    monkeypatch.setitem(BACKBONES, name, siglip.shallow(name, layers))
    hub, checkpoint, bundle = (tmp_path / part for part in ("hub", "checkpoint", "bundle"))
    siglip.hub_folder(hub, name, layers, resample=resample)
    assert import_weights(hub, checkpoint)["backbone"] == name
    few = [picture_from_path(path).pixels for path in sorted(pictures.glob("*.png"))]
    shown = [np.ascontiguousarray(np.rot90(few[i % len(few)], i // len(few))) for i in range(20)]
    said = [*QUESTIONS, *TEXTS][:20]
    image, text = embedded(siglip.lively(name, layers), shown, checkpoint, said, resample)
    siglip.lively.cache_clear()
    for file in hub.iterdir():
        file.unlink()
    bundle_from_checkpoint(checkpoint, bundle, "fp32")
    predictor = load(bundle, "cpu")
    logits = []
    for of, ours in ((image, np.stack([predictor.embed_image(x) for x in shown])), (text, predictor.embed_texts(said))):
        cosines = F.cosine_similarity(of, torch.from_numpy(ours)).numpy()
        print(f"{name}: {len(cosines)} embeddings, least cosine {cosines.min():.8f}")
        assert len(cosines) == 20 and cosines.min() > 0.9999
        logits.append((F.normalize(of, dim=-1), F.normalize(torch.from_numpy(ours), dim=-1)))
    scale, bias = predictor.manifest.logit_scale, predictor.manifest.logit_bias
    theirs, mine = (scale * logits[0][i] @ logits[1][i].T + bias for i in (0, 1))
    print(f"{name}: logits {theirs.min():.2f} to {theirs.max():.2f}, largest difference {(theirs - mine).abs().max():.2e}")
    assert (theirs - mine).abs().max() < 0.01 and theirs.std() > 0.1
