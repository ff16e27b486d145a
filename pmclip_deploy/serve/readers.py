"""Processes that decode, each with limits, and each replaced when it has died."""

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pickle import PickleBuffer
from typing import Any

from pmclip_deploy.errors import InputError
from pmclip_deploy.serve.child import receive, send
from pmclip_deploy.serve.problems import Problem

START_S = 120.0  # for the imports of a new process, on a busy machine
START = "from pmclip_deploy.serve.child import main; main({memory})"


class DecoderEnded(InputError):
    """The process died while it read a file, by the file or by something else."""


class Reader:
    """One process."""

    def __init__(self, memory: int) -> None:
        code = START.format(memory=memory)
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, seconds: float, name: str, *arguments: Any) -> Any:
        """The result of a function of ``reading``. Raises what it raises, and InputError or a Problem if the process ends meanwhile.

        ``seconds`` is the most that it may take, of the clock and of the processor.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            send(self.process.stdin, (seconds, name, [PickleBuffer(each) if isinstance(each, bytes) else each for each in arguments]))
            reply = receive(self.process.stdout)
        except (OSError, EOFError):  # it is gone
            reply = None
        finally:
            timer.cancel()
        if reply is None:
            self.close()
            if late.is_set():
                raise Problem(504, "timeout", f"the picture was not decoded in {seconds:g} s")
            raise DecoderEnded("the upload: the decoder ended while it read the file", "export the picture again, uncompressed")
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
