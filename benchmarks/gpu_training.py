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
from pmclip_deploy.benchmarks.gpu_towers import backbone_of
from pmclip_deploy.benchmarks.peers import LITE, VIT

OURS, THEIRS = "pmclip-deploy", "open_clip.ClipLoss"
WIDTH, SCALE = 512, 14.3
BATCHES, BLOCKS = (32_768, 4096, 1024, 16_384, 65_536), (1024, 4096, 8192)  # what matters most first; rows of cosines at a time
TINY = 48  # rows of a batch in a rehearsal, and a third of it a block
PICTURES, TIMES, SIDE = 512, 8, 288  # JPEGs, how often each is read in an epoch, and their pixels a side
STEPS = 3  # of the loss curve on two devices
LITE_CLIP = ", train clip"
HUGE = 32_768, 256  # a batch, and how much of it is encoded at a time
ANSWERS = 460, 60  # QCR's open and closed ones on VQA-RAD, about
WORDS, VECTOR = 1200, 300  # of the questions' dictionary and of a GloVe vector


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


class Trainee:
    """A backbone with random weights, its step and its optimiser, as `train clip --from` has them."""

    def __init__(self, stage: Stage, name: str, recipe: str, device: str, **chosen: Any) -> None:
        import torch

        from pmclip_deploy.train.clip.pairs import Step
        from pmclip_deploy.train.clip.recipes import recipe_named

        torch.manual_seed(0)
        self.recipe, self.spec, self.device = recipe_named(recipe, **chosen), backbone_of(stage, name), torch.device(device)
        self.model = self.spec.build().to(self.device)
        self.step = Step(self.model, [], self.spec, self.recipe, self.device)
        self.optimiser = self.recipe.optimiser.of([([*self.model.parameters()], self.recipe.learning_rate)])

    def __call__(self, batch: tuple[Any, Any]) -> float:
        """One step; returns its loss."""
        import torch

        loss = self.step(batch, torch.Generator().manual_seed(0), 0)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())

    def batch(self, pairs: int, device: str = "cpu") -> tuple[Any, Any]:
        """Random pixels and tokens, made on this device: another one gives other numbers."""
        import torch

        size, generator = self.spec.preprocess.size, torch.Generator(device).manual_seed(pairs)
        pixels = torch.randn(pairs, 3, size, size, generator=generator, device=device)
        return pixels, self.tokens(pairs).to(device)

    def tokens(self, texts: int, length: int = 24) -> Any:
        import torch

        made = torch.full((texts, self.spec.context_length), self.spec.pad_id)
        made[:, :length] = torch.randint(1000, 30_000, (texts, length), generator=torch.Generator().manual_seed(texts))
        made[:, length - 1] = 30_001
        return made


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


