"""Question -> plain words: one case, one alphabet, contractions and signs spelt out. Standard library only."""

from __future__ import annotations

import re
import unicodedata

LETTERS = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ı": "i", "ß": "ss", "æ": "ae", "œ": "oe", "’": "'", "‘": "'", "`": "'", "´": "'"})
_NOT = "isn|aren|wasn|weren|doesn|don|didn|can|couldn|hasn|haven|hadn|won|wouldn|shouldn|ain|mustn|needn"
_IS = "there|what|where|it|that|this|who|how|when|here|everything|anything|something|nothing|he|she"
_SPELT_OUT = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (r"\b([a-z])\.([a-z])\.(?:([a-z])\.)?", r"\1\2\3 "),  # c.t., i.v., p.a.
        (rf"\b({_NOT})'?t\b", r"\1t"),  # one word each: what they turn round is not always plain
        (r"\bcannot\b", "can not"),
        (rf"\b({_IS})'?s\b", r"\1 is"),
        (r"\b(i)'(m|d|ve|ll)\b", r"\1"),
        (r"\b(we|you|they)'(re|d|ve|ll)\b", r"\1"),
        (r"(?<=\w)'s\b|(?<=s)'(?!\w)", ""),
        (r"\bw/o\b", "without"),
        (r"\bw/(?=\s*\w)", "with "),
        (r"\br\s?/\s?o\b", "rule out"),
        (r"\bc/w\b", "consistent with"),
        (r"\by\s?/\s?n\b|\byes\s?/\s?no\b", " yes or no "),
        (r"\band\s?/\s?or\b", " or "),
        (r"\b(is|are|was)\s?/\s?(is|are|were)\b", r"\1"),
        (r"\bnear\s?/\s?in\b", "in"),
        (r"\borgans?/organs?\b", "organ"),
        (r"\bt2\s?\*", "t2star"),
        (r"\b(vs|dr|approx)\.", r"\1 "),
        (r"\bpet\s?/\s?ct\b", "pet ct"),
        (r"(?<=\w)/(?=\w)|\s/\s", " or "),
        (r"&", " and "),
        (r"\b(image|slice|picture|frame|film|series|case|patient|question|number)\s?#", r"\1 number "),
        (r"(?<=\b[a-z])#", " number "),  # C#
        (r"##+", " "),
        (r"#s?(?![a-z]*#)", " fx "),  # the sign for a fracture: #NOF, NOF#, rib #s
        (r"\bx[\s-]?rays?\b", "xray"),
    )
)
# "..., right?": after a clause it asks for assent; after "fracture" alone it is a side.
_ASSENT = re.compile(
    r"(?<=\w)\s*,\s*(right|correct|isnt it|is it|isnt there|is there|arent there|are there|isnt that right|yes|no|ok|okay)\W*$"
)
_CLAUSE = re.compile(r"\b(is|are|was|were|has|have|does|shows?|no|not|nothing|without)\b")
_LABEL = re.compile(r"^\W*(?:(?:q|question)\s?\d*\s?[:.)]|\d{1,2}\s?[.)](?!\d))\s*")
_SENTENCES = re.compile(r"[.?!;\n]+(?:\s+|$)|[?!]+")
_ACCENTED = re.compile(r"(?<!\w)[éèàùó](?!\w)")


def plain(question: str) -> str:
    """Lower case, without accents, formatting characters and compatibility forms: full-width letters are letters."""
    text = unicodedata.normalize("NFKC", question).casefold().translate(LETTERS)
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) not in ("Mn", "Cf"))
    return "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") and c != "\n" else c for c in text)


def sentences(question: str) -> list[list[str]]:
    """The words of each sentence that has any."""
    text = _LABEL.sub("", plain(question).strip())
    for pattern, spelt in _SPELT_OUT:
        text = pattern.sub(spelt, text)
    assent = _ASSENT.search(text)
    if assent and (assent[1] != "right" or _CLAUSE.search(text[: assent.start()])):
        text = text[: assent.start()]
    found = (re.findall(r"[a-z0-9]+", sentence) for sentence in _SENTENCES.split(text))
    return [words for words in found if words]


def scripts(question: str) -> tuple[int, int, int, int]:
    """How many words are Latin, Greek or Cyrillic, a mixture of these, and with a letter of any other script."""
    latin = relative = mixed = other = 0
    for word in re.findall(r"[^\W\d_]+", unicodedata.normalize("NFKC", question)):
        of = {unicodedata.name(c, "?").partition(" ")[0] for c in word}
        if of <= {"LATIN"}:
            latin += 1
        elif of <= {"LATIN", "GREEK", "CYRILLIC"}:
            mixed, relative = mixed + ("LATIN" in of), relative + ("LATIN" not in of)
        else:
            other += 1
    return latin, relative, mixed, other


def marks_of_another_language(question: str) -> bool:
    """Signs that English has not: a question turned upside down, an accented letter that stands alone."""
    return "¿" in question or "¡" in question or _ACCENTED.search(unicodedata.normalize("NFC", question).casefold()) is not None
