"""What stands below a folder, and what a file's name says of it. Standard library only."""

import os
from pathlib import Path
from stat import S_ISREG

from pmclip_deploy.errors import InputError, NoPictureError
from pmclip_deploy.spec import UNREADABLE_SCHEMA

UNKNOWN_FILE = "is not a DICOM, PNG or JPEG file"  # of a NoPictureError
PNG = b"\x89PNG\r\n\x1a\n"  # how such files begin
JPEG = b"\xff\xd8\xff"
PNG_AND_JPEG = (".png", ".jpg", ".jpeg")
PICTURES = (*PNG_AND_JPEG, ".dcm", ".dicom", ".ima", ".tif", ".tiff", ".bmp", ".gif", ".nii", ".nii.gz")


def files_below(folder: Path) -> tuple[list[Path], dict[Path, InputError]]:
    """Every file in ``folder`` and the folders below, in order, and what to say of each folder that cannot be listed."""
    unlisted = dict[Path, InputError]()

    def note(error: OSError) -> None:
        reason = f"{error.filename}: a folder that cannot be listed ({error.strerror})"
        unlisted[Path(error.filename)] = InputError(reason, "check its permissions")

    found = sorted(Path(parent) / name for parent, _, names in os.walk(folder, onerror=note) for name in names)
    return [path for path in found if is_file(path)], unlisted


def is_no_picture(path: Path, error: InputError) -> bool:
    """Whether ``error`` says that a file of a folder is no picture, and not that a picture cannot be read.

    A file that is named as a picture, and in which no picture was recognised, is a broken one, or of a format that is not read.
    "._scan.dcm" is no picture: macOS writes such files beside others.
    """
    if not isinstance(error, NoPictureError):
        return False
    name = path.name.lower()
    if not error.message.endswith(UNKNOWN_FILE) or not name.endswith(PICTURES) or name.startswith("."):
        return True
    with path.open("rb") as file:  # a PNG file is no DICOM file, where these alone are looked for
        return file.read(len(PNG)).startswith((PNG, JPEG))


def unreadable(source: object, error: InputError) -> dict[str, str]:
    """What documents say of a file that cannot be read, of the schema pmclip-deploy/unreadable/1."""
    return {"schema": UNREADABLE_SCHEMA, "source": str(source), "code": error.code, "message": error.message, "hint": error.hint}


def is_file(path: Path) -> bool:
    """No pipe, and a broken link only if its name is that of a picture. Whoever reads what cannot be looked at gets the error."""
    try:
        return S_ISREG(path.stat().st_mode)
    except PermissionError:
        return True
    except OSError:
        return path.name.lower().endswith(PICTURES)
