"""An ONNX graph as a TensorRT engine: by TensorRT-RTX ahead of time and with no GPU, by TensorRT 10 and 11 on the device itself.

Networks are strongly typed: each layer computes in the types that the graph gives it, and no option here changes one.
"""

import hashlib
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from pmclip_deploy.atomic import write, write_errors
from pmclip_deploy.bundle.files import sha256_of_file
from pmclip_deploy.bundle.types import Engine
from pmclip_deploy.errors import BundleError, UsageError
from pmclip_deploy.sessions import onnx_sha256
from pmclip_deploy.sessions.engines import OR_LATER, EngineBackend, engine_backends, platform_here
from pmclip_deploy.sessions.engines.session import logger

RTX_CAPABILITIES = ("8.6", "8.9", "12.0")  # GeForce RTX 30, 40 and 50, and the workstation cards of their years
TYPES = {"int8": "int8", "fp8": "fp8", "bfloat16": "bf16", "half": "fp16", "fp16": "fp16", "float": "fp32", "fp32": "fp32"}

Range = tuple[int, int, int]  # the least, the usual and the largest
Step = Callable[[str, int, int], object]  # a phase's name, steps done, steps in all


@dataclass(frozen=True)
class Layer:
    """A layer of the engine: a node of the graph, or many of them fused."""

    name: str
    kind: str  # "gemm", "correlation" (a convolution), "kgen" (a generated kernel), ...
    inputs: tuple[str, ...]  # the types of what it reads, weights too: "fp16"
    outputs: tuple[str, ...]

    @property
    def precision(self) -> str:
        """The narrowest type it reads: what a product multiplies in."""
        return next((name for name in TYPES.values() if name in self.inputs), "integer")


@dataclass(frozen=True)
class BuiltEngine:
    plan: bytes = field(repr=False)
    backend: str
    version: str
    compute_capabilities: tuple[str, ...]
    platform: str
    onnx_sha256: str
    profile: Range
    layers: tuple[Layer, ...] = field(repr=False)
    seconds: float  # to read the graph and build

    @property
    def precisions(self) -> dict[str, int]:
        """How many layers of each kind read each type: {"gemm fp16": 59, ...}."""
        return dict(sorted(Counter(f"{layer.kind} {layer.precision}" for layer in self.layers if layer.inputs).items()))

    def row(self, graph: str, file: str) -> Engine:
        """What the manifest says of it."""
        return Engine(graph, file, self.backend, self.version, self.compute_capabilities, self.platform, self.onnx_sha256, self.profile)


@dataclass(frozen=True)
class _Heard:
    """What TensorRT says as it reads and builds."""

    errors: list[str] = field(default_factory=list)
    nodes: list[str] = field(default_factory=lambda: [""])  # "Parsing node: places [Slice]"
    inspection: list[str] = field(default_factory=list)  # TensorRT-RTX inspects what it has built; an inspector of ours would need a driver

    def take(self, message: str, is_error: bool) -> None:
        if is_error:
            self.errors.append(message)
        elif message.startswith("Parsing node: "):
            self.nodes.append(message)
        elif message.startswith("Layers:"):
            self.inspection.append(message)


@dataclass(frozen=True)
class _Parsed:
    builder: Any
    network: Any
    parser: Any  # owns the network's weights, and so must live until the engine is built


def engine_from_onnx(
    graph: bytes | Path,
    backend: str,
    *,
    compute_capabilities: Sequence[str] = (),
    profile: Range = (1, 1, 8),
    text_lengths: Range = (1, 12, 77),
    timing_cache: Path | None = None,
    version_compatible: bool = False,
    strip_weights: bool = False,
    progress: Step | None = None,
) -> BuiltEngine:
    """Builds an engine of a graph; one whose weights lie beside it (NAME.onnx.data) is given by its path.

    ``backend`` "tensorrt_rtx" builds for ``compute_capabilities`` ("8.9"; else RTX_CAPABILITIES), "tensorrt" for the GPU that is here.
    ``profile`` is of the batch, ``text_lengths`` of a second axis that is free: the text tower's.
    For "tensorrt" alone: ``timing_cache`` is a file that makes the next build faster, ``version_compatible`` a plan that later versions
    run too, ``strip_weights`` one without its weights, which are read from the graph when it is opened.
    Ctrl-C, or an exception that ``progress`` raises, ends the build at TensorRT's next step.

    Raises UsageError for options that do not fit, DeviceError where the backend or the GPU it needs is missing, BundleError for a graph
    that cannot be read or built.
    """
    _check_options(backend, profile, text_lengths, timing_cache is not None, version_compatible, strip_weights)
    of = engine_backends()[backend]
    trt = of.package()
    title = f"{of.title} {trt.__version__}"
    targets = _targets(trt, of, compute_capabilities)
    hashed = _checked(graph)

    start, heard = time.perf_counter(), _Heard()
    log = logger(trt, heard.take)
    parsed = _parse(trt, log, graph, heard, title)
    profiles = _profiles(parsed.builder, parsed.network, profile, text_lengths)
    config = _config(trt, parsed, targets, profiles, version_compatible, strip_weights)
    plan = _plan(trt, parsed, config, timing_cache, progress)
    if plan is None:
        why = _line(heard.errors[-1] if heard.errors else "it gives no reason")
        where = ", ".join(targets or ["this GPU"])
        raise BundleError(f"{_name(graph)}: {title} builds no engine for {where} ({why})", "choose another precision or other GPUs")
    inspection = heard.inspection if of.built_ahead else [*heard.inspection, _inspected(trt, log, plan)]
    return BuiltEngine(
        plan=bytes(plan),
        backend=backend,
        version=trt.__version__ + (OR_LATER if version_compatible else ""),
        compute_capabilities=tuple(targets) or (of.machine().compute_capability,),
        platform=platform_here(),
        onnx_sha256=hashed,
        profile=profile,
        layers=layers_from_inspection("\n".join(inspection)),
        seconds=time.perf_counter() - start,
    )


