"""What the trust benchmark measures, but for robustness: findings, whether they fit together, what the header says, what is turned away."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import Answer
from pmclip_deploy.benchmarks import trust_pictures
from pmclip_deploy.benchmarks.trust_answers import contradicts, has_family, is_right, probability, tells, turned_away, word
from pmclip_deploy.benchmarks.trust_bench import (
    ABNORMAL,
    CHEST_IMAGE,
    CHEST_XRAY,
    CLAIMS,
    DICOM,
    DISPLACED,
    FRACATLAS,
    FRACTURE,
    HIP,
    INTACT,
    KERMANY,
    MODALITY,
    NO_FRACTURE,
    NORMAL,
    ORGAN,
    PNEUMONIA,
    RIB,
    SETS,
    SLAKE,
    VQA_MED,
    WEIGHTING,
    XRAY,
    Bench,
    Bools,
    Figure,
    Film,
    Found,
    Over,
    Said,
    bools,
    kind_of_row,
    out_of_fold,
    ranking,
)
from pmclip_deploy.console import progress
from pmclip_deploy.errors import InputError
from pmclip_deploy.evaluation.statistics import calibration_error
from pmclip_deploy.predictor import Predictor

REGIONS = ("hand", "leg", "hip", "shoulder")
WEAK = 0.5
FINER = {"t1": ("t1",), "t2": ("t2", "flair")}  # FLAIR is T2-weighted, with the fluid's signal nulled
COMMON = ("xr", "ct", "mr", "us")  # families that may hardly be turned away; angiograms, barium studies and mammograms are rare


def findings(bench: Bench) -> Iterator[Found]:
    """(a) Does yes mean anything? Beside what the picture's size and the region alone would tell."""
    if bench.has(FRACATLAS):
        films, said = bench.fracatlas
        truth = bools(f.facts["fractured"] for f in films)
        score = bench.scores(films, said, FRACTURE, "fracture")
        tags = _baseline(bench, bench.all_fracatlas, lambda f: tuple(f.facts[r] for r in REGIONS), "fractured", 1)
        size = _baseline(bench, bench.all_fracatlas, _size, "fractured", 1)
        for region in ("", *REGIONS):
            rows = bools(not region or f.facts[region] for f in films)
            yield Found(FRACTURE, f"FracAtlas, {region or 'all'}", {
                **closed(bench.over(films), [s[FRACTURE] for s in said], score, truth, rows),
                "AUROC of picture size alone": bench.over(films).auroc([size[f.path] for f in films], truth, rows),
                **({} if region else {"AUROC of region tags alone": bench.over(films).auroc([tags[f.path] for f in films], truth)}),
            })  # fmt: skip
    if bench.has(KERMANY):
        films, said = bench.kermany
        truth, every = bools(f.facts["finding"] == "pneumonia" for f in films), np.ones(len(films), bool)
        size = _baseline(bench, bench._labelled(KERMANY), _size, "finding", "pneumonia")
        yield Found(PNEUMONIA, "Kermany", {
            **closed(bench.over(films), [s[PNEUMONIA] for s in said], bench.scores(films, said, PNEUMONIA, "pneumonia"), truth, every),
            "AUROC of picture size alone": bench.over(films).auroc([size[f.path] for f in films], truth),
        })  # fmt: skip


def closed(over: Over, answers: Sequence[Answer], score: Sequence[float], truth: Bools, rows: Bools) -> dict[str, Figure]:
    """A finding's figures; ``truth``, (N,) bool, says where it is."""
    words = np.array([word(a) or "" for a in answers])
    yes, no = words == "yes", words == "no"
    more = truth[rows].mean() >= 0.5 if rows.any() else False
    return {
        **ranking(over, score, truth, rows),
        "yes where it is": over.share(yes, rows & truth),
        "yes where it is not": over.share(yes, rows & ~truth),
        "answered": over.share(words != "", rows),
        "right of yes": over.share(truth, rows & yes),
        "right of no": over.share(~truth, rows & no),
        "right of the majority answer": over.share(truth == more, rows),
    }


