"""BiomedCLIP from the hub's folder: against timm, transformers and open_clip, its tokenizer, and folders that are not BiomedCLIP's."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
open_clip = pytest.importorskip("open_clip", reason="training needs the extra `train`")
transformers = pytest.importorskip("transformers", reason="training needs the extra `train`")

import timm
from open_clip.tokenizer import HFTokenizer
from torch.nn import functional as F

from pmclip_deploy.errors import BundleError, UsageError
from pmclip_deploy.tokens import tokens_from_text
from pmclip_deploy.train.backbones import BACKBONES, bert
from pmclip_deploy.train.checkpoint import towers_from_checkpoint
from pmclip_deploy.train.importing import import_weights
from tests.command import Result
from tests.tiny import biomed
from tests.tiny.clip import pictures
from tests.train.test_towers import TEXTS

LENGTH = 256


@pytest.fixture(autouse=True)
def two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the towers' 12 layers two: all else is as published."""
    monkeypatch.setitem(BACKBONES, biomed.NAME, biomed.shallow())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return biomed.hub_folder(tmp_path_factory.mktemp("hub") / "BiomedCLIP", biomed.lively())


@pytest.fixture(scope="module")
def checkpoint(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("imported") / "biomedclip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, biomed.NAME, biomed.shallow())
        import_weights(hub, output)
    yield output


def test_the_layout_is_the_published_one() -> None:
    """open_clip's configuration, and as many numbers as ViT-B/16 and BERT-base have, without BERT's pooler and with both projections."""
    assert biomed.CONFIG["model_cfg"]["vision_cfg"] == biomed.shallow().config()["vision_cfg"]
    with torch.device("meta"):
        state = biomed.shallow(12).build().state_dict()
    visual, text = (sum(x.numel() for name, x in state.items() if name.startswith(tower)) for tower in ("visual.", "text."))
    pooler = 768 * 768 + 768
    assert visual == 85_798_656 + 768 * 512 and text == 109_482_240 - pooler + 768 * 640 + 640 * 512
    published = {  # of the file on the hub
        "visual.trunk.cls_token": (1, 1, 768),
        "visual.trunk.pos_embed": (1, 197, 768),
        "visual.trunk.blocks.11.mlp.fc2.weight": (768, 3072),
        "visual.trunk.norm.bias": (768,),
        "visual.head.proj.weight": (512, 768),
        "text.transformer.embeddings.word_embeddings.weight": (30522, 768),
        "text.transformer.embeddings.position_embeddings.weight": (512, 768),
        "text.transformer.encoder.layer.11.output.LayerNorm.weight": (768,),
        "text.proj.0.weight": (640, 768),
        "text.proj.2.weight": (512, 640),
        "logit_scale": (),
    }
    assert {name: tuple(state[name].shape) for name in published} == published and not any("pooler" in name for name in state)


@torch.no_grad()
def test_embeddings_equal_those_of_timm_and_transformers(hub: Path, checkpoint: Path) -> None:
    model, meta, _ = towers_from_checkpoint(checkpoint)
    assert meta["backbone"] == "BiomedCLIP" and meta["provenance"]["import"]["kind"] == "open_clip state dict"
    assert meta["logit_scale"] == round(float(torch.tensor(4.4375).exp()), 4)
    state = torch.load(hub / "open_clip_pytorch_model.bin", weights_only=True)

    vit = timm.create_model("vit_base_patch16_224", depth=2, num_classes=0).eval()
    vit.load_state_dict({name.removeprefix("visual.trunk."): x for name, x in state.items() if name.startswith("visual.trunk.")})
    config = transformers.BertConfig(num_hidden_layers=2)  # whose other defaults are BERT-base
    text_tower = transformers.BertModel(config, add_pooling_layer=False).eval()
    of_text = {name.removeprefix("text.transformer."): x for name, x in state.items() if name.startswith("text.transformer.")}
    text_tower.load_state_dict({name: x for name, x in of_text.items() if not name.endswith("position_ids")})

    pixels = pictures(224, 3)
    image = vit(pixels) @ state["visual.head.proj.weight"].T
    torch.testing.assert_close(model.encode_image(pixels), image, atol=1e-4, rtol=1e-4)

    tokens = torch.from_numpy(tokens_from_text(checkpoint / "tokenizer.json", TEXTS, LENGTH, 0, LENGTH))
    states = text_tower(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    text = F.gelu(states[:, 0] @ state["text.proj.0.weight"].T) @ state["text.proj.2.weight"].T
    torch.testing.assert_close(model.encode_text(tokens), text, atol=1e-4, rtol=1e-4)
    for embeddings in (image, text):  # which differ from each other, so that a tower that ignores its input fails
        unit = F.normalize(embeddings, dim=-1)
        assert embeddings.std() > 0.1 and (unit[0] - unit[-1]).norm() > 0.3
    shorter = torch.from_numpy(tokens_from_text(checkpoint / "tokenizer.json", TEXTS[:6], LENGTH, 0))
    assert shorter.shape[1] < 64
    torch.testing.assert_close(model.encode_text(shorter), text[:6], atol=1e-4, rtol=1e-4)  # at its own length too


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_tokens_equal_open_clips(text: str, hub: Path, checkpoint: Path) -> None:
    (wanted,) = HFTokenizer(str(hub), context_length=LENGTH)([text]).tolist()
    (ids,) = tokens_from_text(checkpoint / "tokenizer.json", [text], LENGTH, 0, LENGTH).tolist()
    assert ids == wanted and ids[0] == 101 and 102 in ids


# The folder's files.


def test_safetensors_and_a_vocabulary_give_the_same(checkpoint: Path, tmp_path: Path) -> None:
    folder = biomed.hub_folder(tmp_path / "hub", biomed.lively(), "open_clip_model.safetensors")
    pieces = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in sorted(pieces, key=pieces.__getitem__)), encoding="utf-8")
    import_weights(folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    tokens = [tokens_from_text(of / "tokenizer.json", TEXTS, LENGTH, 0, LENGTH) for of in (tmp_path / "out", checkpoint)]
    assert tokens[0].tolist() == tokens[1].tolist()


@pytest.mark.parametrize("prefix", ["module.", "model.", "clip."])
def test_wrapped_and_prefixed_names(prefix: str, hub: Path, checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(hub / "open_clip_pytorch_model.bin", weights_only=True)
    torch.save({"epoch": 3, "state_dict": {f"{prefix}{name}": x for name, x in state.items()}}, tmp_path / "epoch_3.pt")
    (tmp_path / "tokenizer.json").write_bytes(biomed.BERT_TOKENIZER.read_bytes())
    assert import_weights(tmp_path / "epoch_3.pt", tmp_path / "out")["backbone"] == "BiomedCLIP"  # known without a configuration
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def refused(folder: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        import_weights(folder, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("vision_cfg", {"timm_model_name": "vit_large_patch16_224"}, "its timm_model_name is vit_large_patch16_224, that of Biomed"),
        ("vision_cfg", {"timm_pool": "avg"}, "its timm_pool is avg, that of BiomedCLIP none"),
        ("vision_cfg", {"timm_proj": "mlp"}, "its timm_proj is mlp"),
        ("vision_cfg", {"image_size": 384}, "its image_size is 384, that of BiomedCLIP 224"),
        ("text_cfg", {"hf_pooler_type": "mean_pooler"}, "its hf_pooler_type is mean_pooler, that of BiomedCLIP cls_last_hidden"),
        ("text_cfg", {"hf_proj_type": "linear"}, "its hf_proj_type is linear"),
        ("text_cfg", {"context_length": 77}, "its context_length is 77, that of BiomedCLIP 256"),
    ],
)
def test_other_configurations_are_refused(part: str, change: dict[str, Any], said: str, hub: Path, tmp_path: Path) -> None:
    folder = linked(hub, tmp_path)
    config = json.loads(json.dumps(biomed.CONFIG))
    config["model_cfg"][part].update(change)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    refused(folder, tmp_path, said)


@pytest.mark.parametrize("key", ["timm_pool", "hf_pooler_type", "context_length"])
def test_what_a_configuration_leaves_out_is_open_clips_default(key: str, hub: Path, tmp_path: Path) -> None:
    folder, config = linked(hub, tmp_path), json.loads(json.dumps(biomed.CONFIG))
    for part in config["model_cfg"].values():
        if isinstance(part, dict):
            part.pop(key, None)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    refused(folder, tmp_path, f"its {key} is ")


@pytest.mark.parametrize("mean", [[0.5, 0.5, 0.5], [0.48], "x", {"r": 1}, [None, 0.4, 0.4]])
def test_other_pixels_are_refused(mean: Any, hub: Path, tmp_path: Path) -> None:
    folder = linked(hub, tmp_path)
    (folder / "open_clip_config.json").write_text(json.dumps({**biomed.CONFIG, "preprocess_cfg": {"mean": mean}}))
    refused(folder, tmp_path, "it normalises pictures by a mean of ")


def linked(hub: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    for file in hub.iterdir():
        (folder / file.name).hardlink_to(file)
    (folder / "open_clip_config.json").unlink()
    (folder / "open_clip_config.json").write_text(json.dumps(biomed.CONFIG))
    return folder


def cased(text: str) -> str:
    content = json.loads(text)
    content["normalizer"]["lowercase"] = False
    return json.dumps(content)


def padded_elsewhere(text: str) -> str:
    content = json.loads(text)
    content["model"]["vocab"]["[PAD]"], content["model"]["vocab"]["the"] = content["model"]["vocab"]["the"], 0
    content["added_tokens"] = [of for of in content["added_tokens"] if of["content"] != "[PAD]"]
    return json.dumps(content)


def too_many(text: str) -> str:
    content = json.loads(text)
    content["model"]["vocab"]["pneumo"] = 30522
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "has no tokenizer[.]json; put the tokenizer.json of BiomedCLIP beside the weights"),
        (lambda text: "{}", "tokenizer.json: no usable tokenizer"),
        (lambda text: BACKBONES["ViT-B/32"].tokenizer_json(), r"is not the tokenizer of BiomedCLIP: an empty text is .* not \[CLS\]"),
        (cased, "it tells upper from lower case"),
        (padded_elsewhere, r"\[PAD\] is 1996, not 0"),
        (too_many, "its last piece has the number 30522, and there are 30522"),
    ],
)
def test_other_tokenizers_are_refused(change: Callable[[str], str] | None, said: str, tmp_path: Path) -> None:
    if change is not None:
        (tmp_path / "tokenizer.json").write_text(change(biomed.BERT_TOKENIZER.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(BundleError, match=said) as caught:
        BACKBONES[biomed.NAME].tokenizer_beside(tmp_path / "open_clip_pytorch_model.bin")
    assert "\n" not in str(caught.value)


def test_weights_without_a_tokenizer_are_refused(hub: Path, tmp_path: Path) -> None:
    folder = linked(hub, tmp_path)
    (folder / "tokenizer.json").unlink()
    refused(folder, tmp_path, "hub: has no tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n", b"[UNK]\nthe\n"])
def test_a_vocabulary_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(BundleError, match=r"vocab\.txt: no usable vocabulary"):
        bert.uncased_tokenizer(tmp_path / "vocab.txt")


def test_no_package_has_its_tokenizer() -> None:
    with pytest.raises(UsageError, match="no package has the tokenizer of backbone BiomedCLIP"):
        BACKBONES[biomed.NAME].tokenizer_json()


def test_the_command_says_what_it_is(hub: Path, tmp_path: Path, command: Callable[..., Result]) -> None:
    made = command("import", hub, "--output", tmp_path / "out")
    assert made.code == 0 and "BiomedCLIP from an open_clip state dict" in made.out
    made = command("import", hub, "--output", tmp_path / "other", "--activation", "gelu")
    assert made.code == 2 and "BiomedCLIP has one activation only" in made.err
