"""`import`: published CLIP weights, whatever they come in, as a checkpoint of ours; nothing in the file is ever run."""

import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pmclip_deploy.atomic import write_errors, written_folder
from pmclip_deploy.bundle.files import name_of_output, sha256_of_file
from pmclip_deploy.errors import BundleError, PmclipError, UsageError
from pmclip_deploy.train.backbones import BACKBONES, backbone_named
from pmclip_deploy.train.backbones.base import Backbone, Tensors
from pmclip_deploy.train.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from pmclip_deploy.train.contrastive import scale_of
from pmclip_deploy.train.pickles import Costly, check_pickles

FILES = {"model.safetensors", "checkpoint.json", "tokenizer.json"}  # of a checkpoint
HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")
NAMED = 3  # tensors that a message names

Shapes = dict[str, tuple[int, ...]]
Config = dict[str, Any]


@dataclass(frozen=True)
class Weights:
    """Tensors by our names, and where they come from."""

    kind: str
    file: Path
    tensors: Tensors
    config: Config | None  # what stands beside them, in a Hugging Face folder


def import_weights(source: Path, output: Path, backbone: str | None = None, name: str | None = None) -> Checkpoint:
    """Writes ``source`` as a checkpoint to ``output``, all of it or nothing; returns what checkpoint.json says.

    ``source`` is OpenAI's TorchScript archive or state dict, PubMedCLIP's training checkpoint, open_clip's state dict, or a
    Hugging Face ``CLIPModel`` (file or folder); its content tells which. Floats of any width are stored in fp16. Raises
    BundleError where the file is unreadable, would run code, or does not hold the backbone; UsageError for bad arguments.
    """
    wanted = backbone_named(backbone) if backbone else None
    if wanted and not wanted.importable:
        raise UsageError(f"backbone {wanted.name} has no published weights to import", f"choose one of {_names()}")
    name = name_of_output(output, name)
    try:
        _refuse_foreign_folder(output)
    except OSError as error:
        raise BundleError(f"{output}: cannot be written ({error.strerror})", "choose another folder") from error
    try:
        weights = weights_from_file(source)
    except PmclipError:
        raise
    except Costly as error:
        raise BundleError(f"{source}: {error}, so it is refused", "get the weights as safetensors or as a state dict") from None
    except Exception as error:  # whatever a damaged or hostile file makes its reader raise
        raise _unreadable(source, error) from error
    spec, tensors = fitted(weights, wanted)
    meta: Checkpoint = {
        "name": name,
        "version": "0.1.0",
        "backbone": spec.name,
        "logit_scale": round(scale_of(tensors["logit_scale"]).item(), 4),
        "metrics": {},
        "provenance": {
            "import": {
                "kind": weights.kind,
                "source": weights.file.name,
                "sha256": sha256_of_file(weights.file),
                "licence": "the user's: these weights were brought by whoever imported them, under their own terms",
            }
        },
    }
    _write_folder(output, {f"clip.{k}": v for k, v in tensors.items()}, meta, spec.tokenizer_json())
    return meta


# From a file to tensors. The first bytes tell how it is packed, the names of the tensors who made it.


def weights_from_file(source: Path) -> Weights:
    """Reads without running anything: safetensors, a pickle of tensors alone, or the data of a TorchScript archive."""
    config = None
    if source.is_dir():
        source, config = _file_of_folder(source)
    if not source.is_file():
        raise BundleError(f"{source}: not found", "pass the weights' file, or a Hugging Face folder with config.json")
    with source.open("rb") as file:
        head = file.read(9)
    safetensors = len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= source.stat().st_size
    if head.startswith(b"PK\x03\x04"):
        scripted = _check_archive(source)
        check_pickles(source)
        data = _tensors_from_torchscript(source) if scripted else torch.load(source, map_location="cpu", weights_only=True)
    elif safetensors:
        scripted, data = False, load_file(source)
    else:
        check_pickles(source)
        scripted, data = False, torch.load(source, map_location="cpu", weights_only=True)

    kind = "OpenAI TorchScript archive" if scripted else "state dict with OpenAI's names"
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        kind = "PubMedCLIP training checkpoint" if "optimizer_state_dict" in data else "training checkpoint with OpenAI's names"
        data = data["state_dict"]
    tensors = {k: v for k, v in data.items() if isinstance(k, str) and isinstance(v, Tensor)} if isinstance(data, Mapping) else {}
    if not tensors:
        raise BundleError(f"{source}: holds no named tensors", "pass a state dict, a training checkpoint or a safetensors file")
    if all(k.startswith("module.") for k in tensors):  # of torch's DataParallel, as open_clip saves it
        kind, tensors = "open_clip state dict", {k.removeprefix("module."): v for k, v in tensors.items()}
    families = {type(b): b for b in _importable()}.values()
    renamed = [named for family in families if (named := family.from_published(tensors)) is not None]
    made_by, tensors = max(renamed, key=lambda named: max(_likeness(named[1]).values()), default=(None, tensors))
    return Weights(made_by or kind, source, tensors, config)


