"""The process that decodes. A codec that aborts, loops or takes all memory ends this process and one request.

It reads (seconds, function, arguments) from stdin and writes (error, result) to stdout. A message is a pickle and the buffers that stand
outside of it: files and pixels, which are not copied while other threads wait. Only its parent writes to it.
"""

import os
import pickle
import struct
import sys
from importlib import import_module
from typing import IO, Any

LENGTH = struct.Struct("<Q")
MODULE = "pmclip_deploy.serve.reading"


def main(memory: int) -> None:
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # codecs print there, and may quote a file
        os.dup2(null, stream)
    functions = import_module(MODULE)
    _limit(memory)
    while (message := receive(source)) is not None:
        seconds, name, arguments = message
        _allow(int(seconds) + 1)
        failed: Exception | None = None
        result = None
        try:
            result = getattr(functions, name)(*arguments)
        except MemoryError:
            failed = _of_memory()
        except Exception as error:
            failed = _of_error(error)
        send(sink, (failed, result))


def send(file: IO[bytes], message: Any) -> None:
    buffers = list[pickle.PickleBuffer]()
    pickled = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(pickled), *(buffer.raw() for buffer in buffers)]
    for number in (len(parts), *(part.nbytes for part in parts)):
        file.write(LENGTH.pack(number))
    for part in parts:
        file.write(part)
    file.flush()


def receive(file: IO[bytes]) -> Any:
    """None at the end of the pipe. Arrays in a message are read-only. Raises EOFError in the middle of a message."""
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    lengths = [LENGTH.unpack(_exactly(file, LENGTH.size))[0] for _ in range(LENGTH.unpack(head)[0])]
    pickled, *buffers = [_exactly(file, length) for length in lengths]
    return pickle.loads(pickled, buffers=buffers)  # noqa: S301  # between this program's own processes


def _exactly(file: IO[bytes], length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data


def _limit(memory: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the picture
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _allow(seconds: int) -> None:
    """So many seconds of processor time more."""
    if sys.platform == "win32":
        return
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, hard))


def _of_memory() -> Exception:
    from pmclip_deploy.errors import InputError

    return InputError("the picture needs more memory than a picture may take here", "make it smaller")


def _of_error(error: Exception) -> Exception:
    from pmclip_deploy.errors import PmclipError

    return error if isinstance(error, PmclipError) else PmclipError(f"internal: {type(error).__name__}")
