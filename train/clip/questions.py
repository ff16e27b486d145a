"""`train clip` without --from: trains pmclip-lite's towers on what questions and answers say."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pmclip_deploy.bundle.files import name_of_output
from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.backbones import BACKBONES, DEFAULT
from pmclip_deploy.train.backbones.base import LiteTowers
from pmclip_deploy.train.captions import statements_by_image
from pmclip_deploy.train.checkpoint import Checkpoint, write_checkpoint
from pmclip_deploy.train.clip.embeddings import Captions, embeddings_from_images, loss_among_all, pooled_from_text, recall_at
from pmclip_deploy.train.contrastive import scale_of
from pmclip_deploy.train.cpu import autocast, run_slow_convolutions_in_float
from pmclip_deploy.train.datasets import Question
from pmclip_deploy.train.images import Images
from pmclip_deploy.train.lookalikes import write_signatures
from pmclip_deploy.train.loop import Settings, fit
from pmclip_deploy.train.processes import device_named, run_on
from pmclip_deploy.train.questions import questions_for_training, sha256_of_questions

LOCKED_STAGES = 2  # of the image tower: generic filters that cost half of a step


@dataclass(frozen=True)
class Step:
    """The contrastive loss of a batch of images, each against a caption drawn for it."""

    model: LiteTowers
    locked: list[nn.Module]  # these stay in eval mode
    images: Images
    captions: Captions
    device: torch.device
    mixed: bool = True  # bf16 where the device computes in it

    def __call__(self, indices: Tensor, generator: Generator, epoch: int) -> Tensor:
        self.model.train()
        for module in self.locked:
            module.eval()
        with autocast(self.device, self.mixed):
            image = self.model.visual(self.images.augmented(indices, generator).to(self.device))
        text = self.model.projected_text(self.captions.drawn(generator))
        return loss_among_all(image.float(), text, indices.to(self.device), scale_of(self.model.logit_scale))


def train_clip(data: list[Path], output: Path, settings: Settings, name: str | None = None) -> Checkpoint:
    """Trains and writes a checkpoint to ``output``; returns its description. What stays locked: ``LiteTowers``."""
    name = name_of_output(output, name)
    settings.start()
    device, spec = device_named(settings.device), BACKBONES[DEFAULT]
    training, validation = questions_for_training(data)
    said = statements_by_image(training)
    paths = settings.images(sorted(said, key=lambda p: (p.name, str(p))))

    model = spec.lite(spec.build())
    tokenizer = spec.load_pretrained(model)
    locked = locked_and_fast(model)
    captions = Captions.of(model.eval(), tokenizer, [said[p] for p in paths], random.Random(settings.seed))
    step = Step(model.to(device), locked, Images(paths, spec.preprocess), captions.to(device), device, settings.is_mixed(True))

    output.mkdir(parents=True, exist_ok=True)
    made_with = {"backbone": spec.name, **settings.to_json(), "data_sha256": sha256_of_questions(training), "images": len(paths)}
    rate = settings.learning_rate
    groups = [(model.projections(), 2 * rate), (model.trunk(), rate)]
    seconds = fit("train clip", model, step, len(paths), groups, settings, made_with, output / "state.pt")
    model.cpu()
    meta: Checkpoint = {
        "name": name,
        "version": "0.1.0",
        "backbone": spec.name,
        "logit_scale": round(scale_of(model.logit_scale).item(), 4),
        "metrics": {"retrieval_validation": _retrieval(model, tokenizer, validation, spec.preprocess)} if validation else {},
        "provenance": {"clip": {**made_with, "data": [p.name for p in data], "seconds": round(seconds), **run_on(device)}},
    }
    write_checkpoint(output, model, meta, tokenizer)
    write_signatures(output, paths)
    return meta


def locked_and_fast(model: LiteTowers) -> list[nn.Module]:
    """Freezes what questions do not teach, and lays the image tower out for the CPU; returns what must stay in eval mode."""
    locked = model.lock(LOCKED_STAGES)
    run_slow_convolutions_in_float(model.visual)
    model.visual.to(memory_format=torch.channels_last)
    return locked


def _retrieval(model: LiteTowers, tokenizer: Path, questions: list[Question], preprocess: Preprocess) -> dict[str, Any]:
    """Among the images of ``questions``, each with what is said of it."""
    said = statements_by_image(questions)
    paths = sorted(said)
    image = embeddings_from_images(model, Images(paths, preprocess))
    captions = [", ".join(said[p][:6]) for p in paths]
    text = model.projected_text(pooled_from_text(model, tokenizer, captions)).detach()
    return recall_at(image, text, captions)
