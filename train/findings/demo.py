"""The two films of `pmclip-deploy demo`: how they were chosen, and how they become DICOM files of the package.

    python -m pmclip_deploy.train.findings.demo --data fracatlas --output pmclip_deploy/models/demo
    python -m pmclip_deploy.train.findings.demo --data fracatlas --folds runs/findings     # names the choice, writes nothing

The choice was made once, by ``chosen``, from the folds of a `train findings` that still held these films: of what networks that had not
seen them answered rightly, neither the easiest nor the hardest. Their whole group is kept from all training since (groups.py).
"""

import argparse
import json
import sys
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ComputedRadiographyImageStorage, DeflatedExplicitVRLittleEndian

from pmclip_deploy.bundle.files import manifest_from_bundle
from pmclip_deploy.console import print_error
from pmclip_deploy.errors import InputError, PmclipError
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.train.datasets.schema import lines_from_text
from pmclip_deploy.train.findings.groups import group_of_row

FRACTURED, WHOLE = "IMG0003182.jpg", "IMG0003189.jpg"  # files of FracAtlas, of its group KEPT_FOR_DEMO
FILES = {FRACTURED: "leg-1.dcm", WHOLE: "leg-2.dcm"}  # their names in the package
REGIONS = ("hand", "leg")
LARGE = 0.03  # of the picture: a box that is easily seen
COSTS = 5  # fractured films at most that training loses with the group
CREDIT = (
    "FracAtlas, Abedeen et al., Scientific Data 10:521, 2023, figshare 22363012, CC BY 4.0, https://creativecommons.org/licenses/by/4.0/; "
    "scaled to a short side of 320 pixels, written as DICOM"
)

WRITER = UID("2.25.282436480129206186107562573183398526053")

Row = dict[str, Any]


def chosen(rows: Sequence[Row], logits: Mapping[str, float], thresholds: Mapping[str, float]) -> tuple[str, str]:
    """(fractured, not fractured): names of two frontal films of one region and one group, by the labels and the logits out of fold.

    Of films that were answered rightly, one limb without hardware on each: the fractured one has one large box, is of a group with few
    fractures, and its logit is the nearest to the median of all such films; so is the logit of the other, among its group's.
    """

    def rightly(region: str, fractured: bool) -> list[Row]:
        plain = [r for r in rows if _is_plain(r["labels"], region) and bool(r["labels"]["fractured"]) == fractured and _name(r) in logits]
        return [r for r in plain if (logits[_name(r)] >= thresholds[region]) == fractured]

    def distance(row: Row, like: Sequence[Row]) -> float:
        return abs(logits[_name(row)] - float(np.median([logits[_name(r)] for r in like])))

    fractures = Counter(group_of_row(r) for r in rows if r["labels"]["fractured"])
    found = []
    for region in REGIONS:
        broken = rightly(region, True)
        found += [
            (distance(r, broken), _name(r), region, group_of_row(r))
            for r in broken
            if len(r["boxes"]) == 1 and r["boxes"][0][2] * r["boxes"][0][3] >= LARGE and fractures[group_of_row(r)] <= COSTS
        ]
    if not found:
        raise InputError("no fractured film fits", "give the folds of a `train findings` from before its group was kept")
    _, fractured, region, group = min(found)
    others = rightly(region, False)
    _, other = min((distance(r, others), _name(r)) for r in others if group_of_row(r) == group)
    return fractured, other


def _is_plain(labels: Mapping[str, int], region: str) -> bool:
    """One limb in one frontal view."""
    shown = [name for name in ("hand", "leg", "hip", "shoulder") if labels[name]]
    return shown == [region] and bool(labels["frontal"]) and not (labels["mixed"] or labels["hardware"] or labels["multiscan"])


def _name(row: Row) -> str:
    return Path(row["image"]).name


