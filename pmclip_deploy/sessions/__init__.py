"""Backends that run a graph: the one contract, and what picks among them."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from pmclip_deploy.bundle import BACKENDS, Graph, Manifest
from pmclip_deploy.errors import DeviceError, UsageError
from pmclip_deploy.spec import TARGETS

PROVIDERS = {  # devices that onnxruntime runs on, and its name for each
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-nvtensorrtrtx": "NvTensorRTRTXExecutionProvider",
}
DEVICES = ("auto", *PROVIDERS, *BACKENDS)


class Session(Protocol):
    """A loaded graph. ``run`` may be called from several threads."""

    backend: str  # "onnxruntime", or one of bundle.BACKENDS
    device: str  # of PROVIDERS; "cuda" for an engine
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]: ...


def session_from_bundle(
    folder: Path, manifest: Manifest, name: str, device: str = "auto", notes: list[str] | None = None, once: bool = False
) -> Session:
    """Opens the graph ``name`` of a bundle that was verified.

    "auto" is an engine that fits this machine, else onnxruntime's GPU, else its CPU; a bundle for the CPU stays on the CPU. Where there
    are engines and none fits, one line in ``notes`` says what they were built for and what is here.
    Raises UsageError for an unknown device, and DeviceError where one asked for by name is not there or fails: it never falls back.
    """
    _check_device(device, DEVICES)
    graph = folder / manifest.graphs[name].file
    packed = not (once and _integers_alone(graph, manifest.graphs[name]))
    rows = [row for row in manifest.engines if row.graph == name and device in ("auto", row.backend)]
    if device in BACKENDS and not rows:
        target = next(name for name, backend in TARGETS.items() if backend == device)
        raise DeviceError(
            f"bundle {manifest.name} has no {device} engine of its graph {name}; export it with --target {target}, or pass --device auto"
        )
    if rows:
        from pmclip_deploy.sessions.tensorrt import session_from_engines

        try:
            return session_from_engines(folder, manifest, rows)
        except DeviceError as error:
            if device != "auto":
                raise
            session = open_session(graph, integers=False, packed=packed)
            if notes is not None:
                notes.append(f"{error}; meanwhile onnxruntime runs on {session.device}")
            return session
    if device == "auto" and manifest.target == "cpu":
        device = "cpu"
    key = onnx_sha256({file: entry.sha256 for file, entry in manifest.files.items()}, graph.name)
    return open_session(graph, device, key, manifest.target == "cpu", packed)


def open_session(path: Path, device: str = "auto", key: str | None = None, integers: bool = True, packed: bool = True) -> Session:
    """Loads the graph at ``path`` with onnxruntime. "auto" is the GPU where onnxruntime has one, else the CPU.

    What a provider compiles it keeps on disk under ``key``, the graph's hash, and not at all without one. Without ``integers`` a CPU
    computes what is between Q/DQ in floats: weights made for TensorRT would saturate its integers
    (docs/reference/graphs-and-precisions.md). A session that is not ``packed`` makes no second copy of the weights in the order in which
    kernels read them: it opens sooner and runs slower.
    """
    _check_device(device, ("auto", *PROVIDERS))
    from pmclip_deploy.sessions.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(path, device, key, integers, packed)


def _integers_alone(path: Path, graph: Graph) -> bool:
    """Whether a graph says the same from weights that were not packed, and loses little: integer products do; products of floats and of
    blocks give other bits, and integer convolutions take a third longer."""
    content = path.read_bytes() if path.is_file() else b""
    return b"MatMulInteger" in content and b"Conv" not in content and not graph.float_layers


def onnx_sha256(hashes: Mapping[str, str], file: str) -> str:
    """A graph's hash, of the hashes of its file and of its weights (FILE.data, where there are any)."""
    return hashlib.sha256("".join(hashes[name] for name in (file, f"{file}.data") if name in hashes).encode()).hexdigest()


def cache_folder(*names: str) -> Path | None:
    """A folder of this user's for what a backend compiles: never in a bundle, which holds what its manifest lists and nothing else.

    None where there is none to write to; the backend then compiles each time.
    """
    root = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    try:
        folder = Path(root or Path.home() / ".cache", "pmclip-deploy", *names)
        folder.mkdir(0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a home that cannot be written, or no home
        return None
    return folder


def _check_device(device: str, devices: tuple[str, ...]) -> None:
    if device not in devices:
        raise UsageError(f"unknown device {device[:60]!r}; choose one of {', '.join(devices)}")
