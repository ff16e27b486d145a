"""From a checkpoint to a bundle that passed its parity gates, or to nothing."""

import copy
import hashlib
import io
import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import set_external_data
from safetensors.torch import save

from pmclip_deploy.atomic import told, write
from pmclip_deploy.bundle.contract import facet_kinds, graphs_of_ask
from pmclip_deploy.bundle.files import manifest_from_bundle, refuse_foreign_folder, sha256_of_file, write_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import ASKED, LABELS, MANIFEST, SEEN, TOKENIZER, WORDS
from pmclip_deploy.bundle.types import Graph as GraphFile
from pmclip_deploy.classify import bank_from_labels, check_labels
from pmclip_deploy.decision.evidence import FACETS
from pmclip_deploy.errors import BundleError, InputError, ParityError, UsageError
from pmclip_deploy.evaluation.rows import rows_from_jsonl, sha256_of_rows
from pmclip_deploy.export.calibration import Calibration, Measured, histograms_from_feeds, measured_from_feeds
from pmclip_deploy.export.engine_from_onnx import Step
from pmclip_deploy.export.engines import EngineOptions, engines_of_bundle
from pmclip_deploy.export.fp16_from_onnx import half_from_onnx, rounded_from_half
from pmclip_deploy.export.int8_from_onnx import Graphs, int8_from_graphs, int8_layers
from pmclip_deploy.export.onnx_from_checkpoint import Modules, modules_from_checkpoint, onnx_from_modules
from pmclip_deploy.export.parity import (
    ANSWERS,
    FINDINGS,
    PARTS,
    QUESTIONS,
    Progress,
    Reference,
    gate,
    misses,
    part_of,
    predictor_from_modules,
    sample_pictures,
    tokenizers_of,
    words_of,
)
from pmclip_deploy.export.sensitivity import Effect, effects_of_layers, said, said_of_findings
from pmclip_deploy.export.weights import half_stored
from pmclip_deploy.imaging.preprocess import grey_from_pixels, tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.kernels.onnx_function import similarity_graph
from pmclip_deploy.opening import load
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.sessions import Session, SessionOptions, open_session
from pmclip_deploy.sessions.onnxruntime import import_onnxruntime
from pmclip_deploy.spec import METHODS, TENSOR_GATES
from pmclip_deploy.train.checkpoint import name_of_output, read_checkpoint, rounded_tensors

CALIBRATION, PARITY = "calibration.json", "parity.json"  # kept beside the checkpoint, so that a rebuild gives the same bytes
IMAGES, QUESTIONS_READ = 256, 256  # taken of a folder or of a training set to calibrate on, evenly spread over their sorted names
ISLAND = 3  # convolutions
HISTOGRAMS = 8  # tensors that the report shows
RANKED_ON = 16  # pictures that layers are ranked on
STORED = "fp32, stored as fp16"


@dataclass(frozen=True)
class Exported:
    output: Path
    manifest: Manifest
    speed: dict[str, float] | None  # graph to times faster than fp32 here, batch 1, one thread; None where it runs elsewhere
    effects: list[Effect]  # of layers, where they were ranked
    histograms: list[dict[str, Any]]  # of what the most harmful of them read
    built: dict[str, dict[str, Any]]  # graph to what its engine is, where engines were built
    same_as: dict[str, bool] | None  # file to whether the shipped bundle's hash is equal; None where there is none to compare
    why: str  # what was otherwise when the shipped bundle was made


@dataclass(frozen=True)
class Recipe:
    graphs: Graphs
    calibration: Calibration | None = None
    kept: tuple[str, ...] = ()  # GRAPH/LAYER that stay above INT8
    precisions: Mapping[str, str] = field(default_factory=dict)


