"""How the GPU's kernels share the work: tiles, slices, grids, what lies between them, and the bytes that move."""

from itertools import accumulate
from math import gcd, prod
from typing import NamedTuple

BYTES = {"f32": 4, "f16": 2, "i8": 1}  # what a bank can be of
FEW = 4  # images


class Tile(NamedTuple):
    """What one step of a program takes."""

    images: int = 16  # the least that a matrix unit takes: one image costs what sixteen do; with fewer, products are summed up one by one
    rows: int = 64
    columns: int = 64
    slices: int = 16  # that the fold makes one of, and the merge takes in a round

    @classmethod
    def of(cls, bank: str, capability: int, images: int) -> "Tile":
        """Half the columns where 64 take more shared memory than a launch has unasked (f32) or spill registers (before 8.0).

        Few images of an f32 bank are multiplied without a matrix unit, which has none for f32: 16 images' work would take longer than to
        read the bank. Half the rows leave room for four programs. Twice the rows of an int8 bank ask half as often for the images.
        """
        if bank == "f32" and images <= FEW:
            return cls(images=FEW, rows=32, columns=32)
        if capability < 80:
            return cls(columns=32)
        return cls(rows=128) if bank == "i8" else cls(columns=32 if bank == "f32" else 64)


class Plan(NamedTuple):
    """How one call is shared among programs."""

    images: int
    size: int  # K, the keys that a slice leaves for an image
    groups: int  # of images
    slices: int
    folded: int  # what the fold makes of the slices; 0 if the merge takes them as they are
    step: int  # of a program from tile to tile

    @property
    def grids(self) -> dict[str, tuple[int, int, int]]:
        """Of the kernels, in the order of their launches."""
        fold = {"similarity_fold": (self.images, self.folded, 1)} if self.folded else {}
        return {"similarity_slices": (self.groups, self.slices, 1), **fold, "similarity_merge": (self.images, 1, 1)}

    @property
    def between(self) -> dict[str, tuple[int, int, int]]:
        """The shapes of what one kernel writes and another reads: keys are i64, sums f32."""
        folded = {"folded_keys": (self.folded, self.images, self.size), "folded_sums": (self.folded, self.images, 2)}
        return {"keys": (self.slices, self.images, self.size), "sums": (self.slices, self.images, 2)} | (folded if self.folded else {})

    @property
    def room(self) -> int:
        """Bytes of all that."""
        return sum(map(_bytes, self.between.items()))

    def places(self, room: int) -> dict[str, int]:
        """Where each of them begins in ``room``, an address."""
        ends = accumulate(map(_bytes, self.between.items()), initial=room)
        return dict(zip(self.between, ends, strict=False))


def _bytes(named: tuple[str, tuple[int, ...]]) -> int:
    name, shape = named
    return -(-prod(shape) * (8 if name.endswith("keys") else 4) // 16) * 16  # what follows is aligned as well


def step_for(rows: int, tile: Tile, slices: int) -> int:
    """How far a program leaps to its next tile, from the last ones on to the first: it meets a bank that is sorted in mixed order.

    Near the golden section of its tiles, and without a common divisor with their number, which is one less for some programs.
    """
    tiles = -(-rows // tile.rows // slices)
    return next((step for step in range(round(0.618 * tiles), 1, -1) if gcd(step, tiles) == gcd(step, tiles - 1) == 1), 1)


def plan_for(images: int, rows: int, size: int, tile: Tile, programs: int) -> Plan:
    """As many slices as make ``programs`` programs, but none without a tile; they are folded where the merge would take three rounds."""
    groups = max(1, -(-images // tile.images))
    slices = max(1, min(-(-programs // groups), -(-rows // tile.rows)))
    folded = -(-slices // tile.slices) if slices > 2 * tile.slices else 0
    return Plan(images, size, groups, slices, folded, step_for(rows, tile, slices))


class Traffic(NamedTuple):
    """Bytes. The first must move whatever the kernel; the others are what the kernels ask for, from wherever it comes."""

    must: int
    bank: int  # once for each group of images; of memory once, as far as the L2 serves programs of one slice together
    images: int  # with each tile of rows, from the L1 or L2
    partial: int  # written by one kernel, read by the next
    results: int

    @property
    def asked(self) -> int:
        return self.bank + self.images + self.partial + self.results


def traffic(images: int, rows: int, width: int, k: int, bank: str, scales: bool, plan: Plan, tile: Tile) -> Traffic:
    once = rows * (width * BYTES[bank] + 4 * scales)
    results = images * (12 * k + 4)
    partial = 2 * (plan.slices + plan.folded) * images * (8 * plan.size + 8)
    reads = plan.slices + -(-rows // tile.rows)  # each program measures its images, then takes them with each of its tiles
    scale = 4 * plan.groups * plan.slices
    asked = 4 * images * width * reads + scale
    return Traffic(once + 4 * images * width + 4 + results, once * plan.groups, asked, partial, results)
