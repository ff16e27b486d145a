"""A Triton server of Triton's own protobuf, whose models onnxruntime runs here: what a client meets, without Triton."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from pmclip_deploy.export.triton_check import Repository

FAULTS = {  # the code and words of Triton
    "unavailable": (grpc.StatusCode.UNAVAILABLE, "Server is stopping"),
    "queue full": (grpc.StatusCode.UNAVAILABLE, "[request id: <id_unknown>] Exceeds maximum queue size"),
    "expired": (grpc.StatusCode.UNAVAILABLE, "Request timeout expired"),
    "exhausted": (grpc.StatusCode.RESOURCE_EXHAUSTED, "out of memory"),
    "internal": (grpc.StatusCode.INTERNAL, "onnx runtime error 1"),
    "unloaded": (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'pmclip_image' version 1000 is not found"),
}


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """``fault`` is of FAULTS, "hang", or what is wrong with an answer: "shape", "version", "bytes" or "missing"."""

    def __init__(self, folder: Path) -> None:
        self.repository = Repository(folder)
        self.fault = ""
        self.asked = list[str]()  # the models, in their order
        self.ends = threading.Event()

    def ModelReady(self, request: Any, context: Any) -> Any:
        known = request.name in self.repository.configs
        return pb.ModelReadyResponse(ready=known and int(request.version) in self.repository.versions(request.name))

    def ModelConfig(self, request: Any, context: Any) -> Any:
        return pb.ModelConfigResponse(config=self.repository.configs[request.name])

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.asked.append(request.model_name)
        if self.fault in FAULTS:
            context.abort(*FAULTS[self.fault])
        if self.fault == "hang":
            self.ends.wait(60)
        inputs = {
            x.name: np.frombuffer(raw, triton_to_np_dtype(x.datatype)).reshape(*x.shape)
            for x, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        try:
            made = self.repository.run(request.model_name, inputs, int(request.model_version))
        except LookupError as error:
            context.abort(grpc.StatusCode.NOT_FOUND, error.args[0])
        except ValueError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        version = "7" if self.fault == "version" else request.model_version
        reply = pb.ModelInferResponse(model_name=request.model_name, model_version=version)
        for wanted in request.outputs[1:] if self.fault == "missing" else request.outputs:
            array = np.ascontiguousarray(made[wanted.name])
            shape = [*array.shape, 1] if self.fault == "shape" else array.shape
            reply.outputs.add(name=wanted.name, datatype=np_to_triton_dtype(array.dtype), shape=shape)
            reply.raw_output_contents.append(array.tobytes()[: -4 if self.fault == "bytes" else None])
        return reply


@contextmanager
def triton_server(folder: Path, credentials: Any = None) -> Iterator[tuple[Server, str]]:
    """The server and its HOST:PORT."""
    server, servicer = grpc.server(ThreadPoolExecutor(4)), Server(folder)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_secure_port("localhost:0", credentials) if credentials else server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield servicer, f"{'localhost' if credentials else '127.0.0.1'}:{port}"
    finally:
        servicer.ends.set()
        server.stop(None)
