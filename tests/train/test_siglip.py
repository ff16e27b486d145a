"""SigLIP from the hub's folders: against transformers and open_clip stage by stage, its tokenizers, and folders that are not SigLIP's."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
open_clip = pytest.importorskip("open_clip", reason="training needs the extra `train`")
transformers = pytest.importorskip("transformers", reason="training needs the extra `train`")

from open_clip.tokenizer import HFTokenizer
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pmclip_deploy.errors import BundleError
from pmclip_deploy.export.probes import QUESTIONS, TEXTS
from pmclip_deploy.imaging.preprocess import resized, tensor_from_pixels
from pmclip_deploy.tokens import tokenizer_from_file, tokens_from_text
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import towers_from_checkpoint
from pmclip_deploy.train.clip.pairs import train_clip_on_pairs
from pmclip_deploy.train.clip.recipes import recipe_named
from pmclip_deploy.train.importing import import_weights
from pmclip_deploy.train.sentencepieces import tokenizer_from_folder
from tests.tiny import siglip
from tests.tiny.clip import captions, pictures

BASE, SECOND, MED, ODD = "SigLIP-B/16@224", "SigLIP2-B/32@256", "MedSigLIP", "SigLIP-so400m/14@384"
LENGTH, ERF = 64, {"hidden_act": "gelu"}
ALL = [*QUESTIONS, *TEXTS, "", "?", "x_ray of a left lung", "a\nb\n\nc", "  two  blanks ", "\uff0c fullwidth \ufb01", "t1\u00a0weighted"]
SOME = [*QUESTIONS[:4], *TEXTS[-3:], ""]


@pytest.fixture(scope="module", autouse=True)
def two_layers() -> Iterator[None]:
    """Of the towers' layers two: all else is as published."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (BASE, SECOND, MED, ODD, f"{BASE}-bilinear"):
            patch.setitem(BACKBONES, name, siglip.shallow(name))
        yield


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return siglip.hub_folder(tmp_path_factory.mktemp("hub") / "siglip", BASE)


