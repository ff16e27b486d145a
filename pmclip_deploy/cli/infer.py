"""`pmclip-deploy infer`: answers questions about images."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmclip_deploy.cli.options import Bundle, Device, Frame, Json, Window, finite
from pmclip_deploy.cli.output import RESEARCH_ONLY, console_for_tables, print_json, print_notes
from pmclip_deploy.console import one_line, print_error, print_note, progress
from pmclip_deploy.errors import InputError, UsageError

if TYPE_CHECKING:
    from pmclip_deploy.answer import Answer, ImageInfo

PNG_AND_JPEG = (".png", ".jpg", ".jpeg")
SUFFIXES = (*PNG_AND_JPEG, ".dcm", ".dicom", ".ima", ".tif", ".tiff", ".bmp", ".gif", ".nii", ".gz", ".zip")

Ask = Callable[[Path], "list[Answer]"]

Arguments = Annotated[
    list[str], typer.Argument(metavar="IMAGE... QUESTION...", help="One or more image files or folders, then one or more questions.")
]
Top = Annotated[int, typer.Option(min=1, help="Number of candidates per answer.")]
IgnoreHeader = Annotated[bool, typer.Option("--ignore-header", help="Answer from the picture alone, without the DICOM header.")]
Age = Annotated[
    int | None, typer.Option(min=0, max=150, help="Age of the patient in years, if the file does not give it. The age is not stored.")
]
Prevalence = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        callback=finite,
        help="Share of your pictures that have the finding, 0.05 for 5%. The output says how often such an answer is then right.",
    ),
]
SavePicture = Annotated[
    Path | None,
    typer.Option(metavar="OUT.png", help="Write the picture as the model saw it. If a finding is answered yes, the picture shows its map."),
]


def infer(
    arguments: Arguments,
    frame: Frame = None,
    window: Window = None,
    bundle: Bundle = None,
    device: Device = "auto",
    top: Top = 5,
    ignore_header: IgnoreHeader = False,
    age: Age = None,
    prevalence: Prevalence = None,
    save_picture: SavePicture = None,
    as_json: Json = False,
) -> int:
    """Ask one or more questions about one or more images.

    pmclip-deploy infer scan.dcm "is there a fracture?" "in which plane is it?"
    """
    images, questions = split_arguments(arguments)
    _check_picture(save_picture, images)

    from pmclip_deploy.header.read import ADULT
    from pmclip_deploy.opening import load_while

    predictor = load_while(lambda: _import_reader(images[0]), bundle, device, single_use=len(images) == 1 and not images[0].is_dir())
    print_notes(predictor)

    def ask(path: Path) -> "list[Answer]":
        child = None if age is None else age < ADULT
        return predictor.ask_many(path, questions, frame=frame, window=window, top=top, ignore_header=ignore_header, child=child)

    documents, failed = list[dict[str, Any]](), False
    for image, answers in _answers_of_all(ask, images, as_json):
        if isinstance(answers, InputError):
            print_error(str(answers))
            failed = True
            continue
        if save_picture is not None:
            from pmclip_deploy.imaging.overlay import save_png

            save_png(predictor.model_view(image, first_finding(answers), frame=frame, window=window), save_picture)
        if as_json:
            documents += [_document(answer, prevalence) for answer in answers]
        else:
            _print_answers(answers, prevalence)
    if as_json:
        one = len(images) == len(questions) == 1 and not images[0].is_dir()
        print_json(documents[0] if one else documents)
    else:
        print(RESEARCH_ONLY)
    return InputError.exit_code if failed else 0


def _check_picture(save_picture: Path | None, images: list[Path]) -> None:
    if save_picture is not None and (len(images) > 1 or images[0].is_dir()):
        raise UsageError("--save-picture writes one picture", "ask about one image")
    if save_picture is not None and save_picture.suffix.lower() != ".png":
        raise UsageError(f"{save_picture}: --save-picture writes PNG", "give the file a name that ends in .png")


def first_finding(answers: "list[Answer]") -> str | None:
    """The first finding that was answered yes."""
    return next((answer.worth.finding for answer in answers if answer.worth is not None and answer.worth.found), None)


def _document(answer: "Answer", prevalence: float | None) -> dict[str, Any]:
    document = answer.to_json()
    if answer.worth is not None and prevalence is not None:
        document["worth"] |= {"prevalence": prevalence, "predictive_value": answer.worth.predictive_value(prevalence)}
    return document


def _import_reader(image: Path) -> None:
    if image.suffix.lower() not in PNG_AND_JPEG:
        from pmclip_deploy.imaging.dicom_file import import_pydicom_lean

        import_pydicom_lean()
        import pmclip_deploy.imaging.dicom
    import pmclip_deploy.imaging.read  # noqa: F401


def split_arguments(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Images come first: the first argument always, the later ones as long as they exist. The rest are questions."""
    count = 1
    while count < len(arguments) and exists(arguments[count]):
        count += 1
    images, questions = [Path(a) for a in arguments[:count]], arguments[count:]
    for question in questions:
        if looks_like_a_path(question):
            if exists(question):
                raise UsageError(f"{question}: images come before questions", "put the image first")
            raise InputError(f"{question}: no such file", "check the path")
    if not exists(arguments[0]):
        raise InputError(f"{arguments[0]}: no such file or folder", "check the path")
    if not questions or not all(question.strip() for question in questions):
        raise UsageError("no question given", 'add a question, for example "is there a fracture?"')
    return images, questions


