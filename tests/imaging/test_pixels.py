"""PNG, JPEG and arrays to pixels, and pixels to the model's input, against the reference bit for bit."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

from pmclip_deploy.errors import InputError
from pmclip_deploy.imaging.picture import MAX_PIXELS
from pmclip_deploy.imaging.preprocess import resized, tensor_from_pixels
from pmclip_deploy.imaging.raster import picture_from_array
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.spec import Preprocess
from tests.golden.make import CASES, HERE, MEAN, STD, pattern


def preprocess(resize, size=24):
    return Preprocess(size=size, resize=resize, mean=MEAN, std=STD)


# --- the model's input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "resize", "size", "height", "width"), CASES)
def test_tensor_has_the_golden_hash(mode, resize, size, height, width):
    golden = json.loads((HERE / "preprocess.json").read_text())[f"{mode}_{resize}_{size}_{height}x{width}"]
    tensor = tensor_from_pixels(pattern(height, width, 1 if mode == "gray" else 3), preprocess(resize, size))
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    assert sha256(tensor.tobytes()).hexdigest() == golden


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("size", [224, 256, 336])
@pytest.mark.parametrize("shape", [(480, 640), (641, 479), (224, 224), (300, 301), (17, 1000), (1000, 17), (1, 1)])
def test_tensor_equals_open_clip(resize, size, shape):
    pytest.importorskip("torchvision")
    open_clip = pytest.importorskip("open_clip")
    pixels = pattern(*shape, 3)
    transform = open_clip.transform.image_transform(size, is_train=False, mean=MEAN, std=STD, resize_mode=resize, interpolation="bicubic")
    reference = transform(Image.fromarray(pixels)).numpy()
    np.testing.assert_array_equal(tensor_from_pixels(pixels, preprocess(resize, size)), reference)


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("shape", [(200, 333), (333, 200), (64, 64)])
def test_one_gray_channel_equals_three(resize, shape):
    gray = pattern(*shape, 1)
    rgb = np.stack([gray] * 3, axis=-1)
    assert resized(gray, preprocess(resize)).shape == (24, 24)
    np.testing.assert_array_equal(np.stack([resized(gray, preprocess(resize))] * 3, axis=-1), resized(rgb, preprocess(resize)))
    np.testing.assert_array_equal(tensor_from_pixels(gray, preprocess(resize)), tensor_from_pixels(rgb, preprocess(resize)))


# --- arrays -------------------------------------------------------------------------------------------------------------------


def test_array_of_uint8_is_taken_as_it_is():
    gray, rgb = pattern(5, 7, 1), pattern(5, 7, 3)
    np.testing.assert_array_equal(picture_from_array(gray).pixels, gray)
    np.testing.assert_array_equal(picture_from_array(gray[:, :, None]).pixels, gray)
    np.testing.assert_array_equal(picture_from_array(rgb[::-1, ::-1]).pixels, rgb[::-1, ::-1])
    info = picture_from_array(rgb).info
    assert (info.source, info.format, info.rows, info.columns, info.window) == ("array", "array", 5, 7, None)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float32, np.float64, bool])
def test_other_numbers_are_spread_over_the_range(dtype):
    array = np.array([[0, 1], [1, 0]], dtype) if dtype is bool else np.array([[100, 200], [300, 400]], dtype)
    picture = picture_from_array(array)
    assert picture.pixels.min() == 0
    assert picture.pixels.max() == 255
    if dtype is not bool:
        assert picture.pixels.tolist() == [[0, 85], [170, 255]]
        assert picture.info.window == (250.5, 301.0)


def test_spread_leaves_out_what_is_not_finite():
    assert picture_from_array(np.array([[np.nan, -np.inf], [10.0, 20.0]])).pixels.tolist() == [[0, 0], [0, 255]]
    assert picture_from_array(np.array([[-1e308, 1e308]])).pixels.tolist() == [[0, 255]]
    assert picture_from_array(np.full((2, 2), 7.0)).pixels.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    "array",
    [np.zeros(5), np.zeros((0, 5), np.uint8), np.zeros((2, 2, 4), np.uint8), np.zeros((2, 3, 3), np.uint16), np.zeros((2, 2), complex),
     np.full((2, 2), np.nan), np.array([["a"]]), np.array([[object()]]), np.zeros((1, 2, 3, 4), np.uint8), None],
)  # fmt: skip
def test_array_without_a_picture_is_refused(array):
    with pytest.raises(InputError):
        picture_from_array(array)


# --- PNG and JPEG -------------------------------------------------------------------------------------------------------------


def saved(tmp_path, image, name="p", **options):
    path = tmp_path / name
    image.save(path, **({"format": "PNG"} | options))
    return path


def test_format_is_told_by_content(tmp_path):
    picture = picture_from_path(saved(tmp_path, Image.fromarray(pattern(6, 8, 3)), "wrong.dcm"))
    assert picture.info.format == "png"
    np.testing.assert_array_equal(picture.pixels, pattern(6, 8, 3))
    picture = picture_from_path(str(saved(tmp_path, Image.fromarray(pattern(6, 8, 3)), "wrong.png", format="JPEG")))
    info = picture.info
    assert (info.format, info.source, info.rows, info.columns) == ("jpeg", str(tmp_path / "wrong.png"), 6, 8)


def test_gray_stored_as_colour_becomes_one_channel(tmp_path):
    gray = pattern(6, 8, 1)
    np.testing.assert_array_equal(picture_from_path(saved(tmp_path, Image.fromarray(gray).convert("RGB"))).pixels, gray)


def test_16_bit_png_is_not_clipped(tmp_path):
    array = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    picture = picture_from_path(saved(tmp_path, Image.fromarray(array)))
    np.testing.assert_array_equal(picture.pixels, np.floor(array / 63000 * 255 + 0.5))
    assert picture.info.window == (31500.5, 63001.0)


def test_alpha_lies_over_black(tmp_path):
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 0]]], np.uint8)
    assert picture_from_path(saved(tmp_path, Image.fromarray(rgba))).pixels.tolist() == [[[200, 100, 50], [0, 0, 0]]]
    la = np.array([[[200, 255], [200, 0]]], np.uint8)
    assert picture_from_path(saved(tmp_path, Image.fromarray(la, "LA"))).pixels.tolist() == [[200, 0]]


def test_palettes_bilevel_and_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    assert picture_from_path(saved(tmp_path, image)).pixels.tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert picture_from_path(saved(tmp_path, image, transparency=1)).pixels.tolist() == [[[10, 20, 30], [0, 0, 0]]]
    assert picture_from_path(saved(tmp_path, Image.fromarray(np.array([[True, False]])))).pixels.tolist() == [[255, 0]]


def test_exif_orientation_and_cmyk(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    left_dark = np.kron(np.array([[0, 255]], np.uint8), np.ones((16, 16), np.uint8))
    pixels = picture_from_path(saved(tmp_path, Image.fromarray(left_dark), format="JPEG", exif=exif)).pixels
    assert pixels.shape == (32, 16)
    assert pixels[0, 0] < 5
    assert pixels[-1, -1] > 250
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(picture_from_path(saved(tmp_path, cmyk, format="JPEG")).pixels[0, 0], (255, 0, 0), atol=3)


def png_claiming(width, height):
    def chunk(kind, body):
        return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">2L5B", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_broken_and_oversized_files_are_refused(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(pattern(40, 40, 3)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    pngs = [png_claiming(60000, 60000), png_claiming(1 << 13, (1 << 13) + 1), png_claiming(50, 50), png_claiming(0, 5)]
    for content in (*pngs, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", jpeg[: len(jpeg) // 2], jpeg[:20]):
        path = tmp_path / "broken"
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            picture_from_path(path)
        assert "\n" not in str(caught.value)
    assert MAX_PIXELS == 1 << 26


def test_frame_and_window_are_for_dicom(tmp_path):
    path = saved(tmp_path, Image.fromarray(pattern(6, 8, 1)))
    assert picture_from_path(path, frame=0).pixels.shape == (6, 8)
    with pytest.raises(InputError, match="frame 1"):
        picture_from_path(path, frame=1)
    with pytest.raises(InputError, match="window"):
        picture_from_path(path, window=(40, 400))


@pytest.mark.parametrize("content", [b"", b"a text file about a patient\n" * 20, b"%PDF-1.7", bytes(200), b"\x00"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(InputError, match="empty" if not content else "not a DICOM, PNG or JPEG file"):
        picture_from_path(path)


def test_a_jpeg_of_endless_scans(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(pattern(40, 40, 1)).save(buffer, "JPEG", progressive=True)
    jpeg = buffer.getvalue()
    last = jpeg.rfind(b"\xff\xda")
    (tmp_path / "x").write_bytes(jpeg[:last] + jpeg[last:-2] * 1000 + jpeg[-2:])
    with pytest.raises(InputError, match="scans"):
        picture_from_path(tmp_path / "x")


def test_a_png_does_not_pay_for_pydicom(tmp_path):
    path = saved(tmp_path, Image.fromarray(pattern(6, 8, 1)))
    code = """
import sys
from pmclip_deploy.imaging.read import picture_from_path
picture_from_path(sys.argv[1])
assert not {"pydicom", "gdcm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)


def test_paths_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe"):
        picture_from_path(tmp_path / "pipe")
    for path, reason in ((tmp_path / "none", "no such file"), (tmp_path, "folder"), ("\0", "cannot be opened")):
        with pytest.raises(InputError, match=reason):
            picture_from_path(path)
