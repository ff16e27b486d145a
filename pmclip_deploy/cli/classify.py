"""`pmclip-deploy classify`: ranks labels for an image, by their words or by a few example images."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmclip_deploy.cli.options import Bundle, Device, Frame, Json, Window
from pmclip_deploy.cli.output import RESEARCH_ONLY, console_for_tables, print_json, print_notes
from pmclip_deploy.console import decimal, one_line, print_note, progress
from pmclip_deploy.errors import InputError, NoPictureError, UsageError
from pmclip_deploy.texts import lines_of_file

if TYPE_CHECKING:
    from pmclip_deploy.answer import Classification
    from pmclip_deploy.imaging.picture import Picture


def classify(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="DICOM, PNG or JPEG file.", show_default=False)],
    labels: Annotated[
        list[str] | None,
        typer.Argument(metavar="[LABEL]...", help="Labels to choose from. Default: the labels of the bundle.", show_default=False),
    ] = None,
    labels_file: Annotated[
        Path | None, typer.Option("--labels", help="File with one label per line, instead of LABEL arguments.", show_default=False)
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help="Few-shot: a folder that has one folder of images per label. Each is named for its label.", show_default=False),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="With --examples: cache (the default, which also uses the words of the labels) or probe.", show_default=False),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="Prompt with {} in place of the label. Repeat to average several prompts.", show_default=False),
    ] = None,
    frame: Frame = None,
    window: Window = None,
    bundle: Bundle = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Rank labels by how well they describe an image.

    pmclip-deploy classify scan.dcm "chest x-ray" "brain MRI" "abdominal CT"
    """
    if not image.exists():
        raise InputError(f"{image}: no such file", "check the path")
    if sum((bool(labels), labels_file is not None, examples is not None)) > 1:
        raise UsageError("LABEL, --labels and --examples exclude each other", "choose one of them")
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
    print_notes(predictor)
    if skipped:
        print_note(f"left out {len(skipped)} of {len(every)} examples, which hold no picture; the first error: {skipped[0]}")
    if as_json:
        print_json(made.to_json())
    else:
        _print(made)


def labels_from_file(path: Path) -> list[str]:
    lines = [line.strip() for _, line in lines_of_file(path, "give a file with one label per line")]
    if not lines:
        raise InputError(f"{path}: holds no label", "write one label per line")
    return lines


def examples_from_folder(folder: Path) -> dict[Path, list[Path]]:
    """The folder of each label, with its files: FOLDER/LABEL/IMAGE. Names that begin with a dot are left out."""
    try:
        found = {of: [x for x in _visible(of) if x.is_file()] for of in _visible(folder) if of.is_dir()}
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})", "give a folder that has one folder of images per label") from error
    if len(found) < 2 or not all(found.values()):
        raise InputError(f"{folder}: needs two folders or more, each with images of one label", "name each folder for its label")
    return found


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def pictures_of_label(folder: Path, files: Iterator[Path], skipped: list[NoPictureError]) -> "Iterator[Picture]":
    """One at a time, as they are embedded. Raises InputError if none of the files is a picture."""
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
        raise InputError(f"{folder}: holds no picture", "put DICOM, PNG or JPEG files of this label into it")


def _print(made: "Classification") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("Label", "Share", "Score", title=Text(one_line(made.image.source)), title_justify="left")
    for label in made.labels:
        table.add_row(Text(one_line(label.label)), f"{label.share:.0%}", decimal(label.score, ".2f"))
    console = console_for_tables()
    console.print(table)
    model = made.model
    console.print(Text(f"model: {model.bundle} {model.version}, {model.precision}, {model.backend} on {model.device}, {made.method}"))
    console.print(Text("note:  shares compare these labels with each other. They are not probabilities that a label is right."))
    print(RESEARCH_ONLY)
