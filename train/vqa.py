"""`train vqa`: trains pmclip-lite's head, and the image tower with it, on questions; then calibrates it on validation images."""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.bundle.files import sha256_of_file
from pmclip_deploy.train import kinds as K
from pmclip_deploy.train import radiograph
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.base import LiteTowers
from pmclip_deploy.train.calibration import Scored, calibrated
from pmclip_deploy.train.captions import caption, statements_by_image
from pmclip_deploy.train.checkpoint import name_of_output, towers_from_checkpoint, write_tensors
from pmclip_deploy.train.clip.embeddings import VARIANTS, loss_among_all, pooled_from_text
from pmclip_deploy.train.clip.questions import LOCKED_STAGES
from pmclip_deploy.train.cpu import autocast, mixed_precision, run_slow_convolutions_in_float
from pmclip_deploy.train.datasets import Question
from pmclip_deploy.train.heads.lite import LiteHead, unit
from pmclip_deploy.train.images import Images, radiology_augmented, with_margin
from pmclip_deploy.train.lite_vocabulary import BY_HEART, Vocabulary
from pmclip_deploy.train.loop import Averaged, Settings, fit
from pmclip_deploy.train.modality import facts_by_image, implied_questions
from pmclip_deploy.train.nonradiographs import filed, nonradiographs, photographs_from_folder
from pmclip_deploy.train.questions import questions_for_training, sha256_of_questions

HIDDEN = 768  # rank of the head's bilinear form
REMEMBERED = ("plane", "organ", "modality", BY_HEART)
FINDING_WEIGHT = 0.15  # of one derived question against one of the dataset's
CONTRASTIVE_WEIGHT = 0.3  # keeps image and text embeddings aligned while the tower learns to answer
RADIOGRAPH_WEIGHT = 0.3
OTHERS, OTHERS_SHARE = 1200, 6  # pictures that are no radiology, and how many of radiology come with one in a batch
VERSIONS, NEGATIVE = 2, 0.05  # of each training image, beside itself, and the share of radiographs with black and white exchanged


class Rows:
    """Questions grouped by image: for a batch of images, all their rows at once."""

    def __init__(self, count: int) -> None:
        self.of: list[list[tuple[int, int, int, float]]] = [[] for _ in range(count)]  # (text, kind, answer, weight)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(place in the batch, text, kind, answer) i64 and weight f32, each (R,)."""
        rows = [(i, *row) for i, image in enumerate(indices) for row in self.of[image]]
        place, text, kind, answer, weight = zip(*rows, strict=True)
        return torch.tensor(place), torch.tensor(text), torch.tensor(kind), torch.tensor(answer), torch.tensor(weight)


class Model(nn.Module):
    def __init__(self, clip: LiteTowers, head: LiteHead) -> None:
        super().__init__()
        self.clip = clip
        self.head = head


