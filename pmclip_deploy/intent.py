"""What a question asks, as a value: frozen data and its JSON form. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# What a kind asks for, in the order in which a question that asserts several facets takes its kind: the narrowest first.
KINDS = ("finding", "normal", "abnormality", "weighting", "contrast", "plane", "laterality", "modality", "organ")
UNKNOWN, OUT_OF_SCOPE, LANGUAGE = "unknown", "out of scope", "language"  # what is never answered


@dataclass(frozen=True)
class Qualifier:
    """A word that narrows a finding: "displaced", "left", "hip", "new since the prior".

    >>> import pmclip_deploy as pm
    >>> pm.Qualifier("side", "left", "left", exact=True)
    Qualifier(side 'left')
    """

    kind: str  #: "site", "side", "age", "displacement", "severity", "comparison", "count", "type" or "certainty".
    text: str  #: As it was asked, corrected where it was misspelt; "where" or "how many" in an open question.
    value: str | None = None  #: The region of a site ("hand"), or the side: "left", "right", "both"; None where there is none.
    exact: bool = False  #: Whether the value says all that the text says: "hip" does, "scaphoid" is less than the region "hand".

    def __repr__(self) -> str:
        return f"Qualifier({self.kind} {self.text!r})"


@dataclass(frozen=True)
class Intent:
    """A question as it was understood.

    It may be answered only if ``answerable``. ``polarity`` False turns the answer round: a yes to "is the bone intact?" says that there
    is no fracture, a yes to "is this abnormal?" (kind "normal") that the picture is not normal.

    >>> import pmclip_deploy as pm
    >>> pm.load().ask("scan.dcm", "is there a displaced fracture?").understood_as
    Intent(finding 'fracture', closed, polarity=True, [Qualifier(displacement 'displaced')])
    """

    kind: str  #: One of ``intent.KINDS``; "unknown", "out of scope" and "language" are never answered.
    form: str | None = None  #: "open", "closed" or "choice"; None for what is never answered.
    finding: str | None = None  #: Its name, "fracture", where the question is about one.
    polarity: bool = True  #: Whether a yes says that it is there.
    asked: tuple[tuple[str, str], ...] = ()  #: (facet, value): all that a closed question asserts, or what a choice offers.
    qualifiers: tuple[Qualifier, ...] = ()  #: What narrows the finding.
    context: tuple[tuple[str, str], ...] = ()  #: (facet, value) that the question takes for granted: "does this MRI show ...".
    corrected: tuple[tuple[str, str], ...] = ()  #: (as written, as read), for each misspelt word.
    needs: str | None = None  #: One sentence that asks back, where the question cannot be answered as it stands.

    def __repr__(self) -> str:
        narrowed = f", {list(self.qualifiers)}" if self.qualifiers else ""
        what = self.kind if self.finding is None else f"{self.kind} {self.finding!r}"
        return (
            f"Intent({what}, {self.form}, polarity={self.polarity}{narrowed})"
            if self.answerable
            else f"Intent({what}, needs={self.needs!r})"
        )

    @property
    def answerable(self) -> bool:
        """Whether it is of a kind that may be answered, and needs nothing more."""
        return self.kind in KINDS and self.needs is None

    def to_json(self) -> dict[str, Any]:
        """The fields by name; pairs become lists in JSON."""
        return asdict(self)


ASK_PLAINLY = 'it is not plain what is asked; ask, for example, "is there a fracture?" or "what imaging modality is shown?"'


def unknown(needs: str = ASK_PLAINLY) -> Intent:
    return Intent(UNKNOWN, needs=needs)
