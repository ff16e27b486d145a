"""`pmclip-deploy questions`: what can be asked of a bundle, and what each answer is worth."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmclip_deploy.cli.output import print_json
from pmclip_deploy.console import one_line
from pmclip_deploy.spec import QUESTIONS_SCHEMA

if TYPE_CHECKING:
    from pmclip_deploy.bundle.manifest import Manifest


def questions(
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder. Default: the embedded model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List what can be asked of a bundle, and what each answer is worth."""
    from pmclip_deploy.bundle.files import manifest_from_bundle
    from pmclip_deploy.models import DEFAULT_BUNDLE

    manifest = manifest_from_bundle(DEFAULT_BUNDLE if bundle is None else bundle)
    rows = [*_facets(manifest), *_findings(manifest)]
    if as_json:
        print_json({"schema": QUESTIONS_SCHEMA, "bundle": manifest.name, "version": manifest.version, "questions": rows})
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    if not rows:
        console.print(Text(f"{one_line(manifest.name)} reads each question itself; ask in the words of its training set", "default"))
        return
    table = Table("Question", "Answered from", "What an answer is worth")
    for row in rows:
        table.add_row(Text(one_line(row["question"])), Text(row["from"]), Text(row["worth"]))
    console.print(table)
    if manifest.head is not None and not _facets(manifest):
        console.print(Text(f"All else {one_line(manifest.name)} reads itself; ask in the words of its training set", "default"))
    else:
        console.print("Other wordings are read too. What is not here is refused, and the refusal says why.")


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
        worth = "as the file says" if accuracy is None else f"of the picture's, {accuracy:.0%} were right in validation"
        source = "the file" if facet == "laterality" else "the picture" if facet == "weighting" else "the file, else the picture"
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
