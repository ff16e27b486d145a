"""`train clip`: fine-tunes a dual encoder with the symmetric contrastive loss, pmclip-lite on questions and any backbone on captions."""

import filecmp
import hashlib
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.atomic import told
from pmclip_deploy.bundle.files import sha256_of_file
from pmclip_deploy.console import print_note
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.tokens import tokens_from_text
from pmclip_deploy.train.backbones import BACKBONES, DEFAULT, backbone_named
from pmclip_deploy.train.backbones.base import LiteTowers, Towers
from pmclip_deploy.train.captions import caption, statements_by_image
from pmclip_deploy.train.checkpoint import name_of_output, save_checkpoint, towers_from_checkpoint
from pmclip_deploy.train.contrastive import contrastive_loss, in_pieces, rows_of_processes
from pmclip_deploy.train.cpu import mixed_precision, run_slow_convolutions_in_float
from pmclip_deploy.train.datasets import Pair, Question, image_key, layout_of, layout_of_questions, pairs_from_folder, questions_from_folder
from pmclip_deploy.train.datasets.schema import BROKEN_SHARE
from pmclip_deploy.train.images import Augmentation, Images, Pairs, readable, reading_processes
from pmclip_deploy.train.lookalikes import write_seen
from pmclip_deploy.train.loop import Optimiser, Row, Settings, device_of_process, fit, own_part, processes, rank
from pmclip_deploy.train.splits import pictures_seen_in

LOCKED_STAGES = 2  # of the image tower: generic filters that cost half of a step
VARIANTS = 4  # captions drawn for each image


@dataclass(frozen=True)
class Recipe(Settings):
    """How a backbone is fine-tuned on captions; the options of `train clip` override its values."""

    augmentation: Augmentation = "radiology"
    largest_scale: float | None = None  # of the cosines, held after each step as CLIP does
    mixed: bool = False  # bf16 where the device computes in it
    micro_batch: int = 0  # pairs encoded at a time; 0 takes all of a process's
    lock_image: bool = False
    lock_text: bool = False


RECIPES = {
    # Eslami et al. 2023: configs/medclip_roco_all.yaml, main/train.py and the two default transforms of their code.
    "paper": Recipe(
        epochs=50,
        learning_rate=1e-5,
        batch_size=64,
        optimiser=Optimiser("Adam", weight_decay=5e-4, eps=1e-6, warmup=None, longest=None),
        augmentation="crop and flip",
    ),
    "modern": Recipe(
        epochs=20,
        learning_rate=5e-5,
        batch_size=512,
        optimiser=Optimiser("AdamW", weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, warmup=200, longest=1.0),
        largest_scale=100.0,
        mixed=True,
        micro_batch=128,
    ),
}


def recipe_named(name: str, **chosen: Any) -> Recipe:
    """The recipe with ``chosen`` in place of its own values. Raises UsageError."""
    if name not in RECIPES:
        raise UsageError(f"recipe {name!r} is unknown; choose one of {', '.join(RECIPES)}")
    return replace(RECIPES[name], **chosen)


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
    whole = readable((q.image for q in training + validation), BROKEN_SHARE)
    training, validation = ([q for q in questions if q.image in whole] for questions in (training, validation))
    twins = pictures_seen_in({q.image for q in training}, {q.image for q in validation})
    training = [q for q in training if q.image not in twins]
    first = {image_key(q.image): q.image for q in reversed(training)}  # an image that stands in two datasets counts once
    training = [replace(q, image=first[image_key(q.image)]) for q in training]
    if not training:
        raise InputError(f"{folders[0]}: no training questions")
    return training, validation


def sha256_of_questions(questions: list[Question]) -> str:
    text = "\n".join(f"{q.image.name}\t{q.question}\t{q.answer}" for q in questions)
    return hashlib.sha256(text.encode()).hexdigest()


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


