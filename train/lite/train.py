"""`train vqa`: the steps from questions and a checkpoint to a checkpoint that answers."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmclip_deploy.bundle.files import name_of_output, sha256_of_file
from pmclip_deploy.train import kinds as K
from pmclip_deploy.train import radiograph
from pmclip_deploy.train.captions import statements_by_image
from pmclip_deploy.train.checkpoint import Checkpoint, write_tensors
from pmclip_deploy.train.clip.embeddings import Captions
from pmclip_deploy.train.contrastive import scale_of
from pmclip_deploy.train.heads.lite import LiteHead
from pmclip_deploy.train.images import Images
from pmclip_deploy.train.lite.calibration import calibrated
from pmclip_deploy.train.lite.data import Data, read_data
from pmclip_deploy.train.lite.loss import Step, Texts
from pmclip_deploy.train.lite.model import Model, Source, remember, source_from_checkpoint
from pmclip_deploy.train.lite.pictures import AsFiled, others
from pmclip_deploy.train.lite.rows import rows_from_data
from pmclip_deploy.train.lite.validation import derived_as_questions, scored_from_questions
from pmclip_deploy.train.lookalikes import write_signatures
from pmclip_deploy.train.loop import Averaged, Settings, fit
from pmclip_deploy.train.nonradiographs import Photographs, photographs_from_folder
from pmclip_deploy.train.processes import device_named, run_on
from pmclip_deploy.train.questions import sha256_of_questions

HIDDEN = 768  # rank of the head's bilinear form


@dataclass(frozen=True)
class Prepared:
    """All that is read and computed before the first step."""

    source: Source
    data: Data
    step: Step
    photographs: Photographs


def train_vqa(
    data: list[Path],
    clip: Path,
    output: Path,
    settings: Settings,
    rounded_epochs: int = 4,
    films: Sequence[Path] = (),
    photographs: Path | None = None,
    name: str | None = None,
) -> Checkpoint:
    """Trains on the first folder of ``data`` (with captions from all), from the checkpoint ``clip``; writes one to ``output``.
    ``photographs`` are added to what is no radiology; ``films`` are radiology for the branch that tells them apart (train/radiograph.py).

    The loss: ``lite.loss.Step``. Derived yes/no questions are weighted so that yes and no weigh the same: their probabilities are for even
    odds. In the last ``rounded_epochs`` the image tower computes with INT8's roundings.
    """
    name = name_of_output(output, name)
    settings.start()
    ready = prepare(data, clip, settings, rounded_epochs, photographs)
    source, model = ready.source, ready.step.model
    output.mkdir(parents=True, exist_ok=True)
    made_with = _made_with(ready, settings, rounded_epochs)
    seconds = fit_averaged(ready, settings, made_with, output / "state.pt")
    source.visual.on = False
    remember(model, ready.step.images, ready.step.rows, ready.step.mixed)
    sources = [ready.data.paths, *radiograph.pictures_of_films(films)[0]]
    branch = radiograph.train_radiograph(model.clip, model.head, source.spec.preprocess, sources, ready.photographs, settings.seed)
    kinds, abstention, metrics = calibrate(ready, settings.seed)
    meta: Checkpoint = {
        "name": name,
        "version": source.meta["version"],
        "backbone": source.meta["backbone"],
        "logit_scale": round(scale_of(model.clip.logit_scale).item(), 4),
        "answers": ready.data.vocabulary.answers,
        "kinds": kinds,
        "abstention": abstention,
        "metrics": {**source.meta["metrics"], **metrics},
        "provenance": {
            **source.meta["provenance"],
            "vqa": {**made_with, "data": [p.name for p in data], "seconds": round(seconds), **run_on(ready.step.device)},
            "radiograph": radiograph.provenance([*data[:1], *films], settings.seed, branch),
        },
    }
    write_tensors(output, model.state_dict(), meta, source.tokenizer)
    write_signatures(output, ready.data.paths)
    return meta


def prepare(folders: list[Path], clip: Path, settings: Settings, rounded_epochs: int, photographs: Path | None) -> Prepared:
    """Raises BundleError, InputError and UsageError. ``rng`` is drawn from in this order: questions without an answer, captions."""
    device, rng = device_named(settings.device), random.Random(settings.seed)
    source = source_from_checkpoint(clip)
    data = read_data(folders, settings)
    rows = rows_from_data(data, rng)
    texts = Texts.of(rows, source, device)
    said = statements_by_image(data.everything)
    captions = Captions.of(source.towers, source.tokenizer, [said[p] for p in data.paths], rng).to(device)
    radiographs = {p for p, facts in data.facts.items() if facts.family == "xr"}
    images = Images(data.paths, source.spec.preprocess, AsFiled(radiographs, settings.seed))
    given = photographs_from_folder(photographs)
    strange = others(given, source.spec.preprocess, settings.seed + 1)
    answers = data.vocabulary
    head = LiteHead(source.spec.embed_dim, len(answers.answers), answers.trained, len(answers.kinds), HIDDEN)
    model = Model(source.towers, head).to(device)
    allowed = answers.allowed[:, : answers.trained].to(device)
    rounded_from = settings.epochs - rounded_epochs
    step = Step(model, source, rows, texts, captions, images, strange, allowed, rounded_from, device, settings.is_mixed(True))
    return Prepared(source, data, step, given)


def fit_averaged(ready: Prepared, settings: Settings, made_with: dict[str, Any], state: Path) -> float:
    """Leaves the model with the mean of its weights, in eval mode, on the CPU; returns the seconds."""
    model, rate = ready.step.model, settings.learning_rate
    averaged = Averaged(model)
    seconds = fit(
        "train vqa",
        averaged,
        ready.step,
        len(ready.data.paths),
        [(list(model.head.parameters()), 4 * rate), (model.clip.projections(), rate), (model.clip.trunk(), rate)],
        settings,
        made_with,
        state,
        lambda order, epoch: averaged.following(order, epoch * len(order)),
    )
    averaged.settle()
    model.eval().cpu()
    return seconds


def calibrate(ready: Prepared, seed: int) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """(kinds, abstention, metrics) as the checkpoint states them, from the validation images."""
    asked, source = ready.data.validation, ready.source
    images = Images(sorted({q.image for q in asked}), source.spec.preprocess)
    derived = derived_as_questions(asked, ready.data.organs)
    scored = scored_from_questions(ready.step.model, source.tokenizer, asked, derived, images)
    return calibrated(scored, ready.data.vocabulary, seed)


def _made_with(ready: Prepared, settings: Settings, rounded_epochs: int) -> dict[str, Any]:
    """What the weights depend on."""
    return {
        "backbone": ready.source.spec.name,
        **settings.to_json(),
        "rounded_epochs": rounded_epochs,
        "data_sha256": sha256_of_questions(ready.data.everything),
        "phrases_sha256": hashlib.sha256(b"".join(p.read_bytes() for p in sorted(K.PHRASES.iterdir()))).hexdigest(),
        "clip_sha256": sha256_of_file(ready.source.folder / "model.safetensors"),
        "photographs_sha256": ready.photographs[1],
        "images": len(ready.data.paths),
    }
