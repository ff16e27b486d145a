"""`train vqa --head mevf` and `qcr`: trains the head on questions, over an image tower that stays as it is, and reads it back to answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Generator, Tensor
from torch.nn import functional as F

from pmclip_deploy.bundle.files import sha256_of_file
from pmclip_deploy.errors import BundleError, DeviceError, InputError, UsageError
from pmclip_deploy.evaluation import evaluate as E
from pmclip_deploy.evaluation.rows import Row as EvaluationRow
from pmclip_deploy.evaluation.rows import pictures_of
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.base import Towers
from pmclip_deploy.train.checkpoint import name_of_output, towers_from_checkpoint, under, write_checkpoint
from pmclip_deploy.train.datasets import image_key
from pmclip_deploy.train.datasets.schema import BROKEN_SHARE
from pmclip_deploy.train.heads import mevf, qcr
from pmclip_deploy.train.heads.mevf import MEVF, mevf_loss
from pmclip_deploy.train.heads.qcr import OPEN, QCR, qcr_loss
from pmclip_deploy.train.heads.vision import (
    AUTOENCODER_SIZE,
    MAML_SIZE,
    ImageFeatures,
    autoencoder_from_file,
    grey_from_path,
    maml_from_file,
)
from pmclip_deploy.train.heads.words import Dictionary, tables_from_glove
from pmclip_deploy.train.images import readable
from pmclip_deploy.train.loop import Optimiser, Row, Settings, fit
from pmclip_deploy.train.questions import sha256_of_questions
from pmclip_deploy.train.splits import IMAGE_DISJOINT, image_disjoint_split, questions_of_split, rows_from_questions
from pmclip_deploy.train.vocabulary import AnswerVocabulary, comparable, vocabulary_as_mevf, vocabulary_as_qcr

HELD_OUT = 0.1  # of the training images, for validation
FEATURES = ("clip", "maml", "ae")
HEADS: dict[str, type[MEVF] | type[QCR]] = {"mevf": MEVF, "qcr": QCR}
ROWS = 256  # answered at a time

Head = MEVF | QCR


@dataclass(frozen=True)
class Plan:
    """What is trained, beside the settings of the training: the paper's where nothing is said."""

    head: str  # of HEADS
    glove: Path
    features: tuple[str, ...] = ("clip", "ae")  # of FEATURES; none of them: the question alone
    autoencoder: Path | None = None
    maml: Path | None = None
    freeze_autoencoder: bool = False  # its code is then computed once, and not its reconstruction
    attention: str = "ban"  # MEVF's
    depth: int | None = None  # glimpses of BAN, stacks of SAN
    hidden: int = mevf.HIDDEN
    type_epochs: int = qcr.TypeRecipe.epochs  # of QCR's classifier of questions, before the rest
    split: str = "official"
    split_seed: int = 1

    def check(self) -> None:
        """Raises UsageError."""
        if unknown := [name for name in self.features if name not in FEATURES]:
            raise UsageError(f"feature {unknown[0]!r} is unknown; choose of clip, ae and maml, or none")
        for name, file in (("ae", self.autoencoder), ("maml", self.maml)):
            if (name in self.features) != (file is not None):
                option = "--autoencoder" if name == "ae" else "--maml"
                wanted = f"{name} in --features needs {option} FILE" if file is None else f"{option} is for {name} in --features"
                raise UsageError(f"{wanted}; `pmclip-deploy train {option[2:]}` makes one")
        if self.split not in ("official", IMAGE_DISJOINT):
            raise UsageError(f"split {self.split!r} is unknown; choose official or {IMAGE_DISJOINT}")
        if self.attention not in ("ban", "san"):
            raise UsageError(f"attention {self.attention!r} is unknown; choose ban or san")
        if self.head == "qcr" and self.attention != "ban":
            raise UsageError("QCR has no --attention but ban")

    def to_json(self) -> dict[str, Any]:
        """What the weights depend on."""
        files = {"glove": self.glove, "autoencoder": self.autoencoder, "maml": self.maml}
        chosen = ("freeze_autoencoder", "attention", "hidden", "split", "split_seed") + (("type_epochs",) if self.head == "qcr" else ())
        return {
            "head": self.head,
            "features": list(self.features),
            **{name: getattr(self, name) for name in chosen},
            "depth": self.glimpses,
            **{f"{name}_sha256": sha256_of_file(file) for name, file in files.items() if file is not None},
        }

    @property
    def glimpses(self) -> int:
        return self.depth or (qcr.GLIMPSES if self.head == "qcr" else mevf.GLIMPSES if self.attention == "ban" else mevf.STACKS)