def train_clip(
    data: list[Path],
    output: Path,
    settings: Settings,
    backbone: str = DEFAULT,
    name: str | None = None,
) -> dict[str, Any]:
    """Trains and writes a checkpoint to ``output``; returns its description. What stays locked: ``LiteTowers``."""
    name = name_of_output(output, name)
    settings.start()
    device, spec = torch.device("cuda" if torch.cuda.is_available() else "cpu"), backbone_named(backbone)
    training, validation = questions_for_training(data)
    said = statements_by_image(training)
    paths = settings.images(sorted(said, key=lambda p: (p.name, str(p))))

    model = spec.lite(spec.build())
    tokenizer = spec.load_pretrained(model)
    locked = model.lock(LOCKED_STAGES)
    run_slow_convolutions_in_float(model.visual)
    model.visual.to(memory_format=torch.channels_last)

    rng = random.Random(settings.seed)
    model.eval()
    captions = [caption(said[p], rng) for p in paths for _ in range(VARIANTS)]
    pooled = pooled_from_text(model, tokenizer, captions).view(len(paths), VARIANTS, -1)
    images, pooled = Images(paths, spec.preprocess), pooled.to(device)
    model.to(device)

    def loss_of(indices: Tensor, generator: Generator, epoch: int) -> Tensor:
        model.train()
        for module in locked:
            module.eval()
        with autocast(device, True):
            image = model.visual(images.augmented(indices, generator).to(device))
        text = model.projected_text(pooled[torch.arange(len(pooled)), torch.randint(VARIANTS, (len(pooled),), generator=generator)])
        scale = model.logit_scale.clamp(max=4.6052).exp()  # at most 100, as CLIP does
        return loss_among_all(image.float(), text, indices.to(device), scale)

    output.mkdir(parents=True, exist_ok=True)
    made_with = {"backbone": backbone, **settings.to_json(), "data_sha256": sha256_of_questions(training), "images": len(paths)}
    rate = settings.learning_rate
    seconds = fit(
        "train clip",
        model,
        loss_of,
        len(paths),
        [(model.projections(), 2 * rate), (model.trunk(), rate)],
        settings,
        made_with,
        output / "state.pt",
    )
    model.cpu()
    metrics: dict[str, Any] = {}
    if validation:
        told = statements_by_image(validation)
        held = sorted(told)
        pool = embeddings_from_images(model, Images(held, spec.preprocess))
        captions = [", ".join(told[p][:6]) for p in held]
        texts = model.projected_text(pooled_from_text(model, tokenizer, captions)).detach()
        metrics = {"retrieval_validation": recall_at(pool, texts, captions)}
    meta = {
        "name": name,
        "version": "0.1.0",
        "backbone": backbone,
        "logit_scale": round(model.logit_scale.detach().clamp(max=4.6052).exp().item(), 4),
        "metrics": metrics,
        "provenance": {
            "clip": {**made_with, "data": [p.name for p in data], "seconds": round(seconds), "threads": torch.get_num_threads()}
        },
    }
    write_checkpoint(output, model, meta, tokenizer)
    write_seen(output, paths)
    return meta


def write_checkpoint(folder: Path, model: nn.Module, meta: dict[str, Any], tokenizer: Path, head: nn.Module | None = None) -> None:
    """Each file whole, or the one that was there before. Raises UsageError."""
    parts = (("clip", model), ("head", head))
    write_tensors(folder, {f"{part}.{k}": v for part, of in parts if of is not None for k, v in of.state_dict().items()}, meta, tokenizer)


def write_tensors(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], tokenizer: Path) -> None:
    """A checkpoint, each file whole, or the one that was there before. Raises UsageError."""
    with told(f"{folder}: the checkpoint", "make room and go on with --resume"):
        save_checkpoint(folder, tensors, meta, tokenizer)


