"""What is given as an answer: from the question as it was understood, what the file says, and what the picture looks like.

    Intent + Look -> Reply

The rules are pure: no graph runs here. An answer comes from the file's header and says so, or from the picture where that has earned it
on validation images; everything else is an abstention with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp
from typing import Any, TypeVar

from pmclip_deploy.answer import Candidate, Worth
from pmclip_deploy.bundle import Finding, Manifest, Stratum
from pmclip_deploy.header import Header, contradiction, header_value
from pmclip_deploy.questions import LANGUAGE, OUT_OF_SCOPE, Intent, Qualifier, Taught, may_show, nearest
from pmclip_deploy.vocabulary import FAMILIES, PROJECTIONS, REGIONS, family_of_answer, organs_of_region, regions_of_organ, view_of_answer

# What the head is asked, in the words of its training set, to learn what a picture looks like: (kind of question, question). One wording
# for all who ask, and none that takes its answer for granted ("is this a t2 weighted image?" has the answer no throughout that set).
FACETS = {
    "modality": ("modality", "what imaging modality was used to take this image?"),
    "plane": ("plane", "in what plane is this image taken?"),
    "organ": ("organ", "what organ system is shown in the image?"),
    "contrast": ("contrast", "is this a contrast or noncontrast ct?"),
    "contrast of mr": ("contrast", "is this a contrast or noncontrast mri?"),
    "weighting": ("weighting", "what is the mr weighting in this image?"),
}
WEAKEST = 0.5  # an answer that is less likely than all others together is not given
COIN = 0.6  # of two answers, one that is less likely than this is not given
SHOWN = 0.5  # a region from this probability on is taken to be in the picture
FILM = "xr"  # the family of all pictures whose regions the graph "findings" tells apart
UNLIKE = 0.2  # a picture whose region has less than this contradicts a header that names it

OUTSIDE = "the question is outside what this model was trained on"
NOT_ENGLISH = "the question is not English; ask it in English"
NO_RADIOGRAPH = "the picture does not look like a radiology image"
NOT_VALIDATED = "whether a picture is normal is not validated for this model; ask for a finding by name"
NOT_NAMED = "too few names of abnormalities were right on validation images; ask for a finding by name"
NOT_SURE = "nothing is likelier than all else together"
NO_SIDE = "the side is read from the file alone, and it does not say"

Claim = tuple[str, str]  # (facet, value)
Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True)
class Seen:
    """What the graph "findings" and the bundle's probes say of a picture."""

    logits: Mapping[str, float]  # of each finding
    regions: Mapping[str, float]  # probability of each region
    places: Mapping[str, Any] = field(default_factory=dict)  # of each finding its map (h, w), f32 logits


@dataclass(frozen=True)
class Look:
    """All that is known of a picture before a question about it is answered."""

    opinions: Mapping[str, tuple[Candidate, ...]] = field(default_factory=dict)  # of FACETS: what it looks like, the likeliest first
    header: Header = field(default_factory=Header)
    radiology: bool = True  # whether it looks like a radiology image
    seen: Seen | None = None
    child: bool | None = None

    def families(self) -> dict[str, float]:
        """Modality families by what the picture looks like, the likeliest first."""
        return _summed(self.opinions.get("modality", ()), family_of_answer)

    def family(self) -> str | None:
        """By the header, else by the picture where it is sure."""
        likeliest = next(iter(self.families().items()), ("", 0.0))
        return self.header.family or (likeliest[0] if likeliest[1] >= WEAKEST else None)

    def with_contrast(self) -> float | None:
        """The probability of contrast, by the picture."""
        shares = {c.answer: c.probability for c in self.opinions.get("contrast of mr" if self.family() == "mr" else "contrast", ())}
        return 1 - shares["noncontrast"] if "noncontrast" in shares else None


@dataclass(frozen=True)
class Reply:
    answer: str | None
    probability: float | None = None  # None where the header says it, and for an abstention without candidates
    reason: str | None = None
    source: str = "picture"  # or "header"
    candidates: tuple[Candidate, ...] = ()  # what the picture looks like
    worth: Worth | None = None
    note: str | None = None


