"""Property: whatever the bytes, the reader gives a picture or an InputError of one line, in bounded time and memory, and no process dies.

The mutations run in child processes with a limit on memory and time, so that a crash of a native decoder is a failed test and
not the end of the test run. FUZZ_ROUNDS=2000 in the environment goes deeper.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file

from pmclip_deploy.errors import InputError
from pmclip_deploy.imaging.dicom import picture_from_dicom
from pmclip_deploy.imaging.picture import Picture
from pmclip_deploy.imaging.read import picture_from_path

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "80"))
LIMIT_BYTES, LIMIT_SECONDS = 2 << 30, 10
NATIVE = ["MR_small.dcm", "ExplVR_BigEnd.dcm", "MR_small_implicit.dcm", "examples_palette.dcm", "image_dfl.dcm"]
COMPRESSED = [
    "MR_small_RLE.dcm", "SC_rgb_jpeg_dcmtk.dcm", "JPEG-lossy.dcm", "SC_rgb_jpeg_gdcm.dcm", "MR_small_jpeg_ls_lossless.dcm",
    "JPEGLSNearLossless_08.dcm", "MR_small_jp2klossless.dcm", "GDCMJ2K_TextGBR.dcm", "examples_ybr_color.dcm",
]  # fmt: skip

CHILD = """
import json, random, resource, signal, sys, time
from pmclip_deploy import process
from pmclip_deploy.errors import InputError
from pmclip_deploy.imaging.decoders import rle
from pmclip_deploy.imaging.read import picture_from_path

source, target, rounds, seed, memory, seconds = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
process.taken_over = True  # as the command line does: libjpeg is quiet, so what stands on stderr is a traceback
raw = open(source, "rb").read()
pixels = max(raw.rfind(b"\\xe0\\x7f\\x10\\x00"), raw.rfind(b"\\x7f\\xe0\\x00\\x10"), 0) or len(raw) // 2
group = max(raw.find(b"\\x28\\x00\\x02\\x00"), raw.find(b"\\x00\\x28\\x00\\x02"), 132)
regions = {"any": (0, len(raw)), "image module": (group, pixels), "first bytes of pixels": (pixels, min(pixels + 300, len(raw)))}
regions["pixels"] = (pixels, len(raw))
for round in range(rounds):
    chance = random.Random(seed * 1000003 + round)
    data = bytearray(raw)
    low, high = regions[chance.choice(sorted(regions))]
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        at = chance.randrange(low, max(high, low + 1))
        data[at % len(data)] = chance.choice([0, 255, chance.randrange(256), data[at % len(data)] ^ 1 << chance.randrange(8)])
    if chance.random() < 0.2:
        del data[chance.randrange(len(data)) :]
    if chance.random() < 0.1:
        at = chance.randrange(len(data) + 1)
        data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(9)))
    open(target, "wb").write(data)
    rle.LARGE = chance.choice([1, 1 << 18])  # also through the decoders of large frames
    signal.alarm(seconds)
    try:
        picture = picture_from_path(target)
        assert picture.pixels.dtype == "uint8" and picture.pixels.size, round
    except InputError as error:
        assert "\\n" not in str(error), round
    signal.alarm(0)
