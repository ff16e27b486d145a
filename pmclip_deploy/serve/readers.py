"""Processes that decode, each with limits, and each replaced when it has died."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pmclip_deploy.child import Child, ChildEnded
from pmclip_deploy.errors import InputError
from pmclip_deploy.serve.problems import Problem

START_S = 120.0  # for the imports of a new process, on a busy machine


class DecoderEnded(InputError):
    """The process died while it read a file, by the file or by something else."""


class Reader(Child):
    """One process."""

    def __init__(self, memory: int) -> None:
        super().__init__("pmclip_deploy.serve.reading", memory)

    def call(self, seconds: float | None, name: str, *arguments: Any) -> Any:
        """As ``Child.call``; raises InputError or a Problem if the process ends meanwhile."""
        try:
            return super().call(seconds, name, *arguments)
        except ChildEnded as ended:
            if ended.late:
                raise Problem(504, "timeout", f"the picture was not decoded in {seconds:g} s") from None
            raise DecoderEnded("the upload: the decoder ended while it read the file", "export the picture again, uncompressed") from None


class Readers:
    """A number of processes, each of which reads one file at a time."""

    def __init__(self, count: int, memory: int, seconds: float) -> None:
        self.count, self.memory, self.seconds = count, memory, seconds
        self.restarts = 0
        self._threads = ThreadPoolExecutor(count + 1, "readers")
        self._idle = asyncio.Queue[Reader]()
        self._all = set[Reader]()
        self._settling = set[asyncio.Task[None]]()

    async def open(self) -> None:
        await asyncio.gather(*(self._new() for _ in range(self.count)))

    @property
    def are_ready(self) -> bool:
        return any(reader.is_alive for reader in self._all)

    async def call(self, name: str, *arguments: Any) -> Any:
        """``Reader.call`` in the process that is free first. A process that dies is replaced while the others go on.

        Raises also a Problem if no process was free in time.
        """
        try:
            reader = await asyncio.wait_for(self._idle.get(), self.seconds)
        except asyncio.TimeoutError:
            raise Problem(504, "timeout", f"no process was free to decode the picture in {self.seconds:g} s") from None
        running = asyncio.get_running_loop().run_in_executor(self._threads, reader.call, self.seconds, name, *arguments)
        try:
            return await asyncio.shield(running)
        finally:
            if running.done() and reader.is_alive:
                self._idle.put_nowait(reader)
            else:  # it died, or nobody waits for it any more
                task = asyncio.ensure_future(self._settle(reader, running))
                self._settling.add(task)
                task.add_done_callback(self._settling.discard)

    async def _settle(self, reader: Reader, running: "asyncio.Future[Any]") -> None:
        await asyncio.wait([running])
        running.exception()
        if reader.is_alive:
            self._idle.put_nowait(reader)
            return
        self.restarts += 1
        self._all.discard(reader)
        await self._new()

    async def _new(self) -> None:
        loop = asyncio.get_running_loop()
        reader = await loop.run_in_executor(self._threads, Reader, self.memory)
        self._all.add(reader)
        await loop.run_in_executor(self._threads, reader.call, START_S, "warm_up")
        self._idle.put_nowait(reader)

    def close(self) -> None:
        for reader in self._all:
            reader.close()
        self._threads.shutdown(wait=False)
