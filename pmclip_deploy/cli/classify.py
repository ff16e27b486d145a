"""`pmclip-deploy classify`: ranks labels for images, by their words or by a few example images."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmclip_deploy.cli.options import Bundle, Device, Frame, Json, Output, Window
from pmclip_deploy.cli.output import RESEARCH_ONLY, RowsFile, console_for_tables, print_json, print_notes
from pmclip_deploy.cli.pictures import Pictures, exists, is_named_as_file, leading_pictures
from pmclip_deploy.console import counted, decimal, one_line, print_note, progress
from pmclip_deploy.errors import InputError, NoPictureError, UsageError
from pmclip_deploy.spec import CLASSIFICATIONS_SCHEMA
from pmclip_deploy.texts import lines_of_file

if TYPE_CHECKING:
    from pmclip_deploy.answer import Classification
    from pmclip_deploy.imaging.picture import Picture

COLUMNS = ("image", "frame", "label", "share", "probability", "score", "method", "model", "error")  # of --output

SHARES = "shares compare these labels with each other. They are not probabilities that a label is right."
PROBABILITIES = "each probability is of its label alone, by the model's sigmoid loss. It was not calibrated on medical images."


def classify(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE... [LABEL]...",
            help="One or more image files or folders, then the labels to choose from. What exists is an image. "
            "Default: the labels of the bundle.",
            show_default=False,
        ),
    ],
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
    output: Output = None,
    as_json: Json = False,
) -> int:
    """Rank labels by how well they describe one or more images.

    pmclip-deploy classify scan.dcm "chest x-ray" "brain MRI" "abdominal CT"
    """
    images, labels = split_arguments(arguments)
    if sum((bool(labels), labels_file is not None, examples is not None)) > 1:
        raise UsageError("LABEL, --labels and --examples exclude each other", "choose one of them")
    names = labels_from_file(labels_file) if labels_file is not None else labels
    files = {} if examples is None else examples_from_folder(examples)
    pictures, rows = Pictures(images), None if output is None else RowsFile(output, COLUMNS)

    from pmclip_deploy.classify import Classifier
    from pmclip_deploy.opening import load

    predictor = load(bundle, device, single_use=pictures.alone and not files, items=pictures.count + sum(map(len, files.values())))
    print_notes(predictor)
    every, skipped = [file for of in files.values() for file in of], list[NoPictureError]()
    bar = iter(progress(every, "Embedding"))
    shots = {of.name: pictures_of_label(of, islice(bar, len(those)), skipped) for of, those in files.items()}
    ranked = Classifier(predictor, names, shots or None, method, template or None)
    if not pictures.alone:
        ranked.scores  # noqa: B018 - what is wrong with an example is said once, and not of each picture
    documents, made, count = list[dict[str, Any]](), None, 0
    for made in pictures.each(lambda path: ranked(path, frame, window), "Classifying" if as_json or rows is not None else None):
        count += 1
        if rows is not None:
            rows.add(made.to_json(), _rows(made))
        if as_json:
            documents.append(made.to_json())
        elif rows is None:
            _print(made)
    next(bar, None)  # takes it from the terminal
    if skipped:
        print_note(f"left out {len(skipped)} of {counted(len(every), 'example')}: no picture; the first error: {skipped[0]}")
    if rows is not None:
        rows.add_unreadable(pictures.unreadable)
    if as_json:
        print_json({"schema": CLASSIFICATIONS_SCHEMA, "classifications": documents, **pictures.to_json()})
    elif made is not None:
        if rows is not None:
            print(one_line(f"{output}: labels for {counted(count, 'picture')}"))
        print(one_line(f"model: {made.model}, {made.method}"))
        print(f"note:  {PROBABILITIES if made.labels[0].share is None else SHARES}")
        print(RESEARCH_ONLY)
    return pictures.exit_code


def split_arguments(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Images come first: the first argument always, the later ones as long as they exist. The rest are labels."""
    count = leading_pictures(arguments)
    if not count:
        raise InputError(f"{arguments[0]}: no such file or folder", "check the path; the image comes before the labels")
    for label in arguments[count:]:
        if exists(label):
            raise UsageError(f"{label}: images come before labels", "put the image first, or give labels that are file names by --labels")
        if is_named_as_file(label):
            raise InputError(f"{label}: no such file", "check the path, or give labels that look like files by --labels")
    return [Path(image) for image in arguments[:count]], arguments[count:]


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


def _rows(made: "Classification") -> list[dict[str, object]]:
    """Of ``COLUMNS``, the likeliest label first."""
    same = {"image": made.image.source, "frame": made.image.frame, "method": made.method, "model": str(made.model)}
    return [{**same, **label.to_json()} for label in made.labels]


def _print(made: "Classification") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "Label",
        "Probability" if made.labels[0].share is None else "Share",
        "Score",
        title=Text(one_line(made.image.source)),
        title_justify="left",
    )
    for label in made.labels:
        of_label = format(label.share, ".0%") if label.share is not None else format(label.probability, ".2%")
        table.add_row(Text(one_line(label.label)), of_label, decimal(label.score, ".2f"))
    console_for_tables().print(table)
