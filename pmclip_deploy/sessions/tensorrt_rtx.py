"""TensorRT-RTX: engines that were built ahead, on any machine.

NVIDIA: such an engine runs on Linux and Windows alike, on the GPUs it was built for and with the very version that built it.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import finalize

from pmclip_deploy.atomic import written
from pmclip_deploy.sessions import Device, cache_folder
from pmclip_deploy.sessions.engines import EngineBackend


class TensorRTRTX(EngineBackend):
    name, title, target = "tensorrt_rtx", "TensorRT-RTX", "rtx"
    devices = (Device("tensorrt_rtx", "an engine for GPUs of its list", "`pip install tensorrt_rtx`", nvidia=True),)
    packages = ("tensorrt_rtx", "cuda-core", "cuda-bindings")
    built_ahead = captures = True

    def runtime_config(self, engine: Any, sha256: str, owner: object) -> Any:
        """It compiles kernels on the machine itself, and keeps them from one process to the next in its runtime cache."""
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = self.package().CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if folder := cache_folder(self.name):
            cache, file = config.create_runtime_cache(), folder / f"{sha256}.cache"
            if file.is_file():
                cache.deserialize(file.read_bytes())  # one of another driver or GPU is left alone, and written anew
            config.set_runtime_cache(cache)
            finalize(owner, _save, cache.serialize, file)
        return config


def _save(serialize: Callable[[], Any], file: Path) -> None:
    """Atomically, so that no process reads half of a cache. A cache that cannot be kept is no error."""
    with suppress(Exception), written(file) as new:
        new.write_bytes(bytes(serialize()))


BACKEND = TensorRTRTX()
