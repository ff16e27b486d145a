"""Stage "training" of `benchmarks.gpu`: the contrastive loss beside open_clip's, and steps of every training that moves to a GPU.

Pictures are synthetic and weights random; nothing here says how well anything is learned.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pmclip_deploy.benchmarks.gpu_stage import Figures, NotMeasuredError, Stage
from pmclip_deploy.benchmarks.gpu_trainees import WIDTH, AutoEncoding, LiteClip, Maml, Qcr, Small, Trainee, pictures
from pmclip_deploy.benchmarks.peers import LITE, VIT

OURS, THEIRS = "pmclip-deploy", "open_clip.ClipLoss"
SCALE = 14.3
BATCHES, BLOCKS = (32_768, 4096, 1024, 16_384, 65_536), (1024, 4096, 8192)  # what matters most first; rows of cosines at a time
TINY = 48  # rows of a batch in a rehearsal, and a third of it a block
PICTURES, TIMES = 512, 8  # JPEGs, and how often each is read in an epoch
STEPS = 3  # of the loss curve on two devices
LITE_CLIP = ", train clip"
HUGE = 32_768, 256  # a batch, and how much of it is encoded at a time


def loss_part(batch: int) -> str:
    return f"contrastive loss, B {batch:,}"


def measure(stage: Stage) -> None:
    for batch in (TINY,) if stage.is_rehearsal else BATCHES:
        for system, loss in ((OURS, ours), (THEIRS, theirs)):
            stage.measure(loss_part(batch), system, partial(loss_figures, stage, loss, batch))
    stage.measure("gradients against open_clip's in fp32", OURS, partial(gradients, stage))
    for rows in BLOCKS[1:] if not stage.is_rehearsal else ():
        stage.measure(f"{loss_part(BATCHES[0])}, {rows} rows a block", OURS, partial(loss_figures, stage, ours, BATCHES[0], rows))
    name = LITE if stage.is_rehearsal else VIT
    for about, make in curves(stage, name).items():
        part = f"loss curve of {STEPS} steps, to a CPU's{about}"
        stage.measure(part, OURS, partial(curve, stage, make), model=LITE if about == LITE_CLIP else name)
    with tempfile.TemporaryDirectory() as folder:
        paths = Late(partial(pictures, Path(folder), 4 if stage.is_rehearsal else PICTURES))
        for recipe in ("paper", "modern"):
            stage.measure(f"train clip --from, {recipe}", OURS, partial(clip, stage, name, recipe, paths), model=name)
    for micro in () if stage.is_rehearsal else (64, 128, 512):
        stage.measure(f"step of 512 pairs, {micro} at a time", OURS, partial(steps, stage, name, 512, micro), model=name)
    if not stage.is_rehearsal:
        stage.measure(f"step of {HUGE[0]:,} pairs, {HUGE[1]} at a time", OURS, partial(steps, stage, name, *HUGE), model=name)
    for mixed, precision in ((False, ""), (True, ", bf16")):
        for frozen in (True, False):
            about = f"train vqa --head qcr, auto-encoder {'frozen' if frozen else 'trained'}{precision}"
            stage.measure(about, OURS, partial(figures_of, stage, partial(Qcr, stage, frozen, mixed)))
        about, tuned = f"train vqa --head qcr --fine-tune, auto-encoder frozen{precision}", partial(Qcr, stage, True, mixed, name)
        stage.measure(about, OURS, partial(figures_of, stage, tuned), model=name)
        for about, small in (("autoencoder", AutoEncoding), ("maml", Maml)):
            stage.measure(f"train {about}{precision}", OURS, partial(figures_of, stage, partial(small, stage, mixed)))
        stage.measure(f"train clip{precision}", OURS, partial(figures_of, stage, partial(LiteClip, stage, mixed)), model=LITE)


class Late:
    """What is made when it is first asked for, and then kept."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make, self.made = make, None

    def __call__(self) -> Any:
        self.made = self.make() if self.made is None else self.made
        return self.made


# --- the loss -------------------------------------------------------------------------------------------------------------------


def ours(image: Any, text: Any, scale: Any) -> Any:
    from pmclip_deploy.train.contrastive import contrastive_loss

    return contrastive_loss(image, text, scale)


def theirs(image: Any, text: Any, scale: Any) -> Any:
    from open_clip import ClipLoss
    from torch.nn import functional as F

    return ClipLoss()(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale)


Loss = Callable[[Any, Any, Any], Any]


def embeddings(stage: Stage, batch: int, dtype: Any) -> list[Any]:
    import torch

    generator = torch.Generator(stage.device).manual_seed(batch)
    made = [torch.randn(batch, WIDTH, device=stage.device, generator=generator, dtype=torch.float32).to(dtype) for _ in range(2)]
    made.append(torch.tensor(SCALE, device=stage.device, dtype=dtype))
    return [x.requires_grad_() for x in made]


@contextmanager
def rows_a_block(rows: int) -> Iterator[None]:
    from pmclip_deploy.train import contrastive

    before = contrastive.BLOCK
    contrastive.BLOCK = rows
    try:
        yield
    finally:
        contrastive.BLOCK = before


