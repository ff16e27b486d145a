"""The questions that a bundle answers, and how reliable each answer is, as data."""

from dataclasses import asdict
from typing import Any

from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.decision.evidence import FACETS, findings_of
from pmclip_deploy.decision.findings import worth_of
from pmclip_deploy.decision.rules import EXAMPLES, question_about


def questions_listed(manifest: Manifest) -> list[dict[str, Any]]:
    """Rows of ``question``, ``from`` and ``worth``; those about a finding have its ``stratum`` too, with what was measured there."""
    return [*facets_listed(manifest), *_findings(manifest)]


def facets_listed(manifest: Manifest) -> list[dict[str, Any]]:
    if not {kind for kind, _ in FACETS.values()} <= {kind.name for kind in manifest.kinds}:
        return []
    measured = manifest.metrics.get("crossfit", {}).get("by_category", {})
    rows = []
    for question, facet in EXAMPLES.items():
        figure = measured.get(facet if facet in ("plane", "organ") else "modality", {})
        accuracy = figure.get("accuracy") if isinstance(figure, dict) and facet != "laterality" else None
        worth = "as reliable as the file" if accuracy is None else f"from the picture, {accuracy:.0%} were right in validation"
        source = "the file" if facet == "laterality" else "the picture" if facet == "weighting" else "the file, then the picture"
        rows.append({"question": question, "from": source, "worth": worth})
    return rows


def _findings(manifest: Manifest) -> list[dict[str, Any]]:
    rows = []
    for finding in findings_of(manifest):
        for stratum in finding.strata:
            worth = worth_of(finding.name, stratum, found=True)
            text = f"not answered for {worth.stratum}: {stratum.reason}" if stratum.reason else f"yes: {worth.sentence()}"
            question = question_about(manifest, finding.name)
            rows.append({"question": question, "from": "the picture", "worth": text, "stratum": asdict(stratum)})
    return rows
