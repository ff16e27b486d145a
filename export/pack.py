"""From a checkpoint to a bundle that passed its parity gates, or to nothing."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pmclip_deploy.bundle.files import manifest_from_bundle, name_of_output, refuse_foreign_folder, write_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import MANIFEST
from pmclip_deploy.classify import check_labels
from pmclip_deploy.errors import ParityError, UsageError
from pmclip_deploy.evaluation.rows import rows_from_jsonl, sha256_of_rows
from pmclip_deploy.export.contents import files_as_they_are, files_from_graphs, files_of_embeddings, manifest_of_recipe
from pmclip_deploy.export.engine_from_onnx import Step
from pmclip_deploy.export.engines import EngineOptions, Engines, engines_of_bundle
from pmclip_deploy.export.fp16_from_onnx import rounded_from_half
from pmclip_deploy.export.gates import ANSWERS, FINDINGS, PARTS, gate, misses
from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint, onnx_from_modules
from pmclip_deploy.export.parity import parity_of
from pmclip_deploy.export.precisions import PRECISIONS, TENSOR_GATES
from pmclip_deploy.export.precisions.base import Recipe
from pmclip_deploy.export.probes import Progress
from pmclip_deploy.export.recipes import ExportOptions, Work, tables_for
from pmclip_deploy.export.records import parity_known, record_calibration, record_parity
from pmclip_deploy.export.reference import Reference
from pmclip_deploy.export.samples import images_of
from pmclip_deploy.export.sensitivity import Effect
from pmclip_deploy.export.speed import speed_against_fp32
from pmclip_deploy.opening import load
from pmclip_deploy.spec import METHODS
from pmclip_deploy.train.checkpoint import read_checkpoint

Gates = Mapping[str, Mapping[str, float]]


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
class _Trial:
    """A recipe's bundle, without engines, in a folder that is removed."""

    folder: Path
    measured: Path  # the folder that parity is measured on
    recipe: Recipe
    manifest: Manifest
    files: Mapping[str, bytes]


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
    gates: Gates = TENSOR_GATES,
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
    options = ExportOptions(precision, target, method, calibration_images, calibration_findings, labels)
    # What is wrong with the arguments is said before work of minutes begins.
    rows = rows_from_jsonl(data, images) if data and images else None
    looked_at = images_of(calibration_findings)[1] if calibration_findings else ()
    if calibration_images is not None:
        images_of([calibration_images])
    progress([checkpoint], "Reading the checkpoint")
    modules = modules_from_checkpoint(checkpoint)
    if calibration_findings and modules.findings is None:
        raise UsageError(f"{modules.folder} has no findings to calibrate", "leave out --calibration-findings")
    if PRECISIONS[precision].calibrated:
        tables_for(modules, options)
    if name is not None:
        modules = replace(modules, meta={**modules.meta, "name": name_of_output(output, name)})
    progress([checkpoint], "Writing its graphs in fp32")
    graphs = onnx_from_modules(modules, dense=target != "cpu")
    reference = Reference(modules, rows, images, progress=progress, looked_at=looked_at)
    embedded = files_of_embeddings(reference, labels)
    with tempfile.TemporaryDirectory(prefix="pmclip-export-") as scratch:
        work = Work(reference, graphs, options, Path(scratch), progress)
        trial, parity = _first_that_passes(work, embedded, gates)
        histograms = _histograms(work, trial.recipe) if ranked else []
        progress([output], "Measuring the speed")
        speed = speed_against_fp32(graphs, trial.folder, reference.predictor) if target == "cpu" else None
        _record(reference, trial, parity)
        manifest, made = _write(trial, parity, output, engines, steps)
    built = {} if made is None else made.built
    return Exported(output, manifest, speed, work.effects, histograms, built, *_against_shipped(manifest, shipped))


def name_of_checkpoint(checkpoint: Path) -> str:
    name: str = read_checkpoint(checkpoint)[0]["name"]
    return name


