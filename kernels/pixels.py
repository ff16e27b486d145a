"""What large pictures wait for, in C++: RLE, stored values through a table, and Pillow's bicubic of a grey picture, all bit for bit."""

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import cpu

FRACTION = 22  # bits of a weight: PRECISION_BITS in Pillow's Resample.c
LANES = 8  # taps are filled up to a multiple of it


def _load() -> ctypes.CDLL | None:
    found = cpu.library
    if found is None or not hasattr(found, "pmclip_resample"):  # built before there was one
        return None
    address, i64 = ctypes.c_void_p, ctypes.c_int64
    found.pmclip_look_up.argtypes, found.pmclip_look_up.restype = [address, i64, address, ctypes.c_int, address], None
    found.pmclip_unpack_bits.argtypes = [address, i64, address, i64, i64]
    found.pmclip_resample.argtypes = [address, i64, i64, address, address, ctypes.c_int, address, address]
    found.pmclip_resample.restype = None
    return found


library = _load()


class Taps(ctypes.Structure):
    _fields_ = (("size", ctypes.c_int64), ("taps", ctypes.c_int64), ("first", ctypes.c_void_p), ("weights", ctypes.c_void_p))


def look_up(values: NDArray[np.uint16], table: NDArray[np.uint8], threads: int = 0) -> NDArray[np.uint8] | None:
    """table (65536,) of each value; None where there is no compiled kernel. Both are C-contiguous."""
    if library is None:
        return None
    out = np.empty(values.shape, np.uint8)
    library.pmclip_look_up(values.ctypes.data, values.size, table.ctypes.data, threads, out.ctypes.data)
    return out


def unpack_bits(data: NDArray[np.uint8], out: NDArray[np.uint8]) -> bool | None:
    """DICOM's RLE, one byte plane: fills ``out``, 1-dimensional of any stride. Whether there was enough; None without a compiled kernel."""
    if library is None:
        return None
    return bool(library.pmclip_unpack_bits(data.ctypes.data, data.size, out.ctypes.data, out.size, out.strides[0]) == 0)


def bicubic(pixels: NDArray[np.uint8], height: int, width: int, threads: int = 0) -> NDArray[np.uint8] | None:
    """(H, W) -> (height, width), as Pillow's ``resize`` with BICUBIC does it, across and then down.

    None where Pillow must do it: without a compiled kernel, where a side grows or ends below 16, and where the height loses more than
    twice what the width loses: there Pillow goes down first since version 13, and did not before.
    """
    lost = pixels.shape[0] - height, pixels.shape[1] - width
    if library is None or min(lost) < 1 or min(height, width) < 16 or lost[0] > 2 * lost[1]:
        return None
    down, across = _taps(pixels.shape[0], height), _taps(pixels.shape[1], width)
    between, out = np.empty((pixels.shape[0], width), np.uint8), np.empty((height, width), np.uint8)
    rows, columns = (Taps(*weights.shape, first.ctypes.data, weights.ctypes.data) for first, weights in (down, across))
    library.pmclip_resample(pixels.ctypes.data, *pixels.shape, ctypes.byref(columns), ctypes.byref(rows), threads,
                            between.ctypes.data, out.ctypes.data)  # fmt: skip
    return out


@lru_cache(16)
def _taps(inputs: int, outputs: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """first (outputs,) and weights (outputs, taps): precompute_coeffs and normalize_coeffs_8bpc, operation by operation.

    A window is as wide for every output, moved to the left where it would leave the picture; what is beside Pillow's own weighs nothing.
    From 16 outputs on it is not wider than the picture.
    """
    scale = inputs / outputs
    support = 2.0 * scale
    center = (np.arange(outputs) + 0.5) * scale
    low = np.maximum(np.trunc(center - support + 0.5), 0).astype(np.int64)
    high = np.minimum(np.trunc(center + support + 0.5), inputs).astype(np.int64)
    taps = -(-int((high - low).max()) // LANES) * LANES
    first = np.minimum(low, inputs - taps)
    place = first[:, None] + np.arange(taps)  # (outputs, taps)
    share = _cubic((place - center[:, None] + 0.5) * (1.0 / scale))
    share[(place < low[:, None]) | (place >= high[:, None])] = 0
    share /= np.cumsum(share, 1)[:, -1:]  # one after the other, as C adds them
    weights = np.trunc(share * (1 << FRACTION) + np.where(share < 0, -0.5, 0.5)).astype(np.int32)
    return first, np.ascontiguousarray(weights)


def _cubic(x: NDArray[Any]) -> NDArray[np.float64]:
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near, far = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.asarray(np.where(x < 1, near, np.where(x < 2, far, 0.0)))
