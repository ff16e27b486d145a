"""OpenVINO: a bundle's own ONNX graphs on the CPU, with Q/DQ as they are, and f32 elsewhere by default. The one place that imports it."""

import hashlib
import io
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

from pmclip_deploy.atomic import written
from pmclip_deploy.errors import BundleError, DeviceError
from pmclip_deploy.onnx_file import model_from_file, with_weights_inside
from pmclip_deploy.sessions import F32, Backend, Device, GraphFile, SessionOptions, cache_folder
from pmclip_deploy.threads import cpu_threads

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

INSTALL = "`pip install openvino`"
# What its import must not reach: the converter reports the import to the package's maker, by way of openvino_telemetry
# (docs/reference/network-and-files.md). Without both the import takes two thirds of the time.
REPORTING = ("openvino.tools", "openvino_telemetry")
REDUCED = {"BF16": "bf16", "FP16": "f16"}  # by OpenVINO's name of what the processor has. It would take bf16 where f16 is missing
DIGEST = hashlib.sha256().digest_size
_FIRST = Lock()


def import_openvino() -> Any:
    """The package, silent, and without ``convert_model``."""
    if "openvino" in sys.modules:  # here already, or another thread is importing it
        import openvino as ov

        return ov
    blocked = [name for name in REPORTING if name not in sys.modules]
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]  # None forbids an import
    try:
        import openvino as ov
    finally:
        for name in blocked:
            sys.modules.pop(name, None)
    return ov


def core() -> Any:
    with _FIRST:
        return _core()


@cache
def _core() -> Any:
    ov = import_openvino()
    # Its first call makes a table that all types share. Two threads that make it at once wait for each other for ever: one has the
    # interpreter's lock, the other that of the table.
    ov.Type.f32.to_dtype()
    return ov.Core()


class OpenVino(Backend):
    name, title = "openvino", "OpenVINO"
    devices = (Device("openvino", "CPU", INSTALL),)
    packages = ("openvino",)

    def check(self) -> None:
        try:
            core().get_property("CPU", "FULL_DEVICE_NAME")  # loads the library that runs graphs
        except Exception as error:  # a broken shared library raises what it likes
            raise DeviceError(f"OpenVINO cannot be loaded ({_line(error)})", f"install it with {INSTALL}") from error

    def version(self) -> str | None:
        return str(import_openvino().__version__) if self.available() else None

    def between(self) -> tuple[str, ...]:
        if not self.available():
            return (F32,)
        has = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return (F32, *(name for capability, name in REDUCED.items() if capability in has))

    def about(self) -> dict[str, Any]:
        return {"threads": cpu_threads() if self.available() else None}

    def open(self, graph: GraphFile, options: SessionOptions) -> "OpenVinoSession":
        self.check()
        return OpenVinoSession(graph, options)


BACKEND = OpenVino()


class OpenVinoSession:
    backend, device = BACKEND.name, "cpu"

    def __init__(self, graph: GraphFile, options: SessionOptions) -> None:
        self._graph, self._options = graph, options
        self._config = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": options.threads or cpu_threads(),
            "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same cores
            "INFERENCE_PRECISION_HINT": options.between,  # without it bf16 on a processor that has it, which no gate has seen
            **({} if options.integer_kernels else {"LP_TRANSFORMS_MODE": "NO"}),
        }
        self._first, self._lock = self._built(options.rows[0]), Lock()
        self._models = {options.rows[0] if self._first.one_shape else None: self._first}
        self.inputs, self.outputs = tuple(self._first.takes), self._first.outputs

    def run(self, inputs: "Mapping[str, NDArray[Any]]") -> "dict[str, NDArray[Any]]":
        model = self._model_for(inputs)
        self._check(model, inputs)
        try:
            request = model.idle.pop()
        except IndexError:
            request = model.model.create_infer_request()
        try:
            found = dict(zip(self.outputs, request.infer(dict(inputs), share_inputs=True).values(), strict=True))
        except Exception as error:
            raise DeviceError(f"{self._graph.path}: OpenVINO cannot run it ({_line(error)})", 'pass device="cpu"') from error
        model.idle.append(request)
        return found

    def _model_for(self, inputs: "Mapping[str, NDArray[Any]]") -> "_Compiled":
        """Compiled for so many rows where that many were announced, else for any number."""
        shape = getattr(inputs.get(self.inputs[0]), "shape", ()) if self._first.one_shape else ()
        rows = shape[0] if shape and shape[0] in self._options.rows else None
        if rows not in self._models:
            with self._lock:
                if rows not in self._models:
                    self._models[rows] = self._built(rows)
        return self._models[rows]

    def _built(self, rows: int | None) -> "_Compiled":
        kept = _kept(self._graph.sha256, self._options, rows)
        return _Compiled(_model_from_kept(kept, self._config) or _compiled(self._graph, self._config, kept, rows))

    def _check(self, model: "_Compiled", inputs: "Mapping[str, NDArray[Any]]") -> None:
        """OpenVINO would run arrays of other shapes and types, and without an input it would take the last one again."""
        for name, (kind, shape) in model.takes.items():
            array = inputs.get(name)
            if array is None or array.dtype != kind or not shape.compatible(import_openvino().PartialShape(list(array.shape))):
                said = "nothing" if array is None else f"{array.dtype} of shape {array.shape}"
                reason = f"{self._graph.path}: its input {name[:60]!r} is {kind} of shape {shape}, not {said}"
                raise BundleError(reason, "copy the bundle again")


