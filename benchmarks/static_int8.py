"""The towers of a checkpoint in INT8: static and dynamic, in onnxruntime and OpenVINO, beside OpenVINO's own INT8.

    python -m pmclip_deploy.benchmarks.static_int8 CHECKPOINT --data vqa-med-2019 [--plant] [--nncf FOLDER] [--rounds 5]

Prints the least and mean cosine to fp32 on validation pictures and questions, and the processor time of one thread at batch 1 and 16, as
a ratio to the first row: systems take turns. Processor time holds on a busy machine, where wall time does not. ``--plant`` gives a ViT
outlier channels. FOLDER has image.xml and text.xml by NNCF (`benchmarks.systems`, openvino-int8), made from the same weights.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pmclip_deploy.benchmarks.outliers import plant
from pmclip_deploy.export.calibration import Calibration, Measured, measured_from_feeds
from pmclip_deploy.export.int8_dynamic import int8_dynamic
from pmclip_deploy.export.int8_from_onnx import int8_from_graphs
from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint, onnx_from_modules
from pmclip_deploy.export.parity import tensor_difference
from pmclip_deploy.export.reference import predictor_from_modules
from pmclip_deploy.export.samples import feeds_of, images_of, questions_of, spread
from pmclip_deploy.export.smooth import smoothed
from pmclip_deploy.sessions.onnxruntime import import_onnxruntime
from pmclip_deploy.sessions.openvino import core
from pmclip_deploy.spec import METHODS

Feed = Mapping[str, Any]
Run = Callable[[Feed], Any]
COUNT = 32  # pictures or questions to calibrate on, and as many to compare
SIZES = (1, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--plant", action="store_true")
    parser.add_argument("--nncf", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    modules = modules_from_checkpoint(options.checkpoint)
    if options.plant:
        plant(modules.clip.visual)
    graphs, predictor = onnx_from_modules(modules), predictor_from_modules(modules)
    train, val = ((spread(images_of([path])[1], COUNT), spread(questions_of(path), COUNT)) for path in _splits(options.data))
    feeds = [feeds_of(predictor, *split, lambda items, what: items) for split in (train, val)]
    for part in ("image", "text"):
        known, new = ([dict(feed) for feed in of[part]] for of in feeds)
        runs = _runs(graphs[part], measured_from_feeds(graphs[part], known), options.nncf and options.nncf / f"{part}.xml")
        _compare(part, runs, partial(_ort, graphs[part]), new, options.rounds)


def _splits(data: Path) -> tuple[Path, Path]:
    return data / "train.jsonl", data / "val.jsonl"


def _runs(fp32: onnx.ModelProto, tensors: Mapping[str, Measured], nncf: Path | None) -> dict[str, Run]:
    name = fp32.graph.name
    smooth, _ = smoothed(fp32, {x: t.largest for x, t in tensors.items() if t.largest})
    static = int8_from_graphs({name: fp32}, Calibration("", {}, 0, {name: tensors}), METHODS[0], "cpu")[name]
    runs = {
        "dynamic, onnxruntime": _ort(int8_dynamic(smooth, {})),
        "static, onnxruntime": _ort(static),
        "static, OpenVINO f32": _openvino(static.SerializeToString(), "f32"),
        "static, OpenVINO bf16": _openvino(static.SerializeToString(), "bf16"),
    }
    return {**runs, **({"NNCF, OpenVINO f32": _openvino(str(nncf), "f32")} if nncf else {})}


def _ort(model: onnx.ModelProto) -> Run:
    ort = import_onnxruntime()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(["embedding"], dict(feed))[0]


def _openvino(content: bytes | str, between: str) -> Run:
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": between}
    request = core().compile_model(core().read_model(content), "CPU", settings).create_infer_request()
    return lambda feed: next(iter(request.infer(dict(feed)).values())).copy()


def _compare(part: str, runs: Mapping[str, Run], reference: Callable[[], Run], feeds: list[dict[str, Any]], rounds: int) -> None:
    exact, (name,) = reference(), feeds[0]
    expected = np.concatenate([exact(feed) for feed in feeds])
    longest = max(feeds, key=lambda feed: feed[name].shape[-1])[name]
    batches = {size: {name: np.repeat(longest, size, 0)} for size in SIZES}
    times: dict[tuple[str, int], list[float]] = {(system, size): [] for system in runs for size in SIZES}
    for _ in range(rounds):
        for size, batch in batches.items():
            for system, run in runs.items():
                run(batch)
                start = time.process_time()
                run(batch)
                times[system, size].append(time.process_time() - start)
    first = next(iter(runs))
    for system, run in runs.items():
        figures = tensor_difference(expected, np.concatenate([run(feed) for feed in feeds]))
        said = [f"{part:6} {system:22} cosine {figures['cosine']:.4f}, mean {figures['cosine_mean']:.4f}"]
        for size in SIZES:
            of, base = np.array(times[system, size]), np.array(times[first, size])
            said.append(f"batch {size}: {1e3 * np.median(of):.2f} ms, {np.median(of / base):.2f}")
        print("; ".join(said), flush=True)


if __name__ == "__main__":
    main()
