"""The similarity kernels as `benchmarks.gpu` calls them: banks, systems that answer for them, and what is wrong with an answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pmclip_deploy.benchmarks.gpu_stage import NotMeasuredError, Stage
from pmclip_deploy.kernels.manifest import MANIFEST

TRITON, CUDA = "Triton", "CudaSimilarity"
WAIT = 90.0  # seconds for kernels that are being compiled
BLOCK = 1 << 27  # numbers of a bank that are held in double precision at a time: 1 GiB

Answer = tuple[Any, Any, Any]  # score (B, k) f32, index (B, k) i64, log_sum_exp (B,) f32


class Given(NamedTuple):
    """Torch tensors on one device; the names are those of kernels/reference.py."""

    image: Any
    bank: Any
    logit_scale: float
    k: int
    scales: Any = None


System = Callable[..., Callable[[], Answer]]  # of Given: the call, with all that it needs beside the bank and the images made before


def random_bank(stage: Stage, bank: str, rows: int, width: int, seed: int = 0) -> tuple[Any, Any]:
    """(N, D) of "f32", "f16" or "i8", and the scales of the last, else None."""
    import torch

    generator = torch.Generator(stage.device).manual_seed(seed)
    if bank == "i8":
        made = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device=stage.device, generator=generator)
        return made, torch.rand(rows, device=stage.device, generator=generator) + 0.1
    dtype = {"f32": torch.float32, "f16": torch.float16}[bank]
    return torch.randn(rows, width, dtype=dtype, device=stage.device, generator=generator), None


def random_images(stage: Stage, images: int, width: int, seed: int = 1) -> Any:
    import torch

    return torch.randn(images, width, device=stage.device, generator=torch.Generator(stage.device).manual_seed(seed))


def triton_system(stage: Stage) -> System:
    """PyTorch's path: compiled when it is first called, or interpreted."""
    import torch

    from pmclip_deploy.kernels.triton_similarity import contrastive_similarity

    def prepared(given: Given) -> Callable[[], Answer]:
        scale = torch.full((), given.logit_scale, dtype=torch.float32, device=stage.device)
        return lambda: contrastive_similarity(given.image, given.bank, scale, given.k, given.scales)

    return prepared


def cuda_system(stage: Stage, folders: Sequence[str] = ()) -> System:
    """The compiled kernels, from the first of these folders whose k is large enough. What they write to is poisoned before."""
    stage.need_gpu()
    import torch

    from pmclip_deploy.kernels.cuda import CudaSimilarity

    known = {name: path for name, path in stage.compiled.items() if name in folders or not folders}
    kernels = [(largest_k(path), CudaSimilarity(path)) for path in known.values() if wait_for(stage, path)]

    def prepared(given: Given, stream: Any = None) -> Callable[[], Answer]:
        """On torch's current stream, or on one that stays the same."""
        fitting = [similarity for size, similarity in sorted(kernels, key=lambda pair: pair[0]) if size >= given.k]
        if not fitting:
            raise NotMeasuredError(f"no compiled kernel takes k {given.k}")
        images, device = len(given.image), stage.device
        scale = torch.full((1,), given.logit_scale, dtype=torch.float32, device=device)
        score = torch.full((images, given.k), float("nan"), device=device)
        index = torch.full((images, given.k), -7, dtype=torch.int64, device=device)
        total = torch.full((images,), float("nan"), device=device)

        def call() -> Answer:
            fitting[0](given.image, given.bank, scale, score, index, total, stream or current_stream(), given.scales)
            return score, index, total

        return call

    return prepared


def largest_k(folder: Path) -> int:
    return max(int(row["size"]) for row in json.loads((folder / MANIFEST).read_text())["kernels"])


