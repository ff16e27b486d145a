"""What is done to an item in the process that decodes. The arguments and results are pickled."""

from __future__ import annotations

import hmac
from pathlib import Path

from pmclip_deploy.errors import InputError
from pmclip_deploy.files import is_no_picture
from pmclip_deploy.imaging.dicom_file import image_from_file, reading
from pmclip_deploy.imaging.elements import text_of
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
        return picture_from_bytes(IMAGE, data), None if salt is None else _uid(IMAGE, salt, data)
    try:
        return picture_from_path(source), None if salt is None else _uid(source, salt)
    except InputError as error:
        kind = type(error) if is_no_picture(Path(source), error) else InputError
        raise kind(error.message.replace(f"{source}:", f"{IMAGE}:"), error.hint) from None


def _uid(where: str, salt: bytes, data: bytes | None = None) -> str:
    with reading(where) as stack:
        uid = text_of(image_from_file(where, stack, data).dataset, "SOPInstanceUID")
    if not uid:
        raise InputError(f"{where}: it has no SOP Instance UID (0008,0018)", "choose --ids path")
    return hmac.digest(salt, uid.encode(), "sha256").hex()
