"""A misspelt word -> the word that was meant, or none. Standard library only.

A wrong correction makes a wrong answer, so a word is mended only where nothing else can have been meant:

- it begins with the right letter, or its first two are swapped;
- it is one slip away: a letter too many, too few, wrong, or two swapped (two slips make "thrombosis" of "thrombolysis");
- nothing else in the lexicon, and no other word of English in `confusable.txt`, is as near;
- words that turn an answer round ("not", "intact", "normal") are never guessed: `typos.txt` lists their slips.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from pmclip_deploy.questions.language import FOREIGN
from pmclip_deploy.questions.lexicon import MEANINGS, WORDS, tables_from_text, words_of

LEAST = 5  # letters of a word that is mended
LONG = 8  # letters of a word that another within two slips is said to look like
MENDED = {  # the tags whose words a misspelling may be read as
    "finding", "modality", "technique", "plane", "projection", "weighting", "contrast", "site", "side", "picture", "organ", "abnormality",
    "diagnosis", "technique noun", "plane noun", "organ noun", "weight noun",
}  # fmt: skip
COMMON = {"there", "which", "image", "picture", "shown", "visible", "evidence", "please", "taken", "plane", "organ", "system"}


@dataclass(frozen=True)
class Spelling:
    """A word that the lexicon lacks."""

    word: str | None  # what it is read as
    near: str | None = None  # what it looks like, and may not be read as


@lru_cache(1024)
def spelling_of(word: str) -> Spelling:
    """How a word that the lexicon lacks is read. Nothing is made of words of other languages, digits, and confusable words."""
    if word in _typos():
        return Spelling(_typos()[word])
    if len(word) < LEAST or not word.isalpha():
        return Spelling(None)
    found = _near(word, 1 if len(word) < LONG - 1 else 2)
    likely = [other for slips, other in found if other in targets() and (slips == 1 or len(other) >= LONG)]
    near = None if word in WORDS else next((other for other in likely if other[0] == word[0]), None)
    one_slip_away = [other for slips, other in found if slips == 1]
    if word in WORDS or word in FOREIGN or _is_confusable(word) or len(one_slip_away) != 1 or one_slip_away[0] not in targets():
        return Spelling(None, near)
    best = one_slip_away[0]
    begins = word[0] == best[0] or (word[1], word[0]) == (best[0], best[1])
    return Spelling(best if begins else None, near)


@cache
def confusable() -> frozenset[str]:
    """Words of English that lie near a word of the lexicon and are not it: `python -m pmclip_deploy.benchmarks.questions --confusable`."""
    return frozenset(word.rstrip("*") for word in _confusable())


def _is_confusable(word: str) -> bool:
    """In the list, or a plural or another form of a word in it."""
    stems = (word, *(word.removesuffix(end) for end in ("s", "es", "ed", "d", "ing", "ly", "al")))
    return any(stem in confusable() for stem in stems)


@cache
def _confusable() -> tuple[str, ...]:
    """The rare ones end in a star: nobody means them by a slip, but who writes them means them."""
    return tuple((Path(__file__).parent / "confusable.txt").read_text(encoding="utf-8").split())


@cache
def _typos() -> dict[str, str]:
    return {slip: word for _, rows in tables_from_text("typos.txt") for word, slips in rows for slip in slips}


@cache
def targets() -> frozenset[str]:
    """The words that a misspelling may be read as: long ones of what can be asked, and a few of the sentence."""
    asked = {word for phrase, tags in MEANINGS.items() if {tag for tag, _ in tags} <= MENDED for word in phrase.split()}
    never = words_of("not", "twisted", "normal", "abnormal", "skip", "beyond", "negative question")
    return frozenset(word for word in asked - never if len(word) > LEAST and word.isalpha()) | COMMON


@cache
def _by_length() -> dict[int, list[tuple[int, str]]]:
    """Length -> (letters as bits, word) of all that a word may be taken for."""
    out: dict[int, list[tuple[int, str]]] = {}
    for word in sorted({*WORDS, *_confusable()}):
        if word[-1] != "*":
            out.setdefault(len(word), []).append((_bits(word), word))
    return out


def _near(word: str, most: int) -> list[tuple[int, str]]:
    """(slips, word) of all within ``most`` slips, the nearest first; of those that begin otherwise, within one."""
    bits, begins = _bits(word), {word[0], word[1]}
    near = (_by_length().get(n, ()) for n in range(len(word) - most, len(word) + most + 1))
    alike = [
        other
        for words in near
        for letters, other in words
        if (apart := (bits ^ letters).bit_count()) <= 2 or (apart <= 2 * most and other[0] in begins)
    ]
    return sorted((slips, other) for other in alike if (slips := slips_between(word, other, most if other[0] in begins else 1)) <= most)


def _bits(word: str) -> int:
    bits = 0
    for letter in word:
        bits |= 1 << (ord(letter) & 31)
    return bits


def slips_between(a: str, b: str, most: int) -> int:
    """Letters to insert, delete, replace or swap with the next (optimal string alignment), or any number above ``most``."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        if min(row) > most:
            return most + 1
        before, last = last, row
    return last[-1]
