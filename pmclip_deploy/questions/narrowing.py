"""What turns or narrows a question, and what it takes for granted of the picture. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable

from pmclip_deploy.intent import Qualifier
from pmclip_deploy.questions.lexicon import QUALIFIERS
from pmclip_deploy.questions.reading import Item, Reading

Pairs = tuple[tuple[str, str], ...]
NEGATIVE = "yes and no to a question with a negation may be read both ways; ask without it"
BOTH_SIDES = "say one of both sides of the or"
_EARLIER = {"new", "newer", "previous", "prior", "old", "older", "past", "earlier"}  # beside a comparison, a part of it
_IN_ADVANCE = {"can", "could", "may", "possible", "to"}  # "can you exclude ...?" is a question, "exclude ..." is none


def turn(r: Reading) -> tuple[bool, str | None]:
    """(polarity, what to ask back): one plain negation turns the question, two or a doubtful one is asked back."""
    turns = r.of("not")
    if len(turns) > 1 or r.has("twisted", "negative question"):
        return False, NEGATIVE
    if not turns:
        return True, None
    if turns[0].value == "exclude" and not _IN_ADVANCE & {*r.words[: turns[0].at]}:
        return False, f'"{turns[0].text}" may be answered both ways; ask "is there ...?"'
    return False, None


def qualifiers_of(r: Reading) -> tuple[Qualifier, ...]:
    out = [*sites_of(r), *(Qualifier("side", item.text, item.value, True) for item in r.of("side"))]
    compared = r.of("comparison")
    if compared:
        out.append(Qualifier("comparison", " ".join(item.text for item in compared)))
    for item in r.of(*QUALIFIERS):
        if item.tag != "comparison" and not (compared and item.text in _EARLIER):
            out.append(Qualifier(item.tag, item.text))
    out += [Qualifier("type", item.text) for item in r.of("plane", "projection") if _is_of_a_finding(r, item)]
    return tuple(dict.fromkeys(out))


def sites_of(r: Reading) -> Iterable[Qualifier]:
    used: set[int] = set()
    asked = {other.at for item in r.of("wh") for other in r.next_to(item)}  # "which rib"
    for item in r.of("site"):
        if is_of_the_picture(r, item) or item.at in asked:
            continue
        near = [*_places_before(r, item), *(other for other in r.next_to(item) if other.tag == "place")]
        used |= {other.at for other in near}
        text = " ".join(other.text for other in sorted([*near, item], key=lambda other: other.at))
        yield Qualifier("site", text, item.site.region, item.site.part is None and not near)
    for item in r.of("place", "ordinal"):
        if item.at not in used:
            yield Qualifier("site", item.text)


def _places_before(r: Reading, item: Item) -> Iterable[Item]:
    """The words "lower" of "lower right lung" and "5th" of "5th rib"."""
    while before := next((x for x in r.before(item) if x.tag in ("place", "ordinal", "side") or x.text == "the"), None):
        if before.tag in ("place", "ordinal"):
            yield before
        item = before


def is_of_the_picture(r: Reading, item: Item) -> bool:
    """Whether a place is the picture's and not the finding's: "hand" of "this hand x-ray"."""
    beside = (*r.next_to(item), *(other for other in r.items if other.at == item.at))
    return any(other.tag in ("modality", "picture", "technique") for other in beside)


def _is_of_a_finding(r: Reading, item: Item) -> bool:
    """An oblique fracture."""
    return any(other.tag == "finding" for other in r.next_to(item))


def context_of(r: Reading) -> Pairs:
    """What a question about a finding or about normality takes for granted of the picture."""
    out = [(item.tag, item.value) for item in r.of("modality", "technique", "weighting", "contrast")]
    out += [(item.tag, item.value) for item in r.of("plane", "projection") if not _is_of_a_finding(r, item)]
    out += [pair for item in r.of("site") if is_of_the_picture(r, item) for pair in facets_of_site(item)]
    return tuple(dict.fromkeys(out))


def facets_of_site(item: Item) -> Pairs:
    """A region, with the part that is meant; an organ inside the body is a structure, which does not tell what the picture is of."""
    site = item.site
    if site.region is None or (site.inside and site.part):
        return (("structure", site.part or item.text),)
    return (("region", site.region), *((("part", site.part),) if site.part else ()))
