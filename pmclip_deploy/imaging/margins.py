"""The margins of a picture that show nothing: black borders, collimation, flat strips. One rule for training, calibration and inference."""

import numpy as np
from numpy.typing import NDArray

FLAT = 12  # grey levels around a line's median that count as nothing: noise and JPEG's ripples
SHARE = 0.06  # of a line that may differ more than that: letters, and the bright edge of a collimated film
BACK = 0.02  # of the longer side that is given back around what is left, for fingertips and other thin ends
LOOKED_AT = 320  # lines of the shorter side that are looked at, at least; a large picture is sampled
PASSES = 4  # rows and columns in turn: a bright strip at the bottom stands in every column until it is cut off
LEAST = 32  # pixels of a side; a picture that would become smaller stays whole


def inner_box(pixels: NDArray[np.uint8]) -> tuple[slice, slice]:
    """(rows, columns) of the part inside the margins of (H, W) or (H, W, 3) u8; all of them where nothing is left."""
    height, width = pixels.shape[:2]
    step = max(1, min(height, width) // LOOKED_AT)
    seen = pixels[::step, ::step]
    if seen.ndim == 3:
        seen = seen.max(axis=2)
    top, bottom, left, right = 0, seen.shape[0], 0, seen.shape[1]
    for _ in range(PASSES):
        before = top, bottom, left, right
        for axis in (0, 1):
            part = seen[top:bottom, left:right]
            lines = np.flatnonzero(_shows(part if axis == 0 else np.ascontiguousarray(part.T)))
            if not len(lines):
                return slice(0, height), slice(0, width)
            first, last = int(lines[0]), int(lines[-1]) + 1
            if axis == 0:
                top, bottom = top + first, top + last
            else:
                left, right = left + first, left + last
        if before == (top, bottom, left, right):
            break
    back = round(BACK * max(bottom - top, right - left))
    rows = slice(max(top - back, 0) * step, min((bottom + back) * step, height))
    columns = slice(max(left - back, 0) * step, min((right + back) * step, width))
    if rows.stop - rows.start < LEAST or columns.stop - columns.start < LEAST:
        return slice(0, height), slice(0, width)
    return rows, columns


def _shows(lines: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(N, L) u8 -> (N,): whether a line holds more than one grey level and some noise."""
    middle = lines.shape[1] // 2
    median = np.partition(lines, middle, axis=1)[:, middle, None].astype(np.int16)
    far: NDArray[np.bool_] = (np.abs(lines.astype(np.int16) - median) > FLAT).mean(axis=1) > SHARE
    return far