def bundle_from_checkpoint(
    checkpoint: Path,
    output: Path,
    precision: str,
    *,
    target: str = "cpu",
    calibration_images: Path | None = None,
    calibration_findings: Sequence[Path] = (),
    method: str = METHODS[0],
    data: Path | None = None,
    images: Path | None = None,
    labels: Sequence[str] = (),
    name: str | None = None,
    shipped: Path | None = None,
    ranked: bool = False,
    engines: EngineOptions | None = None,
    steps: Callable[[str], Step | None] = lambda graph: None,
    progress: Progress = lambda items, what: items,
    gates: Mapping[str, Mapping[str, float]] = TENSOR_GATES,
) -> Exported:
    """Raises ParityError, and writes nothing, where the precision costs too much.

    ``calibration_findings`` are folders of pictures for the graph "findings", on which its decisions are compared too; without any it is
    calibrated on ``calibration_images``. ``ranked`` ranks the layers even where nothing must stay in float. With ``engines`` an engine of
    each graph is built, and ``steps`` of a graph is told how far it is. ``labels`` are what the bundle's ``classify`` chooses among.
    ``name`` is the bundle's, by default the checkpoint's.
    """
    refuse_foreign_folder(output)
    if labels:
        check_labels(labels)
    modules = modules_from_checkpoint(checkpoint)
    if name is not None:
        modules = replace(modules, meta={**modules.meta, "name": name_of_output(output, name)})
    graphs = onnx_from_modules(modules, dense=target != "cpu")
    rows = rows_from_jsonl(data, images) if data and images else None
    if calibration_findings and modules.findings is None:
        raise UsageError(f"{checkpoint} has no findings to calibrate; leave out --calibration-findings")
    looked_at = _images_of(calibration_findings)[1] if calibration_findings else ()
    reference = Reference(modules, rows, images, progress=progress, looked_at=looked_at)
    embedded = {**(_files_from_labels(reference, labels) if labels else {}), **_file_from_asked(modules, _asked(reference))}
    with tempfile.TemporaryDirectory(prefix="pmclip-export-") as scratch:
        work = _Work(reference, graphs, precision, target, method, calibration_images, calibration_findings, Path(scratch), progress)
        trial, missed = Path(scratch, "bundle"), ParityError("")
        for recipe in work.recipes():
            files = {**_files_as_they_are(modules), **_files_from_graphs(recipe.graphs), **embedded}
            if recipe.calibration is not None:
                files[CALIBRATION] = _json(recipe.calibration.to_json())
            manifest = write_bundle(trial, _manifest(reference, precision, target, method, recipe, labels), files)
            measured = trial
            if target != "cpu" and precision != "fp32":  # onnxruntime's CPU leaves out roundings to fp16 that a GPU makes
                measured = Path(scratch, "rounded")
                rounded = {name: rounded_from_half(model) for name, model in recipe.graphs.items()}
                write_bundle(measured, manifest, {**files, **_files_from_graphs(rounded)})
            work.missed = {*PARTS}  # where one computes no numbers
            try:
                parity = _parity(reference, measured, manifest)
                work.missed = {part for part, found in misses(precision, parity, gates).items() if found}
                gate(precision, parity, gates)
                break
            except ParityError as error:
                missed = error
        else:
            raise missed
        histograms = []
        if ranked and recipe.calibration is not None:
            work.rank(recipe.calibration, *work.parts)
            histograms = work.histograms(recipe.calibration)
        speed = _speed(graphs, trial, reference.predictor) if target == "cpu" else None
        if recipe.calibration is not None:
            work.keep(recipe.calibration)
        if rows is not None or looked_at:
            hashes = {name: file.sha256 for name, file in manifest.files.items()}
            kept = {**_read(checkpoint / PARITY)}
            kept[f"{precision} {target}"] = {"files": hashes, **{part: parity[part] for part in PARTS if parity.get(part) is not None}}
            _keep(checkpoint / PARITY, _json(kept))
        manifest = replace(manifest, parity=parity)
        made = None if engines is None else engines_of_bundle(trial, manifest, output, engines, steps)
        if made is not None:
            manifest, files = replace(manifest, engines=made.rows), {**files, **made.plans}
        manifest = write_bundle(output, manifest, files)
    of_shipped = _against_shipped(manifest, shipped)
    return Exported(output, manifest, speed, work.effects, histograms, {} if made is None else made.built, *of_shipped)