def pairs_for_training(folders: list[Path], licences: Collection[str], share: float) -> tuple[list[Pair], list[Pair]]:
    """(training, validation) pairs whose images can be read. Raises InputError where more than ``share`` of them cannot."""
    training, validation, skipped = [], [], Counter[str]()
    for folder in folders:
        training += pairs_from_folder(folder, "train", licences, skipped)
        if "val" in layout_of(folder, Counter()).splits(folder):
            validation += pairs_from_folder(folder, "val", licences, skipped)
    for reason, count in skipped.items():
        if count and rank() == 0:
            print_note(f"{count} captions are left out: {reason}")
    whole = readable((p.image for p in training + validation), share)
    training, validation = ([p for p in pairs if p.image in whole] for pairs in (training, validation))
    copies = copies_of({p.image for p in training}, {p.image for p in validation})
    if copies and rank() == 0:
        print_note(f"{len(copies)} training images are left out: files of the validation split")
    training = [p for p in training if p.image not in copies]
    if not training:
        raise InputError(f"{folders[0]}: no training pairs; give a folder whose captions have their images")
    return training, validation


def copies_of(images: set[Path], others: set[Path]) -> set[Path]:
    """Those of ``images`` that hold the same bytes as one of ``others``."""
    by_size: dict[int, list[Path]] = {}
    for path in others:
        by_size.setdefault(path.stat().st_size, []).append(path)
    return {p for p in images if any(filecmp.cmp(p, other, shallow=False) for other in by_size.get(p.stat().st_size, ()))}


def sha256_of_pairs(pairs: list[Pair]) -> str:
    return hashlib.sha256("\n".join(f"{p.image.name}\t{p.caption}" for p in pairs).encode()).hexdigest()


def train_clip_on_pairs(
    data: list[Path],
    source: Path,
    output: Path,
    recipe: Recipe,
    licences: Collection[str] = (),
    share: float = BROKEN_SHARE,
    name: str | None = None,
) -> dict[str, Any]:
    """Fine-tunes the checkpoint ``source`` on captions; writes the last epoch to ``output`` and the best one to ``output/best``.

    The best is the one with the least validation loss. Returns the last one's description. Under torchrun each process takes its part
    of every batch, and negatives are those of the whole batch.
    """
    name = name_of_output(output, name)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else each process that reads images warns of it
    with device_of_process() as device:
        recipe.start()
        return _train_on(device, data, source, output, recipe, licences, share, name)


