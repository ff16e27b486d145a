"""How many answers change though what is seen does not."""

import io
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image

from pmclip_deploy.benchmarks import trust_pictures
from pmclip_deploy.benchmarks.trust_answers import agree, best, family, word
from pmclip_deploy.benchmarks.trust_bench import (
    FRACATLAS,
    FRACTURE,
    MANY,
    MODALITY,
    ORGAN,
    PLANE,
    SETS,
    VQA_MED,
    Bench,
    Change,
    Film,
    Found,
    Said,
    bools,
)
from pmclip_deploy.evaluation.rows import normalised


def _scaled(picture: Image.Image, share: float) -> Image.Image:
    return picture.resize((max(1, round(picture.width * share)), max(1, round(picture.height * share))), Image.Resampling.BICUBIC)


def _bordered(picture: Image.Image, share: float) -> Image.Image:
    """``share`` of the side, black, on every side."""
    return trust_pictures.bordered(picture, 2 * share / (1 + 2 * share))


def _cropped(picture: Image.Image, share: float) -> Image.Image:
    """Without ``share`` of the side on every side."""
    x, y = round(picture.width * share), round(picture.height * share)
    return picture.crop((x, y, picture.width - x, picture.height - y))


def _jpeg(picture: Image.Image, quality: int) -> Image.Image:
    picture.save(packed := io.BytesIO(), "JPEG", quality=quality)
    return Image.open(packed).convert(picture.mode)


TURN = "turned by 90 degrees"
CHANGES: dict[str, Change] = {
    "black border of 25%": lambda p: _bordered(p, 0.25),
    "black border of 60%": lambda p: _bordered(p, 0.60),
    TURN: lambda p: p.transpose(Image.Transpose.ROTATE_90),  # radiographs alone
    "half size": lambda p: _scaled(p, 0.5),
    "crop of 10%": lambda p: _cropped(p, 0.10),
    "JPEG quality 50": lambda p: _jpeg(p, 50),
}


def robustness(bench: Bench) -> Iterator[Found]:
    """(h) How many answers change though what is seen does not."""
    open_questions = {"modality family": MODALITY, "modality in detail": MODALITY, "plane": PLANE, "organ": ORGAN}
    if bench.has(VQA_MED):
        films, said = bench.val
        truth = {
            "modality family": [f.facts["family"] for f in films],
            **{kind: [f.facts.get(kind.partition(" ")[0]) for f in films] for kind in ("modality in detail", "plane", "organ")},
        }
        yield from _changes(bench, SETS[VQA_MED], films, said, open_questions, truth)
    if bench.has(FRACATLAS):
        films = [f for value in (1, 0) for f in bench.drawn([f for f in bench.fracatlas[0] if f.facts["fractured"] == value], MANY // 3)]
        questions = {**open_questions, "fracture": FRACTURE}
        yes = ["yes" if f.facts["fractured"] else "no" for f in films]
        unknown: list[str | None] = [None] * len(films)
        truths: dict[str, Sequence[str | None]] = dict.fromkeys(questions, unknown)
        truths |= {"modality family": ["xr"] * len(films), "fracture": yes}
        yield from _changes(bench, SETS[FRACATLAS], films, bench.said(films, tuple(questions.values())), questions, truths)


def _changes(
    bench: Bench, pictures: str, films: list[Film], before: Said, questions: Mapping[str, str], truth: Mapping[str, Sequence[str | None]]
) -> Iterator[Found]:
    for name, change in CHANGES.items():
        kept = [i for i, f in enumerate(films) if name != TURN or f.set != VQA_MED or f.facts["family"] == "xr"]
        after, over = bench.said([films[i] for i in kept], tuple(questions.values()), change), bench.over([films[i] for i in kept])
        for kind, question in questions.items():
            mine = (lambda a: family(a)) if kind == "modality family" else (lambda a: a)
            pairs = [(before[i][question], now[question]) for i, now in zip(kept, after, strict=True)]
            was, now = ([mine(word(a)) for a in side] for side in zip(*pairs, strict=True)) if pairs else ([], [])
            known = [None if truth[kind][i] is None else normalised(str(truth[kind][i])) for i in kept]
            labelled, given = bools(known), bools(was)
            figures = {"another answer, of given": over.share((a != b and b for a, b in zip(was, now, strict=True)), given)}
            if kind != "modality family":  # another family always contradicts
                figures |= {"... that contradicts it": over.share((not agree(a, b) for a, b in pairs), given)}
            figures |= {"no answer any more, of given": over.share((b is None for b in now), given)}
            for when, side in (("before", 0), ("after", 1)):
                hits = [mine(best(pair[side])) == t for pair, t in zip(pairs, known, strict=True)]
                figures |= {f"accuracy {when}": over.share(hits, labelled)} if labelled.any() else {}
            yield Found(f"{name}: {kind}", pictures, figures)