def facets_of(intents: Iterable[Intent]) -> set[str]:
    """The opinions that questions need. A finding needs the modality, which the header may contradict."""
    needed = set()
    for intent in intents:
        if intent.answerable and intent.kind not in ("normal", "abnormality", "laterality"):
            facets = {"modality", *(_facet(facet) for facet, _ in intent.asked), intent.kind}
            needed |= facets & set(FACETS) | ({"contrast of mr"} if "contrast" in facets else set())
    return needed


def reply(manifest: Manifest, intent: Intent, look: Look, question: str = "") -> Reply:
    """The rules in their order. Where a question cannot be answered at all, the note names the nearest that can to ``question``."""
    given = _reply(manifest, intent, look)
    if given.answer is not None or given.note or given.candidates or given.source == "header" or intent.kind == LANGUAGE:
        return given
    others = [other for other in nearest(question, askable(manifest)) if other != question]
    return replace(given, note=f"this can be asked: {', '.join(others)}") if others else given


def askable(manifest: Manifest) -> tuple[str, ...]:
    """What can be asked of this model, as far as its validation goes."""
    passed = [finding.name for finding in findings_of(manifest) if any(stratum.reason is None for stratum in finding.strata)]
    examples = EXAMPLES if manifest.head is not None and manifest.head.kind == "lite" else ()
    return (*examples, *(question_about(manifest, name) for name in passed))


def findings_of(manifest: Manifest) -> tuple[Finding, ...]:
    """Those of the graph "findings", and those that the bundle was taught."""
    return (*(manifest.findings.findings if manifest.findings else ()), *(probe.finding for probe in manifest.probes))


def taught(manifest: Manifest) -> Taught:
    """What `questions.understood` must know of this model's own findings."""
    return tuple((probe.finding.name, probe.asked) for probe in manifest.probes)


def question_about(manifest: Manifest, finding: str) -> str:
    asked = dict(taught(manifest)).get(finding)
    return asked[0] if asked else f"is there {'a ' if finding.split()[-1] in COUNTED else ''}{finding}?"


EXAMPLES = {  # question: the facet that answers it
    "what imaging modality is this?": "modality",
    "is this a CT?": "modality",
    "CT or MRI?": "modality",
    "in what plane is this image?": "plane",
    "is this an axial image?": "plane",
    "is this an AP or a lateral view?": "plane",
    "what organ system is shown?": "organ",
    "is this a chest x-ray?": "modality",
    "was contrast given?": "contrast",
    "what is the MR weighting?": "weighting",
    "is this T1 or T2?": "weighting",
    "which side is shown?": "laterality",
}
COUNTED = ("fracture",)  # findings that take an article


def _reply(manifest: Manifest, intent: Intent, look: Look) -> Reply:
    if not intent.answerable:
        return Reply(None, reason=_unanswerable(intent))
    if look.header.outside:
        return Reply(None, reason=f"the file says it holds {look.header.outside}, which is no radiology image", source="header")
    given = _asked(manifest, intent, look)
    if not look.radiology and given.source == "picture" and (given.answer is not None or given.candidates):
        return replace(given, answer=None, reason=NO_RADIOGRAPH, worth=None)
    families = look.families()
    likeliest = next(iter(families), None)
    against = contradiction(look.header, likeliest, families.get(likeliest or "", 0.0)) if look.radiology else None
    return replace(given, note=against or given.note)


def unvalidated(intent: Intent) -> str | None:
    """Why a head that reads words itself, as MEVF's and QCR's, may not answer: it was measured in no stratum."""
    if intent.kind == "finding":
        return f"{intent.finding} is not validated for this model on any kind of picture"
    return {"normal": NOT_VALIDATED, "abnormality": NOT_NAMED}.get(intent.kind)


def _unanswerable(intent: Intent) -> str:
    if intent.kind == LANGUAGE:
        return NOT_ENGLISH
    return intent.needs or (OUTSIDE if intent.kind == OUT_OF_SCOPE else "the question was not understood; ask it in other words")


def _asked(manifest: Manifest, intent: Intent, look: Look) -> Reply:
    if intent.kind == "finding":
        return _finding(manifest, intent, look)
    if intent.kind == "normal":
        return Reply(None, reason=NOT_VALIDATED)
    if intent.kind == "abnormality":
        return Reply(None, reason=NOT_NAMED)
    if taken := _taken_for_granted(intent, look):
        return Reply(None, reason=taken, source="header" if look.header.family else "picture")
    if intent.kind in ("contrast", "weighting") and (refused := _not_of_this_family(intent.kind, look)):
        return Reply(None, reason=refused, source="header" if look.header.family else "picture")
    if intent.form == "closed":
        return _closed(intent, look)
    if intent.form == "choice":
        return _choice(intent, look)
    return OPEN[intent.kind](look, _thresholds(manifest).get(intent.kind, 0.0))


