"""Plain words -> what each means, misspellings mended. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from pmclip_deploy.questions.lexicon import AUXILIARIES, LIMBS, LONGEST, MEANINGS, TELLING, Site, Tag, site_of
from pmclip_deploy.questions.spelling import spelling_of

STRANGE = "strange"  # the tag of a word without a meaning; its value is the word that it looks like
BEFORE_ULTRASOUND, BEHIND_ULTRASOUND = {"a", "an", "is", "it", "this", "or", "by", "via"}, {"or", "scan", "image", "probe"}  # of "us"
ENDS = {"neck", "head"}  # of a bone, where they stand beside one
MOST_MENDED = 3  # a text with more strange words is not mended: nothing is known of it
BARE = ("skip", "people", "or", "yes or no", "wh", "kind", "not", "negative question")  # tags that say nothing of what is asked for


@dataclass(frozen=True)
class Item:
    """A phrase of the question, and its meaning."""

    tag: str
    value: str
    text: str
    at: int  # of its first word
    after: int  # of the word that follows it

    @property
    def site(self) -> Site:
        return site_of(self.value)


@dataclass(frozen=True)
class Reading:
    """A sentence and the meanings of its words, in their order; a phrase may have several."""

    words: tuple[str, ...]
    items: tuple[Item, ...]
    corrected: tuple[tuple[str, str], ...] = ()

    def of(self, *tags: str) -> list[Item]:
        return [item for item in self.items if item.tag in tags]

    def has(self, *tags: str) -> bool:
        return any(item.tag in tags for item in self.items)

    def word(self, at: int) -> str:
        return self.words[at] if 0 <= at < len(self.words) else ""

    def next_to(self, item: Item) -> list[Item]:
        """What stands right behind an item."""
        return [other for other in self.items if other.at == item.after]

    def before(self, item: Item) -> list[Item]:
        """What stands right before an item."""
        return [other for other in self.items if other.after == item.at]

    @cached_property
    def says_nothing(self) -> bool:
        return all(item.tag in BARE for item in self.items)

    @cached_property
    def asking(self) -> Item | None:
        """The word that makes an open question; "where" of "what is the location of ..."."""
        asking = self.of("wh")
        return next((item for item in asking if item.value in ("where", "how many")), asking[0] if asking else None)

    @cached_property
    def is_polite(self) -> bool:
        """A greeting or thanks, or "yes or no" behind a question."""
        return all(item.tag in ("skip", "people", "yes or no") for item in self.items) and not AUXILIARIES & {*self.words}

    @cached_property
    def is_closed(self) -> bool:
        """Whether it begins as a question for yes or no does, and not as "can you tell me ..."."""
        return self.words[0] in AUXILIARIES and not TELLING & {*self.words}


Meanings = Mapping[str, tuple[Tag, ...]]


def reading_of(words: Sequence[str], known: Meanings = MappingProxyType({})) -> Reading:
    """``known`` are phrases beside the lexicon's."""
    mended, corrected = list(words), list[tuple[str, str]]()
    loose = [item.at for item in _items(words, known) if item.tag == STRANGE]
    for at in loose if len(loose) <= MOST_MENDED else ():
        better = spelling_of(words[at]).word
        if better is not None:
            mended[at] = better
            corrected.append((words[at], better))
    return Reading(tuple(mended), tuple(_items(mended, known, len(loose) <= MOST_MENDED)), tuple(corrected))


def _items(words: Sequence[str], known: Meanings, with_near: bool = False) -> Iterator[Item]:
    at, longest = 0, max([LONGEST, *(phrase.count(" ") + 1 for phrase in known)])
    while at < len(words):
        phrases = (" ".join(words[at : at + n]) for n in range(min(longest, len(words) - at), 0, -1))
        text = next((phrase for phrase in phrases if phrase in known or phrase in MEANINGS), None)
        if text is None:
            yield Item(STRANGE, (with_near and spelling_of(words[at]).near) or "", words[at], at, at + 1)
            at += 1
            continue
        after = at + text.count(" ") + 1
        for tag, value in known.get(text) or _meant(text, words, at, after):
            yield Item(tag, value, text, at, after)
        at = after


def _meant(text: str, words: Sequence[str], at: int, after: int) -> tuple[tuple[str, str], ...]:
    """The tags of a phrase, where what stands beside it decides."""
    before, behind = words[at - 1] if at else "", words[after] if after < len(words) else ""
    if text == "us" and (at == 0 or before in BEFORE_ULTRASOUND or behind in BEHIND_ULTRASOUND):
        return (("modality", "us"),)
    if text in ("one", "another", "other") and not any(tag == "finding" for tag, _ in MEANINGS.get(behind, ())):
        return (("skip", ""),)
    of_a_bone = any(tag == "site" and site_of(value).region in LIMBS for tag, value in MEANINGS.get(before, ()))
    if text in ENDS and (behind == "of" or of_a_bone):
        return (("place", ""),)
    if text in ("or not", "yes") and after < len(words):
        return (("twisted", ""),)
    return MEANINGS[text]
