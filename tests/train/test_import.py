"""Import: files of the exact published layouts against transformers and open_clip, and what broken or hostile files meet."""

import copy
import hashlib
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command import Result

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
open_clip = pytest.importorskip("open_clip", reason="training needs the extra `train`")
transformers = pytest.importorskip("transformers", reason="training needs the extra `train`")

from open_clip.model import convert_weights_to_lp
from safetensors.torch import load_file, save_file

from pmclip_deploy.bundle.files import name_of_output
from pmclip_deploy.errors import BundleError, PmclipError, UsageError
from pmclip_deploy.tokens import tokens_from_text
from pmclip_deploy.train import fitting
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import towers_from_checkpoint
from pmclip_deploy.train.fitting import Weights, fitted
from pmclip_deploy.train.importing import import_weights
from pmclip_deploy.train.pickles import Costly, check_pickles
from pmclip_deploy.train.published import weights_from_file
from tests.tiny import clip as tiny_clip
from tests.tiny.backbone import BACKBONES as TOYS
from tests.tiny.backbone import Toy

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit's, of its age

TEXTS = ["is there a fracture?", "chest x-ray of a large pneumothorax on the left"]
TOLERANCE = 1e-4

Tensors = dict[str, Any]


@torch.no_grad()
def randomised(model: Any) -> Any:
    """Every bias, norm and running statistic off its initial value, and every number one that fp16 holds."""
    generator = torch.Generator().manual_seed(0)
    for name, x in model.state_dict().items():
        if x.is_floating_point() and x.ndim:
            noise = torch.randn(x.shape, generator=generator).mul_(0.05 if x.ndim == 1 else 0.005)
            x.copy_((x + (noise.abs() if name.endswith("running_var") else noise)).half())
        elif x.is_floating_point():
            x.fill_(3.25)
    return model.eval()


@pytest.fixture(scope="module")
def vit() -> Any:
    """transformers' CLIP as its configuration stands, which is ViT-B/32."""
    torch.manual_seed(0)
    return randomised(transformers.CLIPModel(transformers.CLIPConfig()))


