"""From a checkpoint to fp32 ONNX graphs, written straight from the weights: no exporter, so the bytes depend on the weights alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from pmclip_deploy.bundle.names import TOKENIZER
from pmclip_deploy.errors import BundleError
from pmclip_deploy.export import head_graphs
from pmclip_deploy.export.findings_graph import findings_graph
from pmclip_deploy.export.lite_graph import lite_graph
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.base import Backbone, Towers
from pmclip_deploy.train.checkpoint import Checkpoint, towers_from_checkpoint, under
from pmclip_deploy.train.findings.net import FindingsNet
from pmclip_deploy.train.heads.answering import head_from_tensors
from pmclip_deploy.train.heads.lite import LiteHead
from pmclip_deploy.train.heads.mevf import MEVF
from pmclip_deploy.train.heads.qcr import QCR
from pmclip_deploy.train.heads.vision import ImageFeatures

Head = LiteHead | MEVF | QCR


@dataclass(frozen=True)
class Modules:
    """A checkpoint as PyTorch modules in eval mode: what every graph is measured against."""

    folder: Path
    meta: Checkpoint
    backbone: Backbone
    clip: Towers
    tokenizer: str  # a tokenizer.json, of the words in ``clip``'s table
    head: Head | None  # without one a bundle embeds, and answers nothing
    findings: FindingsNet | None = None


def modules_from_checkpoint(folder: Path) -> Modules:
    """Raises BundleError where the checkpoint is missing or doesn't fit its backbone, its head or its findings."""
    clip, meta, tensors = towers_from_checkpoint(folder)
    weights, of_head, of_findings = folder / "model.safetensors", under(tensors, "head"), under(tensors, "findings")
    head, findings = None, None
    try:
        if of_head:
            head = head_from_tensors(of_head, meta) if "head" in meta else LiteHead.from_tensors(of_head)
    except MISFITS as error:
        raise BundleError(f"{weights}: no head that fits ({_last_line(error)})", "train it with `pmclip-deploy train vqa`") from None
    try:
        if of_findings or "findings" in meta:
            findings = FindingsNet.from_tensors(of_findings)
            if (size := meta["findings"]["preprocess"]["size"]) % SIDE:
                raise ValueError(f"pictures of {size} pixels; their side is a multiple of {SIDE}")
    except MISFITS as error:
        raise BundleError(f"{weights}: no findings that fit ({_last_line(error)})", "make the checkpoint again") from None
    backbone = BACKBONES[meta["backbone"]]
    try:
        tokenizer = backbone.without_spare_words(clip, (folder / TOKENIZER).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise BundleError(f"{folder / TOKENIZER}: no usable tokenizer", "make the checkpoint again") from None
    return Modules(folder, meta, backbone, clip, tokenizer, head, findings)


MISFITS = (KeyError, TypeError, ValueError, RuntimeError)
SIDE = 32  # pixels that a place of the last stage takes: the middle stage's map must be twice as wide as the last one's


def _last_line(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else (str(error).splitlines() or [""])[-1].strip()


@torch.inference_mode()
def onnx_from_modules(modules: Modules, dense: bool = False) -> dict[str, onnx.ModelProto]:
    """The graphs "image" and "text", and of "features", "head" and "findings" what there is, in fp32; ``dense`` as TensorRT takes them."""
    clip, backbone, head = modules.clip, modules.backbone, modules.head
    details = head.details if isinstance(head, LiteHead) else 0
    graphs = {"image": backbone.image_graph(clip, details), "text": backbone.text_graph(clip)}
    if isinstance(head, LiteHead):
        graphs["head"] = lite_graph(head, dense)
    elif head is not None:
        if (features := head_graphs.features_graph(head.features)) is not None:
            graphs["features"] = features
        graphs["head"] = head_graphs.head_graph(head)
    if modules.findings is not None:
        graphs["findings"] = findings_graph(modules.findings, modules.meta["findings"]["preprocess"]["size"])
    return graphs


def functions_of(modules: Modules) -> dict[str, Callable[..., Any]]:
    """What each graph computes, in PyTorch: the same inputs in the same order, the same outputs."""
    clip, head = modules.clip, modules.head
    functions: dict[str, Callable[..., Any]] = {"image": clip.encode_image, "text": clip.encode_text}
    if isinstance(head, LiteHead):
        functions["head"] = head
        if head.details:
            functions["image"] = modules.backbone.lite(clip).embedding_and_details
    elif head is not None:
        functions |= {"features": partial(_features, head.features), "head": partial(_answers, head)}
    if modules.findings is not None:
        functions["findings"] = modules.findings
    return functions


def _features(features: ImageFeatures, *grey: Tensor) -> Tensor:
    """The networks' part of what the head sees; ``grey`` is the auto-encoder's picture, then MAML's, as far as they are there."""
    given = iter(grey)
    encoded = None if features.autoencoder is None else features.autoencoder.encode(next(given))
    objects, _ = features(torch.zeros(len(grey[0]), features.clip_dim), encoded, None if features.maml is None else next(given))
    seen: Tensor = objects[:, 0, features.clip_dim :]
    return seen


def _answers(head: MEVF | QCR, seen: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(answer logits, logits of the kinds of question): one kind for MEVF; closed and open for QCR, whose answers stand in that order."""
    objects, states = seen[:, None], head.question(tokens)[1]
    if isinstance(head, MEVF):
        return head.answer(head.attention(objects, states)), torch.zeros(len(seen), 1)
    joined = objects, states, head.condition(tokens)
    return torch.cat([head.closed(*joined), head.open(*joined)], dim=1), head.kind(tokens)
