"""One way in: the same picture in every form, the same limits and errors, and file objects that stay as they were."""

import gzip
import io
import logging
import os
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file

from pmclip_deploy.errors import InputError, NoPictureError, UsageError
from pmclip_deploy.imaging import images
from pmclip_deploy.imaging.images import picture_from_image
from pmclip_deploy.imaging.picture import Picture
from pmclip_deploy.imaging.raster import MAX_SCANS
from tests.golden.make import pattern

DICOM = [
    "CT_small.dcm",
    "image_dfl.dcm",
    "SC_rgb_rle.dcm",
    "rtdose.dcm",
    "MR_truncated.dcm",
    "no_meta.dcm",
    "ExplVR_BigEnd.dcm",
    "emri_small.dcm",
]
PATIENT = b"CompressedSamples"  # as CT_small names it


class Stream:
    """Gives what it holds in pieces, and cannot seek."""

    def __init__(self, content: Any, piece: int = 1000) -> None:
        self.content, self.piece, self.read_so_far = content, piece, 0

    def read(self, size: int = -1) -> Any:
        begin = self.read_so_far
        self.read_so_far = min(begin + min(size, self.piece), len(self.content))
        return self.content[begin : self.read_so_far]


class Raising(Stream):
    def read(self, size: int = -1) -> bytes:
        raise KeyError("name of a patient")


class Awaited(Stream):
    def read(self, size: int = -1) -> Any:
        return memoryview(b"")  # stands for anything that is no bytes


def outcome(image: Any, **options: Any) -> tuple[Any, ...]:
    """A picture or an error, as far as it does not depend on the form."""
    try:
        picture = picture_from_image(image, **options)
    except InputError as error:
        rest = str(error).partition(": ")[2]
        return type(error), rest
    info = picture.info
    return picture.pixels.tobytes(), picture.pixels.shape, info.format, info.window, info.frame, info.warnings, picture.header


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(pattern(40, 30, 3)) if image is None else image).save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_dicom_file_in_every_form(tmp_path: Path) -> None:
    for name in DICOM:
        path = get_testdata_file(name, download=False)
        if path is None:
            continue
        data = Path(path).read_bytes()
        (tmp_path / "z").write_bytes(gzip.compress(data))
        for options in ({}, {"frame": 1}, {"window": (40.0, 400.0)}, {"window": (1.0, 0.0)}):
            wanted = outcome(path, **options)
            with Path(path).open("rb") as file, gzip.open(tmp_path / "z") as zipped:
                for form in (Path(path), data, bytearray(data), memoryview(data), io.BytesIO(data), file, zipped, Stream(data)):
                    assert outcome(form, **options) == wanted, (name, type(form))


