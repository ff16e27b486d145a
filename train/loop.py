"""The training loop that every stage shares: optimiser, schedule, one or several processes, and resuming to the same weights."""

import importlib.util
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor, nn

from pmclip_deploy import __version__
from pmclip_deploy.console import counted
from pmclip_deploy.errors import BundleError, TrainingError, UsageError
from pmclip_deploy.train.cpu import keep_freed_memory
from pmclip_deploy.train.processes import copy_statistics_of_the_first_process, processes, rank, refuse_unlike, sum_over_processes
from pmclip_deploy.train.state import read_state, write_state

T = TypeVar("T")
Groups = list[tuple[list[nn.Parameter], float]]  # (parameters, learning rate)
Row = dict[str, Any]  # an epoch in figures


@dataclass(frozen=True)
class Optimiser:
    """One of torch.optim, and what the learning rate and the gradients go through."""

    kind: Literal["Adam", "AdamW", "Adamax"] = "AdamW"  # AdamW decays matrices alone, the others all
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: int | None = 100  # steps before the cosine; None keeps the learning rate as it is
    longest: float | None = 5.0  # gradient; None leaves it as it is

    def of(self, groups: Groups) -> torch.optim.Optimizer:
        rows = [
            {"params": [p for p in parameters if self.decays(p) == decayed], "lr": rate, "weight_decay": self.weight_decay * decayed}
            for parameters, rate in groups
            for decayed in (True, False)
        ]
        made: torch.optim.Optimizer = getattr(torch.optim, self.kind)(rows, betas=self.betas, eps=self.eps)
        return made

    def decays(self, parameter: nn.Parameter) -> bool:
        return parameter.ndim > 1 or self.kind != "AdamW"

    def rate(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by."""
        if self.warmup is None:
            return 1.0
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - self.warmup) / max(1, steps - self.warmup)))))


@dataclass(frozen=True)
class Settings:
    """How a stage is trained; the defaults that differ between stages stand in the command line."""

    epochs: int
    learning_rate: float
    batch_size: int = 48  # of all processes together
    seed: int = 1
    threads: int = 0  # 0 takes all cores
    limit: int = 0  # train on the first images only; 0 takes all
    resume: bool = False  # go on from the state in the output folder
    device: str = "auto"  # of processes.DEVICES
    precision: str | None = None  # fp32 or bf16; None takes the stage's own
    optimiser: Optimiser = field(default_factory=Optimiser)

    def start(self) -> None:
        """Threads, memory and seed of this process.

        Raises UsageError where torchrun started several and the stage takes one, or where they cannot share a batch.

        Without a precision, a GPU's fp32 convolutions are torch's, which may round their inputs to 10 bits (TF32).
        """
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            raise UsageError("this stage trains in one process", "start it without torchrun")
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.precision not in (None, "fp32", "bf16"):
            raise UsageError(f"precision {self.precision!r} is unknown", "choose fp32 or bf16")
        if self.precision == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # a GPU's convolutions would keep 10 bits
        keep_freed_memory()
        torch.manual_seed(self.seed)
        if self.batch_size % processes():
            raise UsageError(f"a batch of {self.batch_size} cannot be shared by {processes()} processes", "make --batch-size a multiple")

    def images(self, images: list[T]) -> list[T]:
        """Those to train on. Raises UsageError where they do not fill a batch."""
        images = images[: self.limit] if self.limit else images
        if len(images) < self.batch_size:
            raise UsageError(f"{counted(len(images), 'training image')}: fewer than one batch of {self.batch_size}", "lower --batch-size")
        return images

    def is_mixed(self, by_default: bool) -> bool:
        """Whether the stage computes in bf16 where its device does."""
        return by_default if self.precision is None else self.precision == "bf16"

    def to_json(self) -> dict[str, Any]:
        """What the weights depend on."""
        return {k: v for k, v in asdict(self).items() if k not in ("threads", "limit", "resume", "device")}


class Averaged(nn.Module):
    """A model and the running mean of its weights, which is what is kept: ``settle`` puts it in their place."""

    def __init__(self, model: nn.Module, every: int = 4, decay: float = 0.98) -> None:
        super().__init__()
        self.model, self.every, self.decay = model, every, decay  # steps between two updates, and what an update keeps
        for name, value in model.state_dict().items():
            self.register_buffer(name.replace(".", "/"), value.clone())

    def following(self, batches: Iterable[T], done: int) -> Iterator[T]:
        """The batches, for ``fit`` to read, with ``done`` steps before them: the mean follows once a batch's step is done."""
        for step, batch in enumerate(batches, done + 1):
            yield batch
            if step % self.every == 0:
                self.follow(step)

    @torch.no_grad()
    def follow(self, steps: int) -> None:
        """Draws the mean on, after ``steps`` steps; early ones count for more."""
        share = 1 - min(self.decay, (1 + steps) / (10 + steps))
        for mean, value in self._pairs():
            mean.lerp_(value, share) if mean.is_floating_point() else mean.copy_(value)

    @torch.no_grad()
    def settle(self) -> None:
        for mean, value in self._pairs():
            value.copy_(mean)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(getattr(self, name.replace(".", "/")), value) for name, value in self.model.state_dict().items()]