def _thresholds(manifest: Manifest) -> dict[str, float]:
    return {kind.name: kind.threshold for kind in manifest.kinds}


def _taken_for_granted(intent: Intent, look: Look) -> str | None:
    """A question about "this MRI" has no answer where the picture is a plain film."""
    for facet, value in intent.context:
        family = look.family()
        if facet == "modality" and family is not None and value != family and value in FAMILIES:
            says = "file says" if look.header.family else "picture looks like"
            return f"the question is about {FAMILIES[value].label}, and the {says} {FAMILIES[family].label}"
    return None


def _not_of_this_family(kind: str, look: Look) -> str | None:
    family, of = look.family(), ("ct", "mr") if kind == "contrast" else ("mr",)
    if family is None or family in of or (kind == "contrast" and look.header.contrast is not None):
        return None
    return f"{kind} is answered for {' and '.join(FAMILIES[x].label for x in of)}, and this is {FAMILIES[family].label}"


# --- open questions -------------------------------------------------------------------------------------------------------------


def _modality(look: Look, threshold: float) -> Reply:
    candidates, families = look.opinions.get("modality", ()), look.families()
    if said := header_value(look.header, "modality"):
        within = _renormalised(c for c in candidates if family_of_answer(c.answer) == look.header.family)
        contrast = header_value(look.header, "contrast")
        return Reply(f"{said}, {contrast}" if contrast else said, source="header", candidates=within, note=_detail(said, within))
    if sure := _sure(candidates, threshold):
        return sure
    family, share = next(iter(families.items()), ("", 0.0))
    if share >= max(WEAKEST, threshold):
        return Reply(f"{FAMILIES[family].label}, detail not determined", share, candidates=candidates)
    return _unsure(candidates)


def _detail(said: str, within: Sequence[Candidate]) -> str | None:
    if len(within) < 2 or within[0].probability < WEAKEST:
        return None
    return f"within {said}, the picture looks most like {within[0].answer} ({within[0].probability:.0%})"


def _plane(look: Look, threshold: float) -> Reply:
    candidates = look.opinions.get("plane", ())
    if said := header_value(look.header, "projection") or header_value(look.header, "plane"):
        return Reply(said, source="header", candidates=candidates)
    if sure := _sure(candidates, threshold):
        return sure
    views = _summed(candidates, view_of_answer)
    view, share = next(iter(views.items()), (("", ""), 0.0))
    if share >= max(WEAKEST, threshold):
        return Reply(view[1], share, candidates=candidates)
    frontal = sum(share for (_, name), share in views.items() if name in FRONTAL)
    if frontal >= max(WEAKEST, threshold):
        return Reply("frontal, AP or PA not determined", frontal, candidates=candidates)
    return _unsure(candidates)


FRONTAL = ("ap", "pa", "frontal")


def _organ(look: Look, threshold: float) -> Reply:
    candidates = look.opinions.get("organ", ())
    part, organ = header_value(look.header, "region"), header_value(look.header, "organ")
    if part or organ:
        return Reply(f"{organ} ({part})" if part and organ else part or organ, source="header", candidates=candidates)
    return _sure(candidates, threshold) or _unsure(candidates)


def _contrast(look: Look, threshold: float) -> Reply:
    share = look.with_contrast()
    candidates = () if share is None else _ranked({"with contrast": share, "without contrast": 1 - share})
    if said := header_value(look.header, "contrast"):
        return Reply(said, source="header", candidates=candidates)
    return _sure(candidates, max(COIN, threshold)) or _unsure(candidates)


def _weighting(look: Look, threshold: float) -> Reply:
    candidates = look.opinions.get("weighting", ())
    return _sure(candidates, threshold) or _unsure(candidates)


def _side(look: Look, threshold: float) -> Reply:
    said = header_value(look.header, "laterality")
    return Reply(said, reason=None if said else NO_SIDE, source="header")


OPEN: dict[str, Callable[[Look, float], Reply]] = {
    "modality": _modality, "plane": _plane, "organ": _organ, "contrast": _contrast, "weighting": _weighting, "laterality": _side,
}  # fmt: skip


