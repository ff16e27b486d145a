"""Pictures that training sees beside the images as they are: versions of these, and what is no radiology."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.images import with_margin
from pmclip_deploy.train.nonradiographs import Photographs, filed, nonradiographs

OTHERS = 1200  # pictures that are no radiology
VERSIONS, NEGATIVE = 2, 0.05  # of each training image, beside itself, and the share of radiographs with black and white exchanged


class AsFiled:
    """Versions of a picture as files bring it: a quarter turn or a negative of a radiograph; smaller, noisy, bordered, compressed."""

    def __init__(self, radiographs: set[Path], seed: int) -> None:
        self.radiographs, self.rng = radiographs, np.random.default_rng(seed)

    def __call__(self, path: Path, pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        for _ in range(VERSIONS):
            x = pixels
            if path in self.radiographs:
                x = np.rot90(x, int(self.rng.choice(4, p=(0.7, 0.1, 0.1, 0.1))))
                x = 255 - x if self.rng.random() < NEGATIVE else x
            yield np.asarray(filed(Image.fromarray(np.ascontiguousarray(x)), self.rng))


def others(photographs: Photographs, preprocess: Preprocess, seed: int) -> list[Tensor]:
    """Pictures that are no radiology, (1 or 3, M, M) u8."""
    return [with_margin(x, preprocess) for x in nonradiographs(OTHERS, seed, photographs[0])]
