"""Many items, several of them at a time: one is read beside another that is computed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice, repeat
from typing import TypeVar

from pmclip_deploy.errors import InputError
from pmclip_deploy.threads import cpu_threads

MOST = 4  # threads: each holds a picture while it reads it

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(make: Callable[[T], R], items: Iterable[T]) -> Iterator[R | InputError]:
    """What ``make`` gives for each item, in order, by as many threads as this process may use cores, MOST at most.

    An InputError is the result of its item. Any other error is raised in its item's turn. At most two items a thread are begun before
    their turn. If the iterator is closed or collected, the threads end with the items that they are at.
    """
    workers, left = min(cpu_threads(), MOST), iter(items)
    first = list(islice(left, 2))
    if workers < 2 or len(first) < 2:
        yield from map(outcome, repeat(make), chain(first, left))
        return
    begun = deque[Future[R | InputError]]()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in chain(first, left):
            begun.append(pool.submit(outcome, make, item))
            if len(begun) > 2 * workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # one of its own threads may be what collects the iterator


def outcome(make: Callable[[T], R], item: T) -> R | InputError:
    """What ``make`` gives for the item, or the InputError that it raises."""
    try:
        return make(item)
    except InputError as error:
        return error


def made(result: R | InputError) -> R:
    """The result of an item alone. Raises the item's InputError."""
    if isinstance(result, InputError):
        raise result
    return result


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """``size`` items each, the last one with what is left."""
    left = iter(items)
    while part := list(islice(left, size)):
        yield part