def dicom_from_film(path: Path, part: str) -> Dataset:
    """A CR image (PS3.3 A.2) of a JPEG file, without loss. What the collection does not tell stays empty: view, side, patient."""
    pixels = np.asarray(Image.open(path).convert("L"))

    def uid(what: str) -> str:
        return f"2.25.{uuid.uuid5(uuid.NAMESPACE_URL, f'pmclip-deploy demo {path.name} {what}').int}"

    d = Dataset()
    d.SpecificCharacterSet, d.ImageType = "ISO_IR 100", ["DERIVED", "PRIMARY"]
    d.SOPClassUID, d.SOPInstanceUID = ComputedRadiographyImageStorage, uid("image")
    d.StudyDate = d.StudyTime = d.AccessionNumber = d.ReferringPhysicianName = d.Manufacturer = ""
    d.Modality, d.DerivationDescription = "CR", CREDIT
    d.PatientName, d.PatientID, d.PatientBirthDate, d.PatientSex = "Anonymous", path.stem, "", ""
    d.PatientIdentityRemoved, d.DeidentificationMethod = "YES", "by its publishers; no patient is named"
    d.BodyPartExamined, d.ViewPosition = part, ""
    d.StudyInstanceUID, d.SeriesInstanceUID = uid("study"), uid("series")
    d.StudyID, d.SeriesNumber, d.InstanceNumber, d.PatientOrientation, d.Laterality = "", 1, 1, "", ""
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.Rows, d.Columns = pixels.shape
    d.BitsAllocated = d.BitsStored = 8
    d.HighBit, d.PixelRepresentation = 7, 0
    d.WindowCenter, d.WindowWidth = "128", "256"  # shown as the JPEG file is
    d.LossyImageCompression, d.LossyImageCompressionMethod = "01", "ISO_10918_1"
    d.PixelData = pixels.tobytes() + bytes(pixels.size % 2)
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian  # a third of the size
    d.file_meta.ImplementationClassUID, d.file_meta.ImplementationVersionName = WRITER, "PMCLIP-DEPLOY"  # the same bytes by any pydicom
    return d


def write_films(data: Path, output: Path) -> None:
    """The two DICOM files, and films.json: what is true of them. Raises InputError."""
    rows = {_name(row): row for row in _rows(data)}
    known = []
    for name, file in FILES.items():
        row = rows[name]
        (region,) = (region for region in REGIONS if row["labels"][region])
        dicom_from_film(data / row["image"], region.upper()).save_as(output / file, enforce_file_format=True)
        known.append(
            {"file": file, "source": f"FracAtlas {Path(name).stem}", "group": group_of_row(row), "region": region,
             "fracture": bool(row["labels"]["fractured"]), "boxes": row["boxes"]}
        )  # fmt: skip
    about = {"credit": CREDIT, "films": known}
    (output / "films.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _rows(data: Path) -> list[Row]:
    return [json.loads(line) for _, line in lines_from_text(data / "labels.jsonl")]


def _logits(folds: Path) -> dict[str, float]:
    """{file name: logit of a fracture, out of fold, as the runtime averages it}"""
    logits: dict[str, float] = {}
    for file in sorted(folds.glob("fold-[0-9]*.npz")):
        with np.load(file, allow_pickle=False) as saved:
            logits |= {
                Path(str(name)).name: float(of[:, 0].astype(np.float64).mean())
                for name, of in zip(saved["names"], saved["finding"], strict=True)
            }
    return logits


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="FracAtlas's folder")
    parser.add_argument("--folds", type=Path, help="the --output of a `train findings`, with fold-0.npz and the others")
    parser.add_argument("--output", type=Path, help="folder for the DICOM files")
    options = parser.parse_args(arguments)
    try:
        if options.folds is not None:
            findings = manifest_from_bundle(DEFAULT_BUNDLE).findings
            assert findings is not None
            thresholds = {s.region: s.threshold for s in findings.findings[0].strata}
            print(*chosen(_rows(options.data), _logits(options.folds), thresholds))
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            write_films(options.data, options.output)
    except PmclipError as error:
        print_error(str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
