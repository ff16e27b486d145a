"""TensorRT 10 and 11: engines that were built on the machine that runs them."""

from pmclip_deploy.sessions import Device
from pmclip_deploy.sessions.engines import EngineBackend


class TensorRT(EngineBackend):
    name, title, target = "tensorrt", "TensorRT", "tensorrt"
    devices = (
        Device(
            "tensorrt",
            "an engine for this GPU",
            "`pip install tensorrt` (on a Jetson, JetPack brings it: make the environment with --system-site-packages)",
            nvidia=True,
        ),
    )
    packages = ("tensorrt", "cuda-core", "cuda-bindings")


BACKEND = TensorRT()
