"""How the GPU's two kernels share the work: tiles, slices, grids, what lies between them, and the bytes that move."""

from math import prod
from typing import NamedTuple

BYTES = {"f32": 4, "f16": 2, "i8": 1}  # what a bank can be of


class Tile(NamedTuple):
    """What one step of a program takes."""

    images: int = 16  # the least that a matrix unit takes: one image costs what sixteen do, and that is less than to read the bank
    rows: int = 64
    columns: int = 64
    slices: int = 16  # of the merge

    @classmethod
    def of(cls, bank: str, capability: int) -> "Tile":
        """Half the columns where 64 take more shared memory than a launch has unasked (f32) or spill registers (before 8.0)."""
        return cls(columns=32 if bank == "f32" or capability < 80 else 64)


class Plan(NamedTuple):
    """Shapes for one call; a grid is (x, y, z)."""

    slices: int
    grid: tuple[int, int, int]
    merge_grid: tuple[int, int, int]
    keys: tuple[int, int, int]  # (slices, B, K) i64
    sums: tuple[int, int, int]  # (slices, B, 2) f32

    @property
    def room(self) -> int:
        """Bytes of what lies between the kernels."""
        return 8 * prod(self.keys) + 4 * prod(self.sums)

    def places(self, room: int) -> dict[str, int]:
        """Where each array of the kernels begins in ``room``, an address."""
        return {"keys": room, "sums": room + 8 * prod(self.keys)}


def plan_for(images: int, rows: int, size: int, tile: Tile, programs: int) -> Plan:
    """As many slices as make ``programs`` programs, but none without a tile; ``size`` is K, the keys that a slice leaves for an image."""
    groups = max(1, -(-images // tile.images))
    slices = max(1, min(-(-programs // groups), -(-rows // tile.rows)))
    return Plan(slices, (groups, slices, 1), (images, 1, 1), (slices, images, size), (slices, images, 2))


class Traffic(NamedTuple):
    """Bytes. The first must move whatever the kernel; the others are what the two kernels ask for, from wherever it comes."""

    must: int
    bank: int  # once for each group of images; of memory once, as far as the L2 serves programs of one slice together
    images: int  # with each tile of rows, from the L1 or L2
    partial: int  # written by one kernel, read by the other
    results: int

    @property
    def asked(self) -> int:
        return self.bank + self.images + self.partial + self.results


def traffic(images: int, rows: int, width: int, k: int, bank: str, scales: bool, plan: Plan, tile: Tile) -> Traffic:
    once = rows * (width * BYTES[bank] + 4 * scales)
    results = images * (12 * k + 4)
    partial = 2 * plan.slices * images * (8 * plan.keys[2] + 8)
    reads = plan.slices + -(-rows // tile.rows)  # each program measures its images, then takes them with each of its tiles
    scale = 4 * plan.grid[0] * plan.grid[1]
    asked = 4 * images * width * reads + scale
    return Traffic(once + 4 * images * width + 4 + results, once * plan.grid[0], asked, partial, results)
