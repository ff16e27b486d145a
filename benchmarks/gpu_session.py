"""Stage "session" of `benchmarks.gpu`: the buffers, copies and CUDA graphs of a TensorRT session, with an engine that stands in.

The stand-in copies its input to its output on the stream that it is given. A rehearsal also stands in for cuda.core, in memory of the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.benchmarks.gpu_stage import Figures, Stage
from pmclip_deploy.sessions.engines.replay import SHAPES, OnGpu, Replay, Shape

SYSTEM, F32 = "replay.py", np.dtype(np.float32)
IMAGE, TINY = (1, 3, 224, 224), (1, 3, 4, 4)  # the stand-in's input


def measure(stage: Stage) -> None:
    host = Host() if stage.is_rehearsal else None
    for name, case in (
        ("run, captured from the second on", plain), ("run, never captured", partial(plain, captures=False)),
        ("an error in a capture", failing), (f"{SHAPES + 1} shapes, twice", shapes), ("an input on the GPU", on_gpu),
    ):  # fmt: skip
        stage.measure(name, SYSTEM, partial(of_case, stage, host, case))


Case = Callable[[Stage, Any, Any], Figures]


def of_case(stage: Stage, host: Any, case: Case) -> Figures:
    if host is not None:
        return case(stage, host, host)
    from cuda import core

    device = core.Device()
    device.set_current()
    return case(stage, core, device)


class Copies:
    """An ``Execution``; ``fails`` does in its second run, which is the captured one, what no capture allows."""

    def __init__(self, core: Any, device: Any, shapes: tuple[Shape, ...], fails: bool = False) -> None:
        self.core, self.device, self.fails, self.runs = core, device, fails, 0
        self.shapes, self.at = {"x": shapes[0], "y": shapes[0]}, dict[str, int]()

    def bind(self, name: str, address: int) -> None:
        self.at[name] = address

    def enqueue(self, stream: int) -> None:
        self.runs += 1
        if self.fails and self.runs == 2:
            self.device.sync()
        size = int(np.prod(self.shapes["x"])) * F32.itemsize
        x, y = (self.core.Buffer.from_handle(self.at[name], size) for name in "xy")
        y.copy_from(x, stream=self.core.Stream.from_handle(stream))


def replay_of(core: Any, device: Any, captures: bool = True, fails: bool = False) -> Replay:
    return Replay(core, device, ["x"], ["y"], {"x": F32, "y": F32}, lambda given: Copies(core, device, given, fails), captures)


def drawn(shape: Shape, count: int) -> Iterator[NDArray[np.float32]]:
    rng = np.random.default_rng(count)
    return (rng.normal(size=shape).astype(np.float32) for _ in range(count))


def size(stage: Stage) -> Shape:
    return TINY if stage.is_rehearsal else IMAGE


def wrong(replay: Replay, inputs: Iterator[NDArray[np.float32]]) -> Figures:
    found = [bool(np.array_equal(replay.run([x])[0], x)) for x in inputs]
    error = replay.capture_error
    return {"wrong": found.count(False), "samples": len(found), "capture_error": type(error).__name__ if error else "none"}


def plain(stage: Stage, core: Any, device: Any, captures: bool = True) -> Figures:
    """With the time of a whole run, copies from and to NumPy's arrays included."""
    replay = replay_of(core, device, captures)
    figures, x = wrong(replay, drawn(size(stage), 5)), next(drawn(size(stage), 1))
    found = stage.timed(partial(replay.run, [x]), 0.5)
    return {**found, **figures}


def failing(stage: Stage, core: Any, device: Any) -> Figures:
    """The session goes on without a graph, and another one can be captured afterwards."""
    figures = wrong(replay_of(core, device, fails=True), drawn(size(stage), 5))
    after = wrong(replay_of(core, device), drawn(size(stage), 5))
    return {**figures, "wrong": figures["wrong"] + after["wrong"], "capture_error_after": after["capture_error"]}


def shapes(stage: Stage, core: Any, device: Any) -> Figures:
    """More of them than a session keeps, so that the first are made again."""
    of = [(batch + 1, *size(stage)[1:]) for batch in range(SHAPES + 1)]
    return wrong(replay_of(core, device), (x for shape in (*of, *of) for x in drawn(shape, 3)))


def on_gpu(stage: Stage, core: Any, device: Any) -> Figures:
    stage.need_gpu()
    import torch

    replay, found = replay_of(core, device), []
    for x in drawn(size(stage), 4):
        array = torch.from_numpy(x).cuda()
        view = core.utils.StridedMemoryView(array, stream_ptr=int(replay.stream.handle))
        found.append(bool(np.array_equal(replay.run([OnGpu.from_view("x", view, F32)])[0], x)))
    return {"wrong": found.count(False), "samples": len(found)}


# --- in a rehearsal -------------------------------------------------------------------------------------------------------------


class Memory:
    def __init__(self, handle: int, size: int, owner: Any = None) -> None:
        self.handle, self.size, self.owner = handle, size, owner

    @classmethod
    def from_handle(cls, handle: int, size: int, owner: Any = None) -> Memory:
        return cls(handle, size, owner)

    @classmethod
    def of_size(cls, size: int, stream: Any = None) -> Memory:
        array = np.zeros(max(1, size), np.uint8)
        return cls(array.ctypes.data, size, array)

    def copy_from(self, source: Memory, stream: Any) -> None:
        stream.work(partial(ctypes.memmove, self.handle, source.handle, self.size))

    def copy_to(self, target: Memory, stream: Any) -> None:
        target.copy_from(self, stream)


class HostStream:
    """It runs at once, or keeps the work of a capture; it is its own graph builder and its own graph."""

    def __init__(self, handle: int) -> None:
        self.handle, self.stream, self.is_captured = handle, self, False
        self.kept = list[Callable[[], object]]()

    def work(self, work: Callable[[], object]) -> None:
        if self.is_captured:
            self.kept.append(work)
        else:
            work()

    def sync(self) -> None:
        pass

    def begin_building(self, mode: str) -> HostStream:
        self.is_captured = True
        return self

    def end_building(self) -> HostStream:
        self.is_captured = False
        return self

    complete = end_building
    close = end_building

    def launch(self, stream: HostStream) -> None:
        for work in self.kept:
            work()


class Host:
    """In place of cuda.core, and of its device."""

    Buffer = Memory

    def __init__(self) -> None:
        self.streams: list[HostStream] = []
        self.Stream = SimpleNamespace(from_handle=self.streams.__getitem__)
        self.LegacyPinnedMemoryResource = lambda: self

    def create_stream(self) -> HostStream:
        self.streams.append(HostStream(len(self.streams)))
        return self.streams[-1]

    create_graph_builder = create_stream

    def allocate(self, size: int, stream: Any = None) -> Memory:
        return Memory.of_size(size)

    def sync(self) -> None:
        if any(stream.is_captured for stream in self.streams):
            raise RuntimeError("a stream is being captured")
