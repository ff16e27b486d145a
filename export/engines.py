"""A bundle's engines: one for each graph, built, or taken from the bundle that stands there where nothing has changed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmclip_deploy.bundle.files import manifest_from_bundle, sha256_of_file
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import MANIFEST
from pmclip_deploy.bundle.types import Engine
from pmclip_deploy.errors import BundleError
from pmclip_deploy.export.engine_from_onnx import Step, engine_from_onnx
from pmclip_deploy.sessions import onnx_sha256
from pmclip_deploy.sessions.engines import engine_backends, platform_here


@dataclass(frozen=True)
class EngineOptions:
    """engine_from_onnx's, for all graphs of a bundle."""

    backend: str
    compute_capabilities: tuple[str, ...] = ()
    largest_batch: int = 8
    timing_cache: Path | None = None
    version_compatible: bool = False
    strip_weights: bool = False


@dataclass(frozen=True)
class Engines:
    rows: tuple[Engine, ...]
    plans: dict[str, bytes]
    built: dict[str, dict[str, Any]]  # graph to {"bytes", "seconds", "layers"}; of one that was taken over seconds and layers are None


def engines_of_bundle(
    bundle: Path, manifest: Manifest, before: Path, options: EngineOptions, steps: Callable[[str], Step | None] = lambda graph: None
) -> Engines:
    """``before`` is the bundle that may hold them already. Raises what engine_from_onnx raises."""
    rows: list[Engine] = []
    plans: dict[str, bytes] = {}
    built: dict[str, dict[str, Any]] = {}
    known, backend = _known(before), engine_backends()[options.backend]
    for name, graph in manifest.graphs.items():
        file, profile = f"{name}.plan", (1, 1, options.largest_batch)
        hashed = onnx_sha256({n: f.sha256 for n, f in manifest.files.items()}, graph.file)
        row = known.get(name) if backend.built_ahead else None  # TensorRT's row does not say how its plan was stripped
        same = row is not None and (row.backend, row.onnx_sha256, row.profile, row.platform, row.version) == (
            options.backend, hashed, profile, platform_here(), backend.version(),
        )  # fmt: skip
        if row and same and set(options.compute_capabilities or row.compute_capabilities) == set(row.compute_capabilities):
            plans[file] = (before / row.file).read_bytes()
            rows.append(row)
            built[name] = {"bytes": len(plans[file]), "seconds": None, "layers": None}
            continue
        limit = manifest.context_length
        engine = engine_from_onnx(
            bundle / graph.file,
            options.backend,
            compute_capabilities=options.compute_capabilities,
            profile=profile,
            text_lengths=(1, min(12, limit), limit),
            timing_cache=options.timing_cache,
            version_compatible=options.version_compatible,
            strip_weights=options.strip_weights,
            progress=steps(name),
        )
        rows.append(engine.row(name, file))
        plans[file] = engine.plan
        built[name] = {"bytes": len(engine.plan), "seconds": round(engine.seconds, 1), "layers": engine.precisions}
    return Engines(tuple(rows), plans, built)


def _known(before: Path) -> dict[str, Engine]:
    """The engines of the bundle there that are what its manifest says."""
    if not (before / MANIFEST).is_file():
        return {}
    try:
        manifest = manifest_from_bundle(before)
    except BundleError:
        return {}
    whole = [
        row
        for row in manifest.engines
        if (before / row.file).is_file() and sha256_of_file(before / row.file) == manifest.files[row.file].sha256
    ]
    return {row.graph: row for row in whole}