def _sure(candidates: Sequence[Candidate], threshold: float) -> Reply | None:
    if candidates and candidates[0].probability >= max(WEAKEST, threshold):
        return Reply(candidates[0].answer, candidates[0].probability, candidates=tuple(candidates))
    return None


def _unsure(candidates: Sequence[Candidate]) -> Reply:
    return Reply(None, candidates[0].probability if candidates else None, NOT_SURE, candidates=tuple(candidates))


# --- closed questions and choices -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """Whether one claim holds: its probability, or why it cannot be said."""

    probability: float = 0.0
    source: str = "picture"
    reason: str | None = None


def _closed(intent: Intent, look: Look) -> Reply:
    held = [_held(look, claim) for claim in intent.asked]
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
    candidates = _ranked({yes: share, no: 1 - share})
    best = candidates[0]
    if best.probability < COIN:
        return Reply(None, best.probability, f"yes and no are too close ({best.probability:.0%})", candidates=candidates)
    return Reply(best.answer, best.probability, candidates=candidates)


def _choice(intent: Intent, look: Look) -> Reply:
    """Between the values of the one facet that has several."""
    facets = [facet for facet, _ in intent.asked]
    facet = next((facet for facet in facets if facets.count(facet) > 1), facets[0])
    held = {value: _held(look, (facet, value)) for name, value in intent.asked if name == facet}
    if unsaid := next((h for h in held.values() if h.reason), None):
        return Reply(None, reason=unsaid.reason, source=unsaid.source)
    words = {value: _words(facet, value) for value in held}
    if all(h.source == "header" for h in held.values()):
        right = [words[value] for value, h in held.items() if h.probability == 1]
        said = " and ".join(filter(None, (header_value(look.header, _said_as(facet, look.header)),)))
        if len(right) == 1:
            return Reply(right[0], source="header")
        return Reply(None, reason=f"it is neither: the file says {said}" if said else NOT_SURE, source="header")
    total = sum(h.probability for h in held.values())
    if total < WEAKEST:
        return Reply(None, reason=f"the picture looks like neither {' nor '.join(words.values())}")
    candidates = _ranked({words[value]: h.probability / total for value, h in held.items()})
    if candidates[0].probability < COIN:
        return Reply(None, candidates[0].probability, f"{' and '.join(words.values())} are too close", candidates=candidates)
    return Reply(candidates[0].answer, candidates[0].probability, candidates=candidates)


def _held(look: Look, claim: Claim) -> _Held:
    facet, value = claim
    if facet in CLAIMS:
        return CLAIMS[facet](look, value)
    return _Held(reason=f"this model does not judge {value!r}")


def _modality_held(look: Look, value: str) -> _Held:
    if look.header.family:
        return _Held(float(look.header.family == value), "header")
    return _Held(look.families().get(value, 0.0))


def _technique_held(look: Look, value: str) -> _Held:
    named = sum(c.probability for c in look.opinions.get("modality", ()) if value in c.answer)
    return _Held(named) if named else _Held(reason=f"this model does not judge {value!r}")


def _plane_held(look: Look, value: str) -> _Held:
    plane, nearest = look.header.plane, look.header.nearest
    if plane:
        if nearest == value:
            return _Held(reason=f"the file says oblique, nearest to {nearest}", source="header")
        return _Held(float(plane == value), "header")
    return _Held(_summed(look.opinions.get("plane", ()), view_of_answer).get(("plane", value), 0.0))


def _projection_held(look: Look, value: str) -> _Held:
    said = look.header.projection
    if said:
        if said == "frontal" and value in FRONTAL[:2]:
            return _Held(reason="the file says frontal, and not which way", source="header")
        return _Held(float(said == value or (value == "frontal" and said in FRONTAL)), "header")
    views = _summed(look.opinions.get("plane", ()), view_of_answer)
    wanted = FRONTAL if value == "frontal" else (value,)
    return _Held(sum(share for (_, name), share in views.items() if name in wanted))