def test_a_broken_dicom_file_in_every_form(tmp_path: Path) -> None:
    for name in DICOM[:3]:
        whole = Path(str(get_testdata_file(name))).read_bytes()
        for cut in (1, 131, 132, 133, 200, 400, len(whole) // 2, len(whole) - 1):
            (tmp_path / "x").write_bytes(whole[:cut])
            assert outcome(whole[:cut]) == outcome(tmp_path / "x") == outcome(Stream(whole[:cut])), (name, cut)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*(("PNG", mode) for mode in ("L", "RGB", "P", "1", "LA", "I;16", "RGBA")), *(("JPEG", mode) for mode in ("L", "RGB", "CMYK"))],
)
def test_a_raster_file_in_every_form(tmp_path: Path, kind: str, mode: str) -> None:
    image = (
        Image.fromarray(pattern(40, 30, 1).astype(np.uint16) * 200) if mode == "I;16" else Image.fromarray(pattern(40, 30, 3)).convert(mode)
    )
    data = encoded(kind, image)
    path = tmp_path / "misnamed.dcm"
    path.write_bytes(data)
    wanted = outcome(path)
    with path.open("rb") as file, path.open("rb", buffering=0) as raw, tempfile.SpooledTemporaryFile() as spooled, Image.open(path) as lazy:
        spooled.write(data)
        spooled.seek(0)
        loaded = Image.open(io.BytesIO(data))
        loaded.load()
        for form in (data, io.BytesIO(data), file, raw, spooled, Stream(data), lazy, loaded, lazy):
            assert outcome(form) == wanted, type(form)
    array = outcome(picture_from_image(path).pixels)
    assert array[:2] == wanted[:2]
    assert outcome(data, frame=1) == outcome(path, frame=1) == outcome(loaded, frame=1) and outcome(loaded, frame=1)[0] is InputError
    assert (
        outcome(data, window=(1, 2))
        == outcome(path, window=(1, 2))
        == outcome(loaded, window=(1, 2))
        == outcome(pattern(4, 4, 1), window=(1, 2))
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_nothing_of_an_exif_tag_is_logged(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "SECRETNAME"  # Orientation, Artist
    data = encoded(kind, exif=exif)
    with caplog.at_level(logging.DEBUG):
        Image.open(io.BytesIO(data)).getexif()
        assert "SECRETNAME" in caplog.text  # else the test holds nothing
        opened = Image.open(io.BytesIO(data))  # by the caller: what Pillow logs here is theirs
        caplog.clear()
        picture_from_image(data)
        picture_from_image(opened)
    assert "SECRETNAME" not in caplog.text


def test_a_pil_image_is_turned_as_its_exif_says_and_stays_as_it_was() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded("JPEG", exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        assert outcome(image) == outcome(data) and picture_from_image(image).pixels.shape[:2] == (30, 40)
        assert image.size == (30, 40) and image.getexif()[0x0112] == 6
    made = Image.fromarray(pattern(6, 8, 1))
    info = picture_from_image(made).info
    assert (info.source, info.format, info.rows, info.columns) == ("PIL image", "array", 6, 8)


def test_what_has_no_path_is_named_by_its_kind() -> None:
    data, dataset = encoded("PNG"), dcmread(str(get_testdata_file("CT_small.dcm")))
    forms = [data, bytearray(data), io.BytesIO(data), Stream(data), Image.open(io.BytesIO(data)), np.zeros((2, 2), np.uint8), dataset]
    names = ["bytes", "bytes", "BytesIO", "Stream", "PIL image", "array", "dataset"]
    assert [picture_from_image(form).info.source for form in forms] == names


def test_a_file_object_is_read_from_where_it_stands_and_put_back_there(tmp_path: Path) -> None:
    data = encoded("PNG")
    (tmp_path / "x").write_bytes(b"before" + data)
    with (tmp_path / "x").open("rb") as file:
        file.seek(6)
        assert outcome(file) == outcome(file) == outcome(data)
        assert file.tell() == 6 and not file.closed
        file.seek(0)
        with pytest.raises(NoPictureError, match=r"^BufferedReader: is not a DICOM, PNG or JPEG file"):
            picture_from_image(file)
        assert file.tell() == 0
        file.seek(0, os.SEEK_END)
        with pytest.raises(InputError, match=r"^BufferedReader: is empty; "):
            picture_from_image(file)
    read, write = os.pipe()
    with os.fdopen(write, "wb") as into:
        into.write(data)
    with os.fdopen(read, "rb") as pipe:
        assert outcome(pipe) == outcome(data) and not pipe.closed
        with pytest.raises(InputError, match=r"is empty"):  # it stays at its end
            picture_from_image(pipe)


def refused(image: Any, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        picture_from_image(image)
    assert "\n" not in str(caught.value) and "patient" not in str(caught.value) and caught.value.hint


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    closed = io.BytesIO(b"x")
    closed.close()
    refused(b"", "^bytes: is empty; ")
    refused(memoryview(b""), "^bytes: is empty; ")
    refused(io.BytesIO(), "^BytesIO: is empty; ")
    refused(closed, "^BytesIO: is closed; ")
    refused(io.StringIO("text"), "^StringIO: its read\\(\\) gives str, not bytes; ")
    refused(io.StringIO(""), "^StringIO: its read\\(\\) gives str, not bytes; ")
    refused(Raising(b"x"), "^Raising: cannot be read; ")
    refused(Awaited(b"x"), "^Awaited: its read\\(\\) gives memoryview, not bytes; ")
    with (tmp_path / "w").open("wb") as file:
        refused(file, "^BufferedWriter: cannot be read; ")
    refused(encoded("PNG")[:-30], "^bytes: the PNG file is broken")
    refused(Image.open(io.BytesIO(encoded("PNG")[:-300])), "^PIL image: its pixels cannot be read")
    refused(Image.new("L", (0, 5)), "^PIL image: 0 x 5 has no pixels")
    with Image.open(io.BytesIO(encoded("PNG"))) as image:
        pass
    refused(image, "^PIL image: its pixels cannot be read")
    with pytest.raises(UsageError, match=r"an image is a path, bytes, .*, not a int"):
        picture_from_image(3)  # type: ignore[arg-type]


def test_limits_hold_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">2L5B", 1 << 13, (1 << 13) + 1, 8, 0, 0, 0, 0))
    huge = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    array = np.broadcast_to(np.uint8(0), ((1 << 13) + 1, 1 << 13))
    for form in (huge, io.BytesIO(huge), Stream(huge), Image.open(io.BytesIO(huge)), array, array.astype(bool)):
        refused(form, "8192 x 8193 is more than 67108864 pixels; make it smaller")
    jpeg = encoded("JPEG", progressive=True)
    last = jpeg.rfind(b"\xff\xda")
    endless = jpeg[:last] + jpeg[last:-2] * (MAX_SCANS + 1) + jpeg[-2:]
    for form in (endless, Stream(endless), Image.open(io.BytesIO(endless))):
        refused(form, "more than 200 progressive scans")
    monkeypatch.setattr(images, "MAX_BYTES", 5000)
    refused(Stream(bytes(10**9)), "^Stream: holds more than")
    refused(io.BytesIO(bytes(5001)), "^BytesIO: holds more than")


def test_no_patient_is_named() -> None:
    path = str(get_testdata_file("CT_small.dcm"))
    assert PATIENT in Path(path).read_bytes()
    picture = picture_from_image(path)
    assert repr(picture) == "Picture(128 x 128, dicom)" and isinstance(picture, Picture)
    for form in (Path(path).read_bytes()[:3000], io.BytesIO(Path(path).read_bytes()[:3000])):
        with pytest.raises(InputError) as caught:
            picture_from_image(form)
        assert PATIENT.decode() not in str(caught.value)
