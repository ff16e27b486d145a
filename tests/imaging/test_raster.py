"""PNG and JPEG files whose samples are wider than Pillow hands on, and files that hold less than their header says."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pmclip_deploy.errors import InputError
from pmclip_deploy.imaging.images import picture_from_image
from pmclip_deploy.imaging.picture import Picture
from pmclip_deploy.imaging.read import picture_from_bytes
from tests.golden.make import pattern, pattern12
from tests.imaging.test_budgets import dicom, encapsulated, image

# the first row and column of each pass, and its step down and across
ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> PNG's colour type


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))


def png(values: NDArray[Any], *before: bytes, interlaced: bool = False, filtered: int = 0, rows: int | None = None) -> bytes:
    """A PNG file of (H, W) or (H, W, C), u8 or u16, with chunks before its data; ``rows`` more or fewer may be claimed."""
    values = values.reshape(*values.shape[:2], -1)
    wide = values.astype(values.dtype.newbyteorder(">"))
    lines = b""
    for top, left, down, across in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        part = np.ascontiguousarray(wide[top::down, left::across])
        data = part.view(np.uint8).reshape(len(part), -1) if part.size else np.zeros((0, 0), np.uint8)
        above = np.vstack([np.zeros_like(data[:1]), data[:-1]])
        lines += b"".join(bytes([filtered]) + line.tobytes() for line in (data - above if filtered == 2 else data))
    size = (values.shape[1], rows or values.shape[0], 8 * values.dtype.itemsize, COLOR_TYPES[values.shape[2]], 0, 0, int(interlaced))
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2L5B", *size)) + b"".join(before)
    return head + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def jpeg(image: NDArray[np.uint8], mode: str = "", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image).convert(mode) if mode else Image.fromarray(image)).save(buffer, "JPEG", **{"quality": 90} | options)
    return buffer.getvalue()


def forms(data: bytes, tmp_path: Path) -> list[Any]:
    (tmp_path / "x").write_bytes(data)
    return [tmp_path / "x", data, io.BytesIO(data), Image.open(io.BytesIO(data))]


GREY12 = pattern12()
OPAQUE = np.full_like(GREY12, 65535)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("filtered", [0, 2])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colours_and_alpha_are_the_picture_of_16_bit_gray(tmp_path: Path, channels: int, filtered: int, interlaced: bool) -> None:
    wanted = picture_from_image(png(GREY12))
    assert len(np.unique(wanted.pixels)) == 256 and wanted.info.window == (2047.5, 4095)
    planes = {2: [GREY12, OPAQUE], 3: [GREY12] * 3, 4: [GREY12] * 3 + [OPAQUE]}[channels]
    for form in forms(png(np.dstack(planes), filtered=filtered, interlaced=interlaced), tmp_path):
        found = picture_from_image(form)
        assert np.array_equal(found.pixels, wanted.pixels) and found.info.window == wanted.info.window, type(form)


def test_16_bit_colours_share_one_window_and_lie_over_black() -> None:
    colors = np.dstack([GREY12, 4095 - GREY12, np.full_like(GREY12, 2000)])
    colors[20, :2] = [[0, 1, 2], [3, 4, 4095]]
    wanted = np.floor(colors * (255 / 4095) + 0.5).astype(np.uint8)
    assert np.array_equal(picture_from_image(png(colors)).pixels, wanted)
    alpha = np.full_like(GREY12, 65535)
    alpha[:8], alpha[8:16] = 0, 32768
    shown = np.floor(wanted * (alpha / 65535)[:, :, None] + 0.5).astype(np.uint8)
    assert np.array_equal(picture_from_image(png(np.dstack([colors, alpha]))).pixels, shown)
    deep = np.dstack([np.where(alpha > 0, GREY12, 65535), alpha]).astype(np.uint16)  # what is clear does not count for the window
    assert picture_from_image(png(deep)).info.window == (2048, 4094)
    assert not picture_from_image(png(np.dstack([GREY12, OPAQUE * 0]))).pixels.any()


def test_16_bit_values_that_are_transparent_lie_over_black() -> None:
    values = np.array([[1000, 2000], [3000, 40000]], np.uint16)
    assert picture_from_image(png(values, chunk(b"tRNS", struct.pack(">H", 40000)))).pixels.tolist() == [[0, 128], [255, 0]]
    colors = np.dstack([values, values, values])
    clear = chunk(b"tRNS", struct.pack(">3H", 40000, 40000, 40000))
    assert picture_from_image(png(colors, clear)).pixels.tolist() == [[0, 128], [255, 0]]
    near = chunk(b"tRNS", struct.pack(">3H", 40000, 40000, 40001))  # the same 8 bits, another colour
    assert picture_from_image(png(colors, near)).pixels[1, 1] == 255


def test_16_bit_png_is_turned_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = chunk(b"eXIf", exif.tobytes()[6:])
    colors = np.dstack([GREY12, 4095 - GREY12, GREY12 // 2])
    upright = picture_from_image(png(colors)).pixels
    assert np.array_equal(picture_from_image(png(colors, turned)).pixels, np.rot90(upright, -1))


def test_8_bit_png_stays_as_it_is() -> None:
    for values in (pattern(40, 30, 1) // 16, pattern(40, 30, 3) // 16):
        for interlaced in (False, True):
            assert np.array_equal(picture_from_image(png(values, interlaced=interlaced)).pixels, values)
    dim = np.dstack([pattern(40, 30, 1), np.full((40, 30), 128, np.uint8)])
    assert picture_from_image(png(dim)).pixels.max() == 128


def test_16_bit_colours_that_pillow_cuts_are_refused_in_other_formats() -> None:
    tags = [(256, 3, 1, 4), (257, 3, 1, 2), (258, 3, 3, 0), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, 0), (277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 1, 48)]
    end = 8 + 2 + 12 * len(tags) + 4
    at = {258: end, 273: end + 6}
    directory = b"".join(struct.pack("<2H2L", tag, kind, count, at.get(tag, value)) for tag, kind, count, value in tags)
    values = np.arange(24, dtype="<u2") * 100
    tiff = b"II*\0" + struct.pack("<LH", 8, len(tags)) + directory + bytes(4) + struct.pack("<3H", 16, 16, 16) + values.tobytes()
    with pytest.raises(InputError, match=r"^PIL image: Pillow would cut its 16-bit colours to 8 bits; "):
        picture_from_image(Image.open(io.BytesIO(tiff)))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_wide_pil_images_keep_their_levels(mode: str) -> None:
    values = GREY12.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}[mode])
    image = Image.frombytes(mode, (GREY12.shape[1], GREY12.shape[0]), values.tobytes())
    assert np.array_equal(picture_from_image(image).pixels, picture_from_image(png(GREY12)).pixels)


# --- less than the header says ------------------------------------------------------------------------------------------------


def with_rows(data: bytes, rows: int) -> bytes:
    """A JPEG whose frame header says other rows."""
    at = next(at for at in range(2, len(data)) if data[at] == 0xFF and data[at + 1] in (0xC0, 0xC1, 0xC2))
    return data[: at + 5] + struct.pack(">H", rows) + data[at + 7 :]


def ended(data: bytes, share: float) -> bytes:
    """A JPEG whose scan data ends early, with an end marker."""
    start = data.rindex(b"\xff\xda")
    return data[: start + int((len(data) - start) * share)].rstrip(b"\xff") + b"\xff\xd9"


KINDS: dict[str, dict[str, Any]] = {
    "RGB": {},
    "gray": {"mode": "L"},
    "4:4:4": {"subsampling": 0},
    "optimized": {"optimize": True},
    "CMYK": {"mode": "CMYK"},
    "progressive": {"progressive": True},
    "progressive gray": {"progressive": True, "mode": "L"},
    "restarts": {"restart_marker_rows": 1},
    "restarts of blocks": {"restart_marker_blocks": 3},
    "progressive restarts": {"progressive": True, "restart_marker_rows": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_of_more_rows_than_data(tmp_path: Path, kind: str) -> None:
    whole = jpeg(pattern(96, 96, 3), **KINDS[kind])
    shown = picture_from_image(whole)
    assert shown.pixels.shape[0] == 96 and not shown.info.warnings
    for broken in (with_rows(whole, 4096), with_rows(whole, 200), with_rows(whole, 128), ended(whole, 0.5), ended(whole, 0.9)):
        for form in forms(broken, tmp_path):
            with pytest.raises(InputError, match="is cut short or its header lies: its data does not fill its rows; "):
                picture_from_image(form)


@pytest.mark.parametrize("level", [0, 127, 128, 255])
@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_of_one_level_is_whole(kind: str, level: int) -> None:
    """Also of the level that libjpeg fills with."""
    options = dict(KINDS[kind])
    flat = np.full((70, 53, 3), level, np.uint8)
    assert not picture_from_image(jpeg(flat, **options)).info.warnings
    flat[:40] = pattern(40, 53, 3)
    assert picture_from_image(jpeg(flat, **options)).pixels.shape[:2] == (70, 53)


def test_a_jpeg_whose_restart_interval_is_missing() -> None:
    whole = jpeg(pattern(96, 96, 3), restart_marker_rows=1)
    first, second = whole.index(b"\xff\xd0"), whole.index(b"\xff\xd1")
    for broken in (whole[:first] + whole[second:], whole[: first + 2] + whole[second:]):  # with its marker, and without
        with pytest.raises(InputError, match="does not fill its rows"):
            picture_from_image(broken)


def test_a_jpeg_in_a_dicom_file_of_more_rows_than_data() -> None:
    whole = jpeg(pattern(96, 96, 3), mode="L")
    for broken, rows in ((whole, 96), (with_rows(whole, 200), 200), (ended(whole, 0.6), 96)):
        data = dicom(image(rows, 8, columns=96) + encapsulated(broken), b"1.2.840.10008.1.2.4.50")
        if broken is whole:
            assert picture_from_image(data).pixels.shape == (96, 96)
            continue
        with pytest.raises(InputError, match="its data does not fill its rows"):
            picture_from_image(data)


def test_a_progressive_jpeg_of_a_camera_is_read() -> None:
    buffer = io.BytesIO()
    Image.new("L", (8688, 5792), 90).save(buffer, "JPEG", progressive=True)
    assert picture_from_bytes("x", buffer.getvalue()).pixels.shape == (5792, 8688)


def test_a_progressive_jpeg_cut_between_scans() -> None:
    whole = jpeg(pattern(96, 96, 3), progressive=True)
    starts = [at for at in range(len(whole)) if whole[at : at + 2] == b"\xff\xda"]
    assert len(starts) > 5
    for start in starts[1:]:
        picture = picture_from_image(whole[:start] + b"\xff\xd9")
        assert picture.info.warnings == ("the JPEG lacks its last scans: fine detail is missing",)
    assert isinstance(picture, Picture)
    first = whole.index(b"\xff\xda")  # of luma alone, by another encoder
    assert whole[first + 4] == 3
    head = whole[: first + 2] + b"\0\x08\x01" + whole[first + 5 : first + 7] + whole[first + 11 : first + 14]
    with pytest.raises(InputError, match="does not fill its rows"):
        picture_from_image(head + whole[first + 14 : starts[1]] + b"\xff\xd9")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("values", [pattern(40, 30, 1), pattern(40, 30, 3), GREY12, np.dstack([GREY12] * 3)])
def test_a_png_of_more_rows_than_data(tmp_path: Path, values: NDArray[Any], interlaced: bool) -> None:
    whole = png(values, interlaced=interlaced)
    for broken in (png(values, interlaced=interlaced, rows=len(values) + 1), png(values, interlaced=interlaced, rows=4000), whole[:-40]):
        for form in forms(broken, tmp_path):
            with pytest.raises(InputError, match=r": (the PNG file is broken|its pixels cannot be read|it is cut short)"):
                picture_from_image(form)


def test_a_png_whose_last_rows_are_black_is_whole() -> None:
    for values in (pattern(40, 30, 1), pattern(40, 30, 3), np.dstack([GREY12] * 3)):
        values = np.vstack([values, values * 0])
        for interlaced in (False, True):
            assert picture_from_image(png(values, interlaced=interlaced)).pixels.shape[0] == len(values)


def test_what_a_device_appends_is_left_out() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = jpeg(pattern(96, 64, 3), exif=exif)
    notes = b"".join(bytes((0xFF, kind, 0xFF, 0xFE)) + bytes(0xFFFC) for kind in (0xE2, 0xED, 0xFE)) * 10
    fill = b"\xff" * 7
    wanted = picture_from_image(whole).pixels
    for data in (whole[:2] + notes + whole[2:], whole[:2] + fill + whole[2:], whole + bytes(1 << 20), whole + whole):
        assert np.array_equal(picture_from_image(data).pixels, wanted)
    dull = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 20))) * 100
    animated = chunk(b"acTL", struct.pack(">2L", 1, 0)) + chunk(b"fcTL", struct.pack(">5L2H2B", 0, 30, 40, 0, 0, 1, 1, 0, 0))
    values = pattern(40, 30, 3)
    for before in (dull, animated, chunk(b"iCCP", bytes(1 << 20)), chunk(b"prVt", bytes(1 << 22))):
        assert np.array_equal(picture_from_image(png(values, before)).pixels, values)
