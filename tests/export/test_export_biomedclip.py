"""BiomedCLIP's graphs against open_clip in PyTorch, and its bundles at every precision, with and without heads."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

from PIL import Image
from torch.nn import functional as F

from pmclip_deploy.bundle.files import verify_bundle
from pmclip_deploy.export.pack import bundle_from_checkpoint
from pmclip_deploy.export.probes import QUESTIONS, TEXTS
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.opening import load
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.importing import import_weights
from tests.command import Result
from tests.export.test_clip_graphs import check, run
from tests.tiny import biomed
from tests.tiny import clip as tiny_clip

CLS, SEP, LIMIT = 101, 102, 256
LABELS = ("a ct of the abdomen", "an mri of the brain", "a chest x-ray with a large pneumothorax on the left")


@pytest.fixture(scope="module", autouse=True)
def two_layers() -> Iterator[None]:
    """Of the towers' 12 layers two: all else is as published."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, biomed.NAME, biomed.shallow())
        yield


@pytest.fixture(scope="module")
def graphs() -> dict[str, Any]:
    backbone, model = biomed.shallow(), biomed.lively()
    with torch.inference_mode():
        return {"image": backbone.image_graph(model), "text": backbone.text_graph(model)}


def texts(*lengths: int) -> Any:
    """Tokens, then padding to the longest."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1000, 30000, (length,), generator=generator)
        row[0], row[length - 1] = CLS, SEP
    return tokens


@torch.inference_mode()
def test_every_batch_and_length_equals_open_clip(graphs: dict[str, Any]) -> None:
    model = biomed.lively()
    for count in (1, 3):
        x = tiny_clip.pictures(224, count)
        check(model.encode_image(x).numpy(), run(graphs["image"], x))
    for lengths in ((3,), (LIMIT, 5, 30), (20, 12)):
        x = texts(*lengths)
        check(model.encode_text(x).numpy(), run(graphs["text"], x))


def test_padding_is_not_read(graphs: dict[str, Any]) -> None:
    tokens = texts(12, 12)
    longer = F.pad(tokens, (0, 60))
    np.testing.assert_allclose(run(graphs["text"], longer), run(graphs["text"], tokens), rtol=0, atol=2e-5)
    longer[0, 12] = 2000  # a token after the end mark is one that counts, as in open_clip
    assert np.abs(run(graphs["text"], longer) - run(graphs["text"], tokens))[0].max() > 0.01


def test_the_last_layer_computes_one_token(graphs: dict[str, Any]) -> None:
    widths = {"layer.1.q": 768, "layer.1.up": 3072, "layer.0.up": 3072}
    for (name, graph), x in zip(graphs.items(), (tiny_clip.pictures(224, 2), texts(9, 9)), strict=True):
        probe = onnx.ModelProto()
        probe.CopyFrom(graph)
        probe.graph.output.extend(onnx.helper.make_tensor_value_info(of, onnx.TensorProto.FLOAT, None) for of in widths)
        session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
        found = [value.shape for value in session.run(list(widths), {session.get_inputs()[0].name: x.numpy()})]
        assert found == [(2, 1, 768), (2, 1, 3072), (2, 197 if name == "image" else 9, 3072)]


@pytest.fixture(scope="module")
def checkpoint(two_layers: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("biomed")
    import_weights(biomed.hub_folder(folder / "hub", biomed.lively()), folder / "checkpoint")
    return folder / "checkpoint"


@pytest.mark.nightly  # bundles whose word table is of real size
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_bundles_say_what_open_clip_says(
    precision: str, checkpoint: Path, pictures: Path, tmp_path: Path, command: Callable[..., Result]
) -> None:
    bundle, calibrated = tmp_path / "bundle", {"calibration_images": pictures} if precision == "int8" else {}
    made = bundle_from_checkpoint(checkpoint, bundle, precision, **calibrated).manifest
    assert verify_bundle(bundle) == made and (made.backbone, made.precision, made.context_length) == (biomed.NAME, precision, 256)
    assert precision != "int8" or all(graph.precision == "int8" for graph in made.graphs.values())
    model, predictor, files = biomed.lively(), load(bundle, "cpu"), sorted(pictures.glob("*.png"))
    pixels = torch.from_numpy(np.stack([tensor_from_pixels(picture_from_path(x).pixels, made.preprocess) for x in files]))
    tokens = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(x)[0] for x in predictor.tokens(LABELS)], batch_first=True)
    with torch.inference_mode():
        wanted = model.encode_image(pixels), model.encode_text(tokens)
    for of, ours in zip(wanted, (np.stack([predictor.embed_image(x) for x in files]), predictor.embed_texts(LABELS)), strict=True):
        cosines = F.cosine_similarity(of, torch.from_numpy(ours)).numpy()
        assert cosines.min() > {"fp32": 0.99999, "fp16": 0.9999, "int8": 0.97}[precision]
    done = command("classify", files[0], *LABELS, "--bundle", bundle, "--json")
    assert done.code == 0 and {row["label"] for row in done.json["classifications"][0]["labels"]} == set(LABELS)
    index = tmp_path / "index"
    assert command("search", "index", pictures, "--output", index, "--bundle", bundle).code == 0
    found = command("search", "query", index, files[0], "--bundle", bundle, "--k", 1, "--json")
    assert found.code == 0 and files[0].name in found.json["matches"][0]["id"]


@pytest.mark.nightly  # two bundles with heads
@pytest.mark.parametrize(("head", "precision", "target"), [("mevf", "int8", "cpu"), ("qcr", "int8", "rtx")])
def test_heads_stand_on_its_towers(head: str, precision: str, target: str, checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    tokenizer = (checkpoint / "tokenizer.json").read_text(encoding="utf-8")
    folder = tiny_clip.head_checkpoint(tmp_path / "head", biomed.NAME, head, model=biomed.lively(), tokenizer=tokenizer)
    bundle_from_checkpoint(folder, tmp_path / "bundle", precision, target=target, calibration_images=pictures)
    assert load(tmp_path / "bundle", "cpu").ask(pictures / "CT_small.png", "is there a fracture?").candidates


@pytest.mark.nightly  # 12 layers in each tower: docs/measured/export.md has the figures
@torch.inference_mode()
def test_the_whole_model_equals_open_clip(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 pictures and 20 texts, through import and export; open_clip makes its pixels, tokens and towers of the folder itself."""
    monkeypatch.setitem(BACKBONES, biomed.NAME, biomed.shallow(12))
    folder = biomed.hub_folder(tmp_path / "hub", biomed.lively(12))
    import_weights(folder, tmp_path / "checkpoint")
    bundle_from_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", "fp32")
    theirs, transform, tokenizer = open_clips(folder, tmp_path / "bert")
    few = [picture_from_path(path).pixels for path in sorted(pictures.glob("*.png"))]
    shown = [np.ascontiguousarray(np.rot90(few[i % len(few)], i // len(few))) for i in range(20)]
    said = [*QUESTIONS, *TEXTS][:20]
    image = torch.cat([theirs.encode_image(transform(Image.fromarray(x).convert("RGB"))[None]) for x in shown])
    predictor, text = load(tmp_path / "bundle", "cpu"), theirs.encode_text(tokenizer(said))
    for of, ours in ((image, np.stack([predictor.embed_image(x) for x in shown])), (text, predictor.embed_texts(said))):
        cosines = F.cosine_similarity(of, torch.from_numpy(ours)).numpy()
        print(f"{biomed.NAME}: {len(cosines)} embeddings, least cosine {cosines.min():.8f}")
        assert len(cosines) == 20 and cosines.min() > 0.9999
        unit = F.normalize(of, dim=-1)
        assert (unit @ unit.T).min() < 0.95  # they differ, so that a tower that ignores its input fails


def open_clips(hub: Path, folder: Path) -> tuple[Any, Any, Any]:
    """(model, transform of pictures, tokenizer) of the hub's folder; only BERT's shape comes from ``folder``: it would ask the hub."""
    transformers.BertConfig().save_pretrained(folder)
    config = json.loads((hub / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"].update(hf_model_name=str(folder), hf_tokenizer_name=str(hub), hf_model_pretrained=False)
    (hub / "open_clip_config.json").write_text(json.dumps(config))
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{hub}")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{hub}")