def name_of_checkpoint(checkpoint: Path) -> str:
    name: str = read_checkpoint(checkpoint)[0]["name"]
    return name


@dataclass
class _Work:
    """What the recipes of one export share, and the layers' ranks once they were needed."""

    reference: Reference
    graphs: Graphs
    precision: str
    target: str
    method: str
    calibration_images: Path | None
    calibration_findings: Sequence[Path]
    scratch: Path
    progress: Progress
    missed: set[str] = field(default_factory=set)  # the parts whose gates the last recipe missed
    ranks: dict[str, list[Effect]] = field(default_factory=dict)  # of the parts that were ranked

    @property
    def parts(self) -> list[str]:
        return list(dict.fromkeys(map(part_of, self.graphs)))

    @property
    def effects(self) -> list[Effect]:
        return sorted((e for ranks in self.ranks.values() for e in ranks), key=lambda e: -e.effect)

    def recipes(self) -> Iterator[Recipe]:
        """The fastest first; of INT8 with ever more layers in float, the most harmful first, of the parts that missed their gates."""
        if self.precision == "fp32":
            yield Recipe(self.graphs, precisions=dict.fromkeys(self.graphs, "fp32"))
        elif self.precision == "fp16" and self.target == "cpu":
            stored = {name: half_stored(model) for name, model in self.graphs.items()}
            yield Recipe(stored, precisions=dict.fromkeys(self.graphs, STORED))
        elif self.precision == "fp16":
            yield self._half()
        else:
            yield from self._int8()

    def _half(self) -> Recipe:
        kept = [table for table in _tables(self.reference.modules) if table is not None]
        known = {name for table in kept for name in table.tensors}
        tensors = self._measured([name for name in self.graphs if name not in known], sample_pictures(), QUESTIONS)
        for table in kept:
            tensors.update(table.tensors)
        graphs, floats = {}, []
        for name, model in self.graphs.items():
            ranges = {tensor: of.ranges["max"] for tensor, of in tensors.get(name, {}).items()}
            graphs[name], above = half_from_onnx(model, ranges)
            floats += [f"{name}/{node}" for node in above]
        return Recipe(graphs, None, tuple(floats), dict.fromkeys(graphs, "fp16"))

    def _int8(self) -> Iterator[Recipe]:
        calibration = self._calibrated()
        steps = {part: self._kept(calibration, part) for part in self.parts}
        kept = {part: next(of) for part, of in steps.items()}
        while True:
            yield self._quantised(calibration, [layer for of in kept.values() for layer in of])
            for part in self.missed & kept.keys():
                if (more := next(steps[part], None)) is None:
                    return
                kept[part] = more

    def _kept(self, calibration: Calibration, part: str) -> Iterator[Sequence[str]]:
        """What stays in float of a part's layers: what did the last time, nothing, then ever more."""
        table = calibration.findings if part == FINDINGS else calibration
        if table is not None and self.target in table.kept:
            yield table.kept[self.target]
        yield ()
        self.rank(calibration, part)
        layers, count = [e.layer for e in self.ranks[part]], 1
        while count < len(layers):
            yield without_islands(self.graphs, layers[:count])
            count *= 2
        yield layers

    def _quantised(self, calibration: Calibration, kept: Sequence[str]) -> Recipe:
        graphs = int8_from_graphs(self.graphs, calibration, self.method, self.target, kept)
        layers = int8_layers(self.graphs, self.target)
        whole = STORED if self.target == "cpu" else "fp16"
        precisions = {name: "int8" if any(x.startswith(f"{name}/") and x not in kept for x in layers) else whole for name in self.graphs}
        return Recipe(graphs, calibration.keeping(self.target, kept), tuple(sorted(kept)), precisions)

    def rank(self, calibration: Calibration, *parts: str) -> None:
        """Once, on calibration images where they are given, else on those in pydicom's wheel; what no answer reads comes last."""
        for part in parts:
            if part not in self.ranks:
                self.ranks[part] = self._ranked(calibration, part)

    def _ranked(self, calibration: Calibration, part: str) -> list[Effect]:
        layers = [layer for layer in int8_layers(self.graphs, self.target) if part_of(layer) == part]
        manifest = self.reference.predictor.manifest
        read = [FINDINGS] if part == FINDINGS else graphs_of_ask(manifest)
        unread = [x for x in layers if x.partition("/")[0] not in read]
        sessions: dict[str, Session] = {}
        for name, model in self.graphs.items():
            path = self.scratch / f"{name}.fp32.onnx"
            path.write_bytes(model.SerializeToString())
            sessions[name] = open_session(path, SessionOptions("cpu"))
        tokenizers = tokenizers_of(self.reference.modules)

        def quantised(graph: str, layer: str) -> onnx.ModelProto:
            others = [x for x in layers if x != f"{graph}/{layer}"]
            return int8_from_graphs({graph: self.graphs[graph]}, calibration, self.method, self.target, others)[graph]

        effects = effects_of_layers(
            lambda with_them: Predictor(None, manifest, with_them, tokenizers),
            sessions, [x for x in layers if x not in unread], quantised, self._ranked_on(part), self.scratch, self.progress,
            integer_kernels=self.target == "cpu", say=said_of_findings if part == FINDINGS else said,
        )  # fmt: skip
        return effects + [Effect(x, 0.0) for x in unread]

    def keep(self, made: Calibration) -> None:
        """Beside the checkpoint: the table, and what each target left in float."""
        before, findings = _tables(self.reference.modules)
        whole = made.joined(before, findings)
        if (replace(whole, findings=None), whole.findings) != (before, findings):
            _keep(self.reference.modules.folder / CALIBRATION, _json(whole.to_json()))

    def _calibrated(self) -> Calibration:
        """The tables beside the checkpoint where they are of these weights and, if any are given, of these images; else new ones."""
        answers, findings = _tables(self.reference.modules)
        images = [self.calibration_images] if self.calibration_images is not None else []
        images_of_findings = [*self.calibration_findings] or images
        looks = FINDINGS in self.graphs
        for known, given, option in (
            (answers, images, "--calibration-images"),
            (findings, images_of_findings, "--calibration-findings"),
        )[: 1 + looks]:
            if known is None and not given:
                raise UsageError(
                    f"{self.reference.modules.folder} has no {CALIBRATION} for these weights; pass {option} FOLDER with training images"
                )
        weights = _weights_sha256(self.reference.modules)
        made = self._table(ANSWERS, answers, images, weights[0])
        return replace(made, findings=self._table(FINDINGS, findings, images_of_findings, weights[1])) if looks else made

    def _table(self, part: str, before: Calibration | None, images: Sequence[Path], weights: str) -> Calibration:
        if before is not None and not images:
            return before
        root, found = _images_of(images)
        paths = _spread(found, IMAGES)
        names = {path.relative_to(root).as_posix(): sha256_of_file(path) for path in paths}
        questions = [] if part == FINDINGS else _questions_of(images[0])
        if before is not None and before.images == names and before.questions == len(questions):
            return before
        tensors = self._measured([name for name in self.graphs if part_of(name) == part], paths, questions or QUESTIONS)
        return Calibration(weights, names, len(questions), tensors)

    def histograms(self, calibration: Calibration) -> list[dict[str, Any]]:
        """Of what the most harmful layers read, for the report."""
        source = {n.output[0]: n.input[0] for model in self.graphs.values() for n in model.graph.node}
        wanted = dict.fromkeys((graph, source[layer]) for graph, _, layer in (e.layer.partition("/") for e in self.effects[:HISTOGRAMS]))
        out = []
        for graph, model in self.graphs.items():
            feeds = self._feeds(self._ranked_on(part_of(graph)), QUESTIONS)
            if names := [tensor for of, tensor in wanted if of == graph]:
                for tensor, (counts, edges) in histograms_from_feeds(model, names, feeds[graph]).items():
                    bounds = calibration.of_graphs[graph][tensor].ranges[self.method]
                    out.append({"graph": graph, "tensor": tensor, "counts": counts, "edges": edges, "range": bounds, "method": self.method})
        return out

    def _ranked_on(self, part: str) -> list[Path]:
        images = [self.calibration_images] if self.calibration_images else []
        images = [*self.calibration_findings] or images if part == FINDINGS else images
        return _spread(_images_of(images)[1] if images else sample_pictures(), RANKED_ON)

    def _measured(self, names: Sequence[str], paths: Sequence[Path], questions: Sequence[str]) -> dict[str, Mapping[str, Measured]]:
        feeds = self._feeds(paths, questions)
        return {name: measured_from_feeds(self.graphs[name], feeds[name]) for name in names}

    def _feeds(self, paths: Sequence[Path], questions: Sequence[str]) -> dict[str, Any]:
        """Of each graph the inputs that real pictures and questions give, one after the other."""
        predictor = self.reference.predictor
        manifest, head = predictor.manifest, predictor.manifest.head
        read = partial(_pixels, progress=self.progress)
        feeds: dict[str, Any] = {
            "image": ({"pixels": tensor_from_pixels(x, manifest.preprocess)[None]} for x in read(paths, "Calibrating the image tower")),
            "text": ({"tokens": x} for x in predictor.tokens(questions)),
        }
        if head is not None:
            asked = predictor.asked(questions)
            name = "text" if head.words is None else "tokens"
            some = _spread(paths, RANKED_ON)
            feeds["head"] = (
                {"image": predictor.seen(path)[None], name: asked[i :: len(some)][:1]} for i, path in enumerate(some) if i < len(asked)
            )
            if head.grey:
                feeds["features"] = (
                    {n: grey_from_pixels(x, side)[None] for n, side in head.grey.items()} for x in read(some, "Calibrating the features")
                )
        if manifest.findings is not None:
            preprocess = manifest.findings.preprocess
            feeds[FINDINGS] = (
                {"pixels": tensor_from_pixels(x, preprocess)[None]} for x in read(paths, "Calibrating what looks for findings")
            )
        return feeds


