"""A report's content, its UID, and what it takes over from the image."""

import io
import logging
from dataclasses import replace

import pytest
from pydicom import Dataset, dcmread
from pydicom.data import get_charset_files
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import UID

from pmclip_deploy.answer import Answer
from pmclip_deploy.errors import InputError, NoPictureError, UsageError
from pmclip_deploy.intent import Intent, Qualifier
from pmclip_deploy.report.capture import MOST_LINES, capture_from_answers
from pmclip_deploy.report.document import SR_CLASSES, bytes_of, report_from_answers
from pmclip_deploy.report.source import SINGLE_FRAME
from pmclip_deploy.report.texts import presence
from tests.patient import PATIENT
from tests.report.making import ANSWERS, IMAGE, MODEL, answer, ct, every_string, items, read_back, said

pytest.importorskip("highdicom", reason="needs the extra `ward`")

CHARSETS = sorted({str(path) for path in get_charset_files("*.dcm") if "PatientName" in dcmread(path, force=True)})


# --- content ------------------------------------------------------------------------------------------------------------------------


def test_a_group_for_each_question_and_a_sentence_for_each_answer() -> None:
    report = read_back(ct())
    groups = items(report, "Measurement Group")
    assert [items(group, "Tracking Identifier")[0].TextValue for group in groups] == [a.question for a in ANSWERS]
    percents = [[float(x.MeasuredValueSequence[0].NumericValue) for x in items(group, "Probability")] for group in groups]
    assert percents == [[], [89.0], [95.9], [54.0]]
    present = [[x.ConceptCodeSequence[0].CodeValue for x in items(group, "Presence of property")] for group in groups]
    assert present == [[], [], ["52101004"], ["373068000"]]
    findings = [[x.ConceptCodeSequence[0].CodeMeaning for x in items(group, "Finding")] for group in groups]
    assert findings == [[], [], ["Fracture of bone"], ["Fracture of bone"]]
    for group in groups:
        parameters = items(group, "Algorithm Parameters")[0].TextValue
        assert f"bundle=sha256:{MODEL.sha256}" in parameters and "window=40/400" in parameters
        assert items(group, "Algorithm Version")[0].TextValue == "0.1.0+abababab"
    assert said(report) == [
        "RESEARCH USE ONLY, not a medical device. Made by pmclip-deploy with pmclip-lite 0.1.0; not verified by a person.",
        "what imaging modality is shown? -> CT (from the header of the file, not from the picture)",
        "in what plane is this image? -> axial (probability 89%)",
        "is there a fracture? -> yes; in validation on plain films of the hip or pelvis 60 of 70 such answers were right"
        " (sensitivity 0.80, specificity 0.90)",
        "is there a fracture in the hip? -> no answer: the confidence 0.54 is under the threshold 0.60",
        "A probability is that of the answer, or of the likeliest candidate if there is no answer. Validation questions calibrate it.",
        "in what plane is this image? -> other candidates of the picture: sagittal 8%",
    ]
    containers = [item for item in report.iterall() if item.keyword == "ContinuityOfContent"]
    assert len(containers) == 3 + len(ANSWERS) and {item.value for item in containers} == {"SEPARATE"}


def test_the_header_says_what_it_is_about_and_who_made_it() -> None:
    source = ct()
    report = read_back(source)
    flags = (report.CompletionFlag, report.PreliminaryFlag, report.VerificationFlag, report.Modality, report.SeriesDescription)
    assert flags == ("COMPLETE", "PRELIMINARY", "UNVERIFIED", "SR", "AI answers (research, unverified)")
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0]
    assert (evidence.StudyInstanceUID, evidence.ReferencedSeriesSequence[0].SeriesInstanceUID) == (
        source.StudyInstanceUID,
        source.SeriesInstanceUID,
    )
    referred = evidence.ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert (referred.ReferencedSOPClassUID, referred.ReferencedSOPInstanceUID) == (source.SOPClassUID, source.SOPInstanceUID)
    assert report.SeriesInstanceUID != source.SeriesInstanceUID
    assert MODEL.sha256 in report.ContributingEquipmentSequence[0].ContributionDescription


