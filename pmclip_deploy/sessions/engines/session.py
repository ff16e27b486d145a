"""A session that runs one TensorRT engine: its buffers, shapes, types and CUDA graphs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.errors import DeviceError, UsageError
from pmclip_deploy.sessions.engines import OR_LATER, EngineBackend, cuda_core, gpu, line

if TYPE_CHECKING:
    from pmclip_deploy.bundle.types import Engine

Shape: TypeAlias = tuple[int, ...]
Range: TypeAlias = tuple[Shape, Shape]  # the least and the largest shape of an input

SHAPES = 16  # input shapes that a session is ready for at a time; each has its buffers, its context and its CUDA graph


class TensorRTSession:
    """One engine, one stream. Not run anywhere yet: docs/measured/tensorrt.md says what is tested."""

    device = "cuda"

    def __init__(self, backend: EngineBackend, row: "Engine", onnx: Path, sha256: str) -> None:
        """``row`` is the plan's, ``onnx`` the graph that it was built from and lies beside, ``sha256`` the plan's hash."""
        self.backend = backend.name
        self._plan, self._title, self._captures, self._errors = onnx.with_name(row.file), backend.title, backend.captures, list[str]()
        self._trt = trt = backend.package()
        self._gpu, self._core = gpu(), cuda_core()
        try:
            self._log = logger(trt, lambda line, is_error: self._errors.append(line) if is_error else None)
            self._runtime = trt.Runtime(self._log)  # the engine needs both as long as it lives
            if row.version.endswith(OR_LATER):
                self._runtime.engine_host_code_allowed = True  # such a plan brings its own runtime
            self._engine = engine = self._runtime.deserialize_cuda_engine(np.memmap(self._plan, np.uint8, "r"))
            if engine is None:
                raise RuntimeError("it gives no reason")
            if engine.refittable:  # its weights were left out
                refitter = trt.Refitter(engine, self._log)
                if not (trt.OnnxParserRefitter(refitter, self._log).refit_from_file(str(onnx)) and refitter.refit_cuda_engine()):
                    raise RuntimeError("its weights do not come from its ONNX graph")
            names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
            given = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
            self.inputs, self.outputs = (tuple(n for n in names if (n in given) is wanted) for wanted in (True, False))
            self._types = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
            self._profiles = [[self._range(name, i) for name in self.inputs] for i in range(engine.num_optimization_profiles)]
            self._stream = self._gpu.create_stream()
            config = backend.runtime_config(engine, sha256, self)
            self._config = () if config is None else (config,)
        except Exception as error:
            raise self._failed("cannot load it", error) from None
        self._ready = lru_cache(SHAPES)(self._ready_for)
        self._lock = Lock()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Inputs are NumPy arrays, or C-contiguous arrays on the GPU with ``__cuda_array_interface__`` (pycuda, CuPy, torch).

        A batch above the engine's largest is run in parts. Raises UsageError for a shape that no profile of the engine takes,
        DeviceError where the GPU fails.
        """
        with self._lock:
            self._gpu.set_current()
            self._errors.clear()
            given = [self._given(name, inputs[name]) for name in self.inputs]
            largest = max(profile[0][1][0] for profile in self._profiles)
            done = [self._run([array[rows] for array in given]) for rows in parts(len(given[0]), largest)]
        return {name: np.concatenate([part[i] for part in done]) for i, name in enumerate(self.outputs)}

    def _run(self, given: "Sequence[NDArray[Any] | OnGpu]") -> list[NDArray[Any]]:
        ready = self._ready(tuple(array.shape for array in given))
        try:
            for name, array in zip(self.inputs, given, strict=True):
                if isinstance(array, np.ndarray):
                    np.copyto(ready.host[name], array)
                    ready.gpu[name].copy_from(ready.pinned[name], stream=self._stream)
                else:
                    source = self._core.Buffer.from_handle(array.address, array.bytes, owner=array.owner)
                    ready.gpu[name].copy_from(source, stream=self._stream)
            self._enqueue(ready)
            self._stream.sync()
        except Exception as error:
            raise self._failed("cannot run it", error) from None
        return [ready.host[name].copy() for name in self.outputs]

    def _enqueue(self, ready: "Ready") -> None:
        """The first run of a shape as it is, so that what is lazy is done; the second is captured; from then on its CUDA graph is run."""

        def enqueue(stream: Any) -> None:
            if not ready.context.execute_async_v3(int(self._stream.handle)):
                raise RuntimeError("it was not enqueued")
            for name in self.outputs:
                ready.gpu[name].copy_to(ready.pinned[name], stream=stream)

        if ready.graph is None and ready.runs == 1 and not self._captures:
            builder = self._stream.create_graph_builder().begin_building("thread_local")
            with suppress(Exception):  # an engine that cannot be captured goes on as it is
                try:
                    enqueue(builder)
                finally:
                    builder.end_building()
                ready.graph = builder.complete()
        if ready.graph is not None:
            ready.graph.launch(self._stream)
        else:
            enqueue(self._stream)
        ready.runs += 1

    def _ready_for(self, shapes: tuple[Shape, ...]) -> "Ready":
        profile = profile_for(dict(zip(self.inputs, shapes, strict=True)), self._profiles)
        try:
            context = self._engine.create_execution_context(*self._config)
            context.nvtx_verbosity = self._trt.ProfilingVerbosity.NONE
            context.set_optimization_profile_async(profile, int(self._stream.handle))
            for name, shape in zip(self.inputs, shapes, strict=True):
                context.set_input_shape(name, shape)
            ready = Ready(context, {}, {}, {})
            for name in (*self.inputs, *self.outputs):
                shape, dtype = tuple(context.get_tensor_shape(name)), self._types[name]
                ready.gpu[name] = self._gpu.allocate(bytes_of(shape, dtype), stream=self._stream)
                ready.pinned[name] = self._core.LegacyPinnedMemoryResource().allocate(bytes_of(shape, dtype))
                ready.host[name] = np.from_dlpack(ready.pinned[name]).view(dtype).reshape(shape)
                context.set_tensor_address(name, int(ready.gpu[name].handle))
        except Exception as error:
            raise self._failed(f"cannot prepare a batch of {shapes[0][0]}", error) from None
        return ready

    def _given(self, name: str, array: Any) -> "NDArray[Any] | OnGpu":
        if not hasattr(array, "__cuda_array_interface__"):
            return np.ascontiguousarray(array, self._types[name])
        view = self._core.utils.StridedMemoryView(array, stream_ptr=int(self._stream.handle))  # ours waits for the array's own stream
        return OnGpu.from_view(name, view, self._types[name])

    def _range(self, name: str, profile: int) -> Range:
        least, _, largest = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(least), tuple(largest)

    def _failed(self, what: str, error: Exception) -> DeviceError:
        why = line(self._errors[0] if self._errors else error)  # the first is the cause
        return DeviceError(f"{self._plan}: {self._title} {what} ({why})", 'see what nvidia-smi says, export it again, or pass device="cpu"')


