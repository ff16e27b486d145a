"""Whether a model repository would serve a bundle: all of it that can be checked without a server, and its answers by onnxruntime."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2 as pb

from pmclip_deploy.answer import Answer
from pmclip_deploy.bundle.files import sha256_of_file, verify_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import MANIFEST
from pmclip_deploy.decision.heads import sigmoid, softmax
from pmclip_deploy.errors import BundleError, ParityError
from pmclip_deploy.export.triton import CONFIG, MODEL, THREADS, TYPES, Model, config_from_file, models_of_bundle
from pmclip_deploy.export.triton_graphs import rows_depend
from pmclip_deploy.imaging.images import Image, picture_from_image
from pmclip_deploy.looking import PictureGraphs
from pmclip_deploy.opening import load
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.sessions.onnxruntime import import_onnxruntime
from pmclip_deploy.threads import cpu_threads
from pmclip_deploy.triton import ENSEMBLE, SERVED, Arrays, fits, model_of, predictor_from_models, served_from_config, sha256_key, version_of

AGAIN = "write the repository again with `pmclip-deploy export triton`"
# The largest difference of a probability. The ensemble's norms are sums in another order than numpy's; of 200 pictures, one came to 9.3e-5.
CLOSE = 1e-3


class Repository:
    """A repository as Triton reads it; onnxruntime runs its models here on the CPU, each request alone. Safe for threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise BundleError(f"{folder}: no such folder", "write the repository with `pmclip-deploy export triton`")
        self.configs = {one.name: config_from_file(one / CONFIG) for one in sorted(folder.iterdir())}
        self._session = cache(self._opened)

    def versions(self, name: str) -> list[int]:
        return list(self.configs[name].version_policy.specific.versions)

    def run(self, name: str, inputs: Arrays, version: int = -1) -> dict[str, NDArray[Any]]:
        """Raises LookupError for a model or version that is not served, and ValueError for inputs that do not fit."""
        if name not in self.configs or not (known := self.versions(name)) or version not in (-1, *known):
            raise LookupError(f"Request for unknown model: '{name}' version {version} is not found")
        config = self.configs[name]
        self._check_inputs(config, inputs)
        if config.platform == "ensemble":
            tensors = dict(inputs)
            for step in steps_in_order(config, self.configs):
                made = self.run(step.model_name, {to: tensors[given] for to, given in step.input_map.items()}, step.model_version)
                tensors |= {given: made[of] for of, given in step.output_map.items()}
            return {tensor.name: tensors[tensor.name] for tensor in config.output}
        outputs = [tensor.name for tensor in config.output]
        made = dict(zip(outputs, self._session(name, max(known) if version == -1 else version).run(outputs, dict(inputs)), strict=True))
        rows = len(next(iter(inputs.values())))
        return {x.name: made[x.name].reshape(rows, *x.dims) if x.HasField("reshape") else made[x.name] for x in config.output}

    def _check_inputs(self, config: pb.ModelConfig, inputs: Arrays) -> None:
        if other := {tensor.name for tensor in config.input} ^ inputs.keys():
            raise ValueError(f"unexpected or missing inputs {sorted(other)} for model '{config.name}'")
        for tensor in config.input:
            shape = inputs[tensor.name].shape
            if not fits(shape, (-1, *tensor.dims)):
                wanted = [-1, *tensor.dims]
                raise ValueError(f"unexpected shape for input '{tensor.name}' for model '{config.name}'. Expected {wanted}, got {shape}")
            if shape[0] > config.max_batch_size:
                raise ValueError(f"inference request batch-size must be <= {config.max_batch_size} for '{config.name}'")

    def _opened(self, name: str, version: int) -> Any:
        """As Triton's backend opens it, by its path; with the threads of its configuration, if there are as many cores here."""
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = min(int(self.configs[name].parameters[THREADS].string_value), cpu_threads())
        return ort.InferenceSession(str(self.folder / name / str(version) / MODEL), options, providers=["CPUExecutionProvider"])


class Checked(NamedTuple):
    """What was compared, and the largest difference of a probability: of answers, and of the ensemble's outputs."""

    repository: Repository
    pictures: int
    answers: int
    of_answers: float
    of_ensemble: float


