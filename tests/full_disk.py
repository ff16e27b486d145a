"""A disk that fills, for this process: what a limit on the size of files, or a sync that fails, tells a writer."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """A disk that fills while a file is written, to this process."""
    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def nothing_reaches_the_disk() -> Iterator[None]:
    """Every write succeeds, and no sync does: a network file system that is full says so only then."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield
