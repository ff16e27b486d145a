"""Compiles the kernels ahead of time, with no GPU: `python -m pmclip_deploy.kernels.compile --output DIR [--arch sm_89 ...] [--k 16]`."""

import argparse
import hashlib
import re
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pmclip_deploy.kernels.manifest import Kernel, write_manifest
from pmclip_deploy.kernels.plan import BYTES, FEW, Tile, plan_for, traffic
from pmclip_deploy.kernels.triton_similarity import similarity_fold, similarity_merge, similarity_slices

CAPABILITIES = (75, 80, 86, 87, 89, 90, 110, 120)
VARIANTS = (("f32", False), ("f16", False), ("i8", False), ("i8", True))  # a bank's type, and whether its rows have scales
TYPES = {"f32": "fp32", "f16": "fp16", "i8": "i8"}
WARPS = {
    "similarity_slices": 4,
    "similarity_fold": 1,
    "similarity_merge": 1,
}  # a merge is a chain of reductions: within a warp they need no barrier
MOST_SHARED = 48 << 10  # bytes that a launch has unasked; TensorRT cannot ask


def compiled(folder: Path, capability: int, k: int) -> Iterator[Kernel]:
    """All kernels for one GPU, each written as it is done."""
    size = triton.next_power_of_2(k)
    for bank, scaled in VARIANTS:
        tiles = dict.fromkeys(Tile.of(bank, capability, images) for images in (FEW, FEW + 1))
        for tile, aligned in product(tiles, (True, False)):
            types = {"image": "*fp32", "bank": f"*{TYPES[bank]}", "scales": "*fp32" if scaled else None, "logit_scale": "*fp32"}
            types |= {"images": "i32", "rows": "i32", "width": "i32", "step": "i32", "keys": "*i64", "sums": "*fp32"}
            constants = {"K": size, "IMAGES": tile.images, "ROWS": tile.rows, "COLUMNS": tile.columns}
            known = {"image", "bank", "width"} if aligned else set[str]()
            file = f"slices-{bank}{'-few' * (tile.images == FEW)}{'-scaled' * scaled}{'' if aligned else '-any'}-sm_{capability}"
            yield _compiled(folder, file, similarity_slices, types, constants, known, capability, bank, scaled, aligned, tile)
    types = {"keys": "*i64", "sums": "*fp32", "images": "i32", "slices": "i32"}
    results = {"k": "i32", "score": "*fp32", "index": "*i64", "log_sum_exp": "*fp32"}
    folded = {"folded_keys": "*i64", "folded_sums": "*fp32"}
    tile = Tile()
    constants = {"K": size, "SLICES": tile.slices}
    for function, more in ((similarity_fold, folded), (similarity_merge, results)):
        file, known = f"{function.__name__.removeprefix('similarity_')}-sm_{capability}", {"keys", *folded} & {*types, *more}
        yield _compiled(folder, file, function, {**types, **more}, constants, known, capability, "", False, False, tile)


def _compiled(
    folder: Path, file: str, function: Any, types: dict[str, str | None], constants: dict[str, Any], known: set[str], capability: int,
    bank: str, scaled: bool, aligned: bool, tile: Tile,
) -> Kernel:  # fmt: skip
    """``known`` are divisible by 16."""
    names = function.arg_names
    arguments = {name: kind for name, kind in types.items() if kind}
    source = ASTSource(
        function,
        {name: arguments.get(name, "constexpr") for name in names},
        constants | {name: None for name, kind in types.items() if not kind},
        {(names.index(name),): [["tt.divisibility", 16]] for name in known},
    )
    threads = 32 * WARPS[function.__name__]
    knobs.compilation.disable_line_info = True  # it holds this machine's paths
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": threads // 32, "num_stages": 3})
    if done.metadata.shared > MOST_SHARED:
        raise ValueError(f"{file}: {done.metadata.shared} bytes of shared memory are more than {MOST_SHARED}; make its tile or k smaller")
    ptx = without_scratch(done.asm["ptx"], len(arguments))
    target = re.search(r"^\.target (\w+)", ptx, re.M)[1]  # type: ignore[index]
    (folder / f"{file}.ptx").write_text(ptx)
    assembler = (knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas).path
    command = [assembler, "-v", "--regAllocOptLevel=2", f"--gpu-name={target}", f"{file}.ptx", "-o", f"{file}.cubin"]
    said = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr
    figures = ("registers", "bytes spill stores", "bytes spill loads")
    registers, *spills = (int(re.search(rf"(\d+) {what}", said)[1]) for what in figures)  # type: ignore[index]
    hashes = [hashlib.sha256((folder / f"{file}.{kind}").read_bytes()).hexdigest() for kind in ("ptx", "cubin")]
    order, size, shared = tuple(f"{name}: {kind}" for name, kind in arguments.items()), constants["K"], done.metadata.shared
    made = (file, function.__name__, target, bank, scaled, aligned, size, tile, order, threads, shared, registers, sum(spills))
    return Kernel(*made, *hashes)


