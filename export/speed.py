"""How fast a bundle's graphs run on this CPU beside their fp32 ones."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from pmclip_deploy.bundle.files import manifest_from_bundle
from pmclip_deploy.export.int8_from_onnx import Graphs
from pmclip_deploy.export.probes import QUESTIONS
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.sessions.onnxruntime import import_onnxruntime


def speed_against_fp32(graphs: Graphs, bundle: Path, reference: Predictor) -> dict[str, float]:
    """How many times faster than fp32 each graph runs here: batch 1, one thread, medians of interleaved runs."""
    manifest, random, ort = manifest_from_bundle(bundle), np.random.default_rng(0), import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    ratios = {}
    for name, model in graphs.items():
        if manifest.graphs[name].precision == "fp32":
            continue
        feed = _feed(name, model, reference, random)
        models = (model.SerializeToString(), str(bundle / manifest.graphs[name].file))
        sessions = [ort.InferenceSession(of, options, providers=["CPUExecutionProvider"]) for of in models]
        times = np.array([[_seconds(partial(session.run, None, feed)) for session in sessions] for _ in range(25)])
        base, other = np.median(times[5:], axis=0)
        ratios[name] = float(base / other)
    return ratios


def _feed(name: str, model: onnx.ModelProto, reference: Predictor, random: np.random.Generator) -> dict[str, NDArray[Any]]:
    sides = {x.name: [d.dim_value or 1 for d in x.type.tensor_type.shape.dim] for x in model.graph.input}
    feed: dict[str, NDArray[Any]] = {x: random.uniform(-1, 1, shape).astype(np.float32) for x, shape in sides.items() if x != "tokens"}
    if "tokens" in sides:
        feed["tokens"] = reference.tokens(QUESTIONS[:1])[0] if name == "text" else reference.question_features(QUESTIONS[:1])
    return feed


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
