"""What a frame must be, what a codestream says it is, and stored bits (PS3.5 8.1.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.faults import Refused as Refused

LARGE = 1 << 18  # pixels from which on loading kernels/pixels.py pays
Samples = NDArray[Any]  # (H, W) or (H, W, 3) integers


@dataclass(frozen=True)
class Layout:
    """The Image Pixel module (PS3.3 C.7.6.3), checked."""

    rows: int
    columns: int
    samples: int  # per pixel: 1 or 3
    allocated: int  # bits: 1, 8, 16 or 32
    stored: int
    high_bit: int
    signed: bool
    photometric: str
    planar: int

    @property
    def pixels(self) -> int:
        return self.rows * self.columns

    @property
    def low(self) -> int:
        """The smallest value that the stored bits hold."""
        return -(1 << self.stored - 1) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest value that the stored bits hold."""
        return self.low + (1 << self.stored) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(f"<{'i' if self.signed else 'u'}{max(self.allocated // 8, 1)}")


@dataclass(frozen=True)
class Header:
    """What a codestream says about itself."""

    rows: int
    columns: int
    components: int
    precision: int
    signed: bool = False
    tile: int = 0  # JPEG 2000: the pixels of one
    blocks: int = 0  # JPEG 2000: the code blocks of one tile, at most
    process: int = 0  # JPEG: the SOF marker, 0xC0 baseline ... 0xC3 lossless
    color: str = ""  # JPEG: "RGB", "YBR", or "" where the codestream does not tell
    lossless: bool = False  # by the transfer syntax


def as_declared(samples: Samples, layout: Layout, header: Header) -> Samples:
    """Read decoded words as the DICOM header says, signed or not: JPEG knows no sign, and JPEG 2000 may say another.

    A lossless stream may hold whole words, so only the stored bits count, as they do in a native file. A lossy one overshoots,
    so all its bits do.
    """
    bits = 8 * samples.dtype.itemsize
    depth = min(header.precision, layout.stored) if header.lossless else header.precision
    words = np.ascontiguousarray(samples).view(f"<{'i' if layout.signed else 'u'}{bits // 8}")
    return significant_bits(words, replace(layout, allocated=bits, stored=depth, high_bit=depth - 1))


def significant_bits(samples: Samples, layout: Layout) -> Samples:
    """Drop what stands beside the stored bits, an old overlay for instance, and extend the sign (PS3.5 8.1.1)."""
    above = layout.allocated - 1 - layout.high_bit
    beside = layout.allocated - layout.stored
    if beside == 0 or layout.allocated == 1:
        return samples
    if above == beside and samples.dtype.kind == "u" and int(samples.max(initial=0)) >> layout.stored == 0:
        return samples  # nothing stands there, as in most files
    return np.right_shift(np.left_shift(samples, above), beside)


def native_samples(frame: Samples, layout: Layout) -> Samples:
    """A native frame as pydicom gives it, with only its stored bits."""
    return significant_bits(frame.astype(frame.dtype.newbyteorder("<"), copy=False), layout)
