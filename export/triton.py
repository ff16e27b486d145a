"""A bundle as a model repository of Triton Inference Server: a model for each graph, and an ensemble that joins them."""

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from pmclip_deploy.atomic import write_errors, written_folder
from pmclip_deploy.bundle.contract import contract_of
from pmclip_deploy.bundle.files import verify_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import MANIFEST
from pmclip_deploy.errors import BundleError, UsageError
from pmclip_deploy.export.triton_graphs import answer_graph, over_groups, rows_depend, seen_graph
from pmclip_deploy.triton import ENSEMBLE, SERVED, model_of, sha256_key, version_of

CONFIG, MODEL = "config.pbtxt", "model.onnx"
MAX_BATCH = 16
DELAY_US, QUEUE, TIMEOUT_US = 3_000, 256, 2_000_000
THREADS = "intra_op_thread_count"
WARM_UP_TOKENS = 12
TYPES: dict[int, Any] = {onnx.TensorProto.FLOAT: pb.TYPE_FP32, onnx.TensorProto.INT64: pb.TYPE_INT64}


@dataclass(frozen=True)
class Model:
    """A model of the repository: its graph, and the file of weights that belongs to it."""

    graph: onnx.ModelProto
    data: Path | None = None
    max_batch_size: int = MAX_BATCH


def repository_from_bundle(bundle: Path, output: Path, instances: int = 1, threads: int = 4, device: str = "cpu") -> list[pb.ModelConfig]:
    """Writes the repository, whole or not at all, and returns the configurations. ``device`` is "cpu" or "gpu".

    Other versions of the same bundle that stand in ``output`` are kept, for a way back. Raises BundleError where ``output`` holds something
    else, and UsageError where an earlier version takes or gives other tensors.
    """
    manifest, output = verify_bundle(bundle), Path(output).resolve()
    version, sha256 = version_of(manifest), hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    models = models_of_bundle(bundle, manifest)
    configs = [_config(name, model, manifest, version, sha256, (instances, threads, device)) for name, model in models.items()]
    configs.append(ensemble_config(manifest, configs, version, sha256))
    kept = _keep_earlier(output, configs, version)
    with write_errors(f"{output}:", "check the space left and the permissions", BundleError), written_folder(output) as new:
        for config in configs:
            folder = new / config.name
            (folder / str(version)).mkdir(parents=True)
            for earlier in kept:
                shutil.copytree(output / config.name / str(earlier), folder / str(earlier))
            (folder / CONFIG).write_text(_text(config), encoding="utf-8")
        for name, model in models.items():
            folder = new / name / str(version)
            (folder / MODEL).write_bytes(model.graph.SerializeToString(deterministic=True))
            if model.data is not None:
                shutil.copyfile(model.data, folder / model.data.name)
    return configs


def models_of_bundle(bundle: Path, manifest: Manifest) -> dict[str, Model]:
    """Every model of the repository but the ensemble. Only an image tower that sees a picture beside its mirror image is rewritten."""
    models, head = dict[str, Model](), manifest.head
    for graph in (name for name in SERVED if name in manifest.graphs):
        file = manifest.graphs[graph].file
        loaded = onnx.load(str(bundle / file), load_external_data=False)
        size = 1 if rows_depend(loaded) else MAX_BATCH
        if graph == "image" and head is not None and head.details:
            loaded = over_groups(loaded)
        models[model_of(graph)] = Model(loaded, bundle / f"{file}.data" if f"{file}.data" in manifest.files else None, size)
    if head is not None:
        if len(seen := _seen_by_head(manifest)) > 1:
            width = {value.name: value.type.tensor_type.shape.dim[-1].dim_value for m in models.values() for value in m.graph.graph.output}
            models[model_of("seen")] = Model(seen_graph({name: width[name] for name in seen}, bool(head.details)))
        models[model_of("answer")] = Model(answer_graph(manifest))
    return models


def _seen_by_head(manifest: Manifest) -> list[str]:
    """The outputs that a head sees an image through; none where it answers from the question alone."""
    head = manifest.head
    assert head is not None
    image = contract_of(manifest)["image"][1] if head.clip else ()
    return [*image, *(["features"] if head.grey else [])]


def _config(name: str, model: Model, manifest: Manifest, version: int, sha256: str, runs: tuple[int, int, str]) -> pb.ModelConfig:
    instances, threads, device = runs
    graph = model.graph.graph
    config = pb.ModelConfig(name=name, backend="onnxruntime", max_batch_size=model.max_batch_size)
    config.version_policy.specific.versions.append(version)
    for value in graph.input:
        config.input.append(_tensor(pb.ModelInput, value))
    for value in graph.output:
        config.output.append(_tensor(pb.ModelOutput, value))
    kind = pb.ModelInstanceGroup.KIND_GPU if device == "gpu" else pb.ModelInstanceGroup.KIND_CPU
    config.instance_group.add(kind=kind, count=instances)
    batching = config.dynamic_batching
    batching.max_queue_delay_microseconds = DELAY_US if model.max_batch_size > 1 else 0  # nothing to wait for
    policy = batching.default_queue_policy
    policy.timeout_action, policy.default_timeout_microseconds = pb.ModelQueuePolicy.REJECT, TIMEOUT_US
    policy.max_queue_size = QUEUE
    config.parameters[THREADS].string_value = str(threads)
    config.parameters[sha256_key(version)].string_value = sha256
    warm_up = config.model_warmup.add(name="zeros", batch_size=1)
    for tensor in config.input:
        given = warm_up.inputs[tensor.name]
        given.data_type, given.zero_data = tensor.data_type, True
        any_size = min(WARM_UP_TOKENS, manifest.context_length) if tensor.name == "tokens" else 2
        given.dims.extend(any_size if size == -1 else size for size in tensor.dims)
    return config


