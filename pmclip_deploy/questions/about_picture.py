"""Questions about the picture itself: modality, plane, organ or body part, contrast, weighting, side. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pmclip_deploy.intent import KINDS, OUT_OF_SCOPE, Intent, unknown
from pmclip_deploy.questions.lexicon import QUALIFIERS, TAKING
from pmclip_deploy.questions.narrowing import NEGATIVE, Pairs, facets_of_site, sites_of, turn
from pmclip_deploy.questions.reading import Item, Reading

# What a question may ask for by name. The weak ones stand in other questions too: "the organ in this view".
NOUNS = {"technique noun": "modality", "plane noun": "plane", "organ noun": "organ", "side noun": "laterality", "weight noun": "weighting"}
_WEAK = {
    "imaging", "exam", "examination", "view", "views", "region", "area", "method", "system", "part", "parts", "section of the body", "cut",
    "side", "angle",
}  # fmt: skip
FACETS = ("modality", "technique", "plane", "projection", "weighting", "contrast", "side", "organ", "site")
_KIND_OF_FACET = {
    **{"modality": "modality", "technique": "modality", "plane": "plane", "projection": "plane", "weighting": "weighting"},
    **{"contrast": "contrast", "side": "laterality", "organ": "organ", "region": "organ", "part": "organ", "structure": "organ"},
    "site": "organ",
}
_NARROWING = (*QUALIFIERS, "bone", "ordinal", "place", "every", "people")
_SHOWING = {"show", "shows", "shown", "represent", "represents", "belong", "belongs", "body"}
_PAIRED = {"hand", "forearm", "elbow", "humerus", "shoulder", "leg", "femur", "breast"}


def about_picture(r: Reading) -> Intent | None:
    if r.has(*_NARROWING):
        return None
    return _open_question(r) or _assertion_or_choice(r)


def _pairs(items: Iterable[Item]) -> Pairs:
    pairs = (pair for item in items for pair in (facets_of_site(item) if item.tag == "site" else ((item.tag, item.value),)))
    return tuple(dict.fromkeys(pairs))


# --- what is asked for is named, or plain from how it is asked ------------------------------------------------------------------


def _open_question(r: Reading) -> Intent | None:
    kind = _kind_asked_for(r)
    if kind is None or r.has("not"):
        return None
    values = [item for item in r.of(*FACETS) if item.text != "body"]
    own = [item for item in values if _KIND_OF_FACET[item.tag] == kind]
    if kind == "modality" and r.has("kind") and own and all((item.tag, item.value) == ("modality", "mr") for item in own):
        kind, own = "weighting", []  # "what type of MRI modality"
    if kind == "contrast" and all(item.value == "with" for item in own) and not r.has("or"):
        values, own = [item for item in values if item not in own], []  # "what contrast was given?" names it by a value
    return None if own else Intent(kind, "open", context=_pairs(values))  # own: "which plane, axial or coronal?" is a choice


def _kind_asked_for(r: Reading) -> str | None:
    kinds = _kinds_named(r) or {NOUNS[item.tag] for item in r.of(*NOUNS)}
    asking = r.asking
    if asking is None:
        return kinds.pop() if len(kinds) == 1 and not r.is_closed else None
    if asking.value == "what":
        return _kind_of_what(r, asking, kinds)
    words = {*r.words}
    if asking.value == "how" and (r.has("picture") or words & {"it", "this"}) and words & TAKING and not r.has(*FACETS):
        return "modality"
    if asking.value == "where" and all(item.text == "body" for item in r.of("site")):
        return "organ" if kinds == {"organ"} or (r.has("picture") and words & _SHOWING) else None
    return None


def _kinds_named(r: Reading) -> set[str]:
    return {NOUNS[item.tag] for item in r.of(*NOUNS) if item.text not in _WEAK}


def _kind_of_what(r: Reading, asking: Item, kinds: set[str]) -> str | None:
    if r.has("contrast") and not kinds:
        return "contrast"
    if kinds:
        return kinds.pop() if len(kinds) == 1 else None
    words, bare = {*r.words}, not r.has(*FACETS)
    for of in r.of("kind"):  # "what type of image", "what type of MRI"
        behind = next((item for item in r.items if item.at >= of.after and item.tag not in ("skip", "wh")), None)
        if behind is not None and behind.tag == "picture":
            return "modality"
        return "weighting" if behind is not None and (behind.tag, behind.value) == ("modality", "mr") else None
    if bare and ((words & TAKING and r.has("picture")) or any(item.text in ("scan", "study") for item in r.next_to(asking))):
        return "modality"
    paired = any(item.tag == "site" and item.site.region in _PAIRED for item in r.next_to(asking))
    return "laterality" if asking.text == "which" and paired and words & {"this", "it"} and len(r.of(*FACETS)) == 1 else None


# --- what is asserted, or offered to choose from --------------------------------------------------------------------------------


def _assertion_or_choice(r: Reading) -> Intent | None:
    items = r.of(*FACETS)
    if not items or any(item.value != "not" for item in r.of("not")):
        return None
    if r.has("wh") and not r.has("or"):
        return Intent(OUT_OF_SCOPE) if r.asking is not None and r.asking.value in ("where", "how many", "how") else None
    if all(item.text == "right" for item in items):
        return unknown('"right" may mean the side or that something is correct; ask "is this the right side?"')
    several = r.has("or") and len({item.value for item in items if item.tag == "modality"}) > 1  # "is this X-ray, CT or MRI?"
    given = [] if several else [item for item in items if _is_given(r, item, items)]
    asserted = [item for item in items if item not in given]
    pairs = _pairs(asserted)
    if not _fits_what_is_named(r, {_KIND_OF_FACET[facet] for facet, _ in pairs}):
        return None
    if r.has("or"):
        return _choice(r, asserted, pairs, _pairs(given))
    return None if r.has("wh") or _several(asserted, pairs) else _assertion(r, asserted, pairs, _pairs(given))


def _choice(r: Reading, asserted: Sequence[Item], pairs: Pairs, given: Pairs) -> Intent | None:
    facets, (polarity, needs) = _several(asserted, pairs), turn(r)
    if len(facets) != 1 or facets == ["structure"]:
        return None
    offered = tuple(pair for pair in pairs if pair[0] == facets[0])
    rest = tuple(pair for pair in pairs if pair[0] != facets[0])
    needs = needs or (None if polarity else NEGATIVE)
    return Intent(_KIND_OF_FACET[facets[0]], "choice", asked=offered, context=(*given, *rest), needs=needs)


def _assertion(r: Reading, asserted: Sequence[Item], pairs: Pairs, given: Pairs) -> Intent | None:
    value_of, (polarity, needs) = dict(pairs), turn(r)
    if "weighting" in value_of and value_of.get("modality", "mr") != "mr":
        return None
    if "organ" in value_of and any(item.text in ("organs", "parts") for item in r.of("organ noun")):
        return None  # an organ of a system may be in view where the picture is of another
    if "contrast" in value_of and "structure" in value_of and "modality" not in value_of:  # contrast in the bowel
        pairs = _pairs(item for item in asserted if item.tag != "site")
        return Intent("contrast", "closed", None, polarity, pairs, tuple(sites_of(r)), given, needs=needs)
    kind = next(kind for kind in KINDS if kind in {_KIND_OF_FACET[facet] for facet in value_of})
    return Intent(kind, "closed", None, polarity, pairs, (), given, needs=needs)


def _fits_what_is_named(r: Reading, kinds: set[str]) -> bool:
    """Whether the noun is of the values' kind: no "is the plane CT?". Weighting and contrast are details of a modality."""
    return not _kinds_named(r) - kinds - ({"modality"} if kinds & {"weighting", "contrast"} else set())