@pytest.fixture(scope="module")
def vit_folder(vit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hugging-face")
    vit.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit_checkpoint(vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("imported") / "vit"
    import_weights(vit_folder, output)
    return output


@pytest.fixture(scope="module")
def rn50() -> Any:
    """open_clip's own RN50."""
    torch.manual_seed(0)
    return randomised(open_clip.create_model("RN50-quickgelu", pretrained=None))


@pytest.fixture(scope="module")
def rn50_archive(rn50: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript archive as OpenAI's: fp16, and three sizes among the tensors."""
    path = tmp_path_factory.mktemp("openai") / "RN50.pt"
    model = copy.deepcopy(rn50)
    for name, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    inputs = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
    torch.jit.save(torch.jit.trace(model, inputs, check_trace=False).half(), path)
    return path


def light(name: str) -> Tensors:
    """A whole state dict whose tensors each hold one number, so that its file is small."""
    with torch.device("meta"):
        state = BACKBONES[name].build().state_dict()
    return {k: torch.full((), 0.5 if v.is_floating_point() else 0, dtype=v.dtype).expand(v.shape) for k, v in state.items()}


def saved(path: Path, data: Any) -> Path:
    torch.save(data, path)
    return path


def check_refused(source: Path, tmp_path: Path, message: str, error: type[PmclipError] = BundleError, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        import_weights(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


# The same embeddings as the source's.


@torch.no_grad()
def test_vit_embeddings_equal_transformers(vit: Any, vit_checkpoint: Path) -> None:
    model, meta, _ = towers_from_checkpoint(vit_checkpoint)
    assert meta["backbone"] == "ViT-B/32" and meta["provenance"]["import"]["kind"] == "Hugging Face CLIPModel"
    assert meta["logit_scale"] == round(float(torch.tensor(3.25).exp()), 4)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    tokens = torch.from_numpy(tokens_from_text(vit_checkpoint / "tokenizer.json", TEXTS, 77, 0))
    image = vit.visual_projection(vit.vision_model(pixels).pooler_output)
    text = vit.text_projection(vit.text_model(tokens).pooler_output)
    assert image.std() > 0.1 and text.std() > 0.1 and (image[0] - image[1]).abs().max() > 0.1 < (text[0] - text[1]).abs().max()
    torch.testing.assert_close(model.encode_image(pixels), image, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model.encode_text(tokens), text, atol=TOLERANCE, rtol=0)

    # The comparison sees the activation: with plain GELU the same weights are far off.
    plain = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
    plain.load_state_dict(model.state_dict())
    assert (plain.eval().encode_image(pixels) - image).abs().max() > 100 * TOLERANCE
    assert (plain.encode_text(open_clip.tokenize(TEXTS)) - text).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_rn50_archive_gives_open_clips_embeddings(rn50: Any, rn50_archive: Path, tmp_path: Path) -> None:
    meta = import_weights(rn50_archive, tmp_path / "rn50", name="mine")
    assert meta["name"] == "mine" and meta["backbone"] == "RN50"
    assert meta["provenance"]["import"]["kind"] == "OpenAI TorchScript archive"
    model, _, tensors = towers_from_checkpoint(tmp_path / "rn50")
    assert {k.removeprefix("clip.") for k in tensors} == rn50.state_dict().keys()
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    image, text = rn50.encode_image(pixels), rn50.encode_text(open_clip.tokenize(TEXTS))
    assert image.std() > 0.01 and text.std() > 0.1
    torch.testing.assert_close(model.encode_image(pixels), image, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model.encode_text(open_clip.tokenize(TEXTS)), text, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.slow("a backbone of real size")
def test_rn50x4_goes_through_and_computes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    source = {k: (0.02 * torch.randn(v.shape, generator=generator)).half() if v.ndim > 1 else v for k, v in light("RN50x4").items()}
    meta = import_weights(saved(tmp_path / "w.pth", {"state_dict": source, "optimizer_state_dict": {}}), tmp_path / "out", "RN50x4")
    assert (meta["backbone"], meta["name"]) == ("RN50x4", "out")
    model, _, _ = towers_from_checkpoint(tmp_path / "out")
    assert all(torch.equal(v, source[k].to(v.dtype)) for k, v in model.state_dict().items())
    out = model.encode_image(torch.randn(1, 3, 288, 288, generator=generator))
    assert out.shape == (1, 640) and out.isfinite().all()


OF_CLIP_MODEL = {  # tower: (layers, width, heads), the vision's patch
    "ViT-B/16": {"text": (12, 512, 8), "vision": (12, 768, 12), "patch": 16},
    "ViT-L/14": {"text": (2, 768, 12), "vision": (2, 1024, 16), "patch": 14},  # of 12 and 24 layers two: all else is the published shape
    "ViT-L/14@336": {"text": (2, 768, 12), "vision": (2, 1024, 16), "patch": 14},
}


def clip_model(text: tuple[int, ...], vision: tuple[int, ...], patch: int, width: int, size: int) -> Any:
    """transformers' CLIP."""
    torch.manual_seed(0)
    sizes = [dict(zip(("num_hidden_layers", "hidden_size", "num_attention_heads"), of, strict=True)) for of in (text, vision)]
    wide = [{**of, "intermediate_size": 4 * of["hidden_size"], "projection_dim": width} for of in sizes]
    seen = {**wide[1], "patch_size": patch, "image_size": size}
    config = transformers.CLIPConfig(text_config=wide[0], vision_config=seen, projection_dim=width)
    return randomised(transformers.CLIPModel(config))


@pytest.mark.parametrize("name", OF_CLIP_MODEL)
@torch.no_grad()
def test_other_vision_transformers_equal_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("ViT-L/14"):
        monkeypatch.setitem(BACKBONES, name, tiny_clip.shallow(name, tmp_path))
    size = BACKBONES[name].preprocess.size
    published = clip_model(**OF_CLIP_MODEL[name], width=BACKBONES[name].embed_dim, size=size)
    published.save_pretrained(tmp_path / "folder")
    assert import_weights(tmp_path / "folder", tmp_path / "out")["backbone"] == name
    model, _, _ = towers_from_checkpoint(tmp_path / "out")
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    tokens = torch.from_numpy(tokens_from_text(tmp_path / "out" / "tokenizer.json", TEXTS, 77, 0))
    image = published.visual_projection(published.vision_model(pixels).pooler_output)
    text = published.text_projection(published.text_model(tokens).pooler_output)
    assert image.std() > 0.1 and text.std() > 0.1
    torch.testing.assert_close(model.encode_image(pixels), image, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model.encode_text(tokens), text, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [b.name for b in BACKBONES.values() if b.importable])
def test_the_shapes_tell_which_backbone(name: str) -> None:
    found, tensors = fitted(Weights("", Path("w"), light(name), None), None)
    assert found.name == name.removesuffix("-gelu") and len(tensors) == len(light(name))  # of two with the same shapes OpenAI's


def test_heads_of_another_backbone_are_refused(tmp_path: Path) -> None:
    """No tensor's shape tells how many heads a layer has; config.json does, and that of ViT-L/14 is of no use to ViT-B/16's weights."""
    saved(tmp_path / "pytorch_model.bin", light("ViT-B/16"))
    heads = {"text_config": {"num_attention_heads": 12}, "vision_config": {"num_attention_heads": 16}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **heads}))
    with pytest.raises(BundleError, match="text_config has 12 heads, OpenAI's ViT-B/16 8"):
        import_weights(tmp_path, tmp_path / "out")


# Every kind of file gives the same tensors.


def check_same(path: Path, wanted: Tensors, kind: str) -> None:
    weights = weights_from_file(path)
    assert weights.kind == kind
    assert weights.tensors.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(weights.tensors[name].to(x.dtype), x), name


def test_archive_holds_the_models_tensors(rn50: Any, rn50_archive: Path) -> None:
    check_same(rn50_archive, rn50.state_dict(), "OpenAI TorchScript archive")
    scripted = torch.jit.load(rn50_archive, map_location="cpu").state_dict()  # torch's own reading
    assert scripted.keys() - rn50.state_dict().keys() == {"input_resolution", "context_length", "vocab_size", "attn_mask"}


def test_pubmedclip_checkpoint_in_mixed_precision(rn50: Any, tmp_path: Path) -> None:
    mixed = copy.deepcopy(rn50)
    convert_weights_to_lp(mixed)  # fp16 but for norms and embeddings, as the authors' training leaves it
    state = mixed.state_dict()
    assert {v.dtype for v in state.values()} == {torch.float16, torch.float32, torch.int64}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    data = {"best_epoch": 31, "state_dict": state, "optimizer_state_dict": optimizer, "best_loss": 0.7}
    check_same(saved(tmp_path / "PubMedCLIP_RN50.pth", data), rn50.state_dict(), "PubMedCLIP training checkpoint")


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (lambda s: s, "state dict with OpenAI's names"),
        (lambda s: {**s, "input_resolution": torch.tensor(224), "vocab_size": torch.tensor(49408)}, "state dict with OpenAI's names"),
        (lambda s: {"epoch": 3, "name": "x", "state_dict": s, "optimizer": {}}, "training checkpoint with OpenAI's names"),
        (lambda s: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in s.items()}}, "open_clip state dict"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_layouts(made: Callable[[Tensors], Any], kind: str, zipped: bool, tmp_path: Path) -> None:
    state = light("ViT-B/32")
    torch.save(made(state), tmp_path / "weights.txt", _use_new_zipfile_serialization=zipped)
    check_same(tmp_path / "weights.txt", state, kind)


def test_hugging_face_bin_and_file_and_open_clip_safetensors(vit: Any, vit_folder: Path, vit_checkpoint: Path, tmp_path: Path) -> None:
    wanted = {k.removeprefix("clip."): v for k, v in load_file(vit_checkpoint / "model.safetensors").items()}
    check_same(vit_folder / "model.safetensors", wanted, "Hugging Face CLIPModel")
    old = {**vit.state_dict(), "text_model.embeddings.position_ids": torch.arange(77)[None]}
    check_same(saved(tmp_path / "pytorch_model.bin", old), wanted, "Hugging Face CLIPModel")
    save_file(wanted, tmp_path / "open_clip_model.safetensors")
    check_same(tmp_path / "open_clip_model.safetensors", wanted, "state dict with OpenAI's names")


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (lambda s: {f"model.{k}": v for k, v in s.items()}, "state dict with OpenAI's names"),
        (lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}, "state dict with OpenAI's names"),
        (lambda s: {f"clip.{k}": v for k, v in s.items()}, "state dict with OpenAI's names"),
        (lambda s: {f"module._orig_mod.model.clip.{k}": v for k, v in s.items()}, "open_clip state dict"),
        (lambda s: {k.replace("visual.", "visual._orig_mod."): v for k, v in s.items()}, "state dict with OpenAI's names"),
        (lambda s: {k if k.startswith(("visual.", "logit")) else f"text.{k}": v for k, v in s.items()}, "state dict with OpenAI's names"),
        (lambda s: {"model": s, "args": {"lr": 1e-3}}, "training checkpoint with OpenAI's names"),
        (lambda s: {"model_state_dict": s, "epoch": 3}, "training checkpoint with OpenAI's names"),
        (lambda s: {"model": {"state_dict": {f"module.{k}": v for k, v in s.items()}}}, "open_clip state dict"),
        (lambda s: {"module": s, "step": torch.tensor(3)}, "training checkpoint with OpenAI's names"),  # DeepSpeed
        (lambda s: {"ema": s, "step": torch.tensor(3), "optim": {"lr": 1e-3}}, "training checkpoint with OpenAI's names"),  # of any name
        (
            lambda s: {"pytorch-lightning_version": "2.4.0", "state_dict": {f"model.{k}": v for k, v in s.items()}, "hyper_parameters": {}},
            "PyTorch Lightning checkpoint",
        ),
    ],
)
def test_wrapped_and_prefixed_checkpoints(made: Callable[[Tensors], Any], kind: str, tmp_path: Path) -> None:
    state = light("ViT-B/32")
    check_same(saved(tmp_path / "w.ckpt", made(state)), state, kind)


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path: Path) -> None:
    """Under a usual key or another; unwrapping it would never end."""
    for key in ("model", "clip"):
        loop: dict[str, Any] = {"step": torch.tensor(3)}
        loop[key] = loop
        check_refused(saved(tmp_path / "w.pt", loop), tmp_path, "fits none of")