def _file_of_folder(folder: Path) -> tuple[Path, Config]:
    """(the weights in a Hugging Face folder, its config.json), once that is one backbone's at least."""
    if (folder / "checkpoint.json").is_file():
        raise BundleError(f"{folder}: is a checkpoint already", "use it as it is")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{folder}: has no config.json, so it is no Hugging Face folder", "pass the weights' file") from None
    config = config if isinstance(config, dict) else {}
    misfits = [b.misfit(config) for b in _importable()]
    if all(misfits):
        raise BundleError(f"{folder / 'config.json'}: fits none of {_names()}: {', '.join(dict.fromkeys(filter(None, misfits)))}")
    for name in HUGGING_FACE_FILES:
        if (folder / name).is_file():
            return folder / name, config
    raise BundleError(f"{folder}: has none of {', '.join(HUGGING_FACE_FILES)}", "pass the weights' file")


def _check_archive(path: Path) -> bool:
    """Whether the zip is a TorchScript archive. Refuses one whose data is more than the file: torch stores it uncompressed."""
    with zipfile.ZipFile(path) as archive:
        names = {info.filename.partition("/")[2] for info in archive.infolist()}
        size = sum(info.file_size for info in archive.infolist() if not info.filename.partition("/")[2].startswith("code/"))
    if "data.pkl" not in names:
        raise BundleError(f"{path}: a zip file, but not one that torch wrote", "unpack it and pass the weights' file")
    if size > path.stat().st_size:
        raise BundleError(f"{path}: its data is compressed, which torch never does", "save it again with torch.save")
    return "constants.pkl" in names


# TorchScript archives. torch.jit.load would compile the code in one, and run what a module's __setstate__ says. The weights are in
# data.pkl and data/*, beside that code: reading those two runs nothing, and takes archives saved from a GPU too.

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
UNTYPED = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")


class _Module:
    """What a scripted module becomes: its attributes, and no class of its own."""

    attributes: Mapping[Any, Any] = {}

    def __setstate__(self, attributes: Any) -> None:
        self.attributes = attributes if isinstance(attributes, dict) else {}