print(json.dumps({"rounds": rounds}))
"""


@pytest.mark.parametrize("name", NATIVE + COMPRESSED)
def test_mutated_files(name, tmp_path):
    target = tmp_path / "mutated"
    arguments = [get_testdata_file(name, download=False), target, ROUNDS, 1, LIMIT_BYTES, LIMIT_SECONDS]
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS + ROUNDS)
    assert (done.returncode, done.stderr) == (0, ""), f"{target} holds the bytes that did it"
    assert json.loads(done.stdout) == {"rounds": ROUNDS}


def outcome(source):
    """The one thing that may come out beside a picture."""
    try:
        picture = picture_from_dicom(source) if not isinstance(source, Path) else picture_from_path(source)
    except InputError as error:
        assert "\n" not in str(error)
        return error
    assert isinstance(picture, Picture)
    assert picture.pixels.shape[:2] == (picture.info.rows, picture.info.columns)
    return picture


EASY = settings(max_examples=150, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck))
KEYWORDS = [
    "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation",
    "PlanarConfiguration", "NumberOfFrames", "WindowCenter", "WindowWidth", "VOILUTFunction", "RescaleSlope", "RescaleIntercept",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "PresentationLUTShape", "VOILUTSequence", "ModalityLUTSequence", "BurnedInAnnotation",
    "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence", "RedPaletteColorLookupTableDescriptor", "Modality", "SOPClassUID",
]  # fmt: skip
VRS = ["US", "SS", "UL", "IS", "DS", "CS", "LO", "FD", "OW", "UN", "SQ", "UI"]
VALUES = {
    "US": st.integers(0, 65535) | st.lists(st.integers(0, 65535), max_size=4),
    "SS": st.integers(-32768, 32767), "UL": st.integers(0, 2**32 - 1),
    "FD": st.floats(), "SQ": st.just([]), "OW": st.binary(max_size=9), "UN": st.binary(max_size=9),
    "IS": st.sampled_from(["", "0", "1", "-1", "2", "99999999", "nan", "x"]),
    "DS": st.sampled_from(["", "0", "1e400", "-5", "nan", "inf", "0.001", "x", "1\\2"]),
    "CS": st.sampled_from(["", "RGB", "MONOCHROME1", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "SIGMOID", "INVERSE", "x" * 99]),
    "LO": st.text(max_size=9), "UI": st.sampled_from(["", "1.2.840.10008.5.1.4.1.1.2", "x"]),
}  # fmt: skip
EDITS = st.lists(st.sampled_from(KEYWORDS).flatmap(lambda keyword: st.sampled_from(VRS).flatmap(
    lambda vr: VALUES[vr].map(lambda value: (keyword, vr, value)))), min_size=1, max_size=5)  # fmt: skip


@EASY
@given(EDITS)
def test_random_elements(edits):
    dataset = dcmread(get_testdata_file("MR_small.dcm", download=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword, vr, value in edits:
            try:
                dataset.add_new(keyword, vr, value)
            except Exception:  # pydicom will not even hold it
                continue
        outcome(dataset)


NO_NUMBERS = [("PN", "A^B"), ("PN", ["A^B", "C^D", "E^F"]), ("SQ", []), ("SQ", [Dataset()]), ("SQ", [Dataset()] * 3)]


@pytest.mark.parametrize("sequence", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize("keyword", ["LUTDescriptor", "LUTData"])
@pytest.mark.parametrize(("vr", "value"), NO_NUMBERS)
def test_a_lut_of_a_wrong_vr_is_not_applied(sequence, keyword, vr, value):
    dataset, item = dcmread(get_testdata_file("MR_small.dcm", download=False)), Dataset()
    item.LUTDescriptor = [2, 0, 8]
    item.add_new("LUTData", "US", [0, 255])
    item.add_new(keyword, vr, value)
    setattr(dataset, sequence, [item])
    picture = outcome(dataset)
    assert isinstance(picture, Picture) and any("LUT cannot be read" in warning for warning in picture.info.warnings)


@pytest.mark.parametrize("element", ["Descriptor", "Data"])
@pytest.mark.parametrize(("vr", "value"), NO_NUMBERS)
def test_a_palette_of_a_wrong_vr_is_refused(element, vr, value):
    dataset = dcmread(get_testdata_file("examples_palette.dcm", download=False))
    dataset.add_new(f"RedPaletteColorLookupTable{element}", vr, value)
    error = outcome(dataset)
    assert isinstance(error, InputError) and "palette is missing or broken" in str(error)


PREFIXES = [b"", b"\x08\x00", b"\x02\x00\x00\x00UL\x04\x00", bytes(128) + b"DICM", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"]


@EASY
@given(data=st.binary(max_size=400), prefix=st.sampled_from(PREFIXES))
def test_random_bytes(data, prefix, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(prefix + data)
    outcome(path)