def layers_from_inspection(text: str) -> tuple[Layer, ...]:
    """Reads what TensorRT's engine inspector writes: a line for each layer (LayerInformationFormat.ONELINE)."""
    layers = []
    for line in text.splitlines():
        if found := re.match(r"Name: (.*?), LayerType: ([^,]*), (Inputs: .*)", line):
            name, kind, rest = found.groups()
            read, _, written = rest.partition(" Outputs: [")
            layers.append(Layer(name, kind, _types(read), _types(written)))
    return tuple(layers)


def _types(text: str) -> tuple[str, ...]:
    found = [kind.strip().lower() for kind in re.findall(r"Datatype: ([^,}\]]+)", text)]
    return tuple(next((name for word, name in TYPES.items() if word in kind), kind) for kind in found)


def _check_options(backend: str, profile: Range, lengths: Range, timing_cache: bool, version_compatible: bool, strip_weights: bool) -> None:
    known = engine_backends()
    if backend not in known:
        raise UsageError(f"unknown backend {backend[:60]!r}", f"choose one of {', '.join(known)}")
    if known[backend].built_ahead and (timing_cache or version_compatible or strip_weights):
        raise UsageError("timing caches, version-compatible plans and plans without weights are for the target tensorrt", "leave them out")
    if version_compatible and strip_weights:
        raise UsageError("a version-compatible plan keeps its weights", "choose one of the two")
    for name, given in (("batches", profile), ("text lengths", lengths)):
        if len(given) != 3 or sorted(given) != list(given) or given[0] < 1:
            raise UsageError(f"{name} {given}: give the least, the usual and the largest, in that order, from 1 on")


