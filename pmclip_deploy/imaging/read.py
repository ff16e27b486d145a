"""A file of any kind that is read, to a picture."""

from __future__ import annotations

from os import PathLike, fspath

from pmclip_deploy.errors import InputError
from pmclip_deploy.imaging.picture import Picture, head_of_file

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"


def picture_from_path(path: str | PathLike[str], frame: int | None = None, window: tuple[float, float] | None = None) -> Picture:
    """Read a DICOM, PNG or JPEG file, recognised by its first bytes. ``frame`` and ``window`` are for DICOM."""
    source = fspath(path)
    head = head_of_file(source)
    if not head.startswith((PNG, JPEG)):
        from pmclip_deploy.imaging.dicom import picture_from_dicom

        return picture_from_dicom(source, frame, window)
    if frame not in (None, 0):
        raise InputError(f"{source}: frame {frame} was asked for and the picture has only frame 0", "leave the frame out")
    if window is not None:
        raise InputError(f"{source}: a window can be set for DICOM files only", "leave it out, or give the DICOM file")
    from pmclip_deploy.imaging.raster import picture_from_raster

    return picture_from_raster(source, "png" if head.startswith(PNG) else "jpeg")
