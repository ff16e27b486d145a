"""The models of a Triton Inference Server that hold a bundle's graphs: their names, and a Session of each.

`pmclip-deploy export triton` writes the models (export/triton.py), and `serve --engine triton` asks a server for them (serve/triton.py).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.bundle.contract import contract_of
from pmclip_deploy.bundle.files import content_of_file
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import TOKENIZER, WORDS
from pmclip_deploy.errors import BundleError
from pmclip_deploy.opening import LazyMap, session_from_bundle
from pmclip_deploy.predictor import Predictor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pmclip_deploy.sessions import Session

SERVED = ("image", "text", "features", "head", "findings")  # the graphs that a server has; "labels" is a product of two matrices
ENSEMBLE = "pmclip"
NUMPY = {"TYPE_FP32": "float32", "TYPE_INT64": "int64"}  # by the name in Triton's enum DataType

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Infer: TypeAlias = Callable[[str, Arrays, Sequence[str]], Arrays]  # of a model and its inputs the outputs that are named


def model_of(graph: str) -> str:
    return f"{ENSEMBLE}_{graph}"


def version_of(manifest: Manifest) -> int:
    """The number of a bundle's version, which Triton wants as an integer: 1002003 for 1.2.3, and 1 if it is not three numbers."""
    numbers = re.fullmatch(r"(\d{1,6})\.(\d{1,3})\.(\d{1,3})", manifest.version)
    return max(1, sum(int(x) * 1000**i for i, x in enumerate(reversed(numbers.groups())))) if numbers else 1


def sha256_key(version: int) -> str:
    """The parameter of a model that holds the sha256 of the manifest, for each version."""
    return f"manifest_sha256_{version}"


class Tensor(NamedTuple):
    name: str
    dtype: str  # numpy's
    dims: tuple[int, ...]  # without the batch; -1 is any
    shape: tuple[int, ...]  # as the graph has it; other than ``dims`` only where the graph has a number for each row


class Served(NamedTuple):
    """A model as a server describes it."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_batch_size: int
    device: str


def served_from_config(config: Any) -> Served:
    """``config`` is a ModelConfig of Triton's protobuf. Raises BundleError for a model that `export triton` does not write."""
    from tritonclient.grpc import model_config_pb2 as pb

    def tensor(io: Any) -> Tensor:
        dims = tuple(io.dims)
        return Tensor(io.name, NUMPY[pb.DataType.Name(io.data_type)], dims, tuple(io.reshape.shape) if io.HasField("reshape") else dims)

    if config.max_batch_size < 1:
        raise _refused(config.name, f"has max_batch_size {config.max_batch_size}")
    try:
        inputs, outputs = (tuple(map(tensor, ios)) for ios in (config.input, config.output))
    except KeyError as error:
        raise _refused(config.name, f"has a tensor of {error.args[0]}") from None
    on_gpu = any(group.kind == pb.ModelInstanceGroup.KIND_GPU for group in config.instance_group)
    return Served(config.name, inputs, outputs, config.max_batch_size, "cuda" if on_gpu else "cpu")


class TritonSession:
    """A graph that a server runs. Gives what the graph gives here: rows that are computed together here are computed together there."""

    backend = "triton"

    def __init__(self, model: Served, infer: Infer) -> None:
        self.device = model.device
        self.inputs = tuple(tensor.name for tensor in model.inputs)
        self.outputs = tuple(tensor.name for tensor in model.outputs)
        self._model, self._infer = model, infer

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Raises BundleError if what comes back does not fit the model, and what ``infer`` raises."""
        first = self._model.inputs[0]
        if inputs[first.name].ndim == len(first.dims):  # all rows are one item of the server's batch (export/triton_graphs.py)
            return {name: rows[0] for name, rows in self._ask({name: array[None] for name, array in inputs.items()}).items()}
        rows, size = len(inputs[first.name]), self._model.max_batch_size
        parts = [self._ask({name: array[i : i + size] for name, array in inputs.items()}) for i in range(0, rows, size)]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def _ask(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        rows, found = len(inputs[self.inputs[0]]), self._infer(self._model.name, inputs, self.outputs)
        return {tensor.name: self._checked(tensor, rows, found.get(tensor.name)) for tensor in self._model.outputs}

    def _checked(self, tensor: Tensor, rows: int, array: NDArray[Any] | None) -> NDArray[Any]:
        if array is None:
            raise _refused(self._model.name, f"gave no {tensor.name}")
        if array.dtype != tensor.dtype or not fits(array.shape, (rows, *tensor.dims)):
            raise _refused(self._model.name, f"gave {tensor.name} as {array.dtype} {list(array.shape)}, not {rows} of {list(tensor.dims)}")
        return array if tensor.shape == tensor.dims else array.reshape(rows, *tensor.shape)


def predictor_from_models(bundle: Path, manifest: Manifest, models: Mapping[str, Served], infer: Infer) -> Predictor:
    """A predictor whose graphs run elsewhere. ``models`` by graph; a graph that is not among them runs here, on the CPU."""

    contract = contract_of(manifest)

    def session(graph: str) -> "Session":
        if graph not in models:
            return session_from_bundle(bundle, manifest, graph, "cpu")
        opened, (inputs, outputs) = TritonSession(models[graph], infer), contract[graph]
        if set(opened.inputs) != set(inputs) or not set(outputs) <= set(opened.outputs):
            raise _refused(models[graph].name, f"takes {opened.inputs} and gives {opened.outputs}, not {inputs} and {outputs}")
        return opened

    def tokenizer(name: str) -> "Tokenizer":
        from pmclip_deploy.tokens import tokenizer_from_text

        return tokenizer_from_text(content_of_file(bundle, manifest, name).decode(errors="surrogateescape"), bundle / name)

    return Predictor(bundle, manifest, LazyMap(session, manifest.graphs), LazyMap(tokenizer, (TOKENIZER, WORDS)))


def fits(shape: Sequence[int], dims: Sequence[int]) -> bool:
    return len(shape) == len(dims) and all(wanted in (-1, size) for size, wanted in zip(shape, dims, strict=True))


def _refused(model: str, what: str) -> BundleError:
    hint = "load what `pmclip-deploy export triton` wrote from this bundle"
    return BundleError(f"the Triton server's {model[:60]} {what}", hint)
