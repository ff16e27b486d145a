"""TorchScript archives, read without running anything.

torch.jit.load would compile the code in one, and run what a module's __setstate__ says. The weights are in data.pkl and data/*, beside
that code: reading those two runs nothing, and takes archives saved from a GPU too.
"""

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmclip_deploy.errors import BundleError
from pmclip_deploy.train.backbones.base import Tensors


def is_torchscript(path: Path) -> bool:
    """Whether the zip is a TorchScript archive. Raises BundleError where torch did not write it, or its data is more than the file."""
    with zipfile.ZipFile(path) as archive:
        names = {info.filename.partition("/")[2] for info in archive.infolist()}
        size = sum(info.file_size for info in archive.infolist() if not info.filename.partition("/")[2].startswith("code/"))
    if "data.pkl" not in names:
        raise BundleError(f"{path}: a zip file, but not one that torch wrote", "unpack it and pass the weights' file")
    if size > path.stat().st_size:
        raise BundleError(f"{path}: its data is compressed, which torch never does", "save it again with torch.save")
    return "constants.pkl" in names


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


def tensors_from_torchscript(path: Path) -> Tensors:
    """The parameters and buffers of the scripted module, by name. Raises UnpicklingError where it names any other class."""
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
