"""Protocols: which images of a study are asked about, and what."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pmclip_deploy.errors import UsageError
from pmclip_deploy.node.settings import Strict, model_from_file

MOST_QUESTIONS = 8
COMPARED = ("AE", "AS", "CS", "DS", "IS", "LO", "LT", "SH", "ST", "UI", "US", "SS", "UC", "UT")  # VRs of texts and numbers

Values = Annotated[list[str], Field(min_length=1)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,16}$")]


class Question(Strict):
    """``finding`` is a code, its scheme and its meaning, for a report's Finding."""

    id: Word
    ask: Annotated[str, Field(min_length=1, max_length=512)]
    finding: tuple[str, str, str] | None = None


class Pick(Strict):
    """Which of the images that match: of each series or of the whole study, and at most so many in all."""

    per: Literal["series", "study"] = "series"
    choose: Literal["middle", "all", "every_n", "largest"] = "middle"
    n: Annotated[int, Field(ge=1, le=10_000)] = 10  # of every_n
    max_images: Annotated[int, Field(ge=1, le=64)] = 3


class Report(Strict):
    language: Literal["en"] = "en"
    when: Literal["always", "answered"] = "always"


class Protocol(Strict):
    """``match`` and ``exclude`` name attributes by their keywords (PS3.6), each with the values that it may have, or must not have.

    Values are compared whole, without regard to case and to spaces around them. "" stands for an absent or empty attribute, and A&B for an
    attribute that has both values.
    """

    name: Word
    revision: Annotated[int, Field(ge=1)]
    match: dict[str, Values]
    exclude: dict[str, Values] = Field(default_factory=dict)
    pick: Pick = Pick()
    questions: Annotated[list[Question], Field(min_length=1, max_length=MOST_QUESTIONS)]
    report: Report = Report()

    @field_validator("match", "exclude")
    @classmethod
    def _keywords(cls, rules: dict[str, list[str]]) -> dict[str, list[str]]:
        from pydicom.datadict import dictionary_VR, tag_for_keyword

        for keyword in rules:
            if tag_for_keyword(keyword) is None:
                raise ValueError(f"there is no attribute {keyword[:64]!r}; keywords are those of PS3.6, such as BodyPartExamined")
            if dictionary_VR(keyword).split(" ")[0] not in COMPARED:
                raise ValueError(f"{keyword} has no text or number to compare")
        return rules

    @field_validator("questions")
    @classmethod
    def _unique(cls, questions: list[Question]) -> list[Question]:
        if len({question.id for question in questions}) < len(questions):
            raise ValueError("two questions have the same id")
        return questions

    @property
    def label(self) -> str:
        return f"{self.name}@{self.revision}"

    def takes(self, values: Mapping[str, tuple[str, ...]]) -> bool:
        """Whether an image with these values of its attributes, as ``values_of`` gives them, is asked about."""
        return all(_has(values.get(keyword, ()), wanted) for keyword, wanted in self.match.items()) and not any(
            _has(values.get(keyword, ()), refused) for keyword, refused in self.exclude.items()
        )


def _has(values: tuple[str, ...], wanted: Iterable[str]) -> bool:
    return any(all(_normal(part) in values for part in one.split("&")) if one.strip() else not values for one in wanted)


def _normal(text: str) -> str:
    return " ".join(text.split()).upper()


def values_of(dataset: Any, keywords: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Of each attribute its values that are not empty, in capitals. An attribute that cannot be read has none."""
    found = {}
    for keyword in keywords:
        try:
            value = dataset.get(keyword)
            each = value if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue" else [value]
            found[keyword] = tuple(text for text in (_normal(str(one)) for one in each if one is not None) if text)
        except Exception:  # pydicom raises many kinds for what a value may be
            found[keyword] = ()
    return found


def protocols_from_files(paths: Sequence[Path]) -> list[Protocol]:
    """Raises UsageError with the first fault."""
    protocols = [model_from_file(Protocol, path) for path in paths]
    for i, protocol in enumerate(protocols):
        if any(protocol.name == other.name for other in protocols[:i]):
            raise UsageError(f"{paths[i]}: another protocol is named {protocol.name} too", "give each a name of its own")
    return protocols


def keywords_of(protocols: Iterable[Protocol]) -> set[str]:
    return {keyword for protocol in protocols for keyword in (*protocol.match, *protocol.exclude)}


@dataclass(frozen=True)
class Candidate:
    """An image that may be picked."""

    id: int
    series: str
    sop: str
    place: float  # along the normal of its series' planes, else its Instance Number
    pixels: int = 0  # rows times columns


def picked(pick: Pick, candidates: Iterable[Candidate]) -> list[Candidate]:
    """In an order that does not depend on that of arrival. With more than ``max_images`` the chosen ones are spread evenly."""
    groups: dict[str, list[Candidate]] = {}
    for one in sorted(candidates, key=lambda one: (one.series, one.place, one.sop)):
        groups.setdefault(one.series if pick.per == "series" else "", []).append(one)
    chosen = [one for group in groups.values() for one in _of_group(pick, group)]
    if len(chosen) <= pick.max_images:
        return chosen
    step = len(chosen) / pick.max_images
    return [chosen[math.floor((i + 0.5) * step)] for i in range(pick.max_images)]


def _of_group(pick: Pick, group: list[Candidate]) -> list[Candidate]:
    if pick.choose == "all":
        return group
    if pick.choose == "every_n":
        return group[pick.n // 2 :: pick.n] or [group[len(group) // 2]]
    if pick.choose == "largest":
        return [max(group, key=lambda one: one.pixels)]
    return [group[len(group) // 2]]
