"""What several commands print or write: a JSON document, tables, the rows of a file, the notes of a predictor."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmclip_deploy.console import print_note
from pmclip_deploy.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pmclip_deploy.predictor import Predictor

RESEARCH_ONLY = "Research use only; not a medical device."


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))


def print_notes(predictor: "Predictor") -> None:
    for note in dict.fromkeys(predictor.notes):
        print_note(note)


def console_for_tables() -> "Console":
    """As wide as the terminal, and 120 columns in a pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    return console


class RowsFile:
    """The file of --output: CSV or JSON lines, by its suffix. Each row is in the file as soon as it is known.

    An existing file is replaced when the first row is there. Raises UsageError if the file cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        if path.suffix.lower() not in (".csv", ".jsonl"):
            raise UsageError(f"{path}: --output writes JSON lines or CSV", "give the file a name that ends in .jsonl or .csv")
        if path.is_dir() or not path.absolute().parent.is_dir():
            reason = "is a folder" if path.is_dir() else "its folder does not exist"
            raise UsageError(f"{path}: {reason}", "give --output the name of a file")
        self.path, self.columns, self.begun = path, columns, False

    def add(self, document: Mapping[str, Any], rows: Iterable[Mapping[str, object]]) -> None:
        """``document`` is a line of JSON lines, ``rows`` are the same for CSV: cells by column."""
        import csv

        from pmclip_deploy.atomic import write_errors

        with (
            write_errors(f"{self.path}:", "give another --output"),
            self.path.open("a" if self.begun else "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
        ):
            if self.path.suffix.lower() == ".jsonl":
                file.write(json.dumps(document, allow_nan=False) + "\n")
            else:
                table = csv.DictWriter(file, self.columns)
                if not self.begun:
                    table.writeheader()
                table.writerows(rows)
        self.begun = True

    def add_unreadable(self, documents: Iterable[Mapping[str, str]]) -> None:
        """The files that could not be read, each with its error."""
        for document in documents:
            self.add(document, [{"image": document["source"], "error": document["message"]}])
