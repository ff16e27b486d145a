"""Closed questions and choices: what is claimed, and whether it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pmclip_deploy.decision.evidence import COIN, NO_SIDE, NOT_SURE, WEAKEST, Claim, Evidence, Reply, ranked, summed
from pmclip_deploy.decision.facets import FRONTAL, header_facet, words_of_value
from pmclip_deploy.header.read import header_value
from pmclip_deploy.questions import Intent, may_show
from pmclip_deploy.vocabulary import organs_of_region, regions_of_organ, view_of_answer


@dataclass(frozen=True)
class _Held:
    """Whether one claim holds: its probability, or why it cannot be said."""

    probability: float = 0.0
    source: str = "picture"
    reason: str | None = None


def closed_reply(intent: Intent, evidence: Evidence) -> Reply:
    held = [_held(evidence, claim) for claim in intent.asked]
    by_file = [h for h in held if h.source == "header" and h.reason is None]
    yes, no = ("yes", "no") if intent.polarity else ("no", "yes")
    if any(h.probability == 0 for h in by_file):
        return Reply(no, source="header")
    if unsaid := next((h for h in held if h.reason), None):
        return Reply(None, reason=unsaid.reason, source=unsaid.source)
    if len(by_file) == len(held):
        return Reply(yes, source="header")
    share = 1.0
    for h in held:
        share *= h.probability
    candidates = ranked({yes: share, no: 1 - share})
    best = candidates[0]
    if not best.probability >= COIN:
        return Reply(None, best.probability, f"yes and no are too close ({best.probability:.0%})", candidates=candidates)
    return Reply(best.answer, best.probability, candidates=candidates)


def choice_reply(intent: Intent, evidence: Evidence) -> Reply:
    """Between the values of the one facet that has several."""
    facets = [facet for facet, _ in intent.asked]
    facet = next((facet for facet in facets if facets.count(facet) > 1), facets[0])
    held = {value: _held(evidence, (facet, value)) for name, value in intent.asked if name == facet}
    if unsaid := next((h for h in held.values() if h.reason), None):
        return Reply(None, reason=unsaid.reason, source=unsaid.source)
    words = {value: words_of_value(facet, value) for value in held}
    if all(h.source == "header" for h in held.values()):
        right = [words[value] for value, h in held.items() if h.probability == 1]
        said = " and ".join(filter(None, (header_value(evidence.header, header_facet(facet, evidence.header)),)))
        if len(right) == 1:
            return Reply(right[0], source="header")
        return Reply(None, reason=f"it is neither: the file says {said}" if said else NOT_SURE, source="header")
    total = sum(h.probability for h in held.values())
    if not total >= WEAKEST:
        return Reply(None, reason=f"the picture looks like neither {' nor '.join(words.values())}")
    candidates = ranked({words[value]: h.probability / total for value, h in held.items()})
    if not candidates[0].probability >= COIN:
        return Reply(None, candidates[0].probability, f"{' and '.join(words.values())} are too close", candidates=candidates)
    return Reply(candidates[0].answer, candidates[0].probability, candidates=candidates)


def _held(evidence: Evidence, claim: Claim) -> _Held:
    facet, value = claim
    if facet in CLAIMS:
        return CLAIMS[facet](evidence, value)
    return _Held(reason=f"this model does not judge {value!r}")


def _modality_held(evidence: Evidence, value: str) -> _Held:
    if evidence.header.family:
        return _Held(float(evidence.header.family == value), "header")
    return _Held(evidence.families().get(value, 0.0))


def _technique_held(evidence: Evidence, value: str) -> _Held:
    named = sum(c.probability for c in evidence.opinions.get("modality", ()) if value in c.answer)
    return _Held(named) if named else _Held(reason=f"this model does not judge {value!r}")


def _plane_held(evidence: Evidence, value: str) -> _Held:
    plane, nearest = evidence.header.plane, evidence.header.nearest
    if plane:
        if nearest == value:
            return _Held(reason=f"the file says oblique, nearest to {nearest}", source="header")
        return _Held(float(plane == value), "header")
    return _Held(summed(evidence.opinions.get("plane", ()), view_of_answer).get(("plane", value), 0.0))


def _projection_held(evidence: Evidence, value: str) -> _Held:
    said = evidence.header.projection
    if said:
        if said == "frontal" and value in FRONTAL[:2]:
            return _Held(reason="the file says frontal, and not which way", source="header")
        return _Held(float(said == value or (value == "frontal" and said in FRONTAL)), "header")
    views = summed(evidence.opinions.get("plane", ()), view_of_answer)
    wanted = FRONTAL if value == "frontal" else (value,)
    return _Held(sum(share for (_, name), share in views.items() if name in wanted))


def _region_held(evidence: Evidence, value: str) -> _Held:
    if evidence.header.regions:
        if value in evidence.header.regions:
            return _Held(1.0, "header")
        if any(may_show(region, value) for region in evidence.header.regions):
            return _Held(reason=f"the file says {header_value(evidence.header, 'region')}, which may show it", source="header")
        return _Held(0.0, "header")
    if evidence.findings is not None and value in evidence.findings.regions:
        return _Held(evidence.findings.regions[value])
    shares = {c.answer: c.probability for c in evidence.opinions.get("organ", ())}
    organs = organs_of_region(value)
    share = sum(shares.get(organ, 0.0) for organ in organs)
    if share <= 1 - COIN or all(regions_of_organ(organ) == (value,) for organ in organs):
        return _Held(share)
    return _Held(reason=f"the picture looks {organs[0]}; which part of the body it is this model does not judge")


def _part_held(evidence: Evidence, value: str) -> _Held:
    if evidence.header.parts:
        named = f"the file says {header_value(evidence.header, 'region')}"
        return _Held(1.0, "header") if value in evidence.header.parts else _Held(reason=named)
    return _Held(reason=f"this model does not judge whether a picture shows the {value}")


def _organ_held(evidence: Evidence, value: str) -> _Held:
    if evidence.header.organs and (len(evidence.header.organs) == 1 or value not in evidence.header.organs):
        return _Held(float(value in evidence.header.organs), "header")
    return _Held(next((c.probability for c in evidence.opinions.get("organ", ()) if c.answer == value), 0.0))


def _contrast_held(evidence: Evidence, value: str) -> _Held:
    if evidence.header.contrast is not None and value in ("with", "without"):
        return _Held(float(evidence.header.contrast == (value == "with")), "header")
    share = evidence.with_contrast()
    if share is None or value not in ("with", "without"):
        return _Held(reason=f"this model does not judge {value!r} contrast")
    return _Held(share if value == "with" else 1 - share)


def _weighting_held(evidence: Evidence, value: str) -> _Held:
    shares = {c.answer: c.probability for c in evidence.opinions.get("weighting", ())}
    return _Held(shares[value]) if value in shares else _Held(reason=f"this model does not judge {value!r} weighting")


def _side_held(evidence: Evidence, value: str) -> _Held:
    said = evidence.header.laterality
    return _Held(float(said == value), "header") if said else _Held(reason=NO_SIDE, source="header")


CLAIMS: dict[str, Callable[[Evidence, str], _Held]] = {
    "modality": _modality_held, "technique": _technique_held, "plane": _plane_held, "projection": _projection_held,
    "region": _region_held, "part": _part_held, "organ": _organ_held, "contrast": _contrast_held, "weighting": _weighting_held,
    "side": _side_held,
}  # fmt: skip


def facet_of_claim(claim: str) -> str:
    return {"technique": "modality", "projection": "plane", "region": "organ", "part": "organ"}.get(claim, claim)