def loss_figures(stage: Stage, loss: Loss, batch: int, rows: int | None = None) -> Figures:
    """Of the loss and its gradients, in bf16; the memory is what both take above the embeddings."""
    import torch

    given = embeddings(stage, batch, torch.bfloat16)

    def call() -> None:
        torch.autograd.grad(loss(*given), given)

    with rows_a_block(rows or (TINY // 3 if stage.is_rehearsal else BLOCKS[0])):
        peak = stage.peak_mib(call)
        return {**stage.timed(call, 1.0), "peak_mib": peak}


def gradients(stage: Stage) -> Figures:
    """The largest difference, as a share of the largest gradient."""
    import torch

    given = embeddings(stage, TINY if stage.is_rehearsal else BATCHES[1], torch.float32)
    with rows_a_block(TINY // 3 if stage.is_rehearsal else BLOCKS[0]):
        found, wanted = (torch.autograd.grad(loss(*given), given) for loss in (ours, theirs))
    off = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)]
    return {"largest_difference": max(off), "samples": len(given[0])}


# --- train clip --from ----------------------------------------------------------------------------------------------------------


Make = Callable[..., Callable[[], float]]  # given a device, with the same weights on each: a step, which returns its loss


def curves(stage: Stage, name: str) -> dict[str, Make]:
    def clip(device: str) -> Callable[[], float]:
        trainee = Trainee(stage, name, "paper", device)
        return partial(trainee, trainee.batch(2 if stage.is_rehearsal else 16))

    return {
        "": clip,
        LITE_CLIP: partial(LiteClip, stage, False),
        ", qcr": partial(Qcr, stage, False, False),
        ", qcr --fine-tune": partial(Qcr, stage, True, False, name),
        ", autoencoder": partial(AutoEncoding, stage, False),
        ", maml": partial(Maml, stage, False),
    }


def curve(stage: Stage, make: Make) -> Figures:
    """The largest difference of the losses of the same steps, in fp32 without TF32 and without dropout, on this device and on a CPU."""
    import torch

    before, dropout = torch.backends.cudnn.allow_tf32, torch.nn.Dropout.forward
    torch.backends.cudnn.allow_tf32 = False
    torch.nn.Dropout.forward = lambda self, input: input  # type: ignore[method-assign]  # another device draws other numbers
    try:
        losses = []
        for device in (stage.device, "cpu"):
            step = make(device=device)
            torch.manual_seed(0)
            losses.append([step() for _ in range(STEPS)])
    finally:
        torch.backends.cudnn.allow_tf32 = before
        torch.nn.Dropout.forward = dropout  # type: ignore[method-assign]
    off = max(abs(a - b) for a, b in zip(*losses, strict=True))
    return {"largest_difference": off, "first_loss": losses[0][0], "last_loss": losses[0][-1], "samples": STEPS}


def clip(stage: Stage, name: str, recipe: str, made: Callable[[], list[Path]]) -> Figures:
    """Pictures a second: read alone, trained alone, and both as the command does them; and the share of time that it waits for readers."""
    from pmclip_deploy.train.images import Pairs, reading_processes

    paths = made() * (1 if stage.is_rehearsal else TIMES)
    trainee = Trainee(stage, name, recipe, stage.device, **({"batch_size": 2, "micro_batch": 1} if stage.is_rehearsal else {}))
    size, workers = trainee.recipe.batch_size, 0 if stage.is_rehearsal else reading_processes(1)
    pairs = Pairs(paths, trainee.tokens(len(paths)), trainee.spec.preprocess, trainee.recipe.augmentation, 0)
    order = [[*range(i, i + size)] for i in range(0, len(paths) - size + 1, size)]

    def read(epoch: int) -> Iterator[tuple[Any, Any]]:
        return pairs.read(order, epoch, workers, pinned=not stage.is_rehearsal)

    reading = per_second(stage, lambda batch: None, read(0), size)
    one = next(iter(read(1)))
    trainee(one)
    alone = per_second(stage, trainee, iter([one] * (1 if stage.is_rehearsal else len(order))), size)
    both = per_second(stage, trainee, read(2), size)
    waits = None if stage.is_rehearsal else max(0.0, 1 - both / alone)
    return {"read_per_s": reading, "trained_per_s": alone, "samples_per_s": both, "share_waiting": waits, "readers": workers,
            "samples": size * len(order)}  # fmt: skip


def per_second(stage: Stage, use: Callable[[Any], object], batches: Iterator[Any], size: int) -> float:
    """Pairs a second, from the second batch on if there are several: before the first one readers start."""
    count, start = 0, time.perf_counter()
    for i, batch in enumerate(batches):
        use(batch)
        if i == 0 and not stage.is_rehearsal:
            stage.synchronize()
            start = time.perf_counter()
        else:
            count += size
        if stage.left <= 0 and count:
            break
    stage.synchronize()
    if not count:
        raise NotMeasuredError("there are too few batches")
    return count / (time.perf_counter() - start)


def steps(stage: Stage, name: str, pairs: int, micro: int) -> Figures:
    """Steps of the modern recipe on pairs that lie in memory."""
    trainee = Trainee(stage, name, "modern", stage.device, micro_batch=micro)
    step = partial(trainee, trainee.batch(pairs, stage.device))
    start = time.perf_counter()
    peak = stage.peak_mib(step)
    once = 1e3 * (time.perf_counter() - start)
    found = stage.timed(step, 3.0) if pairs <= 512 else {"p50_ms": once, "samples": 1}  # the largest takes seconds
    return {**found, "samples_per_s": 1e3 * pairs / found["p50_ms"], "peak_mib": peak}


def figures_of(stage: Stage, make: Callable[[], Small]) -> Figures:
    call = make()
    peak = stage.peak_mib(call)
    found = stage.timed(call, 3.0)
    return {**found, "peak_mib": peak, "parameters": sum(p.numel() for p in call.trained), "batch": call.settings.batch_size}
