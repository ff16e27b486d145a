"""`pmclip-deploy infer`: answers questions about images."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmclip_deploy.cli.options import Bundle, Device, Frame, Json, Output, Window, finite
from pmclip_deploy.cli.output import RESEARCH_ONLY, RowsFile, console_for_tables, print_json, print_notes
from pmclip_deploy.cli.pictures import Pictures, exists, leading_pictures, looks_like_a_path
from pmclip_deploy.console import counted, one_line
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.files import PNG_AND_JPEG
from pmclip_deploy.spec import ANSWERS_SCHEMA

if TYPE_CHECKING:
    from pmclip_deploy.answer import Answer, ImageInfo

QUOTES = "\"'“”„‘’`"
COLUMNS = ("image", "frame", "question", "answer", "probability", "source", "reason", "worth", "note", "model", "error")  # of --output

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

Sr = Annotated[
    Path | None,
    typer.Option(
        "--sr",
        metavar="OUT.dcm",
        help="Write the answers as a DICOM Structured Report. For several images: a folder, with a file per image.",
    ),
]
SrClass = Annotated[
    str, typer.Option("--sr-class", help="SOP class of the Structured Report: comprehensive3d, comprehensive or enhanced.")
]
Sc = Annotated[
    Path | None,
    typer.Option("--sc", metavar="OUT.dcm", help="Write the answers as a page, a DICOM Secondary Capture. For several images: a folder."),
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
    sr: Sr = None,
    sr_class: SrClass = "comprehensive3d",
    sc: Sc = None,
    output: Output = None,
    as_json: Json = False,
) -> int:
    """Ask one or more questions about one or more images.

    pmclip-deploy infer scan.dcm "is there a fracture?" "in which plane is it?"
    """
    images, questions = split_arguments(arguments)
    pictures = Pictures(images)
    _check_picture(save_picture, pictures.alone)
    rows = None if output is None else RowsFile(output, COLUMNS)
    reports = None
    if sr is not None or sc is not None:
        from pmclip_deploy.cli.reports import Reports

        reports = Reports(sr, sc, sr_class, prevalence, pictures)

    from pmclip_deploy.header.read import ADULT
    from pmclip_deploy.opening import load_while

    predictor = load_while(lambda: _import_reader(images[0]), bundle, device, single_use=pictures.alone, items=pictures.count)
    print_notes(predictor)

    def ask(path: Path) -> "list[Answer]":
        child = None if age is None else age < ADULT
        return predictor.ask_many(path, questions, frame=frame, window=window, top=top, ignore_header=ignore_header, child=child)

    documents, count = list[dict[str, Any]](), 0
    for answers in pictures.each(partial(reports.write, ask=ask) if reports else ask, "Asking" if as_json or rows is not None else None):
        count += 1
        if save_picture is not None:
            from pmclip_deploy.imaging.overlay import save_png

            save_png(predictor.model_view(images[0], first_finding(answers), frame=frame, window=window), save_picture)
        for answer in answers if as_json or rows is not None else ():
            document = _document(answer, prevalence)
            if rows is not None:
                rows.add(document, [_row(answer, prevalence)])
            if as_json:
                documents.append(document)
        if not as_json and rows is None:
            _print_answers(answers, prevalence)
    if rows is not None:
        rows.add_unreadable(pictures.unreadable)
    if as_json:
        written = {} if reports is None else {"reports": reports.written}
        print_json({"schema": ANSWERS_SCHEMA, "answers": documents, **pictures.to_json(), **written})
    elif count:
        if rows is not None:
            print(one_line(f"{output}: {counted(count * len(questions), 'answer')} about {counted(count, 'picture')}"))
        if reports is not None:
            reports.print()
        print(RESEARCH_ONLY)
    return pictures.exit_code


def _check_picture(save_picture: Path | None, alone: bool) -> None:
    if save_picture is None:
        return
    if not alone:
        raise UsageError("--save-picture writes one picture", "ask about one image")
    if save_picture.suffix.lower() != ".png":
        raise UsageError(f"{save_picture}: --save-picture writes PNG", "give the file a name that ends in .png")
    if save_picture.is_dir() or not save_picture.absolute().parent.is_dir():
        raise UsageError(f"{save_picture}: cannot be written", "give --save-picture a file in a folder that exists")


def first_finding(answers: "list[Answer]") -> str | None:
    """The first finding that was answered yes."""
    return next((answer.worth.finding for answer in answers if answer.worth is not None and answer.worth.found), None)


def _document(answer: "Answer", prevalence: float | None) -> dict[str, Any]:
    document = answer.to_json()
    if answer.worth is not None and prevalence is not None:
        document["worth"] |= {"prevalence": prevalence, "predictive_value": answer.worth.predictive_value(prevalence)}
    return document


def _row(answer: "Answer", prevalence: float | None) -> dict[str, object]:
    """Of ``COLUMNS``."""
    cells = {name: getattr(answer, name) for name in ("question", "answer", "probability", "source", "reason", "note")}
    worth = None if answer.worth is None else answer.worth.sentence(prevalence)
    return {"image": answer.image.source, "frame": answer.image.frame, **cells, "worth": worth, "model": str(answer.model)}


def _import_reader(image: Path) -> None:
    if image.suffix.lower() not in PNG_AND_JPEG:
        from pmclip_deploy.imaging.dicom_file import import_pydicom_lean

        import_pydicom_lean()
        import pmclip_deploy.imaging.dicom
    import pmclip_deploy.imaging.read  # noqa: F401


def split_arguments(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Images come first: the first argument always, the later ones as long as they exist. The rest are questions."""
    count = max(leading_pictures(arguments), 1)
    images, questions = [Path(a) for a in arguments[:count]], arguments[count:]
    for question in questions:
        if looks_like_a_path(question):
            if exists(question):
                raise UsageError(f"{question}: images come before questions", "put the image first")
            raise InputError(f"{question}: no such file", "check the path")
    if not exists(arguments[0]):
        whole = " ".join(arguments) if len(arguments) > 2 and not any(" " in argument for argument in arguments) else arguments[0]
        if not looks_like_a_path(arguments[0]) and _is_question(whole):
            example = 'for example pmclip-deploy infer scan.dcm "is there a fracture?"'
            raise UsageError("no image given, only questions", f"put the image before the question, {example}")
        raise InputError(f"{arguments[0] or repr('')}: no such file or folder", "check the path")
    if not questions or not all(question.strip() for question in questions):
        raise UsageError("no question given", 'add a question, for example "is there a fracture?"')
    if _is_split(questions):
        whole = " ".join(questions)[:200].strip(QUOTES)
        raise UsageError(f"a question is not in quotes, so {len(questions)} questions came", f'put it in double quotes: "{whole}"')
    return images, questions


