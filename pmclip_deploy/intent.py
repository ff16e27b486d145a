"""What a question asks, as a value: frozen data and its JSON form. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# What a kind asks for, in the order in which a question that asserts several facets takes its kind: the narrowest first.
KINDS = ("finding", "normal", "abnormality", "weighting", "contrast", "plane", "laterality", "modality", "organ")
UNKNOWN, OUT_OF_SCOPE, LANGUAGE = "unknown", "out of scope", "language"  # what is never answered


@dataclass(frozen=True)
class Qualifier:
    """A word that narrows a finding: "displaced", "left", "hip", "new since the prior"."""

    kind: str  # "site", "side", "age", "displacement", "severity", "comparison", "count", "type", "certainty"
    text: str  # as it was asked, corrected where it was misspelt; "where", "how many" in an open question
    value: str | None = None  # in words of `vocabulary` (site: a key of REGIONS; side: "left", "right", "both"); None where there is none
    exact: bool = False  # whether the value says all that the text says: "hip" does, "scaphoid" is less than the region "hand"


@dataclass(frozen=True)
class Intent:
    """A question as it was understood.

    It may be answered only if ``answerable``. ``polarity`` False turns the answer round: a yes to "is the bone intact?" says that there
    is no fracture, a yes to "is this abnormal?" (kind "normal") that the picture is not normal.
    """

    kind: str  # of KINDS, or UNKNOWN, OUT_OF_SCOPE, LANGUAGE
    form: str | None = None  # "open", "closed", "choice"; None for what is never answered
    finding: str | None = None
    polarity: bool = True
    asked: tuple[tuple[str, str], ...] = ()  # (facet, value): all that a closed question asserts, or what a choice offers
    qualifiers: tuple[Qualifier, ...] = ()
    context: tuple[tuple[str, str], ...] = ()  # (facet, value) that the question takes for granted: "does this MRI show ..."
    corrected: tuple[tuple[str, str], ...] = ()  # (as written, as read), for each misspelt word
    needs: str | None = None  # one sentence that asks back, where the question cannot be answered as it stands

    @property
    def answerable(self) -> bool:
        return self.kind in KINDS and self.needs is None

    def to_json(self) -> dict[str, Any]:
        """The fields by name; pairs become lists in JSON."""
        return asdict(self)


ASK_PLAINLY = 'it is not plain what is asked; ask, for example, "is there a fracture?" or "what imaging modality is shown?"'


def unknown(needs: str = ASK_PLAINLY) -> Intent:
    return Intent(UNKNOWN, needs=needs)
