"""Each system under test as a worker: one process, a line of JSON each way on stdin and stdout. `harness.Worker` starts it.

Run by path with any environment's Python: it needs numpy, and each function what its system needs; only our own imports pmclip_deploy.
What each reads lies in one folder of a model, written by weights.py. Inputs are pixels (N, 3, S, S) f32 and tokens (N, T) i64, padded with
0; what a system does to them before it computes is timed with it.

A system is a function of what was asked, which returns its parts, its versions and the files it reads; ``prepare`` writes those of them
that its own tools make, once.

One long file, since it runs by path where pmclip_deploy is not installed.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Asked = dict[str, Any]
Part = Callable[[Any], Any]
Opened = tuple[dict[str, Part], dict[str, str], Iterable[Path]]

CONTEXT = {"pmclip-lite": 64, "BiomedCLIP": 256}  # tokens that open_clip pads a text to; all others CLIP's 77
TRANSFORMERS = ("ViT-B/32", "BiomedCLIP")  # whose image tower is one
TUNED = "-tuned"  # what the names of our systems end with that `tune` measured before
OPEN_CLIP = {"ViT-B/32": "ViT-B-32-quickgelu", "RN50": "RN50-quickgelu"}


def null(asked: Asked) -> Opened:
    """Does nothing: what is measured of it is the harness's own."""
    return {"image": lambda x: x[:, :1], "text": lambda x: x[:, :1], "infer": len}, {}, ()


# --- ours -----------------------------------------------------------------------------------------------------------------------


def ours(asked: Asked) -> Opened:
    """A bundle, opened and run as the runtime does: on a CPU pictures side by side, a text at its own length, and batches as `tune` chose.

    "pmclip-deploy" takes the folder for the bundle, "pmclip-deploy NAME" that of this name in it, and runs one that `tune` measured as it
    chose. "infer" takes rows (picture, question).
    """
    folder = _bundle(asked)
    device = "auto" if folder.name.endswith(TUNED) else asked["device"]
    if asked["device"] == "cpu" and hasattr(os, "sched_getaffinity") and asked["threads"] != len(os.sched_getaffinity(0)):
        from pmclip_deploy import beside
        from pmclip_deploy.sessions import onnxruntime as backend

        for module in (backend, beside):  # the runtime has no setting: it takes the cores that it may use
            module.cpu_threads = lambda *_: asked["threads"]  # type: ignore[attr-defined]
    from pmclip_deploy.machine import versions
    from pmclip_deploy.opening import load
    from pmclip_deploy.sessions import backends
    from pmclip_deploy.towers import filled_up

    predictor = load(folder, device, single_use=bool(asked.get("single_use")))
    together = predictor.model.device != "cpu"

    def tower(name: str, inputs: str, rows: Any) -> Any:
        if together or len(rows) == 1:
            return predictor._sessions[name].run({inputs: rows if together else rows[0]})["embedding"]
        return np.stack(predictor.towers.of_tensors(name, rows))

    def image(pixels: Any) -> Any:
        return tower("image", "pixels", pixels if together else pixels[:, None])

    def alone(row: Any) -> Any:
        own, manifest = _own_length(row[None]), predictor.manifest
        return filled_up(own, manifest.context_length, manifest.pad_id) if "text" in predictor.towers.tuned else own

    def text(tokens: Any) -> Any:
        return tower("text", "tokens", _own_length(tokens) if together else [alone(row) for row in tokens])

    def infer(rows: Any) -> None:
        for path, question in rows:
            predictor.towers.forget_texts()  # a question that was not asked before
            predictor.ask(str(path), str(question))

    used = dict.fromkeys(package for name in predictor.model.backend.split(", ") for package in backends()[name].packages)
    packages = versions("pmclip-deploy", *used)
    return {"image": image, "text": text, "infer": infer}, packages, folder.iterdir()


def tune_ours(asked: Asked) -> None:
    """What `pmclip-deploy tune` does to a copy of the bundle, in every run anew: a choice holds for the machine as it is."""
    import shutil

    from pmclip_deploy import tuning
    from pmclip_deploy.benchmarks.tune import compile_graphs, measure

    folder = _bundle(asked)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folder.with_name(folder.name.removesuffix(TUNED)), folder)
    tuning.save(folder, measure(folder).plans)
    compile_graphs(folder)


