"""Whatever an image is given as, to a picture."""

import os
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.errors import UsageError

if TYPE_CHECKING:
    from pydicom import Dataset

    from pmclip_deploy.imaging.picture import Picture


Image: TypeAlias = Union[str, "os.PathLike[str]", "Dataset", NDArray[Any], "Picture"]


def picture_from_image(image: Image, frame: int | None = None, window: tuple[float, float] | None = None) -> "Picture":
    from pmclip_deploy.imaging.picture import Picture

    if isinstance(image, (str, os.PathLike)):
        from pmclip_deploy.imaging.read import picture_from_path

        return picture_from_path(image, frame, window)
    if isinstance(image, np.ndarray):
        from pmclip_deploy.imaging.raster import picture_from_array

        return picture_from_array(image)
    if isinstance(image, Picture):
        return image
    from pydicom import Dataset

    if not isinstance(image, Dataset):
        raise UsageError(f"an image is a path, an array or a pydicom Dataset, not a {type(image).__name__}")
    from pmclip_deploy.imaging.dicom import picture_from_dicom

    return picture_from_dicom(image, frame, window)
