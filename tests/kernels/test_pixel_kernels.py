"""The kernels for large pictures give what Pillow and NumPy give, bit for bit, and the runtime says the same with and without them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pmclip_deploy.imaging.decoders.layout import Layout, native_samples
from pmclip_deploy.imaging.decoders.rle import _unpack_bits
from pmclip_deploy.imaging.dicom import picture_from_dicom
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.kernels import pixels as kernels

pytestmark = pytest.mark.skipif(kernels.library is None, reason="no compiled kernel")

SIZES = [(2500, 2048, 256, 256), (2500, 2048, 273, 224), (2048, 2500, 224, 273), (1024, 1024, 224, 224), (300, 290, 224, 224),
         (225, 900, 224, 23), (777, 501, 17, 31), (226, 225, 225, 224), (700, 400, 100, 100)]  # fmt: skip


def picture(seed: int, *shape: int, edges: bool = False) -> Any:
    random = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return (random >> 7) * np.uint8(255) if edges else random  # over- and undershoot everywhere


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize(("height", "width", "rows", "columns"), SIZES)
@pytest.mark.parametrize("threads", [1, 3])
def test_bicubic_is_pillows(height: int, width: int, rows: int, columns: int, edges: bool, threads: int) -> None:
    large = picture(height, height, width, edges=edges)
    small = kernels.bicubic(large, rows, columns, threads)
    assert small is not None
    np.testing.assert_array_equal(small, np.asarray(Image.fromarray(large).resize((columns, rows), Image.Resampling.BICUBIC)))


@settings(max_examples=60, deadline=None)
@given(st.integers(17, 700), st.integers(17, 700), st.integers(1, 400), st.integers(1, 400), st.integers(0, 9))
def test_bicubic_of_any_size_is_pillows_or_left_to_it(height: int, width: int, rows: int, columns: int, seed: int) -> None:
    large = picture(seed, height, width)
    small = kernels.bicubic(large, rows, columns)
    if small is None:
        assert rows >= height or columns >= width or min(rows, columns) < 16 or height - rows > 2 * (width - columns)
    else:
        np.testing.assert_array_equal(small, np.asarray(Image.fromarray(large).resize((columns, rows), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("threads", [1, 3])
def test_look_up_is_numpys(threads: int) -> None:
    random = np.random.default_rng(0)
    values, table = random.integers(0, 65536, (1201, 997), dtype=np.uint16), random.integers(0, 256, 65536, dtype=np.uint8)
    np.testing.assert_array_equal(kernels.look_up(values, table, threads), table[values])


def packed(data: bytes) -> bytes:
    """PackBits by the letter of PS3.5 G.3.1, runs of two and more, with a byte that says nothing here and there."""
    out, at = bytearray(), 0
    while at < len(data):
        run = 1
        while at + run < len(data) and run < 128 and data[at + run] == data[at]:
            run += 1
        if run > 1:
            out += bytes([257 - run, data[at]])
            at += run
        else:
            end = at + 1
            while end < len(data) and end - at < 128 and data[end] != data[end - 1]:
                end += 1
            out += bytes([end - at - 1]) + data[at:end]
            at = end
        if at % 3 == 0:
            out += b"\x80"
    return bytes(out)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 255), st.integers(1, 300)), min_size=1, max_size=20), st.integers(1, 3), st.integers(0, 4))
def test_unpack_bits(runs: list[tuple[int, int]], stride: int, padding: int) -> None:
    data = b"".join(bytes([value]) * count for value, count in runs)
    code = np.frombuffer(packed(data) + b"\x00" * padding, np.uint8)
    out = np.full((len(data), stride), 77, np.uint8)
    assert kernels.unpack_bits(code, out[:, 0])
    assert out[:, 0].tobytes() == data and (out[:, 1:] == 77).all()
    short = np.full(len(data) + 1, 77, np.uint8)
    if not padding:
        assert not kernels.unpack_bits(code, short)  # one byte too few


@pytest.mark.parametrize("code", [b"", b"\x05", b"\x05abc", b"\xfe", b"\x80" * 9])
def test_unpack_bits_that_end_too_soon(code: bytes) -> None:
    assert not kernels.unpack_bits(np.frombuffer(code, np.uint8), np.empty(4, np.uint8))


@pytest.mark.parametrize("backbone", ["pmclip-lite", "ViT-B/32"])
@pytest.mark.parametrize("signed", [False, True])
def test_the_runtime_says_the_same_without_them(backbone: str, signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from pmclip_deploy.benchmarks.stages import dataset_from_stored, radiograph_from_ct

    stored = radiograph_from_ct(1300, 1100)
    dataset = dataset_from_stored(stored)
    if signed:
        dataset.PixelRepresentation, dataset.RescaleIntercept, dataset.RescaleSlope = 1, -1000, 1
        dataset.PixelData = (stored.astype(np.int16) - 2048).tobytes()
        dataset.BitsStored, dataset.HighBit = 16, 15
    dataset.compress("1.2.840.10008.1.2.5", encoding_plugin="pydicom")
    preprocess = pytest.importorskip("pmclip_deploy.train.backbones", exc_type=ImportError).BACKBONES[backbone].preprocess
    with_kernels = tensor_from_pixels(picture_from_dicom(dataset).pixels, preprocess)
    used = []
    for name in ("bicubic", "look_up", "unpack_bits"):
        monkeypatch.setattr(kernels, name, lambda *_, name=name: used.append(name))
    without = tensor_from_pixels(picture_from_dicom(dataset).pixels, preprocess)
    assert set(used) == {"bicubic", "look_up", "unpack_bits"}
    np.testing.assert_array_equal(with_kernels, without)


def test_stored_bits_alone_count() -> None:
    layout = Layout(2, 2, 1, 16, 12, 11, False, "MONOCHROME2", 0)
    clean, overlaid = np.array([[0, 1], [2, 4095]], "<u2"), np.array([[0, 1], [2, 0xF000 | 4095]], "<u2")
    np.testing.assert_array_equal(native_samples(clean, layout), clean)
    np.testing.assert_array_equal(native_samples(overlaid, layout), clean)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=60), st.integers(1, 300))
def test_broken_runs_are_taken_as_pillow_takes_them(code: bytes, count: int) -> None:
    ours, pillows = np.zeros(count, np.uint8), np.zeros(count, np.uint8)
    enough = kernels.unpack_bits(np.frombuffer(code, np.uint8), ours)
    assert enough == _unpack_bits(code, 0, len(code), pillows)
    if enough:
        np.testing.assert_array_equal(ours, pillows)
