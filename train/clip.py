"""`train clip`: fine-tunes the dual encoder on image-caption pairs with the symmetric contrastive loss."""

import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from open_clip import ClipLoss, CustomTextCLIP
from torch import Generator, Tensor
from torch.nn import functional as F

from pmclip_deploy.errors import InputError
from pmclip_deploy.tokens import tokens_from_text
from pmclip_deploy.train.captions import caption, statements_by_image
from pmclip_deploy.train.datasets import Question, image_key, layout_of_questions, questions_from_folder
from pmclip_deploy.train.images import Images
from pmclip_deploy.train.loop import Settings, fit
from pmclip_deploy.train.splits import pictures_seen_in
from pmclip_deploy.train.towers import (
    backbone_named,
    load_pretrained,
    lock_image_stem,
    mixed_precision,
    run_slow_convolutions_in_float,
    save_checkpoint,
    towers_from_spec,
)

LOCKED_STAGES = 2  # of the image tower: generic filters that cost half of a step
VARIANTS = 4  # captions drawn for each image


def questions_for_training(folders: list[Path]) -> tuple[list[Question], list[Question]]:
    """(training, validation) questions. No training set keeps an image that any validation set has, by name or by picture."""
    training, validation = [], []
    for folder in folders:
        if "val" in layout_of_questions(folder).splits(folder):
            training += questions_from_folder(folder, "train")
            validation += questions_from_folder(folder, "val")
        else:
            training += questions_from_folder(folder, "all")
    held_out = {image_key(q.image) for q in validation}
    training = [q for q in training if image_key(q.image) not in held_out]
    _check_images(training + validation)
    twins = pictures_seen_in({q.image for q in training}, {q.image for q in validation})
    training = [q for q in training if q.image not in twins]
    first = {image_key(q.image): q.image for q in reversed(training)}  # an image that stands in two datasets counts once
    training = [replace(q, image=first[image_key(q.image)]) for q in training]
    if not training:
        raise InputError(f"{folders[0]}: no training questions")
    return training, validation


def _check_images(questions: list[Question]) -> None:
    if missing := sorted({q.image for q in questions if not q.image.is_file()}):
        raise InputError(f"{missing[0]}: image not found ({len(missing)} missing)")


def sha256_of_questions(questions: list[Question]) -> str:
    text = "\n".join(f"{q.image.name}\t{q.question}\t{q.answer}" for q in questions)
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def pooled_from_text(model: CustomTextCLIP, tokenizer: Path, texts: list[str]) -> Tensor:
    """The locked text transformer's output before the projection, (N, 384) f32."""
    tower, rows = model.text, []
    for start in range(0, len(texts), 128):
        tokens = torch.from_numpy(tokens_from_text(tokenizer, texts[start : start + 128], model.context_length, tower.config.pad_token_id))
        mask = (tokens != tower.config.pad_token_id).long()
        rows.append(tower.pooler(tower.transformer(input_ids=tokens, attention_mask=mask), mask))
    return torch.cat(rows)


def recall_at(image: Tensor, text: Tensor, ranks: tuple[int, ...] = (1, 5, 10)) -> dict[str, Any]:
    """Retrieval both ways over one pool, row i of each side being a pair. Equal captions count as found."""
    similarity = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    out: dict[str, Any] = {"pool": len(image)}
    for way, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        rank = (scores > scores.diagonal()[:, None] + 1e-6).sum(1)
        out |= {f"{way}_R@{k}": round((rank < k).float().mean().item(), 4) for k in ranks}
    return out


@torch.no_grad()
def embeddings_from_images(model: CustomTextCLIP, images: Images) -> Tensor:
    model.eval()
    return torch.cat([model.encode_image(images.clean(i)) for i in torch.arange(len(images)).split(32)])


def train_clip(
    data: list[Path],
    output: Path,
    settings: Settings,
    backbone: str = "pmclip-lite",
) -> dict[str, Any]:
    """Trains and writes a checkpoint to ``output``; returns its description.

    The text transformer stays locked (LiT, Zhai et al. 2022) but for its projection: it keeps what it knows of language, which
    is what tells an unknown question from a known one, and its output is computed once.
    """
    settings.start()
    spec = backbone_named(backbone)
    training, validation = questions_for_training(data)
    said = statements_by_image(training)
    paths = settings.images(sorted(said, key=lambda p: (p.name, str(p))))

    model = towers_from_spec(spec)
    tokenizer = load_pretrained(model)
    model.text.transformer.requires_grad_(False)
    locked = lock_image_stem(model, LOCKED_STAGES)
    run_slow_convolutions_in_float(model.visual)
    model.visual.to(memory_format=torch.channels_last)

    rng = random.Random(settings.seed)
    model.eval()
    captions = [caption(said[p], rng) for p in paths for _ in range(VARIANTS)]
    pooled = pooled_from_text(model, tokenizer, captions).view(len(paths), VARIANTS, -1)
    images = Images(paths, spec.preprocess)
    contrastive = ClipLoss()

    def loss_of(indices: Tensor, generator: Generator, epoch: int) -> Tensor:
        model.train()
        for module in locked:
            module.eval()
        with mixed_precision():
            image = model.visual(images.augmented(indices, generator))
        chosen = torch.randint(VARIANTS, (len(indices),), generator=generator)
        text = model.text.proj(pooled[indices, chosen])
        scale = model.logit_scale.clamp(max=4.6052).exp()  # at most 100, as CLIP does
        loss: Tensor = contrastive(F.normalize(image.float(), dim=-1), F.normalize(text, dim=-1), scale)
        return loss

    fresh = [*model.visual.head.parameters(), *model.text.proj.parameters(), model.logit_scale]
    trunk = [p for p in model.visual.trunk.parameters() if p.requires_grad]
    output.mkdir(parents=True, exist_ok=True)
    made_with = {"backbone": backbone, **settings.to_json(), "data_sha256": sha256_of_questions(training), "images": len(paths)}
    rate = settings.learning_rate
    seconds = fit(
        "train clip",
        model,
        loss_of,
        len(paths),
        [(fresh, 2 * rate), (trunk, rate)],
        settings,
        made_with,
        output / "state.pt",
    )
    metrics: dict[str, Any] = {}
    if validation:
        told = statements_by_image(validation)
        held = sorted(told)
        pool = embeddings_from_images(model, Images(held, spec.preprocess))
        texts = model.text.proj(pooled_from_text(model, tokenizer, [", ".join(told[p][:6]) for p in held])).detach()
        metrics = {"retrieval_validation": recall_at(pool, texts)}
    meta = {
        "name": backbone,
        "version": "0.1.0",
        "backbone": backbone,
        "logit_scale": round(model.logit_scale.detach().clamp(max=4.6052).exp().item(), 4),
        "metrics": metrics,
        "provenance": {
            "clip": {**made_with, "data": [p.name for p in data], "seconds": round(seconds), "threads": torch.get_num_threads()}
        },
    }
    save_checkpoint(output, {f"clip.{k}": v for k, v in model.state_dict().items()}, meta, tokenizer)
    return meta
