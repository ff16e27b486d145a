"""Stage "fast" of `benchmarks.gpu`: how long the similarity kernels take, beside the measured ceiling and beside torch and CuPy."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from pmclip_deploy.benchmarks.gpu_kernels import (
    CUDA,
    TRITON,
    Given,
    System,
    cuda_system,
    lasting_stream,
    random_bank,
    random_images,
    triton_system,
)
from pmclip_deploy.benchmarks.gpu_machine import READ
from pmclip_deploy.benchmarks.gpu_stage import MOST, Figures, NotMeasuredError, Stage, quartiles
from pmclip_deploy.kernels.plan import BYTES, FEW, Tile

WIDTH, K, SCALE = 512, 10, 100.0
TORCH = "torch, product and topk"
SEARCHES = (  # (N, B), those that matter most first
    *((1_000_000, images) for images in (1, 16)),
    *((10_000, images) for images in (1, 16)),
    *((1_000_000, images) for images in (64, 256)),
    *((100_000, images) for images in (1, 16, 64)),
    *((4_000_000, images) for images in (1, 16)),
)
TINY = (70, 2, 20)  # N, B and D of a rehearsal
SWEEP = [Tile(rows=rows, columns=columns) for rows in (64, 128) for columns in (32, 64, 128)]
SWEEP_F32 = [Tile(images=FEW, rows=rows, columns=columns) for rows in (32, 64) for columns in (32, 64, 128)]
PROGRAMS = (2, 4, 8)  # for each multiprocessor
SECONDS = 0.4  # of calls that one figure is of


def part(bank: str, images: int, rows: int) -> str:
    return f"search {bank}, B {images}, N {rows:,}"


def measure(stage: Stage) -> None:
    ours = {CUDA: cuda_system_of(stage, "k16"), TRITON: Late(partial(triton_system, stage))}
    ours |= {f"{CUDA}, {name}": cuda_system_of(stage, name) for name in stage.compiled if name not in ("k16", "k128")}
    for rows, images in ((TINY[0], TINY[1]),) if stage.is_rehearsal else SEARCHES:
        for bank in BYTES:
            made = Late(partial(search, stage, bank, images, rows))
            for name, system in ours.items():
                stage.measure(part(bank, images, rows), name, partial(one, stage, made, system, name.startswith(CUDA)))
            for name, make in others(stage, bank, images, rows).items():
                stage.measure(part(bank, images, rows), name, partial(other, stage, made, make))
            del made
    for bank in BYTES:
        sweep(stage, bank)


class Late:
    """What is made when it is first asked for, and then kept."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.made: Any = None

    def __call__(self, *given: Any) -> Any:
        self.made = self.make() if self.made is None else self.made
        return self.made(*given) if given else self.made


def cuda_system_of(stage: Stage, folder: str) -> Late:
    return Late(partial(cuda_system, stage, [folder]))


def search(stage: Stage, bank: str, images: int, rows: int) -> Given:
    width = TINY[2] if stage.is_rehearsal else WIDTH
    made, scales = random_bank(stage, bank, rows, width)
    return Given(random_images(stage, images, width), made, SCALE, K, scales)


def one(stage: Stage, made: Callable[[], Given], system: System, hosted: bool) -> Figures:
    """Times of one of our systems; ``hosted`` also those of the calls by themselves, which return before the GPU is done."""
    given = made()
    call = system(given, *((lasting_stream(),) if hosted and not stage.is_rehearsal else ()))
    figures = shares(stage, given, stage.timed(call, SECONDS))
    if hosted:
        figures["host_us"] = host_us(stage, call)
    if len(given.bank) <= 10_000 and not stage.is_rehearsal:
        figures["graph_ms"] = graph_ms(stage, system(given))
    return figures


def shares(stage: Stage, given: Given, figures: Figures) -> Figures:
    """With the bytes that must move in that time, and their share of what the GPU was seen to read."""
    results = len(given.image) * (12 * given.k + 4)
    must = results + sum(x.numel() * x.element_size() for x in (given.bank, given.image, given.scales) if x is not None)
    rate, ceiling = must / figures["p50_ms"] / 1e6, max(stage.known(READ, "gb_per_s"), default=None)
    return {**figures, "gb_per_s": rate, "share_of_read": None if ceiling is None else rate / ceiling}


def host_us(stage: Stage, call: Callable[[], object]) -> float:
    times = []
    for _ in range(MOST):
        stage.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return float(quartiles(times)["p50_ms"])


def graph_ms(stage: Stage, call: Callable[[], object], calls: int = 20) -> float | None:
    """Of one of several calls in a CUDA graph, where the host takes no part; None if it cannot be captured."""
    import torch

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    except Exception:  # the row of "CUDA graph" in the stage "right" says why
        return None
    return float(stage.timed(graph.replay, SECONDS)["p50_ms"]) / calls


# --- others ---------------------------------------------------------------------------------------------------------------------


Make = Callable[[Given], Callable[[], object]]


