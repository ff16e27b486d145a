"""Whose fault an error is that comes up while a file is read: the file's, or ours. Standard library only."""

import struct
import zlib

# What Python and the parsers raise on broken data, wherever it is touched.
OF_DATA = (OSError, EOFError, ValueError, ArithmeticError, BufferError, MemoryError, RecursionError, struct.error, zlib.error)
# What comes beside where an element of a file may be an object of any kind.
OF_ELEMENTS = (*OF_DATA, TypeError, AttributeError, LookupError, NotImplementedError)
NEVER_OF_DATA = (NameError, ImportError)


class Refused(Exception):
    """The file cannot be read. The message is ours and holds no patient attribute."""


def is_ours(error: BaseException) -> bool:
    """A parser or a decoder may raise anything on a broken file; what a line of our own raises must be an error of data."""
    if isinstance(error, NEVER_OF_DATA):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.split(".")[0] == "pmclip_deploy" and not isinstance(error, OF_DATA)