@pytest.mark.parametrize(("name", "uid"), SR_CLASSES.items())
def test_the_same_content_in_each_class(name: str, uid: str) -> None:
    report = read_back(ct(), sr_class=name)
    assert report.SOPClassUID == report.file_meta.MediaStorageSOPClassUID == uid
    assert report.ContentSequence == read_back(ct()).ContentSequence


def test_presence_follows_the_finding_and_not_the_word_yes() -> None:
    finding = Intent("finding", "closed", "fracture", polarity=False)
    assert presence(answer("is the bone intact?", "yes", 0.9, understood_as=finding)) == "Absent"
    assert presence(answer("is the bone intact?", "no", 0.9, understood_as=finding)) == "Present"
    assert presence(answer("is the bone intact?", understood_as=finding)) == "Undetermined"
    assert presence(answer("is this a CT?", "yes", understood_as=Intent("modality", "closed"))) is None
    assert presence(answer("where is it?", understood_as=Intent("finding", "open", "fracture"))) is None
    narrowed = replace(finding, polarity=True, qualifiers=(Qualifier("displacement", "displaced"),))
    assert presence(answer("is it displaced?", "no", 0.9, understood_as=narrowed)) is None  # which says nothing of one that is not
    assert presence(answer("?", "yes", understood_as=None)) is None


def test_a_finding_of_a_bundles_own_has_a_code_of_our_own() -> None:
    own = Intent("finding", "closed", "an enchondroma of the proximal phalanx, of any size and at any age")
    code = items(read_back(ct(), [answer("is it there?", understood_as=own)]), "Finding")[0].ConceptCodeSequence[0]
    assert (code.CodingSchemeDesignator, code.CodeMeaning) == ("99PMCLIP", str(own.finding)[:64].strip())
    assert len(code.CodeValue) <= 16


def test_frames_are_counted_from_one() -> None:
    source, image = ct(), replace(IMAGE, frame=2, frames=5)
    source.SOPClassUID = UID("1.2.840.10008.5.1.4.1.1.2.1")  # Enhanced CT
    report = read_back(source, [replace(a, image=image) for a in ANSWERS])
    referred = items(report, "Source of Measurement")[0].ReferencedSOPSequence[0]
    assert referred.ReferencedFrameNumber == 3
    assert "Only frame 3 of 5 was looked at." in said(report)
    assert ct().SOPClassUID in SINGLE_FRAME
    assert "ReferencedFrameNumber" not in items(read_back(ct(), [replace(a, image=image) for a in ANSWERS]), "Source of Measurement")[
        0
    ].ReferencedSOPSequence[0]


@pytest.mark.parametrize("modality", ["CT", "MR", "CR", "OT", ""])
def test_the_procedure_is_of_the_standard(modality: str) -> None:
    source = ct()
    source.Modality = modality
    expected = {"CT": "25045-6", "MR": "25056-3"}.get(modality, "363679005")
    assert items(read_back(source), "Procedure reported")[0].ConceptCodeSequence[0].CodeValue == expected
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "44139-4", "LN", "ZQXMEANING"
    source.ProcedureCodeSequence = [code]
    procedure = items(read_back(source), "Procedure reported")[0].ConceptCodeSequence[0]
    assert (procedure.CodeValue, procedure.CodeMeaning) == ("44139-4", "PET whole body")


@pytest.mark.parametrize("question", ["a\\b\nc\x00\x1b[31m", "q" * 5000, "骨折はありますか？", "is it \udce4?", " ".join(["word"] * 400)])
def test_any_question_is_valid_content(question: str) -> None:
    report = read_back(ct(), [answer(question)])
    for element in report.iterall():
        if element.VR in ("LO", "SH") and element.VM == 1:
            assert len(element.value) <= (64 if element.VR == "LO" else 16)
    assert all(character.isprintable() for text in said(report) for character in text)
    assert report.get("SpecificCharacterSet") == ("ISO_IR 192" if "骨" in question else "ISO_IR 100")
    assert report.PatientName == ct().PatientName


