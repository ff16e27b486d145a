"""A DICOM file or Dataset to its elements and the place of its pixels; what pydicom says meanwhile goes nowhere."""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Iterator, MutableSequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from os import PathLike, fspath
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from pmclip_deploy.errors import InputError, NoPictureError, PmclipError
from pmclip_deploy.faults import is_ours
from pmclip_deploy.files import UNKNOWN_FILE
from pmclip_deploy.header.work import limited
from pmclip_deploy.imaging.bounded import BoundedFile, header_from_file
from pmclip_deploy.imaging.decoders.layout import Refused
from pmclip_deploy.imaging.elements import text_of
from pmclip_deploy.imaging.picture import head_of_file
from pmclip_deploy.imaging.quiet import quiet, quieten

if TYPE_CHECKING:
    from pydicom import Dataset, Sequence
    from pydicom.dataset import FileMetaDataset


MAX_INFLATED = 1 << 28  # bytes that a deflated file may grow to: 256 MiB

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
NATIVE = (IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED)


def uid_from_dicom(path: str | PathLike[str], data: bytes | None = None) -> str:
    """The SOP Instance UID (PS3.3 C.12.1): it names the image, and is as identifying as a name; never print or store it.

    ``data`` is what the file holds, where that was read already.
    """
    where = fspath(path)
    with reading(where) as stack:
        if uid := text_of(image_from_file(where, stack, data).dataset, "SOPInstanceUID"):
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
        raise InputError(f"{where}: the DICOM file is broken", "export or copy it again") from None


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
        raise NoPictureError(f"{where}: {UNKNOWN_FILE}", "give one of these")

    from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

    quieten()
    _read_unknown_sequences()
    file = stack.enter_context(BoundedFile(io.FileIO(where) if data is None else io.BytesIO(data)))
    meta = _deflated_meta(file) if head[128:] == b"DICM" or head[:2] == b"\x02\x00" else None
    if meta is not None:
        file = stack.enter_context(BoundedFile(_inflated(where, file), 1 << 20))
    dataset = header_from_file(file)
    if meta is not None:
        dataset.file_meta = meta
    little = bool(dataset.original_encoding[1])
    order: Literal["little", "big"] = "little" if little else "big"
    tag = file.read(4)
    if tag not in (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10"):
        if not len(dataset) or (head[128:] != b"DICM" and "SOPClassUID" not in dataset and "Rows" not in dataset):
            raise NoPictureError(f"{where}: {UNKNOWN_FILE}", "give one of these")
        kind = "float" if tag in (b"\xe0\x7f\x08\x00", b"\xe0\x7f\x09\x00", b"\x7f\xe0\x00\x08", b"\x7f\xe0\x00\x09") else ""
        return DicomImage(dataset, _syntax(dataset), little, None, 0, 0, kind)
    vr, field = "OW", file.read(4)
    # A VR is seen in the bytes, since some files are implicit where they say explicit. No even length begins with these letters.
    if field[:1] in (b"O", b"S", b"U") and field[:2].isalpha() and field[:2].isupper():
        vr = field[:2].decode()
        short = vr not in EXPLICIT_VR_LENGTH_32 and any(field[2:])
        field = field[2:] if short else file.read(4)
    place = file.tell()
    available = file.seek(0, io.SEEK_END) - file.seek(place)
    return DicomImage(dataset, _syntax(dataset), little, file, available, int.from_bytes(field, order), _vr_of_bytes(vr))


def _vr_of_bytes(vr: str) -> str:
    """Pixel Data is OB or OW (PS3.5 A): what writers call OF, OD, OL, OV or US are words too."""
    return vr if vr in ("OB", "UN") else "OW"


def _read_unknown_sequences() -> None:
    """Have pydicom read a big-endian file's sequences of VR UN as implicit little endian (PS3.5 6.2.2, CP-246).

    pydicom takes their items for big-endian ones, and then reads nonsense. Nothing changes for files that it reads well: the tags of
    little-endian items are none in big-endian.
    """
    from pydicom import filereader

    if hasattr(filereader.read_sequence, "__wrapped__"):
        return
    as_declared = filereader.read_sequence

    @wraps(as_declared)
    def read_sequence(
        fp: BinaryIO,
        is_implicit_VR: bool,
        is_little_endian: bool,
        bytelength: int,
        encoding: str | MutableSequence[str],
        offset: int = 0,
    ) -> Sequence:
        if not is_little_endian and bytelength == 0xFFFFFFFF:
            head = fp.read(4)
            fp.seek(-len(head), io.SEEK_CUR)
            if head in (b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"):
                is_implicit_VR = is_little_endian = True
        return as_declared(fp, is_implicit_VR, is_little_endian, bytelength, encoding, offset)

    filereader.read_sequence = read_sequence


def _deflated_meta(file: BinaryIO) -> FileMetaDataset | None:
    """The file meta if it says that the rest is deflated, which is where ``file`` stands then; None, at the file's first byte, if not."""
    from pydicom.filereader import _read_file_meta_info, read_preamble

    read_preamble(file, True)
    meta = _read_file_meta_info(file)
    if meta.get("TransferSyntaxUID") == DEFLATED:
        return meta
    file.seek(0)
    return None


def _inflated(where: str, file: BoundedFile) -> _Inflated:
    """The rest of the file. It is inflated to nowhere first: a thousandth of the size is enough for a bomb."""
    file.header_is_read, file.left = True, None
    whole = _Inflated(file)
    while whole.take(1 << 20):
        if whole.place > MAX_INFLATED:
            raise InputError(f"{where}: inflates to more than {MAX_INFLATED >> 20} MiB", "store it in another transfer syntax")
    if not whole.inflater.eof:
        raise InputError(f"{where}: its deflated data is cut short", "copy the file again")
    whole.size = whole.place
    return whole


class _Inflated(io.RawIOBase):
    """What the rest of a file inflates to, piece by piece. It begins anew for what it has passed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.begin, self.size, self.wanted = file, file.tell(), 0, 0
        self._begin()

    def _begin(self) -> None:
        self.file.seek(self.begin)
        self.inflater, self.data, self.place = zlib.decompressobj(-zlib.MAX_WBITS), b"", 0

    def take(self, size: int) -> bytes:
        """At most ``size`` bytes more; none at the end."""
        out = b""
        while not out and not self.inflater.eof and (self.data or (data := self.file.read(65536))):
            out = self.inflater.decompress(self.data or data, size)
            self.data = self.inflater.unconsumed_tail
        self.place += len(out)
        return out

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.wanted

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self.wanted = offset + (0, self.wanted, self.size)[whence]
        return self.wanted

    def readinto(self, buffer: Any, /) -> int:
        if self.wanted < self.place:
            self._begin()
        while self.place < self.wanted and self.take(min(self.wanted - self.place, 1 << 20)):
            pass
        data = self.take(len(buffer))
        buffer[: len(data)] = data
        self.wanted = self.place
        return len(data)


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
    raw = dataset.get_item("PixelData")
    element = raw if isinstance(raw.value, bytes) else dataset["PixelData"]
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
    return DicomImage(
        dataset, syntax, little, file, available, 0xFFFFFFFF if syntax not in NATIVE else available, _vr_of_bytes(str(element.VR))
    )


def _syntax(dataset: Dataset) -> str:
    if syntax := (getattr(dataset, "file_meta", None) or {}).get("TransferSyntaxUID"):
        return str(syntax)
    implicit, little = dataset.original_encoding  # what pydicom guessed, or (None, None) where it was made in memory
    return IMPLICIT if implicit else BIG_ENDIAN if little is False else EXPLICIT
