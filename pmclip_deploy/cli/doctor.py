"""`pmclip-deploy doctor`: what this machine has, and whether `infer` can work on it."""

import platform
import shutil
from typing import Annotated, Any

import typer

from pmclip_deploy.cli.output import print_json
from pmclip_deploy.errors import GPU_STEPS, BundleError, DeviceError

LIBRARIES = {  # of CODECS, by the start of the transfer syntax
    "1.2.840.10008.1.2.4.50": "PIL",
    "1.2.840.10008.1.2.4.5": "gdcm",  # 12 bits and lossless
    "1.2.840.10008.1.2.4.7": "gdcm",
    "1.2.840.10008.1.2.4.8": "jpeg_ls",
    "1.2.840.10008.1.2.4.9": "openjpeg",
    "1.2.840.10008.1.2.4.20": "openjpeg",
    "1.2.840.10008.1.2.5": "PIL",
}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> int:
    """Say what backends, decoders and devices this machine has; exits with 0 if `infer` can work."""
    from pmclip_deploy.machine import cpu

    backend, backend_code = _backend()
    bundle, bundle_code = _bundle()
    code = bundle_code or backend_code
    packages, gpu = _packages(), _gpu()
    document = {
        "schema": "pmclip-deploy/doctor/1",
        "ok": not code,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "gpu": gpu,
        "packages": packages,
        "backend": {**backend, "advice": _advice(packages, gpu, backend["providers"])},
        "engines": _engines(),
        "similarity": _similarity(),
        "dicom": _decoders(),
        "bundle": bundle,
    }
    if as_json:
        print_json(document)
    else:
        _print(document)
    return code


def _backend() -> tuple[dict[str, Any], int]:
    try:
        import onnxruntime

        from pmclip_deploy.threads import cpu_threads

        return {"name": "onnxruntime", "providers": onnxruntime.get_available_providers(), "threads": cpu_threads(), "problem": None}, 0
    except Exception as error:
        problem = f"onnxruntime cannot be imported ({type(error).__name__}); install it with `pip install onnxruntime`"
        return {"name": "onnxruntime", "providers": [], "threads": None, "problem": problem}, DeviceError.exit_code


def _packages() -> dict[str, str | None]:
    from pmclip_deploy.machine import PACKAGES, version

    return {name: version(name) for name in PACKAGES}


def _gpu() -> dict[str, Any]:
    from pmclip_deploy.machine import nvidia_driver

    return {"nvidia_driver": nvidia_driver(), "nvidia_smi": shutil.which("nvidia-smi")}


def _similarity() -> str:
    """Which code finds what is most alike."""
    try:
        from pmclip_deploy.kernels import implementation

        return str(implementation())
    except Exception as error:  # numpy may be what is broken
        return type(error).__name__


def _engines() -> list[dict[str, Any]]:
    """Whether a TensorRT engine could run here: the package and a driver that answers."""
    from pmclip_deploy.bundle.names import BACKENDS

    found = []
    for backend in BACKENDS:
        here: dict[str, Any] = {"backend": backend, "version": None, "compute_capability": None, "problem": None}
        try:
            from pmclip_deploy.sessions.tensorrt import machine, package

            here["version"] = package(backend).__version__
            here["compute_capability"] = machine(backend).compute_capability
        except Exception as error:  # numpy may be what is broken
            here["problem"] = str(error) if isinstance(error, DeviceError) else type(error).__name__
        found.append(here)
    return found


def _advice(packages: dict[str, str | None], gpu: dict[str, Any], providers: list[str]) -> str | None:
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        return f"onnxruntime and onnxruntime-gpu are both installed and overwrite each other; {GPU_STEPS}"
    if gpu["nvidia_driver"] and providers and "CUDAExecutionProvider" not in providers:
        return f"there is an NVIDIA GPU, and onnxruntime is for the CPU alone; to use the GPU, {GPU_STEPS}"
    return None


def _bundle() -> tuple[dict[str, Any], int]:
    from pmclip_deploy.bundle.files import verify_bundle
    from pmclip_deploy.models import DEFAULT_BUNDLE

    try:
        manifest = verify_bundle(DEFAULT_BUNDLE)
    except BundleError as error:
        return {"path": str(DEFAULT_BUNDLE), "verified": False, "problem": str(error)}, error.exit_code
    found = {"name": manifest.name, "version": manifest.version, "precision": manifest.precision}
    return {"path": str(DEFAULT_BUNDLE), "verified": True, "problem": None, **found}, 0


def _decoders() -> list[dict[str, Any]]:
    """The transfer syntaxes that are read, and whether the library that decodes each can be imported here."""
    from importlib import import_module

    from pydicom.uid import UID

    from pmclip_deploy.imaging.decoders.frame import CODECS
    from pmclip_deploy.imaging.dicom_file import NATIVE

    def readable(library: str | None) -> bool:
        try:
            return library is None or bool(import_module(library))
        except Exception:  # a broken shared library raises what it likes
            return False

    libraries = {**dict.fromkeys(NATIVE), **{uid: next(v for start, v in LIBRARIES.items() if uid.startswith(start)) for uid in CODECS}}
    return [{"uid": uid, "name": UID(uid).name, "library": library, "readable": readable(library)} for uid, library in libraries.items()]


def _print(document: dict[str, Any]) -> None:
    cpu, gpu, backend, bundle = (document[key] for key in ("cpu", "gpu", "backend", "bundle"))
    unreadable = [d["name"] for d in document["dicom"] if not d["readable"]]
    lines = [
        f"python   {document['python']} on {document['platform']}",
        f"cpu      {cpu['name']}, {cpu['usable']} of {cpu['logical']} usable, {' '.join(cpu['flags'])}",
        f"gpu      {gpu['nvidia_driver'] or 'no NVIDIA driver'}",
        *(f"package  {name} {version or 'not installed'}" for name, version in document["packages"].items()),
        f"backend  {backend['problem'] or backend['name'] + ' with ' + ', '.join(backend['providers'])}",
        *([f"advice   {backend['advice']}"] if backend["advice"] else []),
        *(
            f"engines  {e['backend']}: {e['problem'] or 'run here, compute capability ' + e['compute_capability']}"
            for e in document["engines"]
        ),
        f"search   similarity in {document['similarity']}",
        *(f"dicom    {d['name']}: {d['library'] or 'built in'}" for d in document["dicom"] if d["readable"]),
        *(f"dicom    not readable here: {name}" for name in unreadable),
        f"bundle   {bundle['problem'] or '{name} {version} {precision}, verified'.format(**bundle)}",
        "infer works here" if document["ok"] else "infer does not work here",
    ]
    for line in lines:
        print("".join(c if c.isprintable() else "?" for c in line))