def fit(
    title: str,
    model: nn.Module,
    loss_of: Callable[[Any, Generator, int], Tensor],
    count: int,
    groups: Groups,
    settings: Settings,
    made_with: dict[str, Any],
    state: Path,
    read: Callable[[list[Tensor], int], Iterable[Any]] = lambda order, epoch: order,
    measure: Callable[[list[Row]], Row] = lambda history: {},
    history: list[Row] | None = None,
) -> float:
    """Trains ``model`` over ``count`` images; returns the seconds it took. Raises BundleError, TrainingError and UsageError.

    ``loss_of(batch, generator, epoch)`` gives a batch's loss, where ``read(order, epoch)`` makes the batches of an epoch from their
    indices and by default leaves them so. Every random draw of an epoch comes from a generator seeded with
    (seed, epoch), and ``state`` is written after each epoch: resuming gives the weights of an uninterrupted run, and is refused
    where ``made_with``, all that the weights depend on, is not the same.
    ``history`` is filled with a row for each epoch: what ``measure`` says of the model, which it is given with the rows so far.
    Under torchrun every process's losses and gradients are summed, and the first process alone writes.
    """
    history = [] if history is None else history
    steps, epochs, seed = count // settings.batch_size, settings.epochs, settings.seed
    optimizer = settings.optimiser.of(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: settings.optimiser.rate(step, epochs * steps))
    every = [p for parameters, _ in groups for p in parameters]
    run = _Run(title, model, loss_of, every, settings.optimiser.longest, optimizer, schedule, made_with, history)
    console = Console(stderr=True, quiet=rank() > 0)
    if settings.resume:
        run.resume(state, console)
    refuse_unlike((__version__, made_with, run.epoch))
    with (
        _ending_in_one_line(title, state, history, console),
        _interrupts_between_steps() as stop_if_asked,
        _curves(state.parent / "tensorboard", run.epoch * steps) as draw,
        _progress(console) as progress,
    ):
        bar = progress.add_task(title, total=epochs * steps, completed=run.epoch * steps, note="")
        for epoch in range(run.epoch, epochs):
            start, total = time.monotonic(), 0.0
            generator = _seeded(seed * 1000 + epoch)
            for step, batch in enumerate(read(list(batches(count, settings.batch_size, generator)), epoch), epoch * steps):
                value = run.step(batch, generator, step)
                total += value
                progress.update(bar, advance=1, note=f"loss {value:.3f}")
                draw({"loss/training": value, "learning rate": float(schedule.get_last_lr()[0])}, step)
                stop_if_asked()
            run.seconds += time.monotonic() - start
            copy_statistics_of_the_first_process(model)
            row = {"epoch": epoch + 1, "loss": round(total / steps, 4), **measure(history)}
            run.finish(row, state)
            figures = {k: v for k, v in row.items() if k not in ("epoch", "loss")}
            draw({f"validation/{k}": v for k, v in figures.items()}, (epoch + 1) * steps)
            said = "".join(f", {k} {v}" for k, v in (("loss", f"{total / steps:.4f}"), *figures.items()))
            console.print(f"{title}: epoch {epoch + 1}/{epochs}{said}, {run.seconds:.0f} s", highlight=False, soft_wrap=True)
            stop_if_asked()
    return run.seconds


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
    return Progress(*columns, console=console, disable=not console.is_terminal)