def _region_held(look: Look, value: str) -> _Held:
    if look.header.regions:
        if value in look.header.regions:
            return _Held(1.0, "header")
        if any(may_show(region, value) for region in look.header.regions):
            return _Held(reason=f"the file says {header_value(look.header, 'region')}, which may show it", source="header")
        return _Held(0.0, "header")
    if look.seen is not None and value in look.seen.regions:
        return _Held(look.seen.regions[value])
    shares = {c.answer: c.probability for c in look.opinions.get("organ", ())}
    organs = organs_of_region(value)
    share = sum(shares.get(organ, 0.0) for organ in organs)
    if share <= 1 - COIN or all(regions_of_organ(organ) == (value,) for organ in organs):
        return _Held(share)
    return _Held(reason=f"the picture looks {organs[0]}; which part of the body it is this model does not judge")


def _part_held(look: Look, value: str) -> _Held:
    if look.header.parts:
        return _Held(1.0, "header") if value in look.header.parts else _Held(reason=f"the file says {header_value(look.header, 'region')}")
    return _Held(reason=f"this model does not judge whether a picture shows the {value}")


def _organ_held(look: Look, value: str) -> _Held:
    if look.header.organs and (len(look.header.organs) == 1 or value not in look.header.organs):
        return _Held(float(value in look.header.organs), "header")
    return _Held(next((c.probability for c in look.opinions.get("organ", ()) if c.answer == value), 0.0))


def _contrast_held(look: Look, value: str) -> _Held:
    if look.header.contrast is not None and value in ("with", "without"):
        return _Held(float(look.header.contrast == (value == "with")), "header")
    share = look.with_contrast()
    if share is None or value not in ("with", "without"):
        return _Held(reason=f"this model does not judge {value!r} contrast")
    return _Held(share if value == "with" else 1 - share)


def _weighting_held(look: Look, value: str) -> _Held:
    shares = {c.answer: c.probability for c in look.opinions.get("weighting", ())}
    return _Held(shares[value]) if value in shares else _Held(reason=f"this model does not judge {value!r} weighting")


def _side_held(look: Look, value: str) -> _Held:
    said = look.header.laterality
    return _Held(float(said == value), "header") if said else _Held(reason=NO_SIDE, source="header")


CLAIMS: dict[str, Callable[[Look, str], _Held]] = {
    "modality": _modality_held, "technique": _technique_held, "plane": _plane_held, "projection": _projection_held,
    "region": _region_held, "part": _part_held, "organ": _organ_held, "contrast": _contrast_held, "weighting": _weighting_held,
    "side": _side_held,
}  # fmt: skip


def _facet(claim: str) -> str:
    return {"technique": "modality", "projection": "plane", "region": "organ", "part": "organ"}.get(claim, claim)


def _said_as(claim: str, header: Header) -> str:
    """Which of the header's values a claim is held against."""
    if claim in ("plane", "projection"):
        return "projection" if header.projection else "plane"
    return {"technique": "modality", "part": "region", "side": "laterality"}.get(claim, claim)


def _words(facet: str, value: str) -> str:
    if facet == "modality" and value in FAMILIES:
        return FAMILIES[value].label
    if facet == "contrast" and value in ("with", "without"):
        return f"{value} contrast"
    if facet == "projection" and value in PROJECTIONS:
        return PROJECTIONS[value][0]
    return REGIONS[value].label if facet == "region" and value in REGIONS else value


# --- findings -------------------------------------------------------------------------------------------------------------------


def _finding(manifest: Manifest, intent: Intent, look: Look) -> Reply:
    known = {finding.name: finding for finding in findings_of(manifest)}
    name = intent.finding or ""
    if name not in known:
        measured = f"; it answers for {', '.join(known)}" if known else ""
        return Reply(None, reason=f"{name} is not validated for this model on any kind of picture{measured}")
    if intent.form != "closed" or look.seen is None:
        return Reply(None, reason=f"this model says whether there is a {name}, and no more")
    if taken := _taken_for_granted(intent, look):
        return Reply(None, reason=taken)
    shown = _regions_shown(look)
    if unjudged := _unjudged(intent.qualifiers, shown):
        return Reply(None, reason=unjudged)
    stratum, reason = _stratum(known[name], shown, look)
    if stratum is None:
        return Reply(None, reason=reason)
    logit = look.seen.logits[name]
    found = logit >= stratum.threshold
    yes, no = ("yes", "no") if intent.polarity else ("no", "yes")
    share = 1 / (1 + exp(-max(-60.0, min(60.0, stratum.slope * logit + stratum.intercept))))
    return Reply(
        yes if found else no,
        share if found else 1 - share,
        candidates=_ranked({yes: share, no: 1 - share}),
        worth=worth_of(name, stratum, found),
    )


