"""A session that runs one TensorRT engine: its shapes, types, profiles and contexts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.errors import DeviceError, PmclipError, UsageError
from pmclip_deploy.onnx_file import weights_outside
from pmclip_deploy.sessions import GraphFile
from pmclip_deploy.sessions.engines import OR_LATER, EngineBackend, cuda_core, gpu, line
from pmclip_deploy.sessions.engines.replay import OnGpu, Replay, Shape

if TYPE_CHECKING:
    from pmclip_deploy.bundle.types import Engine

Range: TypeAlias = tuple[Shape, Shape]  # the least and the largest shape of an input


class TensorRTSession:
    """One engine, one stream. Not run anywhere yet: docs/measured/tensorrt.md says what is tested."""

    device = "cuda"

    def __init__(self, backend: EngineBackend, row: "Engine", graph: GraphFile, sha256: str) -> None:
        """``row`` is the plan's, ``graph`` what it was built from and lies beside, ``sha256`` the plan's hash."""
        self.backend = backend.name
        self._plan, self._title, self._errors = graph.path.with_name(row.file), backend.title, list[str]()
        self._trt = trt = backend.package()
        self._gpu, self._core = gpu(), cuda_core()
        try:
            self._log = logger(trt, lambda line, is_error: self._errors.append(line) if is_error else None)
            self._runtime = trt.Runtime(self._log)  # the engine needs both as long as it lives
            if row.version.endswith(OR_LATER):
                self._runtime.engine_host_code_allowed = True  # such a plan brings its own runtime
            self._engine = engine = self._runtime.deserialize_cuda_engine(np.frombuffer(graph.read(self._plan), np.uint8))
            if engine is None:
                raise RuntimeError("it gives no reason")
            if engine.refittable:  # its weights were left out
                weights_outside(graph.read(graph.path), f"{graph.path.name}.data")  # its parser follows a path in the graph
                refitter = trt.Refitter(engine, self._log)
                if not (trt.OnnxParserRefitter(refitter, self._log).refit_from_file(str(graph.path)) and refitter.refit_cuda_engine()):
                    raise RuntimeError("its weights do not come from its ONNX graph")
            names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
            given = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
            self.inputs, self.outputs = (tuple(n for n in names if (n in given) is wanted) for wanted in (True, False))
            self._types = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
            self._profiles = [[self._range(name, i) for name in self.inputs] for i in range(engine.num_optimization_profiles)]
            self._replay = Replay(self._core, self._gpu, self.inputs, self.outputs, self._types, self._execution_for, not backend.captures)
            ours = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            if (config := backend.runtime_config(engine, sha256, self)) is not None:
                config.set_execution_context_allocation_strategy(ours)
            self._config = ours if config is None else config
            # Of all contexts: they run one after the other, on one stream.
            self._activations = self._gpu.allocate(max(1, engine.device_memory_size_v2), stream=self._replay.stream)
        except Exception as error:
            raise self._failed("cannot load it", error) from None
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
            try:
                done = [self._replay.run([array[rows] for array in given]) for rows in parts(len(given[0]), largest)]
            except PmclipError:
                raise
            except Exception as error:
                raise self._failed("cannot run it", error) from None
        return {name: np.concatenate([part[i] for part in done]) for i, name in enumerate(self.outputs)}

    def _execution_for(self, shapes: tuple[Shape, ...]) -> "Context":
        profile = profile_for(dict(zip(self.inputs, shapes, strict=True)), self._profiles)
        try:
            context = self._engine.create_execution_context(self._config)
            context.nvtx_verbosity = self._trt.ProfilingVerbosity.NONE
            context.set_device_memory(int(self._activations.handle), self._activations.size)
            context.set_optimization_profile_async(profile, int(self._replay.stream.handle))
            for name, shape in zip(self.inputs, shapes, strict=True):
                context.set_input_shape(name, shape)
            return Context(context, {name: tuple(context.get_tensor_shape(name)) for name in self._types}, self._errors)
        except Exception as error:
            raise self._failed(f"cannot prepare a batch of {shapes[0][0]}", error) from None

    def _given(self, name: str, array: Any) -> "NDArray[Any] | OnGpu":
        if not hasattr(array, "__cuda_array_interface__"):
            return np.ascontiguousarray(array, self._types[name])
        stream = int(self._replay.stream.handle)  # it waits for the array's own
        view = self._core.utils.StridedMemoryView(array, stream_ptr=stream)
        return OnGpu.from_view(name, view, self._types[name])

    def _range(self, name: str, profile: int) -> Range:
        least, _, largest = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(least), tuple(largest)

    def _failed(self, what: str, error: Exception) -> DeviceError:
        why = line(self._errors[0] if self._errors else error)  # the first is the cause
        return DeviceError(f"{self._plan}: {self._title} {what} ({why})", 'see what nvidia-smi says, export it again, or pass device="cpu"')


@dataclass(frozen=True)
class Context:
    """One of TensorRT's, as an ``Execution``."""

    context: Any
    shapes: Mapping[str, Shape]
    errors: list[str]

    def bind(self, name: str, address: int) -> None:
        self.context.set_tensor_address(name, address)

    def enqueue(self, stream: int) -> None:
        self.errors.clear()  # those of a capture that failed are no cause of what comes later
        if not self.context.execute_async_v3(stream):
            raise RuntimeError("it was not enqueued")


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


def logger(trt: Any, take: Callable[[str, bool], object]) -> Any:
    """A TensorRT logger that prints nothing, and gives ``take`` each message and whether it is an error."""
    errors = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            take(message, severity in errors)

    return Logger()
