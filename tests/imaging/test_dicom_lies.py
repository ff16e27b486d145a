"""DICOM files whose header, tables or lengths contradict their pixels, and conforming ones that are rare: the right picture, or none."""

import io
import re
import struct
import zlib

import jpeg_ls
import numpy as np
import pydicom
import pytest
from openjpeg.utils import encode_array
from PIL import Image
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID

from pmclip_deploy.header.read import header_from_dataset
from pmclip_deploy.imaging import dicom_file
from pmclip_deploy.imaging.dicom import picture_from_dicom
from tests.golden.make import pattern
from tests.imaging.test_dicom import (
    BIG_ENDIAN,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    J2K,
    JPEG_LS,
    RLE,
    SECRET,
    assert_close_to_oracle,
    dataset,
    item,
    lut,
    refused,
    saved,
    shipped,
    written,
)

STORAGE = "1.2.840.10008.5.1.4.1.1"
JPEG = "1.2.840.10008.1.2.4.50"
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_files_of_the_folder_of_faults(shared):
    folder = shared.parent / "faults"
    if not folder.is_dir():
        pytest.skip("needs ../shared/faults; the tests below make inputs of the same kinds")
    seen = 0
    for path in sorted(folder.glob("*.expected.png")):
        name, _, frame = path.name.removesuffix(".expected.png").partition(".frame")
        if (dicom := folder / f"{name}.dcm").is_file():
            right = np.asarray(Image.open(path)).astype(int)
            pixels = picture_from_dicom(dicom, frame=int(frame) if frame else None).pixels
            assert np.abs(pixels - right).max() <= (3 if right.ndim == 3 else 1), path.name
            seen += 1
    assert seen >= 18
    refused(folder / "native_length_rgba.dcm", "another number for each pixel")


# --- what the modality transformation is for ----------------------------------------------------------------------------------


def of_class(sop_class, modality="XA", **elements):
    ds = dataset(RAMP, WindowCenter=128, WindowWidth=256, Modality=modality, **elements)
    if sop_class is None:
        del ds.SOPClassUID
    else:
        ds.SOPClassUID = f"{STORAGE}.{sop_class}"
    return ds


SQUARED = (np.arange(256) ** 2 // 255).tolist()
TRANSFORMATIONS = {
    "a table": {"ModalityLUTSequence": [lut(0, SQUARED, 8)]},
    "a rescale": {"RescaleSlope": 0.5, "RescaleIntercept": 10},
    "a rescale of the frame": {"PerFrameFunctionalGroupsSequence": [item(PixelValueTransformationSequence=[item(RescaleSlope=0.5)])]},
    "a table that is broken": {"ModalityLUTSequence": [item(LUTDescriptor=[4, 0, 16])]},
    "a rescale that is none": {"RescaleSlope": 0, "RescaleIntercept": 5},
}


@pytest.mark.parametrize("relationship", ["LOG", "LIN", "DISP", None])
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("sop_class", ["12.1", "12.1.1", "12.2", "12.2.1", "12.3"])
def test_x_ray_angiography_and_fluoroscopy_are_shown_as_stored(sop_class, transformation, relationship):
    """C.8.7.1.1.2: the transformation leads back to the intensity of the X-rays. DCMTK says the same of all but the enhanced ones."""
    ds = of_class(sop_class, PixelIntensityRelationship=relationship, **TRANSFORMATIONS[transformation])
    picture = picture_from_dicom(ds)
    np.testing.assert_array_equal(picture.pixels, RAMP)
    assert picture.info.warnings == ()
    del ds.WindowCenter, ds.WindowWidth
    assert picture_from_dicom(ds).info.window == (128.0, 256.0)


def test_the_sop_class_decides_and_without_one_the_modality():
    table = TRANSFORMATIONS["a table"]
    for sop_class in ("1", "1.1", "2", "7", "13.1.1"):  # CR, DX, CT, secondary capture, reconstructions in 3D: also of modality XA
        assert picture_from_dicom(of_class(sop_class, **table)).pixels.ravel().tolist() == SQUARED
    for modality, shown in (("XA", range(256)), ("RF", range(256)), ("rf ", range(256)), ("CR", SQUARED)):
        np.testing.assert_array_equal(picture_from_dicom(of_class(None, modality, **table)).pixels.ravel(), shown)
        np.testing.assert_array_equal(picture_from_dicom(of_class("12.1", modality, **table)).pixels, RAMP)
    ds = of_class(None, "CR", **table)
    ds.file_meta.MediaStorageSOPClassUID = UID(f"{STORAGE}.12.2")
    np.testing.assert_array_equal(picture_from_dicom(ds).pixels, RAMP)


def test_a_voi_lut_of_an_angiogram_is_asked_for_stored_values():
    ds = of_class("12.1", RescaleSlope=1, RescaleIntercept=-1024, VOILUTSequence=[lut(0, SQUARED, 8)])
    assert picture_from_dicom(ds).pixels.ravel().tolist() == SQUARED


# --- offset tables ------------------------------------------------------------------------------------------------------------


def encapsulated(offsets, fragments):
    """A Basic Offset Table of these entries, then the fragments (PS3.5 A.4)."""
    items = [struct.pack(f"<{len(offsets)}L", *offsets), *(data + bytes(len(data) % 2) for data in fragments)]
    return b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<L", len(data)) + data for data in items) + b"\xfe\xff\xdd\xe0\0\0\0\0"


FRAMES = np.kron([RAMP, RAMP[::-1], RAMP.T], np.ones((1, 2, 2), np.uint8))


def codestream(frame, syntax):
    if syntax == RLE:
        runs = b"".join(b"\x7f" + part.tobytes() for part in frame.reshape(-1, 128))
        return struct.pack("<16L", 1, 64, *[0] * 14) + runs
    if syntax == JPEG_LS:
        return bytes(jpeg_ls.encode_array(frame))
    if syntax == J2K:
        return bytes(encode_array(frame, bits_stored=8))
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=100)
    return file.getvalue()


