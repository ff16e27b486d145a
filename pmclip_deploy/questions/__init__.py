"""Question -> intent: what is asked, before it is answered. Standard library only.

    >>> from pmclip_deploy.questions import understood
    >>> understood("is the bone intact?").polarity
    False

A question passes through `text` (plain words), `language` (English or not), `reading` (the meaning of each word by `lexicon`, misspellings
mended by `spelling`) and `rules` (what the meanings make together). Findings that a bundle was taught (`taught`) are words beside the
lexicon's. docs/reference/questions.md describes all of it.
"""

from collections.abc import Sequence

from pmclip_deploy.intent import KINDS, LANGUAGE, OUT_OF_SCOPE, UNKNOWN, Intent, Qualifier

Taught = tuple[tuple[str, tuple[str, ...]], ...]

__all__ = ["KINDS", "LANGUAGE", "OUT_OF_SCOPE", "UNKNOWN", "Intent", "Qualifier", "Taught", "may_show", "nearest", "understood"]


def understood(question: str, taught: Taught = ()) -> Intent:
    """What a question asks. Never raises; what it cannot read is UNKNOWN and asks back.

    ``taught`` are the findings that the bundle was taught: (name, questions about it) each.
    """
    from pmclip_deploy.questions import rules  # the lexicon takes 20 ms to build, and --help does without

    if not taught:
        return rules.understood(question)
    from pmclip_deploy.questions.taught import meanings_of

    return rules.understood(question, meanings_of(taught))


def may_show(picture: str, site: str) -> bool:
    """Whether a picture of one region may show another: a hand film shows the end of the forearm, and no rib."""
    from pmclip_deploy.questions import lexicon

    return lexicon.may_show(picture, site)


def nearest(question: str, askable: Sequence[str]) -> list[str]:
    """The three of ``askable`` that are nearest to a question in what they mean, the nearest first."""
    from pmclip_deploy.questions import near

    return near.nearest(question, askable)