@dataclass
class Ready:
    """What one combination of input shapes runs with. Buffers keep their addresses: a CUDA graph holds them."""

    context: Any
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


def profile_for(shapes: Mapping[str, Shape], profiles: Sequence[Sequence[Range]]) -> int:
    """The first profile that takes the shapes of all inputs; a profile has the inputs' order. Raises UsageError where none does."""
    outside: list[str] = []
    for index, profile in enumerate(profiles):
        found = [
            f"{name} of shape {least} to {largest}, not {shape}"
            for (name, shape), (least, largest) in zip(shapes.items(), profile, strict=True)
            if len(shape) != len(least) or not all(a <= x <= b for a, x, b in zip(least, shape, largest, strict=True))
        ]
        if not found:
            return index
        outside = found
    raise UsageError(f"the engine takes {outside[0]}", 'export it with a wider profile, or pass device="cpu"')


def parts(batch: int, largest: int) -> list[slice]:
    """Rows to run at a time, as even as can be."""
    count = max(1, -(-batch // largest))
    edges = [batch * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def bytes_of(shape: Shape, dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def logger(trt: Any, take: Callable[[str, bool], object]) -> Any:
    """A TensorRT logger that prints nothing, and gives ``take`` each message and whether it is an error."""
    errors = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            take(message, severity in errors)

    return Logger()