class _ArchiveReader(pickle.Unpickler):
    """data.pkl with four harmless globals; every other one is refused by name before anything is called."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _strided
        if (module, name) == ("collections", "OrderedDict"):  # always empty: a tensor's backward hooks
            return OrderedDict
        if module == "torch.jit._pickle" and name in UNTYPED:
            return lambda value, *kind: value
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _device, _count = pid
        if not re.fullmatch(r"\d+", str(key), re.ASCII):  # as torch numbers them: no way into what was not measured
            raise pickle.UnpicklingError(f"Unsupported storage {str(key)[:40]!r}")
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}/data/{key}"))  # checked against the zip's CRC-32
            self.storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _strided(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)  # refuses what reaches beyond the storage


def _tensors_from_torchscript(path: Path) -> Tensors:
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        return dict(_named_tensors(_ArchiveReader(archive, root).load(), "", set()))


def _named_tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, _Module) or id(module) in seen:
        return
    seen.add(id(module))  # a file may nest a module in itself
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _named_tensors(value, f"{prefix}{name}.", seen)


# Which backbone the tensors are, and what is wrong with them.


def _importable() -> list[Backbone]:
    return [b for b in BACKBONES.values() if b.importable]


def _names() -> str:
    return ", ".join(b.name for b in _importable())


@cache
def _shapes(backbone: Backbone) -> Shapes:
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in backbone.build().state_dict().items()}


def _likeness(tensors: Tensors) -> dict[str, float]:
    """Of each backbone, the share of its tensors that are there, in their shape."""
    shapes = {b.name: _shapes(b) for b in _importable()}
    return {name: sum(k in tensors and tensors[k].shape == shape for k, shape in of.items()) / len(of) for name, of in shapes.items()}


def fitted(weights: Weights, wanted: Backbone | None) -> tuple[Backbone, Tensors]:
    """(backbone, its tensors in fp32). Raises BundleError naming the first tensors that are missing, extra, misshapen or not finite."""
    found: Shapes = {k: tuple(v.shape) for k, v in weights.tensors.items()}
    likeness = _likeness(weights.tensors)
    nearest = BACKBONES[max(likeness, key=lambda name: likeness[name])]
    spec = wanted or nearest
    if likeness[nearest.name] < 0.1:
        raise BundleError(
            f"{weights.file}: fits none of {_names()} ({len(found)} tensors, first {_first(sorted(found))})", "give one's published weights"
        )
    if spec != nearest and likeness[spec.name] < likeness[nearest.name]:
        raise BundleError(
            f"{weights.file}: these are weights of {nearest.name}, not of {spec.name}", "leave --backbone out or give that one"
        )
    if weights.config is not None and (misfit := spec.misfit(weights.config)):
        raise BundleError(f"{weights.file.with_name('config.json')}: {misfit}")

    expected = _shapes(spec)
    # Counts of batches that torch's batch norm only counts; older files lack them.
    counters = {k for k in expected if k.endswith(".num_batches_tracked")}
    tensors = weights.tensors
    faults = {
        "missing": sorted(expected.keys() - found.keys() - counters),
        "extra": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{k} is {_shape(found[k])}, must be {_shape(expected[k])}"
            for k in sorted(expected.keys() & found.keys())
            if found[k] != expected[k]
        ],
        "not floats": sorted(k for k, v in tensors.items() if k in expected.keys() - counters and not _is_plain_float(v)),
    }
    if any(faults.values()):
        misfits = "; ".join(f"{len(names)} {fault}: {_first(names)}" for fault, names in faults.items() if names)
        raise BundleError(f"{weights.file}: does not fit {spec.name}: {misfits}")
    tensors = {k: torch.tensor(0) if k in counters - found.keys() else _fp32(tensors[k]) for k in expected}
    if broken := [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise BundleError(f"{weights.file}: {len(broken)} tensors hold NaN or infinity: {_first(broken)}", "get the file again")
    return spec, tensors


def _is_plain_float(x: Tensor) -> bool:
    """Not sparse, not a promise without data (meta), and not 8 bits, whose scale would be missing."""
    return x.is_floating_point() and x.layout == torch.strided and x.device.type == "cpu" and x.dtype.itemsize > 1


def _fp32(x: Tensor) -> Tensor:
    return x.detach().float() if x.is_floating_point() else x.detach().long().clone()


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _first(names: list[str]) -> str:
    return ", ".join(" ".join(n[:120].split()) for n in names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _unreadable(source: Path, error: Exception) -> BundleError:
    if isinstance(error, OSError) and error.strerror:
        return BundleError(f"{source}: cannot be read ({error.strerror})")
    if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return BundleError(
            f"{source}: names {refused[1]}, which no file of tensors needs and which could run code, so it is refused",
            "get the weights as safetensors or as a state dict",
        )
    return BundleError(f"{source}: no weights that can be read, or a damaged file ({type(error).__name__})", "get it again")


# Writing.


def _refuse_foreign_folder(output: Path) -> None:
    """Raises BundleError where a checkpoint must not be written: over a file, over something else, or over a training state."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or {path.name for path in output.iterdir()} - FILES:
        raise BundleError(f"{output}: exists and is not just a checkpoint, so it is not overwritten", "choose another folder")
    read_checkpoint(output)


def _write_folder(output: Path, tensors: Tensors, meta: Checkpoint, tokenizer_json: str) -> None:
    output = output.resolve()
    with write_errors(f"{output}:", "check the space left and the permissions", BundleError), written_folder(output) as new:
        (new / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        save_checkpoint(new, tensors, meta, new / "tokenizer.json")
