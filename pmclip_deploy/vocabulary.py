"""The words that header, questions and answers share: modality families, planes, projections, body regions. Standard library only.

Each is one short name, the key of its table here; what people say for it, and what DICOM writes, stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

# --- modality families ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Modalities whose pictures are read alike."""

    label: str  # as an answer says it
    words: tuple[str, ...]  # as people say it, lower case
    modalities: tuple[str, ...]  # Modality (0008,0060): PS3.3 C.7.3.1.1.1, the retired terms too


FAMILIES = {
    "xr": Family(
        "plain film",
        ("x-ray", "x ray", "xray", "x-rays", "plain film", "plain radiograph", "radiograph", "radiography", "film", "roentgenogram"),
        ("CR", "DX", "RG", "PX", "IO"),
    ),
    "ct": Family(
        "CT",
        ("ct", "cat scan", "ct scan", "computed tomography", "computerized tomography", "computer tomography", "cta", "ct angiography"),
        ("CT",),
    ),
    "mr": Family(
        "MR",
        ("mr", "mri", "mr scan", "mri scan", "magnetic resonance", "magnetic resonance imaging", "nmr", "mra", "mr angiography"),
        ("MR", "MA", "MS"),
    ),
    "us": Family(
        "ultrasound",
        ("us", "ultrasound", "ultrasonography", "sonogram", "sonography", "doppler", "doppler ultrasound", "echo", "echocardiogram"),
        ("US", "EC", "DD", "CD", "IVUS"),
    ),
    "nm": Family(
        "nuclear medicine",
        ("nm", "nuclear medicine", "scintigraphy", "scintigram", "bone scan", "spect", "gamma camera"),
        ("NM", "ST"),
    ),
    "pt": Family("PET", ("pt", "pet", "pet scan", "positron emission", "positron emission tomography"), ("PT",)),
    "mg": Family("mammography", ("mg", "mammogram", "mammograph", "mammography", "breast tomosynthesis"), ("MG",)),
    "rf": Family(
        "fluoroscopy",
        ("rf", "fluoroscopy", "barium swallow", "barium enema", "barium study", "upper gi", "small bowel follow through"),
        ("RF", "DF", "CF", "VF"),
    ),
    "xa": Family("angiography", ("xa", "angiogram", "angiography", "dsa", "venogram", "arteriogram"), ("XA", "DS")),
}
FAMILY_OF_MODALITY = {code: name for name, family in FAMILIES.items() for code in family.modalities}

# Families whose pictures may look the same, so that a header of one and a picture like another do not contradict each other.
CONFUSABLE_FAMILIES = (frozenset({"xr", "rf", "xa", "mg"}), frozenset({"nm", "pt"}))

NO_RADIOLOGY = {  # Modality (0008,0060) of what no family is: no picture of radiology, whatever it looks like
    **dict.fromkeys(("OP", "OPT", "OPM", "OPV", "OCT", "FA", "FS", "OSS", "OPTENF", "OPTBSV"), "ophthalmology"),
    **dict.fromkeys(("AR", "KER", "LEN", "OAM", "SRF", "VA", "IOL"), "ophthalmic measurement"),
    **dict.fromkeys(("ES", "AS", "CP", "CS", "LP"), "endoscopy"),
    **dict.fromkeys(("SM", "GM", "DM", "CFM"), "microscopy"),
    **dict.fromkeys(("XC", "DMS", "OPR"), "photography"),
    **dict.fromkeys(("ECG", "EPS", "HD", "EEG", "EMG", "EOG", "RESP", "POS"), "waveforms"),
    "IVOCT": "intravascular optical tomography",
    "TG": "thermography",
    "DOC": "a document",
}
# All that may be repeated of Modality (0008,0060): anything else that stands there could be a name.
MODALITIES = frozenset({*FAMILY_OF_MODALITY, *NO_RADIOLOGY, "OT", "RTIMAGE", "BMD", "BDUS", "BI", "DG", "LS", "HC", "M3D", "STAIN"})

_FAMILY_OF_WORD = {  # the first word of a modality answer
    **{"xr": "xr", "x": "xr", "xray": "xr", "radiograph": "xr", "plain": "xr", "film": "xr"},
    **{"ct": "ct", "cta": "ct", "cat": "ct", "mr": "mr", "mri": "mr", "mra": "mr", "us": "us", "ultrasound": "us", "doppler": "us"},
    **{"nm": "nm", "spect": "nm", "nuclear": "nm", "pet": "pt", "pt": "pt", "mg": "mg", "mammo": "mg", "mammogram": "mg"},
    **{"mammograph": "mg", "mammography": "mg", "bas": "rf", "be": "rf", "sbft": "rf", "ugi": "rf", "barium": "rf", "fluoroscopy": "rf"},
    **{"rf": "rf", "an": "xa", "xa": "xa", "angiogram": "xa", "angiography": "xa", "venogram": "xa", "dsa": "xa"},
}