def test_wrapped_hugging_face_names(vit: Any, vit_checkpoint: Path, tmp_path: Path) -> None:
    wanted = {k.removeprefix("clip."): v for k, v in load_file(vit_checkpoint / "model.safetensors").items()}
    wrapped = {"state_dict": {f"model.clip.{k}": v for k, v in vit.state_dict().items()}, "pytorch-lightning_version": "2.4.0"}
    check_same(saved(tmp_path / "w.ckpt", wrapped), wanted, "Hugging Face CLIPModel")


def test_two_models_in_a_file_are_not_mixed(tmp_path: Path) -> None:
    state = light("ViT-B/32")
    both = {f"{of}.{k}": v for of in ("student", "teacher") for k, v in state.items()}
    check_refused(saved(tmp_path / "w.pt", both), tmp_path, "holds several models, named student., teacher.; save the tensors of one alone")


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_in_shards(vit: Any, vit_checkpoint: Path, safe: bool, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    vit.save_pretrained(folder, max_shard_size="200MB")
    if not safe:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        for name in set(index["weight_map"].values()):
            torch.save(load_file(folder / name), folder / f"pytorch_{name}.bin")
            (folder / name).unlink()
        renamed = {k: f"pytorch_{name}.bin" for k, name in index["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({**index, "weight_map": renamed}), encoding="utf-8-sig")
        (folder / "model.safetensors.index.json").unlink()
    wanted = {k.removeprefix("clip."): v for k, v in load_file(vit_checkpoint / "model.safetensors").items()}
    check_same(folder, wanted, "Hugging Face CLIPModel")
    (index_file,) = folder.glob("*.index.json")
    check_same(index_file, wanted, "Hugging Face CLIPModel")
    if safe:
        meta = import_weights(folder, tmp_path / "whole")
        shards = meta["provenance"]["import"]["shards"]
        assert shards == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("model-*")} and len(shards) > 2
    sorted(folder.glob("*model-*"))[0].unlink()
    check_refused(folder, tmp_path, "1 of its [0-9]+ files are missing: .*model-00001-of-")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..", ""])
def test_a_shard_lies_beside_its_index(name: str, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"logit_scale": name}}))
    check_refused(tmp_path / "hf", tmp_path, "is no file beside it|are missing")


