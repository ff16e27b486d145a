"""`serve --engine triton`: the graphs run on a Triton Inference Server, which is asked over gRPC. tritonclient is imported here alone."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pmclip_deploy.bundle.files import verify_bundle
from pmclip_deploy.errors import BundleError, DeviceError
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.serve.model import DEADLINE
from pmclip_deploy.serve.problems import Problem, busy
from pmclip_deploy.triton import SERVED, Arrays, model_of, predictor_from_models, served_from_config, sha256_key, version_of

LARGEST = (1 << 31) - 1  # bytes of a message
START_S = 10.0  # for each question about a model
EXPIRED = "timeout expired"  # of the server's queue, which says UNAVAILABLE for it too


def predictor_from_triton(bundle: Path | None, url: str, timeout_s: float, ca: Path | None = None) -> Predictor:
    """A predictor that reads pictures and decides here, while ``url`` (HOST:PORT) runs the graphs.

    With ``ca``, a PEM file of authorities, the server is asked over TLS.
    Raises DeviceError where no server answers, and BundleError where it serves another version or another bundle.
    """
    path = DEFAULT_BUNDLE if bundle is None else bundle
    manifest = verify_bundle(path)
    server = Server(url, timeout_s, str(version_of(manifest)), ca)
    graphs = [graph for graph in manifest.graphs if graph in SERVED]
    configs = {graph: server.config(model_of(graph)) for graph in graphs}
    models = {graph: served_from_config(config) for graph, config in configs.items()}
    predictor = predictor_from_models(path, manifest, models, server.infer)
    for config in configs.values():
        found = config.parameters[sha256_key(version_of(manifest))].string_value
        if found != (own := predictor.model.sha256):
            what = f"{url}: {config.name} was written from a bundle whose manifest has the sha256 {found[:12] or 'nothing'}, not {own[:12]}"
            raise BundleError(what, "give the bundle that the server has with --bundle, or write the repository from this one")
    return predictor


class Server:
    """A server and the version of the models that it is asked for. Safe for threads."""

    def __init__(self, url: str, timeout_s: float, version: str, ca: Path | None) -> None:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC would write lines of its own into the service's log
        from tritonclient.grpc import InferenceServerClient

        options = [("grpc.max_send_message_length", LARGEST), ("grpc.max_receive_message_length", LARGEST), ("grpc.enable_http_proxy", 0)]
        roots = None if ca is None else str(ca)
        self._client = InferenceServerClient(url, ssl=ca is not None, root_certificates=roots, channel_args=options)
        self._url, self._timeout_s, self._version = url, timeout_s, version

    def config(self, model: str) -> Any:
        """Triton's ModelConfig. Raises DeviceError or BundleError."""
        from tritonclient.utils import InferenceServerException

        try:
            is_ready = self._client.is_model_ready(model, self._version, client_timeout=START_S)
            found = self._client.get_model_config(model, self._version, client_timeout=START_S).config if is_ready else None
        except InferenceServerException as error:
            if _code(error) not in ("NOT_FOUND", "INVALID_ARGUMENT"):
                what = f"{self._url}: no Triton server that is ready answers there ({_code(error)}: {_words(error)})"
                raise DeviceError(what, "check --triton-url, which is the server's port for gRPC, 8001 by default") from None
            found = None
        if found is None:
            what = f"{self._url}: the Triton server does not serve {model}, version {self._version}"
            raise BundleError(what, "load what `pmclip-deploy export triton` wrote from this bundle")
        return found

    def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> Mapping[str, Any]:
        """Raises a Problem that says whether to try again, and BundleError where the server refuses or answers something else."""
        from tritonclient.grpc import InferInput, InferRequestedOutput
        from tritonclient.utils import InferenceServerException, np_to_triton_dtype

        given = [InferInput(name, array.shape, np_to_triton_dtype(array.dtype)) for name, array in inputs.items()]
        for tensor, array in zip(given, inputs.values(), strict=True):
            tensor.set_data_from_numpy(array)
        left = max(0.001, min(self._timeout_s, DEADLINE.get(float("inf")) - time.monotonic()))
        wanted = [InferRequestedOutput(name) for name in outputs]
        try:
            result = self._client.infer(model, given, self._version, wanted, client_timeout=left)
            if (version := result.get_response().model_version) != self._version:
                raise _other(model, f"answered as version {version[:20]}, not {self._version}")
            return {name: result.as_numpy(name) for name in outputs}
        except InferenceServerException as error:
            raise self._of(error, model) from None
        except ValueError as error:  # bytes that make no array
            raise _other(model, "sent a tensor whose bytes do not fit its shape") from error

    def _of(self, error: Any, model: str) -> Exception:
        code, words = _code(error), _words(error)
        if code == "DEADLINE_EXCEEDED":
            return Problem(504, "timeout", f"the Triton server gave no answer in {self._timeout_s:g} s")
        if code == "UNAVAILABLE" and EXPIRED in words:
            return Problem(504, "timeout", "the request waited too long in the queue of the Triton server")
        if code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
            return busy("the Triton server is busy, or does not answer")
        if code == "NOT_FOUND":
            what = f"the Triton server no longer serves {model}, version {self._version}"
            return DeviceError(what, "load it there, or start the service again")
        return _other(model, f"refused a request ({code}: {words})")


def _other(model: str, what: str) -> BundleError:
    return BundleError(f"the Triton server's {model} {what}", "check its repository with `pmclip-deploy export triton-check`")


def _words(error: Any) -> str:
    return " ".join(str(error.message()).split())[:160]


def _code(error: Any) -> str:
    return str(error.status() or "no code").removeprefix("StatusCode.")