def _targets(trt: Any, backend: EngineBackend, wanted: Sequence[str]) -> Mapping[str, Any]:
    """Compute capabilities to TensorRT-RTX's names for them, in its order; none for TensorRT, which builds for the GPU that is here."""
    if not backend.built_ahead:
        own = backend.machine().compute_capability
        if set(wanted) - {own}:
            raise UsageError(f"{backend.title} builds for the GPU that is here, {own}", f"leave out {', '.join(wanted)}")
        return {}
    known = {f"{name[2:-1]}.{name[-1]}": member for name, member in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    if unknown := [capability for capability in wanted if capability not in known]:
        raise UsageError(f"{backend.title} {trt.__version__} knows no GPU {unknown[0][:20]!r}", f"choose among {', '.join(known)}")
    return {capability: member for capability, member in known.items() if capability in (wanted or RTX_CAPABILITIES)}


def _checked(graph: bytes | Path) -> str:
    """The graph's hash. Weights are looked for first: where they are missing, TensorRT-RTX 1.7 ends the process by a segmentation fault."""
    try:
        model = onnx.load_model_from_string(graph) if isinstance(graph, bytes) else onnx.load_model(graph, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise BundleError(f"{_name(graph)}: no ONNX graph that can be read ({_line(error)})", "export it again") from None
    outside = [ExternalDataInfo(weight) for weight in model.graph.initializer if uses_external_data(weight)]
    if isinstance(graph, bytes):
        if outside:
            raise UsageError("the weights of this graph lie beside it", "give its path")
        return onnx_sha256({"graph": hashlib.sha256(graph).hexdigest()}, "graph")
    for info in outside:
        file = graph.parent / info.location
        if not file.is_file() or file.stat().st_size < (info.offset or 0) + (info.length or 0):
            raise BundleError(f"{file}: the weights of {graph.name} are missing or cut short", "export it again")
    files = [file for file in (graph, graph.with_name(f"{graph.name}.data")) if file.is_file()]
    return onnx_sha256({file.name: sha256_of_file(file) for file in files}, graph.name)


def _parse(trt: Any, log: Any, graph: bytes | Path, heard: _Heard, title: str) -> _Parsed:
    """Raises BundleError where TensorRT cannot take a node."""
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    with _raised_at_the_end():
        parsed = parser.parse(graph) if isinstance(graph, bytes) else parser.parse_from_file(str(graph))
    if not parsed:
        error = parser.get_error(0)
        node = f"{error.node_name()} [{error.node_operator()}]" if error.node_operator() else heard.nodes[-1].removeprefix("Parsing node: ")
        why = _line(error.desc())
        raise BundleError(f"{_name(graph)}: {title} cannot take its node {node} ({why})", "choose another precision, or --target cpu")
    return _Parsed(builder, network, parser)


def _config(
    trt: Any, parsed: _Parsed, targets: Mapping[str, Any], profiles: Sequence[Any], version_compatible: bool, strip_weights: bool
) -> Any:
    config = parsed.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or layers would be names alone
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, with 10 bits of mantissa in place of fp32's 23
    for i, capability in enumerate(targets.values()):
        config.num_compute_capabilities = len(targets)
        config.set_compute_capability(capability, i)
    for one in profiles:
        config.add_optimization_profile(one)
    if version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)  # NVIDIA: plain REFIT may lose a bias (TensorRT 11.3, known issues)
    return config


def _profiles(builder: Any, network: Any, batch: Range, lengths: Range) -> list[Any]:
    """The one asked for, and before it one of batch 1 alone where 1 is allowed and not the usual."""
    profiles = []
    for batches in [(1, 1, 1), batch] if batch[0] == 1 < batch[1] else [batch]:
        profile = builder.create_optimization_profile()
        for x in (network.get_input(i) for i in range(network.num_inputs)):
            if -1 not in x.shape:  # a number, or of one shape
                continue
            ranges = [(size,) * 3 if size >= 0 else batches if axis == 0 else lengths for axis, size in enumerate(x.shape)]
            profile.set_shape(x.name, *zip(*ranges, strict=True))
        profiles.append(profile)
    return profiles


@contextmanager
def _raised_at_the_end() -> Iterator[list[BaseException]]:
    """TensorRT swallows what its callbacks raise, KeyboardInterrupt too: that is kept, and the first is raised once TensorRT has returned.

    All is one thread: TensorRT calls back in the one that called it (seen with TensorRT-RTX; builders have one thread unless told
    otherwise), and Ctrl-C is heard there, in the main thread, at the next callback.
    """
    kept: list[BaseException] = []
    heard = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, lambda *_: kept.append(KeyboardInterrupt()))
    try:
        yield kept
    finally:
        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if kept:
        raise kept.pop(0)


def _plan(trt: Any, parsed: _Parsed, config: Any, timing_cache: Path | None, progress: Step | None) -> Any:
    """None where TensorRT builds none."""
    if timing_cache is not None:
        _use_timing_cache(config, timing_cache)
    plan = _build(trt, parsed.builder, parsed.network, config, progress)
    if plan is not None and timing_cache is not None:
        _keep_timing_cache(config, timing_cache)
    return plan


def _build(trt: Any, builder: Any, network: Any, config: Any, progress: Step | None) -> Any:
    """After each step TensorRT asks the monitor whether to go on."""
    with _raised_at_the_end() as kept:

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # its base is known only when it runs
            def __init__(self) -> None:
                super().__init__()
                self.steps: dict[str, int] = {}

            def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
                self.steps[phase] = steps

            def phase_finish(self, phase: str) -> None:
                pass

            def step_complete(self, phase: str, step: int) -> bool:
                try:
                    if progress and not kept:
                        progress(phase, step + 1, self.steps[phase])
                except BaseException as error:
                    kept.append(error)
                return not kept

        config.progress_monitor = Monitor()
        return builder.build_serialized_network(network, config)


def _use_timing_cache(config: Any, file: Path) -> None:
    try:
        kept = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise UsageError(f"{file}: the timing cache cannot be read ({error.strerror})", "name another file") from None
    if not config.set_timing_cache(config.create_timing_cache(kept), False):  # of another GPU or version
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timing_cache(config: Any, file: Path) -> None:
    with write_errors(f"{file}: the timing cache", "name another file"):
        write(file, bytes(config.get_timing_cache().serialize()))


def _inspected(trt: Any, log: Any, plan: Any) -> str:
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = True  # of a version-compatible plan, built here a moment ago
    engine = runtime.deserialize_cuda_engine(plan)
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE)) if engine else ""


def _name(graph: bytes | Path) -> str:
    return "the graph" if isinstance(graph, bytes) else str(graph)


def _line(message: object) -> str:
    return " ".join(str(message).split())[:200]