# The activation, which no tensor tells.


GELU = {"model_type": "clip", "text_config": {"hidden_act": "gelu"}, "vision_config": {"hidden_act": "gelu"}}
OPEN_CLIP = {"embed_dim": 512, "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}, "text_cfg": {"heads": 8}}


@torch.no_grad()
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_a_folder_computes_with_its_own_activation(vit: Any, act: str, tmp_path: Path) -> None:
    config = copy.deepcopy(vit.config)
    config.text_config.hidden_act = config.vision_config.hidden_act = act
    published = transformers.CLIPModel(config).eval()
    published.load_state_dict(vit.state_dict())
    published.save_pretrained(tmp_path / "hf")
    for source in (tmp_path / "hf", tmp_path / "hf" / "model.safetensors"):  # the bare file has its config.json beside it
        meta = import_weights(source, tmp_path / "out")
        assert meta["backbone"] == {"gelu": "ViT-B/32-gelu", "quick_gelu": "ViT-B/32"}[act]
        assert [meta["provenance"]["import"][key] for key in ("activation", "activation_from")] == [act, "config.json"]
    model, _, _ = towers_from_checkpoint(tmp_path / "out")
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    tokens = torch.from_numpy(tokens_from_text(tmp_path / "out" / "tokenizer.json", TEXTS, 77, 0))
    image = published.visual_projection(published.vision_model(pixels).pooler_output)
    torch.testing.assert_close(model.encode_image(pixels), image, atol=TOLERANCE, rtol=0)
    text = published.text_projection(published.text_model(tokens).pooler_output)
    torch.testing.assert_close(model.encode_text(tokens), text, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("file", "config", "options", "said"),
    [
        (None, None, {}, ("quick_gelu", "assumed")),
        (None, None, {"activation": "gelu"}, ("gelu", "--activation")),
        (None, None, {"backbone": "ViT-B/32-gelu"}, ("gelu", "--backbone")),
        ("config.json", GELU, {}, ("gelu", "config.json")),
        ("config.json", GELU, {"backbone": "ViT-B/32"}, ("gelu", "config.json")),
        ("config.json", GELU, {"activation": "quick_gelu"}, ("quick_gelu", "--activation")),
        ("config.json", {"model_type": "clip"}, {}, ("quick_gelu", "config.json")),
        ("config.json", {"model_type": "clip", "text_config_dict": GELU["text_config"], "vision_config": GELU["vision_config"]}, {},
         ("gelu", "config.json")),
        ("config.json", {"model_type": "bert"}, {}, ("quick_gelu", "assumed")),  # of something else in a folder of all kinds
        ("open_clip_config.json", {"model_cfg": OPEN_CLIP}, {}, ("gelu", "open_clip_config.json")),
        ("open_clip_config.json", {"model_cfg": {**OPEN_CLIP, "quick_gelu": True}}, {}, ("quick_gelu", "open_clip_config.json")),
        ("config.json", OPEN_CLIP, {}, ("gelu", "config.json")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("weights", ["epoch_32.pt", "open_clip_pytorch_model.bin"])
def test_who_says_which_activation(
    weights: str,
    file: str | None,
    config: Any,
    options: dict[str, str],
    said: tuple[str, str],
    tmp_path: Path,
    command: Callable[..., Result],
) -> None:
    if weights.startswith("open_clip") and file == "config.json":
        pytest.skip("open_clip_config.json is what belongs to that file")
    if file is not None:
        (tmp_path / file).write_text(json.dumps(config), encoding="utf-8-sig")
    path = saved(tmp_path / weights, light("ViT-B/32"))
    given = [word for key, value in options.items() for word in (f"--{key}", value)]
    made = command("import", path, "--output", tmp_path / "out", *given)
    assert made.code == 0 and f"activation: {said[0]}, " in made.out and said[1] in made.out, made.err
    meta = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    assert meta["backbone"] == {"gelu": "ViT-B/32-gelu", "quick_gelu": "ViT-B/32"}[said[0]]
    assert [meta["provenance"]["import"][key] for key in ("activation", "activation_from")] == list(said)


@pytest.mark.parametrize(
    ("file", "config", "message"),
    [
        ("config.json", {**GELU, "text_config": {"hidden_act": "gelu_new"}}, "text_config has gelu_new and vision_config has gelu; both"),
        ("config.json", {**GELU, "text_config": {}}, "config.json: text_config has quick_gelu and vision_config has gelu; both towers"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "normalises pictures by a mean of .0.5, 0.5, 0.5., OpenAI"),
        ("config.json", {**GELU, "vision_config": {"num_attention_heads": 16, "hidden_act": "gelu"}}, "vision_config has 16 heads"),
    ],
)
def test_a_config_that_no_backbone_fits(file: str, config: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(GELU))
    (tmp_path / "hf" / file).write_text(json.dumps(config))
    saved(tmp_path / "hf" / "pytorch_model.bin", light("ViT-B/32"))
    check_refused(tmp_path / "hf", tmp_path, message)


# What is of another kind is named.


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["text_model.embeddings.x", "vision_model.head.attention.in_proj_weight", "logit_bias"], "a SigLIP model"),
        (["visual.trunk.attn_pool.q.weight", "text.transformer.resblocks.0.ln_1.bias", "logit_bias"], "a SigLIP model"),
        (["visual.trunk.blocks.0.norm1.weight", "text.transformer.embeddings.word_embeddings.weight"], "other than BiomedCLIP"),
        (["visual.class_embedding", "text.transformer.embeddings.word_embeddings.weight"], "whose text tower is a BERT"),
        (["base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"], "a LoRA adapter; .*merge it into its base"),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"], "a LoRA adapter"),
        (["transformer.resblocks.0.attn.lora_q.weight"], "a LoRA adapter"),
        (["weight", "bias"], "a head alone, without towers; .*give the weights of the whole model"),
        (["classifier.0.weight", "classifier.0.bias"], "a head alone"),
        (["vision_model.embeddings.class_embedding"], "the image tower alone"),
        (["text_model.final_layer_norm.bias"], "the text tower alone"),
    ],
)
def test_foreign_tensors_are_named(names: list[str], said: str, tmp_path: Path) -> None:
    message = rf"w.pt: is .*{said}" if said.startswith("other") or said.startswith("whose") else rf"w.pt: is {said}"
    check_refused(saved(tmp_path / "w.pt", {name: torch.zeros(2) for name in names}), tmp_path, message)
    check_refused(saved(tmp_path / "w.pt", {"model": {name: torch.zeros(2) for name in names}}), tmp_path, message)


def test_one_tower_of_the_right_shapes_is_named(tmp_path: Path) -> None:
    visual = {k: v for k, v in light("ViT-B/32").items() if k.startswith("visual.")}
    check_refused(saved(tmp_path / "w.pt", visual), tmp_path, "is the image tower alone; it fits none of ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 file"),
        (b"GGUF\3\0\0\0\0", "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS, without the weights; run `git lfs pull`"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0", "compressed with gzip"),
    ],
)
def test_foreign_files_are_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    check_refused(tmp_path / "w", tmp_path, f"w: is {said}")