@pytest.fixture(scope="module")
def checkpoint(two_layers: None, hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("imported") / "siglip"
    import_weights(hub, output)
    return output


def linked(hub: Path, folder: Path, *left_out: str) -> Path:
    folder.mkdir()
    for file in hub.iterdir():
        if file.name not in left_out:
            (folder / file.name).symlink_to(file)
    return folder


# Stage by stage.


def equal_to_transformers(name: str, checkpoint: Path) -> None:
    """Image tower, text tower and logits: of texts of all lengths, padded as transformers pads them and at their own length."""
    model, theirs, backbone = towers_from_checkpoint(checkpoint)[0], siglip.lively(name), BACKBONES[name]
    pixels = pictures(backbone.preprocess.size, 3) + torch.tensor([-0.8, 0.0, 0.8])[:, None, None, None]  # dark to bright
    tokens = torch.from_numpy(tokens_from_text(checkpoint / "tokenizer.json", SOME, LENGTH, backbone.pad_id, LENGTH))
    with torch.no_grad():
        wanted = theirs(input_ids=tokens, pixel_values=pixels)
        image, text = F.normalize(model.encode_image(pixels), dim=-1), F.normalize(model.encode_text(tokens), dim=-1)
        scale, bias = model.scale_and_bias()
        torch.testing.assert_close(image, wanted.image_embeds, atol=2e-6, rtol=0)
        torch.testing.assert_close(text, wanted.text_embeds, atol=2e-6, rtol=0)
        torch.testing.assert_close(scale * image @ text.T + bias, wanted.logits_per_image, atol=2e-4, rtol=0)
        shorter = torch.from_numpy(tokens_from_text(checkpoint / "tokenizer.json", SOME[:4], LENGTH, backbone.pad_id))
        assert shorter.shape[1] < LENGTH
        torch.testing.assert_close(F.normalize(model.encode_text(shorter), dim=-1), text[:4], atol=2e-6, rtol=0)
    for embeddings in (image, text):  # which differ from each other, so that a tower that ignores its input fails
        assert (embeddings @ embeddings.T).min() < 0.95 and embeddings.std() > 0.01


def test_towers_and_logits_equal_those_of_transformers(checkpoint: Path) -> None:
    meta = towers_from_checkpoint(checkpoint)[1]
    assert meta["backbone"] == BASE and meta["provenance"]["import"]["kind"] == "Hugging Face SiglipModel"
    assert (meta["logit_scale"], meta["logit_bias"]) == (round(float(torch.tensor(siglip.SCALE).exp()), 4), siglip.BIAS)
    assert meta["logit_scale"] > 117  # not held to 100, as CLIP's is
    equal_to_transformers(BASE, checkpoint)


@pytest.mark.nightly  # a word table of 256,000 rows, and towers 1,152 wide
@pytest.mark.parametrize(("name", "resample"), [(SECOND, 2), (MED, 2), (ODD, 3)])
def test_other_sizes_equal_transformers(name: str, resample: int, tmp_path: Path) -> None:
    """SigLIP 2 in shards; MedSigLIP; and so400m at 384, whose patches of 14 leave out six rows and columns."""
    siglip.hub_folder(tmp_path / "hub", name, shards=2, resample=resample)
    meta = import_weights(tmp_path / "hub", tmp_path / "out")
    assert meta["backbone"] == name and len(meta["provenance"]["import"]["shards"]) > 1
    equal_to_transformers(name, tmp_path / "out")
    siglip.lively.cache_clear()


def test_names_and_shapes_are_the_published_ones() -> None:
    """Of MedSigLIP's and SigLIP 2's files, in both layouts; and as many numbers as the whole models have."""
    with torch.device("meta"):
        ours = siglip.shallow(MED, 27).build().state_dict()
        theirs = transformers.SiglipModel(siglip.config_of(siglip.shallow(MED, 27))).state_dict()
        second = siglip.shallow("SigLIP2-B/16@224", 12).build().state_dict()
    assert sum(x.numel() for x in ours.values()) == sum(x.numel() for x in theirs.values()) == 878_300_338
    assert sum(x.numel() for x in second.values()) == 375_187_970
    published = {
        "vision_model.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (1024, 1152),
        "vision_model.encoder.layers.26.mlp.fc1.weight": (4304, 1152),
        "vision_model.head.probe": (1, 1, 1152),
        "vision_model.head.attention.in_proj_weight": (3456, 1152),
        "text_model.embeddings.token_embedding.weight": (32000, 1152),
        "text_model.embeddings.position_embedding.weight": (64, 1152),
        "text_model.head.bias": (1152,),
        "logit_scale": (1,),
        "logit_bias": (1,),
    }
    assert {name: tuple(theirs[name].shape) for name in published} == published
    assert tuple(ours["visual.trunk.attn_pool.kv.weight"].shape) == (2304, 1152)


@pytest.mark.parametrize(("resample", "name"), [(2, "bilinear"), (3, "bicubic")])
def test_pixels_equal_transformers_and_pillows(resample: int, name: str) -> None:
    """Both sides to the size, whatever the shape; the 8-bit stage bit for bit."""
    preprocess = siglip.shallow(BASE if name == "bicubic" else f"{BASE}-bilinear").preprocess
    processor = SiglipImageProcessorPil(resample=resample, size={"height": 224, "width": 224}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    plain = SiglipImageProcessorPil(resample=resample, size={"height": 224, "width": 224}, do_rescale=False, do_normalize=False)
    rng = np.random.default_rng(0)
    for height, width in ((300, 217), (97, 512), (224, 224), (1200, 900)):
        colour = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        assert np.array_equal(resized(colour, preprocess), plain(Image.fromarray(colour))["pixel_values"][0].transpose(1, 2, 0))
        wanted = processor(Image.fromarray(colour))["pixel_values"][0]
        np.testing.assert_allclose(tensor_from_pixels(colour, preprocess), wanted, rtol=0, atol=2e-7)
        grey = colour[:, :, 0]
        assert np.array_equal(resized(grey, preprocess), np.asarray(Image.fromarray(grey).resize((224, 224), resample=resample)))
    other = siglip.shallow(f"{BASE}-bilinear" if name == "bicubic" else BASE).preprocess
    assert not np.array_equal(resized(colour, preprocess), resized(colour, other))


# Tokenizers.


def ids_of(path: Path, text: str, pad_id: int) -> list[int]:
    (ids,) = tokens_from_text(path, [text], LENGTH, pad_id, LENGTH).tolist()
    return ids  # type: ignore[no-any-return]


def drawn(count: int) -> list[str]:
    rng, letters = random.Random(0), "abc IS the?!_-  \t\n\u2581\u00e9\u00c9\u4e2d\ufb01\uff0c\u00a0\u3000</s>'\u200b\x1c"
    return ["".join(rng.choice(letters) for _ in range(rng.randint(1, 25))) for _ in range(count)]


def test_tokens_equal_transformers_siglip_tokenizer(hub: Path, checkpoint: Path) -> None:
    pytest.importorskip("sentencepiece", reason="transformers' SiglipTokenizer needs it; ours does not")
    theirs = transformers.SiglipTokenizer(str(hub / "spiece.model"))
    for text in [*ALL, *(of for of in drawn(300) if "</s>" not in of)]:
        wanted = theirs(text, padding="max_length", max_length=LENGTH, truncation=True).input_ids
        assert ids_of(checkpoint / "tokenizer.json", text, 1) == wanted, text


def test_the_first_tokenizer_takes_out_case_and_punctuation(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.json"
    of = tokenizer_from_file(path)
    plain = of.encode("is there a fracture")
    assert plain.tokens == ["\u2581is", "\u2581there", "\u2581a", "\u2581fracture", "</s>"]
    for text in ("Is there a fracture?", "  IS, there... a FRACTURE!\n", "is_ there a (fracture)"):
        assert of.encode(text).ids == plain.ids
    assert of.encode("x_ray").ids == of.encode("xray").ids  # transformers' way; open_clip makes a blank of it
    assert of.encode("").ids == of.encode("?!").ids == [1]
    assert of.encode("a </s> b").ids[-1] == 1 and of.encode("a </s> b").ids.count(1) == 1  # a text cannot give the mark
    assert len(ids_of(path, "ct " * 100, 1)) == LENGTH and ids_of(path, "ct " * 100, 1)[-1] == 1


def second_tokenizer(tmp_path: Path, of_open_clip: bool) -> Any:
    siglip.gemma().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "ours.json").write_text(tokenizer_from_folder(tmp_path, of_open_clip, 256000, True, SECOND), encoding="utf-8")
    return tmp_path / "ours.json"


def test_tokens_equal_transformers_siglip2_tokenizer(tmp_path: Path) -> None:
    """Lower case, and nothing else: punctuation, blanks and lines stay."""
    ours = second_tokenizer(tmp_path, False)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    theirs = transformers.Siglip2Tokenizer(
        content["model"]["vocab"], [tuple(pair) for pair in content["model"]["merges"]], padding_side="right", add_eos_token=True
    )
    for piece in ("\n", "\u2581\u2581"):
        theirs.add_tokens(piece)
    for text in [*ALL, *(of for of in drawn(300) if "</s>" not in of)]:
        wanted = [*theirs(text, add_special_tokens=False, truncation=True, max_length=LENGTH - 1).input_ids, 1]
        assert ids_of(ours, text, 0) == wanted + [0] * (LENGTH - len(wanted)), text
    of = tokenizer_from_file(ours)
    assert of.encode("Is there a FRACTURE?").ids == of.encode("is there a fracture?").ids != of.encode("is there a fracture").ids
    assert of.encode("a <eos> b").ids.count(1) == 1


@pytest.mark.parametrize("second", [False, True])
def test_tokens_equal_open_clips(second: bool, tmp_path: Path) -> None:
    """Whose configurations of both take out case and punctuation."""
    name = SECOND if second else BASE
    folder = siglip.open_clip_folder(tmp_path / "hub", siglip.shallow(name), {"x": torch.zeros(1)})
    theirs = HFTokenizer(str(folder), context_length=LENGTH, clean="canonicalize")
    path = tmp_path / "ours.json"
    path.write_text(tokenizer_from_folder(folder, True, 256000, second, name), encoding="utf-8")
    for text in [*ALL, "a\u00e9_b", "&lt;b&gt; ct &amp; mri"]:
        assert ids_of(path, text, 0 if second else 1) == theirs([text])[0].tolist(), text


def moved(folder: Path) -> Path:
    (folder / "spiece.model").unlink()
    return folder / "tokenizer.json"


def changed(folder: Path, how: str) -> None:
    proto = import_protobuf().ModelProto.FromString(siglip.spiece())  # type: ignore[no-untyped-call]
    if how == "byte pairs":
        proto.trainer_spec.model_type = 2
    elif how == "no end":
        proto.pieces[1].piece = "<end>"
    else:
        proto.normalizer_spec.precompiled_charsmap = b"\xff" * 7
    (folder / "spiece.model").write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "spiece.model").unlink(), "has no spiece.model and no tokenizer.json; put the tokenizer of SigLIP-B"),
        (lambda folder: (folder / "spiece.model").write_bytes(b"\xff\xff\xff"), "spiece.model: no sentencepiece model, or a damaged one"),
        (lambda folder: (folder / "spiece.model").write_bytes(b""), "and no unigram model with a piece for what is unknown"),
        (lambda folder: changed(folder, "byte pairs"), "and no unigram model"),
        (lambda folder: changed(folder, "no end"), "is not the tokenizer of SigLIP-B/16@224: </s> is None, not 1"),
        (lambda folder: changed(folder, "characters"), "its table of characters is damaged"),
        (lambda folder: siglip.gemma().save(str(moved(folder))), "its model is no Unigram"),
        (lambda folder: moved(folder).write_text("{"), "no usable tokenizer"),
    ],
)
def test_other_tokenizers_are_refused(damage: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(siglip.spiece())
    damage(tmp_path)
    with pytest.raises(BundleError, match=said) as caught:
        tokenizer_from_folder(tmp_path, False, 32000, False, BASE)
    assert "\n" not in str(caught.value)


# The folder's files.


def test_open_clips_layout_gives_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    """And what open_clip computes of them: its GELU is the other form, which no model was trained with."""
    state = {name.removeprefix("clip."): x.float() for name, x in load_file(checkpoint / "model.safetensors").items()}
    folder = siglip.open_clip_folder(tmp_path / "hub", siglip.shallow(BASE), state)
    meta = import_weights(folder, tmp_path / "out")
    assert (meta["backbone"], meta["provenance"]["import"]["kind"]) == (BASE, "open_clip state dict")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    theirs = open_clip.CustomTextCLIP(**{key: value for key, value in config.items() if key != "custom_text"}).eval()
    del theirs.visual.trunk.blocks[2:]
    theirs.load_state_dict(state)
    ours = towers_from_checkpoint(tmp_path / "out")[0]
    pixels, tokens = pictures(224, 2), torch.arange(128).reshape(2, 64)
    with torch.no_grad():
        for a, b in ((ours.encode_image(pixels), theirs.encode_image(pixels)), (ours.encode_text(tokens), theirs.encode_text(tokens))):
            assert F.cosine_similarity(a, b).min() > 0.9999
            assert not torch.allclose(a, b, atol=1e-6)
    siglip.open_clip_folder(tmp_path / "bin", siglip.shallow(BASE), state, "open_clip_pytorch_model.bin")
    import_weights(tmp_path / "bin", tmp_path / "out2")
    assert (tmp_path / "out2" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_the_filter_is_what_the_folder_says(hub: Path, tmp_path: Path) -> None:
    folder = linked(hub, tmp_path / "hub", "preprocessor_config.json")
    for resample, name, said in ((None, BASE, ("bicubic", "assumed")), (2, f"{BASE}-bilinear", ("bilinear", "configuration"))):
        if resample is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps({**siglip.PIXELS, "resample": resample}))
        meta = import_weights(folder, tmp_path / f"out{resample}")
        made = meta["provenance"]["import"]
        assert (meta["backbone"], (made["interpolation"], made["interpolation_from"])) == (name, said)
        assert BACKBONES[name].preprocess.interpolation == said[0]


def test_weights_alone_are_known_by_their_content(hub: Path, checkpoint: Path, tmp_path: Path) -> None:
    state = load_file(hub / "model.safetensors")
    torch.save({"state_dict": {f"module.{name}": x for name, x in state.items()}}, tmp_path / "weights.pt")
    (tmp_path / "spiece.model").write_bytes((hub / "spiece.model").read_bytes())
    assert import_weights(tmp_path / "weights.pt", tmp_path / "out")["backbone"] == BASE
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def refused(folder: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        import_weights(folder, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "siglip2"}, "is of SigLIP 2 for pictures of any shape .NaFlex.; only models of an image tower and a text"),
        ({"model_type": "siglip", "text_config": {"vocab_size": 256000, "hidden_size": 1152}}, "768 and 1152, SigLIP's the same"),
        ({"model_type": "siglip", "vision_config": {"image_size": 240}}, "a SigLIP model of image 240, patch 16, width 768"),
        ({"model_type": "siglip", "vision_config": ERF, "text_config": ERF}, "its hidden_act is gelu, SigLIP's gelu_pytorch_tanh"),
        ({"model_type": "siglip", "text_config": [1], "vision_config": None}, "it is a SigLIP model of image 224.*layers 12"),
        ({"model_type": "bert"}, "it is no SigLIP model"),
    ],
)
def test_other_configurations_of_transformers_are_refused(change: dict[str, Any], said: str, hub: Path, tmp_path: Path) -> None:
    folder = linked(hub, tmp_path / "hub", "config.json")
    (folder / "config.json").write_text(json.dumps(change))
    refused(folder, tmp_path, said)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("vision_cfg", {"timm_model_name": "naflexvit_base_patch16_siglip"}, "is of NaFlex, which reads pictures of any shape"),
        ("vision_cfg", {"timm_pool": "avg"}, "its timm_pool is avg, SigLIP's map"),
        ("text_cfg", {"pool_type": "argmax"}, "its pool_type is argmax, SigLIP's last"),
        ("text_cfg", {"no_causal_mask": False}, "its no_causal_mask is False, SigLIP's True"),
        ("text_cfg", {"vocab_size": 256000, "width": 1024}, "width 1024.*words 256000"),
    ],
)
def test_other_configurations_of_open_clip_are_refused(part: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = siglip.open_clip_folder(tmp_path / "hub", siglip.shallow(BASE), {"x": torch.zeros(1)})
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"][part].update(change)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    refused(folder, tmp_path, said)


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        ({"image_mean": [0.48, 0.46, 0.41]}, "it normalises pictures by a mean of"),
        ({"resample": 1}, "scales pictures by 1, which"),
        ({"size": {"shortest_edge": 224}}, "its resize_mode is shortest, that of"),
    ],
)
def test_other_pixels_are_refused(pixels: dict[str, Any], said: str, hub: Path, tmp_path: Path) -> None:
    folder = linked(hub, tmp_path / "hub", "preprocessor_config.json")
    (folder / "preprocessor_config.json").write_text(json.dumps({**siglip.PIXELS, **pixels}))
    refused(folder, tmp_path, said)


