"""`train clip --from`: fine-tunes a backbone on images and their captions with the symmetric contrastive loss."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pmclip_deploy.bundle.files import name_of_output, sha256_of_file
from pmclip_deploy.console import counted, print_note
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.tokens import tokens_from_text
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.base import Backbone, Towers
from pmclip_deploy.train.checkpoint import Checkpoint, towers_from_checkpoint, write_checkpoint
from pmclip_deploy.train.clip.embeddings import loss_over, recall_at
from pmclip_deploy.train.clip.recipes import Recipe
from pmclip_deploy.train.contrastive import in_pieces, rows_of_processes
from pmclip_deploy.train.cpu import autocast
from pmclip_deploy.train.datasets import Pair, layout_of, pairs_from_folder
from pmclip_deploy.train.datasets.pictures import Place, content_of, size_of
from pmclip_deploy.train.datasets.schema import BROKEN_SHARE
from pmclip_deploy.train.images import Augmentation, Pairs, readable, reading_processes
from pmclip_deploy.train.lookalikes import write_signatures
from pmclip_deploy.train.loop import Row, fit
from pmclip_deploy.train.processes import device_of_process, own_part, processes, rank


def pairs_for_training(folders: list[Path], licences: Collection[str], share: float) -> tuple[list[Pair], list[Pair]]:
    """(training, validation) pairs whose images can be read. Raises InputError where more than ``share`` of them cannot."""
    training, validation, skipped = [], [], Counter[str]()
    for folder in folders:
        training += pairs_from_folder(folder, "train", licences, skipped)
        if "val" in layout_of(folder, Counter()).splits(folder):
            validation += pairs_from_folder(folder, "val", licences, skipped)
    for reason, count in skipped.items():
        if count and rank() == 0:
            print_note(f"{counted(count, 'caption is', 'captions are')} left out: {reason}")
    whole = readable((p.image for p in training + validation), share)
    training, validation = ([p for p in pairs if p.image in whole] for pairs in (training, validation))
    copies = copies_of({p.image for p in training}, {p.image for p in validation})
    if copies and rank() == 0:
        print_note(f"{counted(len(copies), 'training image is', 'training images are')} left out: files of the validation split")
    training = [p for p in training if p.image not in copies]
    if not training:
        raise InputError(f"{folders[0]}: no training pairs", "give a folder whose captions have their images")
    return training, validation


def copies_of(images: set[Place], others: set[Place]) -> set[Place]:
    """Those of ``images`` that hold the same bytes as one of ``others``."""
    by_size: dict[int, list[Place]] = {}
    for image in others:
        by_size.setdefault(size_of(image), []).append(image)
    return {image for image in images if (some := by_size.get(size_of(image))) and content_of(image) in map(content_of, some)}


def sha256_of_pairs(pairs: list[Pair]) -> str:
    return hashlib.sha256("\n".join(f"{p.image.name}\t{p.caption}" for p in pairs).encode()).hexdigest()


@dataclass(frozen=True)
class Step:
    """The contrastive loss of this process's part of a batch of pairs, whose negatives are those of all processes."""

    model: Towers
    locked: list[nn.Module]  # these stay in eval mode
    spec: Backbone
    recipe: Recipe
    device: torch.device

    def __call__(self, batch: tuple[Tensor, Tensor], generator: Generator, epoch: int) -> Tensor:
        self.model.train()
        for module in self.locked:
            module.eval()
        self.hold_scale()
        return self.spec.loss_of_processes(*self.embedded(batch), *self.model.scale_and_bias())

    def embedded(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, S, S), tokens (B, T) -> (image, text), both (B, D) f32."""
        longest = (
            max((batch[1] != self.spec.pad_id).any(0).nonzero().flatten().tolist(), default=0) + 1
        )  # before the move: a GPU would have to be waited for
        pixels, tokens = (x.to(self.device, non_blocking=True) for x in (batch[0], batch[1][:, :longest]))
        with autocast(self.device, self.recipe.is_mixed(self.recipe.mixed)):
            image = in_pieces(self.model.encode_image, pixels, self.recipe.micro_batch)
            text = in_pieces(self.model.encode_text, tokens, self.recipe.micro_batch)
        return image.float(), text.float()

    @torch.no_grad()
    def hold_scale(self) -> None:
        if self.recipe.largest_scale and len(self.model.scale_and_bias()) == 1:  # a sigmoid loss bounds nothing: SigLIP's scale is 117
            self.model.logit_scale.clamp_(max=math.log(self.recipe.largest_scale))


@dataclass(frozen=True)
class Written:
    """A checkpoint that training writes, now and then: all but its weights and what is measured of them."""

    model: Towers
    tokenizer: Path
    name: str
    source: Checkpoint  # the description of the one that it started from
    provenance: dict[str, Any]

    def write(self, folder: Path, measured: Row, **more: Any) -> Checkpoint:
        """Returns its description. ``more`` goes to the provenance. The first process alone writes."""
        description: Checkpoint = {
            "name": self.name,
            "version": self.source["version"],
            "backbone": self.source["backbone"],
            **dict(zip(("logit_scale", "logit_bias"), (round(x.item(), 4) for x in self.model.scale_and_bias()), strict=False)),  # type: ignore[typeddict-item]
            "metrics": {"retrieval_validation": measured} if measured else {},
            "provenance": {**self.source["provenance"], "clip": {**self.provenance, **more}},
        }
        if rank() == 0:
            write_checkpoint(folder, self.model, description, self.tokenizer)
        return description


@dataclass(frozen=True)
class Validation:
    """Measures the model after each epoch, and keeps the best one."""

    step: Step
    pairs: Pairs
    captions: list[str]
    workers: int
    written: Written
    best: Path

    def __call__(self, history: list[Row]) -> Row:
        self.step.hold_scale()
        if not self.captions:
            return {}
        model, recipe = self.step.model, self.step.recipe
        model.eval()
        image, text = embeddings_from_pairs(self.step.embedded, self.pairs, self.workers)
        row = {
            "validation_loss": round(loss_over(image, text, model.scale_and_bias(), recipe.batch_size, self.step.spec.loss), 4),
            **recall_at(image, text, self.captions),
        }
        if rank() == 0 and row["validation_loss"] < min((h["validation_loss"] for h in history), default=math.inf):
            self.written.write(self.best, {"epoch": len(history) + 1, **row})
        return row


def train_clip_on_pairs(
    data: list[Path],
    source: Path,
    output: Path,
    recipe: Recipe,
    licences: Collection[str] = (),
    share: float = BROKEN_SHARE,
    name: str | None = None,
) -> Checkpoint:
    """Fine-tunes the checkpoint ``source`` on captions; writes the last epoch to ``output`` and the best one to ``output/best``.

    The best is the one with the least validation loss. Returns the last one's description. Under torchrun each process takes its part
    of every batch, and negatives are those of the whole batch.
    """
    name = name_of_output(output, name)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else each process that reads images warns of it
    with device_of_process(recipe.device) as device:
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
) -> Checkpoint:
    model, meta, _ = towers_from_checkpoint(source)
    locked = lock_towers(model.to(device), recipe)
    spec, tokenizer = BACKBONES[meta["backbone"]], source / "tokenizer.json"
    training, validation = pairs_for_training(data, licences, share)
    training = recipe.images(training)
    workers = reading_processes(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def pairs_of(some: list[Pair], augmentation: Augmentation) -> Pairs:
        tokens = torch.from_numpy(tokens_from_text(tokenizer, [p.caption for p in some], spec.context_length, spec.pad_id))
        return Pairs([p.image for p in some], tokens, spec.preprocess, augmentation, recipe.seed)

    def read(order: list[Tensor], epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        return train.read([own_part(i).tolist() for i in order], epoch, workers, pinned=device.type == "cuda")

    train = pairs_of(training, recipe.augmentation)
    made_with = {
        "backbone": spec.name,
        **recipe.to_json(),
        "data_sha256": sha256_of_pairs(training),
        "from_sha256": sha256_of_file(source / "model.safetensors"),
        "images": len(training),
    }
    written = Written(model, tokenizer, name, meta, {**made_with, "data": [p.name for p in data], "processes": processes()})
    step = Step(model, locked, spec, recipe, device)
    captions = [p.caption for p in validation]
    measure = Validation(step, pairs_of(validation, "none"), captions, workers, written, output / "best")

    output.mkdir(parents=True, exist_ok=True)
    history: list[Row] = []
    groups = [([p for p in model.parameters() if p.requires_grad], recipe.learning_rate)]
    title, state = f"train clip {spec.name}", output / "state.pt"
    seconds = fit(title, model, step, len(training), groups, recipe, made_with, state, read, measure, history)
    last = {k: v for k, v in history[-1].items() if k != "loss"} if validation else {}
    description = written.write(output, last, seconds=round(seconds), device=device.type)
    if rank() == 0:
        write_signatures(output, (p.image for p in training))
    return description


def lock_towers(model: Towers, recipe: Recipe) -> list[nn.Module]:
    """Freezes what the recipe locks (LiT, Zhai et al. 2022); returns what must stay in eval mode. Raises UsageError."""
    if recipe.lock_image and recipe.lock_text:
        raise UsageError("with both towers locked there is nothing to train", "leave out --lock-image or --lock-text")
    for name, parameter in model.named_parameters():
        if name not in ("logit_scale", "logit_bias") and (recipe.lock_image if name.startswith("visual.") else recipe.lock_text):
            parameter.requires_grad_(False)
    return [part for name, part in model.named_children() if (recipe.lock_image if name == "visual" else recipe.lock_text)]


@torch.no_grad()
def embeddings_from_pairs(
    embedded: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]], pairs: Pairs, workers: int, size: int = 64
) -> tuple[Tensor, Tensor]:
    """(image, text), both (N, D) f32 on the CPU. Process r of P takes rows r, r + P, ..."""
    count, several = len(pairs), processes()
    own = torch.arange(rank(), rank() + -(-count // several) * several, several) % count  # as many for each; the surplus goes below
    rows = [embedded(batch) for batch in pairs.read([i.tolist() for i in own.split(size)], 0, workers)]
    every = [rows_of_processes(torch.cat(side)).unflatten(0, (several, -1)) for side in zip(*rows, strict=True)]  # (P, N / P, D)
    image, text = (side.transpose(0, 1).flatten(0, 1)[:count].cpu() for side in every)
    return image, text
