"""A process that may die: what a codec that aborts, loops or takes all memory ends is this process, and one piece of work.

It reads (seconds, function, arguments) from stdin and writes (error, result) to stdout. A message is a pickle and the buffers that stand
outside of it: files and pixels, which are not copied while other threads wait. Only its parent writes to it, and it ends when its parent
does.
"""

import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from importlib import import_module
from pickle import PickleBuffer
from typing import IO, Any

LENGTH = struct.Struct("<Q")
# Nothing is imported from the folder that the program happens to run in, as `python -c` would.
START = "import sys; sys.path = [path for path in sys.path if path]; from pmclip_deploy.child import main; main({module!r}, {memory!r})"


class ChildEnded(Exception):
    """The process ended before it answered."""

    def __init__(self, late: bool) -> None:
        super().__init__(late)
        self.late = late  # it was ended, since it took too long


class Child:
    """A process that calls the functions of one module."""

    def __init__(self, module: str, memory: int | None = None) -> None:
        """``memory`` is the most that it may address, in bytes."""
        code = START.format(module=module, memory=memory)
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, seconds: float | None, name: str, *arguments: Any) -> Any:
        """The result of a function. Raises what it raises, and ChildEnded.

        ``seconds`` is the most that it may take, of the clock and of the processor.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(seconds, end) if seconds is not None else None
        if timer is not None:
            timer.start()
        try:
            send(self.process.stdin, (seconds, name, [PickleBuffer(each) if isinstance(each, bytes) else each for each in arguments]))
            reply = receive(self.process.stdout)
        except (OSError, EOFError):  # it is gone
            reply = None
        finally:
            if timer is not None:
                timer.cancel()
        if reply is None:
            self.close()
            raise ChildEnded(late.is_set())
        error, result = reply
        if error is not None:
            try:
                raise error
            finally:
                del error, reply  # or the error holds this frame, and with it the file, until a garbage collection
        return result

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):  # of what was still to be written
                    pipe.close()


def main(module: str, memory: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent says when it ends
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # codecs print there, and may quote a file
        os.dup2(null, stream)
    functions = import_module(module)
    if memory is not None:
        _limit(memory)
    while (message := receive(source)) is not None:
        seconds, name, arguments = message
        if seconds is not None:
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
    buffers = list[PickleBuffer]()
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