def _regions_shown(look: Look) -> tuple[str, ...]:
    """By the header, else those that the picture looks like, the likeliest first."""
    if look.header.regions:
        return look.header.regions
    shares = look.seen.regions if look.seen else {}
    likely = sorted((region for region in shares if shares[region] >= SHOWN), key=lambda region: -shares[region])
    return tuple(likely) if likely[:1] != ["other"] else ()


def _unjudged(qualifiers: Sequence[Qualifier], shown: Sequence[str]) -> str | None:
    """Why a word that narrows the finding cannot be judged: the first such word."""
    for q in qualifiers:
        if q.kind != "site" or q.value is None:
            return f'this model does not judge "{q.text}"'
        if shown and not any(may_show(region, q.value) for region in shown):
            return f'the picture shows the {" and ".join(_label(x) for x in shown)}, not the site that was asked for ("{q.text}")'
        if not q.exact or q.value not in shown:
            return f'where in a picture a finding is this model does not judge ("{q.text}")'
    return None


def _stratum(finding: Finding, shown: Sequence[str], look: Look) -> tuple[Stratum | None, str | None]:
    """The stratum of a picture, or why there is none that may be answered."""
    assert look.seen is not None
    family = look.header.family
    families = dict.fromkeys(s.family for s in finding.strata)
    passed = [s for s in finding.strata if s.reason is None]
    if not passed:
        return None, f"{finding.name} is not validated for this model on any kind of picture"
    measured = f"{finding.name} is validated for {_list(_pictures(s) for s in passed)}"
    if family is not None and family not in families:
        return None, f"{measured}, and the file says {header_value(look.header, 'modality')}"
    fitting = [s for region in shown for s in finding.strata if s.region == region and s.family == (family or FILM)]
    if not fitting or any(region not in {s.region for s in fitting} for region in look.header.regions):
        where = f"this picture shows the {_list(_label(x) for x in shown)}" if shown else "this picture shows none of these"
        return None, f"{measured}; {where if shown or look.seen.regions else 'the file does not say what this picture shows'}"
    unlike = [s for s in fitting if s.family == FILM and look.seen.regions.get(s.region, 1.0) < UNLIKE]
    if unlike:
        return None, f"the file says {header_value(look.header, 'region')}, and the picture does not look like it"
    stratum = next((s for s in fitting if s.reason), fitting[0])
    if stratum.reason:
        return None, f"{finding.name} is not validated for {_pictures(stratum)}: {stratum.reason}"
    if stratum.children and look.child is not True:
        known = "the file says this is none" if look.child is False else "the file does not say whether this is one; --age YEARS does"
        return None, f"{finding.name} is validated for children alone, and {known}"
    return stratum, None


def worth_of(name: str, stratum: Stratum, found: bool) -> Worth:
    return Worth(
        finding=name,
        found=found,
        stratum=_pictures(stratum),
        n=stratum.n,
        sensitivity=stratum.sensitivity,
        specificity=stratum.specificity,
        right_of_yes=stratum.yes,
        right_of_no=stratum.no,
        auroc=stratum.auroc,
        auroc_ci95=stratum.auroc_ci95,
    )


def _pictures(stratum: Stratum) -> str:
    what = "plain films" if stratum.family == FILM else f"{FAMILIES[stratum.family].label} pictures"
    return f"{what} of the {_label(stratum.region)}{' of children' if stratum.children else ''}"


def _label(region: str) -> str:
    return REGIONS[region].label if region in REGIONS else region


def _list(items: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(items))


# --- shares ---------------------------------------------------------------------------------------------------------------------


def _summed(candidates: Iterable[Candidate], key: Callable[[str], Group | None]) -> dict[Group, float]:
    """The probability of each group of answers, the likeliest first; answers of no group are left out."""
    sums: dict[Group, float] = {}
    for c in candidates:
        if (group := key(c.answer)) is not None:
            sums[group] = sums.get(group, 0.0) + c.probability
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _renormalised(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    kept = list(candidates)
    total = sum(c.probability for c in kept)
    return tuple(replace(c, probability=c.probability / total) for c in kept) if total > 0 else ()


def _ranked(shares: Mapping[str, float]) -> tuple[Candidate, ...]:
    return tuple(Candidate(answer, share) for answer, share in sorted(shares.items(), key=lambda item: -item[1]))
