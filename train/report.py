"""`train report`: what a dataset holds, how its answers are spread, and what its splits share."""

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pmclip_deploy.errors import InputError
from pmclip_deploy.train.datasets import Pair, Question, image_key, images_there, is_there, layout_of, normalised
from pmclip_deploy.train.datasets.pictures import Place
from pmclip_deploy.train.datasets.schema import Row
from pmclip_deploy.train.splits import image_disjoint_split, shared_pictures
from pmclip_deploy.train.vocabulary import AnswerVocabulary, vocabulary_as_mevf, vocabulary_as_qcr

SCHEMA = "pmclip-deploy/report/1"
TOP = 5


def report_from_folder(folder: Path, seed: int | None = None) -> dict[str, Any]:
    """The document of schema pmclip-deploy/report/1; with ``seed``, of the image-disjoint split that it draws too. Raises InputError.

    Shares lie in 0..1; what could not be measured, for want of images, is None.
    """
    skipped = Counter[str]()
    layout = layout_of(folder, skipped)
    splits: dict[str, list[Any]] = {name: rows for name in layout.splits(folder) if (rows := layout.read(folder, name))}
    if not splits:
        raise InputError(f"{folder}: this {layout.name} holds no rows")
    of_questions = isinstance(next(iter(splits.values()))[0], Question)
    if seed is not None and not of_questions:
        raise InputError(f"{folder}: --seed splits questions by their images, and this {layout.name} holds captions", "leave --seed out")
    about, compared = (_about_questions, _compared_questions) if of_questions else (_about_pairs, _compared_pairs)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "folder": str(folder),
        "dataset": layout.name,
        "holds": "questions" if of_questions else "captions",
        "skipped": dict(+skipped),
        "splits": {name: about(rows) for name, rows in splits.items()},
        "between": [compared(splits, a, b) for a, b in _ordered_pairs(tuple(splits))],
    }
    if seed is not None:
        training, held_out = image_disjoint_split([q for rows in splits.values() for q in rows], seed)
        parts: dict[str, list[Any]] = {"train": training, "held out": held_out}
        document["image_disjoint"] = {
            "seed": seed,
            "by_picture": not images_there([q for rows in splits.values() for q in rows])[1],
            "splits": {name: about(rows) for name, rows in parts.items()},
            "between": [compared(parts, "train", "held out")],
        }
    return document


def _ordered_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


def _about_images(rows: Sequence[Row]) -> dict[str, Any]:
    counts = Counter(row.image for row in rows)
    missing = images_there(rows)[1]
    return {"images": len(counts), "images_missing": missing, "per_image": _spread(counts.values())}


def _spread(values: Iterable[int]) -> dict[str, float]:
    some = sorted(values)
    return {"min": some[0], "median": statistics.median(some), "max": some[-1], "mean": round(statistics.fmean(some), 2)}


def _about_questions(rows: Sequence[Question]) -> dict[str, Any]:
    """Figures of one split; answers as they are compared, in lower case and without a closing full stop."""
    vocabulary = vocabulary_as_qcr(rows)
    return {
        "questions": len(rows),
        **_about_images(rows),
        "closed": sum(q.closed for q in rows),
        "open": sum(not q.closed for q in rows),
        "category": dict(Counter(q.category for q in rows).most_common()),
        "answers": {kind: _balance([q.answer for q in some]) for kind, some in _by_kind(rows).items()},
        "vocabulary": {
            "mevf": len(vocabulary_as_mevf(rows).answers),
            "qcr_closed": vocabulary.closed,
            "qcr_open": len(vocabulary.answers) - (vocabulary.closed or 0),
        },
    }


def _by_kind(rows: Sequence[Question]) -> dict[str, list[Question]]:
    return {"all": list(rows), "open": [q for q in rows if not q.closed], "closed": [q for q in rows if q.closed]}


def _balance(answers: Sequence[str]) -> dict[str, Any] | None:
    """The majority's share is the accuracy of one answer to everything; the entropy is in bits."""
    if not answers:
        return None
    counts = Counter(answers)
    shares = [n / len(answers) for n in counts.values()]
    return {
        "distinct": len(counts),
        "top": [{"answer": answer, "count": n} for answer, n in counts.most_common(TOP)],
        "majority_share": round(max(shares), 4),
        "entropy": round(abs(sum(p * math.log2(p) for p in shares)), 3),
    }


def _compared_questions(splits: dict[str, list[Question]], first: str, second: str) -> dict[str, Any]:
    """What ``second`` shares with ``first``, and the accuracy that a model can reach at most which knows only ``first``'s answers."""
    a, b = splits[first], splits[second]
    return {
        "of": second,
        "in": first,
        **_shared_images([q.image for q in a], [q.image for q in b]),
        "questions": _share((q.question for q in b), (q.question for q in a)),
        "questions_about_the_same_image": _share(
            ((image_key(q.image), q.question) for q in b), ((image_key(q.image), q.question) for q in a)
        ),
        "answers_known": {"mevf": _known(vocabulary_as_mevf(a), b), "qcr": _known(vocabulary_as_qcr(a), b)},
    }


def _known(vocabulary: AnswerVocabulary, rows: Sequence[Question]) -> dict[str, float | None]:
    return {
        kind: round(statistics.fmean(vocabulary.label(q) >= 0 for q in some), 4) if some else None for kind, some in _by_kind(rows).items()
    }


def _shared_images(a: Sequence[Place], b: Sequence[Place]) -> dict[str, Any]:
    names, others = {image_key(image): image for image in a}, {image_key(image): image for image in b}
    there = all(any(is_there(image) for image in side.values()) for side in (names, others))
    seen = shared_pictures(set(others.values()), set(names.values())) if there else None
    return {
        "images": len(others),
        "images_by_name": len(names.keys() & others.keys()),
        "images_by_picture": None if seen is None else len(seen),
    }


def _share(of: Iterable[Hashable], known: Iterable[Hashable]) -> float:
    there = set(known)
    return round(statistics.fmean(item in there for item in of), 4)


def _about_pairs(rows: Sequence[Pair]) -> dict[str, Any]:
    counts = Counter(normalised(pair.caption) for pair in rows)
    return {
        "captions": len(rows),
        **_about_images(rows),
        "distinct": len(counts),
        "words": _spread(len(pair.caption.split()) for pair in rows),
    }


def _compared_pairs(splits: dict[str, list[Pair]], first: str, second: str) -> dict[str, Any]:
    a, b = splits[first], splits[second]
    captions = _share((normalised(pair.caption) for pair in b), (normalised(pair.caption) for pair in a))
    return {"of": second, "in": first, **_shared_images([p.image for p in a], [p.image for p in b]), "captions": captions}