def without_scratch(ptx: str, arguments: int) -> str:
    """PTX whose entry has these arguments and no more: Triton adds pointers to scratch memory, and a launch by TensorRT gives none."""
    head, opened, rest = ptx.partition(".entry")
    declared, closed, body = rest.partition("\n)")
    name, _, parameters = declared.partition("(")
    kept, dropped = (lines := parameters.split(","))[:arguments], lines[arguments:]
    if len(kept) < arguments or any(f"[{line.split()[-1]}]" in body for line in dropped):
        raise ValueError(f"{name.strip()} takes other arguments than Triton was told, or uses scratch memory")
    return f"{head}{opened}{name}({','.join(kept)}{closed}{body}"


def resources(kernels: list[Kernel]) -> str:
    """Registers a thread / shared memory / bytes spilled, of each GPU and kernel, for aligned rows."""
    targets: dict[str, dict[str, Kernel]] = {}
    for one in kernels:
        if one.aligned or not one.bank:
            title = f"{one.bank or one.entry.removeprefix('similarity_')}{', scales' * one.scaled}"
            targets.setdefault(one.target, {})[f"{title}, {one.tile.images} images" if one.bank else title] = one
    titles = next(iter(targets.values()))
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for target, found in targets.items():
        cells = [f"{one.registers} / {one.shared / 1024:.0f} KiB / {one.spilled}" for one in found.values()]
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def roofline(rows: int, width: int, k: int, programs: int, capability: int) -> str:
    """What must move against what the kernels ask for, in MB."""
    lines = ["| images | bank | must move | asked for | bank | images | between | results |", "|---" * 8 + "|"]
    for images in (1, 16, 64):
        for bank in BYTES:
            tile = Tile.of(bank, capability, images)
            plan = plan_for(images, rows, triton.next_power_of_2(k), tile, programs)
            bytes_ = traffic(images, rows, width, k, bank, bank == "i8", plan, tile)
            asked = (bytes_.asked, bytes_.bank, bytes_.images, bytes_.partial, bytes_.results)
            lines.append(f"| {images} | {bank} | " + " | ".join(f"{x / 1e6:,.3f}" for x in (bytes_.must, *asked)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pmclip_deploy.kernels.compile", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--arch", nargs="+", default=[f"sm_{x}" for x in CAPABILITIES], metavar="sm_XY", help="default: %(default)s")
    parser.add_argument("--k", type=int, default=16, help="the most results of one image (default: %(default)s)")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    kernels = [kernel for arch in given.arch for kernel in compiled(given.output, int(arch.removeprefix("sm_")), given.k)]
    write_manifest(given.output, kernels, {"triton": triton.__version__})
    print(f"{len(kernels)} kernels in {given.output}\n\nRegisters a thread / shared memory / bytes spilled:\n\n{resources(kernels)}")
    print(f"\nMB of a million rows of 512, k {given.k}, 512 programs:\n\n{roofline(1_000_000, 512, given.k, 512, kernels[0].capability)}")


if __name__ == "__main__":
    main()
