"""Questions about a finding: is it there, where, how many, of which kind. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from pmclip_deploy.intent import OUT_OF_SCOPE, Intent, Qualifier, unknown
from pmclip_deploy.questions.lexicon import BONY, BROKEN, LIMBS, NO_BONES, QUALIFIERS
from pmclip_deploy.questions.narrowing import BOTH_SIDES, NEGATIVE, context_of, is_of_the_picture, qualifiers_of, turn
from pmclip_deploy.questions.reading import Item, Reading

_TOGETHER = {  # a finding at a place, where both have a name of their own
    ("enlargement", "heart"): "cardiomegaly",
    ("enlargement", "lymph node"): "lymphadenopathy",
    ("edema", "lung"): "pulmonary edema",
    ("hernia", "disc"): "disc herniation",
    ("hernia", "disk"): "disc herniation",
}
_ASKED_FOR = {"kind": "type", "side noun": "side", "bone": "site", "organ noun": "site", "site": "site", "place": "site"}


def about_finding(r: Reading) -> Intent | None:
    found, intact = r.of("finding"), [item for item in r.of("not") if item.value == "intact"]
    if not found and not intact:
        return None
    soft = any(item.site.region not in LIMBS and item.text not in BONY for item in r.of("site"))
    if intact and (found or soft or not r.has("bone", "site")):
        return unknown('"intact" is understood of bones alone; name the finding that is meant')
    if len(found) > 2 and not r.has("or"):
        return unknown()
    name, *more = dict.fromkeys(item.value for item in found) or ["fracture"]
    if more:
        needs = f"{', '.join((name, *more[:-1]))} and {more[-1]} are asked for at once; ask for one of them"
        return Intent("finding", "choice", asked=tuple(("finding", one) for one in (name, *more)), needs=needs)
    if r.has("normal", "abnormal", "abnormality", "organ"):
        return Intent("finding", "closed", name, needs=f'ask for one thing: "is there {name}?" or "is this normal?"')
    if doubt := _doubt(r, name, found):
        return unknown(doubt)
    return _of_one_finding(r, name, found)


def _of_one_finding(r: Reading, name: str, found: Sequence[Item]) -> Intent:
    form, asked_for = _form(r)
    if form is None:
        return Intent(OUT_OF_SCOPE)
    polarity, needs = turn(r)
    bones = r.of("bone") if name != "fracture" else ()  # a fracture is of a bone, a cancer need not be
    name, qualifiers = _with_site(name, (*asked_for, *qualifiers_of(r), *(Qualifier("site", item.text) for item in bones)))
    if form == "closed" and r.has("or"):
        if len(qualifiers) > 1:
            form = "choice"
        elif not _are_synonyms(r, found):
            needs = needs or BOTH_SIDES
    if found and any(_turns_what_narrows(r, item) for item in r.of("not") if found[-1].after <= item.at):
        needs = needs or NEGATIVE  # "a fracture without displacement"
    if form != "closed" and not polarity:
        needs = needs or NEGATIVE
    if any(other.tag in ("weighting", "contrast") for item in found for other in r.before(item)):
        needs = needs or f"it may be the picture's or the finding's; ask \"is there {name}?\""  # a T1 fracture
    return Intent("finding", form, name, polarity, (), qualifiers, context_of(r), needs=needs)


def _turns_what_narrows(r: Reading, item: Item) -> bool:
    """Whether a negation behind the finding is of a qualifier: "without displacement", "of the hip, not the femur"."""
    sites = (other for near in (item, *r.next_to(item)) for other in r.next_to(near) if other.tag == "site")
    return any(item.at < other.at for other in r.of(*QUALIFIERS, "side", "place")) or any(sites)


def _doubt(r: Reading, name: str, found: Sequence[Item]) -> str | None:
    """Why the words do not speak of this picture's patient: "is the x-ray broken?", "can a CT show a fracture?", "is the skin broken?"."""
    for item in r.of("modality"):
        if any(item.at < finding.at for finding in found) and r.word(item.at - 1) in ("a", "an"):
            return f'ask of this picture: "is there {name}?"'
    if name != "fracture":
        return None
    for item in found:
        if item.text in BROKEN and any(other.tag in ("modality", "picture", "technique noun") for other in r.before(item)):
            return 'that may be said of the file as of a bone; ask "is there a fracture?"'
    for item in r.of("site"):
        soft = item.site.region in ("chest", "abdomen") and item.site.part is not None and item.site.inside and item.text not in BONY
        if (soft or item.text in NO_BONES) and not is_of_the_picture(r, item):
            return f'"{item.text}" is no bone; ask "is there a fracture?" or name a bone'
    return None


def _form(r: Reading) -> tuple[str | None, tuple[Qualifier, ...]]:
    """(form, what an open question asks for); no form where the question is about findings in general."""
    asking = r.asking
    if asking is None:
        return "closed", ()
    if asking.value in ("where", "how many"):
        return "open", (Qualifier("site" if asking.value == "where" else "count", asking.text),)
    behind = next((item for item in r.items if item.at >= asking.after and item.text not in ("of", "the")), None)
    if asking.value == "what" and behind is not None and behind.tag in _ASKED_FOR:
        return "open", (Qualifier(_ASKED_FOR[behind.tag], f"{asking.text} {behind.text}"),)
    return None, ()


def _with_site(name: str, qualifiers: tuple[Qualifier, ...]) -> tuple[str, tuple[Qualifier, ...]]:
    for qualifier in qualifiers:
        together = _TOGETHER.get((name, qualifier.text)) or _TOGETHER.get((name, qualifier.text.removesuffix("s")))
        if qualifier.kind == "site" and together:
            return together, tuple(other for other in qualifiers if other is not qualifier)
    return name, qualifiers


def _are_synonyms(r: Reading, found: Sequence[Item]) -> bool:
    """Whether the or stands between two words for one finding: "cracked or broken"."""
    return any(found[0].after <= item.at < found[-1].at for item in r.of("or") if found) and not r.has("not")