def _train_on(
    device: torch.device,
    data: list[Path],
    source: Path,
    output: Path,
    recipe: Recipe,
    licences: Collection[str],
    share: float,
    name: str,
) -> dict[str, Any]:
    model, meta, _ = towers_from_checkpoint(source)
    locked = lock_towers(model.to(device), recipe)
    spec, tokenizer = BACKBONES[meta["backbone"]], source / "tokenizer.json"
    training, validation = pairs_for_training(data, licences, share)
    training = recipe.images(training)
    workers = reading_processes(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def pairs_of(some: list[Pair], augmentation: Augmentation) -> Pairs:
        tokens = torch.from_numpy(tokens_from_text(tokenizer, [p.caption for p in some], spec.context_length, spec.pad_id))
        return Pairs([p.image for p in some], tokens, spec.preprocess, augmentation, recipe.seed)

    def embedded(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        pixels, tokens = (x.to(device, non_blocking=True) for x in batch)
        longest = int((tokens != spec.pad_id).any(0).nonzero().max()) + 1
        with autocast(device, recipe.mixed):
            image = in_pieces(model.encode_image, pixels, recipe.micro_batch)
            text = in_pieces(model.encode_text, tokens[:, :longest], recipe.micro_batch)
        return image.float(), text.float()

    def loss_of(batch: tuple[Tensor, Tensor], generator: Generator, epoch: int) -> Tensor:
        model.train()
        for module in locked:
            module.eval()
        hold_scale()
        return spec.loss_of_processes(*embedded(batch), model.logit_scale.exp())

    @torch.no_grad()
    def hold_scale() -> None:
        if recipe.largest_scale:
            model.logit_scale.clamp_(max=math.log(recipe.largest_scale))

    train = pairs_of(training, recipe.augmentation)
    held = pairs_of(validation, "none")
    made_with = {
        "backbone": spec.name,
        **recipe.to_json(),
        "data_sha256": sha256_of_pairs(training),
        "from_sha256": sha256_of_file(source / "model.safetensors"),
        "images": len(training),
    }

    def description(row: Row) -> dict[str, Any]:
        return {
            "name": name,
            **{k: meta[k] for k in ("version", "backbone")},
            "logit_scale": round(model.logit_scale.detach().exp().item(), 4),
            "metrics": {"retrieval_validation": row} if row else {},
            "provenance": {**meta["provenance"], "clip": {**made_with, "data": [p.name for p in data], "processes": processes()}},
        }

    def measure(history: list[Row]) -> Row:
        hold_scale()
        if not validation:
            return {}
        image, text = embeddings_from_pairs(model.eval(), embedded, held, workers)
        row = {
            "validation_loss": round(loss_over(image, text, model.logit_scale.exp().cpu(), recipe.batch_size, spec.loss), 4),
            **recall_at(image, text, [p.caption for p in validation]),
        }
        if rank() == 0 and row["validation_loss"] < min((h["validation_loss"] for h in history), default=math.inf):
            write_checkpoint(output / "best", model, description({"epoch": len(history) + 1, **row}), tokenizer)
        return row

    output.mkdir(parents=True, exist_ok=True)
    history: list[Row] = []
    seconds = fit(
        f"train clip {spec.name}",
        model,
        loss_of,
        len(training),
        [([p for p in model.parameters() if p.requires_grad], recipe.learning_rate)],
        recipe,
        made_with,
        output / "state.pt",
        lambda order, epoch: train.read([own_part(i).tolist() for i in order], epoch, workers, pinned=device.type == "cuda"),
        measure,
        history,
    )
    described = description({k: v for k, v in history[-1].items() if k != "loss"} if validation else {})
    described["provenance"]["clip"]["seconds"] = round(seconds)
    if rank() == 0:
        write_checkpoint(output, model, described, tokenizer)
        write_seen(output, (p.image for p in training))
    return described


def lock_towers(model: Towers, recipe: Recipe) -> list[nn.Module]:
    """Freezes what the recipe locks (LiT, Zhai et al. 2022); returns what must stay in eval mode. Raises UsageError."""
    if recipe.lock_image and recipe.lock_text:
        raise UsageError("with both towers locked there is nothing to train; leave out --lock-image or --lock-text")
    for name, parameter in model.named_parameters():
        if name != "logit_scale" and (recipe.lock_image if name.startswith("visual.") else recipe.lock_text):
            parameter.requires_grad_(False)
    return [part for name, part in model.named_children() if (recipe.lock_image if name == "visual" else recipe.lock_text)]


def autocast(device: torch.device, mixed: bool) -> torch.autocast:
    """bf16, which needs no loss scaling, where the device computes in it."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, enabled=mixed and torch.cuda.is_bf16_supported(including_emulation=False))
    return mixed_precision() if mixed else torch.autocast("cpu", enabled=False)


@torch.no_grad()
def embeddings_from_pairs(
    model: nn.Module, embedded: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]], pairs: Pairs, workers: int, size: int = 64
) -> tuple[Tensor, Tensor]:
    """(image, text), both (N, D) f32 on the CPU. Process r of P takes rows r, r + P, ..."""
    count, several = len(pairs), processes()
    own = torch.arange(rank(), rank() + -(-count // several) * several, several) % count  # as many for each; the surplus goes below
    rows = [embedded(batch) for batch in pairs.read([i.tolist() for i in own.split(size)], 0, workers)]
    every = [rows_of_processes(torch.cat(side)).unflatten(0, (several, -1)) for side in zip(*rows, strict=True)]  # (P, N / P, D)
    image, text = (side.transpose(0, 1).flatten(0, 1)[:count].cpu() for side in every)
    return image, text


def loss_over(image: Tensor, text: Tensor, scale: Tensor, size: int, loss: Callable[..., Tensor] = contrastive_loss) -> float:
    """The mean loss of batches of ``size``, which a loss can be compared at; a last short one counts only if there is no other."""
    batches = [pair for pair in zip(image.split(size), text.split(size), strict=True) if len(pair[0]) == min(size, len(image))]
    return sum(loss(i, t, scale).item() for i, t in batches) / len(batches)
