"""A DICOM file or Dataset to its elements and the place of its pixels; what pydicom says meanwhile goes nowhere."""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from pmclip_deploy.errors import InputError, NoPictureError, PmclipError
from pmclip_deploy.faults import is_ours
from pmclip_deploy.header.work import limited
from pmclip_deploy.imaging.bounded import BoundedFile, header_from_file
from pmclip_deploy.imaging.decoders.layout import Refused
from pmclip_deploy.imaging.elements import text_of
from pmclip_deploy.imaging.picture import head_of_file
from pmclip_deploy.imaging.quiet import quiet, quieten

if TYPE_CHECKING:
    from pydicom import Dataset


MAX_INFLATED = 1 << 28  # bytes that a deflated file may grow to: 256 MiB

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
NATIVE = (IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED)


def uid_from_dicom(path: str | PathLike[str]) -> str:
    """The SOP Instance UID (PS3.3 C.12.1): it names the image, and is as identifying as a name; never print or store it."""
    where = fspath(path)
    with reading(where) as stack:
        if uid := text_of(image_from_file(where, stack).dataset, "SOPInstanceUID"):
            return uid
        raise Refused("it has no SOP Instance UID (0008,0018)")


def patient_from_dicom(path: str | PathLike[str]) -> str:
    """Patient ID (0010,0020), "" where the file has none: to keep one patient's pictures together; never print or store it."""
    where = fspath(path)
    with reading(where) as stack:
        return text_of(image_from_file(where, stack).dataset, "PatientID")


@contextmanager
def reading(where: str) -> Iterator[ExitStack]:
    try:
        with quiet(), limited(), np.errstate(all="ignore"), ExitStack() as stack:
            yield stack
    except PmclipError:
        raise
    except Refused as error:
        raise InputError(f"{where}: {error}", "export or copy the file again") from None
    except Exception as error:  # also RecursionError and MemoryError
        if is_ours(error):
            raise
        raise InputError(f"{where}: the DICOM file is broken ({type(error).__name__})", "export or copy it again") from None


def import_pydicom_lean() -> None:
    """Import pydicom without what it loads whole though few files need it, decoders, colour profiles, test files and their downloads.

    It takes half the time, and 19 MB less.

    For a process of ours alone, such as the command line: in it, pydicom's own plugins, profiles and downloads stay unavailable. Our
    decoders do not go through them.
    """
    if "pydicom" in sys.modules:
        return
    without = dict.fromkeys(("gdcm", "jpeg_ls", "openjpeg", "requests", "tqdm", "PIL.ImageCms"))
    without |= {name: ModuleType(name) for name in ("urllib.request", "pydicom.examples")}
    without = {name: module for name, module in without.items() if name not in sys.modules}
    sys.modules.update(without)  # type: ignore[arg-type]
    try:
        import pydicom  # noqa: F401
    finally:
        for name in without:
            del sys.modules[name]


# --- file to dataset and bytes of pixels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DicomImage:
    """A dataset without its pixels, and where these are."""

    dataset: Dataset
    syntax: str
    little: bool
    file: BinaryIO | None  # stands at the pixel data's first value byte; None where there are no pixels
    available: int  # bytes from there on
    length: int  # as declared; 0xFFFFFFFF for undefined
    vr: str  # of the pixel data; "float" where these are not whole numbers


