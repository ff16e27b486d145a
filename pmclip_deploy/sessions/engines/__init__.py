"""What TensorRT's two backends share: whether one runs here, and which of a graph's engines fits this machine.

The one place that imports tensorrt_rtx, tensorrt and cuda, and only when an engine is built or opened.
"""

import platform
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from pmclip_deploy.errors import DeviceError
from pmclip_deploy.sessions import Backend, GraphFile, Session, SessionOptions, backends

if TYPE_CHECKING:
    from pmclip_deploy.bundle.types import Engine

OR_LATER = "+"  # ends the version of a plan that is version-compatible
CUDA_CORE = "`pip install 'cuda-core[cu13]'` ([cu12] with CUDA 12)"


class Machine(NamedTuple):
    """What an engine has to fit."""

    version: str  # of the backend
    compute_capability: str  # "8.9"
    platform: str  # "linux-x86_64"


class EngineBackend(Backend):
    """TensorRT in one of its forms."""

    target: str
    built_ahead = False  # whether it builds for GPUs that are not here, and a plan runs on Linux and Windows alike
    captures = False  # whether it makes CUDA graphs by itself

    def package(self) -> Any:
        """Raises DeviceError where it cannot be imported."""
        return imported(self.name, self.title, self.devices[0].install)

    def machine(self) -> Machine:
        """Raises DeviceError where the package or the driver is missing."""
        trt, device = self.package(), gpu()
        major, minor = device.compute_capability
        return Machine(trt.__version__, f"{major}.{minor}", platform_here())

    def check(self) -> None:
        self.machine()

    def version(self) -> str | None:
        try:
            return str(self.package().__version__)
        except DeviceError:
            return None

    def about(self) -> dict[str, Any]:
        return {"compute_capability": self.machine().compute_capability if self.available() else None}

    def runtime_config(self, engine: Any, sha256: str, owner: object) -> Any | None:
        """What an execution context is made with, where it takes anything. ``sha256`` is the plan's; ``owner`` lives as long as it."""
        return None

    def misfits(self, row: "Engine", here: Machine, onnx: str) -> list[str]:
        """What keeps an engine from running here, each with both sides. ``onnx`` is the hash of the bundle's graph."""
        splits = 1 if self.built_ahead else 0  # the processor alone
        capability, plugin = here.compute_capability, row.plugin_sha256 or ""
        checks = [
            (self.title, row.version, here.version, _fits_version(row.version, here.version)),
            ("compute capability", ", ".join(row.compute_capabilities), capability, capability in row.compute_capabilities),
            ("platform", row.platform, here.platform, row.platform.split("-", splits)[-1] == here.platform.split("-", splits)[-1]),
            ("ONNX graph", row.onnx_sha256[:12], onnx[:12], row.onnx_sha256 == onnx),
            ("plugin", plugin[:12], "none", not plugin),
        ]
        return [f"built for {what} {there}, here is {now}" for what, there, now, fits in checks if not fits]

    def open(self, graph: GraphFile, options: SessionOptions) -> Session:
        """Opens the first of the graph's engines that fits this machine. Raises DeviceError, which names both sides, where none does."""
        problems = list[DeviceError]()
        for row, sha256 in graph.engines:
            if row.backend != self.name:
                continue
            try:
                found = self.misfits(row, self.machine(), graph.sha256 or "")
            except DeviceError as error:
                problems.append(DeviceError(f"built for {self.title} {row.version}, but {error.message}", error.hint))
                continue
            if not found:
                from pmclip_deploy.sessions.engines.session import TensorRTSession

                return TensorRTSession(self, row, graph, sha256)
            problems.append(DeviceError(", ".join(found), "export it again"))
        if not problems:
            raise DeviceError(
                f"bundle {graph.bundle} has no {self.name} engine of its graph {graph.name}",
                f'export it with `pmclip-deploy export --target {self.target}`, or pass device="auto"',
            )
        first = problems[0]
        raise DeviceError(f"bundle {graph.bundle} has no engine that runs here: {first.message}", f'{first.hint}, or pass device="cpu"')


def engine_backends() -> dict[str, EngineBackend]:
    return {name: backend for name, backend in backends().items() if isinstance(backend, EngineBackend)}


def imported(name: str, title: str, step: str) -> Any:
    """Raises DeviceError where it cannot be imported."""
    try:
        return import_module(name)
    except Exception as error:  # a shared library that is not there raises what it likes
        raise DeviceError(f"{title} is not installed here ({line(error)})", step) from None


def cuda_core() -> Any:
    return imported("cuda.core", "cuda.core", CUDA_CORE)


def gpu() -> Any:
    """The GPU that is current in this thread, else the first; current from now on. Raises DeviceError where no driver answers."""
    core = cuda_core()
    try:
        device = core.Device()
        device.set_current()
        return device
    except Exception as error:
        reason = line(error).partition(". ")[0]
        raise DeviceError(f"no NVIDIA driver answers here ({reason})", "check it with nvidia-smi") from None


def platform_here() -> str:
    processor = platform.machine().lower()
    return f"{platform.system().lower()}-{ {'amd64': 'x86_64', 'arm64': 'aarch64'}.get(processor, processor) }"


def line(error: object) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _fits_version(built: str, here: str) -> bool:
    if not built.endswith(OR_LATER):
        return built == here
    least, now = ([int(x) for x in version.split(".") if x.isdigit()] for version in (built.removesuffix(OR_LATER), here))
    return now >= least