def _several(asserted: Sequence[Item], pairs: Pairs) -> list[str]:
    """The facets that have two values or more. Regions of one phrase, "abdomen and pelvis", are one; a part tells nothing beside two."""
    facets = [facet for facet, _ in pairs]
    several = [facet for facet in dict.fromkeys(facets) if facets.count(facet) > 1]
    if len({item.at for item in asserted if item.tag == "site"}) == 1:
        several = [facet for facet in several if facet != "region"]
    return [facet for facet in several if not (facet == "part" and "region" in several)]


def _is_given(r: Reading, item: Item, items: Sequence[Item]) -> bool:
    """Whether it is said of the picture rather than asked: "the CT" of "was the CT taken with contrast?", "this x-ray" of "does this x-ray
    show the chest?", "on CT"; not in "is this CT?"."""
    head = next((other for other in items if other.tag in ("modality", "technique") and other.at >= item.at), None)
    if head is None or r.word(head.after) == "or" or (item.tag == "contrast" and item is not head):
        return False
    start = head.at
    while before := next((other for other in items if other.at < start == other.after), None):
        start = before.at
    others = [other for other in items if not start <= other.at <= head.at]
    if item.at < start or not others:
        return False
    article, preposition = r.word(start - 1), r.word(start - 2)
    if article in ("on", "in") or (article in ("the", "this", "that") and preposition in ("on", "in", "of")):
        return True
    behind = [other for other in others if other.at >= head.after and "of" not in (r.word(other.at - 1), r.word(other.at - 2))]
    return article in ("the", "this", "that") and bool(behind)
