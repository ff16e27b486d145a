"""onnxruntime: any graph on any CPU, and on other devices by its providers. The one place that imports it."""

import os
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pmclip_deploy.errors import BundleError, DeviceError
from pmclip_deploy.onnx_file import NUMPY, model_from_file
from pmclip_deploy.sessions import Backend, Device, GraphFile, SessionOptions, cache_folder
from pmclip_deploy.threads import cpu_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

SILENT = "ORT_DISABLE_TELEMETRY"
ERROR = 3  # onnxruntime's severity; below it, it writes about things a user cannot change
# The two packages share one folder: side by side they overwrite each other, and removing one breaks the other.
GPU_STEPS = "`pip uninstall -y onnxruntime onnxruntime-gpu`, then `pip install onnxruntime-gpu`"


class Provider(NamedTuple):
    device: Device
    name: str  # onnxruntime's
    caches: tuple[str, ...] = ()  # the options that name a folder
    flags: tuple[tuple[str, str], ...] = ()  # that go with a folder
    behind: tuple[str, ...] = ()  # the provider that takes what this one leaves; the CPU's takes the rest


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = {
    provider.device.name: provider
    for provider in [
        Provider(Device("cpu", "CPU", "nothing to do: it comes with pmclip-deploy"), CPU),
        Provider(Device("cuda", "CUDA", f"with an NVIDIA driver, {GPU_STEPS}", nvidia=True), CUDA),
        Provider(
            Device("ort-openvino", "OpenVINO", "`pip uninstall -y onnxruntime`, then `pip install onnxruntime-openvino`"),
            "OpenVINOExecutionProvider",
            caches=("cache_dir",),
        ),
        Provider(  # no flag of precision: its networks stay strongly typed
            Device("ort-tensorrt", "TensorRT, behind it CUDA", f"with an NVIDIA driver and TensorRT, {GPU_STEPS}", nvidia=True),
            "TensorrtExecutionProvider",
            caches=("trt_engine_cache_path", "trt_timing_cache_path"),
            flags=(("trt_engine_cache_enable", "1"), ("trt_timing_cache_enable", "1")),
            behind=(CUDA,),
        ),
        Provider(
            Device("ort-nvtensorrtrtx", "NvTensorRTRTX", "install an onnxruntime that is built with it", nvidia=True),
            "NvTensorRTRTXExecutionProvider",
            caches=("nv_runtime_cache_path",),
        ),
    ]
}


@cache
def import_onnxruntime() -> Any:
    """The package, silent. From its import on, 1.29 and later report to their maker, unless a variable was set before
    (docs/reference/network-and-files.md)."""
    if "onnxruntime" in sys.modules and os.environ.get(SILENT, "").strip().lower() not in ("1", "true", "yes", "on", "y"):
        warnings.warn(
            "onnxruntime was imported before pmclip_deploy imported it; from 1.29 on it then reports to its maker, and only a new process "
            f"can keep it from that: load a bundle before you import onnxruntime, or set {SILENT}=1",
            RuntimeWarning,
            stacklevel=2,
        )
    os.environ[SILENT] = "1"  # whatever it was
    import onnxruntime as ort

    ort.set_default_logger_severity(ERROR)
    ort.disable_telemetry_events()  # on Windows before 1.31, where no variable does; elsewhere it's too late
    return ort


class OnnxRuntime(Backend):
    name = title = "onnxruntime"
    devices = tuple(provider.device for provider in PROVIDERS.values())
    packages = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")

    def check(self) -> None:
        try:
            import_onnxruntime()
        except Exception as error:  # a broken shared library raises what it likes
            here = f"onnxruntime cannot be imported ({_line(error)})"
            raise DeviceError(here, "install it with `pip install onnxruntime`") from error

    def version(self) -> str | None:
        return str(import_onnxruntime().__version__) if self.available() else None

    def about(self) -> dict[str, Any]:
        if not self.available():
            return {"providers": [], "threads": None}
        return {"providers": import_onnxruntime().get_available_providers(), "threads": cpu_threads()}

    def open(self, graph: GraphFile, options: SessionOptions) -> "OnnxRuntimeSession":
        self.check()
        return OnnxRuntimeSession(graph, options)


BACKEND = OnnxRuntime()


class OnnxRuntimeSession:
    backend = BACKEND.name

    def __init__(self, graph: GraphFile, options: SessionOptions) -> None:
        ort = import_onnxruntime()
        available = ort.get_available_providers()
        device = options.device
        if device == "auto":
            device = "cuda" if CUDA in available else "cpu"
        wanted = PROVIDERS[device]
        name = wanted.name.removesuffix("ExecutionProvider")
        if wanted.name not in available:
            here = f"onnxruntime {ort.__version__} has no {name} here (it has {', '.join(available)})"
            raise DeviceError(here, f'{wanted.device.install}, or pass device="cpu"')
        import numpy as np

        content, outside, raw = model_from_file(graph.path, graph.read)
        weights = {w.name: np.frombuffer(raw, NUMPY[w.data_type], prod(w.dims), w.offset).reshape(w.dims) for w in outside}
        if wanted.device.nvidia and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN from the NVIDIA wheels
        others = [other for other in (*wanted.behind, CPU) if other in available and other != wanted.name]
        providers = [(wanted.name, _provider_options(wanted, graph.sha256)), *((other, dict[str, str]()) for other in others)]
        settings = _settings(ort, options.integer_kernels or device != "cpu", options)
        try:
            values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
            if values:
                settings.add_external_initializers(list(values), list(values.values()))
            self._session = ort.InferenceSession(content, settings, providers=providers)
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            raise BundleError(f"{graph.path}: onnxruntime cannot load it ({_line(error)})", "copy the bundle again") from error
        self.device = device if wanted.name in self._session.get_providers() else "cpu"
        if options.device == device != self.device:  # onnxruntime falls back in silence
            check = "the NVIDIA driver with nvidia-smi" if wanted.device.nvidia else "Intel's driver"
            raise DeviceError(f"onnxruntime could not start {name}", f'check {check}, or pass device="cpu"')
        self.inputs = tuple(node.name for node in self._session.get_inputs())
        self.outputs = tuple(node.name for node in self._session.get_outputs())
        self._path = graph.path

    def run(self, inputs: "Mapping[str, NDArray[Any]]") -> "dict[str, NDArray[Any]]":
        try:
            return dict(zip(self.outputs, self._session.run(list(self.outputs), dict(inputs)), strict=True))
        except Exception as error:
            raise BundleError(f"{self._path}: onnxruntime cannot run it ({_line(error)})", "copy the bundle again") from error


def _provider_options(provider: Provider, key: str | None) -> dict[str, str]:
    folder = cache_folder("onnxruntime", provider.device.name, key) if key and provider.caches else None
    return {**{option: str(folder) for option in provider.caches}, **dict(provider.flags)} if folder else {}


def _settings(ort: Any, integer_kernels: bool, options: SessionOptions) -> Any:
    settings = ort.SessionOptions()
    settings.log_severity_level = ERROR
    settings.intra_op_num_threads = options.threads or cpu_threads()
    settings.inter_op_num_threads = 1
    # Workers spin within a run, where they are needed again at once, and not after it: another graph or program wants the core.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.add_session_config_entry("session.intra_op.spin_duration_us", "1000")  # nor while the other graphs are opened
    settings.add_session_config_entry("session.disable_quant_qdq", "0" if integer_kernels else "1")
    settings.add_session_config_entry("session.disable_prepacking", "0" if options.prepack else "1")
    settings.add_session_config_entry("session.load_model_format", "ONNX")  # its own format is not what was checked
    return settings


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
