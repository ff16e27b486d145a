"""What a DICOM file says of its picture: each element, its malformed forms, and that nothing else of the file comes out."""

import io
import json
import logging
import pickle
import random
import struct
import warnings
from dataclasses import fields
from math import cos, radians, sin
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset, Sequence, dcmread
from pydicom.dataset import FileMetaDataset

from pmclip_deploy import vocabulary as v
from pmclip_deploy.body_parts import PARTS
from pmclip_deploy.errors import InputError
from pmclip_deploy.header.read import DISAGREES, FACETS, Header, contradiction, header_from_dataset, header_value
from pmclip_deploy.header.view import OBLIQUE
from pmclip_deploy.imaging.dicom import picture_from_dicom
from pmclip_deploy.imaging.raster import picture_from_array

CANARY = "CANARYNAME"
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
CT, CR, DX, MG, SC = (f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("2", "1", "1.1", "1.2", "7"))


@pytest.fixture(autouse=True)
def no_checks_on_writing(monkeypatch):
    for mode in ("reading_validation_mode", "_writing_validation_mode"):
        monkeypatch.setattr(pydicom.config.settings, mode, pydicom.config.IGNORE)


def dataset(**elements):
    """A 2 x 2 picture with these elements; a list of Datasets is a sequence, a dict an item of one."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = EXPLICIT
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientName, ds.PatientID = SC, "1.2.3", CANARY, CANARY
    ds.Rows = ds.Columns = 2
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, "MONOCHROME2", 8, 8, 7
    ds.PixelRepresentation, ds.PixelData = 0, b"\0\1\2\3" * int(elements.get("NumberOfFrames", 1))
    ds["PixelData"].VR = "OB"
    return filled(ds, elements)


def filled(ds, elements):
    for keyword, value in elements.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = Sequence([filled(Dataset(), item) for item in value])
        setattr(ds, keyword, value)
    return ds


def code(value, scheme="SCT", **more):
    return {"CodeValue": value, "CodingSchemeDesignator": scheme, "CodeMeaning": CANARY, **more}


def written(ds, syntax):
    """The dataset as it comes back from a file, elements not yet converted."""
    ds.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    ds.save_as(buffer, implicit_vr=syntax == IMPLICIT, little_endian=syntax != BIG_ENDIAN)
    return dcmread(io.BytesIO(buffer.getvalue()), force=True)


def header(frame=0, **elements):
    """Of the dataset in memory, and, the same, of files in three encodings; and of the picture."""
    ds = dataset(**elements)
    found = header_from_dataset(ds, frame)
    assert_nothing_else(found)
    for syntax in (EXPLICIT, IMPLICIT, BIG_ENDIAN):
        assert header_from_dataset(written(ds, syntax), frame) == found
    ds.file_meta.TransferSyntaxUID = EXPLICIT
    assert picture_from_dicom(ds, frame).header == found
    return found


OUTCOMES = {
    "family": {None, *v.FAMILIES},
    "outside": {None, *v.NO_RADIOLOGY.values()},
    "localizer": {True, False},
    "plane": {None, *v.PLANES},
    "nearest": {None, *v.PLANES},
    "projection": {None, *v.PROJECTIONS},
    "modifiers": {"magnification", "spot compression", "implant displaced", "axillary tail", "cleavage", "tangential beam"},
    "regions": set(v.REGIONS),
    "parts": {part.label for part in PARTS},
    "organs": {organ for part in PARTS for organ in part.organs},
    "contrast": {None, True, False},
    "laterality": {None, "left", "right", "both"},
    "child": {None, True, False},
}


def assert_nothing_else(found):
    """Whatever a file holds, a header is made of these words."""
    assert {field.name for field in fields(found)} == set(OUTCOMES)
    for name, allowed in OUTCOMES.items():
        value = getattr(found, name)
        assert set(value if isinstance(value, tuple) else (value,)) <= allowed


# --- modality -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("modality", "family"), [(code, name) for name, family in v.FAMILIES.items() for code in family.modalities])
def test_modality(modality, family):
    found = header(Modality=modality)
    assert (found.family, found.outside) == (family, None)
    assert header_value(found, "modality") == v.FAMILIES[family].label


@pytest.mark.parametrize("modality", ["OP", "XC", "ES", "SM", "GM", "ECG", "DOC"])
def test_what_is_no_radiology_is_said_to_be_none(modality):
    found = header(Modality=modality, BodyPartExamined="HAND", ViewPosition="PA")
    assert found == Header(outside=v.NO_RADIOLOGY[modality])
    assert header_value(found, "modality") == v.NO_RADIOLOGY[modality]


@pytest.mark.parametrize("modality", ["", "OT", "HC", "RTIMAGE", "C T", "CT\\MR", CANARY, None])
@pytest.mark.parametrize(
    ("sop_class", "family"),
    [(CT, "ct"), (DX, "xr"), (CR, "xr"), (MG, "mg"), (SC, None), ("1.2.840.10008.5.1.4.1.1.130", "pt"), ("1.2.3.4", None), ("", None)],
)
def test_the_sop_class_where_the_modality_is_odd(modality, sop_class, family):
    assert header(SOPClassUID=sop_class, **({} if modality is None else {"Modality": modality})).family == family


def test_the_sop_class_of_the_file_meta():
    ds = dataset()
    del ds.SOPClassUID
    ds.file_meta.MediaStorageSOPClassUID = CT
    assert header_from_dataset(ds).family == "ct"


def test_the_sop_class_of_a_slide():
    assert header(SOPClassUID="1.2.840.10008.5.1.4.1.1.77.1.6").outside == "microscopy"


@pytest.mark.parametrize("modality", ["ct", " CT ", "Ct", "CT\0", "CT\0\0"])
def test_case_and_padding(modality):
    assert header(Modality=modality).family == "ct"


def test_a_secondary_capture_has_the_modality_of_the_original():
    assert header(SOPClassUID=SC, Modality="MR").family == "mr"


def test_a_localizer():
    assert header_value(header(Modality="CT", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "modality") == "CT localizer"
    assert not header(Modality="MR", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]).localizer
    assert not header(Modality="CT", ImageType=["ORIGINAL", "PRIMARY", "AXIAL"]).localizer


# --- plane ----------------------------------------------------------------------------------------------------------------------

AXIAL, CORONAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]


def tilted(degrees):
    """Axial slices with the gantry tilted: their columns run towards the feet by so much."""
    return [1, 0, 0, 0, round(cos(radians(degrees)), 6), round(-sin(radians(degrees)), 6)]


@pytest.mark.parametrize("modality", ["CT", "MR", "PT", "NM", "OT"])
@pytest.mark.parametrize(
    ("cosines", "plane", "nearest"),
    [
        (AXIAL, "axial", None),
        (CORONAL, "coronal", None),
        (SAGITTAL, "sagittal", None),
        ([-1, 0, 0, 0, -1, 0], "axial", None),  # prone
        ([0, 1, 0, 1, 0, 0], "axial", None),  # mirrored
        (tilted(22), "axial", None),
        (tilted(OBLIQUE - 0.1), "axial", None),
        (tilted(OBLIQUE + 0.1), "oblique", "axial"),
        (tilted(44), "oblique", "axial"),
        (tilted(46), "oblique", "coronal"),
        (tilted(59.9), "oblique", "coronal"),
        (tilted(60.1), "coronal", None),
        ([0.8, 0.6, 0, 0, 0, -1], "oblique", "coronal"),
        ([0.6, 0.8, 0, 0, 0, -1], "oblique", "sagittal"),
    ],
)
def test_plane(modality, cosines, plane, nearest):
    found = header(Modality=modality, ImageOrientationPatient=cosines)
    assert (found.plane, found.nearest) == (plane, nearest)
    assert header_value(found, "plane") == (f"oblique, nearest to {nearest}" if nearest else plane)


@pytest.mark.parametrize(
    "cosines",
    [
        [1, 0, 0, 0, 1],
        [*AXIAL, 0],
        [0] * 6,
        [1, 0, 0, 1, 0, 0],  # rows along columns
        [2, 0, 0, 0, 2, 0],
        [1, 0, 0, 0.5, 0.866, 0],  # not at right angles
    ],
)
def test_a_plane_that_is_none(cosines):
    assert header(Modality="CT", ImageOrientationPatient=cosines).plane is None


@pytest.mark.parametrize("modality", ["CR", "DX", "MG", "RF", "XA"])
def test_a_projection_has_no_plane(modality):
    assert header(Modality=modality, ImageOrientationPatient=AXIAL).plane is None


def test_tomosynthesis_has_one():
    assert header(Modality="MG", SOPClassUID="1.2.840.10008.5.1.4.1.1.13.1.3", ImageOrientationPatient=AXIAL).plane == "axial"


def enhanced(per_frame, shared=None, **elements):
    groups = {"PerFrameFunctionalGroupsSequence": per_frame, **({"SharedFunctionalGroupsSequence": [shared]} if shared else {})}
    return {"Modality": "MR", "NumberOfFrames": max(len(per_frame), 1), **groups, **elements}


def oriented(cosines):
    return {"PlaneOrientationSequence": [{"ImageOrientationPatient": cosines}]}


def test_each_frame_of_an_enhanced_file_has_its_plane():
    frames = [oriented(cosines) for cosines in (AXIAL, CORONAL, SAGITTAL, tilted(40))]
    planes = [header(frame, **enhanced(frames)).plane for frame in range(4)]
    assert planes == ["axial", "coronal", "sagittal", "oblique"]


def test_a_shared_plane():
    assert header(1, **enhanced([{}, {}], oriented(CORONAL))).plane == "coronal"
    assert header(0, **enhanced([oriented(SAGITTAL)], oriented(CORONAL))).plane == "sagittal"
    assert header(0, **enhanced([{}], oriented(CORONAL), ImageOrientationPatient=AXIAL)).plane == "coronal"
    assert header(0, **enhanced([{}], ImageOrientationPatient=AXIAL)).plane == "axial"


def test_fewer_groups_than_frames():
    ds = dataset(**enhanced([oriented(CORONAL)]))
    assert header_from_dataset(ds, 5).plane is None
    assert header_from_dataset(ds, -1).plane is None


def test_the_detector_of_a_nuclear_medicine_frame():
    """PS3.3 C.8.4.10: Detector Vector says which detector a frame is from."""
    views = [{"ViewCodeSequence": [code("399321004")]}, {"ViewCodeSequence": [code("399001007")]}]
    both = {"Modality": "NM", "NumberOfFrames": 2, "DetectorInformationSequence": views}
    assert [header(frame, **both, DetectorVector=[1, 2]).projection for frame in (0, 1)] == ["anterior", "posterior"]
    assert [header(frame, **both).projection for frame in (0, 1)] == [None, None]
    assert [header(0, **both, DetectorVector=vector).projection for vector in ([0, 1], [3, 1], [], [2])] == [None, None, None, "posterior"]
    one = {"Modality": "NM", "DetectorInformationSequence": [{"ImageOrientationPatient": CORONAL}]}
    assert header(**one).plane == "coronal"


@pytest.mark.parametrize(
    ("letters", "plane"),
    [(["L", "P"], "axial"), (["L", "F"], "coronal"), (["P", "F"], "sagittal"), (["R", "H"], "coronal"), (["L", "PF"], None), (["L"], None),
     (["L", "R"], None), (["X", "Y"], None), (["L", "P", "F"], None)],
)  # fmt: skip
def test_patient_orientation_where_there_are_no_cosines(letters, plane):
    assert header(Modality="CT", PatientOrientation=letters).plane == plane


# --- projection -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "projection"),
    [("AP", "ap"), ("PA", "pa"), ("pa ", "pa"), ("LL", "lateral"), ("RL", "lateral"), ("LATERAL", "lateral"), ("LLD", "decubitus"),
     ("RLO", "oblique"), ("OBL", "oblique"), ("AXIAL", "axial"), ("CC", "axial"), ("MLO", "oblique"), ("PA\\AP", None), ("", None),
     (CANARY, None)],
)  # fmt: skip
def test_view_position(position, projection):
    assert header(Modality="DX", ViewPosition=position).projection == projection


@pytest.mark.parametrize(("position", "projection"), [("CC", "cc"), ("MLO", "mlo"), ("ML", "lateral"), ("XCCL", "cc"), ("LMO", "oblique")])
def test_view_position_of_a_mammogram(position, projection):
    assert header(Modality="MG", ViewPosition=position).projection == projection


@pytest.mark.parametrize(
    ("value", "scheme", "projection"),
    [("399348003", "SCT", "ap"), ("R-10206", "SRT", "ap"), ("R-10206", "SNM3", "ap"), ("R-10206", "99SDM", "ap"), ("R-10214", "SRT", "pa"),
     ("399067008", "SCT", "lateral"), ("R-10206", "99LOCAL", None), ("R-10206", "", None), ("399348003", CANARY, None), ("1", "SCT", None)],
)  # fmt: skip
def test_view_code(value, scheme, projection):
    assert header(Modality="DX", ViewCodeSequence=[code(value, scheme)]).projection == projection


def test_codes_come_before_the_position_and_must_not_contradict_it():
    lateral, frontal = [code("399067008")], [code("399033003")]
    assert header(Modality="DX", ViewCodeSequence=lateral, ViewPosition="LL").projection == "lateral"
    assert header(Modality="DX", ViewCodeSequence=frontal, ViewPosition="PA").projection == "frontal"
    assert header(Modality="DX", ViewCodeSequence=lateral, ViewPosition="PA").projection is None


def test_a_mammogram_with_magnification():
    views = [code("399162004", ViewModifierCodeSequence=[code("R-102D6", "SRT"), code("399055006"), code("1")])]
    found = header(Modality="MG", ViewCodeSequence=views)
    assert (found.projection, found.modifiers) == ("cc", ("magnification", "spot compression"))
    assert header_value(found, "projection") == "CC with magnification and spot compression"
    plain = header(Modality="MG", ViewCodeSequence=[code("399368009")])
    assert header_value(plain, "projection") == "MLO"


@pytest.mark.parametrize(
    ("letters", "projection"),
    [(["L", "F"], "frontal"), (["R", "F"], "frontal"), (["A", "F"], "lateral"), (["L", "A"], "axial"), (["AR", "F"], None), (["L"], None)],
)
def test_patient_orientation_of_a_film(letters, projection):
    assert header(Modality="CR", PatientOrientation=letters).projection == projection
    assert header(Modality="CR", PatientOrientation=letters, ViewPosition="PA").projection == "pa"
    assert header(Modality="MG", PatientOrientation=letters).projection is None


@pytest.mark.parametrize("modality", ["CT", "MR", "US", "PT"])
def test_a_slice_has_no_projection(modality):
    assert header(Modality=modality, ViewPosition="PA", ViewCodeSequence=[code("399348003")]).projection is None


# --- body part ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "regions", "words"),
    [("HAND", ("hand",), "hand"), ("wrist ", ("hand",), "wrist"), ("C-SPINE", ("spine",), "cervical spine"),
     ("L SPINE", ("spine",), "lumbar spine"),
     ("WHOLE BODY", (), "whole body"), ("UP_EXM", (), "upper limb"), ("ABDOMEN/PELVIS", ("abdomen", "hip"), "abdomen and pelvis"),
     ("CHESTABDPELVIS", ("chest", "abdomen", "hip"), "chest, abdomen and pelvis"), ("FOREARM", ("forearm",), "forearm"),
     ("HAND\\FOOT", (), None), ("", (), None), (f"HAND {CANARY}", (), None), ("HAND\n", (), None), ("HÄND", (), None)],
)  # fmt: skip
def test_body_part_examined(term, regions, words):
    found = header(Modality="CR", BodyPartExamined=term)
    assert found.regions == regions
    assert header_value(found, "region") == words


@pytest.mark.parametrize(
    ("value", "scheme", "regions"),
    [("85562004", "SCT", ("hand",)), ("T-D8700", "SRT", ("hand",)), ("T-D8700", "SNM3", ("hand",)), ("t-d8700 ", "srt", ("hand",)),
     ("T-D3000", "99SDM", ("chest",)), ("816094009", "SCT", ("chest",)), ("85562004", "99LOCAL", ()), (CANARY, "SCT", ()), ("", "", ())],
)  # fmt: skip
def test_anatomic_region(value, scheme, regions):
    assert header(Modality="DX", AnatomicRegionSequence=[code(value, scheme)]).regions == regions


@pytest.mark.parametrize(
    ("values", "term", "regions"),
    [
        (["85562004"], "HAND", ("hand",)),
        (["85562004"], "WRIST", ("hand",)),
        (["85562004"], "CHEST", ()),  # one of them is wrong, and which cannot be known
        (["85562004"], "EXTREMITY", ("hand",)),
        (["53120007"], "HAND", ("hand",)),  # upper limb
        (["774007"], "NECK", ("face",)),  # head and neck
        (["45048000"], "HEADNECK", ("face",)),
        (["816094009", "818981001"], "CHEST", ("chest", "abdomen")),
        (["1"], "HAND", ("hand",)),
        (["85562004"], CANARY, ("hand",)),
    ],
)
def test_code_and_term(values, term, regions):
    found = header(Modality="DX", AnatomicRegionSequence=[code(value) for value in values], BodyPartExamined=term)
    assert found.regions == regions


def test_organs_of_parts():
    assert header_value(header(Modality="CR", BodyPartExamined="HAND"), "organ") == "musculoskeletal"
    assert header_value(header(Modality="CT", BodyPartExamined="KIDNEY"), "organ") == "genitourinary"
    assert header_value(header(Modality="CT", BodyPartExamined="ABDOMEN"), "organ") is None
    assert header(Modality="CR", BodyPartExamined="CHEST").organs == ("lung, mediastinum, pleura", "heart and great vessels")


def test_the_anatomy_of_a_frame():
    hands = [{"FrameAnatomySequence": [{"FrameLaterality": side, "AnatomicRegionSequence": [code(part)]}]}
             for side, part in (("L", "85562004"), ("R", "56459004"), ("B", "85562004"), ("U", "85562004"))]  # fmt: skip
    found = [header(frame, **enhanced(hands)) for frame in range(4)]
    assert [one.laterality for one in found] == ["left", "right", "both", None]
    assert [one.regions for one in found] == [("hand",), ("leg",), ("hand",), ("hand",)]


# --- side -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elements", "side"),
    [({"Laterality": "L"}, "left"), ({"Laterality": "r "}, "right"), ({"ImageLaterality": "B"}, "both"), ({"ImageLaterality": "U"}, None),
     ({"ImageLaterality": "L", "Laterality": "L"}, "left"), ({"ImageLaterality": "L", "Laterality": "R"}, None),
     ({"ImageLaterality": "", "Laterality": "R"}, "right"), ({"Laterality": "L\\R"}, None), ({"Laterality": CANARY}, None), ({}, None)],
)  # fmt: skip
def test_laterality(elements, side):
    found = header(Modality="DX", **elements)
    assert found.laterality == side
    assert header_value(found, "laterality") == side


def test_the_modifier_of_the_anatomy():
    hand = code("85562004", AnatomicRegionModifierSequence=[code("G-A101", "SRT")])
    assert header(Modality="DX", AnatomicRegionSequence=[hand]).laterality == "left"
    assert header(Modality="DX", AnatomicRegionSequence=[hand], ImageLaterality="R").laterality is None


# --- contrast -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elements", "contrast"),
    [
        ({}, None),
        ({"ContrastBolusAgent": ""}, None),  # type 2 in a module that is there because contrast was used: it says neither yes nor no
        ({"ContrastBolusAgent": CANARY}, True),
        ({"ContrastBolusAgent": "ISOVUE300/100"}, True),
        ({"ContrastBolusAgent": "造影剤"}, True),
        ({"ContrastBolusAgent": "NONE"}, False),
        ({"ContrastBolusAgent": "no contrast"}, False),
        ({"ContrastBolusAgent": "N/A"}, None),
        ({"ContrastBolusAgent": "NONE\\Omnipaque"}, True),
        ({"ContrastBolusAgentSequence": [code("C-B0322", "SRT")]}, True),
        ({"ContrastBolusAgentSequence": [{}]}, None),
        ({"ContrastBolusAgentSequence": []}, None),
        ({"ContrastBolusAgentSequence": [code("C-B0322", "SRT")], "ContrastBolusAgent": ""}, True),
    ],
)
def test_contrast(elements, contrast):
    found = header(Modality="CT", SpecificCharacterSet="ISO_IR 192", **elements)
    assert found.contrast is contrast
    assert header_value(found, "contrast") == {True: "with contrast", False: "without contrast", None: None}[contrast]


def test_contrast_of_each_frame():
    """Contrast/Bolus Usage (C.7.6.16.2.12): the frames before the injection have none, though the file names an agent."""
    frames = [{"ContrastBolusUsageSequence": [{"ContrastBolusAgentNumber": 1, "ContrastBolusAgentAdministered": given}]}
              for given in ("NO", "YES", CANARY)]  # fmt: skip
    elements = enhanced([*frames, {}], ContrastBolusAgentSequence=[code("C-B0322", "SRT")])
    assert [header(frame, **elements).contrast for frame in range(4)] == [False, True, True, True]


# --- child ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "child"),
    [("012D", True), ("004W", True), ("018M", True), ("017Y", True), ("018Y", False), ("076Y", False), ("215M", True), ("216M", False),
     ("000D", True), ("000Y", None), ("000M", None), ("121Y", None), ("999Y", None), ("17y", True), ("017", None), ("Y", None), ("", None),
     ("-17Y", None), ("0x1Y", None), ("1.5Y", None), ("²³Y", None), ("017Y\\018Y", None), (CANARY, None)],
)  # fmt: skip
def test_child_by_age(age, child):
    assert header(Modality="CR", PatientAge=age).child is child


@pytest.mark.parametrize(
    ("born", "studied", "child"),
    [("20000101", "20171231", True), ("20000101", "20180101", False), ("20000229", "20180228", True), ("20000229", "20180301", False),
     ("20170101", "20170101", True), ("20180101", "20170101", None), ("11111111", "20170101", None), ("19000101", "20170101", False),
     ("20001301", "20170101", None), ("", "20170101", None), ("2000.01.01", "2010.01.01", True), ("2000010", "20170101", None),
     (CANARY, CANARY, None)],
)  # fmt: skip
def test_child_by_dates(born, studied, child):
    assert header(Modality="CR", PatientBirthDate=born, StudyDate=studied).child is child
    assert header(Modality="CR", PatientBirthDate=born, StudyDate=studied, PatientAge="000Y").child is child


def test_the_age_comes_before_the_dates():
    assert header(Modality="CR", PatientAge="005Y", PatientBirthDate="19500101", StudyDate="20170101").child is True


@pytest.mark.parametrize("age", ["005Y", "050Y"])
def test_child_is_shown_nowhere(age):
    found = header(Modality="CR", PatientAge=age, BodyPartExamined="CHEST")
    assert found.child is not None
    said = f"{found!r} {found} {json.dumps(found.to_json())} {[header_value(found, facet) for facet in FACETS]}"
    assert "child" not in said
    assert age[1:3] not in said
    other = header(Modality="CR", BodyPartExamined="CHEST")
    assert (repr(other), other.to_json()) == (repr(found), found.to_json())


# --- words ----------------------------------------------------------------------------------------------------------------------


def test_to_json_is_what_is_stated():
    assert Header().to_json() == {}
    found = header(Modality="CT", ImageOrientationPatient=tilted(40), ContrastBolusAgent="NONE", BodyPartExamined="HEAD")
    assert json.loads(json.dumps(found.to_json())) == {
        "family": "ct",
        "plane": "oblique",
        "nearest": "axial",
        "regions": ["skull"],
        "parts": ["head"],
        "organs": ["skull and contents"],
        "contrast": False,
    }


def test_a_header_that_says_nothing_has_no_words():
    assert [header_value(Header(), facet) for facet in FACETS] == [None] * len(FACETS)


def test_contradiction():
    assert contradiction(Header(family="mr"), "xr", 0.97) == "the header says MR; the picture looks like a plain film"
    assert contradiction(Header(family="xr"), "ct", DISAGREES) == "the header says plain film; the picture looks like CT"
    assert contradiction(Header(outside="microscopy"), "mr", 0.9) == "the header says microscopy; the picture looks like MR"


@pytest.mark.parametrize(
    ("said", "family", "probability"),
    [
        (Header(family="mr"), "xr", DISAGREES - 0.01),
        (Header(family="mr"), "xr", float("nan")),
        (Header(family="mr"), "mr", 1.0),
        (Header(family="mr"), None, 1.0),
        (Header(), "xr", 1.0),
        (Header(family="ct", localizer=True), "xr", 1.0),
        (Header(family="ct", localizer=True), "ct", 1.0),
        *((Header(family=a), b, 1.0) for alike in v.CONFUSABLE_FAMILIES for a in sorted(alike) for b in sorted(alike)),
    ],
)
def test_no_contradiction(said, family, probability):
    assert contradiction(said, family, probability) is None


# --- whatever stands there ------------------------------------------------------------------------------------------------------

READ = {  # tag -> its VR
    0x00080060: b"CS", 0x00080016: b"UI", 0x00080008: b"CS", 0x00200037: b"DS", 0x00200020: b"CS", 0x00185101: b"CS", 0x00180015: b"CS",
    0x00200062: b"CS", 0x00200060: b"CS", 0x00180010: b"LO", 0x00101010: b"AS", 0x00100030: b"DA", 0x00080020: b"DA", 0x00540220: b"SQ",
    0x00082218: b"SQ", 0x00180012: b"SQ", 0x52009229: b"SQ", 0x52009230: b"SQ", 0x00540022: b"SQ", 0x00540020: b"US",
}  # fmt: skip
LONG = (b"OB", b"OW", b"SQ", b"UN", b"UT", b"UC", b"OF")  # VRs whose length takes four bytes


def element(tag, vr, value):
    value += b"\0" * (len(value) % 2)
    length = b"\0\0" + struct.pack("<I", len(value)) if vr in LONG else struct.pack("<H", len(value) % 65536)
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr + length + value


def item(*elements):
    value = b"".join(elements)
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value


NAME = CANARY.encode()
NESTED = item(element(0x00080100, b"SH", NAME), element(0x00080102, b"SH", NAME), element(0x00080104, b"LO", NAME))
MALFORMED = {
    "a name": (None, NAME),
    "a name beside a word": (None, b"PA\\" + NAME),
    "backslashes": (None, b"\\" * 40 + NAME),
    "control characters": (None, b"\x1b[31m" + NAME + b"\n\r\t\x00\x07"),
    "bytes that are no text": (None, b"\xff\xfe\x80" + NAME),
    "empty": (None, b""),
    "zeros": (None, b"\0" * 12),
    "numbers": (b"DS", b"1e400\\nan\\inf\\-0\\1\\2"),
    "binary": (b"US", struct.pack("<4H", 1, 2, 3, 65535)),
    "doubles": (b"FD", struct.pack("<6d", 1, 0, 0, 0, 1, 0)),
    "a person's name": (b"PN", NAME + b"^^^=" + NAME),
    "unlimited text": (b"UT", NAME),
    "unknown": (b"UN", NAME),
    "bytes": (b"OB", NAME),
    "ten megabytes": (b"UT", NAME * 1_000_000),
    "ten megabytes of bytes": (b"UN", NAME * 1_000_000),
    "a sequence": (b"SQ", NESTED),
    "sequences in sequences": (b"SQ", item(element(0x00082218, b"SQ", item(element(0x00082220, b"SQ", NESTED))))),
    "an unknown sequence": (b"UN", NESTED),
    "a broken sequence": (b"SQ", NESTED[:-3]),
    "items that are none": (b"SQ", NAME),
}


def file_with(path, changed, vr, value):
    """A file in which one element is so, and beside it a private one with the same."""
    elements = {
        0x00080016: element(0x00080016, b"UI", CT.encode()),
        0x00080060: element(0x00080060, b"CS", b"CT"),
        0x00100010: element(0x00100010, b"PN", NAME),
        0x00280002: element(0x00280002, b"US", b"\1\0"),
        0x00280004: element(0x00280004, b"CS", b"MONOCHROME2 "),
        **{tag: element(tag, b"US", struct.pack("<H", n)) for tag, n in
           ((0x00280010, 2), (0x00280011, 2), (0x00280100, 8), (0x00280101, 8), (0x00280102, 7), (0x00280103, 0))},
        0x00290010: element(0x00290010, b"LO", NAME),
        0x00291010: element(0x00291010, vr, value),
        0x7FE00010: element(0x7FE00010, b"OB", b"\0\1\2\3"),
        changed: element(changed, vr, value),
    }  # fmt: skip
    syntax = element(0x00020010, b"UI", EXPLICIT.encode())
    meta = element(0x00020000, b"UL", struct.pack("<I", len(syntax))) + syntax
    path.write_bytes(b"\0" * 128 + b"DICM" + meta + b"".join(elements[tag] for tag in sorted(elements)))
    return path


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("tag", READ, ids=lambda tag: f"{tag:08X}")
def test_nothing_of_a_malformed_value_comes_out(tmp_path, caplog, capfd, tag, kind):
    vr, value = MALFORMED[kind]
    path = file_with(tmp_path / "x.dcm", tag, vr or READ[tag], value)
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            picture = picture_from_dicom(path)
            said = f"{picture.info!r} {picture.header!r} {picture.header.to_json()} {pickle.dumps(picture.header)!r}"
            said += f"{[header_value(picture.header, facet) for facet in FACETS]} {contradiction(picture.header, 'xr', 1.0)}"
            assert_nothing_else(picture.header)
            if tag != 0x00080060:
                assert picture.header.family == "ct"
        except InputError as error:  # of the reader of pixels; a header is no reason for one
            assert kind in ("a broken sequence", "items that are none", "a sequence", "sequences in sequences")
            said = str(error)
    everything = said + caplog.text + "".join(capfd.readouterr()) + "".join(str(one.message) for one in caught)
    assert CANARY not in everything


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_dataset_that_is_asked_directly_is_quiet_too(tmp_path, caplog, kind):
    """Without the silence that the reader of files keeps."""
    for tag in READ:
        vr, value = MALFORMED[kind]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = dcmread(file_with(tmp_path / "x.dcm", tag, vr or READ[tag], value))
        caplog.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_nothing_else(header_from_dataset(ds))
        assert CANARY not in caplog.text + "".join(str(one.message) for one in caught)


@pytest.mark.parametrize("value", [None, 5, 5.5, b"CT", ["CT", None], {"a": 1}, object(), "CT" * 10**6, ["C"] * 10**6, [b"CT"]])
def test_objects_in_memory(value):
    for tag, vr in READ.items():
        ds = dataset(Modality="CT")
        ds.add_new(tag, "UN", b"")
        ds[tag]._value, ds[tag].VR = value, vr.decode()
        assert_nothing_else(header_from_dataset(ds))


def test_random_values():
    """Pieces of what is read, in random order and place: no exception, and no word but ours."""
    chance = random.Random(7)
    pieces = [*b"CT MR HAND 1 0 -1 L R 017Y SCT 85562004 PA YES".split(), b"\\", b" ", b"\0", NAME, b"\xff"]
    for _ in range(300):
        ds = dataset()
        for tag, vr in READ.items():
            if chance.random() < 0.5:
                value = b"".join(chance.choices(pieces, k=chance.randrange(6)))
                vr = chance.choice([vr, vr, b"UN", b"SQ"])
                ds[tag] = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(tag), vr.decode(), len(value), value, 0, False, True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = header_from_dataset(ds, chance.randrange(3))
        assert_nothing_else(found)


@pytest.mark.parametrize("what", [None, 5, "CT", object(), {}])
def test_what_is_no_dataset_says_nothing(what):
    assert header_from_dataset(what) == Header()


# --- real files -----------------------------------------------------------------------------------------------------------------

WHEEL = sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm"))
SAYS = {
    "CT_small.dcm": Header("ct", plane="axial", contrast=True),
    "MR_small.dcm": Header("mr", plane="axial"),
    "J2K_pixelrep_mismatch.dcm": Header(  # its gantry is tilted by 22 degrees
        "ct", plane="axial", regions=("skull",), parts=("head",), organs=("skull and contents",), child=False
    ),
    "examples_overlay.dcm": Header(
        "mr",
        plane="axial",
        regions=("abdomen",),
        parts=("abdomen",),
        organs=("gastrointestinal", "genitourinary"),
        contrast=True,
        child=False,
    ),
    "JPEG2000.dcm": Header("nm", parts=("whole body",)),
    "examples_rgb_color.dcm": Header("us"),
    "waveform_ecg.dcm": Header(outside="waveforms", child=False),
    "NM_Kakadu44_SOTmarkerincons.dcm": Header(  # a CR, whatever its name
        "xr", projection="pa", regions=("hand",), parts=("hand",), organs=("musculoskeletal",), child=False
    ),
    "RG3_J2KR.dcm": Header("xr", projection="ap", parts=("extremity",), organs=("musculoskeletal",), laterality="right", child=False),
    "gdcm-CR-MONO1-10-chest.dcm": Header(
        "xr", projection="pa", regions=("chest",), parts=("chest",), organs=("lung, mediastinum, pleura", "heart and great vessels")
    ),
}


def assert_reads(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = dcmread(path, force=True, stop_before_pixels=True)
    found = header_from_dataset(ds, 0)
    assert_nothing_else(found)
    if path.name in SAYS:
        assert found == SAYS[path.name]
    try:
        picture = picture_from_dicom(path)
    except InputError:
        return
    assert picture.header == header_from_dataset(ds, picture.info.frame)
    assert picture.info.modality is None or v.FAMILY_OF_MODALITY.get(picture.info.modality, picture.header.family) == picture.header.family


@pytest.mark.parametrize("path", WHEEL, ids=lambda path: path.name)
def test_files_of_pydicoms_wheel(path):
    assert_reads(path)


def test_files_of_the_shared_folder(shared):
    paths = sorted(path for path in (shared / "dicom").iterdir() if path.is_file())
    assert len(paths) >= 13
    for path in paths:
        assert_reads(path)


def test_a_picture_that_is_no_dicom_has_no_header():
    assert picture_from_array(np.zeros((4, 4), np.uint8)).header is None
