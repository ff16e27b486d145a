"""`pmclip-deploy questions`: lists the questions that a bundle answers, and how reliable each answer is."""

from pmclip_deploy.cli.options import Bundle, Json
from pmclip_deploy.cli.output import console_for_tables, print_json
from pmclip_deploy.console import one_line
from pmclip_deploy.spec import QUESTIONS_SCHEMA


def questions(bundle: Bundle = None, as_json: Json = False) -> None:
    """List the questions that a bundle answers, and how reliable each answer is."""
    from pmclip_deploy.bundle.files import manifest_from_bundle
    from pmclip_deploy.decision.listed import facets_listed, questions_listed
    from pmclip_deploy.models import DEFAULT_BUNDLE

    manifest = manifest_from_bundle(DEFAULT_BUNDLE if bundle is None else bundle)
    rows = questions_listed(manifest)
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
    if manifest.head is not None and not facets_listed(manifest):
        console.print(Text(f"{one_line(manifest.name)} reads all other questions itself. Ask in the words of its training set.", "default"))
    else:
        console.print("Other wordings are understood too. Any other question is refused, and the refusal gives the reason.")
