"""A bundle's folder: read, verified, written whole or not at all."""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pmclip_deploy.atomic import write_errors, written_folder
from pmclip_deploy.bundle.checks import check_name, no_constant, no_twin
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import (
    LABELS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    NEXT_STEP,
    PROBES,
    QUESTION_EMBEDDINGS,
    SEAL,
    SIGNATURE,
    TOKENIZER,
    WORDS,
)
from pmclip_deploy.bundle.types import File
from pmclip_deploy.errors import BundleError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Verified: TypeAlias = Callable[[str, bytes | None], object]


def manifest_from_bundle(path: Path) -> Manifest:
    """Reads and checks manifest.json; the other files are not opened."""
    file = Path(path) / MANIFEST
    if not Path(path).is_dir():
        raise BundleError(f"{path}: no such bundle folder", "check the path, or build one with `pmclip-deploy export`")
    try:
        if not file.is_file():  # a device or a pipe is not read
            raise BundleError(f"{file}: missing, so this folder is no bundle", _step_to_bundle(path))
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{file}: larger than a manifest can be", NEXT_STEP)
        manifest = Manifest.from_json(json.loads(file.read_bytes(), parse_constant=no_constant, object_pairs_hook=no_twin))
        more = [WORDS] if manifest.head is not None and manifest.head.words is not None else []
        more += [name for name, has in ((LABELS, manifest.labels), (QUESTION_EMBEDDINGS, manifest.asked), (PROBES, manifest.probes)) if has]
        for name in [*(g.file for g in manifest.graphs.values()), *(e.file for e in manifest.engines), TOKENIZER, *more]:
            if name not in manifest.files:
                raise ValueError(f'"files" does not list {name}')
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror})", "check its permissions") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise BundleError(f"{file}: not a usable manifest, {_line(error)}", NEXT_STEP) from error
    return manifest


def _step_to_bundle(folder: Path) -> str:
    """What to do with a folder that holds something else."""
    if (folder / "checkpoint.json").is_file():
        return f"it is a checkpoint; `pmclip-deploy export {folder}` makes a bundle of it"
    if (folder / "config.json").is_file():
        return f"published weights need `pmclip-deploy import {folder} --output CHECKPOINT`, then `pmclip-deploy export CHECKPOINT`"
    return NEXT_STEP


def verify_bundle(
    path: Path, manifest: Manifest | None = None, verified: Verified = lambda name, content: None, wanted: Container[str] = ()
) -> Manifest:
    """Every file is there with its size and sha256, the manifest's too, and nothing more but a signature; else one BundleError says all.

    A symbolic link is followed: what counts is the content, and the hash covers it. ``verified`` is told each file that may be parsed
    already: it, those before it and the manifest are as they should be. It gets the content of a file that is ``wanted``, the very bytes
    that were hashed, and None of another.
    """
    manifest = manifest or manifest_from_bundle(path)
    problems = problems_in_bundle(path, manifest, verified, wanted)
    if problems:
        raise BundleError(f"{path}: {', '.join(problems)}", NEXT_STEP)
    return manifest


def problems_in_bundle(
    path: Path, manifest: Manifest, verified: Verified = lambda name, content: None, wanted: Container[str] = ()
) -> list[str]:
    problems = []
    try:
        seal = Path(path) / SEAL
        if not seal.is_file():
            problems.append(f"{SEAL} is missing")
        elif seal.stat().st_size != len(expected_seal := _seal(path)) or seal.read_bytes() != expected_seal:
            problems.append(f"{MANIFEST} has changed (its sha256 is not the one in {SEAL})")
        for name, expected in sorted(manifest.files.items(), key=lambda item: item[1].bytes):  # so that most can be parsed soon
            file = Path(path) / name
            if not file.is_file():
                problems.append(f"{name} is missing")
            elif file.stat().st_size != expected.bytes:
                problems.append(f"{name} has changed ({file.stat().st_size} bytes, not {expected.bytes})")
            else:
                content = _content(file, expected) if name in wanted else None
                digest = sha256_of_file(file) if content is None else hashlib.sha256(content).hexdigest()
                if digest != expected.sha256:
                    problems.append(f"{name} has changed (its sha256 differs)")
                elif not problems:
                    verified(name, content)
        extra = sorted(entry.name for entry in Path(path).iterdir() if entry.name not in (*manifest.files, MANIFEST, SEAL, SIGNATURE))
    except OSError as error:
        raise BundleError(f"{error.filename}: cannot be read ({error.strerror})", "check its permissions") from error
    return problems + [f"{name!r} does not belong to the bundle" for name in extra]


