"""The model: one queue in front of one predictor."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pmclip_deploy.predictor import Predictor
from pmclip_deploy.serve.problems import Problem

P = TypeVar("P")
T = TypeVar("T")
DEADLINE: ContextVar[float] = ContextVar("deadline")  # of the work that this thread does, on the clock of time.monotonic


@dataclass
class _Job:
    read: Callable[[], Awaitable[Any]]
    work: Callable[[Predictor, Any], Any]
    gone: Callable[[], Awaitable[bool]]  # whether the client has left
    deadline: float
    result: "asyncio.Future[Any]"


class Model:
    """Runs a few pieces of work side by side, each alone: a batch of pictures has other bits (docs/measured/batches.md).

    ``ahead`` pictures are decoded while others are computed. The rest of the queue waits as files, which are smaller.
    """

    def __init__(self, predictor: Predictor, threads: int, ahead: int, timeout_s: float) -> None:
        self.predictor, self.timeout_s = predictor, timeout_s
        self.dropped = 0  # jobs whose client had left, or whose time was over
        self._jobs = asyncio.Queue[_Job]()
        self._threads, self._count = ThreadPoolExecutor(threads, "model"), threads + ahead
        self._loops: list[asyncio.Task[None]] = []

    def open(self) -> None:
        self._loops = [asyncio.ensure_future(self._run()) for _ in range(self._count)]

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    async def run(self, read: Callable[[], Awaitable[P]], work: Callable[[Predictor, P], T], gone: Callable[[], Awaitable[bool]]) -> T:
        """What ``work`` makes of the predictor and of what ``read`` gives.

        Raises what they raise, and a Problem if the client had left, or the time was over, before the turn came.
        """
        job = _Job(read, work, gone, time.monotonic() + self.timeout_s, asyncio.get_running_loop().create_future())
        self._jobs.put_nowait(job)
        return cast(T, await job.result)

    async def _run(self) -> None:
        while True:
            await self._settle(await self._jobs.get())  # no variable of this loop keeps a picture until the next job

    async def _settle(self, job: _Job) -> None:
        made, failed = None, None
        try:
            made = await self._made(job)
        except Exception as error:
            failed = error.with_traceback(None)  # its frames hold the picture
        if job.result.done():  # nobody waits for it
            return
        if failed is None:
            job.result.set_result(made)
        else:
            job.result.set_exception(failed)

    async def _made(self, job: _Job) -> Any:
        if job.result.done():
            return None
        if time.monotonic() > job.deadline or await job.gone():
            self.dropped += 1
            raise Problem(504, "timeout", f"no answer in {self.timeout_s:g} s")
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._do, job, await job.read())

    def _do(self, job: _Job, read: Any) -> Any:
        DEADLINE.set(job.deadline)
        return job.work(self.predictor, read)

    def close(self) -> None:
        for loop in self._loops:
            loop.cancel()
        self._threads.shutdown(wait=False)
