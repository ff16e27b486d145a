"""`pmclip-deploy train report`: reports what a dataset holds and what its splits share. Needs no extra."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pmclip_deploy.cli.options import Json
from pmclip_deploy.cli.output import print_json
from pmclip_deploy.console import decimal, one_line


def report(
    data: Annotated[Path, typer.Option("--data", help="Folder of the dataset.")],
    seed: Annotated[int | None, typer.Option(help="Seed of an image-disjoint split. With it, the report covers that split too.")] = None,
    as_json: Json = False,
) -> None:
    """Report the sizes of a dataset, the balance of its answers, and what its splits share. Needs no extra."""
    from pmclip_deploy.train.report import report_from_folder

    document = report_from_folder(data, seed)
    if as_json:
        print_json(document)
    else:
        _print_report(document)


def _print_report(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(one_line(f"{document['dataset']} in {document['folder']}")))
    for reason, count in document["skipped"].items():
        console.print(f"left out: {count} ({reason})")
    _print_splits(console, document["holds"], document["splits"], document["between"])
    if disjoint := document.get("image_disjoint"):
        how = "by name and by picture" if disjoint["by_picture"] else "by name alone, because some images are missing"
        console.print(f"\nimage-disjoint split of seed {disjoint['seed']}: {how}")
        _print_splits(console, document["holds"], disjoint["splits"], disjoint["between"])


def _print_splits(console: Any, holds: str, splits: dict[str, Any], between: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("", *splits, title="splits", title_justify="left")

    def row(name: str, *keys: str) -> None:
        table.add_row(name, *(Text(one_line(_cell(_at(about, keys)))) for about in splits.values()))

    row(holds, holds)
    row("images", "images")
    table.add_row("missing images", *("all" if s["images_missing"] == s["images"] else str(s["images_missing"]) for s in splits.values()))
    row(f"{holds} per image", "per_image")
    if holds == "captions":
        row("different captions", "distinct")
        row("words", "words")
    else:
        row("closed", "closed")
        row("open", "open")
        row("category", "category")
        for kind in ("all", "open", "closed"):
            row(f"answers, {kind}: different", "answers", kind, "distinct")
            row(f"answers, {kind}: majority's share", "answers", kind, "majority_share")
            row(f"answers, {kind}: entropy, bits", "answers", kind, "entropy")
            row(f"answers, {kind}: most frequent", "answers", kind, "top")
        row("labels, MEVF's", "vocabulary", "mevf")
        row("labels, QCR's: closed", "vocabulary", "qcr_closed")
        row("labels, QCR's: open", "vocabulary", "qcr_open")
    console.print(table)
    for shared in between:
        _print_shared(console, shared)


def _print_shared(console: Any, shared: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(
        "", f"of {shared['of']}, in {shared['in']}", title=f"what {shared['of']} shares with {shared['in']}", title_justify="left"
    )
    table.add_row("images, by name", f"{shared['images_by_name']} of {shared['images']}")
    seen = shared["images_by_picture"]
    table.add_row("images, by picture", "not measured: images are missing" if seen is None else f"{seen} of {shared['images']}")
    if "captions" in shared:
        table.add_row("captions", _cell(shared["captions"]))
    else:
        table.add_row("questions, word for word", _cell(shared["questions"]))
        table.add_row("questions about the same image", _cell(shared["questions_about_the_same_image"]))
        for name, known in shared["answers_known"].items():
            said = ", ".join(f"{kind} {_cell(share)}" for kind, share in known.items() if share is not None)
            table.add_row(f"answers that {name.upper()}'s labels hold: accuracy at most", said)
    console.print(table)


def _at(about: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = about
    for key in keys:
        value = None if value is None else value[key]
    return value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(f"{item['answer']} {item['count']}" for item in value)
    if isinstance(value, dict) and "median" in value:
        span = f"{value['min']} to {value['max']}" if value["min"] != value["max"] else f"{value['min']}"
        return f"{span}, median {value['median']:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {count}" for key, count in value.items())
    return decimal(value, ".3f") if isinstance(value, float) else str(value)
