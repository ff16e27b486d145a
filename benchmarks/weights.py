"""One folder with a model's weights as every system under test reads them, and the pictures and texts that all are given.

    python -m pmclip_deploy.benchmarks.weights --model ViT-B/32 --output FOLDER [--calibration vqa-med-2019/train.jsonl]

pmclip-lite has its trained weights; other backbones have random ones of the published shapes, which prove speed and equal arithmetic and
nothing of accuracy. All come from the checkpoint, which is fp16. FOLDER gets:

    checkpoint/               ours; fp32/, fp16/ and int8/ are its bundles
    open_clip/                model.safetensors; if open_clip has no name for them, also the configuration of the towers
    transformers/             ViT-B/32 alone: the layout of transformers' CLIPModel, with tokenizer and preprocessing
    calibration-*.npy         pixels and tokens that INT8 was calibrated on
    image.npy, text.npy       pixels (N, 3, S, S) f32 and tokens (N, T) i64 to embed; none was calibrated on
"""

import argparse
import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pmclip_deploy.benchmarks.peers import VIT
from pmclip_deploy.benchmarks.towers import checkpoint_of_random_weights, pictures_for_calibration
from pmclip_deploy.bundle.names import TOKENIZER
from pmclip_deploy.errors import InputError
from pmclip_deploy.export.onnx_from_checkpoint import Modules, modules_from_checkpoint
from pmclip_deploy.export.pack import bundle_from_checkpoint
from pmclip_deploy.export.probes import QUESTIONS
from pmclip_deploy.export.records import CALIBRATION
from pmclip_deploy.export.reference import tokenizers_of
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.models import DEFAULT_BUNDLE, DEFAULT_CHECKPOINT
from pmclip_deploy.tokens import tokens_from_text
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.base import Backbone

PICTURES = ("examples_overlay", "examples_jpeg2k", "examples_rgb_color", "image_dfl", "J2K_pixelrep_mismatch", "JPEG-lossy")
TEXTS = (
    "a chest x-ray", "ct of the abdomen with contrast", "no evidence of pleural effusion", "is the heart enlarged?",
    "axial t2 weighted mri of the brain", "fracture of the distal radius", "which artery is occluded?", "ultrasound of the liver",
    "there is a large mass in the right upper lobe with mediastinal lymph nodes", "pneumothorax", "is there free air under the diaphragm?",
    "mammogram, left breast, craniocaudal view", "what is the most likely diagnosis?", "normal study", "where is the catheter's tip?",
    "post-operative changes of the lumbar spine without hardware failure",
)  # fmt: skip
DONE = "ready"


def folder_of_weights(model: str, folder: Path, calibration: Path | None = None) -> None:
    """Writes it, unless it is there. ``calibration`` are training images, by default those in pydicom's wheel. Raises PmclipError."""
    if (folder / DONE).is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    backbone, checkpoint = BACKBONES[model], folder / "checkpoint"
    if backbone.importable:
        checkpoint_of_random_weights(checkpoint, model)
    else:
        shutil.copytree(DEFAULT_CHECKPOINT, checkpoint)
    pictures = calibration or pictures_for_calibration(folder)
    bundle_from_checkpoint(checkpoint, folder / "fp32", "fp32")
    bundle_from_checkpoint(checkpoint, folder / "fp16", "fp16")
    if backbone.importable:
        bundle_from_checkpoint(checkpoint, folder / "int8", "int8", calibration_images=pictures)
    else:
        shutil.copytree(DEFAULT_BUNDLE, folder / "int8")  # the one that ships

    modules = modules_from_checkpoint(checkpoint)  # as the bundles have them, without spare word pieces
    tensors = {name: x.contiguous() for name, x in modules.clip.state_dict().items()}
    (folder / "open_clip").mkdir()
    save_file(tensors, folder / "open_clip" / "model.safetensors")
    if not backbone.open_clip_name:
        _configuration(backbone, modules.clip, folder / "open_clip")
    elif model == VIT:
        _transformers(tensors, backbone, checkpoint, folder / "transformers")
    _inputs(modules, folder, pictures)
    (folder / DONE).touch()