class AsFiled:
    """Versions of a picture as files bring it: a quarter turn or a negative of a radiograph; smaller, noisy, bordered, compressed."""

    def __init__(self, radiographs: set[Path], seed: int) -> None:
        self.radiographs, self.rng = radiographs, np.random.default_rng(seed)

    def __call__(self, path: Path, pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        for _ in range(VERSIONS):
            x = pixels
            if path in self.radiographs:
                x = np.rot90(x, int(self.rng.choice(4, p=(0.7, 0.1, 0.1, 0.1))))
                x = 255 - x if self.rng.random() < NEGATIVE else x
            yield np.asarray(filed(Image.fromarray(np.ascontiguousarray(x)), self.rng))


def train_vqa(
    data: list[Path],
    clip: Path,
    output: Path,
    settings: Settings,
    rounded_epochs: int = 4,
    films: Sequence[Path] = (),
    photographs: Path | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Trains on the first folder of ``data`` (with captions from all), from the checkpoint ``clip``; writes one to ``output``.
    ``photographs`` are added to what is no radiology; ``films`` are radiology for the branch that tells them apart (train/radiograph.py).

    Loss: cross-entropy over the answers that the question's kind allows, cross-entropy of the kind, and the contrastive loss.
    Derived yes/no questions are weighted so that yes and no weigh the same: their probabilities are for even odds. In the last
    ``rounded_epochs`` the image tower computes with INT8's roundings.
    """
    name = name_of_output(output, name)
    settings.start()
    device, rng = torch.device("cuda" if torch.cuda.is_available() else "cpu"), random.Random(settings.seed)
    plain, meta, _ = towers_from_checkpoint(clip)
    spec, tokenizer = BACKBONES[meta["backbone"]], clip / "tokenizer.json"
    towers = spec.lite(plain)
    locked = towers.lock(LOCKED_STAGES)
    run_slow_convolutions_in_float(towers.visual)
    towers.visual.to(memory_format=torch.channels_last)
    visual = towers.rounded(locked)

    training, validation = questions_for_training(data[:1])
    everything, _ = questions_for_training(data)
    freeform = [q for q in everything if q.image.parent != training[0].image.parent]
    organs = K.organs_from_questions(training)
    vocabulary = Vocabulary(training, sorted(organs))
    derived = K.derived_from_questions(training, organs)

    said = statements_by_image(everything)
    paths = settings.images(sorted({q.image for q in training}, key=lambda p: p.name))
    place = {p: i for i, p in enumerate(paths)}

    # Every text once, through the locked transformer.
    texts: dict[str, int] = {}
    text_kinds: list[int] = []

    def text_id(text: str, kind: str) -> int:
        if text not in texts:
            texts[text] = len(texts)
            text_kinds.append(vocabulary.kind_id[kind])
        return texts[text]

    rows = Rows(len(paths))
    slots: list[list[int]] = [[] for _ in paths]  # the columns that each image speaks for, from memory
    for q in training:
        kind = K.kind_of(q)
        i = text_id(q.question, kind)
        if q.image in place:
            column = vocabulary.column[kind, q.answer]
            if kind in REMEMBERED:
                slots[place[q.image]].append(column)
            if kind != BY_HEART:
                rows.of[place[q.image]].append((i, vocabulary.kind_id[kind], column, 1.0))
    for kind, ways in json.loads((K.PHRASES / "paraphrases.json").read_text(encoding="utf-8")).items():
        for text in ways if kind in vocabulary.kind_id else ():
            text_id(text, kind)
    own = {(q.image, q.question) for q in training}
    facts_of = facts_by_image(training)
    for image, facts in facts_of.items():
        for question, answer, kind, weight in implied_questions(facts):
            if (kind, answer) not in vocabulary.column:
                continue
            i = text_id(question, kind)
            if image in place and (image, question) not in own:
                rows.of[place[image]].append((i, vocabulary.kind_id[kind], vocabulary.column[kind, answer], weight))
    ways_of = {f.name: [text_id(w, f"finding: {f.name}") for w in K.ways_to_ask(f.words)] for f in K.FINDINGS if f.name in organs}
    abnormal = {q.answer for q in training if q.category == "abnormality"} - {"yes", "no"}
    for kind, unanswered in K.questions_without_answer(abnormal, set(organs), freeform, rng).items():
        for text in unanswered:
            text_id(text, kind)
    share = Counter((d.finding, d.answer) for d in derived)
    total = Counter(d.finding for d in derived)
    balance = torch.zeros(len(vocabulary.answers))
    for d in derived:
        if d.image in place:
            weight = FINDING_WEIGHT * total[d.finding] / (2 * share[d.finding, d.answer])
            kind = f"finding: {d.finding}"
            column = vocabulary.column[kind, d.answer]
            rows.of[place[d.image]].append((-1, vocabulary.kind_id[kind], column, weight))
            slots[place[d.image]].append(column)
            balance[column] = math.log(share[d.finding, d.answer])

    towers.eval()
    pooled = pooled_from_text(towers, tokenizer, list(texts))
    pooled_captions = pooled_from_text(towers, tokenizer, [caption(said[p], rng) for p in paths for _ in range(VARIANTS)])
    pooled_captions = pooled_captions.view(len(paths), VARIANTS, -1)
    kind_of_text = torch.tensor(text_kinds)
    texts_of_kind = [torch.nonzero(kind_of_text == k).squeeze(1) for k in range(len(vocabulary.kinds))]
    finding_texts = {vocabulary.kind_id[f"finding: {name}"]: torch.tensor(ids) for name, ids in ways_of.items()}

    images = Images(paths, spec.preprocess, AsFiled({p for p, facts in facts_of.items() if facts.family == "xr"}, settings.seed))
    given = photographs_from_folder(photographs)
    others = [with_margin(x, spec.preprocess) for x in nonradiographs(OTHERS, settings.seed + 1, given[0])]
    head = LiteHead(spec.embed_dim, len(vocabulary.answers), vocabulary.trained, len(vocabulary.kinds), HIDDEN)
    model, allowed = Model(towers, head).to(device), vocabulary.allowed[:, : vocabulary.trained].to(device)
    averaged, pooled, pooled_captions = Averaged(model), pooled.to(device), pooled_captions.to(device)

    def loss_of(indices: Tensor, generator: Generator, epoch: int) -> Tensor:
        model.train()
        visual.on = epoch >= settings.epochs - rounded_epochs
        for module in locked:
            module.eval()
        strange = torch.randint(len(others), (len(indices) // OTHERS_SHARE,), generator=generator)
        unlike = torch.stack([others[i].expand(3, -1, -1) for i in strange])
        shown = torch.cat([images.augmented(indices, generator), radiology_augmented(unlike, spec.preprocess, generator)])
        with autocast(device, True):
            every = visual(shown.to(device, memory_format=torch.channels_last))
        every, embedding = every.float(), every[: len(indices)].float()
        of_radiology = head.radiograph(unit(every)).squeeze(-1)
        told_apart = F.softplus(-of_radiology[: len(indices)]).mean() + F.softplus(of_radiology[len(indices) :]).mean()
        where, text, kind, answer, weight = rows.batch(indices.tolist())
        for k, ids in finding_texts.items():  # a derived question is put in another way each time
            asked = (text < 0) & (kind == k)
            text[asked] = ids[torch.randint(len(ids), (int(asked.sum()),), generator=generator)]
        where, text, kind, answer, weight = (x.to(device) for x in (where, text, kind, answer, weight))
        logits = head.trained(embedding[where], towers.projected_text(pooled[text]))
        logits = logits.masked_fill(~allowed[kind], -1e4)
        answers = F.cross_entropy(logits, answer, reduction="none")
        asked_kinds = torch.randint(len(texts_of_kind), (96,), generator=generator).tolist()
        drawn = torch.stack([texts_of_kind[k][torch.randint(len(texts_of_kind[k]), (), generator=generator)] for k in asked_kinds])
        kind_loss = F.cross_entropy(head.kind(unit(towers.projected_text(pooled[drawn]))), kind_of_text[drawn].to(device))
        chosen = torch.randint(VARIANTS, (len(paths),), generator=generator)
        told = towers.projected_text(pooled_captions[torch.arange(len(paths)), chosen])
        pairs = loss_among_all(embedding, told, indices.to(device), towers.logit_scale.clamp(max=4.6052).exp())
        of_answers = (answers * weight).sum() / len(indices)
        return of_answers + kind_loss + CONTRASTIVE_WEIGHT * pairs + RADIOGRAPH_WEIGHT * told_apart

    fresh = [p for p in head.parameters()]
    output.mkdir(parents=True, exist_ok=True)
    made_with = {
        "backbone": spec.name,
        **settings.to_json(),
        "rounded_epochs": rounded_epochs,
        "data_sha256": sha256_of_questions(everything),
        "phrases_sha256": hashlib.sha256(b"".join(p.read_bytes() for p in sorted(K.PHRASES.iterdir()))).hexdigest(),
        "clip_sha256": sha256_of_file(clip / "model.safetensors"),
        "photographs_sha256": given[1],
        "images": len(paths),
    }
    rate = settings.learning_rate
    seconds = fit(
        "train vqa",
        averaged,
        loss_of,
        len(paths),
        [(fresh, 4 * rate), (towers.projections(), rate), (towers.trunk(), rate)],
        settings,
        made_with,
        output / "state.pt",
        lambda order, epoch: averaged.following(order, epoch * len(order)),
    )
    averaged.settle()
    model.eval().cpu()
    visual.on = False
    widest = max(map(len, slots))
    padded = torch.tensor([row + [len(vocabulary.answers)] * (widest - len(row)) for row in slots])
    with mixed_precision():
        seen = seen_from_images(towers, images)
    head.remember(seen, padded, balance)
    head.leave_to_memory([i for (kind, _), i in vocabulary.column.items() if kind.startswith("finding: ")])
    of_films, _ = radiograph.pictures_of_films(films)
    fitted = radiograph.train_radiograph(towers, head, spec.preprocess, [paths, *of_films], given, settings.seed)

    held = sorted({q.image for q in validation})
    closed = derived_as_questions(validation, organs)
    scored = scored_from_questions(model, tokenizer, vocabulary, validation, closed, Images(held, spec.preprocess))
    kinds, abstention, metrics = calibrated(scored, vocabulary, settings.seed)
    meta = {
        "name": name,
        **{k: meta[k] for k in ("version", "backbone")},
        "logit_scale": round(towers.logit_scale.detach().clamp(max=4.6052).exp().item(), 4),
        "answers": vocabulary.answers,
        "kinds": kinds,
        "abstention": abstention,
        "metrics": {**meta["metrics"], **metrics},
        "provenance": {
            **meta["provenance"],
            "vqa": {**made_with, "data": [p.name for p in data], "seconds": round(seconds), "threads": torch.get_num_threads()},
            "radiograph": radiograph.provenance([*data[:1], *films], settings.seed, fitted),
        },
    }
    write_tensors(output, model.state_dict(), meta, tokenizer)
    return meta


def derived_as_questions(questions: list[Question], organs: dict[str, set[str]]) -> list[tuple[Question, str]]:
    """(closed question, organ) for evaluation; the way of asking goes round, so that every way is measured."""
    words = {f.name: K.ways_to_ask(f.words) for f in K.FINDINGS}
    out, turn = [], Counter[str]()
    for d in K.derived_from_questions(questions, organs):
        ways = words[d.finding]
        out.append((Question(d.image, ways[turn[d.finding] * 7 % len(ways)], d.answer, f"finding: {d.finding}", True), d.organ))
        turn[d.finding] += 1
    return out


@torch.no_grad()
def seen_from_images(clip: LiteTowers, images: Images) -> Tensor:
    """(N, D + E) f32: all that the head sees of each image."""
    return torch.cat([clip.features_for_head(images.clean(i)).float() for i in torch.arange(len(images)).split(32)])


@torch.no_grad()
def scored_from_questions(
    model: Model,
    tokenizer: Path,
    vocabulary: Vocabulary,
    asked: list[Question],
    derived: list[tuple[Question, str]],
    images: Images,
) -> Scored:
    """What the model says to every validation question, kept as raw logits."""
    place = {p: i for i, p in enumerate(images.paths)}
    seen = seen_from_images(model.clip, images)
    questions = asked + [q for q, _ in derived]
    unique = {q.question: None for q in questions}
    text = model.clip.projected_text(pooled_from_text(model.clip, tokenizer, list(unique)))
    at = {t: i for i, t in enumerate(unique)}
    image_rows, text_rows = torch.tensor([place[q.image] for q in questions]), torch.tensor([at[q.question] for q in questions])
    answer, kind, _ = model.head(seen[image_rows], text[text_rows])
    return Scored(
        image=image_rows.numpy(),
        category=np.array([q.category for q in questions]),
        question=np.array([q.question for q in questions]),
        truth=np.array([q.answer for q in questions]),
        organ=np.array([""] * len(asked) + [o for _, o in derived]),
        answer=answer.numpy(),
        kind=kind.numpy(),
        radiograph=model.head(seen, text[:1].expand(len(seen), -1))[2].numpy(),
    )