class _Compiled:
    """A compiled model, and the requests of it that no thread uses."""

    def __init__(self, model: Any) -> None:
        self.model, self.idle = model, deque[Any]()
        self.takes = {port.node.friendly_name: (port.element_type.to_dtype(), port.partial_shape) for port in model.inputs}
        # ONNX's name of an output. The port itself may have others too: those of the tensors that OpenVINO found to be the same.
        self.outputs = tuple(port.node.friendly_name.partition("/sink_port_")[0] for port in model.outputs)
        self.one_shape = all(shape.is_static for _, shape in self.takes.values())


def _compiled(graph: GraphFile, config: Mapping[str, Any], kept: "Path | None", rows: int | None) -> Any:
    """With ``rows`` a graph of pictures is compiled for one shape: convolutions then take 0.8 of the time."""
    content, outside, raw = model_from_file(graph.path, graph.read)
    content = with_weights_inside(content, f"{graph.path.name}.data", raw) if outside else content
    try:
        read = core().read_model(content)
        if rows is not None and len(read.inputs) == 1:
            free, *rest = read.inputs[0].partial_shape
            if free.is_dynamic and all(side.is_static for side in rest):
                read.reshape([rows, *(side.get_length() for side in rest)])
        model = core().compile_model(read, "CPU", config)
    except Exception as error:
        raise DeviceError(f"{graph.path}: OpenVINO cannot load it ({_line(error)})", 'pass device="cpu"') from error
    if kept is not None:
        with suppress(OSError), written(kept, mode=0o600) as new:  # a full disk: it is compiled again next time
            blob = io.BytesIO()
            model.export_model(blob)
            new.write_bytes(hashlib.sha256(blob.getbuffer()).digest() + blob.getbuffer())
    return model


def _kept(sha256: str | None, options: SessionOptions, rows: int | None) -> "Path | None":
    """Where a compiled graph is kept."""
    folder = cache_folder("openvino", sha256) if sha256 else None
    version = f"{import_openvino().__version__} {options.integer_kernels} {options.between} {rows}"
    return folder and folder / f"{hashlib.sha256(version.encode()).hexdigest()[:16]}.blob"


def _model_from_kept(kept: "Path | None", config: Mapping[str, Any]) -> Any | None:
    """None where there is none, where it is not whole, and where OpenVINO refuses it: it was made for another processor."""
    try:
        content = memoryview(kept.read_bytes() if kept else b"")
        if hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST]:
            return core().import_model(io.BytesIO(content[DIGEST:]), "CPU", config)
    except Exception:  # its RuntimeErrors have no class of their own
        pass
    return None


def _line(error: Exception) -> str:
    """Without the lines that name places in OpenVINO's sources, and its advice."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '", "To facilitate"))]
    return " ".join(" ".join(said or lines or [type(error).__name__]).split())[:200]
