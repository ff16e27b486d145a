"""`pmclip-deploy classify`: which of some labels a picture shows, from the labels' words or from a few examples."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmclip_deploy.cli.infer import RESEARCH_ONLY
from pmclip_deploy.cli.output import print_json
from pmclip_deploy.console import decimal, one_line, print_note, progress
from pmclip_deploy.errors import InputError, NoPictureError, UsageError

if TYPE_CHECKING:
    from pmclip_deploy.answer import Classification
    from pmclip_deploy.imaging.picture import Picture


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
        raise InputError(f"{image}: no such file", "check the path")
    if sum((bool(labels), labels_file is not None, examples is not None)) > 1:
        raise UsageError("labels, --labels and --examples are three ways to say the same", "choose one")
    names = labels_from_file(labels_file) if labels_file is not None else labels or []
    files = {} if examples is None else examples_from_folder(examples)
    every = [file for of in files.values() for file in of]
    skipped: list[NoPictureError] = []

    from pmclip_deploy.opening import load

    predictor = load(bundle, device, single_use=not files)
    bar = iter(progress(every, "Embedding"))
    shots = {of.name: pictures_of_label(of, islice(bar, len(those)), skipped) for of, those in files.items()}
    made = predictor.classify(image, names, examples=shots or None, method=method, templates=template or None, frame=frame, window=window)
    next(bar, None)  # takes it from the terminal
    for note in dict.fromkeys(predictor.notes):
        print_note(note)
    if skipped:
        print_note(f"left out {len(skipped)} of {len(every)} examples that are no pictures; the first: {skipped[0]}")
    if as_json:
        print_json(made.to_json())
    else:
        _print(made)


def labels_from_file(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable UTF-8 file ({type(error).__name__})", "give one with a label a line") from error
    if not any(lines):
        raise InputError(f"{path}: holds no label", "write one a line")
    return [line for line in lines if line]


def examples_from_folder(folder: Path) -> dict[Path, list[Path]]:
    """Each label's folder to its files, of FOLDER/LABEL/IMAGE, but for names that begin with a dot."""
    try:
        found = {of: [x for x in _seen(of) if x.is_file()] for of in _seen(folder) if of.is_dir()}
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})", "give a folder with a folder of images for each label") from error
    if len(found) < 2 or not all(found.values()):
        raise InputError(f"{folder}: needs two folders or more, each named for a label and with images in it")
    return found


def _seen(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def pictures_of_label(folder: Path, files: Iterator[Path], skipped: list[NoPictureError]) -> "Iterator[Picture]":
    """One at a time, as they are embedded. Raises InputError where none of its files is a picture."""
    from pmclip_deploy.imaging.images import picture_from_image

    count = 0
    for file in files:
        try:
            picture = picture_from_image(file)
        except NoPictureError as error:
            skipped.append(error)
            continue
        yield picture
        count += 1
    if not count:
        raise InputError(f"{folder}: holds no picture", "put DICOM, PNG or JPEG files of the label there")


def _print(made: "Classification") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("Label", "Share", "Score", title=Text(one_line(made.image.source)), title_justify="left")
    for label in made.labels:
        table.add_row(Text(one_line(label.label)), f"{label.share:.0%}", decimal(label.score, ".2f"))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    model = made.model
    console.print(Text(f"model: {model.bundle} {model.version}, {model.precision}, {model.backend} on {model.device}, {made.method}"))
    console.print(Text("note:  a share is of these labels alone, and no probability that one of them is right"))
    print(RESEARCH_ONLY)
