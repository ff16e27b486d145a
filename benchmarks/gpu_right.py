"""Stage "right" of `benchmarks.gpu`: whether the similarity kernels give what the reference gives, where a GPU can go wrong too.

python -m pmclip_deploy.benchmarks.gpu_right FOLDER     # one small call of each compiled kernel, for compute-sanitizer
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from pmclip_deploy.benchmarks.gpu_kernels import (
    CUDA,
    TRITON,
    Answer,
    Given,
    System,
    cuda_system,
    fault,
    random_bank,
    random_images,
    triton_system,
)
from pmclip_deploy.benchmarks.gpu_stage import Figures, NotMeasuredError, Stage

CASES = Path(__file__).resolve().parents[1] / "tests" / "kernels" / "test_kernels_gpu.py"
SHAPES = 400
BANKS, IMAGES, KS = ("f32", "f16", "i8"), (1, 2, 15, 16, 17, 63, 64, 65, 256), (1, 10, 16, 17, 100)
ROWS, WIDTHS = (1, 15, 63, 64, 65, 127, 4095, 100_000, 1_000_000), (1, 7, 16, 31, 32, 48, 64, 512, 513, 768, 1024)
MOST_NUMBERS, MOST_SCORES = 6e8, 1.3e8  # of a bank and of its scores, so that doubles of them fit
TINY = (2, 70, 20)  # the most images, rows and numbers a row in a rehearsal
LARGE = {"over 2^31 bytes": ("f16", 4_500_000), "over 2^31 numbers": ("i8", 5_000_000)}  # banks of 512 numbers a row
SECONDS = {TRITON: 12.0, CUDA: 20.0}  # for the tests' cases, and for sampled shapes; Triton compiles for each kind of shape
RUNS = 20


def measure(stage: Stage) -> None:
    systems = {TRITON: Late(partial(triton_system, stage)), CUDA: Late(partial(cuda_system, stage))}  # the second is being compiled
    for name, system in systems.items():
        stage.measure("the tests' cases", name, partial(tests_cases, stage, system, SECONDS[name]))
        for bank in BANKS:
            stage.measure(f"{bank}, all rows equal", name, partial(all_equal, stage, system, bank))
            stage.measure(f"{bank}, two kinds of rows", name, partial(two_kinds, stage, system, bank))
            stage.measure(f"{bank}, similarity rises with the row", name, partial(rising, stage, system, bank))
        stage.measure("not a number, infinity, zero", name, partial(non_finite, stage, system))
        stage.measure(f"{RUNS} runs, the same bits", name, partial(same_bits, stage, system))
        stage.measure("two streams", name, partial(two_streams, stage, system))
        stage.measure("the default stream", name, partial(default_stream, stage, system))
        stage.measure("CUDA graph", name, partial(in_graph, stage, system))
        for what, (bank, rows) in LARGE.items():
            stage.measure(f"a bank {what}", name, partial(large, stage, system, bank, rows))
    for name, system in reversed(systems.items()):
        stage.measure(f"{SHAPES} sampled shapes", name, partial(sampled, stage, system, SECONDS[name]))
    for tool in ("memcheck", "racecheck"):
        stage.measure(f"compute-sanitizer {tool}", CUDA, partial(sanitized, stage, tool))


class Late:
    """A system that is made when it is first called, so that what keeps it from being made is a row."""

    def __init__(self, make: Callable[[], System]) -> None:
        self.make = make
        self.made: System | None = None

    def prepared(self, given: Given) -> Callable[[], Answer]:
        self.made = self.made or self.make()
        return self.made(given)

    def __call__(self, given: Given) -> Answer:
        return self.prepared(given)()


def verdict(faults: Iterator[str | None]) -> Figures:
    """How many answers there were, how many of them are wrong, and what is wrong with the first."""
    found = [*faults]
    wrong = [fault for fault in found if fault]
    return {"wrong": len(wrong), "samples": len(found), **({"first_wrong": wrong[0]} if wrong else {})}


def tests_cases(stage: Stage, system: Late, seconds: float) -> Figures:
    """The cases of tests/kernels/test_kernels_gpu.py, compared by its own function: as many as there is time for, few in a rehearsal."""
    import numpy as np
    import torch

    from pmclip_deploy.kernels.reference import Similarity

    cases = module_from_file(CASES)
    if cases is None:
        raise NotMeasuredError("the tests do not lie beside this package; run it in a checkout")
    end: list[float] = []

    def faults() -> Iterator[str | None]:
        for case in cases.CASES[:: 13 if stage.is_rehearsal else 1]:
            if end and time.monotonic() > end[0]:
                return
            one = cases.given(*case)
            image, bank = (torch.from_numpy(np.ascontiguousarray(x)).to(stage.device) for x in (one.image, one.bank))
            scales = None if one.scales is None else torch.from_numpy(one.scales).to(stage.device)
            answer = system(Given(image, bank, float(one.logit_scale), one.k, scales))
            end[:] = end or [time.monotonic() + min(seconds, stage.left)]  # from the first, which waits for kernels
            try:
                cases.compare(one, Similarity(*(x.cpu().numpy() for x in answer)), case[-1] in ("ties", "none", "no scale"))
            except AssertionError as error:
                yield f"{'-'.join(map(str, case))}: {' '.join(str(error).split())[:120]}"
            else:
                yield None

    return verdict(faults())


def module_from_file(path: Path) -> ModuleType | None:
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        return None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def size(stage: Stage, rows: int, images: int = 16, width: int = 512, k: int = 10) -> tuple[int, int, int, int]:
    """(images, rows, width, k), made small for a rehearsal."""
    return (min(images, TINY[0]), min(rows, TINY[1]), min(width, TINY[2]), k) if stage.is_rehearsal else (images, rows, width, k)


def all_equal(stage: Stage, system: Late, bank: str) -> Figures:
    images, rows, width, k = size(stage, 100_000)
    one, _ = random_bank(stage, bank, 1, width)
    given = Given(random_images(stage, images, width), one.expand(rows, width).contiguous(), 100.0, k)

    def faults() -> Iterator[str | None]:
        answer = system(given)
        yield fault(given, answer) or (None if answer[1].tolist() == [[*range(k)]] * images else "not the lowest rows")

    return verdict(faults())


def two_kinds(stage: Stage, system: Late, bank: str) -> Figures:
    """Rows that repeat every two and every 64: a tile's worth."""
    import torch

    images, rows, width, k = size(stage, 100_000)

    def faults() -> Iterator[str | None]:
        for kinds in (2,) if stage.is_rehearsal else (2, 64):
            few, _ = random_bank(stage, bank, kinds, width)
            number = torch.arange(rows, device=stage.device) % kinds
            given = Given(random_images(stage, images, width), few[number].contiguous(), 100.0, k)
            yield fault(given, system(given))

    return verdict(faults())