def pictures(folder: Path, count: int) -> list[Path]:
    """Writes JPEGs of noise on a ramp, as large as a radiograph's is after it was scaled."""
    import numpy as np
    from PIL import Image

    rng, paths = np.random.default_rng(0), []
    ramp = np.linspace(0, 200, SIDE)[:, None]
    for i in range(count):
        path = folder / f"{i}.jpg"
        Image.fromarray((ramp + rng.integers(0, 56, (SIDE, SIDE))).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


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


# --- the other trainings ----------------------------------------------------------------------------------------------------------


class Small:
    """Steps of a training on random numbers: a subclass sets ``step``, ``batch``, ``trained`` and ``settings``."""

    step: Any
    batch: Any
    trained: list[Any]
    settings: Any
    optimiser: Any = None

    def __call__(self) -> float:
        import torch

        self.optimiser = self.optimiser or self.settings.optimiser.of([(self.trained, self.settings.learning_rate)])
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.step(self.batch, torch.Generator().manual_seed(0), 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.settings.optimiser.longest or float("inf"))
        self.optimiser.step()
        return float(loss.detach())


class Qcr(Small):
    """QCR's recipe at the paper's size, with pictures and questions of random numbers; a smaller head in a rehearsal.

    ``tower`` names the backbone that is trained with it.
    """

    def __init__(self, stage: Stage, frozen: bool, mixed: bool, tower: str | None = None, device: str | None = None) -> None:
        import torch

        from pmclip_deploy.train.heads import qcr as heads
        from pmclip_deploy.train.heads.answering import Inputs
        from pmclip_deploy.train.heads.mevf import HIDDEN
        from pmclip_deploy.train.heads.plan import settings_of_head
        from pmclip_deploy.train.heads.training import Encoded, Step
        from pmclip_deploy.train.heads.vision import AUTOENCODER_SIZE, CODE, AutoEncoder, ImageFeatures
        from pmclip_deploy.train.heads.words import LENGTH

        where = torch.device(device or stage.device)
        self.settings = settings_of_head("qcr", **({"batch_size": 4} if stage.is_rehearsal else {}))
        glimpses, hidden, images = (1, 32, 4) if stage.is_rehearsal else (heads.GLIMPSES, HIDDEN, 256)
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        table = torch.cat([torch.randn(WORDS, VECTOR, generator=generator), torch.zeros(1, VECTOR)])  # the last is the padding's
        opened, closed = ANSWERS
        spec = None if tower is None else backbone_of(stage, tower)
        towers = None if spec is None else spec.build().to(where)
        width = WIDTH if spec is None else spec.embed_dim
        self.model = heads.QCR(ImageFeatures(width, AutoEncoder()), [table, table], opened, closed, glimpses, hidden)
        grey = (images, CODE, AUTOENCODER_SIZE // 4, AUTOENCODER_SIZE // 4) if frozen else (images, 1, AUTOENCODER_SIZE, AUTOENCODER_SIZE)
        seen = (images, width) if spec is None else (images, 3, spec.preprocess.size, spec.preprocess.size)
        inputs = Inputs(torch.randn(seen, generator=generator), torch.rand(grey, generator=generator), None, towers)
        self.model.kind.requires_grad_(False)
        if frozen:
            self.model.features.autoencoder.requires_grad_(False)  # type: ignore[union-attr]
        asked = 8 * images
        is_open = torch.arange(asked) % 2 == 0
        labels = torch.where(is_open, closed, 0) + torch.randint(0, closed, (asked,), generator=generator)
        tokens = torch.randint(0, WORDS, (asked, LENGTH), generator=generator)
        questions = Encoded(torch.arange(asked) % images, tokens, labels, is_open)
        self.step = Step(self.model.to(where), inputs.to(where), questions.to(where), opened + closed, closed, mixed)
        self.batch = torch.randperm(asked, generator=generator)[: self.settings.batch_size]
        self.trained = [p for p in self.model.parameters() if p.requires_grad] + ([] if towers is None else [*towers.visual.parameters()])


class AutoEncoding(Small):
    def __init__(self, stage: Stage, mixed: bool, device: str | None = None) -> None:
        import torch

        from pmclip_deploy.train.autoencoder import Step
        from pmclip_deploy.train.heads.vision import AUTOENCODER_SIZE, AutoEncoder
        from pmclip_deploy.train.loop import Settings

        torch.manual_seed(0)
        where, count = torch.device(device or stage.device), 2 if stage.is_rehearsal else 32
        self.settings, self.batch, model = Settings(1, 1e-3, count), torch.arange(count), AutoEncoder().to(where)
        pixels = torch.randint(0, 255, (count, 1, AUTOENCODER_SIZE, AUTOENCODER_SIZE), dtype=torch.uint8)
        self.step, self.trained = Step(model, pixels, where, mixed), [*model.parameters()]


class Maml(Small):
    def __init__(self, stage: Stage, mixed: bool, device: str | None = None) -> None:
        import torch

        from pmclip_deploy.train import maml
        from pmclip_deploy.train.heads.vision import MAML_SIZE, MamlNetwork
        from pmclip_deploy.train.heads.vision import WIDTH as OUT
        from pmclip_deploy.train.loop import Settings

        torch.manual_seed(0)
        where, tasks = torch.device(device or stage.device), 1 if stage.is_rehearsal else 5
        model = torch.nn.Sequential(MamlNetwork(), torch.nn.Linear(OUT, maml.WAYS)).to(where)
        classes = [torch.randint(0, 255, (20, 1, MAML_SIZE, MAML_SIZE), dtype=torch.uint8) for _ in range(maml.WAYS)]
        self.settings, self.batch = Settings(1, 1e-3, tasks), torch.arange(tasks)
        self.step, self.trained = maml.Step(model, classes, where, mixed), [*model.parameters()]


class LiteClip(Small):
    """`train clip` without --from, on pictures of noise that were read before."""

    def __init__(self, stage: Stage, mixed: bool, device: str | None = None) -> None:
        import torch

        from pmclip_deploy.train.clip.embeddings import VARIANTS, Captions
        from pmclip_deploy.train.clip.questions import Step, locked_and_fast
        from pmclip_deploy.train.images import Images
        from pmclip_deploy.train.loop import Settings

        torch.manual_seed(0)
        where, count, spec = torch.device(device or stage.device), 2 if stage.is_rehearsal else 48, backbone_of(stage, LITE)
        model = spec.lite(spec.build())
        locked = locked_and_fast(model)
        with tempfile.TemporaryDirectory() as folder:
            images = Images(pictures(Path(folder), count), spec.preprocess)
        text = model.pooled_text(torch.ones(1, 4, dtype=torch.int64)).shape[1]
        captions = Captions(torch.randn(count, VARIANTS, text)).to(where)
        self.settings, self.batch = Settings(1, 5e-4, count), torch.arange(count)
        self.step = Step(model.to(where), locked, images, captions, where, mixed)
        self.trained = [*model.projections(), *model.trunk()]


def figures_of(stage: Stage, make: Callable[[], Small]) -> Figures:
    call = make()
    peak = stage.peak_mib(call)
    found = stage.timed(call, 3.0)
    return {**found, "peak_mib": peak, "parameters": sum(p.numel() for p in call.trained), "batch": call.settings.batch_size}