def test_parts_and_other_sizes_are_named(hub: Path, tmp_path: Path) -> None:
    state = load_file(hub / "model.safetensors")
    (tmp_path / "spiece.model").write_bytes((hub / "spiece.model").read_bytes())
    for change, said in (
        ({"text_model.final_layer_norm.bias": None}, "does not fit SigLIP-B/16@224: 1 missing: text.ln_final.bias"),
        ({"text_model.embeddings.token_embedding.weight": torch.zeros(5, 768)}, "1 misshapen: text.token_embedding.weight is 5x768"),
        ({"vision_model.head.probe": None}, "is a SigLIP model of a size that is not read, or parts of one; it fits"),
        ({"logit_bias": torch.tensor([torch.nan])}, "1 tensors hold NaN or infinity: logit_bias"),
        ({"vision_model.head.attention.in_proj_weight": torch.zeros(7, 768)}, "vision_model.head.attention.in_proj_weight"),
    ):
        torch.save({name: x for name, x in {**state, **change}.items() if x is not None}, tmp_path / "weights.pt")
        refused(tmp_path / "weights.pt", tmp_path, said)


@pytest.mark.nightly  # trains a text tower whose word table is of real size
def test_training_lowers_the_sigmoid_loss_and_holds_no_scale(checkpoint: Path, tmp_path: Path) -> None:
    """`train clip --from`, also of a caption without words, whose tokens are padding alone."""
    data = captions(tmp_path / "data", 8, 4)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    rows[0]["caption"] = "?!"
    (data / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe = recipe_named("paper", epochs=4, batch_size=4, learning_rate=2e-4, device="cpu", lock_text=True, largest_scale=100.0)
    description = train_clip_on_pairs([data], checkpoint, tmp_path / "out", recipe)
    towers, meta, _ = towers_from_checkpoint(tmp_path / "out")
    scale, bias = (round(x.item(), 4) for x in towers.scale_and_bias())
    assert meta["logit_bias"] == description["logit_bias"] != siglip.BIAS and meta["logit_bias"] == pytest.approx(bias, abs=0.01)
    assert meta["logit_scale"] == pytest.approx(scale, rel=2e-3) and scale > 110  # the recipe's bound is the softmax's
    history = torch.load(tmp_path / "out" / "state.pt", weights_only=True)["history"]
    assert history[-1]["loss"] < history[0]["loss"]