def _configuration(backbone: Any, clip: Any, folder: Path) -> None:
    """Of open_clip's CustomTextCLIP, which ours is made of; the text tower's shape stands in a folder that transformers reads."""
    (folder / "config.json").write_text(json.dumps(backbone.config(), indent=1))
    (folder / "text").mkdir()
    words = clip.text.transformer.embeddings.word_embeddings.num_embeddings
    (folder / "text" / "config.json").write_text(json.dumps(clip.text.config.to_dict() | {"vocab_size": words}, indent=1))


# --- transformers' CLIPModel ----------------------------------------------------------------------------------------------------

NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
}
PARTS = [  # of a name, in this order
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),  # transformers' own spelling
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def transformers_from_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's."""
    out: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if name in NAMES:
            out[NAMES[name]] = x.T if name in ("visual.proj", "text_projection") else x
            continue
        for pattern, replacement in PARTS:
            name = re.sub(pattern, replacement, name)
        if "in_proj_" in name:
            out |= {name.replace("in_proj_", f"{part}_proj."): third for part, third in zip("qkv", x.chunk(3), strict=True)}
        else:
            out[name] = x
    return {name: x.contiguous() for name, x in out.items()}


def _transformers(tensors: dict[str, Tensor], backbone: Backbone, checkpoint: Path, folder: Path) -> None:
    folder.mkdir()
    save_file(transformers_from_open_clip(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(checkpoint / "tokenizer.json", folder)
    preprocess, size = backbone.preprocess, {"height": backbone.preprocess.size, "width": backbone.preprocess.size}
    width = {"hidden_act": "quick_gelu", "projection_dim": backbone.embed_dim}  # the rest is CLIPConfig's default: this model
    files: dict[str, Any] = {
        "config.json": {
            "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": backbone.embed_dim,
            "text_config": {**width, "model_type": "clip_text_model", "eos_token_id": int(tensors["token_embedding.weight"].shape[0]) - 1},
            "vision_config": {**width, "model_type": "clip_vision_model"},
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": preprocess.size}, "resample": 3,
            "do_center_crop": True, "crop_size": size, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
            "image_mean": preprocess.mean, "image_std": preprocess.std,
        },
        "tokenizer_config.json": {"model_max_length": backbone.context_length, "pad_token": "<end_of_text>"},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))


# --- inputs -----------------------------------------------------------------------------------------------------------------------


def _inputs(modules: Modules, folder: Path, calibration: Path) -> None:
    import pydicom

    backbone, tokenizer = modules.backbone, tokenizers_of(modules)[TOKENIZER]

    def save(name: str, pictures: list[Any], texts: list[str] | tuple[str, ...]) -> None:
        pixels = np.stack([tensor_from_pixels(picture, backbone.preprocess) for picture in pictures])
        np.save(folder / f"{name}image.npy", pixels)
        np.save(folder / f"{name}text.npy", tokens_from_text(tokenizer, texts, backbone.context_length, backbone.pad_id))

    named = json.loads(gzip.decompress((folder / "checkpoint" / CALIBRATION).read_bytes()))["images"]
    root = calibration.parent / "images" if calibration.suffix == ".jsonl" else calibration
    found = [root / name for name in named if (root / name).is_file()] or sorted(calibration.glob("*.png"))
    if not found:
        raise InputError(f"{calibration}: has none of the pictures that INT8 was calibrated on", "give the same folder, or none")
    save("calibration-", [picture_from_path(path).pixels for path in found], QUESTIONS)

    tests = Path(pydicom.__file__).parent / "data" / "test_files"
    pictures = [picture_from_path(tests / f"{name}.dcm").pixels for name in PICTURES]
    quarters = [
        picture[i : i + picture.shape[0] // 2, j : j + picture.shape[1] // 2]
        for picture in pictures for i in (0, picture.shape[0] // 2) for j in (0, picture.shape[1] // 2)
    ]  # fmt: skip
    save("", pictures + quarters, TEXTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(BACKBONES), default=VIT)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="training images: a folder, or a .jsonl with images/ beside it")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    folder_of_weights(options.model, options.output, options.calibration)


if __name__ == "__main__":
    main()