def without_islands(graphs: Graphs, kept: Sequence[str]) -> list[str]:
    """``kept``, and of convolutions also up to ISLAND between two that are kept: to convert for a few costs more than they save."""
    out = list(kept)
    for name, model in graphs.items():
        convolutions = [f"{name}/{n.output[0]}" for n in model.graph.node if n.op_type == "Conv"]
        places = [i for i, layer in enumerate(convolutions) if layer in kept]
        for before, after in pairwise([-1, *places] if places else []):
            if 1 < after - before <= ISLAND + 1:
                out += convolutions[before + 1 : after]
    return out


def _pixels(paths: Sequence[Path], what: str, progress: Progress) -> Iterator[Any]:
    for path in progress(paths, what):
        yield picture_from_path(path).pixels


def _spread(found: Sequence[Any], count: int) -> list[Any]:
    return [found[i] for i in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]


def _images_of(sources: Sequence[Path]) -> tuple[Path, list[Path]]:
    """(their root, paths) of folders, or of the rows of training sets with images/ beside them, IMAGES in all where there are several.

    Raises InputError.
    """
    roots, paths = list[Path](), list[Path]()
    for source in sources:
        if source.suffix == ".jsonl":
            root = source.parent / "images"
            found = [root / name for name in sorted({row.image for row in rows_from_jsonl(source, root)})]
        else:
            root = source
            found = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".dcm")) if source.is_dir() else []
        if not found:
            raise InputError(f"{source}: no images (.jpg, .png, .dcm) to calibrate on; give a folder of training images")
        roots.append(root)
        paths += found if len(sources) == 1 else _spread(found, IMAGES // len(sources))
    return Path(os.path.commonpath(roots)), paths


def _questions_of(source: Path) -> list[str]:
    if source.suffix != ".jsonl":
        return list(QUESTIONS)
    return _spread(sorted({row.question for row in rows_from_jsonl(source)}), QUESTIONS_READ)


def _parity(reference: Reference, trial: Path, manifest: Manifest) -> dict[str, Any]:
    """What was measured on these very files, and these rows or pictures if any are given, is not measured again."""
    kept = _read(reference.modules.folder / PARITY).get(f"{manifest.precision} {manifest.target}", {})
    answers, findings = (kept.get(part) if _hashes(manifest, part).items() <= kept.get("files", {}).items() else None for part in PARTS)
    if answers is not None and reference.rows is not None and answers.get("data_sha256") != sha256_of_rows(reference.rows):
        answers = None
    if reference.looked_at:
        findings = None
    return reference.parity_of(load(trial, "cpu"), answers, findings)[1]


def _hashes(manifest: Manifest, part: str) -> dict[str, str]:
    """Of the files that decide what a part says."""
    return {
        name: file.sha256
        for name, file in manifest.files.items()
        if name != CALIBRATION and (name.partition(".")[0] == FINDINGS) == (part == FINDINGS)
    }


def _against_shipped(manifest: Manifest, shipped: Path | None) -> tuple[dict[str, bool] | None, str]:
    there = manifest_from_bundle(shipped) if shipped is not None and (shipped / MANIFEST).is_file() else None
    if there is None or (there.precision, there.target) != (manifest.precision, manifest.target):
        return None, ""
    now, then = manifest.provenance["export"], there.provenance.get("export", {})
    why = ", ".join(f"{key} was {then.get(key)}, is {value}" for key, value in now.items() if then.get(key) != value)
    return {name: there.files.get(name) == file for name, file in manifest.files.items()}, why


def _files_as_they_are(modules: Modules) -> dict[str, bytes]:
    """The tokenizers, and the signatures of the pictures that the image tower learned from where the checkpoint has them."""
    words, there = words_of(modules), [name for name in (TOKENIZER, SEEN) if (modules.folder / name).is_file()]
    return {**{name: (modules.folder / name).read_bytes() for name in there}, **({} if words is None else {WORDS: words.encode()})}


def _files_from_labels(reference: Reference, labels: Sequence[str]) -> dict[str, bytes]:
    """The labels' embeddings, by the fp32 text tower whatever the bundle's precision, and the graph that finds the nearest."""
    bank = bank_from_labels(reference.predictor.embed_texts, labels)
    rows, dim = bank.shape
    graph = similarity_graph(rows, dim, k=rows)
    return {"labels.onnx": graph.SerializeToString(deterministic=True), LABELS: _npy(bank)}


def _asked(reference: Reference) -> tuple[str, ...]:
    """All that the head is asked to answer any question, where the rules of decision are about it."""
    return tuple(sorted({question for _, question in FACETS.values()})) if facet_kinds(reference.predictor.manifest) else ()


def _file_from_asked(modules: Modules, asked: Sequence[str]) -> dict[str, bytes]:
    """Their embeddings, fp32 whatever the bundle's precision; computed in fp64, so that no thread count and no CPU changes a byte."""
    if not asked:
        return {}
    exact = predictor_from_modules(replace(modules, clip=copy.deepcopy(modules.clip).double()))
    return {ASKED: _npy(exact.embed_texts(asked).astype(np.float32))}


def _npy(array: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def _files_from_graphs(graphs: Graphs) -> dict[str, bytes]:
    """NAME.onnx and NAME.onnx.data: a session maps the weights instead of copying them twice.

    Not by onnx.save_model, which refuses to where a file of that name lies in the current folder.
    """
    files: dict[str, bytes] = {}
    for name, model in graphs.items():
        onnx.checker.check_model(model, full_check=True)
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


def _manifest(reference: Reference, precision: str, target: str, method: str, recipe: Recipe, labels: Sequence[str]) -> Manifest:
    base = reference.predictor.manifest
    floats = {name: tuple(x.partition("/")[2] for x in recipe.kept if x.startswith(f"{name}/")) for name in recipe.graphs}
    made: dict[str, Any] = {
        "command": shlex.join(["pmclip-deploy", "export", "CHECKPOINT", "--precision", precision, "--target", target]),
        "onnx": onnx.__version__,
        "onnxruntime": import_onnxruntime().__version__,
        "checkpoint_sha256": sha256_of_file(reference.modules.folder / "model.safetensors"),
    }
    if recipe.calibration is not None:
        made |= {"method": method, "calibration_images": len(recipe.calibration.images)}
        if recipe.calibration.findings is not None:
            made["calibration_findings"] = len(recipe.calibration.findings.images)
    return replace(
        base,
        precision=precision,
        target=target,
        graphs={
            **{name: GraphFile(f"{name}.onnx", recipe.precisions[name], floats[name]) for name in recipe.graphs},
            **({"labels": GraphFile("labels.onnx", "fp32")} if labels else {}),
        },
        labels=tuple(labels),
        asked=_asked(reference),
        provenance={**base.provenance, "export": made},
    )


def _tables(modules: Modules) -> tuple[Calibration | None, Calibration | None]:
    """What calibration.json holds for these weights: of the graphs that answer, of the findings."""
    path = modules.folder / CALIBRATION
    if not path.is_file():
        return None, None
    try:
        table = Calibration.from_json(_read(path))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BundleError(f"{path}: not a calibration; make it anew with --calibration-images FOLDER") from None
    answers, findings = _weights_sha256(modules)
    return (
        replace(table, findings=None) if table.checkpoint == answers else None,
        table.findings if table.findings is not None and table.findings.checkpoint == findings else None,
    )


def _weights_sha256(modules: Modules) -> tuple[str, str]:
    """(of all weights but the findings', of those): each as a model.safetensors of its own, so that one may change without the other."""
    parts: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    for name, tensor in rounded_tensors(modules.folder).items():
        parts[name.startswith(f"{FINDINGS}.")][name] = tensor
    answers, findings = (hashlib.sha256(save(part)).hexdigest() if part else "" for part in (parts[False], parts[True]))
    return answers, findings


def _speed(graphs: Graphs, bundle: Path, reference: Predictor) -> dict[str, float]:
    """How many times faster than fp32 each graph runs here: batch 1, one thread, medians of interleaved runs."""
    manifest, random, ort = manifest_from_bundle(bundle), np.random.default_rng(0), import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    ratios = {}
    for name, model in graphs.items():
        if manifest.graphs[name].precision == "fp32":
            continue
        sides = {x.name: [d.dim_value or 1 for d in x.type.tensor_type.shape.dim] for x in model.graph.input}
        feed: dict[str, NDArray[Any]] = {
            x: random.uniform(-1, 1, shape).astype(np.float32) for x, shape in sides.items() if x != "tokens"
        }
        if "tokens" in sides:
            feed["tokens"] = reference.tokens(QUESTIONS[:1])[0] if name == "text" else reference.asked(QUESTIONS[:1])
        models = (model.SerializeToString(), str(bundle / manifest.graphs[name].file))
        sessions = [ort.InferenceSession(of, options, providers=["CPUExecutionProvider"]) for of in models]
        times = np.array([[_seconds(partial(session.run, None, feed)) for session in sessions] for _ in range(25)])
        base, other = np.median(times[5:], axis=0)
        ratios[name] = float(base / other)
    return ratios


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _keep(path: Path, content: bytes) -> None:
    with told(f"{path}:", "export a copy of the checkpoint", BundleError):
        write(path, content)


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
