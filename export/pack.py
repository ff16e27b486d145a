"""From a checkpoint to a bundle that passed its parity gates, or to nothing."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.external_data_helper import set_external_data

from pmclip_deploy.bundle import MANIFEST, TOKENIZER, Manifest, manifest_from_bundle, refuse_foreign_folder, sha256_of_file, write_bundle
from pmclip_deploy.errors import BundleError, InputError, ParityError, UsageError
from pmclip_deploy.evaluate import rows_from_jsonl
from pmclip_deploy.export import int8_from_onnx as int8
from pmclip_deploy.export.onnx_from_checkpoint import Modules, head_of, modules_from_checkpoint, onnx_from_modules
from pmclip_deploy.export.parity import TENSOR_GATES, Progress, gate, parity_of_bundle
from pmclip_deploy.pixels import picture_from_path, tensor_from_pixels
from pmclip_deploy.spec import BUNDLE_SCHEMA
from pmclip_deploy.train.towers import read_checkpoint

CALIBRATION, PARITY = "calibration.json", "parity.json"  # kept beside the checkpoint, so that a rebuild gives the same bytes
IMAGES = 256  # calibration images taken of a folder, evenly spread over its sorted names
FLOAT_CONVOLUTIONS = (3, 9, 24)  # of the image tower, from the first on; tried in turn until the gates pass, and after them all
STORED = "fp32, stored as fp16"

Graphs = dict[str, onnx.ModelProto]


@dataclass(frozen=True)
class Exported:
    output: Path
    manifest: Manifest
    speed: dict[str, float]  # graph to times faster than fp32 here, batch 1, one thread
    same_as: dict[str, bool] | None  # file to whether the shipped bundle's hash is equal; None where there is none to compare
    why: str  # what was otherwise when the shipped bundle was made


def bundle_from_checkpoint(
    checkpoint: Path,
    output: Path,
    precision: str,
    *,
    target: str = "cpu",
    calibration_images: Path | None = None,
    data: Path | None = None,
    images: Path | None = None,
    shipped: Path | None = None,
    progress: Progress = lambda items, what: items,
    gates: Mapping[str, Mapping[str, float]] = TENSOR_GATES,
) -> Exported:
    """Raises ParityError, and writes nothing, where the precision costs too much."""
    refuse_foreign_folder(output)
    modules = modules_from_checkpoint(checkpoint)
    head_of(modules)  # refused before the work, not after
    graphs = onnx_from_modules(modules)
    rows = rows_from_jsonl(data, images) if data and images else None
    kept = _calibration(modules) if precision == "int8" and calibration_images is None else None
    recipes: Iterator[int8.Calibration | None] = iter([kept])
    if precision == "int8" and calibration_images is not None:
        recipes = _calibrations(modules, graphs["image"], calibration_images, progress)
    elif precision == "int8" and kept is None:
        raise UsageError(f"{checkpoint} has no {CALIBRATION} for these weights; pass --calibration-images FOLDER with training images")

    with tempfile.TemporaryDirectory(prefix="pmclip-export-") as scratch:
        trial, missed = Path(scratch, "bundle"), ParityError("")
        for calibration in recipes:
            quantised = graphs if calibration is None else _int8(graphs, calibration)
            files = {TOKENIZER: (checkpoint / TOKENIZER).read_bytes(), **_files_from_graphs(quantised)}
            if calibration is not None:
                files[CALIBRATION] = _json(calibration.to_json())
            manifest = write_bundle(trial, _manifest(modules, precision, target, calibration), files)
            try:
                _, parity = parity_of_bundle(trial, modules, rows, images, progress=progress)
                gate(precision, parity, gates)
                break
            except ParityError as error:
                missed = error
        else:
            raise missed
        hashes = {name: file.sha256 for name, file in manifest.files.items()}
        if parity["answers"] is None:
            parity["answers"] = _measured(checkpoint, precision, hashes)
        speed = _speed(graphs, trial)
        if calibration_images is not None and calibration is not None:
            _keep(checkpoint / CALIBRATION, _json(calibration.to_json()))
        if rows is not None:
            _keep(checkpoint / PARITY, _json({**_read(checkpoint / PARITY), precision: {"files": hashes, "answers": parity["answers"]}}))
        manifest = write_bundle(output, replace(manifest, parity=parity), files)
    return Exported(output, manifest, speed, *_against_shipped(manifest, shipped))


def name_of_checkpoint(checkpoint: Path) -> str:
    return read_checkpoint(checkpoint)[0]["name"]


def _against_shipped(manifest: Manifest, shipped: Path | None) -> tuple[dict[str, bool] | None, str]:
    there = manifest_from_bundle(shipped) if shipped is not None and (shipped / MANIFEST).is_file() else None
    if there is None or there.precision != manifest.precision:
        return None, ""
    now, then = manifest.provenance["export"], there.provenance.get("export", {})
    why = ", ".join(f"{key} was {then.get(key)}, is {value}" for key, value in now.items() if then.get(key) != value)
    return {name: there.files.get(name) == file for name, file in manifest.files.items()}, why


def _int8(graphs: Graphs, calibration: int8.Calibration) -> Graphs:
    image = int8.int8_image(graphs["image"], calibration)
    return {"image": int8.half_stored(image), "text": int8.int8_weights(graphs["text"]), "head": int8.int8_weights(graphs["head"])}


def _files_from_graphs(graphs: Graphs) -> dict[str, bytes]:
    """NAME.onnx and NAME.onnx.data: a session maps the weights instead of copying them twice.

    Not by onnx.save_model, which refuses to where a file of that name lies in the current folder.
    """
    files = {}
    for name, model in graphs.items():
        outside, data = onnx.ModelProto(), bytearray()
        outside.CopyFrom(model)
        for weight in outside.graph.initializer:
            if len(weight.raw_data) < 1024:
                continue
            data += bytes(-len(data) % 64)  # aligned for vector loads
            set_external_data(weight, f"{name}.onnx.data", len(data), len(weight.raw_data))
            data += weight.raw_data
            weight.ClearField("raw_data")
        files |= {f"{name}.onnx": outside.SerializeToString(deterministic=True), f"{name}.onnx.data": bytes(data)}
    return files


def _manifest(modules: Modules, precision: str, target: str, calibration: int8.Calibration | None) -> Manifest:
    meta, backbone = modules.meta, modules.backbone
    graphs = {name: {"file": f"{name}.onnx", "precision": precision} for name in ("image", "text", "head")}
    if calibration is not None:
        first = f"int8, the first {calibration.float_convolutions} convolutions {STORED}"
        graphs["image"]["precision"] = first if calibration.ranges else STORED
    p = backbone.preprocess
    checkpoint = sha256_of_file(modules.folder / "model.safetensors")
    made = {"onnx": onnx.__version__, "onnxruntime": ort.__version__, "checkpoint_sha256": checkpoint}
    if calibration is not None:
        made |= {"float_convolutions": calibration.float_convolutions, "calibration_images": len(calibration.images)}
    try:
        return Manifest.from_json(
            {
                **meta,
                "schema": BUNDLE_SCHEMA,
                "precision": precision,
                "target": target,
                "preprocess": {"size": p.size, "resize": p.resize, "mean": list(p.mean), "std": list(p.std)},
                "text": {"context_length": backbone.context_length, "pad_id": backbone.pad_id},
                "embed_dim": backbone.embed_dim,
                "graphs": graphs,
                "metrics": meta.get("metrics", {}),
                "parity": {},
                "provenance": {**meta.get("provenance", {}), "export": made},
                "files": {},
            }
        )
    except ValueError as error:
        raise BundleError(f"{modules.folder / 'checkpoint.json'}: {error}; train the head with `pmclip-deploy train vqa`") from None


def _calibration(modules: Modules) -> int8.Calibration | None:
    """What calibration.json holds, if it was made for these weights."""
    path = modules.folder / CALIBRATION
    if not path.is_file():
        return None
    try:
        calibration = int8.Calibration.from_json(_read(path))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BundleError(f"{path}: not a calibration; make it anew with --calibration-images FOLDER") from None
    return calibration if calibration.checkpoint == sha256_of_file(modules.folder / "model.safetensors") else None


def _calibrations(modules: Modules, graph: onnx.ModelProto, folder: Path, progress: Progress) -> Iterator[int8.Calibration]:
    """One measurement of the images, then ever more convolutions in float."""
    if folder.suffix == ".jsonl":  # rows of a training set, whose images may lie among others
        root = folder.parent / "images"
        found = [root / name for name in sorted({row.image for row in rows_from_jsonl(folder, root)})]
    else:
        root = folder
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".dcm")) if folder.is_dir() else []
    if not found:
        raise InputError(f"{folder}: no images (.jpg, .png, .dcm) to calibrate on; give a folder of training images")
    paths = [found[i] for i in np.linspace(0, len(found) - 1, min(IMAGES, len(found))).astype(int)]
    tensors = (tensor_from_pixels(picture_from_path(path).pixels, modules.backbone.preprocess) for path in progress(paths, "Calibrating"))
    ranges, means = int8.activations_from_images(graph, tensors)
    names = {path.relative_to(root).as_posix(): sha256_of_file(path) for path in paths}
    checkpoint = sha256_of_file(modules.folder / "model.safetensors")
    convolutions = sum(node.op_type == "Conv" for node in graph.graph.node)
    for count in FLOAT_CONVOLUTIONS:
        yield int8.Calibration(checkpoint, names, count, ranges, means)
    yield int8.Calibration(checkpoint, names, convolutions, {}, {})


def _measured(checkpoint: Path, precision: str, hashes: dict[str, str]) -> Any:
    """The answers' parity kept in parity.json, if it was measured on these very files."""
    kept = _read(checkpoint / PARITY).get(precision, {})
    return kept.get("answers") if kept.get("files") == hashes else None


