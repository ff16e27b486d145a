"""`pmclip-deploy evaluate`: a bundle's figures on rows of images, questions and answers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pmclip_deploy.cli.output import one_line, print_json, progress


def evaluate(
    data: Annotated[Path, typer.Option(help="JSON lines {image, question, answer, category}.")],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    train: Annotated[
        Path | None, typer.Option(help="Training rows for the question-only baseline. Default: train.jsonl beside the data.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder. Default: the embedded model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling and of the shuffled images.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure accuracy, coverage and calibration, beside baselines, with 95% intervals."""
    from pmclip_deploy.evaluate import evaluation, rows_from_jsonl
    from pmclip_deploy.predictor import load

    rows = rows_from_jsonl(data, images)
    beside = data.with_name("train.jsonl")
    if train is None and beside.is_file() and not (data.exists() and beside.samefile(data)):
        train = beside
    known = rows_from_jsonl(train) if train else None
    document = evaluation(load(bundle, device), rows, images, known, seed, progress)
    if as_json:
        print_json(document)
    else:
        _print_figures(document)


def _print_figures(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "n", "accuracy", "95% interval", "coverage")
    table.add_row("all", str(document["n"]), *_cells(document), f"{document['coverage']:.3f}")
    for what in ("category", "kind"):
        for name, group in document["by"][what].items():
            table.add_row(Text(one_line(f"{what} {name}")), str(group["n"]), *_cells(group), f"{group['coverage']:.3f}")
    for name, baseline in document["baselines"].items():
        table.add_row(f"baseline {name.replace('_', ' ')}", "", *_cells(baseline), "")
    console = Console(highlight=False)
    console.print(table)
    answered = document["selective_accuracy"]
    console.print(f"accuracy where it answered: {'not measured' if answered is None else f'{answered:.3f}'}")
    console.print(f"expected calibration error: {'not measured' if document['ece'] is None else format(document['ece'], '.3f')}")
    for name, figure in document["binary"].items():
        low, high = figure["ci95"] or (float("nan"), float("nan"))
        said = f"AUROC of {name}: {figure['auroc']:.3f} ({low:.3f} to {high:.3f}), {figure['positives']} of {figure['n']} positive"
        console.print(Text(one_line(said)))
    for reason, count in document["abstentions"].items():
        console.print(Text(one_line(f"no answer, {count} times: {reason}")))


def _cells(figure: dict[str, Any] | None) -> tuple[str, str]:
    if figure is None:
        return "not measured", ""
    return f"{figure['accuracy']:.3f}", "{:.3f} to {:.3f}".format(*figure["ci95"])
