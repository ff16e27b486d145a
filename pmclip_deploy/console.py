"""What a person at a terminal reads: one line at a time on stderr, and a progress bar."""

import re
import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from pmclip_deploy import process

T = TypeVar("T")
quiet = False  # --quiet: neither notes nor progress bars


def one_line(text: str) -> str:
    """For a terminal: no line breaks, and no control characters that a file's name might smuggle in."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def counted(number: int, noun: str, nouns: str = "") -> str:
    """A count with its noun: "1 file", "1,200 files"."""
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"


def decimal(value: float, form: str) -> str:
    """``format`` without "-0.000". A difference, with its "+", keeps the side of 0 on which it is."""
    text = format(value + 0.0, form)  # which makes 0 of -0.0
    return text if "+" in form or set(text) - set("-0.,%") else text.removeprefix("-")


def print_error(message: str) -> None:
    _print(f"error: {message}")


def print_note(message: str) -> None:
    if not quiet:
        _print(message)


def _print(message: str) -> None:
    with process.stderr:
        print(one_line(_PARAMETER.sub(r"--\1 \2", message)), file=sys.stderr)


_PARAMETER = re.compile(r'\b(bundle|data|device)="([^"]*)"')  # of a hint, as Python writes it; options have the same names


def progress(items: Sequence[T], what: str) -> Iterable[T]:
    """``items``, with a bar on stderr where that is a terminal."""
    if len(items) < 2 or quiet or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description=what, console=Console(stderr=True), transient=True)


LONG = 100  # pictures or rows from which on work takes so long that `evaluate` and `search index` say what begins


def stages(items: Sequence[T], what: str) -> Iterable[T]:
    """``progress`` for work of minutes: where stderr is no terminal, one line says what begins, and of how many items."""
    if not sys.stderr.isatty():
        print_note(what if len(items) < 2 else f"{what} ({len(items)})")
    return progress(items, what)
