"""What the trained model says to the questions about validation images, to calibrate it by."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from pmclip_deploy.train import kinds as K
from pmclip_deploy.train.clip.embeddings import pooled_from_text
from pmclip_deploy.train.datasets import Question
from pmclip_deploy.train.images import Images
from pmclip_deploy.train.lite.calibration import Scored
from pmclip_deploy.train.lite.model import Model, seen_from_images


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
def scored_from_questions(
    model: Model,
    tokenizer: Path,
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
