"""Question -> intent: what is asked, before it is answered. Standard library only.

    >>> from pmclip_deploy.questions import understood
    >>> understood("is the bone intact?").polarity
    False

Docs: docs/questions.md. A question passes through `text` (plain words), `language` (English or not), `reading` (the meaning of each word by
`lexicon`, misspellings mended by `spelling`) and `rules` (what the meanings make together).
"""

from collections.abc import Sequence

from pmclip_deploy.questions.intent import KINDS, LANGUAGE, OUT_OF_SCOPE, UNKNOWN, Intent, Qualifier

__all__ = ["KINDS", "LANGUAGE", "OUT_OF_SCOPE", "UNKNOWN", "Intent", "Qualifier", "may_show", "nearest", "understood"]


def understood(question: str) -> Intent:
    """What a question asks. Never raises; what it cannot read is UNKNOWN and asks back."""
    from pmclip_deploy.questions import rules  # the lexicon takes 20 ms to build, and --help does without

    return rules.understood(question)


def may_show(picture: str, site: str) -> bool:
    """Whether a picture of one region may show another: a hand film shows the end of the forearm, and no rib."""
    from pmclip_deploy.questions import lexicon

    return lexicon.may_show(picture, site)


def nearest(question: str, askable: Sequence[str]) -> list[str]:
    """The three of ``askable`` that are nearest to a question in what they mean, the nearest first."""
    from pmclip_deploy.questions import near

    return near.nearest(question, askable)
