"""A hospital's labelled pictures: from a folder or a table to samples of a bundle's embedding, with groups and strata. No torch.

No patient attribute is kept: groups are numbers, the Patient ID that makes them is hashed with a salt that is forgotten.
"""

import csv
import hashlib
import hmac
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.bundle.names import SIGNATURES
from pmclip_deploy.console import counted
from pmclip_deploy.errors import InputError, NoPictureError
from pmclip_deploy.files import files_below
from pmclip_deploy.imaging.dicom_file import patient_from_dicom
from pmclip_deploy.imaging.picture import Picture
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.texts import text_of_file
from pmclip_deploy.train.lookalikes import are_in, chained, joined, pairs_alike, read_signatures, signature

LABELS = {**dict.fromkeys(("positive", "yes", "1", "true"), True), **dict.fromkeys(("negative", "no", "0", "false"), False)}
LEAST = 20  # pictures with the finding, and as many without, below which nothing is measured
BROKEN_SHARE = 0.05  # of the files: with more that cannot be read, something is wrong with all

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
Key = tuple[str, str]  # (family, region) of a stratum


@dataclass(frozen=True)
class Labelled:
    path: Path
    positive: bool
    group: str | None = field(default=None, repr=False)  # as the table says it


@dataclass(frozen=True)
class Defaults:
    """What is true of the pictures whose files do not say it."""

    family: str | None = None
    region: str | None = None
    children: bool = False


@dataclass(frozen=True, eq=False)
class Samples:
    """N pictures that may train and validate. Those of one group stay together."""

    embedding: NDArray[np.float64]  # (N, D), Predictor.probe_embedding
    positive: NDArray[np.bool_]  # (N,)
    group: NDArray[np.int64]  # (N,)
    strata: tuple[tuple[Key, ...], ...]  # of each all that it shows
    child: tuple[bool | None, ...]
    left_out: dict[str, int]  # why, and how many
    grouped: dict[str, int]  # how the groups were made, and of how many pictures
    alike: int  # pairs of look-alikes of two groups, which were joined
    disagreeing: int  # pairs of look-alikes with different labels
    broken: tuple[str, ...]  # what is wrong with each file that cannot be read


@dataclass(frozen=True, eq=False)
class _Read:
    """What is kept of one file."""

    row: Labelled
    key: object  # what groups it; None where nothing does
    by: str
    digest: bytes  # of the pixels
    signature: NDArray[np.uint8]
    embedding: NDArray[np.float64]
    strata: tuple[Key, ...]
    child: bool | None


def labelled_from_path(images: Path) -> list[Labelled]:
    """Of a folder with a sub-folder for each class, or of a table in CSV: path, label, and maybe group. Raises InputError.

    Fewer than LEAST of a class are refused here, before a picture is read.
    """
    rows = _from_folder(images) if images.is_dir() else _from_table(images)
    for positive, what in ((True, "with the finding"), (False, "without it")):
        count = sum(row.positive is positive for row in rows)
        if count < LEAST:
            raise InputError(f"{images}: {counted(count, 'picture')} {what}", f"{LEAST} of each are needed, so {LEAST - count} are missing")
    return rows


def samples_from_rows(predictor: Predictor, rows: Sequence[Labelled], defaults: Defaults, progress: Progress) -> Samples:
    """Raises InputError where too many files cannot be read, or none says what it shows."""
    left, broken, salt = Counter[str](), list[InputError](), os.urandom(16)
    read = [one for one in _each(predictor, progress(rows, "Reading pictures"), defaults, salt, left, broken)]
    if len(broken) > BROKEN_SHARE * len(rows):
        raise InputError(f"{broken[0]} ({len(broken)} of {len(rows)} files cannot be read, more than {BROKEN_SHARE:.0%})")
    if not read:
        raise InputError(
            f"none of {counted(len(rows), 'file')} can be used: {_said(left)}",
            "where files do not say modality and body region, --modality and --region do",
        )
    pairs = pairs_alike(np.stack([one.signature for one in read]))
    keys = [one.key for one in read]
    by_key = joined(len(read), chained(keys))
    group = joined(len(read), [*chained(keys), *pairs])
    kept = _without_doubles(read, left)
    if predictor.path is not None and SIGNATURES in predictor.manifest.files:
        known = are_in(np.stack([one.signature for one in read]), read_signatures(predictor.path))
        left["the image tower learned from them"] += int(known[kept].sum())
        kept = [i for i in kept if not known[i]]
    return Samples(
        embedding=np.array([read[i].embedding for i in kept]).reshape(len(kept), predictor.manifest.embed_dim),
        positive=np.array([read[i].row.positive for i in kept], bool),
        group=np.array([group[i] for i in kept], np.int64),
        strata=tuple(read[i].strata for i in kept),
        child=tuple(True if defaults.children else read[i].child for i in kept),
        left_out={why: count for why, count in left.items() if count},
        grouped=dict(Counter(read[i].by for i in kept)),
        alike=sum(by_key[i] != by_key[j] for i, j in pairs),
        disagreeing=sum(read[i].row.positive != read[j].row.positive for i, j in pairs if read[i].digest != read[j].digest),
        broken=tuple(map(str, broken)),
    )