def test_a_folder_with_foreign_towers_is_named(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    towers = {"text_cfg": {"hf_model_name": "microsoft/BiomedNLP-PubMedBERT"}, "vision_cfg": {"timm_model_name": "vit_base_patch16_224"}}
    (tmp_path / "hf" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 512, **towers}}))
    (tmp_path / "hf" / "open_clip_pytorch_model.bin").write_bytes(b"not read")
    check_refused(tmp_path / "hf", tmp_path, "it has the tower microsoft/BiomedNLP-PubMedBERT, which is none of CLIP's own")


def test_an_adapters_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    check_refused(tmp_path / "lora", tmp_path, "lora: is a LoRA adapter; merge it into its base model")


def test_counters_that_old_files_lack_are_zero(tmp_path: Path) -> None:
    state = {k: v for k, v in light("RN50").items() if not k.endswith("num_batches_tracked")}
    import_weights(saved(tmp_path / "old.pt", state), tmp_path / "out")
    model, _, _ = towers_from_checkpoint(tmp_path / "out")
    assert model.visual.bn1.num_batches_tracked == 0


# What does not fit is named.


def changed(name: str, **changes: Any) -> Tensors:
    state = light(name)
    for key, value in changes.items():
        state.pop(key.replace("__", "."))
        if value is not None:
            state[key.replace("__", ".")] = value
    return state


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (lambda: changed("ViT-B/32", ln_final__bias=None, logit_scale=None), {}, "ViT-B/32: 2 missing: ln_final.bias, logit_scale$"),
        (lambda: {**light("RN50"), "head.weight": torch.zeros(2)}, {}, "RN50: 1 extra: head.weight$"),
        (lambda: {k: v for k, v in light("RN50").items() if not k.startswith("transformer")}, {}, r"144 missing: transformer.*, \.\.\."),
        (
            lambda: changed("ViT-B/32", visual__conv1__weight=torch.zeros(768, 3, 16, 16)),
            {},
            "1 misshapen: visual.conv1.weight is 768x3x16x16, must be 768x3x32x32$",
        ),
        (lambda: changed("ViT-B/32", logit_scale=torch.zeros(1)), {}, "logit_scale is 1, must be a scalar"),
        (lambda: changed("ViT-B/32", ln_final__bias=torch.zeros(512, dtype=torch.int8)), {}, "1 not floats: ln_final.bias"),
        (lambda: changed("ViT-B/32", ln_final__bias=torch.zeros(512, device="meta")), {}, "1 not floats: ln_final.bias"),
        (lambda: changed("ViT-B/32", ln_final__bias=torch.zeros(512).to_sparse()), {}, "1 not floats: ln_final.bias"),
        (lambda: changed("ViT-B/32", ln_final__bias=torch.zeros(()).expand(1 << 40)), {}, "ln_final.bias is 1099511627776, must be 512"),
        (lambda: light("RN50"), {"backbone": "ViT-B/32"}, "weights of RN50, not of ViT-B/32"),
        (lambda: changed("ViT-B/32", logit_scale=torch.tensor(torch.nan)), {}, "1 tensors hold NaN or infinity: logit_scale"),
        (lambda: changed("ViT-B/32", ln_final__bias=torch.full((512,), 1e300, dtype=torch.float64)), {}, "infinity: ln_final.bias"),
        (lambda: {"a": torch.zeros(2)}, {}, "w.pt: fits none of BiomedCLIP, ViT-B/32, .*RN50.* .1 tensors, first a.; give"),
        (lambda: {}, {}, "holds no named tensors"),
        (lambda: torch.zeros(3), {}, "holds no named tensors"),
        (lambda: {"state_dict": {"x": 1}}, {}, "holds no named tensors"),
    ],
)
def test_what_does_not_fit_is_named(state: Callable[[], Any], options: dict[str, str], message: str, tmp_path: Path) -> None:
    check_refused(saved(tmp_path / "w.pt", state()), tmp_path, message, **options)