@dataclass(frozen=True)
class MevfOptimiser(Optimiser):
    """With MEVF's schedule by the epoch."""

    epochs: int = mevf.Recipe.epochs

    def rate(self, step: int, steps: int) -> float:
        return mevf.schedule(step * self.epochs // steps)


def settings_of_head(head: str, **chosen: Any) -> Settings:
    """The published recipe with ``chosen`` in place of its own values."""
    recipe = mevf.Recipe() if head == "mevf" else qcr.Recipe()
    run = {"epochs": recipe.epochs, "learning_rate": recipe.learning_rate, "batch_size": recipe.batch_size, **chosen}
    plain: dict[str, Any] = {"kind": "Adamax", "weight_decay": 0.0, "warmup": None, "longest": recipe.clip_norm}
    optimiser = MevfOptimiser(**plain, epochs=run["epochs"]) if head == "mevf" else Optimiser(**plain)
    return Settings(**run, optimiser=optimiser)


@dataclass(frozen=True)
class Inputs:
    """What a head sees of N images, computed once: each (N, ...) f32, or None where it is not needed."""

    clip: Tensor | None
    autoencoder: Tensor | None
    maml: Tensor | None

    def of(self, place: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        clip, autoencoder, maml = (None if x is None else x[place] for x in (self.clip, self.autoencoder, self.maml))
        return clip, autoencoder, maml

    def to(self, device: torch.device) -> "Inputs":
        return Inputs(*(None if x is None else x.to(device) for x in (self.clip, self.autoencoder, self.maml)))


@torch.no_grad()
def inputs_from_images(
    images: Sequence[Path], clip: Towers | None, preprocess: Any, features: ImageFeatures, encoded: bool, size: int = 32
) -> Inputs:
    """``encoded`` takes the auto-encoder's code for its pixels. Without ``clip`` its place is a one: the question alone answers."""
    rows: list[list[Tensor]] = [[], [], []]
    console = Console(stderr=True)
    for start in track(range(0, len(images), size), "encoding images", console=console, disable=not console.is_terminal):
        some = images[start : start + size]
        if clip is not None:
            pixels = [torch.from_numpy(tensor_from_pixels(picture_from_path(path).pixels, preprocess)) for path in some]
            rows[0].append(clip.encode_image(torch.stack(pixels)).float())
        elif features.clip_dim:
            rows[0].append(torch.ones(len(some), features.clip_dim))
        if features.autoencoder is not None:
            grey = torch.stack([grey_from_path(path, AUTOENCODER_SIZE) for path in some])
            rows[1].append(features.autoencoder.encode(grey) if encoded else grey)
        if features.maml is not None:
            rows[2].append(torch.stack([grey_from_path(path, MAML_SIZE) for path in some]))
    return Inputs(*(torch.cat(of) if of else None for of in rows))


@torch.no_grad()
def answers_from_inputs(head: Head, inputs: Inputs, place: Tensor, tokens: Tensor, closed: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(label, probability, whether QCR takes the question for an open one) of N rows, each (N,), on the CPU.

    QCR answers from the branch that its own classifier of questions names.
    """
    head.eval()
    rows = []
    for at, asked in zip(place.split(ROWS), tokens.split(ROWS), strict=True):
        if isinstance(head, MEVF):
            probability, label = head(*inputs.of(at), asked)[0].sigmoid().max(1)
            is_open = torch.zeros_like(label, dtype=torch.bool)
        else:
            open_logits, closed_logits, kind, _ = head(*inputs.of(at), asked)
            is_open = kind.argmax(1) == OPEN
            (p_open, open_label), (p_closed, closed_label) = (x.sigmoid().max(1) for x in (open_logits, closed_logits))
            label = torch.where(is_open, open_label + int(closed or 0), closed_label)
            probability = torch.where(is_open, p_open, p_closed)
        rows.append((label.cpu(), probability.cpu(), is_open.cpu()))
    label, probability, is_open = (torch.cat(column) for column in zip(*rows, strict=True))
    return label, probability, is_open


def train_head(data: Path, clip: Path, output: Path, plan: Plan, settings: Settings, name: str | None = None) -> dict[str, Any]:
    """Writes a checkpoint to ``output``, with the tower in it; returns its description. Raises InputError, BundleError and UsageError.

    A tenth of the training images is held out: each epoch is measured on it, and the last one is kept whatever it says. The images that are
    asked about in the test split are not looked at.
    """
    plan.check()
    called = name_of_output(output, name)
    settings.start()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known, _ = questions_of_split(data, "train" if plan.split == "official" else plan.split, plan.split_seed)
    whole = readable((q.image for q in known), BROKEN_SHARE)
    training, validation = image_disjoint_split([q for q in known if q.image in whole], plan.split_seed, HELD_OUT)
    if settings.limit:
        some = set(sorted({q.image for q in training})[: settings.limit])
        training = [q for q in training if q.image in some]
    if len(training) < settings.batch_size:
        raise UsageError(f"{len(training)} training questions are fewer than one batch of {settings.batch_size}; lower --batch-size")
    towers, meta, _ = towers_from_checkpoint(clip)
    spec = BACKBONES[meta["backbone"]]

    asked = [q.question for q in training]
    dictionary = Dictionary.from_questions(asked)
    tables = tables_from_glove(plan.glove, dictionary, asked)
    vocabulary = vocabulary_as_mevf(training) if plan.head == "mevf" else vocabulary_as_qcr(training)
    closed = vocabulary.closed
    features = ImageFeatures(
        spec.embed_dim if "clip" in plan.features else int(not plan.features),
        autoencoder_from_file(plan.autoencoder) if plan.autoencoder else None,
        maml_from_file(plan.maml) if plan.maml else None,
    )
    model: Head
    if plan.head == "mevf":
        model = MEVF(features, tables, len(vocabulary.answers), plan.attention.upper(), plan.glimpses, plan.hidden)
    elif not closed or closed == len(vocabulary.answers):
        raise InputError(f"{data}: QCR needs open and closed questions to train on; give another --data, or --head mevf")
    else:
        model = QCR(features, tables, len(vocabulary.answers) - closed, closed, plan.glimpses, plan.hidden)
    if features.autoencoder is not None and plan.freeze_autoencoder:
        features.autoencoder.requires_grad_(False)

    images = sorted({q.image for q in [*training, *validation]})
    at = {image: i for i, image in enumerate(images)}
    tower = towers if "clip" in plan.features else None
    inputs = inputs_from_images(images, tower, spec.preprocess, features, plan.freeze_autoencoder).to(device)
    model.to(device)
    place = torch.tensor([at[q.image] for q in training], device=device)
    tokens = dictionary.tokens(asked).to(device)
    labels = torch.tensor([vocabulary.label(q) for q in training], device=device)
    is_open = torch.tensor([not q.closed for q in training], device=device)

    def scores(chosen: Tensor, answers: int) -> Tensor:
        return F.one_hot(chosen, answers).float()

    def loss_of(indices: Tensor, generator: Generator, epoch: int) -> Tensor:
        model.train()
        i = indices.to(device)
        seen = inputs.of(place[i])
        if isinstance(model, MEVF):
            logits, made = model(*seen, tokens[i])
            return mevf_loss(logits, scores(labels[i], len(vocabulary.answers)), made, seen[1])
        count = int(closed or 0)
        open_logits, closed_logits, made = model.by_type(*seen, tokens[i], is_open[i])
        open_scores = scores(labels[i][is_open[i]] - count, len(vocabulary.answers) - count)
        return qcr_loss(open_logits, open_scores, closed_logits, scores(labels[i][~is_open[i]], count), made, seen[1])

    def type_loss_of(indices: Tensor, generator: Generator, epoch: int) -> Tensor:
        i = indices.to(device)
        return F.cross_entropy(model.kind.train()(tokens[i]), is_open[i].long())  # type: ignore[union-attr]

    held_place, held_tokens = (
        x.to(device) for x in (torch.tensor([at[q.image] for q in validation]), dictionary.tokens([q.question for q in validation]))
    )
    held_labels, held_open = torch.tensor([vocabulary.label(q) for q in validation]), torch.tensor([not q.closed for q in validation])

    def measure(history: list[Row]) -> Row:
        right = (answers_from_inputs(model, inputs, held_place, held_tokens, closed)[0] == held_labels).float()
        parts = {"open": right[held_open], "closed": right[~held_open], "overall": right}
        return {name: round(part.mean().item(), 4) for name, part in parts.items() if len(part)}

    made_with = {
        **settings.to_json(),
        **plan.to_json(),
        "data_sha256": sha256_of_questions(training),
        "clip_sha256": sha256_of_file(clip / "model.safetensors"),
    }
    seconds = 0.0
    if isinstance(model, QCR):
        seconds += _fit_types(model, type_loss_of, len(training), plan, settings, made_with, output / "type")
    history: list[Row] = []
    title, state = f"train vqa {plan.head}", output / "state.pt"
    groups = [([p for p in model.parameters() if p.requires_grad], settings.learning_rate)]
    seconds += fit(title, model, loss_of, len(training), groups, settings, made_with, state, measure=measure, history=history)

    rows, before = rows_from_questions(validation), rows_from_questions(training)
    decide = _asked(model, inputs, vocabulary, dictionary, rows, {str(image.absolute()): i for image, i in at.items()})
    validated = E.figures(rows, decide, {}, before, settings.seed, comparable)[0]
    description = {
        "name": called,
        **{k: meta[k] for k in ("version", "backbone", "logit_scale")},
        "head": {"kind": plan.head, "features": list(plan.features)},
        "answers": vocabulary.answers,
        "closed_answers": closed,
        "dictionary": dictionary.words,
        "trained_on": sorted({image_key(q.image) for q in training}),
        "metrics": {
            "validation": {
                **{k: validated[k] for k in ("n", "images", "accuracy", "ci95", "baselines")},
                "by": {"type": validated["by"]["type"]},
            },
            "history": history,
        },
        "provenance": {
            **meta["provenance"],
            "head": {
                **made_with,
                "data": [data.name],
                "questions": len(training),
                "images": len({q.image for q in training}),
                "seconds": round(seconds),
                "threads": torch.get_num_threads(),
            },
        },
    }
    write_checkpoint(output, towers, description, clip / "tokenizer.json", model)
    return description


def _fit_types(
    model: QCR,
    loss_of: Callable[[Tensor, Generator, int], Tensor],
    count: int,
    plan: Plan,
    settings: Settings,
    made_with: Any,
    folder: Path,
) -> float:
    """QCR's classifier of questions, alone, then frozen; returns the seconds."""
    recipe = qcr.TypeRecipe()
    adam = Optimiser("Adam", weight_decay=0.0, warmup=None, longest=None)
    batch = min(recipe.batch_size, count)
    of = Settings(plan.type_epochs, recipe.learning_rate, batch, settings.seed, resume=settings.resume, optimiser=adam)
    folder.mkdir(parents=True, exist_ok=True)
    groups = [(list(model.kind.parameters()), recipe.learning_rate)]
    seconds = fit("train vqa qcr, question types", model.kind, loss_of, count, groups, of, made_with, folder / "state.pt")
    model.kind.requires_grad_(False)
    return seconds


# Reading back.


def head_from_tensors(tensors: dict[str, Tensor], meta: dict[str, Any]) -> Head:
    """In eval mode; ``meta`` is checkpoint.json. Raises KeyError, TypeError, ValueError and RuntimeError where the two do not fit."""
    about = meta["head"]
    head = HEADS[about["kind"]].from_tensors(tensors)
    wanted = BACKBONES[meta["backbone"]].embed_dim if "clip" in about["features"] else int(not about["features"])
    if head.features.clip_dim != wanted or head.question.tables[0].num_embeddings != len(meta["dictionary"]) + 1:
        raise ValueError("its sizes are not those of its description")
    return head


def asked_of_checkpoint(folder: Path, rows: Sequence[EvaluationRow], images: Path, device: str = "auto") -> tuple[E.Asked, dict[str, Any]]:
    """(how to ask the head of a checkpoint about ``rows``, what it is). Raises BundleError, DeviceError and InputError."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {device!r} is unknown; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("torch finds no CUDA device; give --device cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    towers, meta, tensors = towers_from_checkpoint(folder)
    about = meta.get("head")
    if not isinstance(about, dict) or about.get("kind") not in HEADS:
        raise BundleError(
            f"{folder}: has no head of MEVF or QCR; pmclip-lite's is measured as a bundle: `pmclip-deploy export`, then --bundle"
        )
    spec = BACKBONES[meta["backbone"]]
    try:
        head = head_from_tensors(under(tensors, "head"), meta)
        dictionary, vocabulary = Dictionary(tuple(meta["dictionary"])), AnswerVocabulary(tuple(meta["answers"]), meta["closed_answers"])
        trained_on, seed = set(meta["trained_on"]), meta["provenance"]["head"]["seed"]
        tower_trained_on = E.tower_trained_on(meta["provenance"]) if "clip" in about["features"] else []
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise BundleError(f"{folder}: its head does not fit its description; make it again with `pmclip-deploy train vqa`") from None
    names = pictures_of(rows)[0]
    where = torch.device("cuda" if on_gpu else "cpu")
    tower = towers if "clip" in about["features"] else None
    inputs = inputs_from_images([images / name for name in names], tower, spec.preprocess, head.features, encoded=True).to(where)
    model = {
        "checkpoint": folder.name,
        "name": meta["name"],
        "version": meta["version"],
        "head": about["kind"],
        "precision": "fp32",
        "backend": "pytorch",
        "device": where.type,
        "sha256": sha256_of_file(folder / "model.safetensors"),
        "seed": seed,
        "images_trained_on": sum(image_key(images / name) in trained_on for name in names),
        "tower_trained_on": tower_trained_on,  # none where the head does not look through it
    }
    return _asked(head.to(where), inputs, vocabulary, dictionary, rows, {name: i for i, name in enumerate(names)}), model


def _asked(
    head: Head, inputs: Inputs, vocabulary: AnswerVocabulary, dictionary: Dictionary, rows: Sequence[EvaluationRow], at: dict[str, int]
) -> E.Asked:
    """``at`` says where in ``inputs`` an image is."""
    device = next(head.parameters()).device
    tokens = dictionary.tokens([row.question for row in rows]).to(device)
    place = np.array([at[name] for name in pictures_of(rows)[0]])

    def asked(picture: Any) -> E.Decided:
        at = torch.from_numpy(place[picture]).to(device)
        label, probability, is_open = answers_from_inputs(head, inputs, at, tokens, vocabulary.closed)
        kinds = ["open" if x else "closed" for x in is_open.tolist()]
        return E.Decided(
            answers=[vocabulary.answers[i] for i in label.tolist()],
            probability=probability.double().numpy(),
            causes=[None] * len(rows),
            kinds=kinds if isinstance(head, QCR) else None,
        )

    return asked
