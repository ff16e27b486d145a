"""Pickles that cost far more than they hold, refused before anything unpickles them: their opcodes are read, and nothing is run."""

import pickletools
import zipfile
from io import BytesIO
from itertools import takewhile
from os import SEEK_END
from pathlib import Path
from typing import IO

LEGACY = 5  # pickles at the start of a file that torch.save wrote before it wrote zip files
BUDGET = 10_000_000  # values in all tuples, each as often as it is there, at most
KEY = 64  # values in a key, at most; a number of more than 64 bits counts as as many for each 64 bits
MARK = 0  # what stands on the stack for a mark; anything else is a size
GETS, PUTS = ("GET", "BINGET", "LONG_BINGET"), ("PUT", "BINPUT", "LONG_BINPUT")
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Costly(ValueError):
    """What a pickle would cost, in one line."""


def check_pickles(source: Path | bytes) -> None:
    """Every pickle of a file that torch would unpickle. Raises Costly, and ValueError or BadZipFile for what is cut short or none."""
    with source.open("rb") if isinstance(source, Path) else BytesIO(source) as file:
        size = file.seek(0, SEEK_END)
        file.seek(0)
        head = file.read(4)
        file.seek(0)
        if head == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():  # all of that name: readers differ in which of two they take, and torch's knows no case
                    if info.filename.lower().endswith("data.pkl"):
                        if info.file_size > size:
                            raise Costly("a pickle with more bytes than the file")
                        with archive.open(info) as pickled:
                            check_pickle(BytesIO(pickled.read()))
        else:
            for _ in range(LEGACY):
                if file.tell() < size:
                    check_pickle(file)


def check_pickle(file: IO[bytes]) -> None:
    """Reads to the pickle's end. Raises Costly where it would cost more than it holds, ValueError where it is none.

    Of each value its size is known: 1, or of a tuple that of all in it, each as often as it is there. A tuple that is twice in the next
    doubles with each, and whoever hashes, prints or compares the last visits them all.
    """
    stack, memo, spent, start = list[int](), dict[int, int](), 0, file.tell()
    for opcode, argument, place in pickletools.genops(file):
        name, size = opcode.name, 1
        try:
            if name in GETS:
                size = memo[int(str(argument))]
            elif name == "DUP":
                size = stack[-1]
            elif name in PUTS or name == "MEMOIZE":
                memo[len(memo) if name == "MEMOIZE" else _index(argument, (place or start) - start)] = stack[-1]
                continue
            elif name == "MARK":
                stack.append(MARK)
                continue
            elif name in TUPLES or name == "TUPLE":
                size = 1 + sum(_taken(stack) if name == "TUPLE" else [stack.pop() for _ in range(TUPLES[name])])
            elif name in ("LONG1", "LONG4"):
                bits = argument.bit_length() if isinstance(argument, int) else 0
                size = 1 + bits // 64 * KEY  # wide ones can be chosen to have one hash
            else:
                before = [str(kind) for kind in opcode.stack_before]
                many = _taken(stack) if "mark" in before else []
                few = [stack.pop() for _ in takewhile(lambda kind: kind != "mark", before)]
                hashed = {"SETITEM": few[1:2], "SETITEMS": many[::2], "DICT": many[::2], "ADDITEMS": many, "FROZENSET": many}
                if any(key > KEY for key in hashed.get(name, ())):
                    raise Costly("a pickle with a key that takes too long to hash")
                stack += [1] * len(opcode.stack_after)
                continue
        except (IndexError, KeyError):
            raise ValueError("a pickle that is broken") from None
        stack.append(size)
        spent += size
        if spent > BUDGET:
            raise Costly("a pickle whose tuples take too long to hash")


def _taken(stack: list[int]) -> list[int]:
    """What is above the last mark; the mark goes too."""
    taken = []
    while (size := stack.pop()) != MARK:
        taken.append(size)
    return taken[::-1]


def _index(argument: object, place: int) -> int:
    """Of a memo, which C's unpickler makes as long as its largest index."""
    if not 0 <= (index := int(str(argument))) <= place:
        raise Costly("a pickle with an index beyond its length")
    return index

