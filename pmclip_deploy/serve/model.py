"""The model: one queue in front of one predictor."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pmclip_deploy.predictor import Predictor
from pmclip_deploy.serve.problems import Problem

T = TypeVar("T")


@dataclass
class _Job:
    work: Callable[[Predictor], Any]
    gone: Callable[[], Awaitable[bool]]  # whether the client has left
    deadline: float
    result: "asyncio.Future[Any]"


class Model:
    """Runs a few pieces of work side by side, each alone: a batch of pictures has other bits (docs/measured/batches.md)."""

    def __init__(self, predictor: Predictor, threads: int, timeout_s: float) -> None:
        self.predictor, self.timeout_s = predictor, timeout_s
        self.dropped = 0  # jobs whose client had left, or whose time was over
        self._jobs = asyncio.Queue[_Job]()
        self._threads, self._count = ThreadPoolExecutor(threads, "model"), threads
        self._loops: list[asyncio.Task[None]] = []

    def open(self) -> None:
        self._loops = [asyncio.ensure_future(self._run()) for _ in range(self._count)]

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    async def run(self, work: Callable[[Predictor], T], gone: Callable[[], Awaitable[bool]]) -> T:
        """What ``work`` makes of the predictor. Raises a Problem if that took too long."""
        job = _Job(work, gone, time.monotonic() + self.timeout_s, asyncio.get_running_loop().create_future())
        self._jobs.put_nowait(job)
        return cast(T, await job.result)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            job = await self._jobs.get()
            if job.result.done():
                continue
            late = time.monotonic() > job.deadline
            if late or await job.gone():
                self.dropped += 1
                job.result.set_exception(Problem(504, "timeout", f"no answer in {self.timeout_s:g} s"))
                continue
            try:
                made = await loop.run_in_executor(self._threads, job.work, self.predictor)
            except Exception as error:
                _settle(job.result, error=error)
            else:
                _settle(job.result, made)

    def close(self) -> None:
        for loop in self._loops:
            loop.cancel()
        self._threads.shutdown(wait=False)


def _settle(future: "asyncio.Future[Any]", result: Any = None, error: Exception | None = None) -> None:
    if future.done():  # nobody waits for it
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