# --- the UID ------------------------------------------------------------------------------------------------------------------------


def test_the_uid_is_a_hash_of_all_but_the_time() -> None:
    first, again = read_back(ct()), read_back(ct())
    for report in (first, again):
        del report.ContentDate, report.ContentTime
    assert first == again and first.SOPInstanceUID.startswith("2.25.") and len(first.SOPInstanceUID) <= 64

    def changed(**attributes: str) -> Dataset:
        source = ct()
        for keyword, value in attributes.items():
            setattr(source, keyword, value)
        return source

    retrained = [replace(a, model=replace(MODEL, sha256="cd" * 32)) for a in ANSWERS]
    others = [
        read_back(ct(), [replace(ANSWERS[1], probability=0.885), *ANSWERS[:1]]),
        read_back(ct(), ANSWERS[:3]),
        read_back(ct(), retrained),
        read_back(ct(), sr_class="enhanced"),
        read_back(ct(), prevalence=0.1),
        read_back(changed(PatientName="Other^Name")),
        read_back(changed(AccessionNumber="7")),
    ]
    assert len({first.SOPInstanceUID, *(report.SOPInstanceUID for report in others)}) == 1 + len(others)
    assert others[2].SeriesInstanceUID != first.SeriesInstanceUID == others[0].SeriesInstanceUID
    other_device = read_back(ct(), [replace(a, model=replace(MODEL, device="cuda")) for a in ANSWERS])
    assert other_device.SeriesInstanceUID == first.SeriesInstanceUID


# --- what is copied -----------------------------------------------------------------------------------------------------------------


def test_there_are_fifteen_charset_files() -> None:
    assert len(CHARSETS) == 15


@pytest.mark.parametrize("path", CHARSETS)
@pytest.mark.parametrize("question", ["is there a fracture?", "Ist das ein Bruch? ü 骨"])
def test_every_character_set_keeps_the_name(path: str, question: str) -> None:
    of, source = dcmread(path, force=True), ct()
    if "SpecificCharacterSet" in of:
        source.SpecificCharacterSet = of.SpecificCharacterSet
    else:
        del source.SpecificCharacterSet
    source.PatientName = of.PatientName
    source = dcmread(io.BytesIO(bytes_of(source)))
    report = read_back(source, [answer(question)])
    assert str(report.PatientName) == str(source.PatientName)
    assert report.PatientName.components == source.PatientName.components
    kept = report.get("SpecificCharacterSet") or []
    named = [kept] if isinstance(kept, str) else list(kept)
    assert said(report)[1].startswith(f"{question} -> ")
    if question.isascii():  # the image's own sets
        declared = source.get("SpecificCharacterSet") or []
        assert named == [name or "ISO 2022 IR 6" for name in ([declared] if isinstance(declared, str) else declared)]


UNREADABLE = [
    ("FOO", b"M\xfcller"),
    ("ISO_IR 192", b"M\xfcller"),
    ("ISO_IR 192", b"\xed\xa0\x80"),
    ("ISO 2022 IR 87", b"\x1b$B\xff"),
    ("ISO_IR 999", b"\xe4"),
]


def raw(source: Dataset, keyword: str, value: bytes, vr: str = "LO") -> None:
    """The element as a file would hold it."""
    tag = Tag(keyword)
    source._dict[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)


