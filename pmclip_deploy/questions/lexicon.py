"""The words that a question may hold, and what each means: `lexicon.txt` and the words of `vocabulary` together. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pmclip_deploy.body_parts import PARTS
from pmclip_deploy.vocabulary import FAMILIES, MUSCULOSKELETAL, PLANES, PROJECTIONS, REGIONS

Tag = tuple[str, str]  # what a phrase is, and which: ("finding", "fracture"), ("side", "left"), ("skip", "")
Table = list[tuple[str, list[str]]]  # (value, phrases)


@dataclass(frozen=True)
class Site:
    """A place of the body as a question names it."""

    region: str | None  # of REGIONS; None where it may lie in several
    part: str | None = None  # the label of the part, where it is less than the region
    inside: bool = False  # an organ inside the body: that it is in view does not tell what the picture is of

    @property
    def value(self) -> str:
        """Of a "site" tag; `site_of` reads it."""
        return f"{self.region or ''}|{self.part or ''}|{'inside' if self.inside else ''}"


def site_of(value: str) -> Site:
    region, part, inside = value.split("|")
    return Site(region or None, part or None, bool(inside))


def tables_from_text(name: str) -> list[tuple[str, Table]]:
    """(tag, rows) of each table of a file beside this one, as its first lines describe it."""
    tables: list[tuple[str, Table]] = [("", [])]
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    for line in text.replace("\n    ", " ").splitlines():
        if line.startswith("["):
            tables.append((line[1:-1], []))
        elif line and not line.startswith("#"):
            value, _, phrases = line.rpartition(": ")
            tables[-1][1].append((value, phrases.split(", ")))
    return tables


TABLES = tables_from_text("lexicon.txt")
ROWS: dict[str, Table] = {}
for _tag, _rows in TABLES:
    ROWS.setdefault(_tag, []).extend(_rows)


def words_of(*tags: str) -> frozenset[str]:
    """All single words of the phrases of these tables."""
    return frozenset(word for tag in tags for _, phrases in ROWS[tag] for phrase in phrases for word in phrase.split())


QUALIFIERS = ("age", "displacement", "severity", "certainty", "comparison", "count", "type")  # the tags of words that narrow a finding
SIMPLE = {  # the tables whose rows are (value, phrases) of the tag and no more
    *QUALIFIERS, "skip", "people", "beyond", "organ", "projection", "plane", "weighting", "contrast", "side", "not", "finding", "wh",
    "ordinal", "place", "picture", "technique noun", "plane noun", "organ noun", "side noun", "weight noun", "kind", "normal", "abnormal",
    "abnormality", "diagnosis", "twisted", "or", "bone", "every", "yes or no", "vague", "negative question",
}  # fmt: skip
WHOLE, BROKEN, NO_BONES, BONY = (frozenset(ROWS[tag][0][1]) for tag in ("whole", "broken", "no bone", "bony"))
AUXILIARIES, TELLING, TAKING = (frozenset(ROWS[tag][0][1]) for tag in ("auxiliary", "telling", "taking"))
BEYOND = words_of("beyond")
LIMBS = frozenset({"hand", "forearm", "elbow", "humerus", "shoulder", "hip", "femur", "leg", "spine"})
# Short words of FAMILIES that mean other things too; `reading` looks at what stands beside "us".
NOT_WORDS = {"us", "pt", "film", "nm", "rf", "mg", "xa"}
NEIGHBOURS = frozenset(frozenset(pair.split("-")) for pair in ROWS["neighbours"][0][1])


def may_show(picture: str, site: str) -> bool:
    """Whether a picture of one region may show another: a hand film shows the end of the forearm, and no rib."""
    return picture == site or frozenset({picture, site}) in NEIGHBOURS


def _plain(words: Iterable[str]) -> Iterable[str]:
    """In the words that `text.sentences` gives: "x-ray" -> "xray"."""
    for phrase in words:
        yield " ".join(phrase.replace("-", " ").replace(".", " ").replace("x rays", "xray").replace("x ray", "xray").split())


def one_and_many(phrase: str, tags: tuple[Tag, ...], last: str = "sxiyh") -> Iterable[tuple[str, tuple[Tag, ...]]]:
    yield phrase, tags
    if phrase[-1] not in last:
        yield phrase + "s", tags


def _sites() -> Iterable[tuple[str, tuple[Tag, ...]]]:
    for region, phrases in ROWS["site"]:
        for phrase in phrases:
            site = Site(None, phrase) if region == "?" else Site(region, phrase, region not in LIMBS)
            yield from one_and_many(phrase, (("site", site.value),))
    for name, whole in REGIONS.items():
        for phrase in _plain(whole.words):
            yield phrase, (("site", Site(name, phrase).value),)
    for part in PARTS:
        inside = MUSCULOSKELETAL not in part.organs and not {"breast", *LIMBS} & {*part.regions}
        if len(part.regions) > 1:  # "chest and abdomen" is both of them
            sites = [Site(region) for region in part.regions]
        else:
            sites = [Site(next(iter(part.regions), None), part.label, inside)]
        for phrase in _plain(part.words):
            yield from one_and_many(phrase, tuple(("site", site.value) for site in sites))
    for name, whole in REGIONS.items():
        for phrase in _plain(whole.words):
            if phrase in WHOLE:
                yield phrase, (("site", Site(name).value),)
    for level in (*(f"c{n}" for n in range(1, 8)), *(f"t{n}" for n in range(3, 13)), *(f"l{n}" for n in range(1, 6)), "s1", "s2"):
        yield level, (("site", Site("spine", level).value),)


def _pictures() -> Iterable[tuple[str, tuple[Tag, ...]]]:
    for name, family in FAMILIES.items():
        for phrase in _plain(word for word in family.words if word not in NOT_WORDS):
            yield phrase, (("modality", name),)
    for name, words in PLANES.items():
        for phrase in _plain(words):
            yield phrase, (("plane", name),)
    for name, (_, *views) in PROJECTIONS.items():
        for phrase in _plain(views):
            yield phrase, (("projection", name),)
    for value, phrases in ROWS["modality"]:  # "modality:xr, region:chest"
        pairs = tuple((tag, name) for tag, _, name in (pair.partition(":") for pair in value.split(", ")))
        tags = tuple(("site", Site(name).value) if tag == "region" else (tag, name) for tag, name in pairs)
        for phrase in phrases:
            yield phrase, tags


def _composed(known: dict[str, tuple[Tag, ...]]) -> Iterable[tuple[str, tuple[Tag, ...]]]:
    """What means several things at once."""
    for finding, phrases in ROWS["without"]:
        for phrase in phrases:
            yield phrase, (("not", "without"), ("finding", finding))
    alone = set(ROWS["named alone"][0][1])
    for region, phrases in ROWS["eponym"]:
        for phrase in phrases:
            tags: tuple[Tag, ...] = (("type", ""), ("site", Site(region, phrase).value))
            fracture = (("finding", "fracture"), *tags)
            yield phrase, fracture if phrase in alone else tags
            yield f"{phrase} fracture", fracture
    for value, phrases in ROWS["short"]:
        finding, _, more = value.partition(" | ")
        for phrase in phrases:
            yield phrase, (("finding", finding), *known[more])
    for agent in ("contrast", "iv contrast", "contrast agent", "intravenous contrast", "dye", "gadolinium"):
        yield f"with or without {agent}", (("contrast", "with"), ("or", ""), ("contrast", "without"))


def _meanings() -> dict[str, tuple[Tag, ...]]:
    known = dict(_sites()) | dict(_pictures())
    for tag, rows in TABLES:
        for value, phrases in rows if tag in SIMPLE else ():
            for phrase in phrases:
                known.update(one_and_many(phrase, ((tag, value),), "sdgixy") if tag == "finding" else [(phrase, ((tag, value),))])
    known.update(_composed(known))
    return known | {phrase: (("skip", ""),) for phrase in ROWS["phrases"][0][1]}


MEANINGS = _meanings()
LONGEST = max(phrase.count(" ") for phrase in MEANINGS) + 1
WORDS = frozenset(word for phrase in MEANINGS for word in phrase.split())
