"""Ask radiology images questions offline: load, Predictor, Answer and the errors."""

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
