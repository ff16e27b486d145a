"""`pmclip-deploy demo`: asks the model about real pictures, and prints the correct answers beside its own."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmclip_deploy.atomic import write, write_errors
from pmclip_deploy.cli.options import Json
from pmclip_deploy.cli.output import RESEARCH_ONLY, console_for_tables, print_json
from pmclip_deploy.console import one_line

if TYPE_CHECKING:
    from pmclip_deploy.answer import Answer

FRACTURE, MODALITY, PLANE = "is there a fracture?", "what imaging modality is shown?", "in what plane is this image taken?"
CHEST, NAME = "is this a chest x-ray?", "what is the patient's name?"
NOT_KNOWN, NOT_TOLD = "not known", "not for a model to say"  # no answer is right
LEARNED_FROM_FILMS = ("findings", "radiograph")  # parts of a bundle's provenance


@dataclass(frozen=True)
class Case:
    file: Path
    name: str  # in the demo's folder
    title: str
    truth: Mapping[str, str]  # question to answer


def demo(
    output: Annotated[Path, typer.Option(help="Folder to write. It gets the pictures, and each picture as the model saw it.")] = Path(
        "pmclip-demo"
    ),
    as_json: Json = False,
) -> None:
    """Ask questions about two radiographs and a CT, and print the correct answer beside each answer."""
    from pmclip_deploy.cli.infer import first_finding
    from pmclip_deploy.imaging.overlay import save_png
    from pmclip_deploy.models import DEMO
    from pmclip_deploy.opening import load

    about = json.loads((DEMO / "films.json").read_text(encoding="utf-8"))
    cases, predictor, documents = _cases(about, DEMO), load(), []
    apart = was_held_out(predictor.manifest.provenance, {film["group"] for film in about["films"]})
    for case in cases:
        image = output / case.name
        _copy(case.file, image)
        answers = predictor.ask_many(image, list(case.truth))
        finding = first_finding(answers)
        seen = image.with_suffix(".png")
        save_png(predictor.model_view(image, finding), seen)
        if as_json:
            documents.append({"title": case.title, "picture_seen": str(seen), "answers": [_document(a, case) for a in answers]})
        else:
            _print(case, answers, seen, finding)
    if as_json:
        print_json({"schema": "pmclip-deploy/demo/1", "credit": about["credit"], "kept_apart": apart, "pictures": documents})
        return
    print(f"model: {answers[0].model.bundle} {answers[0].model.version}, {answers[0].model.precision}")
    print(fill(about["credit"], 120, initial_indent="films: ", subsequent_indent="       ", break_on_hyphens=False))
    if apart:
        print("       No part of this model was trained on these two films, or on other films of their group.")
    else:
        print("       This model may have been trained on these two films. Its manifest does not say that they were left out.")
    print(f'next:  pmclip-deploy infer {one_line(str(output / cases[0].name))} "{FRACTURE}" --prevalence 0.05')
    print("       pmclip-deploy questions      lists the questions, and how reliable each answer is")
    print(RESEARCH_ONLY)


def was_held_out(provenance: Mapping[str, Any], groups: set[str]) -> bool:
    """Whether every part of a bundle that was trained on films names these groups as left out."""
    parts = [provenance[name] for name in LEARNED_FROM_FILMS if name in provenance]
    return bool(parts) and all(groups <= set(part.get("kept_apart", ())) for part in parts)


def _cases(about: Mapping[str, Any], folder: Path) -> list[Case]:
    from pydicom.data import get_testdata_file

    films = [
        Case(
            folder / film["file"],
            film["file"],
            f"a {film['region']}, {'' if film['fracture'] else 'not '}fractured ({film['source']})",
            {FRACTURE: "yes" if film["fracture"] else "no", MODALITY: "plain film", CHEST: "no"},
        )
        for film in about["films"]
    ]
    ct = {MODALITY: "CT", PLANE: "axial", FRACTURE: NOT_KNOWN, NAME: NOT_TOLD}
    return [*films, Case(Path(str(get_testdata_file("CT_small.dcm", download=False))), "ct.dcm", "a CT (pydicom's CT_small)", ct)]


def _copy(file: Path, to: Path) -> None:
    with write_errors(f"{to}:", "give another --output"):
        to.parent.mkdir(parents=True, exist_ok=True)
        write(to, file.read_bytes())


def _document(answer: "Answer", case: Case) -> dict[str, Any]:
    truth = case.truth[answer.question]
    right = answer.abstained if truth in (NOT_KNOWN, NOT_TOLD) else (answer.answer or "").split(",")[0] == truth
    return {**answer.to_json(), "true": truth, "right": right}


def _print(case: Case, answers: "list[Answer]", seen: Path, finding: str | None) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("Question", "Answer", "Correct answer", title=Text(f"{case.name}: {case.title}"), title_justify="left")
    for answer in answers:
        given = Text(one_line(answer.answer), "bold") if answer.answer is not None else Text(f"no answer: {one_line(answer.reason or '')}")
        if answer.worth is not None:
            given.append(Text(f" - {answer.worth.sentence()}", "not bold"))
        elif answer.answer is not None and answer.source == "header":
            given.append(Text(" - from the file", "not bold"))
        table.add_row(answer.question, given, case.truth[answer.question])
    console = console_for_tables()
    console.print(table)
    red = f"; the map of the {finding} is red" if finding else ""
    console.print(Text(f"seen:  {one_line(str(seen))}, the picture that the model saw{red}\n"))
