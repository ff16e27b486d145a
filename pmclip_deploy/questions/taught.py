"""Findings that a bundle was taught: which words ask for them, though the lexicon may not know them. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pmclip_deploy.intent import LANGUAGE, Intent
from pmclip_deploy.questions import Taught
from pmclip_deploy.questions.lexicon import MEANINGS, Tag, one_and_many
from pmclip_deploy.questions.reading import BARE
from pmclip_deploy.questions.text import sentences

_AROUND = {*BARE, "picture", "modality"}  # tags of the words around a finding's in a question: "is there ... on this x-ray?"
_FREE = {"finding", "vague", "beyond", "type", "severity", "age", "displacement"}  # tags of a phrase that a finding may be called by
_TURNING = {"not", "twisted", "or", "normal", "abnormal"}  # of words that a name may not hold: "no finding", "mass or nodule"


@lru_cache(16)
def meanings_of(taught: Taught) -> dict[str, tuple[Tag, ...]]:
    """The phrases that name these findings. They go before the lexicon's own of the same length."""
    out: dict[str, tuple[Tag, ...]] = {}
    for name, asked in taught:
        for phrase in filter(None, (_words(name), *map(_phrase, asked))):
            out.update(one_and_many(" ".join(phrase), (("finding", name),), "sdgixy"))
    return out


def name_of_finding(name: str) -> str:
    """As it is understood: lower case, and the lexicon's own word where it knows the finding: "PTX" -> "pneumothorax". "" for no name."""
    words = " ".join(_words(name)) if len(sentences(name)) == 1 else ""
    tags = MEANINGS.get(words, ())
    return tags[0][1] if [tag for tag, _ in tags] == ["finding"] else words


def trouble(name: str, asked: Sequence[str]) -> str | None:
    """Why a finding cannot be called so or asked for so, in one line; None where it can. ``name`` is ``name_of_finding``'s."""
    from pmclip_deploy.questions.rules import understood

    if not name or len(name) > 60 or not set(name) & set("abcdefghijklmnopqrstuvwxyz"):
        return "a finding's name is one to a few English words"
    known = meanings_of(((name, tuple(asked)),))
    by_name = ((name, question, _words(name)) for question in (name, f"is there {name}?"))
    for said, question, phrase in (*by_name, *((question, question, _phrase(question)) for question in asked)):
        if not phrase or _means_something_else(phrase, name):
            return f'"{said}" asks for something else already; use other words'
        intent = understood(question, known)
        if intent.kind == LANGUAGE:
            return f'"{said}" is not English, and questions are'
        if intent != Intent("finding", "closed", name):
            return f'"{said}" is not read as a question whether there is {name}; ask plainly, so that a yes says that it is there'
    return None


def _means_something_else(phrase: list[str], name: str) -> bool:
    tags = MEANINGS.get(" ".join(phrase), ())
    if any(tag in _TURNING for word in phrase for tag, _ in MEANINGS.get(word, ())):
        return True
    if len(tags) > 1 and any(tag == "finding" for tag, _ in tags):  # narrower than the finding: "colles fracture"
        return False
    return any(tag not in _FREE or (tag == "finding" and value != name) for tag, value in tags)


def _words(text: str) -> list[str]:
    return [word for sentence in sentences(text) for word in sentence]


def _phrase(question: str) -> list[str]:
    """The words of the finding: "is there a pneumothorax on this x-ray?" -> ["pneumothorax"]."""
    words = _words(question)
    while words and _is_around(words[0]):
        words.pop(0)
    while words and _is_around(words[-1]):
        words.pop()
    return words


def _is_around(word: str) -> bool:
    tags = MEANINGS.get(word, ())
    return bool(tags) and all(tag in _AROUND for tag, _ in tags)
