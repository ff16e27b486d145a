"""Silence for the thread that reads, and for no other: parsers quote elements in warnings and log records, and so might name a patient.

Global warning filters and log levels stay as they are. Each parser's logger gets a filter, and its module a stand-in for ``warnings``, for
the rest of the process; both drop what comes from a thread that reads, and hand on all else.
"""

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# pydicom 3 warns from misc.py alone; its other loggers are children, whose records do not pass their parent's filters.
LOGGERS = (
    *("pydicom", "pydicom.pixels.decoders.base", "pydicom.pixels.utils", "openjpeg", "openjpeg.utils", "jpeg_ls"),
    *("PIL.PngImagePlugin", "PIL.TiffImagePlugin"),
)
MODULES = ("pydicom.misc", "openjpeg.utils", "PIL.Image", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.TiffImagePlugin")


class _Thread(threading.local):
    readings = 0


_thread = _Thread()


@contextmanager
def quiet() -> Iterator[None]:
    """Drops what parsers say in this thread. One that is imported within needs ``quieten`` before it runs."""
    quieten()
    _thread.readings += 1
    try:
        yield
    finally:
        _thread.readings -= 1


def quieten() -> None:
    """Reaches the parsers that are imported by now."""
    for name in MODULES:
        if (module := sys.modules.get(name)) is not None:
            module.warnings = _WARNINGS  # type: ignore[attr-defined]
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_of_others)  # once: a logger keeps each filter once


def _of_others(record: logging.LogRecord) -> bool:
    return not _thread.readings


class _Warnings(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(warnings, name)

    def warn(self, message: Any, category: Any = None, stacklevel: int = 1, *more: Any, **named: Any) -> None:
        if not _thread.readings:
            warnings.warn(message, category, stacklevel + 1, *more, **named)


_WARNINGS = _Warnings("warnings")