def rising(stage: Stage, system: Late, bank: str) -> Figures:
    """Each tile's rows displace all that were kept. With the time of the same rows in any order."""
    images, rows, width, k = size(stage, 1_000_000, images=1)
    made, _ = random_bank(stage, bank, rows, width)
    image = random_images(stage, images, width)
    order = (image[:1] / image[0].norm() @ made.float().T / made.float().norm(dim=1)).argsort(1)[0]
    given, any_order = Given(image, made[order].contiguous(), 100.0, k), Given(image, made, 100.0, k)
    figures = verdict(iter([fault(given, system(given))]))
    for name, one in () if stage.is_rehearsal else (("rising_ms", given), ("any_order_ms", any_order)):
        figures[name] = stage.timed(system.prepared(one), 0.2)["p50_ms"]
    return figures


def non_finite(stage: Stage, system: Late) -> Figures:
    import torch

    images, rows, width, k = size(stage, 100_000)

    def faults() -> Iterator[str | None]:
        for bank in ("f32", "f16"):
            made, _ = random_bank(stage, bank, rows, width)
            made[::3], made[1::7, 0], made[2::11, -1], made[3::13] = 0, float("nan"), float("inf"), 0
            made[3::13, -1] = 1  # zero until the last column
            if bank == "f32":
                made[4::17] *= 1e37
                made[5::19] *= 1e-42
            image = random_images(stage, images, width)
            image[0], image[1, 0] = 0, float("inf")
            given = Given(image, made, -3.5, k)
            yield fault(given, system(given))
        made, scales = random_bank(stage, "i8", rows, width)
        for i, value in enumerate((0.0, float("inf"), float("nan"), -1.0)):
            scales[i::9] = value
        for scale in (100.0, 0.0):
            given = Given(random_images(stage, images, width), made, scale, k, scales)
            yield fault(given, system(given))
        given = Given(random_images(stage, images, width), torch.zeros_like(made), 100.0, k)
        yield fault(given, system(given))

    return verdict(faults())


def common(stage: Stage, seed: int = 0) -> Given:
    images, rows, width, k = size(stage, 100_000)
    bank, scales = random_bank(stage, "f16", rows, width, seed)
    return Given(random_images(stage, images, width, seed + 1), bank, 100.0, k, scales)


