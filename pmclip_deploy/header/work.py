"""How much work the elements of one file may cost: a count of pydicom's reads, so that the answer is the same on every machine.

A read takes a few microseconds, and what pydicom makes of it up to 250 bytes: an item of no bytes costs three.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pmclip_deploy.faults import Refused

READS = 5 << 15  # of a file without a picture: 40 MiB
MOST_READS = 3 << 18  # of any file: seconds
PICTURE = 64  # bytes of pixels that pay for one more read: a frame brings its own functional groups


class _Work(threading.local):
    left = READS  # of this thread's file


_work = _Work()


@contextmanager
def limited() -> Iterator[None]:
    """Gives this thread a new limit, for one file."""
    before, _work.left = _work.left, READS
    try:
        yield
    finally:
        _work.left = before


def allow(pixel_bytes: int) -> None:
    """At least so many reads more as a picture of so many bytes pays for."""
    _work.left = max(_work.left, READS + min(max(pixel_bytes, 0) // PICTURE, MOST_READS))


def spend(reads: int = 1) -> None:
    """Raises Refused once the limit is reached, and from then on."""
    _work.left -= reads
    if _work.left < 0:
        raise Refused("its header has more elements, items or bytes than a picture of its size needs")


class _Counted(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        spend()
        return super().read(size)


def sequence_of(dataset: Any, tag: int, element: Any) -> Sequence[Any]:
    """The items of a sequence, converted within the limit if that has not been done. Raises what pydicom raises, and Refused."""
    if isinstance(element.value, bytes) and element.value:
        from pydicom import DataElement, filereader

        charset = dataset.original_character_set or "iso8859"
        try:
            items = filereader.read_sequence(
                _Counted(element.value), element.is_implicit_VR, element.is_little_endian, len(element.value), charset
            )
        except OSError:
            spend(0)  # pydicom makes an OSError of anything that a read raises
            raise
        dataset[tag] = DataElement(tag, "SQ", items)
    value = dataset[tag].value
    return value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else ()