def _text(config: pb.ModelConfig) -> str:
    """REJECT is the first value of its enum, which protobuf leaves out. Whoever reads the file should see it."""
    text: str = text_format.MessageToString(config, use_short_repeated_primitives=True)
    return re.sub(r"^( *)default_queue_policy {\n", r"\g<0>\1  timeout_action: REJECT\n", text, flags=re.M)


def _tensor(kind: Any, value: onnx.ValueInfoProto) -> Any:
    """Dimensions after the batch. A number for each row, (B,), is sent as (B, 1): Triton has no tensor without dimensions."""
    of = value.type.tensor_type
    dims = [dim.dim_value or -1 for dim in of.shape.dim][1:]
    tensor = kind(name=value.name, data_type=TYPES[of.elem_type], dims=dims or [1])
    if not dims:
        tensor.reshape.SetInParent()
    return tensor


def ensemble_config(manifest: Manifest, configs: Sequence[pb.ModelConfig], version: int, sha256: str) -> pb.ModelConfig:
    """pixels and tokens -> probabilities; without a head -> embeddings."""
    steps, head = [model_of("image"), model_of("text")], manifest.head
    rename = {(model_of("image"), "embedding"): "image_embedding", (model_of("text"), "embedding"): "text_embedding"}
    if head is not None:
        seen = [rename.get((model_of("image"), name), name) for name in _seen_by_head(manifest)]
        used = {"image": head.clip, "features": bool(head.grey), "seen": len(seen) > 1, "text": head.words is None}
        steps = [model_of(graph) for graph, is_used in (used | {"head": True, "answer": True}).items() if is_used]
        rename |= {(model_of("seen"), "embedding"): "image_embedding", (model_of("seen"), "image"): "seen"}
        rename |= {(model_of("head"), "image"): seen[0] if len(seen) == 1 else "seen", (model_of("head"), "text"): "text_embedding"}
    models = {config.name: config for config in configs}
    config = pb.ModelConfig(name=ENSEMBLE, platform="ensemble", max_batch_size=min(models[name].max_batch_size for name in steps))
    config.version_policy.specific.versions.append(version)
    needed, made = dict[str, pb.ModelInput](), dict[str, pb.ModelOutput]()
    for name in steps:
        step = config.ensemble_scheduling.step.add(model_name=name, model_version=-1)
        for tensor in models[name].input:
            step.input_map[tensor.name] = given = rename.get((name, tensor.name), tensor.name)
            needed.setdefault(given, pb.ModelInput(name=given, data_type=tensor.data_type, dims=tensor.dims))
        for tensor in models[name].output:
            step.output_map[tensor.name] = given = rename.get((name, tensor.name), tensor.name)
            made[given] = pb.ModelOutput(name=given, data_type=tensor.data_type, dims=tensor.dims)
    config.input.extend(tensor for name, tensor in needed.items() if name not in made)
    config.output.extend(tensor for name, tensor in made.items() if name not in needed)
    if head is not None and head.details:
        next(tensor for tensor in config.input if tensor.name == "pixels").dims[0] = 2  # a picture and its mirror image
    config.parameters[sha256_key(version)].string_value = sha256
    return config


def _keep_earlier(output: Path, configs: Iterable[pb.ModelConfig], version: int) -> list[int]:
    """The other versions that stand in ``output``. Their hashes go into ``configs``."""
    earlier = {folder.name: folder / CONFIG for folder in (output.iterdir() if output.is_dir() else ())}
    ours = all(name.startswith(ENSEMBLE) and file.is_file() for name, file in earlier.items())
    if not ours or (output.exists() and not output.is_dir()):
        raise BundleError(f"{output}: exists and is no repository of this program, so it is not overwritten", "choose another folder")
    kept = set[int]()
    known = {config.name: config for config in configs}
    for name, file in earlier.items():
        found = config_from_file(file)
        versions = {int(folder.name) for folder in file.parent.iterdir() if folder.name.isdecimal()} - {version}
        if versions and (name not in known or _shape(found) != _shape(known[name])):
            raise UsageError(f"{output}: holds version {min(versions)}, whose {name} takes or gives other tensors", "choose another folder")
        for one in versions:
            known[name].parameters[sha256_key(one)].string_value = found.parameters[sha256_key(one)].string_value
        kept |= versions
    if kept and known.keys() - earlier.keys():
        raise UsageError(f"{output}: holds version {min(kept)}, which has other models", "choose another folder")
    return sorted(kept)


def _shape(config: pb.ModelConfig) -> Mapping[str, Any]:
    return {"input": list(config.input), "output": list(config.output), "batch": config.max_batch_size, "steps": config.ensemble_scheduling}


def config_from_file(file: Path) -> pb.ModelConfig:
    """Raises BundleError, with the line and the name of a field that Triton does not have."""
    try:
        return text_format.Parse(file.read_text("utf-8"), pb.ModelConfig())
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror})", "write the repository again") from error
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise BundleError(f"{file}: {' '.join(str(error).split())[:200]}", "correct the field, or write the repository again") from None
