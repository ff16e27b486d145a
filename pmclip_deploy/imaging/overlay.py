"""The picture that a model saw, as a PNG, and where in it a finding's map is high."""

from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.atomic import write, write_errors

RED = (255, 48, 32)
MOST = 0.6  # of the colour where the map is surest; what it lies on stays visible


def colored(pixels: NDArray[np.uint8], places: NDArray[Any]) -> NDArray[np.uint8]:
    """(S, S) or (S, S, 3) u8 and a map of logits (h, w) -> (S, S, 3) u8, red where the map's probability is high."""
    from PIL import Image

    rgb = np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels
    likely = 1 / (1 + np.exp(-np.clip(places.astype(np.float32), -30, 30)))
    size = (pixels.shape[1], pixels.shape[0])
    shade = np.asarray(Image.fromarray(likely).resize(size, Image.Resampling.BILINEAR))[:, :, None] * MOST
    return np.round(rgb * (1 - shade) + np.array(RED, np.float32) * shade).astype(np.uint8)


def save_png(pixels: NDArray[np.uint8], path: "str | PathLike[str]") -> None:
    """Raises UsageError where ``path`` cannot be written."""
    from PIL import Image

    content = BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    with write_errors(f"{fspath(path)}:", "check the folder"):
        write(Path(path), content.getvalue())
