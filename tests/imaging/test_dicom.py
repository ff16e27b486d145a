"""DICOM to pixels: against the standard's formulas, across transfer syntaxes, and what must be refused."""

import logging
import socket
import subprocess
import sys
import warnings
import zlib
from math import exp
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import UID

from pmclip_deploy import process
from pmclip_deploy.errors import InputError
from pmclip_deploy.imaging import dicom
from pmclip_deploy.imaging.decoders import frame as frames_module
from pmclip_deploy.imaging.decoders import jpeg2000
from pmclip_deploy.imaging.decoders.frame import CODECS, samples_from_codestream
from pmclip_deploy.imaging.decoders.layout import Layout, Refused
from pmclip_deploy.imaging.dicom import picture_from_dicom
from pmclip_deploy.imaging.dicom_file import NATIVE
from pmclip_deploy.imaging.read import picture_from_path
from tests.golden.make import HERE, pattern, pattern12

IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED = NATIVE
JPEG_LOSSLESS, JPEG_LOSSLESS_1, JPEG_LS, J2K, RLE = (f"1.2.840.10008.1.2.{tail}" for tail in ("4.57", "4.70", "4.80", "4.90", "5"))
HTJ2K = ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203")
SECRET = "SECRETNAME"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a test tried to reach the network")

    monkeypatch.setattr(socket, "socket", refuse)


def shipped(name):
    """A file inside pydicom's wheel."""
    return get_testdata_file(name, download=False)


