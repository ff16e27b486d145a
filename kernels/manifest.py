"""What `python -m pmclip_deploy.kernels.compile` leaves in a folder, and how an adapter finds its kernel there; neither needs Triton."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pmclip_deploy.kernels.plan import Tile

MANIFEST, SCHEMA = "kernels.json", "pmclip-deploy/kernels/2"
ALIGNED = 16  # elements of a row: with a multiple of them, and arrays that begin at one of 16 bytes, a thread reads 16 bytes at once


@dataclass(frozen=True)
class Kernel:
    file: str  # of FILE.ptx and FILE.cubin
    entry: str  # its name in both
    target: str  # "sm_89"; one that ends in "a" runs on that very capability alone, be it PTX or cubin
    bank: str  # "f32", "f16", "i8"; "" for fold and merge
    scaled: bool
    aligned: bool
    size: int  # K, the most that k can be
    tile: Tile
    arguments: tuple[str, ...]  # in the order of a launch: "image: *fp32"
    threads: int
    shared: int  # bytes that a launch must ask for
    registers: int
    spilled: int  # bytes
    ptx_sha256: str
    cubin_sha256: str

    @property
    def capability(self) -> int:
        return int(self.target[3:].rstrip("a"))


def write_manifest(folder: Path, kernels: Iterable[Kernel], versions: dict[str, str]) -> None:
    rows = [asdict(kernel) | {"tile": kernel.tile._asdict()} for kernel in kernels]
    (folder / MANIFEST).write_text(json.dumps({"schema": SCHEMA, **versions, "kernels": rows}, indent=1) + "\n")


def kernels_from_manifest(folder: Path) -> list[Kernel]:
    found = json.loads((folder / MANIFEST).read_text())
    if found["schema"] != SCHEMA:
        raise ValueError(f"{folder / MANIFEST}: its schema is {found['schema']}, not {SCHEMA}; compile the kernels again")
    rows = found["kernels"]
    return [Kernel(**{**row, "tile": Tile(**row["tile"]), "arguments": tuple(row["arguments"])}) for row in rows]


def chosen(
    kernels: Iterable[Kernel],
    entry: str,
    capability: int,
    k: int,
    bank: str = "",
    scaled: bool = False,
    aligned: bool = False,
    images: int = 16,
) -> Kernel:
    """The one made for this GPU, else the newest whose PTX the driver compiles for it; of those the one whose tile these images fill best.

    Raises ValueError where there is none.
    """
    fitting = [
        kernel
        for kernel in kernels
        if (kernel.entry, kernel.bank, kernel.scaled) == (entry, bank, scaled)
        and kernel.size >= k
        and (kernel.capability == capability or (kernel.capability < capability and not kernel.target.endswith("a")))
        and kernel.aligned <= aligned
    ]
    if not fitting:
        what = f"{entry} for a bank of {bank}{' with scales' * scaled}" if bank else entry
        raise ValueError(f"no kernel of {what}, k {k}, for compute capability {capability / 10}; compile --arch sm_{capability} --k {k}")

    def order(kernel: Kernel) -> tuple[int, ...]:
        taken = min(kernel.tile.images, images)
        return (kernel.capability, kernel.aligned, taken, -kernel.tile.images, -kernel.size)

    return max(fitting, key=order)


def code(folder: Path, kernel: Kernel, kind: str) -> bytes:
    """``kind`` is "ptx" or "cubin"."""
    file = folder / f"{kernel.file}.{kind}"
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != getattr(kernel, f"{kind}_sha256"):
        raise ValueError(f"{file}: not the file that {MANIFEST} names; compile the kernels again")
    return data