def _speed(graphs: Graphs, bundle: Path) -> dict[str, float]:
    """How many times faster than fp32 each graph runs here: batch 1, one thread, medians of interleaved runs."""
    manifest = manifest_from_bundle(bundle)
    size, width = manifest.preprocess.size, manifest.embed_dim
    random = np.random.default_rng(0)
    feeds = {
        "image": {"pixels": random.uniform(-1, 1, (1, 3, size, size)).astype(np.float32)},
        "text": {"tokens": random.integers(1, 1000, (1, 12))},
        "head": {name: random.normal(size=(1, width)).astype(np.float32) for name in ("image", "text")},
    }
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    ratios = {}
    for name, feed in feeds.items():
        models = (graphs[name].SerializeToString(), str(bundle / manifest.graphs[name].file))
        sessions = [ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for model in models]
        times = np.array([[_seconds(lambda s=session, f=feed: s.run(None, f)) for session in sessions] for _ in range(25)])
        base, other = np.median(times[5:], axis=0)
        ratios[name] = float(base / other)
    return ratios


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _keep(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror}); export a copy of the checkpoint") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise BundleError(f"{path}: not readable JSON; remove it, and pass --calibration-images FOLDER and --data FILE again") from None
    return content if isinstance(content, dict) else {}


def _json(content: Any) -> bytes:
    return (json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n").encode()
