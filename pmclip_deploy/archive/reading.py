"""What is done to an item in the process that decodes. The arguments and results are pickled."""

from __future__ import annotations

from pathlib import Path

from pmclip_deploy.errors import InputError
from pmclip_deploy.files import is_no_picture
from pmclip_deploy.ids import salted
from pmclip_deploy.imaging.dicom_file import uid_from_dicom
from pmclip_deploy.imaging.picture import Picture
from pmclip_deploy.imaging.read import picture_from_bytes, picture_from_path

IMAGE = "the image"  # its name in reasons; the file's own may name a patient


def warm_up() -> None:
    """Imports what the first file would have to wait for."""
    import pydicom  # noqa: F401


def picture(source: str, salt: bytes | None) -> tuple[Picture, str | None]:
    """(the picture, with ``salt`` the HMAC of its SOP Instance UID). Raises InputError, NoPictureError for what is no picture."""
    if source.startswith(("http://", "https://")):
        from pmclip_deploy.archive.web import retrieved

        data = retrieved(source)
        return picture_from_bytes(IMAGE, data), None if salt is None else salted(salt, uid_from_dicom(IMAGE, data))
    try:
        return picture_from_path(source), None if salt is None else salted(salt, uid_from_dicom(source))
    except InputError as error:
        kind = type(error) if is_no_picture(Path(source), error) else InputError
        raise kind(error.message.replace(f"{source}:", f"{IMAGE}:"), error.hint) from None