def image_from_file(where: str, stack: ExitStack, data: bytes | None = None) -> DicomImage:
    """Of the file at ``where``, or of what it holds, ``data``."""
    head = head_of_file(where) if data is None else data[:132]
    # Without the preamble (PS3.10 7.1) a file starts with group 0002 or, with no file meta, with a low group of either byte order.
    if head[128:] != b"DICM" and head[:2] not in (b"\x02\x00", b"\x08\x00", b"\x00\x08", b"\x00\x02"):
        raise NoPictureError(f"{where}: is not a DICOM, PNG or JPEG file", "give one of these")

    from pydicom import dcmread

    quieten()
    if head[128:] == b"DICM" and _syntax_of_file(where, data) == DEFLATED:
        _check_inflated(where, data)
        return image_from_dataset(dcmread(where if data is None else io.BytesIO(data)))
    file = stack.enter_context(BoundedFile(io.FileIO(where) if data is None else io.BytesIO(data)))
    dataset = header_from_file(file)
    little = bool(dataset.original_encoding[1])
    order: Literal["little", "big"] = "little" if little else "big"
    tag = file.read(4)
    if tag not in (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10"):
        if not len(dataset) or (head[128:] != b"DICM" and "SOPClassUID" not in dataset and "Rows" not in dataset):
            raise NoPictureError(f"{where}: is not a DICOM, PNG or JPEG file", "give one of these")
        kind = "float" if tag in (b"\xe0\x7f\x08\x00", b"\xe0\x7f\x09\x00", b"\x7f\xe0\x00\x08", b"\x7f\xe0\x00\x09") else ""
        return DicomImage(dataset, _syntax(dataset), little, None, 0, 0, kind)
    vr, field = "OW", file.read(4)
    if field[:2] in (b"OW", b"OB", b"UN"):  # explicit; seen in the bytes, since some files are implicit where they say explicit
        vr, field = field[:2].decode(), file.read(4)
    return DicomImage(dataset, _syntax(dataset), little, file, file.size - file.tell(), int.from_bytes(field, order), vr)


def _syntax_of_file(where: str, data: bytes | None) -> Any:
    """The transfer syntax (0002,0010), by the file meta alone: the rest may be deflated."""
    from pydicom.filereader import _read_file_meta_info, read_preamble

    with _opened(where, data) as file:
        read_preamble(file, False)
        return _read_file_meta_info(file).get("TransferSyntaxUID")


def _opened(where: str, data: bytes | None) -> BinaryIO:
    return open(where, "rb") if data is None else io.BytesIO(data)  # noqa: PTH123 - the name comes as a str; callers close it


def _check_inflated(where: str, content: bytes | None) -> None:
    """Inflate to nowhere first: a thousandth of the size is enough for a bomb."""
    inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with _opened(where, content) as file:
        file.seek(140)
        file.seek(144 + int.from_bytes(file.read(4), "little"))  # (0002,0000), the file meta's length, is its first element
        data = file.read(65536)
        while data and not inflater.eof:
            total += len(inflater.decompress(data, 1 << 20))
            if total > MAX_INFLATED:
                raise InputError(f"{where}: inflates to more than {MAX_INFLATED >> 20} MiB", "store it in another transfer syntax")
            data = inflater.unconsumed_tail or file.read(65536)
    if not inflater.eof:
        raise InputError(f"{where}: its deflated data is cut short", "copy the file again")


def image_from_dataset(dataset: Any) -> DicomImage:
    from pydicom import Dataset

    quieten()
    if not isinstance(dataset, Dataset):
        raise InputError(f"{type(dataset).__name__}: is not an image", "give a path, a pydicom Dataset or an array")
    syntax = _syntax(dataset)
    little = syntax != BIG_ENDIAN
    if "PixelData" not in dataset or "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        kind = "float" if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset else ""
        return DicomImage(dataset, syntax, little, None, 0, 0, kind)
    element = dataset["PixelData"]
    value = element.value
    if isinstance(value, (bytes, bytearray, memoryview)):
        file: BinaryIO = io.BytesIO(value)
    elif hasattr(value, "read"):
        file = value
        file.seek(0)
    else:
        raise Refused("its pixel data is empty")
    available = file.seek(0, io.SEEK_END)
    file.seek(0)
    return DicomImage(dataset, syntax, little, file, available, 0xFFFFFFFF if syntax not in NATIVE else available, str(element.VR))


def _syntax(dataset: Dataset) -> str:
    if syntax := (getattr(dataset, "file_meta", None) or {}).get("TransferSyntaxUID"):
        return str(syntax)
    implicit, little = dataset.original_encoding  # what pydicom guessed, or (None, None) where it was made in memory
    return IMPLICIT if implicit else BIG_ENDIAN if little is False else EXPLICIT