def _size(film: Film) -> object:
    return tuple(side // 64 for side in film.facts["size"])


def _baseline(bench: Bench, films: Sequence[Film], key: Callable[[Film], object], fact: str, value: object) -> dict[Path, float]:
    truth = bools(f.facts[fact] == value for f in films)
    scores = out_of_fold([key(f) for f in films], truth, [f.group for f in films], bench.seed)
    return dict(zip((f.path for f in films), scores, strict=True))


def normality(bench: Bench) -> Iterator[Found]:
    """(b) "Normal" of what is known not to be."""
    cases = list[tuple[str, list[Film], Said]]()
    if bench.has(VQA_MED):
        cases.append(("VQA-Med 2019 val, a named abnormality", *_where(bench.val, lambda f: f.facts["named"])))
        cases.append(
            (
                "VQA-Med 2019 val, x-rays with a named abnormality",
                *_where(bench.val, lambda f: f.facts["named"] and f.facts["family"] == "xr"),
            )
        )
    if bench.has(FRACATLAS):
        cases.append(("FracAtlas, fractured", *_where(bench.fracatlas, lambda f: f.facts["fractured"])))
    if bench.has(KERMANY):
        cases.append(("Kermany, pneumonia", *_where(bench.kermany, lambda f: f.facts["finding"] == "pneumonia")))
    for pictures, films, said in cases:
        over = bench.over(films)
        for question, wrong in ((NORMAL, "yes"), (ABNORMAL, "no")):
            words = [word(s[question]) for s in said]
            given = bools(words)
            yield Found(question, pictures, {
                "answered": over.share(given),
                'wrong "normal" among given': over.share((w == wrong for w in words), given),
            })  # fmt: skip


def _where(of: tuple[list[Film], Said], keep: Callable[[Film], object]) -> tuple[list[Film], Said]:
    kept = [(film, said) for film, said in zip(*of, strict=True) if keep(film)]
    return [film for film, _ in kept], [said for _, said in kept]


def consistency(bench: Bench) -> Iterator[Found]:
    """(c) Negation, qualifiers and sites beside the plain question; which answers cannot stand side by side."""
    if not bench.has(FRACATLAS):
        return
    for question in (INTACT, NO_FRACTURE, DISPLACED, RIB, HIP, NORMAL):
        films, said = _where(bench.fracatlas, lambda f: not f.facts["hip"]) if question == HIP else bench.fracatlas
        over, plain, other = bench.over(films), [word(s[FRACTURE]) for s in said], [word(s[question]) for s in said]
        given, both = bools(other), bools(plain) & bools(other)
        same = bools(a == b for a, b in zip(plain, other, strict=True))
        figures = {"answered": over.share(given), "same word as to the plain question, of both answered": over.share(same, both)}
        if question in (INTACT, NO_FRACTURE, NORMAL):
            truth = bools(not f.facts["fractured"] for f in films)
            figures |= {
                "yes to both, of both answered": over.share(same & bools(w == "yes" for w in plain), both),
                "right of answered": over.share((w == ("yes" if t else "no") for w, t in zip(other, truth, strict=True)), given),
            }
        yield Found(question, "FracAtlas without hips" if question == HIP else "FracAtlas, all", figures)


def body_part(bench: Bench) -> Iterator[Found]:
    """(d) A body part that a closed question names is heard."""
    cases = list[tuple[str, list[Film], Said, bool]]()
    if bench.has(FRACATLAS):
        cases.append(("FracAtlas, hands", *_where(bench.fracatlas, lambda f: f.facts["hand"]), False))
    if bench.has(KERMANY):
        cases.append(("Kermany, chests", *bench.kermany, True))
    for pictures, films, said, is_chest in cases:
        for question in (XRAY, CHEST_XRAY, CHEST_IMAGE):
            words, truth = [word(s[question]) for s in said], "yes" if is_chest or question == XRAY else "no"
            over, given = bench.over(films), bools(words)
            yield Found(question, pictures, {
                "answered": over.share(given),
                "yes": over.share((w == "yes" for w in words), given),
                "right": over.share((w == truth for w in words), given),
            })  # fmt: skip


def header(bench: Bench) -> Iterator[Found]:
    """(e) DICOM files whose header names a modality: answers that contradict it, told or untold."""
    import pydicom

    wheel = sorted(path for path in (Path(pydicom.__file__).parent / "data").rglob("*") if path.suffix in (".dcm", "") and path.is_file())
    read = [(name, a) for name, paths in (("pydicom's wheel", wheel), ("DATA/dicom", sorted((bench.data / DICOM).glob("*.dcm"))))
            for film in progress(bench.drawn([Film(path, DICOM, path.name) for path in paths]), name)
            if (a := _readable(bench.predictors[0], film.path)) is not None]  # fmt: skip
    over = Over([str(i) for i in range(len(read))], bench.seed)
    known, given = bools(has_family(a.image.modality) for _, a in read), bools(a.answer for _, a in read)
    against, told = bools(contradicts(a.image.modality, a) for _, a in read), bools(tells(a) for _, a in read)
    for source in dict.fromkeys(["all", *(name for name, _ in read)]):
        rows = bools(source in ("all", name) for name, _ in read)
        yield Found(MODALITY, f"DICOM files, {source}", {
            "of the files read, header names a modality": over.share(known, rows),
            "answered, of these": over.share(given, rows & known),
            "contradict the header, of answered": over.share(against, rows & known & given),
            "... and nothing says so": over.share(against & ~told, rows & known & given),
        })  # fmt: skip


def _readable(predictor: Predictor, path: Path) -> Answer | None:
    try:
        return predictor.ask(path, MODALITY)
    except InputError:
        return None


def weak(bench: Bench) -> Iterator[Found]:
    """(f) Given answers with less than even odds, and (i) how far confidence is from accuracy, kind by kind."""
    rows = list[tuple[str, str, Answer, bool]]()  # group, kind, answer, whether its best candidate is right
    if bench.has(VQA_MED):
        films, said = bench.val
        for film, of in zip(films, said, strict=True):
            for r in film.facts["rows"]:
                kind = kind_of_row(r)
                rows.append((film.group, kind, a := of[r["question"]], is_right(a, r["answer"])))
    cases = [(SETS[VQA_MED], kind, [r for r in rows if r[1] == kind]) for kind in sorted({r[1] for r in rows})]
    cases += [(SETS[VQA_MED], "all kinds", rows)] if rows else []
    if bench.has(SLAKE):
        pairs = list(zip(*bench.slake, strict=True))
        claims = [
            (f.group, "", s[question], is_right(s[question], "yes" if f.facts[fact] == value else "no"))
            for f, s in pairs
            for question, (fact, value) in CLAIMS.items()
            if f.facts[fact]
        ]
        cases.append((SETS[SLAKE], "modality yes/no", claims))
        weighted = [(f.group, s[WEIGHTING], FINER[f.facts["weighting"]]) for f, s in pairs if f.facts["weighting"]]
        cases.append((SETS[SLAKE], "weighting", [(group, "", a, any(is_right(a, t) for t in truth)) for group, a, truth in weighted]))
    for name, question, positive in ((FRACATLAS, FRACTURE, "fractured"), (KERMANY, PNEUMONIA, "pneumonia")):
        if bench.has(name):
            films, said = bench.fracatlas if name == FRACATLAS else bench.kermany
            truth = ["yes" if f.facts.get(positive) or f.facts.get("finding") == positive else "no" for f in films]
            found = [(f.group, question, s[question], is_right(s[question], t)) for f, s, t in zip(films, said, truth, strict=True)]
            cases.append((f"{SETS[name]}, even odds", question, found))
    for pictures, kind, found in cases:
        over, p = Over([g for g, *_ in found], bench.seed), np.array([probability(a) for *_, a, _ in found])
        right, given, offered = bools(r for *_, r in found), bools(a.answer for *_, a, _ in found), np.isfinite(p)
        few = given & offered & (p < WEAK)
        yield Found(kind, pictures, {
            "answered": over.share(given),
            "right of answered": over.share(right, given),
            f"under {WEAK}, of answered": over.share(few, given),
            "... right of these": over.share(right, few),
            "ECE": _ece(p, right, offered),
            "ECE of answered": _ece(p, right, offered & given),
            "... by chance alone": _ece_by_chance(p, offered & given, bench.seed),
        })  # fmt: skip


def _ece(p: NDArray[np.float64], right: Bools, rows: Bools) -> Figure:
    return {"value": calibration_error(p[rows], right[rows]), "n": int(rows.sum())}


def _ece_by_chance(p: NDArray[np.float64], rows: Bools, seed: int, draws: int = 200) -> Figure:
    """What the ECE of these confidences would be, on the average, if each were exactly the probability that its answer is right."""
    rng, chosen = np.random.default_rng(seed), p[rows]
    errors = (calibration_error(chosen, rng.random(len(chosen)) < chosen) for _ in range(draws))
    drawn = [error for error in errors if error is not None]
    return {"value": float(np.mean(drawn)) if drawn else None, "n": len(chosen)}


def no_radiology(bench: Bench) -> Iterator[Found]:
    """(g) Pictures that are none are turned away, and radiology images are not."""
    questions = (FRACTURE, MODALITY, ORGAN)
    bases, missing = trust_pictures.bases(bench.pictures, bench.seed)
    if bench.limit is not None:
        bases = bases[:: max(1, len(bases) // bench.limit)]
    rows = list[tuple[trust_pictures.Base, str, list[Answer]]]()
    for base in progress(bases, "no radiology"):
        for variant, pixels in trust_pictures.variants(base, bench.seed):
            rows.append((base, variant, bench.predictors[0].ask_many(pixels, questions)))
    over = Over([f"{base.kind} {base.name}" for base, *_ in rows], bench.seed)
    away = bools(all(a.answer is None for a in answers) for *_, answers in rows)
    told = bools(any(map(turned_away, answers)) for *_, answers in rows)

    def found(pictures: str, taken: Bools) -> Found:
        each = {f'"{q}" not answered': bools(answers[i].answer is None for *_, answers in rows) for i, q in enumerate(questions)}
        figures = {"no question answered": away, "said to be no radiology image": told, **each}
        return Found("turned away", pictures, {name: over.share(hits, taken) for name, hits in figures.items()})

    yield found("all", np.ones(len(rows), bool))
    for variant in trust_pictures.VARIANTS:
        yield found(variant, bools(v == variant for _, v, _ in rows))
    for kind in sorted({base.kind for base in bases}):
        yield found(kind, bools(base.kind == kind for base, *_ in rows))
    for source, what in missing.items():
        yield Found("turned away", source, {}, f"not there; {what}")


def radiology(bench: Bench) -> Iterator[Found]:
    """(g) Radiology images that are turned away, by what they are."""
    sets: dict[str, Callable[[], tuple[list[Film], Said]]] = {
        VQA_MED: lambda: bench.val,
        SLAKE: lambda: bench.slake,
        FRACATLAS: lambda: bench.fracatlas,
        KERMANY: lambda: bench.kermany,
    }
    all_films, all_said = list[Film](), list[Mapping[str, Answer]]()
    for name, of in sets.items():
        if bench.has(name):
            films, said = of()
            all_films, all_said = all_films + films, [*all_said, *said]
    if not all_films:
        return
    away = bools(turned_away(s[MODALITY]) for s in all_said)
    over, families = bench.over(all_films), ["xr" if f.set in (FRACATLAS, KERMANY) else f.facts["family"] for f in all_films]
    for name in [name for name in sets if bench.has(name)]:
        rows = bools(f.set == name for f in all_films)
        yield Found("turned away", SETS[name], {"turned away": over.share(away, rows)})
        common = rows & bools(f in COMMON for f in families)
        yield Found("turned away", f"{SETS[name]}, XR, CT, MR and US", {"turned away": over.share(away, common)})
    for one in COMMON:
        yield Found("turned away", f"all sets, {one.upper()}", {"turned away": over.share(away, [f == one for f in families])})
    yield Found("turned away", "all sets", {"turned away": over.share(away)})