def check_repository(folder: Path, bundle: Path, images: Sequence[Image]) -> Checked:
    """Raises BundleError for the first thing that Triton or this bundle would not accept, and ParityError if an answer differs."""
    repository, manifest = Repository(folder), verify_bundle(bundle)
    check_models(repository, bundle, manifest)
    predictor = load(bundle, "cpu")
    served = {graph: served_from_config(repository.configs[model_of(graph)]) for graph in manifest.graphs if graph in SERVED}
    version = version_of(manifest)
    through = predictor_from_models(bundle, manifest, served, lambda name, inputs, _: repository.run(name, inputs, version))
    if manifest.head is None:
        return Checked(repository, len(images), 0, 0.0, max((_embeddings(repository, predictor, image) for image in images), default=0.0))
    questions = predictor.questions() or ("what is shown?", "is there a fracture?")
    pairs = [pair for image in images for pair in _both(predictor, through, image, questions)]
    for here, there in pairs:
        if _said(here) != _said(there):
            asked = f"{here.question!r} of {here.image.source}"
            raise ParityError(f"{folder}: {asked} is answered {there.answer!r}, not {here.answer!r}", AGAIN)
    answers = max((_apart(here, there) for here, there in pairs), default=0.0)
    ensemble = max((_ensemble(repository, predictor, image, questions[0]) for image in images), default=0.0)
    if not (apart := max(answers, ensemble)) <= CLOSE:
        raise ParityError(f"{folder}: a probability differs by {apart:.2g} from the bundle's, which is over {CLOSE}", AGAIN)
    return Checked(repository, len(images), len(pairs), answers, ensemble)


def check_models(repository: Repository, bundle: Path, manifest: Manifest) -> None:
    """Everything but the answers: no graph runs."""
    sha256 = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    models, version = models_of_bundle(bundle, manifest), version_of(manifest)
    if missing := sorted({*models, ENSEMBLE} - repository.configs.keys()):
        raise BundleError(f"{repository.folder}: the model {missing[0]} is missing", AGAIN)
    for name, config in repository.configs.items():
        file, versions = repository.folder / name / CONFIG, repository.versions(name)
        _check(config.name == name, f"{file}: its name is {config.name!r}, not its folder's")
        _check(bool(versions), f"{file}: version_policy names no specific version")
        for one in versions:
            _check((file.parent / str(one)).is_dir(), f"{file}: version_policy names {one}, and there is no such folder")
        _check(version in versions, f"{file}: version_policy names {versions}, and the bundle is version {version}")
        found = config.parameters[sha256_key(version)].string_value
        other = f"{file}: was written from a bundle whose manifest has the sha256 {found[:12] or 'nothing'}, not {sha256[:12]}"
        _check(found == sha256, other)
        if name in models:
            _check_model(repository.folder / name, config, models[name], manifest, version)
    steps_in_order(repository.configs[ENSEMBLE], repository.configs)


def _check_model(folder: Path, config: pb.ModelConfig, model: Model, manifest: Manifest, version: int) -> None:
    file, graph = folder / str(version) / MODEL, folder / CONFIG
    _check(file.is_file(), f"{file}: missing")
    try:
        found = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's, which name no common base
        raise BundleError(f"{file}: is no ONNX file", AGAIN) from error
    _check(found == model.graph, f"{file}: is not the graph of the bundle")
    if model.data is not None:
        data = file.with_name(model.data.name)
        same = data.is_file() and sha256_of_file(data) == manifest.files[model.data.name].sha256
        _check(same, f"{data}: is missing, or is not the bundle's")
    for kind, tensors, values in (("input", config.input, found.graph.input), ("output", config.output, found.graph.output)):
        wanted = {value.name: value.type.tensor_type for value in values}
        names = {tensor.name for tensor in tensors}
        _check(names == wanted.keys(), f"{graph}: its {kind}s are {sorted(names)}, and the graph's are {sorted(wanted)}")
        for tensor in tensors:
            of = wanted[tensor.name]
            dims = [dim.dim_value or -1 for dim in of.shape.dim]
            given = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
            said = f"{graph}: {kind} {tensor.name}"
            has_type = pb.DataType.Name(tensor.data_type)
            _check(tensor.data_type == TYPES[of.elem_type], f"{said} is {has_type}, and the graph has another type")
            _check([-1, *given] == dims, f"{said} has the dimensions {given} after the batch, and the graph has {dims}")
    _check(config.max_batch_size > 0, f"{graph}: max_batch_size is 0")
    alone = f"{graph}: max_batch_size is {config.max_batch_size}, and a row of this graph depends on its batch, so it must be 1"
    _check(config.max_batch_size == 1 or not rows_depend(found), alone)
    _check(config.parameters[THREADS].string_value.isdecimal(), f"{graph}: the parameter {THREADS} is no number")
    _check(config.backend == "onnxruntime", f"{graph}: its backend is {config.backend!r}, not onnxruntime")


