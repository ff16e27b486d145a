"""Embeddings of images and texts: retrieval among them, and the losses that compare them over a locked text tower."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from pmclip_deploy.tokens import tokens_from_text
from pmclip_deploy.train.backbones.base import LiteTowers, Towers
from pmclip_deploy.train.captions import caption
from pmclip_deploy.train.contrastive import contrastive_loss
from pmclip_deploy.train.images import Images

VARIANTS = 4  # captions drawn for each image


@dataclass(frozen=True)
class Captions:
    """What the locked text transformer makes of ``VARIANTS`` captions of each of N images, (N, VARIANTS, W) f32."""

    pooled: Tensor

    @classmethod
    def of(cls, model: LiteTowers, tokenizer: Path, statements: list[list[str]], rng: random.Random) -> "Captions":
        """``statements`` are said of each image."""
        texts = [caption(said, rng) for said in statements for _ in range(VARIANTS)]
        return cls(pooled_from_text(model, tokenizer, texts).view(len(statements), VARIANTS, -1))

    def to(self, device: torch.device) -> "Captions":
        return Captions(self.pooled.to(device))

    def drawn(self, generator: Generator) -> Tensor:
        """One of each image, (N, W)."""
        count = len(self.pooled)
        return self.pooled[torch.arange(count), torch.randint(VARIANTS, (count,), generator=generator)]


@torch.no_grad()
def pooled_from_text(model: LiteTowers, tokenizer: Path, texts: list[str]) -> Tensor:
    """The locked text transformer's output before the projection, (N, W) f32."""
    parts = (texts[start : start + 128] for start in range(0, len(texts), 128))
    tokens = (torch.from_numpy(tokens_from_text(tokenizer, part, model.context_length, model.pad_id)) for part in parts)
    return torch.cat([model.pooled_text(of) for of in tokens])


def recall_at(image: Tensor, text: Tensor, captions: list[str], ranks: tuple[int, ...] = (1, 5, 10)) -> dict[str, Any]:
    """Retrieval both ways over one pool, row i of each side being a pair. An equal caption counts as found; a tie and NaN do not."""
    first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    which = torch.tensor([first[caption] for caption in captions], device=image.device)
    other = which[:, None] != which[None, :]
    similarity = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    out: dict[str, Any] = {"pool": len(image)}
    for way, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        rank = (other & ~(scores < scores.diagonal()[:, None])).sum(1)
        out |= {f"{way}_R@{k}": round((rank < k).float().mean().item(), 4) for k in ranks}
    return out


def loss_among_all(image: Tensor, texts: Tensor, indices: Tensor, scale: Tensor) -> Tensor:
    """The mean of the contrastive loss in the batch and of every image's among all N training captions, which a locked tower makes cheap.

    ``image`` (B, D) and ``texts`` (N, D) f32 of any length, ``indices`` (B,) i64 the row of each image's own text, ``scale`` ().
    """
    in_batch = contrastive_loss(image, texts[indices], scale)
    among_all = F.cross_entropy(scale * F.normalize(image, dim=-1) @ F.normalize(texts, dim=-1).T, indices)
    return (in_batch + among_all) / 2


@torch.no_grad()
def embeddings_from_images(model: Towers, images: Images) -> Tensor:
    model.eval()
    return torch.cat([model.encode_image(images.clean(i)) for i in torch.arange(len(images)).split(32)])


def loss_over(image: Tensor, text: Tensor, scale_and_bias: Iterable[Tensor], size: int, loss: Callable[..., Tensor]) -> float:
    """The mean loss of batches of ``size``, which a loss can be compared at; a last short one counts only if there is no other."""
    of = [x.cpu() for x in scale_and_bias]
    batches = [pair for pair in zip(image.split(size), text.split(size), strict=True) if len(pair[0]) == min(size, len(image))]
    return sum(loss(i, t, *of).item() for i, t in batches) / len(batches)