def _is_split(questions: list[str]) -> bool:
    """Whether a shell made several questions of one: single words that ask nothing, or a beginning that asks only with what follows."""
    words = [question for question in questions if len(question.split()) == 1]
    if len(words) > 1:
        return not all(map(_is_question, words))
    begins = len(questions) > 1 and len(questions[0].split()) < 3 and not _is_question(questions[0])
    return begins and _is_question(" ".join(questions))


def _is_question(text: str) -> bool:
    from pmclip_deploy.questions import understood

    return text.rstrip().endswith("?") or understood(text).answerable


def _print_answers(answers: "list[Answer]", prevalence: float | None) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("Question", "Answer", "Confidence", "Runners-up", title=Text(one_line(answers[0].image.source)), title_justify="left")
    for answer in answers:
        given = Text(one_line(answer.answer), "bold") if answer.answer is not None else Text(f"no answer: {one_line(answer.reason or '')}")
        others = () if answer.worth else answer.candidates if answer.abstained or answer.source == "header" else answer.candidates[1:]
        ups = Text(", ".join(f"{one_line(c.answer)} {c.probability:.0%}" for c in others))
        if answer.worth is not None:
            given.append(Text(f" - {answer.worth.sentence(prevalence)}", "not bold"))
        table.add_row(Text(one_line(answer.question)), given, Text(_confidence(answer)), ups)
    console = console_for_tables()
    console.print(table)
    times = answers[0].timings_ms
    console.print(Text(f"image: {_image_line(answers[0].image)}"))
    console.print(Text(f"model: {answers[0].model}"))
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


def _image_line(image: "ImageInfo") -> str:
    parts = [image.format.upper(), image.modality, f"{image.columns} x {image.rows}"]
    if image.frames > 1:
        parts.append(f"frame {image.frame} (the file has frames 0 to {image.frames - 1})")
    if image.window:
        parts.append(f"window center {image.window[0]:g} width {image.window[1]:g}")
    return ", ".join(one_line(part) for part in parts if part)
