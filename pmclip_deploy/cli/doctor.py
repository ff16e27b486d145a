"""`pmclip-deploy doctor`: lists what this machine has, and tells whether `infer` works on it."""

import platform
import shutil
from typing import Annotated, Any

import typer

from pmclip_deploy.cli.options import Json
from pmclip_deploy.cli.output import print_json
from pmclip_deploy.console import counted
from pmclip_deploy.errors import BundleError, DeviceError
from pmclip_deploy.sessions import DEFAULT, Backend, backends
from pmclip_deploy.sessions.onnxruntime import GPU_STEPS

LIBRARIES = {  # of CODECS, by the start of the transfer syntax
    "1.2.840.10008.1.2.4.50": "PIL",
    "1.2.840.10008.1.2.4.5": "gdcm",  # 12 bits and lossless
    "1.2.840.10008.1.2.4.7": "gdcm",
    "1.2.840.10008.1.2.4.8": "jpeg_ls",
    "1.2.840.10008.1.2.4.9": "openjpeg",
    "1.2.840.10008.1.2.4.20": "openjpeg",
    "1.2.840.10008.1.2.5": "PIL",
}


Ward = Annotated[bool, typer.Option("--ward", help="Also check what `serve` needs. The command exits with 0 if `serve` works here too.")]


def doctor(ward: Ward = False, as_json: Json = False) -> int:
    """List the backends, decoders and devices of this machine. The command exits with 0 if `infer` works here."""
    from pmclip_deploy.machine import cpu

    rows = {name: _backend(backend) for name, backend in backends().items()}
    default = rows[DEFAULT]
    bundle, bundle_code = _bundle()
    code = bundle_code or (DeviceError.exit_code if default["problem"] else 0)
    packages, gpu = _packages(), _gpu()
    document = {
        "schema": "pmclip-deploy/doctor/1",
        "ok": not code,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "gpu": gpu,
        "packages": packages,
        "backend": {
            **{key: default.get(key) for key in ("name", "providers", "threads", "problem")},
            "advice": _advice(packages, gpu, default.get("providers") or []),
        },
        "engines": [
            {"backend": row["name"], **{key: row.get(key) for key in ("version", "compute_capability", "problem")}}
            for row in rows.values()
            if row["target"]
        ],
        "backends": list(rows.values()),
        "similarity": _similarity(),
        "dicom": _decoders(),
        "bundle": bundle,
        "tuning": None if bundle_code else _tuning(),
    }
    if ward:
        from pmclip_deploy.serve.check import ward as ward_of

        document["ward"] = found = ward_of()
        code = code or (DeviceError.exit_code if found["problem"] else 0)
    if as_json:
        print_json(document)
    else:
        _print(document)
    return code


def _backend(backend: Backend) -> dict[str, Any]:
    devices = [device.name for device in backend.devices]
    row = {"name": backend.name, "devices": devices, "target": backend.target, "version": None, "problem": None}
    try:
        return {**row, "version": backend.version(), **backend.about(), "problem": backend.why_not()}
    except Exception as error:  # a driver raises what it likes
        return {**row, "problem": type(error).__name__}


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


def _advice(packages: dict[str, str | None], gpu: dict[str, Any], providers: list[str]) -> str | None:
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        return f"onnxruntime and onnxruntime-gpu are both installed and overwrite each other; {GPU_STEPS}"
    if gpu["nvidia_driver"] and providers and "CUDAExecutionProvider" not in providers:
        return f"this machine has an NVIDIA GPU, but the installed onnxruntime is for the CPU alone; to use the GPU, {GPU_STEPS}"
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


def _tuning() -> dict[str, Any] | None:
    """What `tune` chose for the embedded bundle, for one picture and for many; None where it never ran here."""
    from pmclip_deploy.models import DEFAULT_BUNDLE
    from pmclip_deploy.tuning import choices_of, tuning_file

    file, notes = tuning_file(DEFAULT_BUNDLE), list[str]()
    if file is None:
        return None
    chosen = {name: choices_of(DEFAULT_BUNDLE, items, notes) for name, items in (("one", 1), ("many", None))}
    plans = {name: {graph: choice._asdict() for graph, choice in of.items()} for name, of in chosen.items()}
    return {"file": str(file), **plans, "problem": notes[0] if notes else None}


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
    cpu, gpu, bundle = (document[key] for key in ("cpu", "gpu", "bundle"))
    unreadable = [d["name"] for d in document["dicom"] if not d["readable"]]
    lines = [
        f"python   {document['python']} on {document['platform']}",
        f"cpu      {cpu['name']}, {cpu['usable']} of {cpu['logical']} usable, {' '.join(cpu['flags'])}",
        *([f"cpu      a quota of {cpu['quota']:g} processors"] if cpu["quota"] else []),
        f"cpu      {counted(cpu['threads'], 'thread')} worth starting, {counted(cpu['fast_cores'], 'fast core')}",
        f"gpu      {gpu['nvidia_driver'] or 'no NVIDIA driver'}",
        *(f"package  {name} {version or 'not installed'}" for name, version in document["packages"].items()),
        *(f"backend  {' '.join(filter(None, (row['name'], row['version'])))}: {_said(row)}" for row in document["backends"]),
        *([f"advice   {advice}"] if (advice := document["backend"]["advice"]) else []),
        f"search   similarity in {document['similarity']}",
        *(f"dicom    {d['name']}: {d['library'] or 'built in'}" for d in document["dicom"] if d["readable"]),
        *(f"dicom    not readable here: {name}" for name in unreadable),
        f"bundle   {bundle['problem'] or '{name} {version} {precision}, verified'.format(**bundle)}",
        *(_ward_lines(document["ward"]) if "ward" in document else ()),
        *_lines_of_tuning(document["tuning"]),
        "infer works here" if document["ok"] else "infer does not work here",
    ]
    for line in lines:
        print("".join(c if c.isprintable() else "?" for c in line))


def _ward_lines(ward: dict[str, Any]) -> list[str]:
    port = f"port {ward['port']} {'is free' if ward['port_is_free'] else 'is taken; choose another one with --port'}"
    packages = [f"ward     {name} {version or 'not installed'}" for name, version in ward["packages"].items()]
    return [*packages, f"ward     {port}", f"ward     {ward['problem'] or 'serve works here'}"]


def _lines_of_tuning(tuning: dict[str, Any] | None) -> list[str]:
    if tuning is None or tuning["problem"]:
        return [f"tuning   {tuning['problem'] if tuning else 'none; `pmclip-deploy tune` measures what is fastest here'}"]
    lines = []
    for name, pictures in (("one", "one picture"), ("many", "many pictures")):
        graphs = [f"{graph} {_choice(of)}" for graph, of in tuning[name].items()]
        lines.append(f"tuning   {pictures}: {', '.join(graphs) or 'as without a tuning'}")
    return lines


def _choice(of: dict[str, Any]) -> str:
    batch = f" batches of {of['batch']}" if of["batch"] else ""
    return f"{of['device']} {of['between']} {of['threads'] or 'all'} threads{batch}"


def _said(row: dict[str, Any]) -> str:
    """Of a backend, what keeps it from running here, or else what it says of itself."""
    facts = {key: row[key] for key in row if key not in ("name", "devices", "target", "version", "problem")}
    said = [f"{key.replace('_', ' ')} {', '.join(value) if isinstance(value, list) else value}" for key, value in facts.items()]
    return row["problem"] or "; ".join(said) or "runs here"
