"""What is given as an answer: from the question as it was understood, what the file says, and what the picture looks like.

    Intent + Evidence -> Reply

The rules are pure: no graph runs here. An answer comes from the file's header and says so, or from the picture where that has earned it
on validation images; everything else is an abstention with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.decision.claims import choice_reply, closed_reply, facet_of_claim
from pmclip_deploy.decision.evidence import (
    FACETS,
    NO_RADIOGRAPH,
    NOT_ENGLISH,
    NOT_NAMED,
    NOT_VALIDATED,
    OUTSIDE,
    Evidence,
    Reply,
    findings_of,
    not_of_this_family,
    taken_for_granted,
)
from pmclip_deploy.decision.facets import OPEN
from pmclip_deploy.decision.findings import finding_reply
from pmclip_deploy.header.read import contradiction
from pmclip_deploy.questions import LANGUAGE, OUT_OF_SCOPE, Intent, Taught, nearest, understood


def facets_of(intents: Iterable[Intent]) -> set[str]:
    """The opinions that questions need. A finding needs the modality, which the header may contradict."""
    needed = set()
    for intent in intents:
        if intent.answerable and intent.kind not in ("normal", "abnormality", "laterality"):
            facets = {"modality", *(facet_of_claim(facet) for facet, _ in intent.asked), intent.kind}
            needed |= facets & set(FACETS) | ({"contrast of mr"} if "contrast" in facets else set())
    return needed


def reply(manifest: Manifest, intent: Intent, evidence: Evidence, question: str = "") -> Reply:
    """The rules in their order. Where a question cannot be answered at all, the note names the nearest that can to ``question``."""
    given = _reply(manifest, intent, evidence)
    if given.answer is not None or given.note or given.candidates or given.source == "header" or intent.kind == LANGUAGE:
        return given
    offered = [q for q in askable(manifest) if EXAMPLES.get(q) != intent.kind or _reply(manifest, understood(q), evidence).answer]
    others = [other for other in nearest(question, offered) if other != question]
    return replace(given, note=f"this can be asked: {', '.join(others)}") if others else given


def askable(manifest: Manifest) -> tuple[str, ...]:
    """What can be asked of this model, as far as its validation goes."""
    passed = [finding.name for finding in findings_of(manifest) if any(stratum.reason is None for stratum in finding.strata)]
    examples = EXAMPLES if manifest.head is not None and manifest.head.kind == "lite" else ()
    return (*examples, *(question_about(manifest, name) for name in passed))


def taught_findings(manifest: Manifest) -> Taught:
    """What `questions.understood` must know of this model's own findings."""
    return tuple((probe.finding.name, probe.asked) for probe in manifest.probes)


def question_about(manifest: Manifest, finding: str) -> str:
    asked = dict(taught_findings(manifest)).get(finding)
    return asked[0] if asked else f"is there {'a ' if finding.split()[-1] in COUNTED else ''}{finding}?"


EXAMPLES = {  # question: the facet that answers it
    "what imaging modality is this?": "modality",
    "is this a CT?": "modality",
    "CT or MRI?": "modality",
    "in what plane is this image?": "plane",
    "is this an axial image?": "plane",
    "is this an AP or a lateral view?": "plane",
    "what organ system is shown?": "organ",
    "is this a chest x-ray?": "modality",
    "was contrast given?": "contrast",
    "what is the MR weighting?": "weighting",
    "is this T1 or T2?": "weighting",
    "which side is shown?": "laterality",
}
DETAILS = ("contrast", "weighting")  # of a modality, with questions of their own
COUNTED = ("fracture",)  # findings that take an article


def _reply(manifest: Manifest, intent: Intent, evidence: Evidence) -> Reply:
    if not intent.answerable:
        return Reply(None, reason=_unanswerable(intent))
    if evidence.header.outside:
        return Reply(None, reason=f"the file says it holds {evidence.header.outside}, which is no radiology image", source="header")
    given = _asked(manifest, intent, evidence)
    if given.source == "picture" and (given.answer is not None or given.candidates):
        if not evidence.radiology:
            return replace(given, answer=None, reason=NO_RADIOGRAPH, worth=None)
        if unsaid := _not_determined(manifest, intent, evidence):
            given = Reply(None, reason=unsaid)
    families = evidence.families()
    likeliest = next(iter(families), None)
    against = contradiction(evidence.header, likeliest, families.get(likeliest or "", 0.0)) if evidence.radiology else None
    return replace(given, note=against or given.note)


def why_not_validated(intent: Intent) -> str | None:
    """Why a head that reads words itself, as MEVF's and QCR's, may not answer: it was measured in no stratum."""
    if intent.kind == "finding":
        return f"{intent.finding} is not validated for this model on any kind of picture"
    return {"normal": NOT_VALIDATED, "abnormality": NOT_NAMED}.get(intent.kind)


def _unanswerable(intent: Intent) -> str:
    if intent.kind == LANGUAGE:
        return NOT_ENGLISH
    return intent.needs or (OUTSIDE if intent.kind == OUT_OF_SCOPE else "the question was not understood; ask it in other words")


def _asked(manifest: Manifest, intent: Intent, evidence: Evidence) -> Reply:
    if intent.kind == "finding":
        return finding_reply(manifest, intent, evidence)
    if intent.kind == "normal":
        return Reply(None, reason=NOT_VALIDATED)
    if intent.kind == "abnormality":
        return Reply(None, reason=NOT_NAMED)
    if taken := taken_for_granted(intent, evidence):
        return Reply(None, reason=taken, source="header" if evidence.header.family else "picture")
    if intent.kind in DETAILS and (refused := not_of_this_family(intent.kind, evidence)):
        return Reply(None, reason=refused, source="header" if evidence.header.family else "picture")
    if intent.form == "closed":
        return closed_reply(intent, evidence)
    if intent.form == "choice":
        return choice_reply(intent, evidence)
    return _open(manifest, intent.kind, evidence)


def _open(manifest: Manifest, kind: str, evidence: Evidence) -> Reply:
    thresholds = {kind.name: kind.threshold for kind in manifest.kinds}
    return OPEN[kind](evidence, thresholds.get(kind, 0.0))


def _not_determined(manifest: Manifest, intent: Intent, evidence: Evidence) -> str | None:
    """Why contrast or weighting is withheld from a closed question: the open question has no answer, and the claim is not false anyway."""
    if intent.kind not in DETAILS or intent.form == "open":
        return None
    if any(facet == "modality" and evidence.family() not in (None, value) for facet, value in intent.asked):
        return None
    opened = [_open(manifest, detail, evidence) for detail in DETAILS if any(facet == detail for facet, _ in intent.asked)]
    return next((said.reason for said in opened if said.answer is None), None)