def equal(first: Answer, second: Answer) -> bool:
    return all(bool((a == b).all()) for a, b in zip(first, second, strict=True))


def same_bits(stage: Stage, system: Late) -> Figures:
    given = common(stage)
    first = system(given)
    others = range(1 if stage.is_rehearsal else RUNS - 1)
    return verdict(None if equal(first, system(given)) else "another answer to the same call" for _ in others)


def two_streams(stage: Stage, system: Late) -> Figures:
    """Two calls at a time, each on its stream; both as when they are alone."""
    stage.need_gpu()
    import torch

    given = [common(stage, seed) for seed in (0, 7)]
    alone = [system(one) for one in given]
    streams, found = [torch.cuda.Stream() for _ in given], list[Answer]()
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for stream, one in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                found.append(system(one))
    torch.cuda.synchronize()
    return verdict(None if equal(a, b) else "another answer beside another stream" for a, b in zip(found, alone, strict=True))


def default_stream(stage: Stage, system: Late) -> Figures:
    """The one whose handle is 0."""
    stage.need_gpu()
    import torch

    given = common(stage)
    wanted = system(given)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.default_stream()):
        found = system(given)
    torch.cuda.synchronize()
    return verdict(iter([None if equal(found, wanted) else "another answer on the default stream"]))


def in_graph(stage: Stage, system: Late) -> Figures:
    """Captured once and replayed with other images."""
    stage.need_gpu()
    import torch

    given, other = common(stage), common(stage, 7)
    wanted = system(other._replace(bank=given.bank))
    call = system.prepared(given)
    call()  # loads and compiles; that cannot be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    given.image.copy_(other.image)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return verdict(iter([None if equal(found, wanted) else "another answer when it is replayed"]))


def large(stage: Stage, system: Late, bank: str, rows: int) -> Figures:
    images, rows, width, k = size(stage, rows, images=2)
    made, scales = random_bank(stage, bank, rows, width)
    image = random_images(stage, images, width)
    image[0] = made[-1].float()  # the last row is the best
    given = Given(image, made, 100.0, k, scales)
    return verdict(iter([fault(given, system(given))]))


def shapes(stage: Stage) -> Iterator[tuple[str, int, int, int, int]]:
    """(bank, B, N, D, k), each within what doubles of it may take."""
    draw = random.Random(0)
    while True:
        bank, (images, rows, width, k) = draw.choice(BANKS), (draw.choice(of) for of in (IMAGES, ROWS, WIDTHS, KS))
        if stage.is_rehearsal:
            images, rows, width = min(images, TINY[0]), min(rows, TINY[1]), min(width, TINY[2])
        if rows * width <= MOST_NUMBERS and images * rows <= MOST_SCORES:
            yield bank, images, rows, width, k


def sampled(stage: Stage, system: Late, seconds: float) -> Figures:
    end = time.monotonic() + min(seconds, stage.left)
    count = 3 if stage.is_rehearsal else SHAPES

    def faults() -> Iterator[str | None]:
        for seed, (bank, images, rows, width, k) in zip(range(count), shapes(stage), strict=False):
            if time.monotonic() > end:
                return
            made, scales = random_bank(stage, bank, rows, width, seed)
            given = Given(random_images(stage, images, width, seed + 1), made, 100.0, k, scales if seed % 2 else None)
            found = fault(given, system(given))
            yield found and f"{bank} {images} x {rows} x {width}, k {k}: {found}"

    return verdict(faults())


def sanitized(stage: Stage, tool: str) -> Figures:
    """NVIDIA's checker over one small call of each compiled kernel."""
    stage.need_gpu()
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise NotMeasuredError("needs compute-sanitizer, of the CUDA toolkit")
    folder = next(path for name, path in stage.compiled.items() if name == "k16")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pmclip_deploy.benchmarks.gpu_right", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, stage.left))
    said = (done.stdout + done.stderr).strip().rpartition("=")[2].strip()
    return {"wrong": int(done.returncode != 0), "said": said[:120], "samples": 1}


def one_call_of_each(folder: Path) -> None:
    from pmclip_deploy.benchmarks.results import Run

    stage = Stage("right", Run("", {}), folder, "cuda", time.monotonic() + 600, {"k16": folder})
    call = cuda_system(stage)
    for bank in BANKS:
        for width in (64, 33):
            made, scales = random_bank(stage, bank, 1000, width)
            for of in (None, scales):
                call(Given(random_images(stage, 3, width), made, 100.0, 10, of))()
    stage.synchronize()


if __name__ == "__main__":
    one_call_of_each(Path(sys.argv[1]))