def _bundle(asked: Asked) -> Path:
    return Path(asked["weights"], asked["system"].partition(" ")[2])


# --- open_clip ------------------------------------------------------------------------------------------------------------------


def open_clip_eager(asked: Asked) -> Opened:
    """What open_clip's README writes, texts padded as its tokenizer does."""
    model, files = _open_clip(asked)
    return _torch_parts(asked, model.encode_image, model.encode_text), _versions("open_clip_torch", "torch"), files


def open_clip_compiled(asked: Asked) -> Opened:
    """`torch.compile` with its defaults; compiled for one picture and one text as it opens, for a batch when one comes."""
    import torch

    model, files = _open_clip(asked)
    parts = _torch_parts(asked, torch.compile(model.encode_image, dynamic=False), torch.compile(model.encode_text, dynamic=False))
    for part, of in parts.items():
        of(np.load(Path(asked["weights"], f"calibration-{part}.npy"))[:1])
    return parts, _versions("open_clip_torch", "torch"), files


def open_clip_int8(asked: Asked) -> Opened:
    """PyTorch's dynamic quantisation of linear layers; not of a ResNet's attention pool, whose weights open_clip reads itself."""
    import torch
    from torch.ao.quantization import quantize_dynamic

    model, files = _open_clip(asked)
    quantised = quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    if hasattr(model.visual, "attnpool"):
        quantised.visual.attnpool = model.visual.attnpool
    for module in quantised.modules():
        module.int8_original_dtype = torch.float32  # where open_clip looks, since such a layer's weight has no dtype
    return _torch_parts(asked, quantised.encode_image, quantised.encode_text), _versions("open_clip_torch", "torch"), files


def _open_clip(asked: Asked) -> tuple[Any, list[Path]]:
    import open_clip
    import torch

    torch.set_num_threads(asked["threads"])
    folder = Path(asked["weights"], "open_clip")
    weights = folder / "model.safetensors"
    if asked["model"] in OPEN_CLIP:
        return open_clip.create_model(OPEN_CLIP[asked["model"]], pretrained=str(weights)).eval(), [weights]
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    config["text_cfg"] |= {"hf_model_name": str(folder / "text"), "hf_model_pretrained": False}  # a folder has the text tower's shape
    model = open_clip.CustomTextCLIP(**config)
    model.load_state_dict(load_file(weights))
    return model.eval(), [weights]


def _torch_parts(asked: Asked, encode_image: Any, encode_text: Any) -> dict[str, Part]:
    import torch

    length = CONTEXT.get(asked["model"], 77)

    def image(pixels: Any) -> Any:
        with torch.inference_mode():
            return encode_image(torch.from_numpy(pixels)).numpy()

    def text(tokens: Any) -> Any:
        with torch.inference_mode():
            return encode_text(torch.from_numpy(_padded(tokens, length))).numpy()

    return {"image": image, "text": text}


# --- transformers and fastembed: the graphs that optimum exports ----------------------------------------------------------------


def export_with_optimum(asked: Asked) -> None:
    """Both towers with their projections, as CLIP's ONNX exports on the hub have them; optimum's own configuration has no projection."""
    import shutil

    from optimum.exporters.onnx import onnx_export_from_model
    from optimum.exporters.onnx.model_configs import CLIPTextWithProjectionOnnxConfig, CLIPVisionModelOnnxConfig
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    class Vision(CLIPVisionModelOnnxConfig):  # type: ignore[misc]
        @property
        def outputs(self) -> dict[str, dict[int, str]]:
            return {"image_embeds": {0: "batch_size"}}

    class Text(CLIPTextWithProjectionOnnxConfig):  # type: ignore[misc]
        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            both = {0: "batch_size", 1: "sequence_length"}
            return {"input_ids": both, "attention_mask": both}

        @property
        def outputs(self) -> dict[str, dict[int, str]]:
            return {"text_embeds": {0: "batch_size"}}

    source = Path(asked["weights"], "transformers")
    for part, kind, config in (("image", CLIPVisionModelWithProjection, Vision), ("text", CLIPTextModelWithProjection, Text)):
        target = Path(asked["weights"], "optimum", part)
        if (target / "model.onnx").is_file():
            continue
        model = kind.from_pretrained(source, local_files_only=True).eval()  # type: ignore[no-untyped-call]
        made = target.with_name(f"{part}.part")
        shutil.rmtree(made, ignore_errors=True)
        onnx_export_from_model(
            model, made, opset=18, task="feature-extraction", do_validation=False,
            custom_onnx_configs={"model": config(model.config, task="feature-extraction")},
        )  # fmt: skip
        for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, made)
        made.rename(target)