def wait_for(stage: Stage, folder: Path) -> bool:
    """Raises NotMeasuredError if the kernels cannot be compiled, or not in time."""
    end = time.monotonic() + min(WAIT, stage.left)
    while not (folder / MANIFEST).is_file():
        failed = folder.with_name(f"{folder.name}.failed")
        if failed.is_file():
            raise NotMeasuredError(f"the kernels cannot be compiled here: {failed.read_text()}")
        if time.monotonic() > end:
            raise NotMeasuredError("the kernels were not compiled in time")
        time.sleep(0.2)
    return True


class StreamOfTorch:
    """torch's current stream, as cuda.core takes it; torch before 2.12 has no such method."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, int(self.stream.cuda_stream)


def current_stream() -> Any:
    import torch

    return StreamOfTorch(torch.cuda.current_stream())


def lasting_stream() -> Any:
    """torch's current stream as cuda.core's own, made once."""
    from cuda import core

    return core.Device().create_stream(current_stream())


def expected_scores(given: Given) -> Any:
    """(B, N) f64: what kernels/reference.py ranks, computed by torch where the bank lies."""
    import torch

    images, known = _unit(given.image.double())
    size = max(1, BLOCK // max(1, given.bank.shape[1]))
    parts = []
    for start in range(0, len(given.bank), size):
        rows = given.bank[start : start + size].double()
        rows = rows if given.scales is None else rows * given.scales[start : start + size].double()[:, None]
        unit, usable = _unit(rows)
        scores = given.logit_scale * (images @ unit.T)
        parts.append(torch.where(known[:, None] & usable, scores, float("-inf")))
    return torch.cat(parts, 1)


def _unit(rows: Any) -> tuple[Any, Any]:
    import torch

    largest = rows.abs().amax(1)
    usable = torch.isfinite(largest) & (largest > 0)
    scaled = torch.where(usable[:, None], rows, 0.0) / torch.where(usable, largest, 1.0)[:, None]
    length = scaled.square().sum(1).sqrt()
    return scaled / torch.where(usable, length, 1.0)[:, None], usable


def fault(given: Given, answer: Answer, scores: Any = None) -> str | None:
    """What is wrong with an answer, None if nothing is. Rows whose scores differ by rounding may change places, equal ones may not."""
    import torch

    scores = expected_scores(given) if scores is None else scores
    score, index, total = answer
    count, width = min(given.k, scores.shape[1]), given.bank.shape[1]
    limit = 1e-6 * max(1.0, abs(given.logit_scale)) + 4e-9 * width
    best = torch.full((len(scores), given.k), float("-inf"), dtype=torch.float64, device=scores.device)
    best[:, :count] = scores.topk(count, 1).values
    there = best > float("-inf")
    if bool((index >= scores.shape[1]).any()):
        return "a row is given that the bank does not have"
    if bool((there != (index >= 0)).any()) or bool((index[~there] != -1).any()):
        return "rows are given where there are none, or missing where there are some"
    if bool((score[~there] != float("-inf")).any()) or not _near(score, best, there, limit):
        return f"a score is off by {_off(score, best, there):.2g}, more than {limit:.2g}"
    given_scores = scores.gather(1, index.clamp(min=0))
    if not _near(score, given_scores, there, limit):
        return f"a row has another score than it is given, by {_off(score, given_scores, there):.2g}"
    following = there[:, 1:]
    ordered = index.masked_fill(~there, -1).sort(1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        return "a row is given twice"
    if bool((following & (score[:, 1:] == score[:, :-1]) & (index[:, 1:] <= index[:, :-1])).any()):
        return "of equal scores the lowest row does not come first"
    sums, some = torch.logsumexp(scores, 1), there[:, 0]
    if bool((total[~some] != float("-inf")).any()) or not bool(((total - sums).abs() <= limit + 1e-6 * sums.abs())[some].all()):
        return "the log-sum-exp is off"
    return None


def _near(found: Any, wanted: Any, there: Any, limit: float) -> bool:
    return bool(((found.double() - wanted).abs()[there] <= limit).all())


def _off(found: Any, wanted: Any, there: Any) -> float:
    return float((found.double() - wanted).abs()[there].max())
