"""`train vqa --head mevf` and `qcr`: trains the head on questions, over an image tower that stays as it is or is trained with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.bundle.files import name_of_output, sha256_of_file
from pmclip_deploy.console import counted
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.evaluation import evaluate as E
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import Checkpoint, towers_from_checkpoint, write_checkpoint
from pmclip_deploy.train.cpu import autocast, run_slow_convolutions_in_float
from pmclip_deploy.train.datasets import Question, image_key
from pmclip_deploy.train.datasets.schema import BROKEN_SHARE
from pmclip_deploy.train.heads import qcr
from pmclip_deploy.train.heads.answering import Head, Inputs, answerer, answers_from_inputs, inputs_from_images
from pmclip_deploy.train.heads.mevf import MEVF, mevf_loss
from pmclip_deploy.train.heads.plan import Plan
from pmclip_deploy.train.heads.qcr import QCR, qcr_loss
from pmclip_deploy.train.heads.vision import ImageFeatures, autoencoder_from_file, maml_from_file
from pmclip_deploy.train.heads.words import Dictionary, tables_from_glove
from pmclip_deploy.train.images import readable
from pmclip_deploy.train.lookalikes import write_signatures
from pmclip_deploy.train.loop import Optimiser, Row, Settings, fit
from pmclip_deploy.train.processes import device_of_process, own_part, processes, rank, run_on
from pmclip_deploy.train.questions import sha256_of_questions
from pmclip_deploy.train.splits import image_disjoint_split, questions_of_split, rows_from_questions
from pmclip_deploy.train.vocabulary import AnswerVocabulary, comparable, vocabulary_as_mevf, vocabulary_as_qcr

HELD_OUT = 0.1  # of the training images, for validation


@dataclass(frozen=True)
class Split:
    training: list[Question]
    validation: list[Question]  # no image is on both sides

    @property
    def images(self) -> list[Path]:
        return sorted({q.image for q in [*self.training, *self.validation]})

    @property
    def held(self) -> list[Path]:
        return sorted({q.image for q in self.validation})

    def of_held(self, inputs: Inputs) -> Inputs:
        """``inputs`` are of ``images``."""
        at = {image: i for i, image in enumerate(self.images)}
        return inputs.part(torch.tensor([at[image] for image in self.held]))


@dataclass(frozen=True)
class Reader:
    """A head, with the words that it reads and the answers that it gives."""

    model: Head
    dictionary: Dictionary
    vocabulary: AnswerVocabulary

    @property
    def features(self) -> ImageFeatures:
        return self.model.features


@dataclass(frozen=True)
class Encoded:
    """Questions as a head takes them, (N, ...), on a device."""

    place: Tensor  # i64, of their images in the inputs
    tokens: Tensor  # i64
    labels: Tensor  # i64
    is_open: Tensor  # bool

    @classmethod
    def of(cls, questions: list[Question], images: list[Path], head: Reader) -> "Encoded":
        at = {image: i for i, image in enumerate(images)}
        return cls(
            torch.tensor([at[q.image] for q in questions]),
            head.dictionary.tokens([q.question for q in questions]),
            torch.tensor([head.vocabulary.label(q) for q in questions]),
            torch.tensor([not q.closed for q in questions]),
        )

    def to(self, device: torch.device) -> "Encoded":
        return Encoded(*(x.to(device) for x in (self.place, self.tokens, self.labels, self.is_open)))


@dataclass(frozen=True)
class Step:
    """This process's part of the loss of a batch of questions, each answer against all others, and of the images' reconstruction."""

    model: Head
    inputs: Inputs
    questions: Encoded
    answers: int
    closed: int  # of the answers, QCR's closed ones
    mixed: bool = False  # bf16 where the device computes in it

    def __call__(self, indices: Tensor, generator: Generator, epoch: int) -> Tensor:
        self.model.train()
        if self.inputs.tower is not None:
            self.inputs.tower.train()
        device = self.questions.place.device
        with autocast(device, self.mixed):
            return self._loss(indices.to(device))

    def _loss(self, batch: Tensor) -> Tensor:
        known, i = self.questions, own_part(batch)
        seen = self.inputs.of(known.place[i])
        if isinstance(self.model, MEVF):
            logits, made = self.model(*seen, known.tokens[i])
            return mevf_loss(logits.float(), _scores(known.labels[i], self.answers), made, seen[1], len(batch))
        is_open = known.is_open[i]
        open_logits, closed_logits, made = self.model.by_type(*seen, known.tokens[i], is_open)
        open_scores = _scores(known.labels[i][is_open] - self.closed, self.answers - self.closed)
        closed_scores = _scores(known.labels[i][~is_open], self.closed)
        opened = known.is_open[batch].sum()
        rows = opened, len(batch) - opened
        return qcr_loss(open_logits.float(), open_scores, closed_logits.float(), closed_scores, made, seen[1], rows)


def _scores(chosen: Tensor, answers: int) -> Tensor:
    return F.one_hot(chosen, answers).float()


def train_head(data: Path, clip: Path, output: Path, plan: Plan, settings: Settings, name: str | None = None) -> Checkpoint:
    """Writes a checkpoint to ``output``, with the tower in it; returns its description. Raises InputError, BundleError and UsageError.

    A tenth of the training images is held out: each epoch is measured on it, and the last one is kept whatever it says. The images that are
    asked about in the test split are not looked at. Under torchrun each process takes its part of every batch, and sees all images.
    """
    plan.check()
    name = name_of_output(output, name)
    with device_of_process(settings.device) as device:
        settings.start()
        return _train_on(device, data, clip, output, plan, settings, name)


def _train_on(device: torch.device, data: Path, clip: Path, output: Path, plan: Plan, settings: Settings, name: str) -> Checkpoint:
    split = split_of_plan(data, plan, settings)
    towers, meta, _ = towers_from_checkpoint(clip)
    spec = BACKBONES[meta["backbone"]]
    head = untrained_head(data, plan, split.training, spec.embed_dim)
    tower = towers.to(device) if "clip" in plan.features else None
    features = head.model.to(device).features
    inputs = inputs_from_images(split.images, tower, spec.preprocess, features, plan.freeze_autoencoder, device, plan.fine_tune)
    if plan.fine_tune:
        run_slow_convolutions_in_float(towers.visual)
        towers.visual.to(memory_format=torch.channels_last)
    made_with = {
        **settings.to_json(),
        **plan.to_json(),
        "data_sha256": sha256_of_questions(split.training),
        "clip_sha256": sha256_of_file(clip / "model.safetensors"),
    }
    history: list[Row] = []
    seconds = fit_head(head, split, inputs, plan, settings, made_with, output, history)
    description: Checkpoint = {
        "name": name,
        "version": meta["version"],
        "backbone": meta["backbone"],
        "logit_scale": meta["logit_scale"],
        "head": {"kind": plan.head, "features": list(plan.features)},
        "answers": head.vocabulary.answers,
        "closed_answers": head.vocabulary.closed,
        "dictionary": head.dictionary.words,
        "trained_on": sorted({image_key(q.image) for q in split.training}),
        "metrics": {"validation": validated(head, split, split.of_held(inputs).embedded(), settings.seed), "history": history},
        "provenance": {**meta["provenance"], "head": {**made_with, "data": [data.name], **_sizes(split.training), **_run(seconds, device)}},
    }
    if "logit_bias" in meta:
        description["logit_bias"] = meta["logit_bias"]
    if rank() == 0:
        write_checkpoint(output, towers, description, clip / "tokenizer.json", head.model)
    if rank() == 0 and plan.fine_tune:
        write_signatures(output, {q.image for q in split.training})
    return description


def _sizes(training: list[Question]) -> dict[str, int]:
    return {"questions": len(training), "images": len({q.image for q in training})}


def _run(seconds: float, device: torch.device) -> dict[str, Any]:
    return {"seconds": round(seconds), "processes": processes(), **run_on(device)}


def split_of_plan(data: Path, plan: Plan, settings: Settings) -> Split:
    """Raises InputError and UsageError."""
    known, _ = questions_of_split(data, "train" if plan.split == "official" else plan.split, plan.split_seed)
    whole = readable((q.image for q in known), BROKEN_SHARE)
    training, validation = image_disjoint_split([q for q in known if q.image in whole], plan.split_seed, HELD_OUT)
    if settings.limit:
        some = set(sorted({q.image for q in training})[: settings.limit])
        training = [q for q in training if q.image in some]
    if len(training) < settings.batch_size:
        raise UsageError(
            f"{counted(len(training), 'training question')}: fewer than one batch of {settings.batch_size}", "lower --batch-size"
        )
    return Split(training, validation)


def untrained_head(data: Path, plan: Plan, training: list[Question], embed_dim: int) -> Reader:
    """Raises InputError."""
    asked = [q.question for q in training]
    dictionary = Dictionary.from_questions(asked)
    tables = tables_from_glove(plan.glove, dictionary, asked)
    vocabulary = vocabulary_as_mevf(training) if plan.head == "mevf" else vocabulary_as_qcr(training)
    answers, closed = len(vocabulary.answers), vocabulary.closed
    features = ImageFeatures(
        embed_dim if "clip" in plan.features else int(not plan.features),
        autoencoder_from_file(plan.autoencoder) if plan.autoencoder else None,
        maml_from_file(plan.maml) if plan.maml else None,
    )
    model: Head
    if plan.head == "mevf":
        model = MEVF(features, tables, answers, plan.attention.upper(), plan.glimpses, plan.hidden, plan.reader.upper())
    elif not closed or closed == answers:
        raise InputError(f"{data}: QCR needs open and closed questions to train on", "give another --data, or --head mevf")
    else:
        model = QCR(features, tables, answers - closed, closed, plan.glimpses, plan.hidden)
    if features.autoencoder is not None and plan.freeze_autoencoder:
        features.autoencoder.requires_grad_(False)
    return Reader(model, dictionary, vocabulary)


def fit_head(
    head: Reader, split: Split, inputs: Inputs, plan: Plan, settings: Settings, made_with: Any, output: Path, history: list[Row]
) -> float:
    """Trains QCR's classifier of questions, then the head, with its tower if ``inputs`` have one; returns the seconds.

    ``history`` is filled with the head's epochs.
    """
    model, vocabulary = head.model, head.vocabulary
    device = next(model.parameters()).device
    questions = Encoded.of(split.training, split.images, head).to(device)
    held, seen = Encoded.of(split.validation, split.held, head), split.of_held(inputs)
    place, tokens = held.place.to(device), held.tokens.to(device)

    def measure(history: list[Row]) -> Row:
        right = (answers_from_inputs(model, seen.embedded(), place, tokens, vocabulary.closed)[0] == held.labels).float()
        parts = {"open": right[held.is_open], "closed": right[~held.is_open], "overall": right}
        return {name: round(part.mean().item(), 4) for name, part in parts.items() if len(part)}

    seconds = 0.0
    if isinstance(model, QCR):
        seconds += _fit_types(model, questions, plan, settings, made_with, output / "type")
    step = Step(model, inputs, questions, len(vocabulary.answers), int(vocabulary.closed or 0), settings.is_mixed(device.type == "cuda"))
    title, state, count = f"train vqa {plan.head}", output / "state.pt", len(split.training)
    groups = [([p for p in model.parameters() if p.requires_grad], settings.learning_rate)]
    trained: nn.Module = model
    if inputs.tower is not None:
        visual, rate = inputs.tower.visual, plan.tower_learning_rate
        groups.append((list(visual.parameters()), settings.learning_rate if rate is None else rate))
        trained = nn.ModuleDict({"head": model, "visual": visual})
    return seconds + fit(title, trained, step, count, groups, settings, made_with, state, measure=measure, history=history)


def _fit_types(model: QCR, questions: Encoded, plan: Plan, settings: Settings, made_with: Any, folder: Path) -> float:
    """QCR's classifier of questions, alone, then frozen; returns the seconds."""

    def loss_of(indices: Tensor, generator: Generator, epoch: int) -> Tensor:
        i = own_part(indices).to(questions.tokens.device)
        kinds = model.kind.train()(questions.tokens[i])
        return F.cross_entropy(kinds, questions.is_open[i].long(), reduction="sum") / len(indices)

    recipe, count = qcr.TypeRecipe(), len(questions.labels)
    adam = Optimiser("Adam", weight_decay=0.0, warmup=None, longest=None)
    batch = min(recipe.batch_size, count)
    of = Settings(plan.type_epochs, recipe.learning_rate, batch, settings.seed, resume=settings.resume, optimiser=adam)
    folder.mkdir(parents=True, exist_ok=True)
    groups = [(list(model.kind.parameters()), recipe.learning_rate)]
    seconds = fit("train vqa qcr, question types", model.kind, loss_of, count, groups, of, made_with, folder / "state.pt")
    model.kind.requires_grad_(False)
    return seconds


def validated(head: Reader, split: Split, inputs: Inputs, seed: int) -> dict[str, Any]:
    """How right the head is on the validation questions, as `evaluate` counts it; ``inputs`` are of ``split.held``."""
    rows, before = rows_from_questions(split.validation), rows_from_questions(split.training)
    at = {str(image.absolute()): i for i, image in enumerate(split.held)}
    decide = answerer(head.model, inputs, head.vocabulary, head.dictionary, rows, at)
    found = E.figures(rows, decide, {}, before, seed, comparable)[0]
    return {**{k: found[k] for k in ("n", "images", "accuracy", "ci95", "baselines")}, "by": {"type": found["by"]["type"]}}