def _from_folder(folder: Path) -> list[Labelled]:
    try:
        classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    except OSError as error:
        raise InputError(f"{folder}: a folder that cannot be listed ({error.strerror})", "check its permissions") from None
    unknown = [entry.name for entry in classes if entry.name.lower() not in LABELS]
    if unknown or not classes:
        has = f"has the sub-folder {unknown[0][:60]!r}" if unknown else "has no sub-folders"
        raise InputError(f"{folder}: {has}", "it needs one for each class, such as positive and negative, or give a table path,label,group")
    rows = []
    for entry in classes:
        files, unlisted = files_below(entry)
        if unlisted:
            raise next(iter(unlisted.values()))
        rows += [Labelled(file, LABELS[entry.name.lower()]) for file in files]
    return rows


def _from_table(path: Path) -> list[Labelled]:
    """Only the three columns are read; what else stands in the table is not looked at, and no cell is quoted in a message."""
    file = io.StringIO(text_of_file(path, "give a folder, or a table path,label,group"), newline="")
    delimiter = max(",;\t", key=file.readline().count)
    file.seek(0)
    try:
        table = csv.DictReader(file, delimiter=delimiter, strict=True)
        names = {name.strip().lower(): name for name in table.fieldnames or () if name}
        if not {"path", "label"} <= set(names):
            raise InputError(f"{path}: its first line does not name the columns path and label (and, if there are any, group)")
        return [_labelled(path, table.line_num, {key: row.get(name) for key, name in names.items()}) for row in table]
    except csv.Error as error:
        raise InputError(f"{path}: not a table in CSV ({error})", "save it as CSV") from None


def _labelled(path: Path, line: int, row: dict[str, str | None]) -> Labelled:
    image, label, group = ((row.get(key) or "").strip() for key in ("path", "label", "group"))
    if not image or "\0" in image:
        raise InputError(f"{path}, line {line}: names no file", "fill in the column path")
    if label.lower() not in LABELS:
        raise InputError(f"{path}, line {line}: its label is none of {', '.join(LABELS)}", "mend it or leave the line out")
    return Labelled(path.parent / image, LABELS[label.lower()], group or None)


def _each(
    predictor: Predictor, rows: Iterable[Labelled], defaults: Defaults, salt: bytes, left: Counter[str], broken: list[InputError]
) -> Iterator[_Read]:
    for row in rows:
        try:
            picture = picture_from_path(row.path)
            header = picture.header
            if header is not None and header.outside:
                left["their files say that they are no radiology"] += 1
                continue
            family = (header.family if header else None) or defaults.family
            regions = (header.regions if header else ()) or ((defaults.region,) if defaults.region else ())
            if family is None or not regions:
                left["neither file nor option says modality and body region"] += 1
                continue
            key, by = _grouped(row, picture, salt)
            yield _Read(
                row=row,
                key=key,
                by=by,
                digest=hashlib.sha256(repr(picture.pixels.shape).encode() + picture.pixels.tobytes()).digest(),
                signature=signature(picture.pixels),
                embedding=predictor.probe_embedding(picture),
                strata=tuple((family, region) for region in regions),
                child=header.child if header else None,
            )
        except NoPictureError:
            left["they hold no picture"] += 1
        except InputError as error:
            left["they cannot be read"] += 1
            broken.append(error)


def _grouped(row: Labelled, picture: Picture, salt: bytes) -> tuple[object, str]:
    if row.group is not None:
        return ("table", row.group), "the table's groups"
    if picture.info.format == "dicom" and (patient := patient_from_dicom(row.path)):
        return ("patient", hmac.digest(salt, patient.encode(), "sha256")), "Patient ID, hashed and forgotten"
    return None, "each file by itself"


def _without_doubles(read: Sequence[_Read], left: Counter[str]) -> list[int]:
    """The places of the first of each picture; a picture with both labels is left out whole."""
    labels: dict[bytes, set[bool]] = {}
    for one in read:
        labels.setdefault(one.digest, set()).add(one.row.positive)
    kept, seen = [], set[bytes]()
    for i, one in enumerate(read):
        if len(labels[one.digest]) > 1:
            left["the same picture has both labels"] += 1
        elif one.digest in seen:
            left["they are copies of others"] += 1
        else:
            kept.append(i)
            seen.add(one.digest)
    return kept


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{count} since {why}" for why, count in counts.most_common()) or "there are none"
