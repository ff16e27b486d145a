"""CLIP of any size from an open_clip_config.json: against open_clip, through training and export, and configurations that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
open_clip = pytest.importorskip("open_clip", reason="training needs the extra `train`")
transformers = pytest.importorskip("transformers", reason="training needs the extra `train`")

from safetensors.torch import load_file, save_file

from pmclip_deploy.errors import BundleError
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.spec import Preprocess
from pmclip_deploy.tokens import tokens_from_text
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.open_clip_config import backbone_of_towers
from pmclip_deploy.train.checkpoint import read_checkpoint, towers_from_checkpoint
from pmclip_deploy.train.importing import import_weights
from tests.command import Result
from tests.tiny import hub
from tests.tiny.clip import captions, pictures
from tests.train.test_import import randomised

TEXTS = ["is there a fracture?", "chest x-ray of a large pneumothorax on the left", "no"]


@pytest.mark.parametrize("name", hub.MODELS)
@torch.no_grad()
def test_embeddings_equal_open_clips(name: str, tmp_path: Path) -> None:
    theirs = hub.model_of(name, tmp_path / "bert")
    folder = hub.folder_of(name, tmp_path / "hub", theirs)
    made = import_weights(folder, tmp_path / "out")
    ours, meta, _ = towers_from_checkpoint(tmp_path / "out")
    backbone, limit = BACKBONES[meta["backbone"]], hub.MODELS[name]["text_cfg"]["context_length"]
    assert made["backbone"].startswith("open_clip-") and backbone.context_length == limit
    assert backbone.preprocess == Preprocess(64, "squash", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    pixels = pictures(64, 3)
    tokens = torch.from_numpy(tokens_from_text(tmp_path / "out" / "tokenizer.json", TEXTS, limit, 0, limit))
    image, text = theirs.encode_image(pixels), theirs.encode_text(tokens)
    for of in (image, text):
        assert of.std() > 0.01 and (of[0] - of[1]).abs().max() > 0.01
    torch.testing.assert_close(ours.encode_image(pixels), image, atol=1e-4, rtol=1e-4)
    shorter = tokens[:, : int((tokens != 0).sum(1).max())]
    for given in (tokens, shorter):
        torch.testing.assert_close(ours.encode_text(given), text, atol=1e-4, rtol=1e-4)

    # And the graphs that are made of them.
    pytest.importorskip("onnx", reason="export needs the extra `export`")
    onnxruntime = pytest.importorskip("onnxruntime")
    for graph, given, wanted in (
        (backbone.image_graph(ours), {"pixels": pixels}, image),
        (backbone.text_graph(ours), {"tokens": shorter}, text),
    ):
        (got,) = onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {k: x.numpy() for k, x in given.items()})
        torch.testing.assert_close(torch.from_numpy(got), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "weights",
    [
        "open_clip_pytorch_model.bin",
        "open_clip_model.safetensors.index.json",
        "open_clip_pytorch_model.bin.index.json",
        "model.safetensors",
    ],
)
def test_every_way_that_the_hub_lays_weights_out(weights: str, tmp_path: Path) -> None:
    """BERT's own config.json may stand beside open_clip's, and tells how many heads a layer has."""
    model = hub.model_of("vit-bert", tmp_path / "bert")
    whole = hub.folder_of("vit-bert", tmp_path / "whole", model)
    other = hub.folder_of("vit-bert", tmp_path / "other", model, weights)
    (other / "config.json").write_bytes((tmp_path / "bert" / "config.json").read_bytes())
    for folder in (whole, other):
        import_weights(folder, tmp_path / "out" / folder.name)
    one, two = (read_checkpoint(tmp_path / "out" / of)[1] for of in ("whole", "other"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors.index.json", "open_clip_pytorch_model.bin.index.json"])
def test_indexes_that_lie_are_refused(weights: str, tmp_path: Path) -> None:
    folder = hub.folder_of("vit", tmp_path / "hub", hub.model_of("vit", tmp_path / "bert"), weights)
    index = json.loads((folder / weights).read_text())
    (tmp_path / "outside.bin").write_bytes(b"x")
    for name in ("../outside.bin", str(tmp_path / "outside.bin"), ".."):
        (folder / weights).write_text(json.dumps({"weight_map": {**index["weight_map"], "logit_scale": name}}))
        refused(folder, tmp_path, "which is no file beside it; get the folder again|are missing: [.][.]")
    (folder / weights).write_text(json.dumps({"weight_map": {**index["weight_map"], "logit_scale": "part-3.bin"}}))
    refused(folder, tmp_path, "1 of its 3 files are missing: part-3.bin")
    for content in ("[]", "{}", '{"weight_map": 3}', "{"):
        (folder / weights).write_text(content)
        refused(folder, tmp_path, "has no weight_map, which names the files|no weights that can be read")


def test_shards_that_hold_a_tensor_twice_are_refused(tmp_path: Path) -> None:
    """Which of them is meant, nobody can tell."""
    weights = "open_clip_pytorch_model.bin.index.json"
    folder = hub.folder_of("vit", tmp_path / "hub", hub.model_of("vit", tmp_path / "bert"), weights)
    part = torch.load(folder / "part-2.bin", weights_only=True)
    torch.save({**torch.load(folder / "part-1.bin", weights_only=True), **{k: part[k] for k in list(part)[:1]}}, folder / "part-1.bin")
    refused(folder, tmp_path, "1 of its tensors are in another file too: ")


def test_the_activation_is_the_configurations_or_given(tmp_path: Path) -> None:
    folder = hub.folder_of("vit", tmp_path / "hub", hub.model_of("vit", tmp_path / "bert"))
    for given, wanted, by in ((None, "gelu", "open_clip_config.json"), ("quick_gelu", "quick_gelu", "--activation")):
        made = import_weights(folder, tmp_path / "out", activation=given)
        assert [made["provenance"]["import"][key] for key in ("activation", "activation_from")] == [wanted, by]
        assert BACKBONES[made["backbone"]].activation == wanted
        _, meta, _ = towers_from_checkpoint(tmp_path / "out")
        assert meta["towers"]["model_cfg"]["quick_gelu"] is (wanted == "quick_gelu")


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_pixels_equal_open_clips(mode: str, tmp_path: Path) -> None:
    folder = hub.folder_of(
        "vit", tmp_path / "hub", hub.model_of("vit", tmp_path / "bert"), preprocess_cfg={**hub.PIXELS, "resize_mode": mode}
    )
    backbone = BACKBONES[import_weights(folder, tmp_path / "out")["backbone"]]
    picture = np.random.default_rng(0).integers(0, 256, (90, 140), np.uint8)
    of_model = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**{**hub.PIXELS, "size": 64, "resize_mode": mode}), False
    )
    ours = tensor_from_pixels(picture, backbone.preprocess)
    theirs = of_model(Image.fromarray(picture).convert("RGB")).numpy()
    np.testing.assert_allclose(np.asarray(ours).reshape(theirs.shape), theirs, atol=1e-5)


@pytest.mark.slow("trains, exports and asks")
def test_it_trains_and_exports(tmp_path: Path, command: Callable[..., Result]) -> None:
    """Each command reads the towers from the checkpoint, and writes them into the next one."""
    pytest.importorskip("onnx", reason="export needs the extra `export`")
    folder = hub.folder_of("resnet-bert", tmp_path / "hub", hub.model_of("resnet-bert", tmp_path / "bert"))
    data = captions(tmp_path / "data")
    made = command("import", folder, "--output", tmp_path / "clip")
    assert made.code == 0 and "open_clip-" in made.out, made.err
    trained = command("train", "clip", "--from", tmp_path / "clip", "--data", data, "--output", tmp_path / "trained",
                      "--epochs", 1, "--batch-size", 8, "--threads", 1)  # fmt: skip
    assert trained.code == 0, trained.err
    towers = [json.loads((tmp_path / of / "checkpoint.json").read_text())["towers"] for of in ("clip", "trained")]
    assert towers[0] == towers[1]
    made = command("export", tmp_path / "trained", "--precision", "fp32", "--output", tmp_path / "bundle")
    assert made.code == 0, made.err
    made = command("classify", data / "images" / "val0.png", "white", "black", "--bundle", tmp_path / "bundle", "--json")
    assert made.code == 0 and len(json.loads(made.out)["classifications"][0]["labels"]) == 2, made.err


# A CLIPModel of transformers, whose config.json has the same numbers by other names.


SEEN = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 64, "patch_size": 16}
READ = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "max_position_embeddings": 40}


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    both = {"hidden_act": "gelu", "projection_dim": 48}
    published = transformers.CLIPModel(
        transformers.CLIPConfig(vision_config={**SEEN, **both}, text_config={**READ, **both}, projection_dim=48)
    )
    published = randomised(published)
    folder = tmp_path_factory.mktemp("transformers")
    published.save_pretrained(folder)
    pixels = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return published, folder


@torch.no_grad()
def test_a_clip_model_of_another_size_equals_transformers(clip_model: tuple[Any, Path], tmp_path: Path) -> None:
    """Its heads are 8 of 8 numbers in a text layer, and 3 of 32 in an image layer."""
    published, folder = clip_model
    made = import_weights(folder, tmp_path / "out")
    model, meta, _ = towers_from_checkpoint(tmp_path / "out")
    backbone = BACKBONES[meta["backbone"]]
    assert made["backbone"].startswith("open_clip-") and backbone.activation == "gelu"
    assert made["provenance"]["import"]["kind"] == "Hugging Face CLIPModel"
    assert backbone.preprocess == Preprocess(64, "shortest", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    pixels = pictures(64, 3)
    tokens = torch.from_numpy(tokens_from_text(tmp_path / "out" / "tokenizer.json", TEXTS, 40, 0))
    image = published.visual_projection(published.vision_model(pixels).pooler_output)
    text = published.text_projection(published.text_model(tokens).pooler_output)
    for of, ours in ((image, model.encode_image(pixels)), (text, model.encode_text(tokens))):
        assert of.std() > 0.01 and (of[0] - of[1]).abs().max() > 0.01
        torch.testing.assert_close(ours, of, atol=1e-4, rtol=1e-4)


SQUARE, SHORTEST = {"size": {"height": 64, "width": 64}}, {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (SHORTEST, "shortest"),
        (SQUARE, "squash"),
        ({**SQUARE, "crop_size": {"height": 64, "width": 64}}, "squash"),
        ({"size": 64, "crop_size": 64}, "shortest"),
        ({"size": {"shortest_edge": 72}, "crop_size": 64}, "its resize_mode is shortest edge to 72 and a smaller crop"),
        ({**SHORTEST, "do_center_crop": False}, "its resize_mode is shortest_edge"),
        ({"size": {"longest_edge": 64}}, "its resize_mode is longest_edge"),
        ({"do_resize": False}, "its resize_mode is none"),
        ({"do_rescale": False}, "its mode is not RGB in 0..1"),
        ({"rescale_factor": 1 / 127.5}, "its mode is not RGB in 0..1"),
    ],
)
def test_a_clip_model_sees_as_its_preprocessor_config_says(
    clip_model: tuple[Any, Path], pixels: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    copytree(clip_model[1], tmp_path / "hub")
    told = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "resample": 3, "rescale_factor": 0.00392156862745098}
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps({**told, **pixels}))
    if expected not in ("shortest", "squash"):
        with pytest.raises(BundleError, match=expected):
            import_weights(tmp_path / "hub", tmp_path / "out")
        return
    import_weights(tmp_path / "hub", tmp_path / "out")
    meta = towers_from_checkpoint(tmp_path / "out")[1]
    assert BACKBONES[meta["backbone"]].preprocess == Preprocess(64, expected, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("vision_config", {"num_attention_heads": 5}, "config.json: .*nor a CLIP of other sizes: its num_attention_heads is 5"),
        ("vision_config", {"hidden_size": "wide"}, "its num_attention_heads is 3|its hidden_size is wide"),
        ("vision_config", {"image_size": 63}, "its image_size 63 is no multiple of 16"),
        ("vision_config", {"layer_norm_eps": 1e-3}, "its layer_norm_eps is 0.001"),
        ("vision_config", {"num_channels": 1}, "its num_channels is 1"),
        (
            "vision_config",
            {"num_hidden_layers": 3},
            "does not fit config.json: 12 missing: visual.transformer.resblocks.2.attn.in_proj_bias",
        ),
        ("text_config", {"vocab_size": 32000}, "its text_cfg's vocab_size is 32000; CLIP's tokenizer has 49408"),
        ("text_config", {"eos_token_id": 5}, "its eos_token_id is 5"),
        ("text_config", {"intermediate_size": 1 << 40}, "its mlp_ratio is "),
        ("text_config", {"hidden_act": "relu"}, "text_config has relu and vision_config has gelu"),
    ],
)
def test_a_clip_model_that_computes_otherwise_is_named(
    part: str, change: dict[str, Any], said: str, clip_model: tuple[Any, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "model.safetensors").hardlink_to(clip_model[1] / "model.safetensors")
    config = json.loads((clip_model[1] / "config.json").read_text())
    config[part] |= change
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, tmp_path, said)


# What is refused.


def refused(source: Path, tmp_path: Path, message: str, **options: Any) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        import_weights(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


REFUSED = [
    ({"vision_cfg": {"timm_model_name": "convnext_base"}}, "its image tower is timm's convnext_base"),
    ({"vision_cfg": {"attentional_pool": True}}, "its attentional_pool is True"),
    ({"vision_cfg": {"pool_type": "avg"}}, "its pool_type is avg"),
    ({"vision_cfg": {"ls_init_value": 0.1}}, "its ls_init_value is 0.1"),
    ({"vision_cfg": {"layers": 10**9}}, "its vision_cfg's layers is 1000000000"),
    ({"vision_cfg": {"layers": [1, 1]}}, "its vision_cfg's layers is .1, 1."),
    ({"vision_cfg": {"width": "wide"}}, "its vision_cfg's width is wide"),
    ({"vision_cfg": {"head_width": 0}}, "its vision_cfg's head_width is 0"),
    ({"vision_cfg": {"head_width": 18}}, "its vision_cfg has a width of 96 and 5 heads"),
    ({"vision_cfg": {"mlp_ratio": "x"}}, "its mlp_ratio is x"),
    ({"vision_cfg": {"image_size": [64, 32]}}, "its vision_cfg's image_size is"),
    ({"vision_cfg": {"patch_size": 15}}, "its image_size 64 is no multiple of 15"),
    ({"vision_cfg": 3}, "its vision_cfg is 3"),
    ({"embed_dim": None}, "its embed_dim is None"),
    ({"text_cfg": {"vocab_size": 32000}}, "its text_cfg's vocab_size is 32000; CLIP's tokenizer has 49408"),
    ({"text_cfg": {"no_causal_mask": True}}, "its no_causal_mask is True"),
    ({"text_cfg": {"pool_type": "last"}}, "its pool_type is last"),
    ({"text_cfg": {"proj_bias": True}}, "its proj_bias is True"),
    ({"text_cfg": {"heads": 5}}, "its text_cfg has a width of 64 and 5 heads"),
    ({"text_cfg": {"hf_model_name": "google/mt5-base"}}, "no BERT, by the names of its tensors"),
    ({"init_logit_bias": -10}, "it has init_logit_bias"),
    ({"text_cfg": {"hf_model_name": "x", "hf_pooler_type": "max_pooler"}}, "its hf_pooler_type is max_pooler"),
    ({"text_cfg": {"hf_model_name": "x", "hf_proj_type": "deep"}}, "its hf_proj_type is deep"),
    ({"preprocess_cfg": {"interpolation": "bilinear"}}, "its interpolation is bilinear; only bicubic is read"),
    ({"preprocess_cfg": {"resize_mode": "random"}}, "its resize_mode is random"),
    ({"preprocess_cfg": {"fill_color": 255}}, "its fill_color is 255"),
    ({"preprocess_cfg": {"mean": [0.5]}}, "its mean is .0.5."),
    ({"preprocess_cfg": {"std": [0.5, 0, 0.5]}}, "its std is"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_is_not_read_is_named(change: dict[str, Any], said: str, vit: Path, tmp_path: Path) -> None:
    config = json.loads(json.dumps({"model_cfg": hub.MODELS["vit"], "preprocess_cfg": hub.PIXELS}))
    for key, value in change.items():
        part = config if key == "preprocess_cfg" else config["model_cfg"]
        part[key] = {**part[key], **value} if isinstance(part.get(key), dict) and isinstance(value, dict) else value
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "open_clip_model.safetensors").hardlink_to(vit / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    refused(folder, tmp_path, rf"open_clip_config.json: .*{said}.*; read are CLIP's ResNets and vision transformers")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("vit")
    return hub.folder_of("vit", top / "hub", hub.model_of("vit", top / "bert"))


def test_what_the_folder_leaves_open_is_said(tmp_path: Path, command: Callable[..., Result]) -> None:
    folder = hub.folder_of("vit-bert", tmp_path / "hub", hub.model_of("vit-bert", tmp_path / "bert"), preprocess_cfg={})
    state = load_file(folder / "open_clip_model.safetensors")
    state.pop("logit_scale")
    save_file(state, folder / "open_clip_model.safetensors")
    made = command("import", folder, "--output", tmp_path / "out")
    assert made.code == 0, made.err
    assert [line.removeprefix("assumed: ") for line in made.out.splitlines() if line.startswith("assumed")] == [
        "a logit scale of 100.00, since the weights have none",
        "a mean of 0.481, 0.458, 0.408 for pictures, since the folder names none",
        "a std of 0.269, 0.261, 0.276 for pictures, since the folder names none",
        "2 heads in each of BERT's layers, since no config.json of BERT is beside the weights",
    ]
    folder = hub.folder_of("vit", tmp_path / "plain", hub.model_of("vit", tmp_path / "bert"))
    made = command("import", folder, "--output", tmp_path / "out")
    assert "assumed: CLIP's own tokenizer, since the folder has none" in made.out and made.out.count("assumed") == 1


@pytest.mark.parametrize(
    ("file", "config", "said"),
    [
        ("open_clip_config.json", {"model_cfg": {**hub.MODELS["vit"], "multimodal_cfg": {"layers": 12}}}, "is of CoCa, which writes text"),
        ("open_clip_config.json", {"model_cfg": {"vision_cfg": {"timm_model_name": "naflexvit_base_patch16"}}}, "is of NaFlex"),
        ("config.json", {"model_type": "blip"}, "is of BLIP, which writes text; only models of an image tower"),
        ("config.json", {"model_type": "instructblip"}, "is of BLIP"),
        ("config.json", {"model_type": "llava_next"}, "is of LLaVA"),
        ("config.json", {"model_type": "video_llava"}, "is of LLaVA"),
        ("config.json", {"model_type": "qwen2_vl"}, "is of a vision-language model"),
        ("config.json", {"model_type": "siglip2"}, "SigLIP 2 for pictures of any shape .NaFlex."),
        ("config.json", {"model_type": "new", "architectures": ["NewForConditionalGeneration"]}, "is of a model, which writes text"),
    ],
)
def test_models_that_write_and_naflex_are_named(file: str, config: Any, said: str, tmp_path: Path, command: Callable[..., Result]) -> None:
    """Before any weights are read, which may be many gigabytes."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / file).write_text(json.dumps(config))
    weights = "open_clip_model.safetensors" if file.startswith("open_clip") else "model.safetensors"
    (tmp_path / "hub" / weights).write_bytes(b"not read")
    refused(tmp_path / "hub", tmp_path, said)
    made = command("import", tmp_path / "hub", "--output", tmp_path / "out")
    assert made.code == 4 and made.err.count("\n") == 1


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["visual.conv1.weight", "text_decoder.resblocks.0.ln_1.bias"], "is CoCa, which writes text"),
        (["text_decoder.bert.x", "visual_encoder.x"], "is BLIP or another captioning model"),
        (["qformer.encoder.x", "language_model.model.x"], "is BLIP-2"),
        (["model.mm_projector.0.weight", "model.layers.0.x"], "is LLaVA, which"),
        (["multi_modal_projector.linear_1.weight", "language_model.x"], "is LLaVA or its kind"),
        (["lm_head.weight", "model.layers.0.x"], "is a language model"),
    ],
)
def test_tensors_of_models_that_write_are_named(names: list[str], said: str, tmp_path: Path) -> None:
    torch.save({name: torch.zeros(2) for name in names}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", tmp_path, f"w.pt: {said}.*only models of an image tower and a text tower are read")


def test_tensors_of_another_model_than_the_configurations(vit: Path, tmp_path: Path) -> None:
    folder = hub.folder_of("vit", tmp_path / "hub", hub.model_of("vit", tmp_path / "bert"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 3
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    refused(folder, tmp_path, "does not fit open_clip_config.json: 12 missing: visual.transformer.resblocks.2.attn.in_proj_bias, ")


def test_roberta_and_heads_that_do_not_divide(tmp_path: Path) -> None:
    folder = hub.folder_of("vit-bert", tmp_path / "hub", hub.model_of("vit-bert", tmp_path / "bert"))
    for told, said in (({"model_type": "roberta"}, "its text tower is roberta; only BERT is read"),
                       ({"model_type": "bert", "num_attention_heads": 3}, "num_attention_heads is 3, of a width of 128"),
                       ({"model_type": "bert", "hidden_act": "relu"}, "hidden_act is relu")):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(told))
        refused(folder, tmp_path, said)


@pytest.mark.parametrize(
    "towers",
    [
        3,
        {},
        {"model_cfg": {"embed_dim": 10**9}},
        {"model_cfg": {**hub.MODELS["vit"], "quick_gelu": False, "vision_cfg": {**hub.VIT, "width": 8192, "layers": 200}}},
    ],
)
def test_a_checkpoint_with_other_towers_is_refused(towers: Any, vit: Path, tmp_path: Path) -> None:
    """Sizes are compared with the tensors before anything of them is made."""
    import_weights(vit, tmp_path / "out")
    meta = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    meta["towers"] = {**meta["towers"], **towers} if towers and isinstance(towers, dict) else towers
    if towers and isinstance(towers, dict) and "vision_cfg" in towers["model_cfg"]:
        meta["backbone"] = backbone_of_towers(meta["towers"]).name  # a file that agrees with itself
    (tmp_path / "out" / "checkpoint.json").write_text(json.dumps(meta))
    with pytest.raises(BundleError, match=r"not a readable checkpoint|does not fit open_clip-|schema or backbone unknown"):
        towers_from_checkpoint(tmp_path / "out")
