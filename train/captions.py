"""Captions for contrastive training, made from the questions and answers about an image."""

import random
import re
from collections import defaultdict
from pathlib import Path

from pmclip_deploy.train.datasets import Question

# "is this a t2 weighted image?" yes -> "t2 weighted image"; no -> "not t2 weighted image"
CLOSED = re.compile(r"^(is|are|was|were|does|do|did|has|have|can)\b\s*(this|there|the)?\s*(an?|the|any)?\s*")


def statement(question: str, answer: str) -> str:
    """What question and answer say together: the answer itself, or for yes and no the question as a phrase."""
    if answer not in ("yes", "no"):
        return answer
    phrase = CLOSED.sub("", question.rstrip("?").strip())
    return phrase if answer == "yes" else f"not {phrase}"


def statements_by_image(questions: list[Question]) -> dict[Path, list[str]]:
    said: dict[Path, list[str]] = defaultdict(list)
    for q in questions:
        if (text := statement(q.question, q.answer)) not in said[q.image]:
            said[q.image].append(text)
    return dict(said)


def caption(statements: list[str], rng: random.Random, most: int = 6) -> str:
    """One caption out of many: a random order of at most ``most`` statements."""
    return ", ".join(rng.sample(statements, min(most, len(statements))))
