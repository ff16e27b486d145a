"""The questions that can be asked which are nearest to one that cannot. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache

from pmclip_deploy.questions.lexicon import BEYOND
from pmclip_deploy.questions.reading import BARE, STRANGE, reading_of
from pmclip_deploy.questions.text import sentences

NEAREST = 3
# What a question is about, by the tags of its words, weighs more than which words they are; the spelling decides between equals.
_ABOUT = {
    "finding": "finding", "normal": "normal", "abnormal": "normal", "abnormality": "normal", "diagnosis": "normal", "modality": "modality",
    "technique": "modality", "technique noun": "modality", "plane": "plane", "projection": "plane", "plane noun": "plane", "organ": "organ",
    "organ noun": "organ", "site": "organ", "contrast": "contrast", "weighting": "weighting", "weight noun": "weighting", "side": "side",
    "side noun": "side",
}  # fmt: skip


def nearest(question: str, askable: Sequence[str]) -> list[str]:
    """The three of ``askable`` nearest to the question, the nearest first; equals keep their order."""
    about, what, text = _concepts(question)

    def likeness(other: str) -> float:
        about_other, what_other, text_other = _concepts(other)
        return 2 * _share(about, about_other) + 3 * _share(what, what_other) + SequenceMatcher(None, text, text_other).ratio()

    return sorted(dict.fromkeys(askable), key=likeness, reverse=True)[:NEAREST]


@lru_cache(256)
def _concepts(question: str) -> tuple[frozenset[str], frozenset[str], str]:
    """(what it is about, what it names, its plain words)."""
    items = [item for words in sentences(question[:400]) for item in reading_of(words[:60]).items]
    items += [item for vague in items if vague.tag == "vague" for words in sentences(vague.value) for item in reading_of(words).items]
    about = frozenset(_ABOUT[item.tag] for item in items if item.tag in _ABOUT)
    what = frozenset(item.value or item.text for item in items if item.tag not in (*BARE, STRANGE) and item.text not in BEYOND)
    near = frozenset(item.value for item in items if item.tag == STRANGE and item.value)
    return about, what | near, " ".join(item.text for item in items)


def _share(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0
