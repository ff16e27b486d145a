"""What is known of a picture, and what is replied."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pmclip_deploy.answer import Candidate, Worth
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.types import Finding, Stratum
from pmclip_deploy.header.read import Header
from pmclip_deploy.questions import Intent
from pmclip_deploy.vocabulary import FAMILIES, REGIONS, family_of_answer

# What the head is asked, in the words of its training set, to learn what a picture looks like: (kind of question, question). One wording
# for all who ask, and none that takes its answer for granted ("is this a t2 weighted image?" has the answer no throughout that set).
FACETS = {
    "modality": ("modality", "what imaging modality was used to take this image?"),
    "plane": ("plane", "in what plane is this image taken?"),
    "organ": ("organ", "what organ system is shown in the image?"),
    "contrast": ("contrast", "is this a contrast or noncontrast ct?"),
    "contrast of mr": ("contrast", "is this a contrast or noncontrast mri?"),
    "weighting": ("weighting", "what is the mr weighting in this image?"),
}
WEAKEST = 0.5  # an answer that is less likely than all others together is not given
COIN = 0.6  # of two answers, one that is less likely than this is not given
DETAIL = 0.95  # a modality within its family, contrast or MR weighting, less likely than this, is not given: docs/tried/robust-details.md
SHOWN = 0.5  # a region from this probability on is taken to be in the picture
FILM = "xr"  # the family of all pictures whose regions the graph "findings" tells apart
UNLIKE = 0.2  # a picture whose region has less than this contradicts a header that names it

OUTSIDE = "the question is outside what this model was trained on"
NOT_ENGLISH = "the question is not English; ask it in English"
NO_RADIOGRAPH = "the picture does not look like a radiology image"
NOT_VALIDATED = "whether a picture is normal is not validated for this model; ask for a finding by name"
NOT_NAMED = "too few names of abnormalities were right on validation images; ask for a finding by name"
NOT_SURE = "nothing is likelier than all else together"
NO_SIDE = "the side is read from the file alone, and it does not say"

Claim = tuple[str, str]  # (facet, value)
Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True)
class FindingScores:
    """What the graph "findings" and the bundle's probes say of a picture.

    >>> import pmclip_deploy as pm
    >>> from pmclip_deploy.models import DEMO
    >>> seen = pm.load().detect_findings(DEMO / "leg-1.dcm")
    >>> seen, seen.places["fracture"].shape
    (FindingScores(fracture, pneumonia), (20, 20))
    """

    logits: Mapping[str, float]  #: Of each finding its logit, before calibration.
    regions: Mapping[str, float]  #: Of each body region the probability that it is in the picture.
    places: Mapping[str, Any] = field(default_factory=dict)  #: Of each finding its map, (h, w) f32 logits.

    def __repr__(self) -> str:
        return f"FindingScores({', '.join(self.logits)})"


@dataclass(frozen=True)
class Evidence:
    """All that is known of a picture before a question about it is answered."""

    opinions: Mapping[str, tuple[Candidate, ...]] = field(default_factory=dict)  # of FACETS: what it looks like, the likeliest first
    header: Header = field(default_factory=Header)
    radiology: bool = True  # whether it looks like a radiology image
    findings: FindingScores | None = None  # from the network of findings, where it looked
    child: bool | None = None

    def families(self) -> dict[str, float]:
        """Modality families by what the picture looks like, the likeliest first."""
        return summed(self.opinions.get("modality", ()), family_of_answer)

    def family(self) -> str | None:
        """By the header, else by the picture where it is sure."""
        likeliest = next(iter(self.families().items()), ("", 0.0))
        return self.header.family or (likeliest[0] if likeliest[1] >= WEAKEST else None)

    def with_contrast(self) -> float | None:
        """The probability of contrast, by the picture."""
        shares = {c.answer: c.probability for c in self.opinions.get("contrast of mr" if self.family() == "mr" else "contrast", ())}
        return 1 - shares["noncontrast"] if "noncontrast" in shares else None


@dataclass(frozen=True)
class Reply:
    """An answer, or the reason why none is given."""

    answer: str | None
    probability: float | None = None  # None where the header says it, and for an abstention without candidates
    reason: str | None = None
    source: str = "picture"  # or "header"
    candidates: tuple[Candidate, ...] = ()  # what the picture looks like
    worth: Worth | None = None
    note: str | None = None


def findings_of(manifest: Manifest) -> tuple[Finding, ...]:
    """Those of the graph "findings", and those that the bundle was taught."""
    return (*(manifest.findings.findings if manifest.findings else ()), *(probe.finding for probe in manifest.probes))


def taken_for_granted(intent: Intent, evidence: Evidence) -> str | None:
    """A question about "this MRI" has no answer where the picture is a plain film."""
    for facet, value in intent.context:
        family = evidence.family()
        if facet == "modality" and family is not None and value != family and value in FAMILIES:
            says = "file says" if evidence.header.family else "picture looks like"
            return f"the question is about {FAMILIES[value].label}, and the {says} {FAMILIES[family].label}"
    return None


def not_of_this_family(kind: str, evidence: Evidence) -> str | None:
    family, of = evidence.family(), ("ct", "mr") if kind == "contrast" else ("mr",)
    if family is None or family in of or (kind == "contrast" and evidence.header.contrast is not None):
        return None
    return f"{kind} is answered for {' and '.join(FAMILIES[x].label for x in of)}, and this is {FAMILIES[family].label}"


def pictures_of_stratum(stratum: Stratum) -> str:
    what = "plain films" if stratum.family == FILM else f"{FAMILIES[stratum.family].label} pictures"
    return f"{what} of the {region_label(stratum.region)}{' of children' if stratum.children else ''}"


def region_label(region: str) -> str:
    return REGIONS[region].label if region in REGIONS else region


def listed(items: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(items))


# --- shares ---------------------------------------------------------------------------------------------------------------------


def summed(candidates: Iterable[Candidate], key: Callable[[str], Group | None]) -> dict[Group, float]:
    """The probability of each group of answers, the likeliest first; answers of no group are left out."""
    sums: dict[Group, float] = {}
    for c in candidates:
        if (group := key(c.answer)) is not None:
            sums[group] = sums.get(group, 0.0) + c.probability
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def renormalised(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    kept = list(candidates)
    total = sum(c.probability for c in kept)
    return tuple(replace(c, probability=c.probability / total) for c in kept) if total > 0 else ()


def ranked(shares: Mapping[str, float]) -> tuple[Candidate, ...]:
    return tuple(Candidate(answer, share) for answer, share in sorted(shares.items(), key=lambda item: -item[1]))
