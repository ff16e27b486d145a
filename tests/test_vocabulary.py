"""The shared words: complete for the model's answers and for DICOM's anatomy, and each said once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydicom.sr import _cid_dict, _concepts_dict
from pydicom.sr._snomed_dict import mapping

from pmclip_deploy import vocabulary as v
from pmclip_deploy.body_parts import PART_OF_CODE, PART_OF_TERM, PARTS, VESSELS
from pmclip_deploy.models import __file__ as models

MANIFEST = json.loads((Path(models).parent / "pmclip-lite" / "bundle" / "manifest.json").read_text(encoding="utf-8"))
KINDS = {kind["name"]: [MANIFEST["answers"][i] for i in kind["answers"]] for kind in MANIFEST["kinds"]}
ORGANS = set(KINDS["organ"])

# Body Part Examined, PS3.16 Annex L: what whole pictures of radiology are of.
ANNEX_L = """
ABDOMEN ABDOMENPELVIS ADRENAL ANKLE AORTA ARM AXILLA BACK BLADDER BRAIN BREAST BRONCHUS BUTTOCK CALCANEUS CALF CAROTID CEREBELLUM CERVIX
CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS CIRCLEOFWILLIS CLAVICLE COCCYX COLON CORONARYARTERY CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS
EXTREMITY EYE EYELID FACE FEMUR FINGER FOOT FOREARM GALLBLADDER HAND HEAD HEADNECK HEART HIP HUMERUS IAC ILEUM ILIUM JAW JEJUNUM KIDNEY
KNEE LARYNX LEG LIVER LSPINE LSSPINE LUNG MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV NOSE ORBIT OVARY
PANCREAS PAROTID PATELLA PELVIS PENIS PHARYNX PROSTATE RADIUS RADIUSULNA RECTUM RIB SCAPULA SCROTUM SHOULDER SKULL SPINE SPLEEN SSPINE
STERNUM STOMACH SUBMANDIBULAR TESTIS THIGH THORAX THUMB THYMUS THYROID TIBIA TIBIAFIBULA TLSPINE TMJ TOE TONGUE TRACHEA TSPINE ULNA
URETER URETHRA UTERUS VAGINA WHOLEBODY WRIST ZYGOMA SIJOINT SCJOINT ACJOINT MASTOID SESAMOID POPLITEALA PORTALV RENALA
"""

# Of CID 4031 (Common Anatomic Region), what is no part of a person.
NOT_A_PART = {"706342009"}


def cid(number):
    """SNOMED CT codes of a context group, from the copy in pydicom."""
    concepts = _concepts_dict.concepts["SCT"]
    names = _cid_dict.cid_concepts[number]["SCT"]
    return {code for name in names for code, (_, groups) in concepts[name].items() if number in groups}


def test_every_modality_answer_has_a_family():
    families = {answer: v.family_of_answer(answer) for answer in KINDS["modality"]}
    assert None not in families.values()
    assert set(families.values()) == set(v.FAMILIES)
    assert families["mra - mr angiography/venography"] == "mr"
    assert families["cta - ct angiography"] == families["ct - myelogram"] == "ct"
    assert families["ugi - upper gi"] == "rf"
    assert families["venogram"] == "xa"


@pytest.mark.parametrize("answer", ["", " ", "-", "yes", "flair", "musculoskeletal"])
def test_other_answers_have_no_family(answer):
    assert v.family_of_answer(answer) is None


def test_every_plane_answer_is_a_view():
    for answer in KINDS["plane"]:
        facet, value = v.view_of_answer(answer) or ("", "")
        assert value in {"plane": v.PLANES, "projection": v.PROJECTIONS, "": [""]}[facet]
        assert (facet == "") == (answer == "3d reconstruction")


def test_organs_are_the_models():
    assert {organ for region in v.REGIONS.values() for organ in region.organs} | {VESSELS} == ORGANS
    assert {organ for part in PARTS for organ in part.organs} == ORGANS
    assert v.organs_of_region("chest")[0] == "lung, mediastinum, pleura"
    assert v.regions_of_organ("genitourinary") == ("abdomen",)
    assert v.regions_of_organ(VESSELS) == ()


def test_regions_are_those_of_parts():
    assert {region for part in PARTS for region in part.regions} == set(v.REGIONS)


def test_a_fracture_is_claimed_for_no_more_than_it_was_validated_on():
    validated = {part.label for part in PARTS if set(part.regions) & {"hand", "leg", "hip", "shoulder"}}
    assert {"hand", "wrist", "finger", "knee", "ankle", "foot", "hip", "pelvis", "shoulder", "clavicle"} <= validated
    assert not validated & {"forearm", "elbow", "upper arm", "femur", "spine", "chest", "skull", "upper limb", "extremity"}


@pytest.mark.parametrize("field", ["terms", "codes", "words"])
def test_nothing_stands_twice(field):
    values = [value for part in PARTS for value in getattr(part, field)]
    assert len(values) == len(set(values))


def test_modalities_stand_once():
    codes = [code for family in v.FAMILIES.values() for code in family.modalities] + list(v.NO_RADIOLOGY)
    assert len(codes) == len(set(codes))
    assert set(codes) < v.MODALITIES


def test_words_are_lower_case_and_terms_are_upper():
    words = [word for part in PARTS for word in part.words]
    for named in (*v.REGIONS.values(), *v.FAMILIES.values()):
        words += named.words
    assert all(word == word.lower().strip() and word for word in words)
    assert all(term == term.upper() and term.isalnum() for part in PARTS for term in part.terms)


@pytest.mark.parametrize("term", ANNEX_L.split())
def test_annex_l(term):
    assert term in PART_OF_TERM


def test_common_anatomic_regions_are_all_known():
    known = cid(4031)
    assert len(known) > 100
    assert sorted(known - set(PART_OF_CODE) - NOT_A_PART) == []


def test_snomed_ct_and_rt_name_the_same_part():
    """Against pydicom's own map of the two."""
    compared = 0
    for code, part in PART_OF_CODE.items():
        scheme = "SCT" if code.isdigit() else "SRT"
        other = mapping[scheme].get(code)
        if other in PART_OF_CODE:
            assert PART_OF_CODE[other] is part
            compared += 1
    assert compared > 300


def test_standard_library_alone():
    code = "import sys; old = set(sys.modules); import pmclip_deploy.vocabulary, pmclip_deploy.header.read; print(*set(sys.modules) - old)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.split()
    assert {name.partition(".")[0] for name in out} - set(sys.stdlib_module_names) == {"pmclip_deploy"}
