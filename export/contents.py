"""What a bundle holds: its files, but for engines, and its manifest."""

import copy
import io
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import set_external_data

from pmclip_deploy.bundle.files import sha256_of_file
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import LABELS, QUESTION_EMBEDDINGS, SIGNATURES, TOKENIZER, WORDS
from pmclip_deploy.bundle.types import Graph as GraphFile
from pmclip_deploy.classify import bank_from_labels, templates_of
from pmclip_deploy.decision.needs import asked_of
from pmclip_deploy.export.int8_from_onnx import Graphs
from pmclip_deploy.export.onnx_from_checkpoint import Modules
from pmclip_deploy.export.precisions.base import Recipe
from pmclip_deploy.export.recipes import ExportOptions
from pmclip_deploy.export.reference import Reference, predictor_from_modules, words_of
from pmclip_deploy.kernels.onnx_function import similarity_graph
from pmclip_deploy.sessions.onnxruntime import import_onnxruntime


def files_of_embeddings(reference: Reference, labels: Sequence[str]) -> dict[str, bytes]:
    """Of what is asked of any picture: they are the same in every precision."""
    asked = _file_from_asked(reference.modules, asked_of(reference.predictor.manifest))
    return {**(_files_from_labels(reference, labels) if labels else {}), **asked}


def files_as_they_are(modules: Modules) -> dict[str, bytes]:
    """The tokenizers, and the signatures of the pictures that the image tower learned from where the checkpoint has them."""
    files, words, seen = {TOKENIZER: modules.tokenizer.encode()}, words_of(modules), modules.folder / SIGNATURES
    return {**files, **({SIGNATURES: seen.read_bytes()} if seen.is_file() else {}), **({} if words is None else {WORDS: words.encode()})}


def files_from_graphs(graphs: Graphs) -> dict[str, bytes]:
    """NAME.onnx and NAME.onnx.data: weights outside are copied once when a session opens, and weights inside twice.

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


def manifest_of_recipe(reference: Reference, options: ExportOptions, recipe: Recipe) -> Manifest:
    precision, target, labels = options.precision, options.target, options.labels
    base = reference.predictor.manifest
    floats = {name: tuple(x.partition("/")[2] for x in recipe.kept if x.startswith(f"{name}/")) for name in recipe.graphs}
    made: dict[str, Any] = {
        "command": shlex.join(["pmclip-deploy", "export", "CHECKPOINT", "--precision", precision, "--target", target]),
        "onnx": onnx.__version__,
        "onnxruntime": import_onnxruntime().__version__,
        "checkpoint_sha256": sha256_of_file(reference.modules.folder / "model.safetensors"),
    }
    if recipe.calibration is not None:
        made |= {"method": options.method, "calibration_images": len(recipe.calibration.images)}
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
        asked=asked_of(reference.predictor.manifest),
        provenance={**base.provenance, "export": made},
    )


def _files_from_labels(reference: Reference, labels: Sequence[str]) -> dict[str, bytes]:
    """The labels' embeddings, by the fp32 text tower whatever the bundle's precision, and the graph that finds the nearest."""
    bank = bank_from_labels(reference.predictor.embed_texts, labels, templates_of(reference.predictor.manifest))
    rows, dim = bank.shape
    graph = similarity_graph(rows, dim, k=rows)
    return {"labels.onnx": graph.SerializeToString(deterministic=True), LABELS: _npy(bank)}


def _file_from_asked(modules: Modules, asked: Sequence[str]) -> dict[str, bytes]:
    """Their embeddings, fp32 whatever the bundle's precision; computed in fp64, so that no thread count and no CPU changes a byte."""
    if not asked:
        return {}
    exact = predictor_from_modules(replace(modules, clip=copy.deepcopy(modules.clip).double()))
    return {QUESTION_EMBEDDINGS: _npy(exact.embed_texts(asked).astype(np.float32))}


def _npy(array: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()