def steps_in_order(ensemble: pb.ModelConfig, models: Mapping[str, pb.ModelConfig]) -> list[Any]:
    """The steps of an ensemble, each after those that make its inputs. Raises BundleError where maps, types or shapes do not connect."""
    known = {tensor.name: tensor for tensor in ensemble.input}
    order, left = list[Any](), list(ensemble.ensemble_scheduling.step)
    where = f"{ensemble.name}/{CONFIG}"
    makers = [given for step in left for given in step.output_map.values()]
    twice = sorted({name for name in makers if makers.count(name) + (name in known) > 1})
    _check(not twice, f"{where}: {', '.join(twice)} is made twice")
    while left:
        ready = next((step for step in left if known.keys() >= {*step.input_map.values()}), None)
        if ready is None:
            missing = sorted({given for step in left for given in step.input_map.values()} - known.keys())
            unmade = ", ".join(name for name in missing if name not in makers)
            raise BundleError(f"{where}: {f'{unmade} is made by no step' if unmade else f'{missing[0]} is made in a circle'}", AGAIN)
        _check(ready.model_name in models, f"{where}: there is no model {ready.model_name!r}")
        model = models[ready.model_name]
        _check_maps(where, ready, model, known)
        small = f"{where}: max_batch_size is {ensemble.max_batch_size}, and {ready.model_name} takes {model.max_batch_size}"
        _check(ensemble.max_batch_size <= model.max_batch_size, small)
        outputs = {tensor.name: tensor for tensor in model.output}
        known |= {given: outputs[of] for of, given in ready.output_map.items()}
        order.append(ready)
        left.remove(ready)
    for tensor in ensemble.output:
        _check(tensor.name in known, f"{where}: output {tensor.name} is made by no step")
        _check(_agree(tensor, known[tensor.name]), f"{where}: output {tensor.name} has another type or shape than what makes it")
    return order


def _check_maps(where: str, step: Any, model: pb.ModelConfig, known: Mapping[str, Any]) -> None:
    inputs, outputs = ({tensor.name: tensor for tensor in of} for of in (model.input, model.output))
    both = (("input", step.input_map, inputs), ("output", step.output_map, outputs))
    for kind, names, of in both:
        unknown = sorted(names.keys() - of.keys())
        _check(not unknown, f"{where}: {step.model_name} has no {kind} {', '.join(unknown)}")
    unmapped = sorted(inputs.keys() - step.input_map.keys())
    _check(not unmapped, f"{where}: nothing is mapped to the input {', '.join(unmapped)} of {step.model_name}")
    for to, given in step.input_map.items():
        _check(_agree(inputs[to], known[given]), f"{where}: {given} does not fit the input {to} of {step.model_name}")


def _agree(one: Any, other: Any) -> bool:
    """Of the same type, and of shapes that can be equal: -1 is any size."""
    sizes = zip(one.dims, other.dims, strict=False)
    return bool(one.data_type == other.data_type and len(one.dims) == len(other.dims) and all(a == b or -1 in (a, b) for a, b in sizes))


def _both(here: Predictor, there: Predictor, image: Image, questions: Sequence[str]) -> Iterable[tuple[Answer, Answer]]:
    picture = picture_from_image(image)
    return zip(*(one.ask_many(picture, questions, ignore_header=True) for one in (here, there)), strict=True)


def _said(answer: Answer) -> tuple[Any, ...]:
    return (answer.answer, answer.source, [candidate.answer for candidate in answer.candidates[:1]], answer.abstained)


def _apart(here: Answer, there: Answer) -> float:
    """The largest difference of a probability."""
    shares = ({x.answer: x.probability for x in one.candidates} | {"": one.probability or 0.0} for one in (here, there))
    first, second = shares
    return max(abs(first[name] - second[name]) for name in first.keys() & second.keys())


def _ensemble(repository: Repository, predictor: Predictor, image: Image, question: str) -> float:
    """The largest difference between what the ensemble gives and what the bundle gives."""
    picture, manifest = picture_from_image(image), predictor.manifest
    head = manifest.head
    assert head is not None
    looks = PictureGraphs(None, manifest, {})
    inputs: dict[str, NDArray[Any]] = {name: array for of in looks.inputs_of_head(picture, head).values() for name, array in of.items()}
    if head.details:
        inputs = {name: array[None] for name, array in inputs.items()}
    elif not inputs:
        inputs = {"seen": np.ones((1, 1), np.float32)}
    inputs["tokens"] = predictor.tokens([question])[0] if head.words is None else predictor.question_features([question])
    given = repository.run(ENSEMBLE, inputs)
    told = predictor.head_logits(predictor.image_features(picture)[None], predictor.question_features([question]))
    parts = [
        (sigmoid if kind.independent else softmax)(told.answer[0, list(kind.answers)].astype(np.float64) / kind.temperature)
        for kind in manifest.kinds
        if kind.answers
    ]
    wanted = {"probability": np.concatenate(parts), "kind_probability": softmax(told.kind[0])}
    return max(float(np.abs(given[name][0] - array).max()) for name, array in wanted.items())


def _embeddings(repository: Repository, predictor: Predictor, image: Image) -> float:
    from pmclip_deploy.imaging.preprocess import tensor_from_pixels

    tensor = tensor_from_pixels(picture_from_image(image).pixels, predictor.manifest.preprocess)
    given = repository.run(ENSEMBLE, {"pixels": tensor[None], "tokens": predictor.tokens(["chest x-ray"])[0]})
    wanted = {"image_embedding": predictor.embedding_from_tensor(tensor), "text_embedding": predictor.embed_text("chest x-ray")}
    return max(float(np.abs(given[name][0] - array).max() / np.abs(array).max()) for name, array in wanted.items())


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise BundleError(what, AGAIN)
