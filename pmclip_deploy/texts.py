"""Text files that a user gives: UTF-8, with or without a byte order mark, with the line ends of any system. Standard library only."""

from collections.abc import Iterator
from pathlib import Path

from pmclip_deploy.errors import InputError

MARK = "\ufeff"  # the byte order mark, as UTF-8 has it; two files put together have one in the middle
OTHERS = {  # what a file is that begins so
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "compressed with gzip",
    b"PK\x03\x04": "a ZIP archive",
}


def lines_of_file(path: Path, hint: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of each line that is not blank, as it is read. Raises InputError with ``hint``.

    U+2028 and its like end no line: JSON may hold them.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for row in file:
                if number == 0:
                    _refuse_other(path, row)
                for line in _decoded(path, row, number + 1).removesuffix("\n").removesuffix("\r").split("\r"):
                    number += 1
                    if (text := line.removeprefix(MARK)) and not text.isspace():
                        yield number, text
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", hint) from None


def text_of_file(path: Path, hint: str) -> str:
    """The text without its byte order mark; its line ends stay as they are. Raises InputError with ``hint``."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", hint) from None
    _refuse_other(path, content)
    return _decoded(path, content, 1).removeprefix(MARK)


def _decoded(path: Path, content: bytes, number: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        number += content.count(b"\n", 0, error.start)
        raise InputError(f"{path}: line {number}: not UTF-8", "save the file as UTF-8") from None


def _refuse_other(path: Path, content: bytes) -> None:
    kind = next((kind for head, kind in OTHERS.items() if content.startswith(head)), None)
    zeros = [byte == 0 for byte in content[:4]]
    if kind is None and zeros in ([True, False] * 2, [False, True] * 2):  # Latin letters without a byte order mark
        kind = "UTF-16"
    if kind is not None:
        raise InputError(f"{path}: is {kind}", "save the file as UTF-8" if kind.startswith("UTF") else "unpack it first")