def transformers_onnx(asked: Asked) -> Opened:
    """optimum-onnx's ORTModel; texts padded to the longest of a batch, as the processor does with padding=True."""
    import onnxruntime
    from optimum.onnxruntime import ORTModelForCustomTasks

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = asked["threads"]
    folder = Path(asked["weights"], "optimum")
    vision, words = (
        ORTModelForCustomTasks.from_pretrained(folder / part, session_options=options, local_files_only=True) for part in ("image", "text")
    )

    def image(pixels: Any) -> Any:
        return vision(pixel_values=pixels)["image_embeds"]

    def text(tokens: Any) -> Any:
        return words(**_with_mask(tokens))["text_embeds"]

    return {"image": image, "text": text}, _versions("optimum-onnx", "transformers", "onnxruntime"), folder.glob("*/model.onnx*")


def fastembed(asked: Asked) -> Opened:
    """The sessions of fastembed's own CLIP classes, with the same graphs as transformers; texts padded to the longest of a batch.

    What they do to pictures and strings before that, and to the embeddings after it, is left out.
    """
    from fastembed import ImageEmbedding, TextEmbedding

    folder, given = Path(asked["weights"], "optimum"), {"threads": asked["threads"], "local_files_only": True}
    vision = ImageEmbedding("Qdrant/clip-ViT-B-32-vision", specific_model_path=str(folder / "image"), **given).model
    words = TextEmbedding("Qdrant/clip-ViT-B-32-text", specific_model_path=str(folder / "text"), **given).model

    def image(pixels: Any) -> Any:
        return vision.model.run(None, vision._build_onnx_input(pixels))[0]

    def text(tokens: Any) -> Any:
        return words._run_model(_with_mask(tokens))

    return {"image": image, "text": text}, _versions("fastembed", "onnxruntime"), folder.glob("*/model.onnx*")


# --- OpenVINO: from our fp32 graphs -----------------------------------------------------------------------------------------------


def convert_to_openvino(asked: Asked) -> None:
    """OpenVINO's own files of our graphs; for INT8 by NNCF's post-training quantisation, its defaults for each kind of tower, calibrated on
    the pictures and texts that ours was."""
    import openvino as ov

    target = Path(asked["weights"], asked["system"])
    for part, inputs in (("image", "pixels"), ("text", "tokens")):
        if (target / f"{part}.xml").is_file():
            continue
        graph = ov.Core().read_model(Path(asked["weights"], "fp32", f"{part}.onnx"))
        if asked["system"].endswith("int8"):
            import nncf

            feeds = [{inputs: row[None]} for row in np.load(Path(asked["weights"], f"calibration-{part}.npy"))]
            if part == "text":
                feeds = [{inputs: _own_length(feed[inputs])} for feed in feeds]
            kind = None if part == "image" and asked["model"] not in TRANSFORMERS else nncf.ModelType.TRANSFORMER
            graph = nncf.quantize(graph, nncf.Dataset(feeds), subset_size=len(feeds), model_type=kind)
        ov.save_model(graph, target / f"{part}.part.xml", compress_to_fp16=False)
        for suffix in ("bin", "xml"):
            (target / f"{part}.part.{suffix}").rename(target / f"{part}.{suffix}")


