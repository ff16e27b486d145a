"""What several commands print: a JSON document, tables, the notes of a predictor."""

import json
from typing import TYPE_CHECKING, Any

from pmclip_deploy.console import print_note

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
