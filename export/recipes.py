"""What the recipes of an export share: the checkpoint's graphs in fp16 and, with ever more layers in float, in INT8."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx

from pmclip_deploy.bundle.files import sha256_of_file
from pmclip_deploy.decision.needs import graphs_of_ask
from pmclip_deploy.errors import UsageError
from pmclip_deploy.export.calibration import Calibration, Measured, histograms_from_feeds, measured_from_feeds
from pmclip_deploy.export.fp16_from_onnx import half_from_onnx
from pmclip_deploy.export.gates import ANSWERS, FINDINGS, PARTS, part_of
from pmclip_deploy.export.int8_from_onnx import Graphs, int8_from_graphs, int8_layers
from pmclip_deploy.export.onnx_from_checkpoint import Modules
from pmclip_deploy.export.precisions.base import STORED, Recipe
from pmclip_deploy.export.probes import QUESTIONS, Progress, sample_pictures
from pmclip_deploy.export.records import CALIBRATION, record_calibration, tables_of, weights_sha256
from pmclip_deploy.export.reference import Reference, tokenizers_of
from pmclip_deploy.export.samples import FEW, IMAGES, feeds_of, images_of, questions_of, spread
from pmclip_deploy.export.sensitivity import Effect, effects_of_layers, said, said_of_findings
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.sessions import Session, SessionOptions, open_session
from pmclip_deploy.spec import METHODS

ISLAND = 3  # convolutions
HISTOGRAMS = 8  # tensors that the report shows


@dataclass(frozen=True)
class ExportOptions:
    precision: str
    target: str = "cpu"
    method: str = METHODS[0]  # of int8's ranges
    calibration_images: Path | None = None
    calibration_findings: Sequence[Path] = ()
    labels: Sequence[str] = ()  # that the bundle's `classify` chooses among


@dataclass
class Work:
    """What the recipes of one export share, and the layers' ranks once they were needed."""

    reference: Reference
    graphs: Graphs
    options: ExportOptions
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

    @property
    def target(self) -> str:
        return self.options.target

    def half(self) -> Recipe:
        kept = [table for table in tables_of(self.reference.modules) if table is not None]
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

    def int8(self) -> Iterator[Recipe]:
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
        if table is not None and self.options.target in table.kept:
            yield table.kept[self.options.target]
        yield ()
        self.rank(calibration, part)
        layers, count = [e.layer for e in self.ranks[part]], 1
        while count < len(layers):
            yield without_islands(self.graphs, layers[:count])
            count *= 2
        yield layers

    def _quantised(self, calibration: Calibration, kept: Sequence[str]) -> Recipe:
        graphs = int8_from_graphs(self.graphs, calibration, self.options.method, self.options.target, kept)
        layers = int8_layers(self.graphs, self.options.target)
        whole = STORED if self.options.target == "cpu" else "fp16"
        precisions = {name: "int8" if any(x.startswith(f"{name}/") and x not in kept for x in layers) else whole for name in self.graphs}
        return Recipe(graphs, calibration.keeping(self.options.target, kept), tuple(sorted(kept)), precisions)

    def rank(self, calibration: Calibration, *parts: str) -> None:
        """Once, on calibration images where they are given, else on those in pydicom's wheel; what no answer reads comes last."""
        for part in parts:
            if part not in self.ranks:
                self.ranks[part] = self._ranked(calibration, part)

    def _ranked(self, calibration: Calibration, part: str) -> list[Effect]:
        layers = [layer for layer in int8_layers(self.graphs, self.options.target) if part_of(layer) == part]
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
            return int8_from_graphs({graph: self.graphs[graph]}, calibration, self.options.method, self.options.target, others)[graph]

        effects = effects_of_layers(
            lambda with_them: Predictor(None, manifest, with_them, tokenizers),
            sessions, [x for x in layers if x not in unread], quantised, self._ranked_on(part), self.scratch, self.progress,
            integer_kernels=self.options.target == "cpu", say=said_of_findings if part == FINDINGS else said,
        )  # fmt: skip
        return effects + [Effect(x, 0.0) for x in unread]

    def _calibrated(self) -> Calibration:
        """The tables beside the checkpoint where they are of these weights and, if any are given, of these images; else new ones.

        A new one is recorded at once: it took minutes, and what follows may be cut off.
        """
        modules = self.reference.modules
        known, weights = tables_for(modules, self.options), weights_sha256(modules)
        made = replace(self._table(ANSWERS, known[ANSWERS], weights[0]), findings=known[FINDINGS])
        record_calibration(modules, made)
        if FINDINGS in self.graphs:
            made = replace(made, findings=self._table(FINDINGS, known[FINDINGS], weights[1]))
            record_calibration(modules, made)
        return made

    def _table(self, part: str, before: Calibration | None, weights: str) -> Calibration:
        images = self._calibrated_on(part)
        if before is not None and not images:
            return before
        root, found = images_of(images)
        paths = spread(found, IMAGES)
        names = {path.relative_to(root).as_posix(): sha256_of_file(path) for path in paths}
        questions = [] if part == FINDINGS else questions_of(images[0])
        if before is not None and before.images == names and before.questions == len(questions):
            return before
        tensors = self._measured([name for name in self.graphs if part_of(name) == part], paths, questions or QUESTIONS)
        return Calibration(weights, names, len(questions), tensors)

    def histograms(self, calibration: Calibration) -> list[dict[str, Any]]:
        """Of what the most harmful layers read, for the report."""
        source = {n.output[0]: n.input[0] for model in self.graphs.values() for n in model.graph.node}
        wanted = dict.fromkeys((graph, source[layer]) for graph, _, layer in (e.layer.partition("/") for e in self.effects[:HISTOGRAMS]))
        out, method = [], self.options.method
        for graph, model in self.graphs.items():
            feeds = feeds_of(self.reference.predictor, self._ranked_on(part_of(graph)), QUESTIONS, self.progress)
            if names := [tensor for of, tensor in wanted if of == graph]:
                for tensor, (counts, edges) in histograms_from_feeds(model, names, feeds[graph]).items():
                    bounds = calibration.of_graphs[graph][tensor].ranges[method]
                    out.append({"graph": graph, "tensor": tensor, "counts": counts, "edges": edges, "range": bounds, "method": method})
        return out

    def _ranked_on(self, part: str) -> list[Path]:
        images = self._calibrated_on(part)
        return spread(images_of(images)[1] if images else sample_pictures(), FEW)

    def _calibrated_on(self, part: str) -> list[Path]:
        return calibrated_on(self.options, part)

    def _measured(self, names: Sequence[str], paths: Sequence[Path], questions: Sequence[str]) -> dict[str, Mapping[str, Measured]]:
        feeds = feeds_of(self.reference.predictor, paths, questions, self.progress)
        return {name: measured_from_feeds(self.graphs[name], feeds[name]) for name in names}


def calibrated_on(options: ExportOptions, part: str) -> list[Path]:
    images = [options.calibration_images] if options.calibration_images is not None else []
    return [*options.calibration_findings] or images if part == FINDINGS else images


def tables_for(modules: Modules, options: ExportOptions) -> dict[str, Calibration | None]:
    """By part, the table beside the checkpoint. Raises UsageError if there is none and no images are given to make it."""
    known = dict(zip(PARTS, tables_of(modules), strict=True))
    for part, option in ((ANSWERS, "--calibration-images"), (FINDINGS, "--calibration-findings"))[: 1 + (modules.findings is not None)]:
        if known[part] is None and not calibrated_on(options, part):
            raise UsageError(f"{modules.folder} has no {CALIBRATION} for these weights", f"pass {option} FOLDER with training images")
    return known


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