def _first_that_passes(work: Work, embedded: Mapping[str, bytes], gates: Gates) -> tuple[_Trial, dict[str, Any]]:
    """(the trial, its parity). Raises the last recipe's ParityError where none passes."""
    precision, missed = work.options.precision, ParityError("")
    for recipe in PRECISIONS[precision].recipes(work):
        work.progress([recipe], f"Comparing with fp32 ({len(recipe.kept)} layers above {precision})")
        trial = _write_trial(work, recipe, embedded)
        work.missed = {*PARTS}  # where one computes no numbers
        try:
            parity = _parity(work.reference, trial)
            work.missed = {part for part, found in misses(precision, parity, gates).items() if found}
            gate(precision, parity, gates)
            return trial, parity
        except ParityError as error:
            missed = error
    raise missed


def _write_trial(work: Work, recipe: Recipe, embedded: Mapping[str, bytes]) -> _Trial:
    folder, options = work.scratch / "bundle", work.options
    files = {**files_as_they_are(work.reference.modules), **files_from_graphs(recipe.graphs), **embedded}
    manifest = write_bundle(folder, manifest_of_recipe(work.reference, options, recipe), files)
    measured = folder
    if options.target != "cpu" and options.precision != "fp32":  # onnxruntime's CPU leaves out roundings to fp16 that a GPU makes
        measured = work.scratch / "rounded"
        rounded = {name: rounded_from_half(model) for name, model in recipe.graphs.items()}
        write_bundle(measured, manifest, {**files, **files_from_graphs(rounded)})
    return _Trial(folder, measured, recipe, manifest, files)


def _parity(reference: Reference, trial: _Trial) -> dict[str, Any]:
    """What was measured on these very files, and these rows or pictures if any are given, is not measured again."""
    known = parity_known(reference.modules.folder, trial.manifest)
    answers, findings = known[ANSWERS], known[FINDINGS]
    if answers is not None and reference.rows is not None and answers.get("data_sha256") != sha256_of_rows(reference.rows):
        answers = None
    if reference.looked_at:
        findings = None
    return parity_of(reference, load(trial.measured, "cpu"), answers, findings)[1]


def _histograms(work: Work, recipe: Recipe) -> list[dict[str, Any]]:
    """Of what the most harmful layers read, all being ranked."""
    if recipe.calibration is None:
        return []
    work.rank(recipe.calibration, *work.parts)
    return work.histograms(recipe.calibration)


def _record(reference: Reference, trial: _Trial, parity: dict[str, Any]) -> None:
    """Beside the checkpoint: ranges, and what was measured on data or pictures that were given."""
    if trial.recipe.calibration is not None:
        record_calibration(reference.modules, trial.recipe.calibration)
    if reference.rows is not None or reference.looked_at:
        record_parity(reference.modules.folder, trial.manifest, parity)


def _write(
    trial: _Trial, parity: dict[str, Any], output: Path, engines: EngineOptions | None, steps: Callable[[str], Step | None]
) -> tuple[Manifest, Engines | None]:
    figures = {name: of for name, of in parity.items() if name != "checks"}  # that is for the gate, and long
    manifest, files = replace(trial.manifest, parity=figures), trial.files
    made = None if engines is None else engines_of_bundle(trial.folder, manifest, output, engines, steps)
    if made is not None:
        manifest, files = replace(manifest, engines=made.rows), {**files, **made.plans}
    return write_bundle(output, manifest, files), made


def _against_shipped(manifest: Manifest, shipped: Path | None) -> tuple[dict[str, bool] | None, str]:
    there = manifest_from_bundle(shipped) if shipped is not None and (shipped / MANIFEST).is_file() else None
    if there is None or (there.precision, there.target) != (manifest.precision, manifest.target):
        return None, ""
    now, then = manifest.provenance["export"], there.provenance.get("export", {})
    why = ", ".join(f"{key} was {then.get(key)}, is {value}" for key, value in now.items() if then.get(key) != value)
    return {name: there.files.get(name) == file for name, file in manifest.files.items()}, why
