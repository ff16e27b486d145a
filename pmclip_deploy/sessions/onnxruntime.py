"""The onnxruntime backend: CPU everywhere, and the providers of sessions.PROVIDERS where this onnxruntime has them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from pmclip_deploy.errors import GPU_STEPS, BundleError, DeviceError
from pmclip_deploy.sessions import PROVIDERS, cache_folder
from pmclip_deploy.threads import cpu_threads

ERROR = 3  # onnxruntime's severity; below it, it writes about things a user cannot change
ort.set_default_logger_severity(ERROR)
ort.disable_telemetry_events()  # on Windows before 1.31, where no variable does; elsewhere it's too late

CPU = PROVIDERS["cpu"]
STEPS = {  # to get what an onnxruntime has not
    "cuda": f"with an NVIDIA driver, {GPU_STEPS}",
    "openvino": "`pip uninstall -y onnxruntime`, then `pip install onnxruntime-openvino`",
    "ort-tensorrt": f"with an NVIDIA driver and TensorRT, {GPU_STEPS}",
    "ort-nvtensorrtrtx": "install an onnxruntime that is built with it",
}
CACHES = {  # the options that name a folder; ort-tensorrt's precision flags stay off, which keeps its networks strongly typed
    "openvino": ("cache_dir",),
    "ort-tensorrt": ("trt_engine_cache_path", "trt_timing_cache_path"),
    "ort-nvtensorrtrtx": ("nv_runtime_cache_path",),
}
FLAGS = {"ort-tensorrt": {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}}


class OnnxRuntimeSession:
    backend = "onnxruntime"

    def __init__(self, path: Path, device: str, key: str | None = None, integers: bool = True, packed: bool = True) -> None:
        available = ort.get_available_providers()
        asked = device
        if asked == "auto":
            device = "cuda" if PROVIDERS["cuda"] in available else "cpu"
        wanted = PROVIDERS[device]
        name = wanted.removesuffix("ExecutionProvider")
        if wanted not in available:
            raise DeviceError(
                f"onnxruntime {ort.__version__} has no {name} here (it has {', '.join(available)}); {STEPS[device]}; or pass --device cpu"
            )
        if not path.is_file():
            raise BundleError(f"{path}: missing; copy the bundle again")
        behind = [PROVIDERS["cuda"]] if device == "ort-tensorrt" and PROVIDERS["cuda"] in available else []  # for what TensorRT leaves
        if device not in ("cpu", "openvino") and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN from the NVIDIA wheels
        providers = [(wanted, _provider_options(device, key)), *((other, {}) for other in dict.fromkeys([*behind, CPU]) if other != wanted)]
        try:
            self._session = ort.InferenceSession(path, _options(integers or device != "cpu", packed), providers=providers)
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            raise BundleError(f"{path}: onnxruntime cannot load it ({_line(error)}); copy the bundle again") from error
        self.device = device if wanted in self._session.get_providers() else "cpu"
        if asked == device != self.device:  # onnxruntime falls back in silence
            check = "Intel's driver" if device == "openvino" else "the NVIDIA driver with nvidia-smi"
            raise DeviceError(f"onnxruntime could not start {name}; check {check}, or pass --device cpu")
        self.inputs = tuple(node.name for node in self._session.get_inputs())
        self.outputs = tuple(node.name for node in self._session.get_outputs())
        self._path = path

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            return dict(zip(self.outputs, self._session.run(list(self.outputs), dict(inputs)), strict=True))
        except Exception as error:
            raise BundleError(f"{self._path}: onnxruntime cannot run it ({_line(error)}); copy the bundle again") from error


def _provider_options(device: str, key: str | None) -> dict[str, str]:
    folder = cache_folder("onnxruntime", device, key) if key and device in CACHES else None
    return {**{option: str(folder) for option in CACHES[device]}, **FLAGS.get(device, {})} if folder else {}


def _options(integers: bool, packed: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = ERROR
    options.intra_op_num_threads = cpu_threads()
    options.inter_op_num_threads = 1
    # Workers spin within a run, where they are needed again at once, and not after it: another graph or program wants the core.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")  # nor while the other graphs are opened
    options.add_session_config_entry("session.disable_quant_qdq", "0" if integers else "1")
    options.add_session_config_entry("session.disable_prepacking", "0" if packed else "1")
    return options


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
