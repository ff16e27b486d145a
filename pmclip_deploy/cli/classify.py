"""`pmclip-deploy classify`: which of some labels a picture shows, from the labels' words or from a few examples."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmclip_deploy.cli.infer import RESEARCH_ONLY
from pmclip_deploy.cli.output import one_line, print_json, print_note
from pmclip_deploy.errors import InputError, UsageError

if TYPE_CHECKING:
    from pmclip_deploy.answer import Classification


def classify(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", show_default=False)],
    labels: Annotated[list[str] | None, typer.Argument(metavar="[LABEL]...", help="Default: the bundle's.", show_default=False)] = None,
    labels_file: Annotated[Path | None, typer.Option("--labels", help="A file with a label a line, instead.", show_default=False)] = None,
    examples: Annotated[
        Path | None, typer.Option(help="Few-shot: a folder with a folder of images for each label.", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="With --examples: cache (the default, beside the labels' words) or probe.", show_default=False)
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="A prompt with {} for the label; repeat for their mean.", show_default=False),
    ] = None,
    frame: Annotated[int | None, typer.Option(min=0, help="Frame of a multi-frame file, from 0. Default: the middle one.")] = None,
    window: Annotated[tuple[float, float] | None, typer.Option(metavar="CENTER WIDTH", help="In modality units, HU for CT.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder. Default: the embedded model.")] = None,
    device: Annotated[str, typer.Option(help="As for infer.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say which of some labels an image shows best.

    pmclip-deploy classify scan.dcm "chest x-ray" "brain MRI" "abdominal CT"
    """
    if not image.exists():
        raise InputError(f"{image}: no such file; check the path")
    if sum((bool(labels), labels_file is not None, examples is not None)) > 1:
        raise UsageError("labels, --labels and --examples are three ways to say the same; choose one")
    names = labels_from_file(labels_file) if labels_file is not None else labels or []
    shots = None if examples is None else examples_from_folder(examples)

    from pmclip_deploy.opening import load

    predictor = load(bundle, device, once=shots is None)
    made = predictor.classify(image, names, examples=shots, method=method, templates=template or None, frame=frame, window=window)
    for note in dict.fromkeys(predictor.notes):
        print_note(note)
    if as_json:
        print_json(made.to_json())
    else:
        _print(made)


def labels_from_file(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable UTF-8 file ({type(error).__name__}); give one with a label a line") from error
    if not any(lines):
        raise InputError(f"{path}: holds no label; write one a line")
    return [line for line in lines if line]


def examples_from_folder(folder: Path) -> dict[str, list[Path]]:
    """label to its images, of FOLDER/LABEL/IMAGE."""
    try:
        found = {of.name: sorted(x for x in of.iterdir() if x.is_file()) for of in sorted(folder.iterdir()) if of.is_dir()}
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); give a folder with a folder of images for each label") from error
    if len(found) < 2 or not all(found.values()):
        raise InputError(f"{folder}: needs two folders or more, each named for a label and with images in it")
    return found


def _print(made: "Classification") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("Label", "Share", "Score", title=Text(one_line(made.image.source)), title_justify="left")
    for label in made.labels:
        table.add_row(Text(one_line(label.label)), f"{label.share:.0%}", f"{label.score:.2f}")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    model = made.model
    console.print(Text(f"model: {model.bundle} {model.version}, {model.precision}, {model.backend} on {model.device}, {made.method}"))
    console.print(Text("note:  a share is of these labels alone, and no probability that one of them is right"))
    print(RESEARCH_ONLY)
