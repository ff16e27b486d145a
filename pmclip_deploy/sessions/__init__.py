"""Backends that run a graph: the one contract, and ``open_session`` that picks among them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from pmclip_deploy.errors import UsageError

DEVICES = ("auto", "cpu", "cuda")


class Session(Protocol):
    """A loaded graph. ``run`` may be called from several threads."""

    backend: str  # "onnxruntime"
    device: str  # "cpu", "cuda"
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]: ...


def open_session(path: Path, device: str = "auto") -> Session:
    """Loads the graph at ``path``. "auto" is the GPU where onnxruntime has one, else the CPU."""
    if device not in DEVICES:
        raise UsageError(f"unknown device {device[:60]!r}; choose one of {', '.join(DEVICES)}")
    from pmclip_deploy.sessions.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(path, device)
