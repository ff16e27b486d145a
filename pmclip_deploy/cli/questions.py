"""`pmclip-deploy questions`: lists the questions that a bundle answers, and how reliable each answer is."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pmclip_deploy.cli.options import Bundle, Json
from pmclip_deploy.cli.output import console_for_tables, print_json
from pmclip_deploy.console import one_line
from pmclip_deploy.spec import QUESTIONS_SCHEMA

if TYPE_CHECKING:
    from pmclip_deploy.bundle.manifest import Manifest


def questions(bundle: Bundle = None, as_json: Json = False) -> None:
    """List the questions that a bundle answers, and how reliable each answer is."""
    from pmclip_deploy.bundle.files import manifest_from_bundle
    from pmclip_deploy.models import DEFAULT_BUNDLE

    manifest = manifest_from_bundle(DEFAULT_BUNDLE if bundle is None else bundle)
    rows = [*_facets(manifest), *_findings(manifest)]
    if as_json:
        print_json({"schema": QUESTIONS_SCHEMA, "bundle": manifest.name, "version": manifest.version, "questions": rows})
        return
    from rich.table import Table
    from rich.text import Text

    console = console_for_tables()
    if not rows:
        console.print(Text(f"{one_line(manifest.name)} reads each question itself. Ask in the words of its training set.", "default"))
        return
    table = Table("Question", "Answered from", "How reliable the answer is")
    for row in rows:
        table.add_row(Text(one_line(row["question"])), Text(row["from"]), Text(row["worth"]))
    console.print(table)
    if manifest.head is not None and not _facets(manifest):
        console.print(Text(f"{one_line(manifest.name)} reads all other questions itself. Ask in the words of its training set.", "default"))
    else:
        console.print("Other wordings are understood too. Any other question is refused, and the refusal gives the reason.")


def _facets(manifest: "Manifest") -> list[dict[str, Any]]:
    from pmclip_deploy.decision.evidence import FACETS
    from pmclip_deploy.decision.rules import EXAMPLES

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


def _findings(manifest: "Manifest") -> list[dict[str, Any]]:
    from pmclip_deploy.decision.evidence import findings_of
    from pmclip_deploy.decision.findings import worth_of
    from pmclip_deploy.decision.rules import question_about

    rows = []
    for finding in findings_of(manifest):
        for stratum in finding.strata:
            worth = worth_of(finding.name, stratum, found=True)
            text = f"not answered for {worth.stratum}: {stratum.reason}" if stratum.reason else f"yes: {worth.sentence()}"
            question = question_about(manifest, finding.name)
            rows.append({"question": question, "from": "the picture", "worth": text, "stratum": asdict(stratum)})
    return rows
