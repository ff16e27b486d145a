"""The onnxruntime backend: CPU everywhere, CUDA where the GPU build of onnxruntime is installed."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from pmclip_deploy.errors import GPU_STEPS, BundleError, DeviceError

ERROR = 3  # onnxruntime's severity; below it, it writes about things a user cannot change
ort.set_default_logger_severity(ERROR)
ort.disable_telemetry_events()

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


class OnnxRuntimeSession:
    backend = "onnxruntime"

    def __init__(self, path: Path, device: str) -> None:
        available = ort.get_available_providers()
        if device == "cuda" and CUDA not in available:
            raise DeviceError(
                f"onnxruntime {ort.__version__} has no CUDA here (it has {', '.join(available)}); "
                f"with an NVIDIA driver, {GPU_STEPS}; or pass --device cpu"
            )
        if not path.is_file():
            raise BundleError(f"{path}: missing; copy the bundle again")
        want_cuda = CUDA in available if device == "auto" else device == "cuda"
        if want_cuda and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN from the NVIDIA wheels
        try:
            self._session = ort.InferenceSession(path, _options(), providers=[CUDA, CPU] if want_cuda else [CPU])
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            raise BundleError(f"{path}: onnxruntime cannot load it ({_line(error)}); copy the bundle again") from error
        self.device = "cuda" if CUDA in self._session.get_providers() else "cpu"
        if device == "cuda" and self.device != "cuda":  # onnxruntime falls back in silence
            raise DeviceError("onnxruntime could not start CUDA; check the NVIDIA driver with nvidia-smi, or pass --device cpu")
        self.inputs = tuple(node.name for node in self._session.get_inputs())
        self.outputs = tuple(node.name for node in self._session.get_outputs())
        self._path = path

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            return dict(zip(self.outputs, self._session.run(list(self.outputs), dict(inputs)), strict=True))
        except Exception as error:
            raise BundleError(f"{self._path}: onnxruntime cannot run it ({_line(error)}); copy the bundle again") from error


def cpu_threads() -> int:
    """Physical cores this process may use: affinity and a container's quota count, hyper-threads do not."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    siblings = {_text(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or str(cpu) for cpu in allowed}
    quota, _, period = _text(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    granted = -(-int(quota) // int(period)) if quota.isdigit() and period.isdigit() else len(siblings)
    return max(1, min(len(siblings), granted))


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = ERROR
    options.intra_op_num_threads = cpu_threads()
    options.inter_op_num_threads = 1
    # A worker that spins after the image tower would take the core that the text tower wants.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
