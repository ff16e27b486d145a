"""MEVF's and QCR's heads as they answer: what they see of images, and those of a checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from pmclip_deploy.bundle.files import sha256_of_file
from pmclip_deploy.errors import BundleError
from pmclip_deploy.evaluation import evaluate as E
from pmclip_deploy.evaluation.rows import Row as EvaluationRow
from pmclip_deploy.evaluation.rows import pictures_of
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.base import Towers
from pmclip_deploy.train.checkpoint import Checkpoint, towers_from_checkpoint, under
from pmclip_deploy.train.datasets import image_key
from pmclip_deploy.train.heads.mevf import MEVF
from pmclip_deploy.train.heads.qcr import OPEN, QCR
from pmclip_deploy.train.heads.vision import AUTOENCODER_SIZE, MAML_SIZE, ImageFeatures, grey_from_path
from pmclip_deploy.train.heads.words import Dictionary
from pmclip_deploy.train.processes import device_named, rank
from pmclip_deploy.train.vocabulary import AnswerVocabulary

HEADS: dict[str, type[MEVF] | type[QCR]] = {"mevf": MEVF, "qcr": QCR}
ROWS = 256  # answered at a time
CPU = torch.device("cpu")

Head = MEVF | QCR


@dataclass(frozen=True)
class Inputs:
    """What a head sees of N images, read once: each (N, ...) f32, or None where it is not needed.

    ``clip`` are embeddings, or with a ``tower``, which is trained with the head, the pixels that it embeds each time.
    """

    clip: Tensor | None
    autoencoder: Tensor | None
    maml: Tensor | None
    tower: Towers | None = None

    def of(self, place: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        some = self.part(place)
        clip = some.clip if some.clip is None or self.tower is None else self.tower.encode_image(some.clip).float()
        return clip, some.autoencoder, some.maml

    def part(self, place: Tensor) -> "Inputs":
        """Of the images at ``place``."""
        return self._each(lambda x: x[place])

    def to(self, device: torch.device) -> "Inputs":
        return self._each(lambda x: x.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        clip, autoencoder, maml = (None if x is None else change(x) for x in (self.clip, self.autoencoder, self.maml))
        return Inputs(clip, autoencoder, maml, self.tower)

    @torch.no_grad()
    def embedded(self, size: int = 32) -> "Inputs":
        """With embeddings in place of pixels, by the tower as it is now."""
        if self.tower is None or self.clip is None:
            return self
        self.tower.eval()
        return replace(self, clip=torch.cat([self.tower.encode_image(x).float() for x in self.clip.split(size)]), tower=None)


@torch.no_grad()
def inputs_from_images(
    images: Sequence[Path],
    clip: Towers | None,
    preprocess: Any,
    features: ImageFeatures,
    encoded: bool,
    device: torch.device = CPU,
    trained: bool = False,
    size: int = 32,
) -> Inputs:
    """Computed and kept on ``device``, where ``clip`` and ``features`` are. Raises InputError.

    ``encoded`` takes the auto-encoder's code for its pixels. ``trained`` keeps pixels for ``clip``, in f32. Without ``clip`` its
    place is a one: the question alone answers.
    """
    rows: list[list[Tensor]] = [[], [], []]
    console = Console(stderr=True, quiet=rank() > 0)
    for start in track(range(0, len(images), size), "encoding images", console=console, disable=not console.is_terminal):
        some = images[start : start + size]
        if clip is not None:
            read = (torch.from_numpy(tensor_from_pixels(picture_from_path(path).pixels, preprocess)) for path in some)
            pixels = torch.stack([*read]).to(device)
            rows[0].append(pixels if trained else clip.encode_image(pixels).float())
        elif features.clip_dim:
            rows[0].append(torch.ones(len(some), features.clip_dim, device=device))
        if features.autoencoder is not None:
            grey = torch.stack([grey_from_path(path, AUTOENCODER_SIZE) for path in some]).to(device)
            rows[1].append(features.autoencoder.encode(grey) if encoded else grey)
        if features.maml is not None:
            rows[2].append(torch.stack([grey_from_path(path, MAML_SIZE) for path in some]).to(device))
    embeddings, coded, small = (torch.cat(of) if of else None for of in rows)
    return Inputs(embeddings, coded, small, clip if trained else None)


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


def head_from_tensors(tensors: dict[str, Tensor], meta: Checkpoint) -> Head:
    """In eval mode; ``meta`` is checkpoint.json. Raises KeyError, TypeError, ValueError and RuntimeError where the two do not fit."""
    about = meta["head"]
    head = HEADS[about["kind"]].from_tensors(tensors)
    wanted = BACKBONES[meta["backbone"]].embed_dim if "clip" in about["features"] else int(not about["features"])
    if head.features.clip_dim != wanted or head.question.tables[0].num_embeddings != len(meta["dictionary"]) + 1:
        raise ValueError("its sizes are not those of its description")
    return head


def checkpoint_answerer(
    folder: Path, rows: Sequence[EvaluationRow], images: Path, device: str = "auto"
) -> tuple[E.Answerer, dict[str, Any]]:
    """(how to ask the head of a checkpoint about ``rows``, what it is). Raises BundleError, DeviceError and InputError."""
    where = device_named(device)
    towers, meta, tensors = towers_from_checkpoint(folder)
    about = meta.get("head")
    if not isinstance(about, dict) or about.get("kind") not in HEADS:
        raise BundleError(
            f"{folder}: has no head of MEVF or QCR", "pmclip-lite's is measured as a bundle: `pmclip-deploy export`, then --bundle"
        )
    spec = BACKBONES[meta["backbone"]]
    try:
        head = head_from_tensors(under(tensors, "head"), meta)
        dictionary, vocabulary = Dictionary(tuple(meta["dictionary"])), AnswerVocabulary(tuple(meta["answers"]), meta["closed_answers"])
        trained_on, seed = set(meta["trained_on"]), meta["provenance"]["head"]["seed"]
        tower_trained_on = E.tower_trained_on(meta["provenance"]) if "clip" in about["features"] else []
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise BundleError(f"{folder}: its head does not fit its description", "make it again with `pmclip-deploy train vqa`") from None
    names = pictures_of(rows)[0]
    tower = towers.to(where) if "clip" in about["features"] else None
    inputs = inputs_from_images([images / name for name in names], tower, spec.preprocess, head.to(where).features, True, where)
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
    return answerer(head, inputs, vocabulary, dictionary, rows, {name: i for i, name in enumerate(names)}), model


def answerer(
    head: Head, inputs: Inputs, vocabulary: AnswerVocabulary, dictionary: Dictionary, rows: Sequence[EvaluationRow], at: dict[str, int]
) -> E.Answerer:
    """``at`` says where in ``inputs`` an image is."""
    device = next(head.parameters()).device
    tokens = dictionary.tokens([row.question for row in rows]).to(device)
    place = np.array([at[name] for name in pictures_of(rows)[0]])

    def asked(picture: Any) -> E.Decisions:
        at = torch.from_numpy(place[picture]).to(device)
        label, probability, is_open = answers_from_inputs(head, inputs, at, tokens, vocabulary.closed)
        kinds = ["open" if x else "closed" for x in is_open.tolist()]
        return E.Decisions(
            answers=[vocabulary.answers[i] for i in label.tolist()],
            probability=probability.double().numpy(),
            causes=[None] * len(rows),
            kinds=kinds if isinstance(head, QCR) else None,
        )

    return asked