def shipped_names():
    return sorted(path.name for path in (Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm"))


def dataset(array, syntax=EXPLICIT, **elements):
    """A dataset in memory: (H, W), (H, W, 3) or, with NumberOfFrames, one axis more in front."""
    array = np.asarray(array)
    frames = elements.get("NumberOfFrames")
    shape = array.shape[1:] if frames else array.shape
    bits = 8 * array.dtype.itemsize
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientName, ds.PatientID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3", SECRET, SECRET
    ds.Modality, ds.Rows, ds.Columns = "OT", shape[0], shape[1]
    ds.SamplesPerPixel = 3 if len(shape) == 3 else 1
    ds.PhotometricInterpretation = "RGB" if len(shape) == 3 else "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.PixelRepresentation = bits, elements.get("BitsStored", bits), int(array.dtype.kind == "i")
    ds.HighBit = ds.BitsStored - 1
    if len(shape) == 3:
        ds.PlanarConfiguration = 0
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    data = array.astype(array.dtype.newbyteorder(">" if syntax == BIG_ENDIAN else "<")).tobytes()
    if syntax == BIG_ENDIAN and bits == 8:
        data = np.frombuffer(data + bytes(len(data) % 2), "u2").byteswap().tobytes()  # OW
    ds.PixelData = data + bytes(len(data) % 2)
    ds["PixelData"].VR = "OW"
    return ds


def saved(ds, path, preamble=True):
    ds.save_as(path, enforce_file_format=preamble)
    return path


def written(ds, path):
    """Without pydicom's checks on writing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return saved(ds, path)


def refused(source, match, **options):
    with pytest.raises(InputError, match=match) as caught:
        picture_from_dicom(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    assert ";" in message  # what to do next
    return message


# --- windows: an oracle written from PS3.3 C.11.2 alone -----------------------------------------------------------------------


def oracle(x, center, width, function="LINEAR"):
    """C.11.2.1.2.1, C.11.2.1.3.1 and C.11.2.1.3.2, with ymin 0 and ymax 255, to the nearest grey."""
    if function == "LINEAR":
        if x <= center - 0.5 - (width - 1) / 2:
            y = 0.0
        elif x > center - 0.5 + (width - 1) / 2:
            y = 255.0
        else:
            y = ((x - (center - 0.5)) / (width - 1) + 0.5) * 255
    elif function == "LINEAR_EXACT":
        y = 0.0 if x <= center - width / 2 else 255.0 if x > center + width / 2 else ((x - center) / width + 0.5) * 255
    else:
        y = 255 / (1 + exp(-4 * (x - center) / width))
    return y


def assert_close_to_oracle(pixels, stored, slope, intercept, *window, inverse=False):
    expected = np.array([oracle(float(x) * slope + intercept, *window) for x in stored.ravel().tolist()]).reshape(stored.shape)
    expected = 255 - expected if inverse else expected
    assert np.abs(pixels - expected).max() <= 0.5 + 1e-9  # rounded to the nearest; either way at a tie


STORED = {
    "u8": np.arange(256, dtype=np.uint8).reshape(16, 16),
    "i8": np.arange(-128, 128, dtype=np.int8).reshape(16, 16),
    "u12": np.arange(0, 4096, 5, dtype=np.uint16).reshape(20, -1),
    "u16": np.arange(0, 65536, 61, dtype=np.uint16).reshape(25, -1),
    "i16": np.arange(-32768, 32768, 61, dtype=np.int16).reshape(25, -1),
    "u32": np.arange(0, 2**32, 2**32 // 480, dtype=np.int64).astype(np.uint32)[:480].reshape(20, -1),
    "i32": np.arange(-(2**31), 2**31, 2**32 // 480, dtype=np.int64).astype(np.int32)[:480].reshape(20, -1),
}


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (1, -1024), (0.25, 7.5), (-2, 100)])
def test_window_equals_the_standard(kind, function, slope, intercept):
    stored = STORED[kind]
    values = stored.astype(float) * slope + intercept
    middle, span = (values.min() + values.max()) / 2, np.ptp(values)
    for center, width in ((middle, span / 2), (np.round(values.mean()), 1.0 + span // 5)):
        center, width = float(f"{center:.6g}"), float(f"{width:.6g}")
        extra = {"BitsStored": 12} if kind == "u12" else {}
        extra |= {"WindowCenter": center, "WindowWidth": width, "VOILUTFunction": function}
        picture = picture_from_dicom(dataset(stored, RescaleSlope=slope, RescaleIntercept=intercept, **extra))
        assert_close_to_oracle(picture.pixels, stored, slope, intercept, center, width, function)
        assert picture.info.window == (center, width)
        assert picture.info.warnings == ()


def test_the_narrowest_linear_window_is_a_threshold():
    pixels = picture_from_dicom(dataset(STORED["u8"], WindowCenter=100, WindowWidth=1)).pixels
    np.testing.assert_array_equal(pixels, np.where(STORED["u8"] > 99.5, 255, 0))


def test_the_examples_of_the_standard():
    """C.11.2.1.2.1, note 4: center 2048, width 4096 takes 0..4095 to the whole range; center 0, width 100 takes -50 to 0 and 49 to 255."""
    array = np.array([[0, 4095]], np.uint16)
    assert picture_from_dicom(dataset(array, WindowCenter=2048, WindowWidth=4096)).pixels.tolist() == [[0, 255]]
    array = np.array([[-51, -50, 49, 50]], np.int16)
    assert picture_from_dicom(dataset(array, WindowCenter=0, WindowWidth=100)).pixels.tolist() == [[0, 0, 255, 255]]


def test_first_of_several_windows_and_the_one_asked_for():
    ds = dataset(STORED["u16"], WindowCenter=[1000, 20000], WindowWidth=[500, 30000])
    assert_close_to_oracle(picture_from_dicom(ds).pixels, STORED["u16"], 1, 0, 1000, 500)
    picture = picture_from_dicom(ds, window=(20000, 30000))
    assert_close_to_oracle(picture.pixels, STORED["u16"], 1, 0, 20000, 30000)
    assert picture.info.window == (20000, 30000)
    assert picture_from_dicom(ds, window=[20000, 30000]).info.window == (20000, 30000)
    refused(ds, "width", window=(1, 0))
    refused(ds, "width", window=(1, float("nan")))
    refused(dataset(pattern(4, 4, 3)), "colour", window=(1, 2))


def test_automatic_window_takes_the_smallest_to_black_and_the_largest_to_white():
    array = np.array([[100, 200], [300, 400]], np.int16)
    picture = picture_from_dicom(dataset(array, RescaleSlope=2, RescaleIntercept=-50))
    assert picture.pixels.tolist() == [[0, 85], [170, 255]]
    assert picture.info.window == (450.5, 601.0)
    again = picture_from_dicom(dataset(array, RescaleSlope=2, RescaleIntercept=-50), window=picture.info.window)
    np.testing.assert_array_equal(again.pixels, picture.pixels)
    assert picture_from_dicom(dataset(np.full((2, 2), 7, np.uint8))).pixels.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_padding_is_left_out_of_automatic_windows(dtype):
    pad = -2000 if dtype == np.int16 else 63536
    array = np.array([[pad, 100], [300, pad]], dtype)
    picture = picture_from_dicom(dataset(array, PixelPaddingValue=pad))
    assert picture.info.window == (200.5, 201.0)
    assert picture.pixels[0, 1] == 0
    assert picture.pixels[1, 0] == 255
    array = np.array([[pad, 100], [300, pad - 5]], dtype)
    assert picture_from_dicom(dataset(array, PixelPaddingValue=pad, PixelPaddingRangeLimit=pad - 10)).info.window == (200.5, 201.0)
    assert picture_from_dicom(dataset(np.full((2, 2), pad, dtype), PixelPaddingValue=pad)).pixels.tolist() == [[0, 0], [0, 0]]


def test_padding_with_the_other_sign():
    ds = dataset(np.array([[-2000, 100], [300, -2000]], np.int16))
    ds.add_new("PixelPaddingValue", "US", 63536)
    assert picture_from_dicom(ds).info.window == (200.5, 201.0)


# --- look-up tables -----------------------------------------------------------------------------------------------------------


def lut(first, entries, bits=16, vr="US", data_vr="OW"):
    item = Dataset()
    item.add_new("LUTDescriptor", vr, [len(entries) % 65536, first, bits])
    item.add_new("LUTData", data_vr, np.asarray(entries, "<u2").tobytes() if data_vr == "OW" else list(entries))
    return item


@pytest.mark.parametrize("data_vr", ["OW", "US"])
def test_modality_lut(data_vr):
    array = np.array([[0, 10, 11], [12, 13, 255]], np.uint8)
    ds = dataset(array, ModalityLUTSequence=[lut(10, [100, 200, 400, 500], data_vr=data_vr)], RescaleSlope=9, RescaleIntercept=9)
    picture = picture_from_dicom(ds, window=(300.5, 401))
    assert_close_to_oracle(picture.pixels, np.array([[100, 100, 200], [400, 500, 500]]), 1, 0, 300.5, 401)
    assert picture_from_dicom(ds).info.window == (300.5, 401.0)


@pytest.mark.parametrize("data_vr", ["OW", "US"])
def test_voi_lut_comes_before_windows(data_vr):
    array = np.array([[0, 1000, 1001], [1002, 1003, 4000]], np.uint16)
    ds = dataset(array, VOILUTSequence=[lut(1000, [0, 1023, 2047, 4095], 12, data_vr=data_vr)], WindowCenter=5, WindowWidth=5)
    picture = picture_from_dicom(ds)
    assert picture.pixels.tolist() == [[0, 0, 64], [127, 255, 255]]
    assert picture.info.window is None


def test_voi_lut_with_a_negative_first_value():
    array = np.array([[0, 1, 2, 3]], np.uint16)
    for ds in (dataset(array, RescaleSlope=1, RescaleIntercept=-2, VOILUTSequence=[lut(-2, [0, 85, 170, 255], 8, vr="SS")]),
               dataset(array, RescaleSlope=1, RescaleIntercept=-2, VOILUTSequence=[lut(65534, [0, 85, 170, 255], 8)])):  # fmt: skip
        assert picture_from_dicom(ds).pixels.tolist() == [[0, 85, 170, 255]]


def test_lut_of_65536_entries_and_of_packed_bytes():
    array = np.array([[0, 32768, 65535]], np.uint16)
    assert picture_from_dicom(dataset(array, VOILUTSequence=[lut(0, range(65536))])).pixels.tolist() == [[0, 128, 255]]
    item = lut(0, [0, 0, 0, 0], 8)
    item["LUTData"].value = bytes([0, 10, 20, 30])
    assert picture_from_dicom(dataset(np.array([[0, 1, 2, 3]], np.uint8), VOILUTSequence=[item])).pixels.tolist() == [[0, 10, 20, 30]]


def test_lut_in_big_endian(tmp_path):
    ds = dataset(np.array([[0, 1, 2]], np.uint16), BIG_ENDIAN, VOILUTSequence=[lut(0, [0, 1000, 65535], data_vr="US")])
    ds.VOILUTSequence[0].add_new("LUTData", "OW", np.array([0, 1000, 65535], ">u2").tobytes())
    assert picture_from_dicom(saved(ds, tmp_path / "x")).pixels.tolist() == [[0, 4, 255]]


# --- polarity -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("photometric", "shape", "inverse"),
    [("MONOCHROME2", None, False), ("MONOCHROME2", "IDENTITY", False), ("MONOCHROME2", "INVERSE", True),
     ("MONOCHROME1", None, True), ("MONOCHROME1", "INVERSE", True), ("MONOCHROME1 ", "IDENTITY", True)],
)  # fmt: skip
def test_polarity(photometric, shape, inverse):
    extra = {"PresentationLUTShape": shape} if shape else {}
    ds = dataset(STORED["u16"], PhotometricInterpretation=photometric, WindowCenter=20000, WindowWidth=30000, **extra)
    picture = picture_from_dicom(ds)
    assert_close_to_oracle(picture.pixels, STORED["u16"], 1, 0, 20000, 30000, inverse=inverse)
    assert picture.info.photometric == photometric.strip()
    assert bool(picture.pixels[0, 0] == 255) is inverse  # 0 is black unless inverted


# --- colour -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [EXPLICIT, BIG_ENDIAN])
def test_rgb_and_planar_configuration(tmp_path, syntax):
    rgb = pattern(5, 7, 3)
    np.testing.assert_array_equal(picture_from_dicom(saved(dataset(rgb, syntax), tmp_path / "a")).pixels, rgb)
    planes = dataset(rgb, syntax, PlanarConfiguration=1)
    planes.PixelData = dataset(np.ascontiguousarray(rgb.transpose(2, 0, 1)).reshape(15, 7), syntax).PixelData
    np.testing.assert_array_equal(picture_from_dicom(saved(planes, tmp_path / "b")).pixels, rgb)


def test_rgb_of_16_bits():
    rgb = pattern(5, 7, 3).astype(np.uint16)
    np.testing.assert_array_equal(picture_from_dicom(dataset(rgb * 257)).pixels, rgb)
    np.testing.assert_array_equal(picture_from_dicom(dataset(rgb, BitsStored=8)).pixels, rgb)


def test_ybr_full_equals_the_formula():
    """C.7.6.3.1.2, turned round."""
    ybr = pattern(9, 11, 3)
    y, cb, cr = (ybr[:, :, channel].astype(float) - (0, 128, 128)[channel] for channel in range(3))
    expected = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1).clip(0, 255)
    picture = picture_from_dicom(dataset(ybr, PhotometricInterpretation="YBR_FULL"))
    assert np.abs(picture.pixels - expected).max() <= 0.51
    assert picture.info.photometric == "YBR_FULL"


def test_ybr_full_422():
    ds = dataset(np.zeros((2, 4, 3), np.uint8), PhotometricInterpretation="YBR_FULL_422")
    ds.PixelData = bytes([50, 60, 128, 128, 70, 80, 128, 128] * 2)  # Y1 Y2 Cb Cr
    np.testing.assert_array_equal(picture_from_dicom(ds).pixels[:, :, 0], [[50, 60, 70, 80]] * 2)
    ds.PixelData = ds.PixelData[:-2]
    refused(ds, "cut short")


def palette(array, entries, bits, first=0, syntax=EXPLICIT, **elements):
    ds = dataset(array, syntax, PhotometricInterpretation="PALETTE COLOR", **elements)
    for index, color in enumerate(("Red", "Green", "Blue")):
        setattr(ds, f"{color}PaletteColorLookupTableDescriptor", [len(entries) % 65536, first, bits])
        data = np.asarray([entry[index] for entry in entries], f"<u{bits // 8}").tobytes()
        if syntax == BIG_ENDIAN:
            data = np.frombuffer(data, "<u2").astype(">u2").tobytes()
        setattr(ds, f"{color}PaletteColorLookupTableData", data)
    return ds


@pytest.mark.parametrize("syntax", [EXPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize("bits", [8, 16])
def test_palette(tmp_path, bits, syntax):
    entries = [(index, 255 - index, index // 2) for index in range(256)]
    wide = [tuple(value * 257 for value in entry) for entry in entries] if bits == 16 else entries
    for array in (np.array([[0, 5], [200, 255]], np.uint8), np.array([[0, 5], [200, 300]], np.uint16)):  # 300 takes the last entry
        expected = [[entries[min(int(value), 255)] for value in row] for row in array]
        picture = picture_from_dicom(saved(palette(array, wide, bits, syntax=syntax), tmp_path / "p"))
        np.testing.assert_array_equal(picture.pixels, expected)
        assert (picture.info.photometric, picture.info.window) == ("PALETTE COLOR", None)
    shifted = palette(np.array([[0, 9, 10, 11]], np.uint8), wide, bits, first=10)
    np.testing.assert_array_equal(picture_from_dicom(shifted).pixels, [[entries[0], entries[0], entries[0], entries[1]]])


def test_segmented_palette():
    ds = palette(np.arange(8, dtype=np.uint8).reshape(2, 4), [(0, 0, 0)] * 8, 16)
    words = [0, 2, 1000 * 65, 0, 1, 3, 3 * 257, 2, 1, 0, 0, 0, 1, 9 * 257]  # discrete 2, linear to 3, a copy of the first, discrete 1
    for color in ("Red", "Green", "Blue"):
        del ds[f"{color}PaletteColorLookupTableData"]
        setattr(ds, f"Segmented{color}PaletteColorLookupTableData", np.array(words, "<u2").tobytes())
    red = picture_from_dicom(ds).pixels[:, :, 0].ravel().tolist()
    assert red == [65000 >> 8, 0, 1, 2, 3, 65000 >> 8, 0, 9]
    endless = [0, 1, 7, 2, 65535, 0, 0] * 50
    for color in ("Red", "Green", "Blue"):
        setattr(ds, f"Segmented{color}PaletteColorLookupTableData", np.array(endless, "<u2").tobytes())
    refused(ds, "segmented palette")


# --- bits ---------------------------------------------------------------------------------------------------------------------


def test_one_bit_pixels():
    bits = (pattern(5, 7, 1) > 100).astype(np.uint8)
    ds = dataset(bits, BitsAllocated=1, BitsStored=1, HighBit=0)
    ds.PixelData = np.packbits(bits.ravel(), bitorder="little").tobytes() + b"\0"
    np.testing.assert_array_equal(picture_from_dicom(ds).pixels, bits * 255)


@pytest.mark.parametrize("syntax", [EXPLICIT, BIG_ENDIAN])
def test_one_bit_frames_start_within_a_byte(tmp_path, syntax):
    frames = np.stack([pattern(3, 5, 1), pattern(3, 5, 1)[::-1], pattern(5, 3, 1).T, pattern(3, 5, 1)[:, ::-1]]) // 16 % 2
    ds = dataset(frames, syntax, NumberOfFrames=4, BitsAllocated=1, BitsStored=1, HighBit=0)
    words = np.packbits(np.append(frames.ravel(), [0] * 4), bitorder="little").view("<u2")
    ds.PixelData = words.astype(">u2" if syntax == BIG_ENDIAN else "<u2").tobytes()
    for source in (ds, saved(ds, tmp_path / "x")):
        for frame in range(4):
            np.testing.assert_array_equal(picture_from_dicom(source, frame=frame).pixels, frames[frame] * 255)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("stored", range(1, 17))
def test_only_the_stored_bits_count(stored, signed):
    """PS3.5 8.1.1: what stands beside them, an overlay of old, is none of the pixel."""
    low = -(1 << (stored - 1)) if signed else 0
    values = np.linspace(low, low + (1 << stored) - 1, 64).astype(np.int64).reshape(8, 8)
    junk = (np.arange(64).reshape(8, 8) * 0x3039 << stored) & 0xFFFF
    for shift in {0, 16 - stored}:
        words = (((values & ((1 << stored) - 1)) << shift) | (junk if shift == 0 else 0)).astype(np.uint16)
        words = words.view(np.int16) if signed else words
        picture = picture_from_dicom(dataset(words, BitsStored=stored, HighBit=stored - 1 + shift))
        expected = (values - values.min()) / max(np.ptp(values), 1) * 255
        assert np.abs(picture.pixels - expected).max() <= 0.5 + 1e-9


# --- frames -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 3, 8])
def test_the_middle_frame_is_the_default(tmp_path, frames):
    array = np.stack([np.full((3, 5), index, np.uint8) for index in range(frames)])
    array[:, 0, 0], array[:, 0, 1] = 0, 255
    for source in (dataset(array, NumberOfFrames=frames), saved(dataset(array, NumberOfFrames=frames), tmp_path / "m")):
        picture = picture_from_dicom(source)
        assert (picture.info.frame, picture.info.frames) == (frames // 2, frames)
        assert picture.pixels[2, 2] == frames // 2
        for frame in range(frames):
            assert picture_from_dicom(source, frame=frame).pixels[2, 2] == frame
        there = "only frame 0" if frames == 1 else f"frames 0 to {frames - 1}"
        refused(source, f"frame {frames} was asked for and the file has {there};", frame=frames)
        refused(source, "frame -1", frame=-1)


def test_odd_frames_of_big_endian_words(tmp_path):
    array = np.stack([pattern(3, 3, 1), pattern(3, 3, 1).T.copy(), pattern(3, 3, 1)[::-1]])
    path = saved(dataset(array, BIG_ENDIAN, NumberOfFrames=3, WindowCenter=128, WindowWidth=256), tmp_path / "odd")
    for frame in range(3):
        np.testing.assert_array_equal(picture_from_dicom(path, frame=frame).pixels, array[frame])


def item(**elements):
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def test_functional_groups_of_a_frame_come_before_shared_ones():
    array = np.stack([STORED["i16"]] * 3)
    transformation = [item(PixelValueTransformationSequence=[item(RescaleSlope=index + 1, RescaleIntercept=-index)]) for index in range(3)]
    shared = [item(FrameVOILUTSequence=[item(WindowCenter=100, WindowWidth=30000)])]
    transformation[2].FrameVOILUTSequence = [item(WindowCenter=[500], WindowWidth=[9000], VOILUTFunction="SIGMOID")]
    ds = dataset(array, NumberOfFrames=3, RescaleSlope=99)
    ds.PerFrameFunctionalGroupsSequence, ds.SharedFunctionalGroupsSequence = transformation, shared
    assert_close_to_oracle(picture_from_dicom(ds, frame=0).pixels, array[0], 1, 0, 100, 30000)
    assert_close_to_oracle(picture_from_dicom(ds, frame=1).pixels, array[0], 2, -1, 100, 30000)
    assert_close_to_oracle(picture_from_dicom(ds, frame=2).pixels, array[0], 3, -2, 500, 9000, "SIGMOID")


# --- metadata that lies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "elements",
    [{"WindowCenter": 5, "WindowWidth": 0}, {"WindowCenter": 5, "WindowWidth": -5}, {"WindowCenter": 5, "WindowWidth": None},
     {"WindowCenter": None, "WindowWidth": 5}, {"WindowWidth": 5}, {"WindowCenter": 5}, {"WindowCenter": [], "WindowWidth": 7},
     {"RescaleSlope": 0, "RescaleIntercept": 5}, {"RescaleSlope": None, "RescaleIntercept": None},
     {"VOILUTSequence": []}, {"VOILUTSequence": [Dataset()]}, {"ModalityLUTSequence": [Dataset()]},
     {"ModalityLUTSequence": [item(LUTDescriptor=[4, 0, 16])]}, {"VOILUTSequence": [item(LUTDescriptor=[4, 0, 99], LUTData=b"1234")]},
     {"VOILUTFunction": "NONSENSE"}, {"WindowCenter": 1e9, "WindowWidth": 2, "VOILUTFunction": "LINEAR_EXACT"}],
)  # fmt: skip
def test_unusable_metadata_falls_back_to_an_automatic_window(elements):
    array = np.array([[100, 200], [300, 400]], np.int16)
    picture = picture_from_dicom(dataset(array, **elements))
    assert picture.pixels.tolist() == [[0, 85], [170, 255]]
    usual = {"VOILUTFunction", "RescaleSlope", "VOILUTSequence"}  # nothing is wrong with an element that is empty or says nothing
    assert picture.info.warnings or (usual & set(elements) and not any(value for key, value in elements.items() if key != "VOILUTFunction"))


def test_text_where_numbers_belong(tmp_path):
    ds = dataset(np.array([[100, 200], [300, 400]], np.int16), WindowCenter="1111", WindowWidth="2222")
    ds.RescaleSlope, ds.RescaleIntercept = "3333", "44"
    path = saved(ds, tmp_path / "x")
    path.write_bytes(path.read_bytes().replace(b"1111", b"SECR").replace(b"2222", b"ETNA").replace(b"3333", b"1E99"))
    picture = picture_from_dicom(path)
    assert picture.pixels.tolist() == [[0, 85], [170, 255]]
    assert len(picture.info.warnings) == 2
    assert "SECR" not in str(picture.info)


def test_a_window_narrower_than_one_is_read_exactly():
    picture = picture_from_dicom(dataset(STORED["u8"], RescaleSlope=0.001, RescaleIntercept=0, WindowCenter=0.1, WindowWidth=0.1))
    assert_close_to_oracle(picture.pixels, STORED["u8"], 0.001, 0, 0.1, 0.1, "LINEAR_EXACT")
    assert len(picture.info.warnings) == 1


def test_burned_in_annotation_is_a_warning():
    assert "burned" in picture_from_dicom(dataset(STORED["u8"], BurnedInAnnotation="YES")).info.warnings[0]
    assert picture_from_dicom(dataset(STORED["u8"], BurnedInAnnotation="NO")).info.warnings == ()


# --- the same pixels in every transfer syntax ---------------------------------------------------------------------------------


def compressed(ds, syntax, folder):
    """The dataset in another transfer syntax, encoded by GDCM: for JPEG-LS, JPEG 2000 and RLE another make than our decoders."""
    import gdcm

    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(saved(ds, folder / "native")))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(folder / "compressed"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    out = pydicom.dcmread(folder / "compressed")
    assert out.file_meta.TransferSyntaxUID == syntax
    return out


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED, RLE, JPEG_LOSSLESS, JPEG_LOSSLESS_1, JPEG_LS, J2K])
@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "examples_overlay.dcm", "image_dfl.dcm"])
def test_same_pixels_in_every_lossless_syntax(tmp_path, name, syntax):
    ds = pydicom.dcmread(shipped(name))
    reference = picture_from_dicom(shipped(name))
    native = dataset(ds.pixel_array, EXPLICIT if syntax in CODECS else syntax)
    for element in ds:
        if element.tag.group in (0x0008, 0x0028):
            native[element.tag] = element
    out = compressed(native, syntax, tmp_path) if syntax in CODECS else native
    for path in (saved(out, tmp_path / "with"), saved(out, tmp_path / "without", preamble=False)):
        if path.name == "without":
            path.write_bytes(path.read_bytes()[132:] if path.read_bytes()[128:132] == b"DICM" else path.read_bytes())
        if syntax == DEFLATED and path.name == "without":
            continue  # nothing tells that a file without its meta is deflated
        picture = picture_from_dicom(path)
        np.testing.assert_array_equal(picture.pixels, reference.pixels)
        assert picture.info.window == reference.info.window
        assert picture.info.transfer_syntax == syntax
    np.testing.assert_array_equal(picture_from_dicom(out).pixels, reference.pixels)  # from memory


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("syntax", [RLE, JPEG_LOSSLESS, JPEG_LOSSLESS_1, JPEG_LS, J2K])
def test_lossless_round_trip_of_every_depth(tmp_path, syntax, bits, signed):
    kind = np.uint8 if bits == 8 else np.uint16
    values = (pattern12(40, 52).astype(np.uint32) * 17 % (1 << bits)).astype(kind)
    low = 1 << (bits - 1)
    stored = ((values.astype(np.int32) ^ low) - low).astype(np.dtype(kind).str.replace("u", "i")) if signed else values
    ds = dataset(stored, BitsStored=bits)
    reference = picture_from_dicom(ds)
    expected = (stored - stored.min().astype(float)) / (stored.max().astype(float) - stored.min()) * 255
    assert np.abs(reference.pixels - expected).max() <= 0.5 + 1e-9
    np.testing.assert_array_equal(picture_from_dicom(compressed(ds, syntax, tmp_path)).pixels, reference.pixels)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_jpeg_2000_of_every_depth(bits):
    """The precision that OpenJPEG writes is the bits stored; GDCM's may be the bits allocated."""
    from openjpeg.utils import encode_array

    values = (pattern12(40, 52).astype(np.uint32) * 17 % (1 << bits)).astype(np.uint8 if bits == 8 else np.uint16)
    ds = dataset(values, BitsStored=bits)
    reference = picture_from_dicom(ds)
    ds.file_meta.TransferSyntaxUID, ds.PixelData = UID(J2K), encapsulate([bytes(encode_array(values, bits_stored=bits))])
    np.testing.assert_array_equal(picture_from_dicom(ds).pixels, reference.pixels)


@pytest.mark.parametrize("lossy", [{}, {"compression_ratios": [8, 3]}])
@pytest.mark.parametrize("bits", [1, 7, 8, 12, 16, "rgb"])
def test_jpeg_2000_decoded_in_threads_is_the_same(monkeypatch, bits, lossy):
    """Frames go to Pillow's OpenJPEG, and where it does not hand them on to pylibjpeg's."""
    from openjpeg.utils import encode_array

    rows, columns, samples = 512, 513, 3 if bits == "rgb" else 1
    bits = 8 if bits == "rgb" else bits
    walk = np.cumsum(np.random.default_rng(bits).normal(size=(rows, columns, samples)), axis=1)
    values = ((walk - walk.min()) / np.ptp(walk) * (2**bits - 1)).astype(np.uint8 if bits <= 8 else np.uint16).squeeze()
    colour = {"photometric_interpretation": 1, "use_mct": True} if samples == 3 else {}
    frame = bytes(encode_array(values, bits_stored=bits, **colour, **lossy))
    layout = Layout(rows, columns, samples, 8 * values.itemsize, bits, bits - 1, False, "MONOCHROME2" if samples == 1 else "YBR_RCT", 0)
    assert jpeg2000._j2k_in_threads(frame, layout, jpeg2000.header_of(frame, layout)) is not None
    decoded = [samples_from_codestream(J2K, frame, layout)]
    monkeypatch.setattr(jpeg2000, "_j2k_in_threads", lambda *_: None)
    decoded.append(samples_from_codestream(J2K, frame, layout))
    assert decoded[0][1] == decoded[1][1] and decoded[0][0].dtype == decoded[1][0].dtype
    np.testing.assert_array_equal(decoded[0][0], decoded[1][0])
    assert lossy or np.array_equal(decoded[0][0], values)
    monkeypatch.undo()
    with pytest.raises(Refused, match="broken"):
        samples_from_codestream(J2K, frame[: len(frame) // 2], layout)


@pytest.mark.parametrize("lossy", [{}, {"compression_ratios": [8, 3]}])
@pytest.mark.parametrize("bits", [2, 8, 10, 12, 15, 16])
def test_signed_jpeg_2000_goes_to_pillows_decoder_too(monkeypatch, bits, lossy):
    """It is the newer OpenJPEG; a codestream may be in a file of boxes, which no decoder reads."""
    from openjpeg.utils import encode_array

    walk = np.cumsum(np.random.default_rng(bits).normal(size=(40, 60)), axis=1)
    kind, half = np.int8 if bits <= 8 else np.int16, 1 << (bits - 1)
    values = ((walk - walk.min()) / np.ptp(walk) * (2 * half - 1) - half).round().astype(kind)
    values[0, :4] = [-half, half - 1, 0, -1]
    frame = bytes(encode_array(values, bits_stored=bits, **lossy))
    layout = Layout(40, 60, 1, 8 * values.itemsize, bits, bits - 1, True, "MONOCHROME2", 0)
    decoded = [samples_from_codestream(J2K, x, layout)[0] for x in (frame, bytes(range(200)) + frame)]
    assert jpeg2000._j2k_in_threads(frame, layout, jpeg2000.header_of(frame, layout)) is not None
    monkeypatch.setattr(jpeg2000, "_j2k_in_threads", lambda *_: None)
    decoded.append(samples_from_codestream(J2K, frame, layout)[0])
    for one in decoded[1:]:
        assert one.dtype == decoded[0].dtype
        np.testing.assert_array_equal(one, decoded[0])
    assert lossy or np.array_equal(decoded[0].view(kind), values)


def test_tiled_jpeg_2000_in_threads(monkeypatch):
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.fromarray(pattern(300, 200, 1)).save(file, "JPEG2000", tile_size=(64, 96), no_jp2=True, irreversible=False)
    layout = Layout(300, 200, 1, 8, 8, 7, False, "MONOCHROME2", 0)
    for by_pillow in (True, False):
        if not by_pillow:
            monkeypatch.setattr(jpeg2000, "_j2k_in_threads", lambda *_: None)
        np.testing.assert_array_equal(samples_from_codestream(J2K, file.getvalue(), layout)[0], pattern(300, 200, 1))


@pytest.mark.parametrize("by_pillow", [True, False])
@pytest.mark.parametrize("syntax", HTJ2K)
def test_htj2k(monkeypatch, syntax, by_pillow):
    if not by_pillow:
        monkeypatch.setattr(jpeg2000, "_j2k_in_threads", lambda *_: None)
    frame = (HERE / "htj2k_gray12.j2k").read_bytes()
    ds = dataset(pattern12(), BitsStored=16)
    reference = picture_from_dicom(ds)
    ds.file_meta.TransferSyntaxUID, ds.PixelData = UID(syntax), encapsulate([frame])
    np.testing.assert_array_equal(picture_from_dicom(ds).pixels, reference.pixels)
    ds = dataset(pattern(48, 64, 3), PhotometricInterpretation="YBR_RCT")
    ds.file_meta.TransferSyntaxUID, ds.PixelData = UID(syntax), encapsulate([(HERE / "htj2k_rgb8.j2k").read_bytes()])
    np.testing.assert_array_equal(picture_from_dicom(ds).pixels, pattern(48, 64, 3))


def test_rgb_through_rle_and_jpeg_lossless():
    reference = picture_from_dicom(shipped("SC_rgb_rle.dcm")).pixels
    assert reference.shape == (100, 100, 3)
    for name in ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_gdcm_KY.dcm", "SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm"):
        np.testing.assert_array_equal(picture_from_dicom(shipped(name)).pixels, reference)


def test_lossy_colour_stays_near():
    reference = picture_from_dicom(shipped("SC_rgb_rle.dcm")).pixels.astype(int)
    families = ("SC_rgb_dcmtk", "SC_rgb_jpeg_dcmtk", "SC_rgb_jpeg_lossy", "SC_ybr", "SC_rgb_jls")
    names = [name for name in shipped_names() if name.startswith(families)]
    assert len(names) == 11
    for name in names:
        assert np.abs(picture_from_dicom(shipped(name)).pixels - reference).mean() < 4, name


def test_jpeg_colour_follows_markers_then_the_header():
    """Against pydicom's own reading of the same files, whose conversion rounds otherwise."""
    names = ("SC_jpeg_no_color_transform.dcm", "SC_jpeg_no_color_transform_2.dcm", "SC_rgb_jpeg_app14_dcmd.dcm", "examples_ybr_color.dcm")
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = pydicom.pixels.pixel_array(shipped(name), index=0, decoding_plugin="pillow").astype(int)
        assert np.abs(picture_from_dicom(shipped(name), frame=0).pixels - theirs).max() <= 2, name


def test_12_bit_extended_jpeg():
    """The values that the file's makers give for it."""
    picture = picture_from_dicom(shipped("JPGExtended.dcm"), window=(128, 256))
    assert (picture.pixels[420, 140], picture.pixels[230, 120]) == (244, 95)


def test_a_file_that_is_implicit_where_it_says_explicit():
    assert picture_from_dicom(shipped("SC_rgb_jpeg.dcm")).pixels.shape == (256, 256, 3)


# --- real files ---------------------------------------------------------------------------------------------------------------

REFUSED = {
    "ExplVR_BigEndNoMeta.dcm", "ExplVR_LitEndNoMeta.dcm", "JPEG2000-embedded-sequence-delimiter.dcm", "MR_truncated.dcm", "UN_sequence.dcm",
    "badVR.dcm", "empty_charset_LEI.dcm", "liver_1frame.dcm", "liver_expb_1frame.dcm", "meta_missing_tsyntax.dcm", "nested_priv_SQ.dcm",
    "no_meta.dcm", "no_meta_group_length.dcm", "priv_SQ.dcm", "reportsi.dcm", "reportsi_with_empty_number_tags.dcm", "rtdose.dcm",
    "rtdose_1frame.dcm", "rtdose_expb.dcm", "rtdose_expb_1frame.dcm", "rtdose_rle.dcm", "rtdose_rle_1frame.dcm", "rtplan.dcm",
    "rtplan_truncated.dcm", "rtstruct.dcm", "test-SR.dcm", "waveform_ecg.dcm",
}  # fmt: skip


@pytest.mark.parametrize("name", shipped_names())
def test_every_file_that_pydicom_ships(name, capfd, caplog, monkeypatch):
    monkeypatch.setattr(process, "taken_over", True)  # as the command line does, which keeps libjpeg quiet too
    path = shipped(name)
    if name in REFUSED:
        refused(path, "^[^\n]+$")
    else:
        picture = picture_from_path(path)
        assert caplog.records == []
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        assert picture.pixels.dtype == np.uint8
        assert picture.pixels.flags.c_contiguous
        assert picture.pixels.shape[:2] == (ds.Rows, ds.Columns) == (picture.info.rows, picture.info.columns)
        assert picture.pixels.min() < picture.pixels.max()
        assert picture.info.source == path
        assert picture.info.modality == ds.get("Modality")
    assert capfd.readouterr() == ("", "")


def test_shared_files(shared):
    for path in sorted((shared / "dicom").iterdir()):
        if path.name in ("MR_truncated.dcm", "test-SR.dcm"):
            refused(path, "cut short" if path.name.startswith("MR") else "structured report")
        else:
            assert picture_from_dicom(path).pixels.std() > 5
    ct = [picture_from_dicom(path).pixels for path in sorted((shared / "dicom").glob("CTImage*"))]
    np.testing.assert_array_equal(*ct)


# --- refusals -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elements", "reason"),
    [({"Rows": 0}, "rows"), ({"Columns": 0}, "columns"), ({"Rows": 65535, "Columns": 65535}, "more than"), ({"Rows": 5000}, "cut short"),
     ({"NumberOfFrames": 10**9}, "cut short"), ({"NumberOfFrames": 2}, "cut short"), ({"BitsAllocated": 32}, "cut short"),
     ({"BitsAllocated": 7}, "bits"),
     ({"BitsStored": 17}, "bits"), ({"BitsStored": 0}, "bits"), ({"HighBit": 40}, "bits"), ({"SamplesPerPixel": 3}, "samples"),
     ({"PhotometricInterpretation": SECRET}, "photometric"), ({"PhotometricInterpretation": None}, "photometric"),
     ({"Modality": "SEG"}, "segmentation"),
     ({"Modality": "RTDOSE"}, "dose"), ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"}, "segmentation"), ({"Rows": [4, 4]}, "Rows"),
     ({"PhotometricInterpretation": "PALETTE COLOR"}, "palette"), ({"FloatPixelData": b"1234"}, "floating")],
)  # fmt: skip
def test_headers_that_lie_are_refused(tmp_path, elements, reason):
    ds = dataset(pattern12(8, 8))
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    refused(ds, reason)
    refused(written(ds, tmp_path / "x"), reason)


VIDEO_AND_XL = [f"1.2.840.10008.1.2.4.{tail}" for tail in (100, 102, 107, 110)]


@pytest.mark.parametrize("syntax", [*VIDEO_AND_XL, "1.2.3.4", SECRET])
def test_unsupported_transfer_syntax(syntax):
    ds = dataset(pattern12(8, 8))
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(syntax) if syntax != SECRET else UID("9" * 70)
    refused(ds, "not supported")


def test_a_dataset_without_file_meta():
    ds = dataset(pattern12(8, 8))
    expected = picture_from_dicom(ds).pixels
    ds.file_meta = None
    assert np.array_equal(picture_from_dicom(ds).pixels, expected)


def test_compressed_headers_that_lie(tmp_path):
    array = pattern12(16, 16)
    for syntax in (RLE, JPEG_LOSSLESS, JPEG_LS, J2K):
        good = compressed(dataset(array, BitsStored=12), syntax, tmp_path)
        picture_from_dicom(good)
        color = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}
        for elements in ({"Rows": 8000, "Columns": 8000}, {"Rows": 15}, color, {"NumberOfFrames": 500}):
            bad = Dataset()
            bad.update(good)
            bad.file_meta = good.file_meta
            for keyword, value in elements.items():
                setattr(bad, keyword, value)
            refused(saved(bad, tmp_path / "x"), "header|compressed")
        whole = saved(good, tmp_path / "y").read_bytes()
        for part in (0.3, 0.6, 0.9):
            (tmp_path / "z").write_bytes(whole[: int(len(whole) * part)])
            refused(tmp_path / "z", "compressed|cut short|no pixel data|broken")
        frame = get_frame(good.PixelData, 0, number_of_frames=1)
        good.PixelData = encapsulate([frame[: len(frame) // 2]])
        refused(good, "compressed|segments")
        good.PixelData = array.tobytes()
        refused(good, "compressed|cut short")


def test_a_deflated_bomb(tmp_path):
    path = saved(dataset(np.zeros((8, 8), np.uint8), DEFLATED), tmp_path / "x")
    raw = path.read_bytes()
    start = 144 + int.from_bytes(raw[140:144], "little")
    deflater = zlib.compressobj(wbits=-15)
    path.write_bytes(raw[:start] + b"".join(deflater.compress(bytes(1 << 20)) for _ in range(300)) + deflater.flush())
    refused(path, "inflates to more than")
    path.write_bytes(raw[:-20])
    refused(path, "cut short")


def test_deeply_nested_sequences(tmp_path):
    head = saved(dataset(np.zeros((8, 8), np.uint8)), tmp_path / "x").read_bytes()[:400]
    for depth in (100, 5000):
        nest = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth
        (tmp_path / "y").write_bytes(head[: head.find(b"\x08\x00\x16\x00")] + nest)
        refused(tmp_path / "y", "broken|no pixel data")


def test_a_length_far_beyond_the_file(tmp_path):
    import tracemalloc

    raw = saved(dataset(pattern12(8, 8)), tmp_path / "x").read_bytes()
    at = raw.find(b"\x10\x00\x10\x00PN")
    (tmp_path / "y").write_bytes(raw[:at] + b"\x10\x00\x10\x00UN\0\0\xf0\xff\xff\xff" + raw[at + 8 :])
    tracemalloc.start()
    refused(tmp_path / "y", "broken|no pixel data")
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_not_a_dataset():
    refused({"Rows": 1}, "not an image")


def test_permission(tmp_path):
    path = saved(dataset(pattern12(8, 8)), tmp_path / "x")
    path.chmod(0)
    try:
        path.open("rb").close()
    except PermissionError:
        refused(path, "permission")
    else:
        pytest.skip("this user may read everything")


# --- whose fault it is ----------------------------------------------------------------------------------------------------------


FAULTS_OF_OURS = {
    "a wrong name": (dicom, "layout_from_dataset", lambda *_: nobody_defined_this, NameError),  # noqa: F821
    "a forgotten codec": (frames_module, "CODECS", {}, KeyError),
    "a wrong type": (dicom, "whole_number", lambda *_: "1", TypeError),
    "nothing where something is due": (dicom, "layout_from_dataset", lambda *_: None, AttributeError),
    "a decoder that is not installed": (sys.modules, "gdcm", None, ImportError),
}


@pytest.mark.parametrize("fault", FAULTS_OF_OURS)
def test_a_fault_of_ours_is_not_told_as_a_broken_file(monkeypatch, fault):
    module, name, wrong, error = FAULTS_OF_OURS[fault]
    (monkeypatch.setitem if module is sys.modules else monkeypatch.setattr)(module, name, wrong)
    source = "MR_small_RLE.dcm" if fault == "a forgotten codec" else "JPEG-LL.dcm"
    with pytest.raises(error):
        picture_from_dicom(shipped(source))


@pytest.mark.parametrize("error", [OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError, MemoryError, zlib.error])
def test_what_a_parser_raises_is_the_files(monkeypatch, error):
    namespace = {"__name__": "pydicom.somewhere", "error": error}
    exec("def read(*_, **__):\n    raise error('NAME')", namespace)
    monkeypatch.setattr(pydicom, "dcmread", namespace["read"])
    with pytest.raises(InputError, match="the DICOM file is broken; export or copy it again"):
        picture_from_dicom(shipped("CT_small.dcm"))


# --- silence ------------------------------------------------------------------------------------------------------------------


def test_nothing_of_the_patient_is_logged_or_printed(tmp_path, capfd, caplog):
    raw = saved(dataset(pattern12(8, 8), PatientBirthDate="19700101", WindowCenter="40"), tmp_path / "x").read_bytes()
    path = tmp_path / "y"
    path.write_bytes(raw.replace(b"19700101", b"SECRETNA").replace(b"DS\x02\x0040", b"DS\x02\x00SE"))
    level = logging.getLogger("pydicom").level
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        picture = picture_from_dicom(path)
        assert warnings.filters == filters
    assert SECRET[:4] not in str(picture.info)
    assert caught == []
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("pydicom").level == level


def test_the_lean_import_decodes_everything_too():
    code = """
import sys
from pmclip_deploy.imaging.dicom import picture_from_dicom
from pmclip_deploy.imaging.dicom_file import import_pydicom_lean
import_pydicom_lean()
assert "pydicom" in sys.modules and not {"gdcm", "openjpeg", "PIL.ImageCms", "urllib.request", "pydicom.examples"} & set(sys.modules)
import urllib.request
print(*(picture_from_dicom(path).pixels.shape for path in sys.argv[1:]), urllib.request.urlopen.__name__)
"""
    files = ["SC_rgb_jpeg_gdcm.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm"]
    command = [sys.executable, "-c", code, *map(shipped, files)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert printed == "(100, 100, 3) (64, 64) (64, 64) (64, 64) urlopen\n"


def test_reading_in_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    names = ["CT_small.dcm", "MR_small_RLE.dcm", "JPGExtended.dcm", "SC_rgb_jpeg_gdcm.dcm", "MR_small_jp2klossless.dcm"] * 8
    alone = {name: picture_from_dicom(shipped(name)).pixels for name in set(names)}
    filters = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        for name, picture in zip(names, pool.map(lambda name: picture_from_dicom(shipped(name)), names), strict=True):
            np.testing.assert_array_equal(picture.pixels, alone[name])
    assert warnings.filters == filters