def openvino(asked: Asked) -> Opened:
    """Pictures in graphs of one shape, which OpenVINO runs best; a text at its own length. "-bf16" computes fp32's files in bf16."""
    import openvino as ov

    kind = asked["system"].removeprefix("openvino-")
    core, folder = ov.Core(), Path(asked["weights"], asked["system"] if kind != "bf16" else "openvino-fp32")
    between = "bf16" if kind == "bf16" else "f32"
    options = {"INFERENCE_NUM_THREADS": asked["threads"], "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": between}
    compiled: dict[tuple[int, ...], Any] = {}

    def image(pixels: Any) -> Any:
        if pixels.shape not in compiled:
            graph = core.read_model(folder / "image.xml")
            graph.reshape(list(pixels.shape))
            compiled[pixels.shape] = core.compile_model(graph, "CPU", options)
        return compiled[pixels.shape](pixels)[0]

    words = core.compile_model(folder / "text.xml", "CPU", options)
    image(np.load(Path(asked["weights"], "calibration-image.npy"))[:1])
    return {"image": image, "text": lambda tokens: words(_own_length(tokens))[0]}, _versions("openvino"), folder.iterdir()


# --- what they share --------------------------------------------------------------------------------------------------------------


def _own_length(tokens: Any) -> Any:
    """(N, T) -> (N, the longest of them)"""
    return np.ascontiguousarray(tokens[:, : np.flatnonzero(tokens.any(0))[-1] + 1])


def _padded(tokens: Any, length: int) -> Any:
    tokens = tokens[:, :length]
    return np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))


def _with_mask(tokens: Any) -> dict[str, Any]:
    tokens = _own_length(tokens)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).astype(np.int64)}


def _versions(*names: str) -> dict[str, str]:
    return {name: version(name) for name in names}


SYSTEMS: dict[str, Callable[[Asked], Opened]] = {
    "null": null,
    "pmclip-deploy": ours,
    "open_clip-eager": open_clip_eager,
    "open_clip-compiled": open_clip_compiled,
    "open_clip-int8": open_clip_int8,
    "transformers-onnx": transformers_onnx,
    "openvino-fp32": openvino,
    "openvino-bf16": openvino,
    "openvino-int8": openvino,
    "fastembed": fastembed,
}
PREPARE = {
    **{f"pmclip-deploy {precision}{TUNED}": tune_ours for precision in ("fp32", "fp16", "int8")},
    "transformers-onnx": export_with_optimum,
    "openvino-fp32": convert_to_openvino,
    "openvino-int8": convert_to_openvino,
}


# --- the protocol -----------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Answers {"open"}, {"embed"}, {"run"}, {"memory"}, and {"prepare"}, which takes what "open" takes."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # peers report to their makers otherwise, once imported (docs/reference/network-and-files.md)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # OpenVINO and NNCF go on without it
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a system prints
    parts: dict[str, Part] = {}
    inputs: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            ((what, asked),) = json.loads(line).items()
            if what == "open":
                start = time.perf_counter()
                parts, versions, files = SYSTEMS[asked["system"].partition(" ")[0]](asked)
                seconds = time.perf_counter() - start
                size = sum(file.stat().st_size for file in files)
                answer: dict[str, Any] = {"ready": {"versions": versions, "open_seconds": seconds, "bytes": size}}
            elif what == "prepare":
                PREPARE.get(asked["system"], lambda _: None)(asked)
                answer = {"prepared": {}}
            elif what == "embed":
                np.save(asked["output"], parts[asked["part"]](np.load(asked["input"])))
                answer = {"embed": {}}
            elif what == "run":
                if asked["input"] not in inputs:
                    inputs = {asked["input"]: np.load(asked["input"])}
                answer = {"times": run(parts[asked["part"]], inputs[asked["input"]], asked["batch"], asked["count"], asked["starts"])}
            elif what == "memory":
                answer = {"memory": peak_mib()}
            else:
                answer = {"error": f"unknown request {what!r}"}
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        answers.write(json.dumps(answer) + "\n")


def run(part: Part, rows: Any, batch: int, count: int, starts: list[float] | None) -> list[tuple[float, float]]:
    """Batches of the rows in turn; with ``starts`` none begins before its time."""
    times = []
    if len(rows) < batch:
        rows = np.concatenate([rows] * -(-batch // len(rows)))
    batches = [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]
    zero = time.perf_counter()
    for i in range(count):
        if starts is not None and (wait := zero + starts[i] - time.perf_counter()) > 0:
            time.sleep(wait)
        begin = time.perf_counter()
        part(batches[i % len(batches)])
        times.append((begin - zero, time.perf_counter() - zero))
    return times


def peak_mib() -> float:
    """The peak resident memory of this process."""
    if Path("/proc/self/status").is_file():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


if __name__ == "__main__":
    main()
