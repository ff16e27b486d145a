"""Open questions about the picture itself: modality, plane, organ, contrast, weighting, side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pmclip_deploy.answer import Candidate
from pmclip_deploy.decision.evidence import DETAIL, NO_SIDE, NOT_SURE, WEAKEST, Evidence, Reply, ranked, renormalised, summed
from pmclip_deploy.header.read import Header, header_value
from pmclip_deploy.vocabulary import FAMILIES, PROJECTIONS, REGIONS, family_of_answer, view_of_answer


def _modality(evidence: Evidence, threshold: float) -> Reply:
    candidates = evidence.opinions.get("modality", ())
    if said := header_value(evidence.header, "modality"):
        within = renormalised(c for c in candidates if family_of_answer(c.answer) == evidence.header.family)
        contrast = header_value(evidence.header, "contrast")
        return Reply(f"{said}, {contrast}" if contrast else said, source="header", candidates=within, note=_detail(said, within))
    given = modality_from_candidates(candidates, threshold)
    return Reply(*given, candidates=candidates) if given else _unsure(candidates)


def modality_from_candidates(candidates: Sequence[Candidate], threshold: float, detail: float = DETAIL) -> tuple[str, float] | None:
    """(the likeliest modality where it is sure, else its family where that is, its probability); the likeliest candidate comes first."""
    if not candidates:
        return None
    best, families = candidates[0], summed(candidates, family_of_answer)
    own = family_of_answer(best.answer)
    several = own is not None and sum(family_of_answer(c.answer) == own for c in candidates) > 1
    if best.probability >= max(threshold, detail if several else WEAKEST):
        return best.answer, best.probability
    family, share = next(iter(families.items()), ("", 0.0))
    if share >= max(WEAKEST, threshold):
        return f"{FAMILIES[family].label}, detail not determined", share
    return None


def _detail(said: str, within: Sequence[Candidate]) -> str | None:
    if len(within) < 2 or not within[0].probability >= WEAKEST:
        return None
    return f"within {said}, the picture looks most like {within[0].answer} ({within[0].probability:.0%})"


def _plane(evidence: Evidence, threshold: float) -> Reply:
    candidates = evidence.opinions.get("plane", ())
    if said := header_value(evidence.header, "projection") or header_value(evidence.header, "plane"):
        return Reply(said, source="header", candidates=candidates)
    if sure := _sure(candidates, threshold):
        return sure
    views = summed(candidates, view_of_answer)
    view, share = next(iter(views.items()), (("", ""), 0.0))
    if share >= max(WEAKEST, threshold):
        return Reply(view[1], share, candidates=candidates)
    frontal = sum(share for (_, name), share in views.items() if name in FRONTAL)
    if frontal >= max(WEAKEST, threshold):
        return Reply("frontal, AP or PA not determined", frontal, candidates=candidates)
    return _unsure(candidates)


FRONTAL = ("ap", "pa", "frontal")


def _organ(evidence: Evidence, threshold: float) -> Reply:
    candidates = evidence.opinions.get("organ", ())
    part, organ = header_value(evidence.header, "region"), header_value(evidence.header, "organ")
    if part or organ:
        return Reply(f"{organ} ({part})" if part and organ else part or organ, source="header", candidates=candidates)
    return _sure(candidates, threshold) or _unsure(candidates)


def _contrast(evidence: Evidence, threshold: float) -> Reply:
    share = evidence.with_contrast()
    candidates = () if share is None else ranked({"with contrast": share, "without contrast": 1 - share})
    if said := header_value(evidence.header, "contrast"):
        return Reply(said, source="header", candidates=candidates)
    given = _detail_given("contrast", candidates, threshold)
    return replace(given, answer="with contrast, type not determined") if given.answer == "with contrast" else given


def _weighting(evidence: Evidence, threshold: float) -> Reply:
    return _detail_given("weighting", evidence.opinions.get("weighting", ()), threshold)


def _side(evidence: Evidence, threshold: float) -> Reply:
    said = header_value(evidence.header, "laterality")
    return Reply(said, reason=None if said else NO_SIDE, source="header")


OPEN: dict[str, Callable[[Evidence, float], Reply]] = {
    "modality": _modality, "plane": _plane, "organ": _organ, "contrast": _contrast, "weighting": _weighting, "laterality": _side,
}  # fmt: skip


def _sure(candidates: Sequence[Candidate], threshold: float) -> Reply | None:
    if candidates and candidates[0].probability >= max(WEAKEST, threshold):
        return Reply(candidates[0].answer, candidates[0].probability, candidates=tuple(candidates))
    return None


def _detail_given(what: str, candidates: Sequence[Candidate], threshold: float) -> Reply:
    """The likeliest where it is as sure as a detail of a modality must be, else which detail is not determined."""
    needed, given = max(DETAIL, threshold), _unsure(candidates)
    if not candidates:
        return given
    reason = f"{what} is not determined: {candidates[0].answer} is the likeliest, and under {needed:.0%}"
    return _sure(candidates, needed) or replace(given, reason=reason)


def _unsure(candidates: Sequence[Candidate]) -> Reply:
    return Reply(None, candidates[0].probability if candidates else None, NOT_SURE, candidates=tuple(candidates))


def header_facet(claim: str, header: Header) -> str:
    """Which of the header's values a claim is held against."""
    if claim in ("plane", "projection"):
        return "projection" if header.projection else "plane"
    return {"technique": "modality", "part": "region", "side": "laterality"}.get(claim, claim)


def words_of_value(facet: str, value: str) -> str:
    if facet == "modality" and value in FAMILIES:
        return FAMILIES[value].label
    if facet == "contrast" and value in ("with", "without"):
        return f"{value} contrast"
    if facet == "projection" and value in PROJECTIONS:
        return PROJECTIONS[value][0]
    return REGIONS[value].label if facet == "region" and value in REGIONS else value
