"""PMC-CLIP in both published layouts: against open_clip's ResNet and transformers' BERT, its tokenizer, and files that are not whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytest.importorskip("open_clip", reason="training needs the extra `train`")
transformers = pytest.importorskip("transformers", reason="training needs the extra `train`")

from torch.nn import functional as F

from pmclip_deploy.errors import BundleError
from pmclip_deploy.tokens import tokens_from_text
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import towers_from_checkpoint
from pmclip_deploy.train.importing import import_weights
from tests.command import Result
from tests.tiny import pmc
from tests.tiny.clip import pictures
from tests.train.test_towers import TEXTS

KINDS = list(pmc.NAMES)


@pytest.fixture(autouse=True)
def two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of BERT's 12 layers two: all else is as published."""
    for kind, name in pmc.NAMES.items():
        monkeypatch.setitem(BACKBONES, name, pmc.shallow(kind))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("published")
    return {kind: pmc.folder_of(kind, top / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def checkpoints(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("imported")
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in pmc.NAMES.items():
            patch.setitem(BACKBONES, name, pmc.shallow(kind))
            import_weights(pmc.source_of(kind, folders[kind]), top / kind)
    return {kind: top / kind for kind in KINDS}


def test_the_layout_is_the_published_one() -> None:
    """As many numbers as RN50's trunk with a pool of 768, and as BERT-base with its pooler."""
    state = pmc.lively()
    assert tuple(state["visual.attnpool.positional_embedding"].shape) == (50, 2048)
    assert tuple(state["visual.attnpool.c_proj.weight"].shape) == (768, 2048)
    with torch.device("meta"):
        whole = pmc.shallow("parts", 12).build().state_dict()
    assert sum(x.numel() for name, x in whole.items() if name.startswith("text_encoder.")) == 109_482_240
    assert whole.keys() - pmc.lively().keys() <= {k for k in whole if ".layer." in k}  # of the ten layers more


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_embeddings_equal_the_authors(kind: str, checkpoints: dict[str, Path]) -> None:
    model, meta, _ = towers_from_checkpoint(checkpoints[kind])
    assert meta["backbone"] == pmc.NAMES[kind]
    scale = {"checkpoint": 4.25, "parts": pmc.SCALE}[kind]
    assert meta["logit_scale"] == round(float(torch.tensor(scale).exp()), 4)
    pixels = pictures(224, 3)
    tokens = torch.from_numpy(tokens_from_text(checkpoints[kind] / "tokenizer.json", TEXTS, 77, 0, 77))
    image, text = pmc.reference(kind, pixels, tokens)
    for embeddings in (image, text):  # which differ from each other, so that a tower that ignores its input fails
        unit = F.normalize(embeddings, dim=-1)
        assert embeddings.std() > 0.1 and (unit[0] - unit[-1]).norm() > 0.1
    torch.testing.assert_close(model.encode_image(pixels), image, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.encode_text(tokens), text, atol=1e-4, rtol=1e-4)
    shorter = torch.from_numpy(tokens_from_text(checkpoints[kind] / "tokenizer.json", TEXTS[:6], 77, 0))
    assert shorter.shape[1] < 64
    torch.testing.assert_close(model.encode_text(shorter), text[:6], atol=1e-4, rtol=1e-4)  # padded in the tower

    # The comparison sees what the two ways differ in, and that padding counts.
    other_image, other_text = pmc.reference(KINDS[kind == KINDS[0]], pixels, tokens)
    assert (other_image - image).abs().max() > 0.01 and (other_text - text).abs().max() > 0.1
    assert (pmc.reference(kind, pixels[:1], shorter)[1] - text[:6]).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_graphs_equal_the_towers(kind: str, checkpoints: dict[str, Path]) -> None:
    """Each graph by itself, on texts of one length and of several."""
    pytest.importorskip("onnx", reason="export needs the extra `export`")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, meta, _ = towers_from_checkpoint(checkpoints[kind])
    backbone = BACKBONES[meta["backbone"]]
    pixels = pictures(224, 2)
    session = onnxruntime.InferenceSession(backbone.image_graph(model).SerializeToString())
    (image,) = session.run(None, {"pixels": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(image), model.encode_image(pixels), atol=1e-3, rtol=1e-3)
    session = onnxruntime.InferenceSession(backbone.text_graph(model).SerializeToString())
    for length in (None, 77):
        tokens = tokens_from_text(checkpoints[kind] / "tokenizer.json", TEXTS[:5], 77, 0, length)
        (text,) = session.run(None, {"tokens": tokens})
        torch.testing.assert_close(torch.from_numpy(text), model.encode_text(torch.from_numpy(tokens)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("text", [*TEXTS[:4], "&lt;3 cm &amp; more", "x " * 400], ids=range(6))
def test_tokens_equal_transformers(text: str, folders: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    """The authors clean no text, so an HTML entity stays one."""
    tokenizer = transformers.BertTokenizerFast(tokenizer_file=str(folders["parts"] / "tokenizer.json"))
    wanted = tokenizer(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
    (ids,) = tokens_from_text(checkpoints["parts"] / "tokenizer.json", [text], 77, 0, 77).tolist()
    assert ids == wanted


def test_the_parts_as_the_training_code_computes(folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """--backbone says so; a part of the three names them all."""
    made = import_weights(folders["parts"] / "text_encoder.pth", tmp_path / "out", "PMC-CLIP")
    assert made["backbone"] == "PMC-CLIP" and set(made["provenance"]["import"]["shards"]) == set(pmc.PARTS.values())
    ours, theirs = (towers_from_checkpoint(folder)[0] for folder in (tmp_path / "out", checkpoints["checkpoint"]))
    pixels = pictures(224, 1)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(pixels), theirs.encode_image(pixels))


def test_the_command_says_what_it_assumed(folders: dict[str, Path], tmp_path: Path, command: Callable[..., Result]) -> None:
    made = command("import", folders["parts"], "--output", tmp_path / "out")
    assert made.code == 0 and "PMC-CLIP-parts from a PMC-CLIP's three files" not in made.out
    assert "assumed: a logit scale of 83.86, since the weights have none" in made.out, made.out + made.err
    meta = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    assert meta["provenance"]["import"]["assumed"] == ["a logit scale of 83.86, since the weights have none"]
    made = command("import", folders["checkpoint"] / "checkpoint.pt", "--output", tmp_path / "other")
    assert made.code == 0 and "PMC-CLIP from a PMC-CLIP training checkpoint" in made.out and "assumed" not in made.out


def linked(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).hardlink_to(file)
    return copy


def refused(source: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        import_weights(source, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_part_that_is_missing_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = linked(folders["parts"], tmp_path)
    (folder / "text_projection_layer.pth").unlink()
    refused(folder, tmp_path, "and not text_projection_layer.pth; put all of them in one folder")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("text_projection_layer.pth", lambda x: x[:, :512].clone(), "text_projection is 768x512, must be 768x768"),
        ("text_projection_layer.pth", lambda x: x * torch.nan, "1 tensors hold NaN or infinity: text_projection"),
        ("text_encoder.pth", lambda x: [1], "no weights that can be read"),
        ("image_encoder(resnet50).pth", lambda x: {k: v for k, v in x.items() if "layer4" not in k}, "missing: logit_scale, visual.layer4"),
    ],
)
def test_a_part_that_does_not_fit_is_named(
    name: str, change: Callable[[Any], Any], said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = linked(folders["parts"], tmp_path)
    content = change(torch.load(folder / name, weights_only=True))
    (folder / name).unlink()
    torch.save(content, folder / name)
    refused(folder, tmp_path, said)


def test_no_tokenizer_is_no_import(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = linked(folders["parts"], tmp_path)
    (folder / "tokenizer.json").unlink()
    refused(folder, tmp_path, "has no tokenizer.json; put the tokenizer.json of PMC-CLIP-parts beside the weights")