def exists(argument: str) -> bool:
    try:
        return bool(argument.strip()) and Path(argument).exists()
    except (OSError, ValueError):  # a question may be too long for a file's name
        return False


def looks_like_a_path(argument: str) -> bool:
    return argument.lower().endswith(SUFFIXES) or (("/" in argument or os.sep in argument) and " " not in argument)


def _answers_of_all(ask: Ask, images: list[Path], bar: bool) -> "Iterator[tuple[Path, list[Answer] | InputError]]":
    """Each image with its answers, or with the error if it has none. The error of a single image is raised."""
    for image in images:
        try:
            for answers in _answers(ask, image, bar):
                yield image, answers
        except InputError as error:
            if len(images) == 1:
                raise
            yield image, error


def _answers(ask: Ask, image: Path, bar: bool) -> "Iterator[list[Answer]]":
    if not image.is_dir():
        yield ask(image)
        return
    from pmclip_deploy.files import files_below

    files, skipped = files_below(image)
    count = len(files) + len(skipped)
    for file in progress(files, "Asking") if bar else files:
        try:
            yield ask(file)
        except InputError as error:
            skipped.append(error)
    if len(skipped) == count:
        first = f"; the first error: {skipped[0]}" if skipped else ""
        raise InputError(f"{image}: a folder without readable images ({count} files{first})", "give DICOM, PNG or JPEG files")
    if skipped:
        print_note(f"skipped {len(skipped)} of {count} files in {image} that hold no readable image; the first error: {skipped[0]}")


def _print_answers(answers: "list[Answer]", prevalence: float | None) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("Question", "Answer", "Confidence", "Runners-up", title=Text(one_line(answers[0].image.source)), title_justify="left")
    for answer in answers:
        given = Text(one_line(answer.answer), "bold") if answer.answer is not None else Text(f"no answer: {one_line(answer.reason or '')}")
        others = () if answer.worth else answer.candidates if answer.abstained or answer.source == "header" else answer.candidates[1:]
        ups = Text(", ".join(f"{one_line(c.answer)} {c.probability:.0%}" for c in others))
        if answer.worth is not None:
            given.append(Text(f" - {_worth(answer, prevalence)}", "not bold"))
        table.add_row(Text(one_line(answer.question)), given, Text(_confidence(answer)), ups)
    console = console_for_tables()
    console.print(table)
    model, times = answers[0].model, answers[0].timings_ms
    console.print(Text(f"image: {_image_line(answers[0].image)}"))
    console.print(Text(f"model: {model.bundle} {model.version}, {model.precision}, {model.backend} on {model.device}"))
    console.print(Text("time:  " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in times.items())))
    for note in dict.fromkeys(a.note for a in answers if a.note):
        console.print(Text(f"note:  {one_line(note)}"))
    for warning in answers[0].image.warnings:
        console.print(Text(f"warning: {one_line(warning)}", "yellow"))
    console.print()


def _confidence(answer: "Answer") -> str:
    if answer.abstained:
        return ""
    if answer.source == "header":
        return "from the file"
    if answer.worth is not None:  # the answer has the figures measured in validation beside it
        return ""
    return "" if answer.probability is None else f"{answer.probability:.0%}"


def _worth(answer: "Answer", prevalence: float | None) -> str:
    assert answer.worth is not None
    if prevalence is None:
        return answer.worth.sentence()
    value = answer.worth.predictive_value(prevalence)
    return f"{answer.worth.sentence()}; if {prevalence:.0%} of pictures have it, {value:.0%} of such answers are right"


def _image_line(image: "ImageInfo") -> str:
    parts = [image.format.upper(), image.modality, f"{image.columns} x {image.rows}"]
    if image.frames > 1:
        parts.append(f"frame {image.frame} of 0 to {image.frames - 1}")
    if image.window:
        parts.append(f"window center {image.window[0]:g} width {image.window[1]:g}")
    return ", ".join(one_line(part) for part in parts if part)