def test_bytes_of_no_declared_set_stay_as_they_are() -> None:
    source = ct()
    del source.SpecificCharacterSet
    raw(source, "PatientName", "Müller^Jürg".encode(), "PN")  # UTF-8, and the file does not say so
    report = read_back(source, [answer("Bruch? ü")])
    assert "SpecificCharacterSet" not in report
    assert report.get_item("PatientName").value.rstrip() == "Müller^Jürg".encode()
    assert said(report)[1].startswith("Bruch? ? -> ")  # ours is not mixed with bytes of an unknown set


@pytest.mark.filterwarnings("ignore")  # pydicom's, of the sets
@pytest.mark.parametrize(("declared", "name"), UNREADABLE)
def test_a_name_that_cannot_be_read_is_left_out_and_said(declared: str, name: bytes) -> None:
    source = ct()
    source.SpecificCharacterSet, source.PatientName = declared, "Z" * len(name)
    report = read_back(dcmread(io.BytesIO(bytes_of(source).replace(b"Z" * len(name), name))))
    assert report.PatientName == "" and report.PatientID == ct().PatientID
    assert "Not copied, since the image has no valid value of it: Patient's Name." in said(report)


HOSTILE = [
    ("PatientID", b"x" * 65, "LO"),
    ("PatientID", b"a\\b", "LO"),
    ("PatientID", b"a\x00b\x1b", "LO"),
    ("PatientID", b"\x00\x01\x02\x03", "OB"),
    ("PatientID", b"\x05\x00", "US"),
    ("PatientID", b"y" * 100_000, "UT"),
    ("PatientName", b"a^b^c^d^e^f", "PN"),
    ("PatientName", b"a=b=c=d", "PN"),
    ("PatientName", b"n" * 65, "PN"),
    ("PatientName", b"a\nb", "PN"),
    ("PatientBirthDate", b"20250231", "DA"),
    ("PatientBirthDate", b"20200101-20200202", "DA"),
    ("PatientBirthDate", b"yesterday", "DA"),
    ("PatientSex", b"female", "CS"),
    ("PatientSex", b"X", "CS"),
    ("PatientAge", b"12 years", "AS"),
    ("PatientWeight", b"nan", "DS"),
    ("PatientWeight", b"heavy", "DS"),
    ("StudyTime", b"250000", "TM"),
    ("StudyTime", b"10-11", "TM"),
    ("AccessionNumber", b"z" * 17, "SH"),
    ("StudyDescription", b"d" * 65, "LO"),
    ("ReferringPhysicianName", b"r" * 300, "PN"),
    ("TimezoneOffsetFromUTC", b"+9900", "SH"),
    ("InstanceNumber", b"-7", "IS"),
    ("InstanceNumber", b"first", "IS"),
]


@pytest.mark.parametrize(("keyword", "value", "vr"), HOSTILE)
def test_a_value_that_is_not_valid_is_left_out(keyword: str, value: bytes, vr: str) -> None:
    source = ct()
    raw(source, keyword, value, vr)
    report = read_back(source)
    assert report.get(keyword) in ("", None, 1)
    assert not any(len(value) > 2 and value.decode("latin-1") in text for text in every_string(report))


def test_requests_time_zone_and_old_dates_are_copied() -> None:
    source, request = ct(), Dataset()
    request.RequestedProcedureID, request.AccessionNumber, request.PlacerOrderNumberImagingServiceRequest = "RP1", "A1", "x" * 65
    source.RequestAttributesSequence = [request]
    source.AccessionNumber, source.TimezoneOffsetFromUTC = "A1", "-0330"
    raw(source, "StudyDate", b"1997.04.24", "DA")
    raw(source, "StudyTime", b"10:11:12", "TM")
    report = read_back(source)
    copied = report.ReferencedRequestSequence[0]
    assert (copied.RequestedProcedureID, copied.AccessionNumber, copied.StudyInstanceUID) == ("RP1", "A1", source.StudyInstanceUID)
    assert copied.PlacerOrderNumberImagingServiceRequest == ""
    assert (report.AccessionNumber, report.TimezoneOffsetFromUTC) == ("A1", "-0330")
    assert (report.StudyDate, report.StudyTime) == ("19970424", "101112")


