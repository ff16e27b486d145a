"""`train maml`: a start for MEVF's small network from which a few steps learn a new task (first-order MAML, Finn et al. 2017)."""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pmclip_deploy.bundle.checks import no_twin
from pmclip_deploy.console import counted
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.texts import lines_of_file
from pmclip_deploy.train.autoencoder import files_under, grey_images, save_network, state_beside
from pmclip_deploy.train.cpu import autocast
from pmclip_deploy.train.heads.vision import MAML_SIZE, WIDTH, MamlNetwork
from pmclip_deploy.train.loop import Settings, fit
from pmclip_deploy.train.processes import device_named, run_on

WAYS, SHOTS = 3, 3  # a task: three classes, three images of each to learn from and three to be judged by (MEVF section 4)
STEPS, RATE = 5, 0.01  # within a task (Finn et al. 2017, MiniImagenet; MEVF does not say)
MEASURED = 50  # tasks, unless an epoch has fewer

Classes = list[Tensor]  # for each class, (N, 1, 84, 84) u8


@dataclass(frozen=True)
class Step:
    """The mean over a batch of tasks of the judged images' loss."""

    model: nn.Module
    classes: Classes  # on the CPU
    device: torch.device
    mixed: bool = False  # bf16 where the device computes in it

    def __call__(self, indices: Tensor, generator: Generator, epoch: int) -> Tensor:
        return torch.stack([self.drawn(generator)[0] for _ in indices]).mean()

    def drawn(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """(loss, accuracy) of a task, both () f32."""
        learnt, asked, labels = (x.to(self.device) for x in task(self.classes, generator))
        with autocast(self.device, self.mixed):
            return judged(self.model, learnt, asked, labels)


def train_maml(data: Path, output: Path, settings: Settings, tasks: int = 500) -> dict[str, Any]:
    """Trains on ``tasks`` tasks an epoch, ``batch_size`` tasks a step, drawn from classes of images; writes safetensors to ``output``.

    ``data`` is a folder with a folder for each class (MEVF's nine: head, chest and abdomen, each normal, with an abnormality, with an
    abnormal organ), or a JSONL file with ``image`` and ``label``. The gradient is the first-order one: that of the judged images' loss
    at the adapted weights. Raises InputError and UsageError.
    """
    settings.start()
    device = device_named(settings.device)
    if tasks < settings.batch_size:
        raise UsageError(f"{tasks} tasks are fewer than one batch of {settings.batch_size}", "raise --tasks")
    classes, skipped = classes_from_images(paths_by_label(data), settings.limit, data)
    model = nn.Sequential(MamlNetwork(), nn.Linear(WIDTH, WAYS)).to(device)
    step = Step(model, classes, device, settings.is_mixed(device.type == "cuda"))
    digest = hashlib.sha256(b"".join(hashlib.sha256(c.numpy().tobytes()).digest() for c in classes)).hexdigest()
    made_with = {**settings.to_json(), "tasks": tasks, "images": [len(c) for c in classes], "data_sha256": digest}
    groups = [(list(model.parameters()), settings.learning_rate)]
    seconds = fit("train maml", model, step, tasks, groups, settings, made_with, state_beside(output))
    network = {k: v.clone() for k, v in model[0].state_dict().items()}  # before measuring, which moves the batch norms' averages
    generator = Generator().manual_seed(settings.seed)
    accuracy = torch.stack([step.drawn(generator)[1] for _ in range(min(MEASURED, tasks))]).mean()
    metrics = {"training_accuracy": round(accuracy.item(), 4), "chance": round(1 / WAYS, 4), "classes": len(classes), "skipped": skipped}
    model[0].load_state_dict(network)
    return save_network(model[0], output, {"metrics": metrics, "provenance": {**made_with, "seconds": round(seconds), **run_on(device)}})


def paths_by_label(data: Path) -> dict[str, list[Path]]:
    """From a folder of class folders, or from a JSONL file whose images stand beside it. Raises InputError."""
    found: dict[str, list[Path]] = defaultdict(list)
    if data.is_dir():
        for folder in sorted(p for p in data.iterdir() if p.is_dir() and not p.name.startswith(".")):
            found[folder.name] = files_under(folder)
        return found
    for number, line in lines_of_file(data, "give a folder of class folders or a JSONL file"):
        try:
            row = json.loads(line, object_pairs_hook=no_twin)
            found[str(row["label"])].append(data.parent / row["image"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{data}: line {number} has no image and label", "correct it or take it out") from None
    return found


def classes_from_images(paths: dict[str, list[Path]], limit: int, source: Path) -> tuple[Classes, int]:
    """(the classes that fill a task, how many files were left out as no readable image). Raises InputError where they are too few."""
    classes, skipped = [], 0
    for _, files in sorted(paths.items()):
        if len(files) < 2 * SHOTS:
            continue
        images, broken = grey_images(files[: limit or None], MAML_SIZE)
        skipped += broken
        if len(images) >= 2 * SHOTS:
            classes.append(images)
    if len(classes) < WAYS:
        raise InputError(
            f"{source}: {counted(len(classes), 'class has', 'classes have')} {2 * SHOTS} images or more",
            f"a task needs {WAYS} such classes",
        )
    return classes, skipped


def task(classes: Classes, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images to learn from and to be judged by, each (WAYS * SHOTS, 1, S, S) f32, and the labels of either, (WAYS * SHOTS,) i64."""
    drawn = [classes[i] for i in torch.randperm(len(classes), generator=generator)[:WAYS].tolist()]
    images = torch.stack([c[torch.randperm(len(c), generator=generator)[: 2 * SHOTS]] for c in drawn])
    learnt, asked = (images / 255).split(SHOTS, dim=1)
    return learnt.flatten(0, 1), asked.flatten(0, 1), torch.arange(WAYS).repeat_interleave(SHOTS)


def judged(model: nn.Module, learnt: Tensor, asked: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, accuracy), both () f32, on ``asked`` after STEPS of gradient descent on ``learnt``; the loss leads back to ``model``.

    Each step's gradient is taken as a constant, so the loss's gradient at the model's weights is that at the adapted ones.
    """
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for _ in range(STEPS):
        loss = F.cross_entropy(functional_call(model, weights, (learnt,)), labels)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        weights = {name: w - RATE * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
    logits = functional_call(model, weights, (asked,))
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean().detach()