def family_of_answer(answer: str) -> str | None:
    """The family that a modality answer belongs to: "cta - ct angiography" -> "ct"; None where it names none."""
    first = answer.lower().replace("-", " ").split()[:1]
    return _FAMILY_OF_WORD.get(first[0]) if first else None


# --- planes and projections -----------------------------------------------------------------------------------------------------

PLANES = {  # of a slice
    "axial": ("axial", "transverse", "transaxial", "transversal", "cross sectional", "cross-sectional"),
    "coronal": ("coronal",),
    "sagittal": ("sagittal", "longitudinal"),
    "oblique": ("oblique",),
}
PROJECTIONS = {  # of a radiograph; name -> as an answer says it, and as people say it
    "ap": ("AP", "ap", "a.p.", "anteroposterior", "antero-posterior"),
    "pa": ("PA", "pa", "p.a.", "posteroanterior", "postero-anterior"),
    "frontal": ("frontal", "frontal"),
    "lateral": ("lateral", "lateral", "side view", "lat"),
    "oblique": ("oblique", "oblique"),
    "axial": ("axial projection", "axial projection"),
    "decubitus": ("decubitus", "decubitus"),
    "cc": ("CC", "cc", "craniocaudal", "cranio-caudal"),
    "mlo": ("MLO", "mlo", "mediolateral oblique", "medio-lateral oblique"),
    "anterior": ("anterior", "anterior view"),  # nuclear medicine
    "posterior": ("posterior", "posterior view"),
}

_VIEW_OF_ANSWER = {
    "axial": ("plane", "axial"),
    "transverse": ("plane", "axial"),
    "coronal": ("plane", "coronal"),
    "sagittal": ("plane", "sagittal"),
    "longitudinal": ("plane", "sagittal"),
    "ap": ("projection", "ap"),
    "pa": ("projection", "pa"),
    "frontal": ("projection", "frontal"),
    "lateral": ("projection", "lateral"),
    "oblique": ("projection", "oblique"),
    "decubitus": ("projection", "decubitus"),
    "mammo - cc": ("projection", "cc"),
    "mammo - mag cc": ("projection", "cc"),
    "mammo - mlo": ("projection", "mlo"),
}


def view_of_answer(answer: str) -> tuple[str, str] | None:
    """What a plane answer of the model says: ("plane", "axial") or ("projection", "pa"); None for "3d reconstruction"."""
    return _VIEW_OF_ANSWER.get(answer.lower().strip())


# --- body regions and parts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """A stratum of the body, in which pictures look alike enough to validate a finding."""

    label: str  # as an answer says it
    words: tuple[str, ...]  # as people say it, lower case; the words of its parts are in PARTS
    organs: tuple[str, ...]  # the model's organ answers for it, the likeliest first


MUSCULOSKELETAL = "musculoskeletal"

REGIONS = {
    "hand": Region("hand or wrist", ("hand", "hands"), (MUSCULOSKELETAL,)),
    "forearm": Region("forearm", ("forearm",), (MUSCULOSKELETAL,)),
    "elbow": Region("elbow", ("elbow",), (MUSCULOSKELETAL,)),
    "humerus": Region("upper arm", ("humerus", "upper arm"), (MUSCULOSKELETAL,)),
    "shoulder": Region("shoulder", ("shoulder", "shoulder girdle"), (MUSCULOSKELETAL,)),
    "hip": Region("hip or pelvis", ("hip", "hips", "pelvis", "pelvic"), (MUSCULOSKELETAL,)),
    "femur": Region("thigh", ("femur", "thigh"), (MUSCULOSKELETAL,)),
    "leg": Region("leg, knee, ankle or foot", ("leg", "lower leg"), (MUSCULOSKELETAL,)),
    "chest": Region("chest", ("chest", "thorax", "thoracic"), ("lung, mediastinum, pleura", "heart and great vessels")),
    "abdomen": Region("abdomen", ("abdomen", "abdominal", "belly"), ("gastrointestinal", "genitourinary")),
    "skull": Region("head", ("head", "skull", "brain", "cranium", "cranial"), ("skull and contents",)),
    "face": Region("face or neck", ("face", "facial", "neck", "head and neck"), ("face, sinuses, and neck",)),
    "spine": Region("spine", ("spine", "spinal", "vertebra", "vertebrae", "backbone"), ("spine and contents",)),
    "breast": Region("breast", ("breast", "breasts"), ("breast",)),
}


def organs_of_region(region: str) -> tuple[str, ...]:
    """The model's organ answers for a region, the likeliest first; none for a name that is no region."""
    return REGIONS[region].organs if region in REGIONS else ()


def regions_of_organ(organ: str) -> tuple[str, ...]:
    """The regions in which an organ answer is right; none for "vascular and lymphatic", which is everywhere."""
    return tuple(name for name, region in REGIONS.items() if organ in region.organs)
