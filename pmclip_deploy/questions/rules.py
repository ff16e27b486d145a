"""What the meanings of a question's words make together: the intent. Standard library only.

Rules rather than the text tower: they can say which word they did not understand, and a word that they do not know is never passed over
(docs/measured/questions.md compares both). Where the words fit none of the patterns, the question is asked back.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from pmclip_deploy.intent import KINDS, LANGUAGE, OUT_OF_SCOPE, Intent, unknown
from pmclip_deploy.questions.about_finding import about_finding
from pmclip_deploy.questions.about_normality import about_normality
from pmclip_deploy.questions.about_picture import FACETS, NOUNS, about_picture
from pmclip_deploy.questions.language import has_foreign_letters, is_another_language
from pmclip_deploy.questions.lexicon import AUXILIARIES
from pmclip_deploy.questions.narrowing import NEGATIVE
from pmclip_deploy.questions.reading import STRANGE, Meanings, Reading, reading_of
from pmclip_deploy.questions.text import sentences

MOST_LETTERS, MOST_WORDS = 400, 60
DOMAIN = (*FACETS, *NOUNS, "finding", "normal", "abnormal", "abnormality", "diagnosis", "bone", "picture")
_POINTING = {"this", "that", "it", "there", "these", "one", "see", "any"}


def understood(question: str, known: Meanings = MappingProxyType({})) -> Intent:
    """What a question asks. Never raises; what it cannot read is UNKNOWN and asks back. ``known`` are phrases beside the lexicon's."""
    if len(question) > MOST_LETTERS:
        return Intent(OUT_OF_SCOPE, needs="the question is too long; ask one thing in a few words")
    found = sentences(question)
    words = [word for sentence in found for word in sentence]
    if is_another_language(question, words):
        return Intent(LANGUAGE)
    if not words or len(words) > MOST_WORDS:
        return Intent(OUT_OF_SCOPE)
    if has_foreign_letters(question):
        return unknown("a letter in it is not Latin; write it anew")
    read = [reading_of(sentence, known) for sentence in found]
    read = [reading for reading in read if not reading.is_polite] or read[:1]
    if any(reading.has("beyond") for reading in read):
        return Intent(OUT_OF_SCOPE)
    if len(read) > 1:
        return Intent(OUT_OF_SCOPE, needs="one question at a time; ask each alone")
    return replace(intent_of(read[0]), corrected=read[0].corrected)


def intent_of(r: Reading) -> Intent:
    """The first rule that the words fit."""
    if r.has(STRANGE):
        return _strange(r)
    for vague in r.of("vague"):
        return unknown(vague.value)
    if r.says_nothing or not r.has(*DOMAIN):
        return _nothing(r)
    if r.words[0] == "and":
        return unknown()  # it goes on with a question that was not heard
    intent = about_finding(r) or about_normality(r) or about_picture(r) or unknown()
    if r.has("twisted", "negative question") and intent.kind in KINDS:
        return replace(intent, needs=intent.needs or NEGATIVE)
    return intent


def _strange(r: Reading) -> Intent:
    """Noise is out of scope; where something is asked of the picture, the word that is not known is named."""
    first = next((item for item in r.of(STRANGE) if item.value), r.of(STRANGE)[0])
    asks = len(r.words) > 2 and ((_POINTING | {"visible"}) & {*r.words} or (r.has("picture") and r.words[0] in AUXILIARIES))
    asks = asks or (len(r.words) == 1 and len(first.text) >= 5 and first.text.isalpha())  # a name, rather than noise
    if not (first.value or asks or r.has(*(tag for tag in DOMAIN if tag != "picture"))):
        return Intent(OUT_OF_SCOPE)
    meant = f'; if "{first.value}" is meant, write that' if first.value else "; leave it out, or ask another way"
    return unknown(f'the word "{first.text}" is not known here{meant}')


def _nothing(r: Reading) -> Intent:
    """Words that may stand in any question, and none that says what it is about: "what is this?", "why?"."""
    pointing = _POINTING & {*r.words} and (AUXILIARIES | {"what", "which"}) & {*r.words} and not r.has("count")
    narrowed = any(item.tag not in ("skip", "wh", "or", "count", "yes or no", "kind", "not") for item in r.items)
    return unknown() if pointing or narrowed or "intact" in r.words else Intent(OUT_OF_SCOPE)
