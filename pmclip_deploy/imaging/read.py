"""A file of any kind that is read, on disk or in memory, to a picture."""

from __future__ import annotations

from os import PathLike, fspath

from pmclip_deploy.errors import InputError
from pmclip_deploy.files import JPEG, PNG
from pmclip_deploy.imaging.picture import Picture, head_of_file


def picture_from_path(path: str | PathLike[str], frame: int | None = None, window: tuple[float, float] | None = None) -> Picture:
    """Read a DICOM, PNG or JPEG file, recognised by its first bytes. ``frame`` and ``window`` are for DICOM."""
    source = fspath(path)
    return _picture(source, head_of_file(source), None, frame, window)


def picture_from_bytes(where: str, data: bytes, frame: int | None = None, window: tuple[float, float] | None = None) -> Picture:
    """``picture_from_path`` of what a file holds; ``where`` is its name in messages."""
    if not data:
        raise InputError(f"{where}: is empty", "give what a DICOM, PNG or JPEG file holds, from its first byte on")
    return _picture(where, data[:132], data, frame, window)


def _picture(source: str, head: bytes, data: bytes | None, frame: int | None, window: tuple[float, float] | None) -> Picture:
    if not head.startswith((PNG, JPEG)):
        from pmclip_deploy.imaging.dicom import picture_from_dicom

        return picture_from_dicom(source, frame, window, data=data)
    refuse_frame_and_window(source, frame, window)
    from pmclip_deploy.imaging.raster import picture_from_raster

    return picture_from_raster(source, "png" if head.startswith(PNG) else "jpeg", data)


def refuse_frame_and_window(source: str, frame: int | None, window: tuple[float, float] | None) -> None:
    """Of what is no DICOM image. Raises InputError."""
    if frame not in (None, 0):
        raise InputError(f"{source}: frame {frame} was asked for and the picture has only frame 0", "leave the frame out")
    if window is not None:
        raise InputError(f"{source}: a window can be set for DICOM files only", "leave it out, or give the DICOM file")