@dataclass
class _Run:
    """A stage while it trains."""

    title: str
    model: nn.Module
    loss_of: Callable[[Any, Generator, int], Tensor]
    parameters: list[nn.Parameter]
    longest: float | None  # gradient
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    made_with: dict[str, Any]
    history: list[Row]
    epoch: int = 0  # those that are done
    seconds: float = 0.0

    def resume(self, state: Path, console: Console) -> None:
        """Goes on from ``state``, where it is there. Raises BundleError."""
        if not state.is_file():
            note = f"{self.title}: no state in {state.parent}, starting at epoch 1"
            console.print(note, highlight=False, markup=False, soft_wrap=True)
            return
        saved = read_state(state)
        if saved["made_with"] != self.made_with:
            raise BundleError(f"{state}: made with other settings", "train again without --resume, or give the same options")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.epoch, self.seconds, self.history[:] = saved["epoch"], saved["seconds"], saved["history"]

    def step(self, batch: Any, generator: Generator, step: int) -> float:
        """Trains on a batch; returns its loss, of all processes. Raises TrainingError."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(batch, generator, self.epoch)
        loss.backward()
        value = sum_over_processes(loss.detach(), self.parameters)
        length = nn.utils.clip_grad_norm_(self.parameters, self.longest or math.inf)
        if not math.isfinite(value) or not math.isfinite(length):
            where = f"at step {step + 1} (epoch {self.epoch + 1})"
            raise TrainingError(f"{self.title}: the loss is {value} and its gradient {length:.3g} long {where}")
        self.optimizer.step()
        self.schedule.step()
        return value

    def finish(self, row: Row, state: Path) -> None:
        """Ends an epoch. ``history`` has its row once ``state`` has: what is said of an interrupted run is what the file keeps."""
        kept = {part: getattr(self, part).state_dict() for part in ("model", "optimizer", "schedule")}
        done = {"epoch": self.epoch + 1, "seconds": self.seconds, "history": [*self.history, row], "made_with": self.made_with}
        write_state({**kept, **done}, state)
        self.history.append(row)
        self.epoch += 1


def _seeded(seed: int) -> Generator:
    """The generator of an epoch's draws; dropout has its own, another in each process."""
    torch.manual_seed(seed + rank() * 1_000_003)
    return Generator().manual_seed(seed)


def batches(n: int, size: int, generator: Generator) -> Iterator[Tensor]:
    """Shuffled index batches; a last short one is dropped, since a contrastive loss depends on the batch's size."""
    order = torch.randperm(n, generator=generator)
    for start in range(0, n - size + 1, size):
        yield order[start : start + size]


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for the end of a step; while reading processes start or end it would be lost. A second one does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    def stop_if_asked() -> None:
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop_if_asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _ending_in_one_line(title: str, state: Path, history: list[Row], console: Console) -> Iterator[None]:
    """Says what is kept where training ends before its time."""
    try:
        yield
    except (KeyboardInterrupt, TrainingError, torch.OutOfMemoryError, OSError) as error:
        kept = f"{state} keeps epoch {history[-1]['epoch']}" if history else "no epoch was finished"
        go_on = "go on with --resume" if history else "train again"
        if isinstance(error, KeyboardInterrupt):
            console.print(f"{title}: interrupted; {kept}; {go_on}", highlight=False, markup=False, soft_wrap=True)
            raise
        if isinstance(error, TrainingError):
            raise TrainingError(f"{error}", f"{kept}; train again with a lower --learning-rate") from None
        if isinstance(error, torch.OutOfMemoryError):
            raise TrainingError(f"{title}: the device's memory is full", f"{kept}; give a smaller --batch-size or --micro-batch") from None
        raise UsageError(f"{state.parent}: cannot be written ({error.strerror or error})", f"{kept}; make room and {go_on}") from None


@contextmanager
def _curves(folder: Path, first: int) -> Iterator[Callable[[dict[str, float], int], None]]:
    """Draws figures at a step for TensorBoard, where it is installed; what an interrupted run drew after ``first`` is taken back."""
    if rank() or importlib.util.find_spec("tensorboard") is None:
        yield lambda figures, step: None
        return
    from torch.utils.tensorboard import SummaryWriter

    # Its writing thread's OSError is raised here too, by the next figure; said twice, it would be a traceback.
    others = threading.excepthook
    threading.excepthook = lambda of: None if isinstance(of.exc_value, OSError) else others(of)
    try:
        with SummaryWriter(str(folder), purge_step=first) as writer:

            def draw(figures: dict[str, float], step: int) -> None:
                for name, value in figures.items():
                    writer.add_scalar(name, value, step)

            yield draw
    finally:
        threading.excepthook = others
