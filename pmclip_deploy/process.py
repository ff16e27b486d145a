"""What belongs to the whole process. A library leaves it alone; the command line, whose process it is, calls ``take_over``."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

taken_over = False
stderr = Lock()  # held by whoever writes a message, and while file descriptor 2 leads nowhere


def take_over() -> None:
    """Before any other thread runs: the environment is not safe to change beside threads that read it."""
    from pmclip_deploy.threads import cpu_threads

    global taken_over
    taken_over = True
    os.environ.setdefault("OPJ_NUM_THREADS", str(cpu_threads()))  # OpenJPEG is told in no other way
    for name in ("SIGTERM", "SIGHUP"):  # of a service manager, and of a terminal that goes; Windows has no SIGHUP
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:  # not of `nohup`, which ignores it
            signal.signal(getattr(signal, name), _end)


def _end(number: int, frame: object) -> None:
    """Ends as an error does, so that temporary files go and files that were replaced stay whole. A second signal does not disturb that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def one_thread_for_numpy() -> None:
    """Its other threads spin as it is imported, on a core that hashing wants."""
    if taken_over and "numpy" not in sys.modules:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@contextmanager
def native_stderr_off() -> Iterator[None]:
    """For libraries that write straight to file descriptor 2. In a process of somebody else, whose threads write there too, they may."""
    if not taken_over:
        yield
        return
    with stderr:
        try:
            kept = os.dup(2)
        except OSError:  # closed: nothing to keep quiet
            yield
            return
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(null)
