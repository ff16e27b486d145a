"""Backends that run a graph: what each has to give, and the registry. Each module of this folder is one backend, its ``BACKEND``.

Standard library only. A backend's file imports its package inside functions, so the registry is there before any of them is. What is
loaded with each start is a NamedTuple: a dataclass takes half a millisecond to make.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pmclip_deploy.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pmclip_deploy.bundle.types import Engine

F32 = "f32"  # between operators: what a graph holds in float32 is computed in it
DEFAULT = "onnxruntime"  # runs any graph on any CPU: what "auto" takes where no engine fits


class Session(Protocol):
    """A loaded graph. ``run`` may be called from several threads."""

    backend: str  # its name in the registry
    device: str  # where it runs: "cpu", "cuda", ...
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, inputs: "Mapping[str, NDArray[Any]]") -> "dict[str, NDArray[Any]]": ...


class Device(NamedTuple):
    """A value of ``--device``."""

    name: str
    runs_on: str
    install: str  # how to get it, in one line
    nvidia: bool = False  # whether it needs an NVIDIA GPU


class GraphFile(NamedTuple):
    """An ONNX graph to open. A graph of a bundle has all of this, any other only its path."""

    path: Path  # with the weights in FILE.data, where they are not inside
    sha256: str | None = None  # onnx_sha256: what a backend compiles is kept on disk under it, and not at all without it
    name: str = ""
    bundle: str = ""
    engines: "tuple[tuple[Engine, str], ...]" = ()  # its rows of the manifest, and the hash of each one's file
    read: Callable[[Path], bytes] = Path.read_bytes  # the content of one of its files; a bundle's is verified


class SessionOptions(NamedTuple):
    device: str = "auto"
    # Without them a CPU computes what is between Q/DQ in floats: weights made for TensorRT would saturate its integers
    # (docs/reference/graphs-and-precisions.md).
    integer_kernels: bool = True
    # Without it no second copy of the weights is made in the order in which kernels read them: the graph opens sooner and runs slower.
    prepack: bool = True
    between: str = F32  # the precision between operators, of the backend's ``between()``
    threads: int | None = None  # on a CPU; None: cpu_threads()
    rows: tuple[int, ...] = (1,)  # how many inputs of one kind come at a time, the first size soonest: a backend may build for each


class Backend(ABC):
    """A library that runs graphs."""

    name: str
    title: str
    devices: tuple[Device, ...]
    packages: tuple[str, ...]  # distributions whose versions `doctor` and the benchmarks record
    target: str | None = None  # of `export --target`, where it runs engines that were built; None where it runs ONNX graphs

    def available(self) -> bool:
        return self.why_not() is None

    def why_not(self) -> str | None:
        """What keeps it from running here and how to mend that, in one line; None where it runs."""
        try:
            self.check()
        except DeviceError as error:
            return str(error)
        return None

    @abstractmethod
    def check(self) -> None:
        """Raises DeviceError where it does not run here: what keeps it from that, and how to mend it."""

    @abstractmethod
    def version(self) -> str | None:
        """Its package's, imported; None where it cannot be."""

    def between(self) -> tuple[str, ...]:
        """The precisions in which it can compute on this processor what a graph holds in float32. `tune` tries them all."""
        return (F32,)

    def about(self) -> dict[str, Any]:
        """What else `doctor` says of it."""
        return {}

    @abstractmethod
    def open(self, graph: GraphFile, options: SessionOptions) -> Session:
        """Raises DeviceError where the device is not there or fails: a backend never falls back to another device."""


@cache
def backends() -> dict[str, Backend]:
    """All of them by name; those of engines last, by target."""
    found: list[Backend] = [import_module(f"{__name__}.{module.name}").BACKEND for module in iter_modules(__path__) if not module.ispkg]
    return {backend.name: backend for backend in sorted(found, key=lambda backend: (backend.target or "", backend.name))}


def targets() -> dict[str, str | None]:
    """Where a bundle may be meant to run, and the backend of its engines."""
    return {"cpu": None, **{backend.target: name for name, backend in backends().items() if backend.target}}


def devices(of: Iterable[Backend] | None = None) -> dict[str, Backend]:
    """The values of ``--device``, and who runs each."""
    of = backends().values() if of is None else of
    return {"auto": backends()[DEFAULT], **{device.name: backend for backend in of for device in backend.devices}}


def backend_for(device: str, of: Iterable[Backend] | None = None) -> Backend:
    """Raises UsageError for an unknown device."""
    known = devices(of)
    if device not in known:
        raise UsageError(f"unknown device {device[:60]!r}", f"choose one of {', '.join(known)}")
    return known[device]


def open_session(path: Path, options: SessionOptions) -> Session:
    """Opens an ONNX graph that has no engines. "auto" is the GPU where onnxruntime has one, else the CPU."""
    of_graphs = [backend for backend in backends().values() if not backend.target]
    return backend_for(options.device, of_graphs).open(GraphFile(path), options)


def devices_table() -> str:
    """Markdown, for docs/howto/tensorrt.md."""
    rows = [(f"`{x.name}`", backend.title, x.runs_on, x.install) for backend in backends().values() for x in backend.devices]
    return "\n".join(f"| {' | '.join(row)} |" for row in [("`--device`", "library", "runs on", "how to get it"), ("---",) * 4, *rows])


def onnx_sha256(hashes: Mapping[str, str], file: str) -> str:
    """A graph's hash, of the hashes of its file and of its weights (FILE.data, where there are any)."""
    return hashlib.sha256("".join(hashes[name] for name in (file, f"{file}.data") if name in hashes).encode()).hexdigest()


def cache_folder(*names: str) -> Path | None:
    """A folder of this user's for what a backend compiles: never in a bundle, which holds what its manifest lists and nothing else.

    None where there is none to write to; the backend then compiles each time.
    """
    try:
        if folder := cache_path(*names):
            folder.mkdir(0o700, parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written
        return None
    return folder


def cache_path(*names: str) -> Path | None:
    """Where ``cache_folder`` is or would be; None without a home."""
    root = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    try:
        return Path(root or Path.home() / ".cache", "pmclip-deploy", *names)
    except RuntimeError:
        return None