def multiframe(syntax, pieces, offsets=(), frames=3, **elements):
    ds = dataset(FRAMES[0], WindowCenter=128, WindowWidth=256, **elements)
    ds.NumberOfFrames = frames
    ds.file_meta.TransferSyntaxUID, ds.PixelData = UID(syntax), encapsulated(offsets, pieces)
    ds["PixelData"].is_undefined_length = True
    return ds


def places(pieces):
    """The offsets that a table should have, and where the next one would be."""
    return np.cumsum([0, *(8 + len(piece) + len(piece) % 2 for piece in pieces)]).tolist()


ENCAPSULATED = [RLE, JPEG_LS, J2K, JPEG]
LIES = {
    "empty": lambda at: (),
    "zeros": lambda at: (0, 0, 0),
    "swapped": lambda at: (at[0], at[2], at[1]),
    "turned round": lambda at: (at[2], at[1], at[0]),
    "repeated": lambda at: (at[0], at[1], at[1]),
    "short": lambda at: at[:2],
    "one entry": lambda at: at[:1],
    "long": lambda at: at,
    "from the table on": lambda at: [offset + 20 for offset in at[:3]],
    "behind the items": lambda at: [offset + 8 for offset in at[:3]],
    "of the next frame": lambda at: at[1:4],
    "beyond the file": lambda at: (0, 1 << 20, 0xFFFFFFFF),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("syntax", ENCAPSULATED)
def test_as_many_fragments_as_frames_are_the_frames(tmp_path, syntax, lie):
    pieces = [codestream(frame, syntax) for frame in FRAMES]
    ds = multiframe(syntax, pieces, LIES[lie](places(pieces)))
    for source in (ds, written(ds, tmp_path / "x")):
        for index in range(3):
            error = np.abs(picture_from_dicom(source, frame=index).pixels.astype(int) - FRAMES[index]).max()
            assert error <= (2 if syntax == JPEG else 0)


@pytest.mark.parametrize("lengths", [None, (1, 1, 1), (4, 4, 4)])
def test_an_extended_offset_table_that_lies(lengths):
    pieces = [codestream(frame, JPEG_LS) for frame in FRAMES]
    lengths = lengths or [len(piece) for piece in pieces]
    for offsets in ((0, 0, 0), places(pieces)[2::-1], (0, 1 << 40, 1 << 41), (0,)):
        tables = {
            "ExtendedOffsetTable": struct.pack(f"<{len(offsets)}Q", *offsets),
            "ExtendedOffsetTableLengths": struct.pack("<3Q", *lengths),
        }
        for index in range(3):
            np.testing.assert_array_equal(picture_from_dicom(multiframe(JPEG_LS, pieces, **tables), frame=index).pixels, FRAMES[index])


def halved(pieces):
    """Every codestream in two fragments."""
    return [half for piece in pieces for half in (piece[: len(piece) // 4 * 2], piece[len(piece) // 4 * 2 :])]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("syntax", ENCAPSULATED)
def test_frames_of_several_fragments_begin_at_their_codestreams(syntax, lie):
    pieces = halved([codestream(frame, syntax) for frame in FRAMES])
    ds = multiframe(syntax, pieces, LIES[lie](places(pieces)[::2]))
    for index in range(3):
        error = np.abs(picture_from_dicom(ds, frame=index).pixels.astype(int) - FRAMES[index]).max()
        assert error <= (2 if syntax == JPEG else 0)


def test_frames_of_several_fragments_that_only_a_table_can_tell():
    """Where no fragment has a whole start, a table is believed that rises, fits the fragments and has an entry for each frame."""
    pieces = [part for frame in FRAMES for part in (codestream(frame, RLE)[:4], codestream(frame, RLE)[4:])]
    at = places(pieces)[::2]
    extended = {"ExtendedOffsetTable": struct.pack("<3Q", *at[:3]), "ExtendedOffsetTableLengths": struct.pack("<3Q", 322, 322, 322)}
    for ds in (multiframe(RLE, pieces, at[:3]), multiframe(RLE, pieces, (0, 0, 0), **extended), multiframe(RLE, pieces, **extended)):
        for index in range(3):
            np.testing.assert_array_equal(picture_from_dicom(ds, frame=index).pixels, FRAMES[index])
    for lie in LIES.values():
        refused(multiframe(RLE, pieces, lie(at)), "nothing tells which piece begins a frame")


def test_a_frame_of_several_fragments_alone():
    for syntax in ENCAPSULATED:
        piece = codestream(FRAMES[0], syntax)
        for pieces in ([piece[:50], piece[50:100], b"", piece[100:]], [piece, b""]):
            error = np.abs(picture_from_dicom(multiframe(syntax, pieces, (0, 7), frames=1)).pixels.astype(int) - FRAMES[0]).max()
            assert error <= (2 if syntax == JPEG else 0)


@pytest.mark.parametrize("syntax", [JPEG_LS, J2K, JPEG])
def test_a_frame_that_holds_two_codestreams_is_refused(syntax):
    one, other, third = (codestream(frame, syntax) for frame in FRAMES)
    message = "holds more than one compressed picture"
    refused(multiframe(syntax, [one, other], frames=1), message)
    refused(multiframe(syntax, [one, other], frames=None), message)
    refused(multiframe(syntax, [one + other], frames=1), message)
    refused(multiframe(syntax, [one + b"\0\0\0" + other, third], frames=2), message, frame=0)
    refused(multiframe(syntax, [one, other, third], places([one, other])[:2], frames=2), message, frame=1)
    refused(multiframe(syntax, [one, other, third], frames=2), "nothing tells which piece begins a frame")


def test_a_frame_that_holds_two_rle_pictures_is_refused():
    one, other, third = (codestream(frame, RLE) for frame in FRAMES)
    refused(multiframe(RLE, [one, other], frames=1), "holds more than one compressed picture")
    refused(multiframe(RLE, [one, other, third], places([one, other])[:2], frames=2), "holds more than one compressed picture", frame=1)
    refused(multiframe(RLE, [one, other, third], frames=2), "nothing tells which piece begins a frame")


# --- native pixel data of another length --------------------------------------------------------------------------------------


YBR = pattern(6, 8, 3)
AS_FULL = "the pixel data is as long as YBR_FULL is, not YBR_FULL_422, and is read as YBR_FULL"


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN, DEFLATED])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_three_bytes_a_pixel_under_a_422_label(tmp_path, frames, syntax):
    several = np.stack([np.roll(YBR, index, axis=0) for index in range(frames)])
    ds = dataset(several, syntax, NumberOfFrames=frames, PhotometricInterpretation="YBR_FULL_422")
    right = dataset(several, syntax, NumberOfFrames=frames, PhotometricInterpretation="YBR_FULL")
    for source in (ds, saved(ds, tmp_path / "x")):
        for index in range(frames):
            picture = picture_from_dicom(source, frame=index)
            np.testing.assert_array_equal(picture.pixels, picture_from_dicom(right, frame=index).pixels)
            assert picture.info.warnings == (AS_FULL,)


def test_three_planes_under_a_422_label():
    ds = dataset(YBR, PhotometricInterpretation="YBR_FULL_422", PlanarConfiguration=1)
    ds.PixelData = np.ascontiguousarray(YBR.transpose(2, 0, 1)).tobytes()
    expected = picture_from_dicom(dataset(YBR, PhotometricInterpretation="YBR_FULL")).pixels
    np.testing.assert_array_equal(picture_from_dicom(ds).pixels, expected)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_two_bytes_of_padding_are_accepted(padding):
    for array, elements in (
        (YBR, {}),
        (YBR, {"PhotometricInterpretation": "YBR_FULL"}),
        (pattern(5, 7, 1), {}),
        (pattern(5, 7, 1) * np.uint16(9), {}),
    ):
        ds = dataset(array, **elements)
        expected = picture_from_dicom(ds)
        ds.PixelData = array.tobytes() + bytes(padding)
        picture = picture_from_dicom(ds)
        np.testing.assert_array_equal(picture.pixels, expected.pixels)
        assert picture.info.warnings == ()
    ds = dataset(np.zeros((2, 4, 3), np.uint8), PhotometricInterpretation="YBR_FULL_422")
    ds.PixelData = bytes([50, 60, 128, 128, 70, 80, 128, 128] * 2) + bytes(padding)
    np.testing.assert_array_equal(picture_from_dicom(ds).pixels[:, :, 0], [[50, 60, 70, 80]] * 2)


@pytest.mark.parametrize(
    ("array", "factor", "elements"),
    [(YBR, 4 / 3, {}), (YBR, 4 / 3, {"PhotometricInterpretation": "YBR_FULL"}), (YBR, 4 / 3, {"PlanarConfiguration": 1}), (YBR, 2, {}),
     (YBR, 4 / 3, {"PhotometricInterpretation": "YBR_FULL_422"}), (RAMP, 2, {}), (RAMP, 3, {}), (RAMP, 4, {}), (RAMP.view(np.int8), 2, {}),
     (RAMP * np.uint16(9), 2, {}), (RAMP * np.uint16(9), 1.5, {"BitsStored": 12}), (FRAMES, 2, {"NumberOfFrames": 3}),
     (np.stack([YBR] * 3), 4 / 3, {"NumberOfFrames": 3}), (RAMP, 1, {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0})],
)  # fmt: skip
def test_another_number_of_bytes_for_each_pixel_is_refused(tmp_path, array, factor, elements):
    """Whether they are an alpha channel, wider samples or more frames, nothing tells."""
    ds = dataset(array, **elements)
    whole = array.tobytes()
    for padding in (0, 1, 2):
        ds.PixelData = (whole * 4)[: round(len(whole) * factor)] + bytes(padding)
        refused(ds, "another number for each pixel")
    refused(saved(ds, tmp_path / "x"), "another number for each pixel")


def test_what_follows_the_pixels_and_is_no_multiple_is_left_out():
    ds = dataset(pattern(16, 16, 1))
    ds.PixelData += bytes(100)
    np.testing.assert_array_equal(picture_from_dicom(ds).pixels, picture_from_dicom(dataset(pattern(16, 16, 1))).pixels)


# --- the sign of a table's first mapped value ---------------------------------------------------------------------------------


ENTRIES = np.linspace(0, 4095, 3000).astype(int)


def through(first, values, count=3000):
    """C.11.2.1.1, with ENTRIES of 12 bits."""
    return ENTRIES[:count][np.clip(values - first, 0, count - 1)] * 255 / 4095


@pytest.mark.parametrize("vr", ["US", "SS"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize("start", [0, 1100, 1300])
def test_the_sign_of_the_first_mapped_value_is_the_headers(tmp_path, start, syntax, signed, vr):
    """Not that of the pixels of this frame: with 1100 and 1300 no modality value is below 0."""
    stored = np.arange(start, start + 640, 10, dtype=np.int16 if signed else np.uint16).reshape(8, 8)
    rescale = {} if signed else {"RescaleSlope": 1, "RescaleIntercept": -1024}
    ds = dataset(stored, syntax, VOILUTSequence=[lut(-1000 if vr == "SS" else 64536, ENTRIES, 12, vr, "US")], **rescale)
    expected = through(-1000, stored.astype(int) - (0 if signed else 1024))
    picture = picture_from_dicom(written(ds, tmp_path / "x"))
    assert np.abs(picture.pixels - expected).max() <= 0.5 + 1e-9
    assert (picture.info.window, picture.info.warnings) == (None, ())


def test_two_frames_go_through_the_same_table():
    stored = np.stack([np.arange(0, 640, 10), np.arange(1100, 1740, 10)]).astype(np.uint16).reshape(2, 8, 8)
    voi = [item(FrameVOILUTSequence=[item(VOILUTSequence=[lut(64536, ENTRIES, 12)])])]
    rescale = [item(PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-1024)])]
    plain = {"VOILUTSequence": [lut(64536, ENTRIES, 12)], "RescaleSlope": 1, "RescaleIntercept": -1024}
    voi[0].update(rescale[0])
    for elements in (plain, {"SharedFunctionalGroupsSequence": voi}, {"PerFrameFunctionalGroupsSequence": voi * 2}):
        ds = dataset(stored, NumberOfFrames=2, **elements)
        for frame in (0, 1):
            expected = through(-1000, stored[frame].astype(int) - 1024)
            assert np.abs(picture_from_dicom(ds, frame=frame).pixels - expected).max() <= 0.5 + 1e-9


def test_a_first_mapped_value_that_is_large_and_not_negative():
    values = np.arange(40000, 42560, 40, dtype=np.uint16).reshape(8, 8)
    expected = through(40000, values.astype(int))
    for vr, first in (("US", 40000), ("SS", 40000 - 65536)):  # writers take the wrong one
        ds = dataset(values, VOILUTSequence=[lut(first, ENTRIES, 12, vr)])
        assert np.abs(picture_from_dicom(ds).pixels - expected).max() <= 0.5 + 1e-9
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024  # signed by the header, and -25536 to -22537 are below every possible value
        values_after = values.astype(int) - 1024
        assert np.abs(picture_from_dicom(ds).pixels - through(40000, values_after)).max() <= 0.5 + 1e-9
    ds = dataset(
        np.arange(640, dtype=np.uint16).reshape(20, 32), VOILUTSequence=[lut(-1000, ENTRIES, 12, "SS")]
    )  # whatever the header says
    assert np.abs(picture_from_dicom(ds).pixels - through(-1000, np.arange(640).reshape(20, 32))).max() <= 0.5 + 1e-9
    wide = dataset(np.array([[0, 1024, 2047]], np.uint16), RescaleSlope=1, RescaleIntercept=-1024, BitsStored=12)
    wide.VOILUTSequence = [lut(32768, range(65536))]  # from -32768 on
    assert picture_from_dicom(wide).pixels.tolist() == [[124, 128, 131]]


def test_a_table_behind_a_modality_lut_or_a_negative_slope():
    """A Modality LUT gives unsigned values, and a slope below 0 may give negative ones."""
    stored = np.arange(64, dtype=np.uint8).reshape(8, 8)
    ds = dataset(stored, ModalityLUTSequence=[lut(0, range(40000, 42560, 40))], VOILUTSequence=[lut(40000, ENTRIES, 12)])
    assert np.abs(picture_from_dicom(ds).pixels - through(40000, 40000 + 40 * stored.astype(int))).max() <= 0.5 + 1e-9
    ds = dataset(stored, RescaleSlope=-10, RescaleIntercept=1000, VOILUTSequence=[lut(64536, ENTRIES, 12)])
    assert np.abs(picture_from_dicom(ds).pixels - through(-1000, 1000 - 10 * stored.astype(int))).max() <= 0.5 + 1e-9


def test_the_sign_of_a_modality_luts_first_mapped_value():
    for vr, first in (("US", 65532), ("SS", -4)):
        ds = dataset(np.array([[-5, -4, -3, 3]], np.int16), ModalityLUTSequence=[lut(first, range(0, 2040, 255), vr=vr)])
        ds.WindowCenter, ds.WindowWidth = 1020, 2041
        assert picture_from_dicom(ds).pixels.tolist() == [[0, 0, 32, 223]]


# --- decimal strings ----------------------------------------------------------------------------------------------------------


CT = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
NUMBERS = {"RescaleIntercept": b"-1024,0 ", "RescaleSlope": b"1,0 ", "WindowCenter": b"40,5", "WindowWidth": b"400,0 "}


def with_texts(path, syntax, texts, **elements):
    """A file whose decimal strings are these bytes."""
    ds = dataset(CT, syntax, **elements)
    for index, keyword in enumerate(texts):
        setattr(ds, keyword, f"{index + 1}" * len(texts[keyword]))
    raw = written(ds, path).read_bytes()
    for index, text in enumerate(texts.values()):
        place = f"{index + 1}".encode() * len(text)
        assert raw.count(place) == 1
        raw = raw.replace(place, text)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize(
    ("texts", "numbers"),
    [(NUMBERS, (1, -1024, 40.5, 400)), ({"RescaleIntercept": b"-1,024E3", "RescaleSlope": b" 2,5e-1 "}, (0.25, -1024, None, None)),
     ({"RescaleIntercept": b"-1024,5\0", "RescaleSlope": b",5", "WindowCenter": b"-700,5\\40,5 ", "WindowWidth": b"900,25\\400,5"},
      (0.5, -1024.5, -700.5, 900.25))],
)  # fmt: skip
def test_a_comma_is_the_decimal_mark(tmp_path, texts, numbers, syntax):
    slope, intercept, center, width = numbers
    path = with_texts(tmp_path / "x", syntax, texts)
    for source in (path, pydicom.dcmread(path)):
        picture = picture_from_dicom(source)
        if center is None:
            low, high = CT.min() * slope + intercept, CT.max() * slope + intercept
            assert picture.info.window == ((low + high + 1) / 2, high - low + 1)
        else:
            assert picture.info.window == (center, width)
            assert_close_to_oracle(picture.pixels, CT, slope, intercept, center, width)
        assert picture.info.warnings == ()


def test_a_comma_in_functional_groups(tmp_path):
    ds = dataset(np.stack([CT, CT]), NumberOfFrames=2)
    ds.PerFrameFunctionalGroupsSequence = [
        item(
            PixelValueTransformationSequence=[item(RescaleSlope="1.5", RescaleIntercept=f"-{frame}024.5")],
            FrameVOILUTSequence=[item(WindowCenter="40.5", WindowWidth="400")],
        )
        for frame in (1, 2)
    ]
    path = written(ds, tmp_path / "x")
    path.write_bytes(path.read_bytes().replace(b"024.5", b"024,5").replace(b"40.5", b"40,5").replace(b"1.5", b"1,5"))
    for frame in (0, 1):
        picture = picture_from_dicom(path, frame=frame)
        assert_close_to_oracle(picture.pixels, CT, 1.5, -1024.5 - 1000 * frame, 40.5, 400)
        assert picture.info.window == (40.5, 400)


def test_a_comma_in_other_decimal_strings(tmp_path):
    ds = dataset(CT, Modality="CT", ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    raw = saved(ds, tmp_path / "x").read_bytes()
    (tmp_path / "y").write_bytes(raw.replace(b"1\\0\\0\\0\\1\\0 ", b"1,0\\0\\,0\\0\\1\\0 ").replace(b"DS\x0c\0", b"DS\x10\0"))
    assert header_from_dataset(pydicom.dcmread(tmp_path / "y")).plane == "axial"


def test_bytes_that_are_no_decimal_string_may_hold_a_comma(tmp_path):
    """44 rows are the bytes of a comma and a zero."""
    for syntax in (IMPLICIT, EXPLICIT):
        path = saved(dataset(pattern(44, 44, 1), syntax, WindowCenter=128, WindowWidth=256), tmp_path / "x")
        np.testing.assert_array_equal(picture_from_dicom(path).pixels, pattern(44, 44, 1))


@pytest.mark.parametrize(("intercept", "slope"), [(b"- 1024", b"1 "), (b"1.024,0 ", b"1 "), (b"-1024 ", b"0,0 "), (b"-1024 ", b"NO")])
@pytest.mark.parametrize("voi", [{"WindowCenter": 40, "WindowWidth": 400}, {"VOILUTSequence": [lut(64536, ENTRIES, 12)]}])
def test_without_its_rescale_no_window_is_applied(tmp_path, intercept, slope, voi):
    path = with_texts(tmp_path / "x", EXPLICIT, {"RescaleIntercept": intercept, "RescaleSlope": slope}, **voi)
    picture = picture_from_dicom(path)
    np.testing.assert_array_equal(picture.pixels, picture_from_dicom(dataset(CT)).pixels)
    assert picture.info.window == (2016.5, 4033.0)
    assert any("not applied; an automatic window is used" in note for note in picture.info.warnings)
    refused(path, "modality transformation cannot be used", window=(40, 400))


def test_a_modality_lut_that_is_lost_takes_the_window_with_it():
    broken = [item(LUTDescriptor=[4, 0, 16])]
    ds = dataset(CT, ModalityLUTSequence=broken, WindowCenter=40, WindowWidth=400)
    assert picture_from_dicom(ds).info.window == (2016.5, 4033.0)
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024  # which is usable
    assert picture_from_dicom(ds).info.window == (40, 400)


# --- value representations, byte orders and encodings -------------------------------------------------------------------------


@pytest.mark.parametrize("array", [pattern(6, 8, 1), CT, pattern(6, 8, 3)], ids=["u8", "u16", "rgb"])
@pytest.mark.parametrize("vr", ["OB", "OW", "OF", "OD", "OL", "OV", "UN", "UT", "UC", "SV", "UV", "OX", "US", "SS", "UL"])
def test_pixel_data_of_any_explicit_vr(tmp_path, vr, array):
    raw = saved(dataset(array), tmp_path / "x").read_bytes()
    head, length, pixels = raw.partition(b"\xe0\x7f\x10\x00OW\0\0" + struct.pack("<L", array.nbytes))
    assert length and pixels == array.tobytes()
    field = struct.pack("<H", array.nbytes) if vr in ("US", "SS", "UL") else struct.pack("<HL", 0, array.nbytes)
    expected = picture_from_dicom(dataset(array)).pixels
    for syntax in (EXPLICIT, DEFLATED):
        (tmp_path / "y").write_bytes(head + b"\xe0\x7f\x10\x00" + vr.encode() + field + pixels)
        if syntax == DEFLATED:
            start = head.index(b"\x08\x00\x16\x00UI")
            (tmp_path / "y").write_bytes(deflated((tmp_path / "y").read_bytes()[start:]))
        np.testing.assert_array_equal(picture_from_dicom(tmp_path / "y").pixels, expected)
    with (tmp_path / "y").open("rb") as file:
        np.testing.assert_array_equal(picture_from_dicom("bytes", data=file.read()).pixels, expected)


def test_compressed_pixel_data_of_another_vr(tmp_path):
    raw = saved(multiframe(JPEG_LS, [codestream(FRAMES[0], JPEG_LS)], frames=1), tmp_path / "x").read_bytes()
    for vr in (b"OW", b"UN", b"OF"):
        changed = raw.replace(b"\xe0\x7f\x10\x00OW", b"\xe0\x7f\x10\x00" + vr)
        (tmp_path / "y").write_bytes(changed.replace(b"\xe0\x7f\x10\x00OB", b"\xe0\x7f\x10\x00" + vr))
        assert (tmp_path / "y").read_bytes().count(b"\xe0\x7f\x10\x00" + vr) == 1
        np.testing.assert_array_equal(picture_from_dicom(tmp_path / "y").pixels, FRAMES[0])


def test_a_dataset_in_memory_whose_pixel_data_has_another_vr():
    ds = dataset(CT)
    for vr in ("OF", "OD", "OL", "OV", "UN"):
        ds["PixelData"].VR = vr
        np.testing.assert_array_equal(picture_from_dicom(ds).pixels, picture_from_dicom(dataset(CT)).pixels)


def deflated(body, syntax=DEFLATED, group_length=True):
    """A file with its preamble whose dataset is this one, deflated."""
    uid = syntax.encode() + bytes(len(syntax) % 2)
    meta = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(uid)) + uid
    group = b"\x02\x00\x00\x00UL\x04\x00" + struct.pack("<L", len(meta)) if group_length else b""
    deflater = zlib.compressobj(wbits=-15)
    return bytes(128) + b"DICM" + group + meta + deflater.compress(body) + deflater.flush()


@pytest.mark.parametrize("group_length", [True, False])
@pytest.mark.parametrize("preamble", [True, False])
def test_deflated_files(tmp_path, monkeypatch, preamble, group_length):
    ds = pydicom.dcmread(shipped("image_dfl.dcm"))
    raw = saved(ds, tmp_path / "x").read_bytes()
    start = 144 + int.from_bytes(raw[140:144], "little")
    data = deflated(zlib.decompress(raw[start:], -15), group_length=group_length)[0 if preamble else 132 :]
    (tmp_path / "y").write_bytes(data)
    expected = picture_from_dicom(shipped("image_dfl.dcm")).pixels
    for picture in (picture_from_dicom(tmp_path / "y"), picture_from_dicom("bytes", data=data)):
        np.testing.assert_array_equal(picture.pixels, expected)
        assert picture.info.transfer_syntax == DEFLATED
    (tmp_path / "y").write_bytes(data[:-20])
    refused(tmp_path / "y", "cut short")
    monkeypatch.setattr(dicom_file, "MAX_INFLATED", 1 << 20)
    (tmp_path / "y").write_bytes(deflated(bytes(2 << 20), group_length=group_length)[0 if preamble else 132 :])
    refused(tmp_path / "y", "inflates to more than")


def unknown(tag, items, is_defined):
    """A sequence of VR UN and undefined length in a big-endian file: implicit little endian within (CP-246, PS3.5 6.2.2)."""
    out = struct.pack(">2H", tag >> 16, tag & 0xFFFF) + b"UN\0\0\xff\xff\xff\xff"
    for one in items:
        file = DicomBytesIO()
        file.is_little_endian = file.is_implicit_VR = True
        write_dataset(file, one)
        body = file.getvalue()
        length, end = (struct.pack("<L", len(body)), b"") if is_defined else (b"\xff\xff\xff\xff", b"\xfe\xff\x0d\xe0\0\0\0\0")
        out += b"\xfe\xff\x00\xe0" + length + body + end
    return out + b"\xfe\xff\xdd\xe0\0\0\0\0"


def big_endian_sequence(body, is_defined):
    """A sequence of one item in explicit big endian."""
    if is_defined:
        one = b"\xff\xfe\xe0\x00" + struct.pack(">L", len(body)) + body
        return b"\x00\x08\x22\x18SQ\0\0" + struct.pack(">L", len(one)) + one
    one = b"\xff\xfe\xe0\x00\xff\xff\xff\xff" + body + b"\xff\xfe\xe0\x0d\0\0\0\0"
    return b"\x00\x08\x22\x18SQ\0\0\xff\xff\xff\xff" + one + b"\xff\xfe\xe0\xdd\0\0\0\0"


@pytest.mark.parametrize("is_defined", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("tag", [0x00091001, 0x00082218])
def test_a_sequence_of_unknown_vr_in_a_big_endian_file(tmp_path, tag, count, is_defined):
    ds = dataset(CT, BIG_ENDIAN, WindowCenter=2048, WindowWidth=4096)
    raw = saved(ds, tmp_path / "x").read_bytes()
    inner = item(PatientName=SECRET, Rows=7, AnatomicRegionSequence=[item(CodeValue="1", RescaleSlope="2")])
    element = unknown(tag, [inner] * count, is_defined)
    at = raw.index(b"\x00\x28\x00\x02US")
    for between in (element, big_endian_sequence(element, True), big_endian_sequence(element, False), element * 2):
        (tmp_path / "y").write_bytes(raw[:at] + between + raw[at:])
        np.testing.assert_array_equal(picture_from_dicom(tmp_path / "y").pixels, picture_from_dicom(ds).pixels)


def test_a_voi_lut_of_unknown_vr_in_a_big_endian_file(tmp_path):
    ds = dataset(CT, BIG_ENDIAN)
    table = lut(0, range(0, 65536, 16))
    raw = saved(ds, tmp_path / "x").read_bytes()
    at = raw.index(b"\x7f\xe0\x00\x10OW")
    (tmp_path / "y").write_bytes(raw[:at] + unknown(0x00283010, [table], True) + raw[at:])
    expected = picture_from_dicom(dataset(CT, VOILUTSequence=[table])).pixels
    np.testing.assert_array_equal(picture_from_dicom(tmp_path / "y").pixels, expected)


@pytest.mark.parametrize("said", ["monochrome1", "Monochrome1 ", "MONOCHROME1\0", " monoCHROME1"])
def test_code_strings_in_lower_case(tmp_path, said):
    ds = dataset(RAMP, WindowCenter=128, WindowWidth=256, Modality="ct", BurnedInAnnotation="yes", VOILUTFunction="linear_exact")
    right = dataset(RAMP, WindowCenter=128, WindowWidth=256, PhotometricInterpretation="MONOCHROME1", VOILUTFunction="LINEAR_EXACT")
    ds.PhotometricInterpretation = said
    for source in (ds, written(ds, tmp_path / "x")):
        picture = picture_from_dicom(source)
        np.testing.assert_array_equal(picture.pixels, picture_from_dicom(right).pixels)
        assert (picture.info.photometric, picture.info.modality) == ("MONOCHROME1", "CT")
        assert "burned" in picture.info.warnings[0]
    np.testing.assert_array_equal(picture_from_dicom(dataset(RAMP, PresentationLUTShape="inverse")).pixels, 255 - RAMP)
    refused(dataset(RAMP, Modality="seg"), "segmentation")


@pytest.mark.parametrize(
    ("said", "name"), [("rgb", "RGB"), ("ybr_full", "YBR_FULL"), ("YBR FULL", "YBR_FULL"), ("Ybr_Full_422", "YBR_FULL_422")]
)
def test_colour_in_lower_case(said, name):
    array = pattern(6, 8, 3)
    if name == "YBR_FULL_422":
        said_so, right = (dataset(array[:, :, :2].repeat(3, axis=2)[:, :, :3], PhotometricInterpretation=label) for label in (said, name))
        said_so.PixelData = right.PixelData = array[:, :, :2].tobytes()
    else:
        said_so, right = (dataset(array, PhotometricInterpretation=label) for label in (said, name))
    np.testing.assert_array_equal(picture_from_dicom(said_so).pixels, picture_from_dicom(right).pixels)
    assert picture_from_dicom(said_so).info.photometric == name


# --- JPEG-LS with bytes that no sample takes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [b"\0", b"\0\0", bytes(3), bytes(64), b"\xff", b"\0\xff", b"\0\xff\xff"])
@pytest.mark.parametrize("bits", [2, 8, 12, 16])
def test_padded_jpeg_ls(tmp_path, bits, padding):
    """The picture is unchanged, also if the samples themselves end in zero bytes."""
    random = np.random.default_rng(bits)
    ends_in_zero = bits == 2  # never
    for count in range(60):
        shape = random.integers(20, 30, 2)
        values = random.integers(0, 1 << (bits - 1), shape) if count % 2 else (random.random(shape) < 0.2) * random.integers(1, 1 << bits)
        array = values.astype(np.uint8 if bits <= 8 else np.uint16)
        array[0, 0] = (1 << bits) - 1  # of which the encoder takes its depth
        stream = bytes(jpeg_ls.encode_array(array))
        end = stream.rindex(b"\xff\xd9")
        ends_in_zero += stream[end - 1] == 0
        ds = dataset(array, BitsStored=bits)
        expected = picture_from_dicom(ds).pixels
        ds.file_meta.TransferSyntaxUID = UID(JPEG_LS)
        ds.PixelData = encapsulated((), [stream[:end] + padding + stream[end:]])
        np.testing.assert_array_equal(picture_from_dicom(ds).pixels, expected)
    assert ends_in_zero


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("everywhere", [True, False])
def test_padded_jpeg_ls_in_colour(mode, everywhere):
    rgb = pattern(16, 24, 3)
    stream = bytes(jpeg_ls.encode_array(np.ascontiguousarray(rgb.transpose(2, 0, 1)) if mode == 0 else rgb, interleave_mode=mode))
    ends = [*([m.start() for m in re.finditer(rb"\xff\xda", stream)][1:] if everywhere else []), stream.rindex(b"\xff\xd9")]
    for end in reversed(ends):
        stream = stream[:end] + b"\0" + stream[end:]
    ds = dataset(rgb)
    ds.file_meta.TransferSyntaxUID, ds.PixelData = UID(JPEG_LS), encapsulated((), [stream])
    np.testing.assert_array_equal(picture_from_dicom(ds).pixels, rgb)


def test_jpeg_ls_that_is_broken_stays_refused():
    stream = codestream(FRAMES[0], JPEG_LS)
    for broken in (stream[:-8] + stream[-2:], stream[:-2] + b"\1\0\0" + stream[-2:], stream[:60] + bytes(40) + stream[-2:]):
        refused(multiframe(JPEG_LS, [broken], frames=1), "compressed data is broken")
