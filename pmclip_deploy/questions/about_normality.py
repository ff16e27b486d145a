"""Questions whether a picture is normal, and what is wrong with it. Standard library only."""

from __future__ import annotations

from pmclip_deploy.intent import OUT_OF_SCOPE, Intent, Qualifier, unknown
from pmclip_deploy.questions.narrowing import BOTH_SIDES, NEGATIVE, context_of, qualifiers_of, turn
from pmclip_deploy.questions.reading import Item, Reading


def about_normality(r: Reading) -> Intent | None:
    normal, wrong, named = r.of("normal"), r.of("abnormal", "abnormality"), r.of("diagnosis")
    asking = r.asking
    if not (normal or wrong or named):
        return None
    if not normal and (named or wrong) and (asking or not wrong):
        return unknown() if r.is_closed and not asking else _what_is_wrong(r, asking)
    if asking or r.has("organ"):
        return unknown()
    return _normal_or_not(r, bool(normal), bool(wrong))


def _normal_or_not(r: Reading, normal: bool, wrong: bool) -> Intent:
    """Polarity True: a yes says that it is normal."""
    qualifiers = (*qualifiers_of(r), *(Qualifier("site", item.text) for item in r.of("bone")))
    plain, needs = turn(r)
    if normal and wrong and r.has("or"):
        return Intent("normal", "choice", qualifiers=qualifiers, context=context_of(r), needs=needs)
    if (normal and wrong) or r.has("or"):
        return unknown()
    if r.has("not") and normal != (r.of("not")[0].value == "not"):
        needs = needs or NEGATIVE  # "no normal ...", "not abnormal"; "not normal" and "no abnormality" are plain
    return Intent("normal", "closed", None, normal == plain, (), qualifiers, context_of(r), needs=needs)


def _what_is_wrong(r: Reading, asking: Item | None) -> Intent:
    if asking is not None and asking.value in ("how", "describe"):
        return Intent(OUT_OF_SCOPE)
    needs = NEGATIVE if r.has("not") else BOTH_SIDES if r.has("or") else None
    return Intent("abnormality", "open", qualifiers=(*_asked_for(r, asking), *qualifiers_of(r)), context=context_of(r), needs=needs)


def _asked_for(r: Reading, asking: Item | None) -> tuple[Qualifier, ...]:
    """The place, side or number, where an open question asks for that."""
    if asking is None:
        return ()
    if asking.value in ("where", "how many"):
        return (Qualifier("site" if asking.value == "where" else "count", asking.text),)
    behind = next((item for item in r.items if item.at >= asking.after and item.tag != "skip"), None)
    if behind is None or behind.tag not in ("site", "organ noun", "side noun", "bone"):
        return ()
    return (Qualifier("side" if behind.tag == "side noun" else "site", f"{asking.text} {behind.text}"),)
