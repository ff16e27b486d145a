"""The modules of the runtime, and what a fresh process has imported."""

import pkgutil
import subprocess
import sys

import pmclip_deploy

NOT_RUNTIME = ("pmclip_deploy.train", "pmclip_deploy.export", "pmclip_deploy.kernels", "pmclip_deploy.benchmarks")
RUNTIME = [
    module.name
    for module in pkgutil.walk_packages(pmclip_deploy.__path__, "pmclip_deploy.", onerror=lambda name: None)
    if not module.name.startswith(NOT_RUNTIME)
]
TRAINING = {"torch", "torchvision", "open_clip", "timm", "transformers", "onnx", "safetensors", "tensorrt", "tensorrt_rtx", "tritonclient"}
HEAVY = {*TRAINING, "numpy", "onnxruntime", "pydicom", "PIL", "tokenizers", "gdcm"}


def loaded(code: str) -> set[str]:
    """Top-level modules in a fresh process after ``code``."""
    tail = "\nimport sys; print('MODULES', *{m.partition('.')[0] for m in sys.modules})"
    output = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, timeout=60, check=True).stdout
    return set(output.rpartition("MODULES")[2].split())


def run_cli(*arguments: str) -> str:
    """The code that calls the command in this process, and goes on after it."""
    code = f"import sys; sys.argv = {['pmclip-deploy', *arguments]}\nfrom pmclip_deploy.cli.app import main\n"
    return code + "try: main()\nexcept SystemExit: pass"
