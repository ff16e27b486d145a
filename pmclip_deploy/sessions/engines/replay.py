"""The half of an engine's session that needs cuda.core alone: buffers, copies and CUDA graphs. Of an engine it knows an ``Execution``."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from ctypes import c_byte
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.errors import UsageError

Shape: TypeAlias = tuple[int, ...]

SHAPES = 16  # input shapes that a session is ready for at a time; each has its buffers, its context and its CUDA graph


class Execution(Protocol):
    """An engine that is ready for one combination of input shapes: a context of TensorRT's, or what stands in for one."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Of every input and output."""

    def bind(self, name: str, address: int) -> None:
        """Says where a tensor lies on the GPU; once, before the first ``enqueue``."""

    def enqueue(self, stream: int) -> None:
        """Puts its work on the CUDA stream of this handle, which may be in a capture, and does not wait. Raises if it cannot."""


class Replay:
    """One stream of a device. The first run of a shape is a plain one, the second is captured, and its CUDA graph is run from then on."""

    def __init__(
        self,
        core: Any,
        device: Any,
        inputs: Sequence[str],
        outputs: Sequence[str],
        types: Mapping[str, np.dtype[Any]],
        execution_for: Callable[[tuple[Shape, ...]], Execution],
        captures: bool = True,
    ) -> None:
        """``core`` is the module cuda.core, ``device`` its device. ``execution_for`` takes the inputs' shapes, in their order.

        A shape that is not among the last SHAPES is asked for again.
        """
        self._core, self._device, self._inputs, self._outputs, self._types = core, device, tuple(inputs), tuple(outputs), types
        self._execution_for, self._captures = execution_for, captures
        self.stream = device.create_stream()
        self.capture_error: Exception | None = None  # the last; an engine that cannot be captured goes on as it is
        self._ready = lru_cache(SHAPES)(self._ready_for)

    def run(self, given: "Sequence[NDArray[Any] | OnGpu]") -> list[NDArray[Any]]:
        """Copies of the outputs, of inputs that have the engine's types; in the order of both. The device is current in this thread."""
        ready = self._ready(tuple(array.shape for array in given))
        for name, array in zip(self._inputs, given, strict=True):
            if isinstance(array, np.ndarray):
                np.copyto(ready.host[name], array)
                ready.gpu[name].copy_from(ready.pinned[name], stream=self.stream)
            else:
                source = self._core.Buffer.from_handle(array.address, array.bytes, owner=array.owner)
                ready.gpu[name].copy_from(source, stream=self.stream)
        if ready.runs == 1 and self._captures:
            ready.graph = self._captured(ready)
        if ready.graph is not None:
            ready.graph.launch(self.stream)
        else:
            self._enqueue(ready, self.stream, self.stream)
        ready.runs += 1
        self.stream.sync()
        return [ready.host[name].copy() for name in self._outputs]

    def _enqueue(self, ready: "Ready", stream: Any, target: Any) -> None:
        """``target`` is the stream, or the graph builder that captures it."""
        ready.execution.enqueue(int(stream.handle))
        for name in self._outputs:
            ready.gpu[name].copy_to(ready.pinned[name], stream=target)

    def _captured(self, ready: "Ready") -> Any:
        """A CUDA graph, or None. It is captured on another stream: one whose capture failed is of no use until the capture is ended."""
        builder = self._device.create_graph_builder()
        try:
            builder.begin_building("thread_local")
            self._enqueue(ready, builder.stream, builder)
            return builder.end_building().complete()
        except Exception as error:
            self.capture_error = error
            return None
        finally:
            with suppress(Exception):
                builder.close()  # ends the capture; end_building refuses to end one that became invalid

    def _ready_for(self, shapes: tuple[Shape, ...]) -> "Ready":
        execution = self._execution_for(shapes)
        ready, pinned = Ready(execution, {}, {}, {}), self._core.LegacyPinnedMemoryResource()
        for name in (*self._inputs, *self._outputs):
            shape, dtype = execution.shapes[name], self._types[name]
            size = bytes_of(shape, dtype)
            ready.gpu[name], ready.pinned[name] = self._device.allocate(size, stream=self.stream), pinned.allocate(size)
            memory = (c_byte * size).from_address(int(ready.pinned[name].handle))  # DLPack may hand it over as read-only
            ready.host[name] = np.frombuffer(memoryview(memory), dtype).reshape(shape)
            execution.bind(name, int(ready.gpu[name].handle))
        return ready


@dataclass
class Ready:
    """What one combination of input shapes runs with. Buffers keep their addresses: a CUDA graph holds them."""

    execution: Execution
    gpu: dict[str, Any]
    pinned: dict[str, Any]
    host: dict[str, NDArray[Any]]  # views of ``pinned``
    runs: int = 0
    graph: Any = None


@dataclass(frozen=True)
class OnGpu:
    """A C-contiguous array in the GPU's memory, of rows of ``row`` bytes."""

    address: int
    shape: Shape
    row: int
    owner: Any

    @classmethod
    def from_view(cls, name: str, view: Any, dtype: np.dtype[Any]) -> "OnGpu":
        """``view`` has ptr, shape, dtype, strides in elements (None where contiguous), as cuda.core's StridedMemoryView."""
        shape = tuple(view.shape)
        expected = tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))
        if not shape or view.dtype != dtype or (view.strides is not None and tuple(view.strides) != expected):
            raise UsageError(f"{name} on the GPU must be a C-contiguous array of {dtype}, not {view.dtype} with strides {view.strides}")
        return cls(int(view.ptr), shape, expected[0] * dtype.itemsize, view)

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.row

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> "OnGpu":
        start, stop, _ = rows.indices(len(self))
        return OnGpu(self.address + start * self.row, (stop - start, *self.shape[1:]), self.row, self.owner)


def bytes_of(shape: Shape, dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