@pytest.mark.parametrize("keyword", ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
@pytest.mark.parametrize("value", [None, b"", b"1.02.3", b"ZQXUID", b"1." + b"2" * 70])
def test_without_a_uid_there_is_no_report(keyword: str, value: bytes | None) -> None:
    source = ct()
    delattr(source, keyword)
    if value is not None:
        raw(source, keyword, value, "UI")
    with pytest.raises(InputError, match=r"has no valid .* UID, to which a report must refer") as raised:
        report_from_answers(source, ANSWERS)
    assert "ZQXUID" not in str(raised.value) and raised.value.exit_code == 3


def test_what_type_2_needs_may_be_missing() -> None:
    source, bare = ct(), Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        bare[keyword] = source[keyword]
    report = read_back(bare)
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"):
        assert keyword in report and not report.get(keyword)


def test_markers_stay_in_the_attributes_that_are_copied(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    source = ct()
    for element in list(source.iterall()):
        if element.VR in ("LO", "SH", "PN", "LT", "ST", "UT", "CS") and element.keyword not in ("SpecificCharacterSet", "PatientSex"):
            element.value = "ZQXMARKER"
    for keyword, value in PATIENT.items():
        if keyword != "StudyInstanceUID":
            source.add_new(keyword, "LT" if len(value) > 16 else "LO", value)
    source.add_new(0x00091001, "LO", "ZQXPRIVATE")
    allowed = {"PatientName", "PatientID", "IssuerOfPatientID", "StudyID", "StudyDescription", "AccessionNumber", "ReferringPhysicianName"}
    for made in (report_from_answers(source, ANSWERS), capture_from_answers(source, ANSWERS)):
        found = {element.keyword for element in made.iterall() if element.VR not in ("SQ", "OB") and "ZQX" in str(element.value)}
        assert found <= allowed, found
    assert "ZQX" not in caplog.text and str(source.SOPInstanceUID) not in caplog.text


# --- arguments, and the page --------------------------------------------------------------------------------------------------------


def test_wrong_arguments_and_our_own_pages() -> None:
    with pytest.raises(UsageError, match="one image"):
        report_from_answers(ct(), [])
    with pytest.raises(UsageError, match="one image"):
        report_from_answers(ct(), [ANSWERS[0], replace(ANSWERS[1], image=replace(IMAGE, frame=1, frames=2))])
    with pytest.raises(UsageError, match="no SR class"):
        report_from_answers(ct(), ANSWERS, sr_class="basic")
    with pytest.raises(NoPictureError, match="holds a report"):
        report_from_answers(capture_from_answers(ct(), ANSWERS), ANSWERS)


def test_the_page_shows_the_answers_and_none_of_the_image() -> None:
    page = dcmread(io.BytesIO(bytes_of(capture_from_answers(ct(), ANSWERS))))
    assert (page.Columns, page.PhotometricInterpretation) == (1024, "MONOCHROME2")
    assert (page.BurnedInAnnotation, page.ConversionType) == ("YES", "WSD")
    pixels = page.pixel_array
    assert pixels.shape == (page.Rows, 1024) and pixels.min() == 0 and pixels.max() == 255
    assert page.SourceImageSequence[0].ReferencedSOPInstanceUID == ct().SOPInstanceUID
    longer = capture_from_answers(ct(), [*ANSWERS, answer("x" * 300)])
    assert longer.Rows > page.Rows and longer.SOPInstanceUID != page.SOPInstanceUID
    assert capture_from_answers(ct(), ANSWERS).SOPInstanceUID == page.SOPInstanceUID
    assert capture_from_answers(ct(), [answer("W" * 20_000)]).Rows < 2**16  # each piece is measured once, not at each length
    most: list[Answer] = [answer(f"question {number}?") for number in range(MOST_LINES)]
    assert capture_from_answers(ct(), most).Rows < 2**16
