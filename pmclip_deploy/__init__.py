"""Ask radiology images questions offline: load, Predictor, Answer and the errors."""

import os
import sys
from typing import TYPE_CHECKING

from pmclip_deploy.errors import BundleError, DeviceError, InputError, ParityError, PmclipError, UsageError

if TYPE_CHECKING:
    from pmclip_deploy.answer import Answer
    from pmclip_deploy.opening import load
    from pmclip_deploy.predictor import Predictor

__all__ = [
    "Answer",
    "BundleError",
    "DeviceError",
    "InputError",
    "ParityError",
    "PmclipError",
    "Predictor",
    "UsageError",
    "load",
]

# From its import on, onnxruntime 1.29 or later reports to its maker, unless this variable was set before. So it is set, whatever it was
# (docs/reference/network-and-files.md).
if "onnxruntime" in sys.modules and os.environ.get("ORT_DISABLE_TELEMETRY", "").strip().lower() not in ("1", "true", "yes", "on", "y"):
    import warnings

    warnings.warn(
        "onnxruntime was imported before pmclip_deploy; from 1.29 on it then reports to its maker, and only a new process can keep it from "
        "that: import pmclip_deploy first, or set ORT_DISABLE_TELEMETRY=1",
        RuntimeWarning,
        stacklevel=2,
    )
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

_HOME = {"Answer": "answer", "Predictor": "predictor", "load": "opening"}


def __getattr__(name: str) -> object:
    """numpy and onnxruntime are imported when something is first asked of them, so `import pmclip_deploy` is cheap."""
    if name not in _HOME:
        if name == "__version__":
            from importlib.metadata import version

            return version("pmclip-deploy")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