def test_every_family_is_asked_and_the_best_fit_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that takes all names for its own and stands first keeps no file from another."""
    greedy = Greedy("greedy", TOYS[0].preprocess, embed_dim=12, context_length=20, pad_id=0)
    monkeypatch.setattr(fitting, "BACKBONES", {"greedy": greedy, **BACKBONES})
    weights = weights_from_file(saved(tmp_path / "w.pt", light("RN50")))
    assert weights.kind == "state dict with OpenAI's names" and fitted(weights, None)[0].name == "RN50"


class Greedy(Toy):
    def from_published(self, tensors: Tensors) -> tuple[str | None, Tensors]:
        return "greedy", {f"greedy.{name}": tensor for name, tensor in tensors.items()}


def test_hugging_face_faults_are_named(tmp_path: Path) -> None:
    torch.save(
        {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(512, 512), "vision_model.x": torch.ones(1)}, tmp_path / "w"
    )
    check_refused(tmp_path / "w", tmp_path, "fits none of ")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "model_type is not clip"),
        ({"model_type": "clip", "text_config": {"num_attention_heads": 16}}, "has none of model.safetensors"),
        ({"model_type": "siglip"}, "has none of model.safetensors"),
        ({"model_type": "siglip2"}, "is of SigLIP 2 for pictures of any shape"),
        ({"model_type": "clip", "text_config": 3}, "has none of model.safetensors"),
        ([], "model_type is not clip"),
        (None, "no config.json"),
    ],
)
def test_hugging_face_folders_that_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    if config is not None:
        (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    check_refused(tmp_path / "in", tmp_path, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"backbone": "ViT-H/14"}, "unknown"), ({"backbone": "pmclip-lite"}, "no published weights"), ({"name": "a/b"}, "is no name")],
)
def test_bad_arguments(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        import_weights(tmp_path, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("folder", "name", "called"),
    [("hip-2026", None, "hip-2026"), ("our hips (v2)", None, "our-hips-v2"), ("x", "pmclip-lite", "pmclip-lite"), ("x", "é_1", "é_1")],
)
def test_a_name_is_given_or_the_folders(folder: str, name: str | None, called: str, tmp_path: Path) -> None:
    assert name_of_output(tmp_path / folder, name) == called


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a\nb", "\x1b[31mred", "two words", "x" * 65])
def test_what_is_no_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no name"):
        name_of_output(tmp_path, name)


# Files that are broken, or worse.


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes], **options: Any) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 3)
        self.register_buffer("wide", torch.arange(6.0).view(2, 3).T)
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.wide.sum() + self.sizes[0]


@pytest.fixture(scope="module")
def small_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.pt"
    torch.jit.save(torch.jit.script(Small()), path)
    return path


def pickled(kind: str, data: Any, path: Path, small_archive: Path) -> Path:
    if kind == "pickle":
        path.write_bytes(pickle.dumps(data, protocol=2))
    elif kind == "archive":
        rewritten(small_archive, path, lambda name, old: pickle.dumps(data, protocol=2) if name.endswith("/data.pkl") else old)
    else:
        torch.save(data, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "archive"])
def test_a_hostile_pickle_is_refused_and_nothing_runs(kind: str, small_archive: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = pickled(kind, {"state_dict": {"a": 1}, "x": Hostile(marker)}, tmp_path / "w", small_archive)
    pickle.loads(pickle.dumps(Hostile(marker)))  # noqa: S301 (it does run where it is let)
    assert marker.exists()
    marker.unlink()
    check_refused(path, tmp_path, r"names (posix|nt)\.system, which .* could run code")
    assert not marker.exists()


def test_the_code_in_an_archive_is_never_read(small_archive: Path, tmp_path: Path) -> None:
    broken = rewritten(small_archive, tmp_path / "a.pt", lambda name, old: b"def (" if "/code/" in name else old)
    with pytest.raises(RuntimeError):
        torch.jit.load(broken)
    wanted = torch.jit.load(small_archive).state_dict()
    check_same(broken, wanted, "OpenAI TorchScript archive")


def test_an_archive_saved_from_a_gpu_is_read(small_archive: Path, tmp_path: Path) -> None:
    cpu, cuda = (b"X" + len(d).to_bytes(4, "little") + d for d in (b"cpu", b"cuda:0"))
    path = rewritten(small_archive, tmp_path / "g.pt", lambda name, old: old.replace(cpu, cuda) if name.endswith("/data.pkl") else old)
    assert cuda in zipfile.ZipFile(path).read("small/data.pkl")
    check_same(path, torch.jit.load(small_archive).state_dict(), "OpenAI TorchScript archive")


def test_an_archives_tensor_cannot_reach_beyond_its_storage(small_archive: Path, tmp_path: Path) -> None:
    two_by_three = b"(K\x03K\x02t"
    path = rewritten(small_archive, tmp_path / "a.pt", lambda name, old: old.replace(two_by_three, b"(J\xff\xff\xff\x7fK\x02t"))
    assert two_by_three in zipfile.ZipFile(small_archive).read("small/data.pkl")
    check_refused(path, tmp_path, "damaged")


def test_a_bomb_is_refused(tmp_path: Path, small_archive: Path) -> None:
    zeros = saved(tmp_path / "z.pt", {"a": torch.zeros(1 << 20)})
    for source in (zeros, small_archive):
        path = rewritten(source, tmp_path / "bomb.pt", lambda name, old: old + bytes(1 << 20), compression=zipfile.ZIP_DEFLATED)
        check_refused(path, tmp_path, "its data is compressed")


def nested(levels: int = 45) -> bytes:
    """Pickles a tuple that is twice in the next, and that in the next; the last stays on the stack, and in the memo under 0."""
    return b"h\x00".join([b"N\x85q\x00", *[b"\x86q\x00"] * levels])


WIDE = 1 << 30000, 1 << 32000
COSTLY = {  # pickles without their first two bytes and the last
    "key": b"}" + nested() + b"Ns",
    "keys": b"}(" + nested() + b"Nu",
    "dict of a mark": b"(" + nested() + b"Nd",
    "element": b"\x8f(" + nested() + b"\x90",
    "frozen element": b"(" + nested() + b"\x91",
    "storage": nested() + b"Q",
    "in a list": b"]" + nested() + b"a",
    "twice": b"}" + nested(15) + b"Ns" + b"h\x00Ns" * 1000,
    "by DUP": b"}N\x85" + b"2\x86" * 45 + b"Ns",
    "by MEMOIZE": b"}N\x85\x94" + b"".join(b"h" + bytes([i]) * 1 + b"h" + bytes([i]) + b"\x86\x94" for i in range(45)) + b"Ns",
    "wide numbers": b"}(" + b"".join(b"\x8b\x10\x10\x00\x00" + i.to_bytes(0x1010, "little") + b"N" for i in WIDE) + b"u",
    "memo": b"}r\xff\xff\xff\x7f",
    "memo as text": b"}p2000000000\n",
}


@pytest.mark.parametrize("kind", COSTLY)
@pytest.mark.parametrize("packed", ["alone", "legacy", "zip", "archive", "two of a name", "in capitals"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_pickle_that_costs_more_than_it_holds_is_refused(kind: str, packed: str, small_archive: Path, tmp_path: Path) -> None:
    content, path = b"\x80\x02" + COSTLY[kind] + b".", tmp_path / "w"
    if packed == "alone":
        path.write_bytes(content)
    elif packed == "legacy":
        torch.save({}, path, _use_new_zipfile_serialization=False)
        before, empty, _ = path.read_bytes().rpartition(b"\x80\x02}q\x00.")
        assert empty
        path.write_bytes(before + content)
    else:
        source = small_archive if packed == "archive" else saved(tmp_path / "z.pt", {"a": torch.zeros(1)})
        rewritten(source, path, lambda name, old: content if name.endswith("/data.pkl") and packed in ("zip", "archive") else old)
        if packed not in ("zip", "archive"):
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr("z/data.pkl" if packed == "two of a name" else "z/DATA.PKL", content)
    check_refused(path, tmp_path, "a pickle (whose|with) .*, so it is refused")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_pickle_that_unpacks_to_more_than_its_file_is_refused(tmp_path: Path) -> None:
    for name in ("z/data.pkl", "z/code/data.pkl"):
        path = rewritten(saved(tmp_path / "z.pt", {"a": torch.zeros(1)}), tmp_path / "w", lambda name, old: old)
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, bytes(1 << 20))
        with pytest.raises(Costly, match="more bytes than the file"):
            check_pickles(path)


def test_a_checkpoint_with_its_optimizer_is_no_costly_pickle(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    keys = {(1 << 63) - 1: "a wide key", ("a", 1): 2}
    for zipped in (True, False):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": random.getstate(), "seed": 1 << 127, "keys": keys}
        torch.save(state, tmp_path / "w", _use_new_zipfile_serialization=zipped)
        check_pickles(tmp_path / "w")


def test_a_storage_is_a_number(tmp_path: Path, small_archive: Path) -> None:
    """Code may be compressed, so no tensor may lie there."""
    path = rewritten(small_archive, tmp_path / "a.pt", lambda name, old: old.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00x"))
    assert b"X\x01\x00\x00\x000" in zipfile.ZipFile(small_archive).read("small/data.pkl")
    check_refused(path, tmp_path, "a.pt: no weights that can be read, or a damaged file; get it again")


def test_a_declared_giant_is_refused(tmp_path: Path) -> None:
    zeros = saved(tmp_path / "z.pt", {"a": torch.zeros(300)})
    count, giant = b"M\x2c\x01", b"\x8a\x06" + (1 << 44).to_bytes(6, "little")
    path = rewritten(zeros, tmp_path / "giant.pt", lambda name, old: old.replace(count, giant) if name.endswith("/data.pkl") else old)
    assert count in zipfile.ZipFile(zeros).read("z/data.pkl")
    check_refused(path, tmp_path, "damaged")
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "giant.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    check_refused(tmp_path / "giant.safetensors", tmp_path, "damaged")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"just a text file\n", "damaged"),
        (b"\x80\x02}q\x00.", "damaged|no named tensors"),
        (b"PK\x03\x04", "damaged"),
        ((1 << 62).to_bytes(8, "little") + b"{", "damaged"),
        ((2).to_bytes(8, "little") + b"{}", "no named tensors"),
        (pickle.dumps([1, 2, 3]), "damaged|no named tensors"),
    ],
)
def test_files_that_are_no_weights(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    check_refused(tmp_path / "w", tmp_path, message)


@pytest.mark.parametrize("share", [0.3, 0.99])
def test_truncated_files(share: float, small_archive: Path, tmp_path: Path) -> None:
    state = light("ViT-B/32")
    torch.save(state, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    save_file({k: v.contiguous() for k, v in state.items() if v.ndim < 2}, tmp_path / "safetensors")
    saved(tmp_path / "zip", state)
    (tmp_path / "archive").write_bytes(small_archive.read_bytes())
    for kind in ("legacy", "safetensors", "zip", "archive"):
        data = (tmp_path / kind).read_bytes()
        (tmp_path / kind).write_bytes(data[: int(share * len(data))])
        check_refused(tmp_path / kind, tmp_path, "damaged")


def test_a_flipped_bit_in_an_archive_is_noticed(small_archive: Path, tmp_path: Path) -> None:
    data = bytearray(small_archive.read_bytes())
    data[data.index(torch.arange(6.0).numpy().tobytes())] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    check_refused(tmp_path / "a.pt", tmp_path, "damaged")


def test_a_zip_of_something_else_and_a_missing_path(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("a/b.txt", "x")
    check_refused(tmp_path / "w.zip", tmp_path, "not one that torch wrote")
    check_refused(tmp_path / "nowhere.pt", tmp_path, "not found")


# Writing.


def test_only_a_checkpoint_is_overwritten(tmp_path: Path) -> None:
    source, output = saved(tmp_path / "w.pt", light("RN50")), tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="not overwritten"):
        import_weights(source, output)
    (output / "thesis.tex").unlink()
    import_weights(source, output)
    assert {p.name for p in output.iterdir()} == {"model.safetensors", "checkpoint.json", "tokenizer.json"}
    first = (output / "model.safetensors").read_bytes()
    import_weights(source, output, name="again")
    assert json.loads((output / "checkpoint.json").read_text())["name"] == "again"
    assert (output / "model.safetensors").read_bytes() == first
    assert {p.name for p in tmp_path.iterdir()} == {"w.pt", "out"}
    with pytest.raises(BundleError, match="is a checkpoint already"):
        import_weights(output, tmp_path / "other")
    (output / "state.pt").write_bytes(b"a training state")
    with pytest.raises(BundleError, match="not overwritten"):
        import_weights(source, output)
    with pytest.raises(BundleError, match="not overwritten"):
        import_weights(source, source)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    source = saved(tmp_path / "w.pt", light("RN50"))
    for place in (tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(BundleError, match="cannot be written"):
            import_weights(source, place, name="x")


def test_the_command(tmp_path: Path, command: Callable[..., Result]) -> None:
    code, out, err = command("import", saved(tmp_path / "w.bin", light("RN50")), "--output", tmp_path / "out", "--json")
    assert code == 0 and not err
    report = json.loads(out)
    assert (report["schema"], report["backbone"], report["name"]) == ("pmclip-deploy/import/1", "RN50", "out")
    assert report["sha256"] == hashlib.sha256((tmp_path / "w.bin").read_bytes()).hexdigest()
    assert report["source"] == "w.bin" and "user's" in report["licence"]

    code, out, err = command("import", saved(tmp_path / "bad", Hostile(tmp_path / "ran")), "--output", tmp_path / "no")
    assert code == 4 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"w.bin", "out", "bad"}