def others(stage: Stage, bank: str, images: int, rows: int) -> dict[str, Make]:
    """Systems that others would use. They get a bank that is normalised already, and compute the log-sum-exp where that is said."""
    few = rows > 100_000 and images in (1, 16)
    found: dict[str, Make] = {TORCH: torch_product, "torch, also log-sum-exp": partial(torch_product, sums=True)}
    if bank == "i8":
        found["torch._int_mm and topk"] = torch_int
    if few or stage.is_rehearsal:
        found["torch, blocks of 65,536 rows"] = torch_blocks
        found["CuPy, product and argpartition"] = partial(cupy_product, stage)
    if (bank, images, rows) == ("f16", 16, 1_000_000):  # it takes many seconds to compile
        found["torch.compile of product, topk, log-sum-exp"] = torch_compiled
    return found


def other(stage: Stage, made: Callable[[], Given], make: Make) -> Figures:
    given = made()
    return shares(stage, given, stage.timed(make(given), SECONDS))


def best(image: Any, bank: Any, sums: bool) -> tuple[Any, ...]:
    """int8 rows are multiplied as f16: torch has no product of two types. The image is not normalised: that changes no order."""
    import torch

    scores = image @ bank.T.to(image.dtype)
    found = scores.topk(min(K, len(bank)), 1)
    return (*found, torch.logsumexp(scores, 1)) if sums else tuple(found)


def torch_product(given: Given, sums: bool = False) -> Callable[[], object]:
    import torch

    image = given.image.to(torch.float16 if given.bank.dtype == torch.int8 else given.bank.dtype)
    return lambda: best(image, given.bank, sums)


def torch_compiled(given: Given) -> Callable[[], object]:
    import torch

    image = given.image.to(torch.float16 if given.bank.dtype == torch.int8 else given.bank.dtype)
    compiled = torch.compile(best, dynamic=False)
    return lambda: compiled(image, given.bank, True)


def torch_int(given: Given) -> Callable[[], object]:
    """The image is int8 too, and padded to the 32 rows that the product needs; so it is less exact than the others."""
    import torch

    image = torch.zeros(max(32, len(given.image)), given.image.shape[1], dtype=torch.int8, device=given.image.device)
    image[: len(given.image)] = (given.image * (127 / given.image.abs().amax(1, keepdim=True))).round().to(torch.int8)
    return lambda: torch._int_mm(image, given.bank.T)[: len(given.image)].float().topk(min(K, len(given.bank)), 1)


def torch_blocks(given: Given) -> Callable[[], object]:
    """Scores of a block at a time, as faiss's flat index does: the memory does not grow with the bank."""
    import torch

    image = given.image.to(torch.float16 if given.bank.dtype == torch.int8 else given.bank.dtype)
    blocks, k = given.bank.split(65_536), min(K, len(given.bank))

    def call() -> object:
        found = [(image @ block.T.to(image.dtype)).topk(min(k, len(block)), 1) for block in blocks]
        indices = torch.cat([one.indices + 65_536 * i for i, one in enumerate(found)], 1)
        scores = torch.cat([one.values for one in found], 1).topk(k, 1)
        return scores.values, indices.gather(1, scores.indices)

    return call


def cupy_product(stage: Stage, given: Given) -> Callable[[], object]:
    stage.need_gpu()
    import cupy
    import torch

    if given.bank.dtype == torch.int8:
        raise NotMeasuredError("CuPy has no int8 product of a matrix")
    image, bank, k = cupy.from_dlpack(given.image.to(given.bank.dtype)), cupy.from_dlpack(given.bank), min(K, len(given.bank))
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def call() -> object:
        with stream:
            return cupy.argpartition(image @ bank.T, -k, axis=1)[:, -k:]

    return call


# --- tiles ----------------------------------------------------------------------------------------------------------------------


def sweep(stage: Stage, bank: str) -> None:
    """Tiles and numbers of programs through Triton, for one image: which would be the best of this GPU's."""
    import torch

    rows, images = (TINY[0], 1) if stage.is_rehearsal else (1_000_000, 1)
    made = Late(partial(search, stage, bank, images, rows))
    scale = torch.tensor(SCALE, device=stage.device)

    def figures(tile: Tile, programs: int) -> Figures:
        from pmclip_deploy.kernels.triton_similarity import contrastive_similarity

        given: Given = made()
        call = partial(contrastive_similarity, given.image, given.bank, scale, given.k, given.scales, tile, programs)
        return shares(stage, given, stage.timed(call, SECONDS / 4))

    tiles = [(tile, each) for tile in (SWEEP_F32 if bank == "f32" else SWEEP) for each in PROGRAMS]
    for tile, each in tiles[: 1 if stage.is_rehearsal else None]:
        many = 4 if stage.is_rehearsal else each * torch.cuda.get_device_properties(0).multi_processor_count
        about = f"{part(bank, images, rows)}, {tile.rows} rows, {tile.columns} columns, {each} programs"
        stage.measure(about, TRITON, partial(figures, tile, many))