def content_of_file(path: Path, manifest: Manifest, name: str) -> bytes:
    """A file of a bundle, read into this process's own memory and verified there. What is parsed is what was hashed, whoever writes to the
    folder meanwhile. Raises BundleError."""
    file, expected = Path(path) / name, manifest.files.get(name)
    if expected is None:
        raise BundleError(f"{file}: is not listed in {MANIFEST}", NEXT_STEP)
    try:
        if not file.is_file():
            raise BundleError(f"{path}: {name} is missing", NEXT_STEP)
        content = _content(file, expected)
    except OSError as error:
        raise BundleError(f"{error.filename}: cannot be read ({error.strerror})", "check its permissions") from error
    if hashlib.sha256(content).hexdigest() != expected.sha256:
        raise BundleError(f"{path}: {name} has changed (its sha256 differs)", NEXT_STEP)
    return content


def rows_from_bundle(path: Path | None, manifest: Manifest, name: str, count: int, width: int) -> "NDArray[np.float32]":
    """(count, width) f32 of one of the bundle's arrays. Raises BundleError."""
    import numpy as np

    assert path is not None
    try:
        rows = np.load(io.BytesIO(content_of_file(path, manifest, name)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BundleError(f"{path}: {name} cannot be read", "copy the bundle again") from error
    if rows.shape != (count, width) or rows.dtype != np.float32 or not np.isfinite(rows).all():
        raise BundleError(f"{path}: {name} is not {count} x {width} numbers", "export the bundle again")
    return np.asarray(rows)


def name_of_output(output: Path, name: str | None = None) -> str:
    """What is trained, imported or exported is called ``name``, else as its folder is, other characters as dashes. Raises UsageError."""
    named = re.sub(r"[^\w.-]+", "-", output.resolve().name).strip("-.") if name is None else name
    if not re.fullmatch(r"\w[\w.-]{0,63}", named):
        raise UsageError(f"{named[:70]!r} is no name: at most 64 letters, digits, dots, dashes", "pass another name")
    return named


def refuse_foreign_folder(directory: Path) -> None:
    """Raises BundleError where a bundle must not be written: a file, or a folder with something else in it."""
    if directory.exists() and not (directory / MANIFEST).is_file() and (not directory.is_dir() or any(directory.iterdir())):
        raise BundleError(f"{directory}: exists and is no bundle, so it is not overwritten", "choose another folder")


def write_bundle(directory: Path, manifest: Manifest, files: Mapping[str, Path | bytes]) -> Manifest:
    """Writes ``files`` (name to source file or content) and the manifest, with their hashes filled in.

    All of it appears at once, or nothing does. A bundle that stood there is replaced; a folder that is no bundle is refused.
    """
    directory = Path(directory).resolve()
    refuse_foreign_folder(directory)
    with write_errors(f"{directory}:", "check the space left and the permissions", BundleError), written_folder(directory) as new:
        try:
            for name, source in files.items():
                check_name(name)
                _write(new / name, source)
            written = {name: File(sha256_of_file(new / name), (new / name).stat().st_size) for name in sorted(files)}
            hashed = replace(manifest, files=written)
            (new / MANIFEST).write_bytes((json.dumps(hashed.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
            (new / SEAL).write_bytes(_seal(new))
            verify_bundle(new)  # what is written can be read
        except ValueError as error:
            raise BundleError(f"{directory}: not written, {_line(error)}") from error
    return hashed


def _write(path: Path, source: Path | bytes) -> None:
    if isinstance(source, bytes):
        path.write_bytes(source)
    else:
        shutil.copyfile(source, path)


def _seal(folder: Path) -> bytes:
    return f"{sha256_of_file(Path(folder) / MANIFEST)}  {MANIFEST}\n".encode()


def _content(file: Path, expected: File) -> bytes:
    """No more than a byte too many: a file that grew is not read to its end."""
    with file.open("rb") as opened:
        return opened.read(expected.bytes + 1)


def sha256_of_file(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as content:
        while size := content.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
