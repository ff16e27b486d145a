"""LoRA adapters: equal to PEFT's merge_and_unload where PEFT is installed, to the formula everywhere, and adapters that are refused."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
open_clip = pytest.importorskip("open_clip", reason="training needs the extra `train`")
transformers = pytest.importorskip("transformers", reason="training needs the extra `train`")

from safetensors.torch import load_file, save_file

from pmclip_deploy.errors import BundleError
from pmclip_deploy.train.checkpoint import read_checkpoint
from pmclip_deploy.train.importing import import_weights
from pmclip_deploy.train.lora import adapter_of_folder, merged
from tests.command import Result
from tests.tiny import hub

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_fc"]}
FC = "visual.transformer.resblocks.1.mlp.c_fc"


def noise(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def adapter_folder(folder: Path, tensors: dict[str, Any], config: Any = PLAIN, name: str = "adapter_model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder


def pair(module: str = FC, out: int = 384, width: int = 96, rank: int = 4) -> dict[str, Any]:
    return {
        f"base_model.model.{module}.lora_A.weight": noise(rank, width),
        f"base_model.model.{module}.lora_B.weight": noise(out, rank, seed=1),
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("base")
    return hub.folder_of("vit", top / "hub", hub.model_of("vit", top / "bert"))


# Against PEFT.


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft", reason="the comparison with PEFT needs `pip install peft`")


def clip_model() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=48)
    return transformers.CLIPModel(config)


def open_clip_model() -> Any:
    return open_clip.CLIP(**json.loads(json.dumps(hub.MODELS["vit"])))


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "attention": (clip_model, {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}),
    "all layers": (clip_model, {"target_modules": "all-linear", "use_rslora": True, "fan_in_fan_out": True}),
    "patterns": (
        clip_model,
        {
            "target_modules": ["q_proj", "fc1", "fc2"],
            "rank_pattern": {"fc1": 2, r"vision_model\.encoder\.layers\.1\..*q_proj": 6},
            "alpha_pattern": {"text_model.encoder.layers.0.mlp.fc2": 32, "q_proj": 3},
        },
    ),
    "anchored": (clip_model, {"target_modules": ["fc1"], "alpha_pattern": {"^text_model.encoder.layers.0.mlp.fc1": 32}}),
    "saved modules": (clip_model, {"target_modules": ["q_proj"], "modules_to_save": ["visual_projection", "post_layernorm"]}),
    "biases": (clip_model, {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of LoRA": (clip_model, {"target_modules": ["q_proj", "fc1"], "lora_bias": True}),
    "embedding and convolution": (clip_model, {"target_modules": ["token_embedding", "patch_embedding", "position_embedding"]}),
    "in_proj": (open_clip_model, {"target_modules": ["attn"]}),
    "open_clip": (open_clip_model, {"target_modules": ["attn", "c_fc", "c_proj", "conv1", "token_embedding"], "rank_pattern": {"attn": 2}}),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_merged_as_peft_merges(name: str, peft: Any, tmp_path: Path) -> None:
    make, config = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, **config))
    for key, x in adapted.named_parameters():
        if "lora_" in key or "modules_to_save" in key or (config.get("bias") == "all" and key.endswith("bias")):
            x.add_(torch.randn(x.shape) * 0.1)
    adapted.save_pretrained(tmp_path)
    adapter = adapter_of_folder(tmp_path, json.loads((tmp_path / "adapter_config.json").read_text()))
    ours = merged(before, load_file(adapter.file), adapter)
    theirs = adapted.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    moved = 0
    for key, x in theirs.items():
        torch.testing.assert_close(ours[key], x, atol=1e-5, rtol=1e-5, msg=key)
        moved += not torch.allclose(before[key].float(), x.float())
    assert moved >= 2


# By the formula.


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("beside", [True, False])
def test_an_import_merges_the_adapter(name: str, beside: bool, base: Path, tmp_path: Path, command: Callable[..., Result]) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).hardlink_to(file)
    tensors, config = pair(), {**PLAIN, "use_rslora": True}
    lora = adapter_folder(folder if beside else tmp_path / "lora", tensors, config, name)
    made = command("import", folder, "--output", tmp_path / "out", *([] if beside else ["--adapter", lora]))
    assert made.code == 0 and f"LoRA adapter merged: {name}" in made.out, made.err
    meta, ours = read_checkpoint(tmp_path / "out")
    assert meta["provenance"]["import"]["adapter"] == {name: hashlib.sha256((lora / name).read_bytes()).hexdigest()}
    a, b = tensors.values()
    old = load_file(base / "open_clip_model.safetensors")
    for key, x in old.items():
        wanted = x + b @ a * 8 / math.sqrt(4) if key == f"{FC}.weight" else x
        torch.testing.assert_close(ours[f"clip.{key}"], wanted.float(), atol=2e-3, rtol=1e-3)  # stored in fp16


def test_an_adapter_alone_and_a_folder_without_one(base: Path, tmp_path: Path) -> None:
    lora = adapter_folder(tmp_path / "lora", pair())
    refused(lora, tmp_path, "lora: is a LoRA adapter; merge it into its base model: `pmclip-deploy import BASE --adapter ")
    refused(base, tmp_path, "has no adapter_config.json; pass the folder that PEFT's save_pretrained wrote", adapter=tmp_path / "nothing")


def test_an_adapter_trained_within_another_model(base: Path, tmp_path: Path) -> None:
    """What stands before the names in the model around it is of no matter."""
    lora = adapter_folder(tmp_path / "lora", pair(f"model.clip.{FC}"))
    old = load_file(base / "open_clip_model.safetensors")
    adapter = adapter_of_folder(lora, PLAIN)
    assert not torch.equal(merged(old, load_file(adapter.file), adapter)[f"{FC}.weight"], old[f"{FC}.weight"])


# What is refused.


def refused(source: Path, tmp_path: Path, message: str, **options: Any) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        import_weights(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


A, B = pair()


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (pair(), {**PLAIN, "peft_type": "IA3"}, "is an adapter of the kind IA3; only LORA is merged"),
        (pair(), {**PLAIN, "use_dora": True}, "has use_dora, which is DoRA"),
        ({**pair(), f"base_model.model.{FC}.lora_magnitude_vector": torch.ones(384)}, PLAIN, "so it is DoRA"),
        (pair(), {**PLAIN, "init_lora_weights": "pissa"}, "began as pissa, which changes the base too"),
        (pair(), {**PLAIN, "init_lora_weights": []}, "began as .., which"),
        (pair(), {**PLAIN, "alora_invocation_tokens": [1]}, "activated LoRA"),
        (pair(), {**PLAIN, "r": 8}, "has rank 4, and adapter_config.json says 8"),
        (pair(), {**PLAIN, "r": "x"}, "r is x and lora_alpha 8, which are no such numbers"),
        (pair(), {**PLAIN, "r": True}, "r is True"),
        (pair(), '{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}', "lora_alpha nan"),
        (pair(), {**PLAIN, "lora_alpha": 10**400}, "lora_alpha 1000"),
        (pair(), {**PLAIN, "rank_pattern": {"(a+)+": 4}}, "which is no pattern of names"),
        (pair(), {**PLAIN, "rank_pattern": {"(": 4}}, "which is no pattern of names"),
        (pair(), {**PLAIN, "rank_pattern": [4]}, "rank_pattern has .4., which is no pattern"),
        (pair(), "[]", "of the kind None"),
        (pair(), "{", "adapter_config.json: is no JSON|no weights that can be read"),
        (
            pair("visual.transformer.resblocks.7.mlp.c_fc"),
            PLAIN,
            "1 of its layers are not in these weights.*give its own base, which is a base",
        ),
        (
            pair(out=512),
            {**PLAIN, "base_model_name_or_path": "other/clip"},
            "not in this shape: .*c_fc; give its own base, which is other/clip",
        ),
        (pair(width=64), PLAIN, "not in this shape"),
        ({A: noise(4, 96)}, PLAIN, "lacks one of lora_A and lora_B"),
        ({A: noise(4, 96), B: noise(384, 4) * torch.nan}, PLAIN, "1 tensors are not floats, or hold NaN or infinity"),
        ({A: noise(4, 96), B: torch.ones(384, 4, dtype=torch.int8)}, PLAIN, "1 tensors are not floats"),
        ({"base_model.model.visual.proj": noise(3, 3)}, PLAIN, "not in this shape: visual.proj"),
        ({"base_model.model.visual.proj": noise(96, 48)}, PLAIN, "holds no LoRA"),
    ],
)
def test_adapters_that_are_refused(tensors: dict[str, Any], config: Any, said: str, base: Path, tmp_path: Path) -> None:
    refused(base, tmp_path, said, adapter=adapter_folder(tmp_path / "lora", tensors, config))


def test_an_adapter_without_tensors_and_one_of_giants(base: Path, tmp_path: Path) -> None:
    lora = adapter_folder(tmp_path / "lora", pair())
    (lora / "adapter_model.safetensors").unlink()
    refused(base, tmp_path, "has none of adapter_model.safetensors, adapter_model.bin", adapter=lora)
    giant = torch.zeros(()).expand(1 << 20, 1 << 20)
    torch.save({A: giant, B: giant}, lora / "adapter_model.bin")
    refused(base, tmp_path, "2 tensors are not floats", adapter=lora)
