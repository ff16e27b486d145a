"""Findings: which stratum a picture is of, and what an answer about it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, isfinite

from pmclip_deploy.answer import Worth
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.types import Finding, Stratum
from pmclip_deploy.decision.evidence import (
    FILM,
    SHOWN,
    UNLIKE,
    Evidence,
    Reply,
    findings_of,
    listed,
    pictures_of_stratum,
    ranked,
    region_label,
    taken_for_granted,
)
from pmclip_deploy.header.read import header_value
from pmclip_deploy.questions import Intent, Qualifier, may_show


def finding_reply(manifest: Manifest, intent: Intent, evidence: Evidence) -> Reply:
    known = {finding.name: finding for finding in findings_of(manifest)}
    name = intent.finding or ""
    if name not in known:
        measured = f"; it answers for {', '.join(known)}" if known else ""
        return Reply(None, reason=f"{name} is not validated for this model on any kind of picture{measured}")
    if intent.form != "closed" or evidence.findings is None:
        return Reply(None, reason=f"this model says whether there is a {name}, and no more")
    if taken := taken_for_granted(intent, evidence):
        return Reply(None, reason=taken)
    shown = _regions_shown(evidence)
    if unjudged := _unjudged(intent.qualifiers, shown):
        return Reply(None, reason=unjudged)
    stratum, reason = _stratum(known[name], shown, evidence)
    if stratum is None:
        return Reply(None, reason=reason)
    logit = evidence.findings.logits[name]
    if not isfinite(logit):  # neither yes nor no
        return Reply(None, reason=f"the graph's value for {name} is no number")
    found = logit >= stratum.threshold
    yes, no = ("yes", "no") if intent.polarity else ("no", "yes")
    share = 1 / (1 + exp(-max(-60.0, min(60.0, stratum.slope * logit + stratum.intercept))))
    return Reply(
        yes if found else no,
        share if found else 1 - share,
        candidates=ranked({yes: share, no: 1 - share}),
        worth=worth_of(name, stratum, found),
    )


def _regions_shown(evidence: Evidence) -> tuple[str, ...]:
    """By the header, else those that the picture looks like, the likeliest first."""
    if evidence.header.regions:
        return evidence.header.regions
    shares = evidence.findings.regions if evidence.findings else {}
    likely = sorted((region for region in shares if shares[region] >= SHOWN), key=lambda region: -shares[region])
    return tuple(likely) if likely[:1] != ["other"] else ()


def _unjudged(qualifiers: Sequence[Qualifier], shown: Sequence[str]) -> str | None:
    """Why a word that narrows the finding cannot be judged: the first such word."""
    for q in qualifiers:
        if q.kind != "site" or q.value is None:
            return f'this model does not judge "{q.text}"'
        if shown and not any(may_show(region, q.value) for region in shown):
            return f'the picture shows the {" and ".join(region_label(x) for x in shown)}, not the site that was asked for ("{q.text}")'
        if not q.exact or q.value not in shown:
            return f'where in a picture a finding is this model does not judge ("{q.text}")'
    return None


def _stratum(finding: Finding, shown: Sequence[str], evidence: Evidence) -> tuple[Stratum | None, str | None]:
    """The stratum of a picture, or why there is none that may be answered."""
    assert evidence.findings is not None
    family = evidence.header.family
    families = dict.fromkeys(s.family for s in finding.strata)
    passed = [s for s in finding.strata if s.reason is None]
    if not passed:
        return None, f"{finding.name} is not validated for this model on any kind of picture"
    measured = f"{finding.name} is validated for {listed(pictures_of_stratum(s) for s in passed)}"
    if family is not None and family not in families:
        return None, f"{measured}, and the file says {header_value(evidence.header, 'modality')}"
    fitting = [s for region in shown for s in finding.strata if s.region == region and s.family == (family or FILM)]
    if not fitting or any(region not in {s.region for s in fitting} for region in evidence.header.regions):
        where = f"this picture shows the {listed(region_label(x) for x in shown)}" if shown else "this picture shows none of these"
        return None, f"{measured}; {where if shown or evidence.findings.regions else 'the file does not say what this picture shows'}"
    unlike = [s for s in fitting if s.family == FILM and not evidence.findings.regions.get(s.region, 1.0) >= UNLIKE]
    if unlike:
        return None, f"the file says {header_value(evidence.header, 'region')}, and the picture does not look like it"
    stratum = next((s for s in fitting if s.reason), fitting[0])
    if stratum.reason:
        return None, f"{finding.name} is not validated for {pictures_of_stratum(stratum)}: {stratum.reason}"
    if stratum.children and evidence.child is not True:
        known = "the file says this is none" if evidence.child is False else "the file does not say whether this is one; --age YEARS does"
        return None, f"{finding.name} is validated for children alone, and {known}"
    return stratum, None


def worth_of(name: str, stratum: Stratum, found: bool) -> Worth:
    return Worth(
        finding=name,
        found=found,
        stratum=pictures_of_stratum(stratum),
        n=stratum.n,
        sensitivity=stratum.sensitivity,
        specificity=stratum.specificity,
        right_of_yes=stratum.yes,
        right_of_no=stratum.no,
        auroc=stratum.auroc,
        auroc_ci95=stratum.auroc_ci95,
    )
