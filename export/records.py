"""What is recorded beside a checkpoint, so that a rebuild gives the same bytes: ranges of a calibration, figures of parity."""

import gzip
import hashlib
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save

from pmclip_deploy.atomic import write, write_errors
from pmclip_deploy.bundle.checks import no_twin
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.errors import BundleError
from pmclip_deploy.export.calibration import Calibration
from pmclip_deploy.export.gates import FINDINGS, PARTS
from pmclip_deploy.export.onnx_from_checkpoint import Modules
from pmclip_deploy.train.checkpoint import rounded_tensors

CALIBRATION, PARITY = "calibration.json.gz", "parity.json"

MOST = 1 << 26  # bytes of such a file when it is read: 64 MiB


def tables_of(modules: Modules) -> tuple[Calibration | None, Calibration | None]:
    """What calibration.json.gz holds for these weights: of the graphs that answer, of the findings."""
    path = modules.folder / CALIBRATION
    if not path.is_file():
        return None, None
    try:
        table = Calibration.from_json(_read(path))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BundleError(f"{path}: not a calibration", "make it anew with --calibration-images FOLDER") from None
    answers, findings = weights_sha256(modules)
    return (
        replace(table, findings=None) if table.checkpoint == answers else None,
        table.findings if table.findings is not None and table.findings.checkpoint == findings else None,
    )


def record_calibration(modules: Modules, made: Calibration) -> None:
    """The table, and what each target left in float."""
    before, findings = tables_of(modules)
    whole = made.joined(before, findings)
    if (replace(whole, findings=None), whole.findings) != (before, findings):
        _keep(modules.folder / CALIBRATION, gzip.compress(json_bytes(whole.to_json()), mtime=0))


def parity_known(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """By part, what was measured on these very files."""
    kept = _read(folder / PARITY).get(f"{manifest.precision} {manifest.target}", {})
    return {part: kept.get(part) if _hashes(manifest, part).items() <= kept.get("files", {}).items() else None for part in PARTS}


def record_parity(folder: Path, manifest: Manifest, parity: dict[str, Any]) -> None:
    hashes = {name: file.sha256 for name, file in manifest.files.items()}
    measured = {part: parity[part] for part in PARTS if parity.get(part) is not None}
    kept = {**_read(folder / PARITY), f"{manifest.precision} {manifest.target}": {"files": hashes, **measured}}
    _keep(folder / PARITY, json_bytes(kept))


def _hashes(manifest: Manifest, part: str) -> dict[str, str]:
    """Of the files that decide what a part says."""
    return {name: file.sha256 for name, file in manifest.files.items() if (name.partition(".")[0] == FINDINGS) == (part == FINDINGS)}


def weights_sha256(modules: Modules) -> tuple[str, str]:
    """(of all weights but the findings', of those): each as a model.safetensors of its own, so that one may change without the other."""
    parts: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    for name, tensor in rounded_tensors(modules.folder).items():
        parts[name.startswith(f"{FINDINGS}.")][name] = tensor
    answers, findings = (hashlib.sha256(save(part)).hexdigest() if part else "" for part in (parts[False], parts[True]))
    return answers, findings


def _keep(path: Path, content: bytes) -> None:
    with write_errors(f"{path}:", "export a copy of the checkpoint", BundleError):
        write(path, content)


def _read(path: Path) -> dict[str, Any]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MOST + 1)
        if len(data) > MOST:
            raise ValueError("longer than any such file")
        content = json.loads(data, object_pairs_hook=no_twin)
    except FileNotFoundError:
        return {}
    except (OSError, EOFError, ValueError, zlib.error):
        raise BundleError(f"{path}: not readable JSON", "remove it, and pass --calibration-images FOLDER and --data FILE again") from None
    return content if isinstance(content, dict) else {}


def json_bytes(content: Any) -> bytes:
    return (json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n").encode()
