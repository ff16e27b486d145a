"""Ask radiology images questions offline: ``load``, ``Predictor``, the results and the errors. What is public stands in ``__all__``."""

from typing import TYPE_CHECKING

from pmclip_deploy.errors import (
    BundleError,
    DeviceError,
    GateError,
    InputError,
    NoPictureError,
    ParityError,
    PmclipError,
    TrainingError,
    UsageError,
)

if TYPE_CHECKING:
    from pmclip_deploy.answer import Answer, Candidate, Classification, ImageInfo, Label, Match, ModelInfo, Worth
    from pmclip_deploy.decision.evidence import FindingScores
    from pmclip_deploy.decision.heads import HeadLogits
    from pmclip_deploy.intent import Intent, Qualifier
    from pmclip_deploy.opening import load
    from pmclip_deploy.predictor import Predictor

__all__ = [
    "Answer",
    "BundleError",
    "Candidate",
    "Classification",
    "DeviceError",
    "FindingScores",
    "GateError",
    "HeadLogits",
    "ImageInfo",
    "InputError",
    "Intent",
    "Label",
    "Match",
    "ModelInfo",
    "NoPictureError",
    "ParityError",
    "PmclipError",
    "Predictor",
    "Qualifier",
    "TrainingError",
    "UsageError",
    "Worth",
    "load",
]

_HOME = {
    **dict.fromkeys(("Answer", "Candidate", "Classification", "ImageInfo", "Label", "Match", "ModelInfo", "Worth"), "answer"),
    **dict.fromkeys(("Intent", "Qualifier"), "intent"),
    "HeadLogits": "decision.heads",
    "Predictor": "predictor",
    "FindingScores": "decision.evidence",
    "load": "opening",
}


def __getattr__(name: str) -> object:
    """numpy and onnxruntime are imported when something is first asked of them, so `import pmclip_deploy` is cheap."""
    if name not in _HOME:
        if name == "__version__":
            from importlib.metadata import version

            return version("pmclip-deploy")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, "__version__"})
