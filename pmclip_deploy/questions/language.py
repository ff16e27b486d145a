"""Whether a question is English: its script, and words that English has not (`foreign.txt`). Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from pmclip_deploy.questions.lexicon import tables_from_text
from pmclip_deploy.questions.text import marks_of_another_language, scripts

_ROWS = {tag: rows for tag, rows in tables_from_text("foreign.txt") if rows}
ENGLISH = frozenset(_ROWS.pop("english")[0][1])
FOREIGN = frozenset(word for rows in _ROWS.values() for _, words in rows for word in words)


def is_another_language(question: str, words: Sequence[str]) -> bool:
    """Whether the question is written in another script, or holds as many words of another language as plain words of English."""
    latin, greek_or_cyrillic, _, other = scripts(question)
    if other or greek_or_cyrillic > latin or marks_of_another_language(question):
        return True
    foreign = sum(word in FOREIGN for word in words)
    return foreign > 0 and foreign >= sum(word in ENGLISH for word in words)


def has_foreign_letters(question: str) -> bool:
    """Whether letters that are not Latin stand in it: a look-alike within a word is no misspelling."""
    _, greek_or_cyrillic, mixed, other = scripts(question)
    return greek_or_cyrillic + mixed + other > 0
