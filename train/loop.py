"""The training loop that every stage shares: AdamW, warm-up and cosine, progress, and resuming to the same weights."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor, nn

from pmclip_deploy.errors import BundleError, UsageError
from pmclip_deploy.train.towers import batches, keep_freed_memory

WEIGHT_DECAY = 0.05

Groups = list[tuple[list[nn.Parameter], float]]  # (parameters, learning rate)


@dataclass(frozen=True)
class Settings:
    """How a stage is trained; the defaults that differ between stages stand in the command line."""

    epochs: int
    learning_rate: float
    batch_size: int = 48
    seed: int = 1
    threads: int = 0  # 0 takes all cores
    limit: int = 0  # train on the first images only; 0 takes all
    resume: bool = False  # go on from the state in the output folder

    def start(self) -> None:
        """Threads, memory and seed of this process."""
        if self.threads:
            torch.set_num_threads(self.threads)
        keep_freed_memory()
        torch.manual_seed(self.seed)

    def images(self, paths: list[Path]) -> list[Path]:
        """Those to train on. Raises UsageError where they do not fill a batch."""
        paths = paths[: self.limit] if self.limit else paths
        if len(paths) < self.batch_size:
            raise UsageError(f"{len(paths)} training images are fewer than one batch of {self.batch_size}; lower --batch-size")
        return paths

    def to_json(self) -> dict[str, Any]:
        """What the weights depend on."""
        return {k: v for k, v in asdict(self).items() if k not in ("threads", "limit", "resume")}


def fit(
    title: str,
    model: nn.Module,
    loss_of: Callable[[Tensor, Generator, int], Tensor],
    count: int,
    groups: Groups,
    settings: Settings,
    made_with: dict[str, Any],
    state: Path,
) -> float:
    """Trains ``model`` over ``count`` images; returns the seconds it took. Raises BundleError.

    ``loss_of(indices, generator, epoch)`` gives a batch's loss. Every random draw of an epoch comes from a generator seeded with
    (seed, epoch), and ``state`` is written after each epoch: resuming gives the weights of an uninterrupted run, and is refused
    where ``made_with``, all that the weights depend on, is not the same.
    """
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if (p.ndim > 1) == decayed], "lr": rate, "weight_decay": WEIGHT_DECAY * decayed}
            for parameters, rate in groups
            for decayed in (True, False)
        ]
    )
    steps, epochs, seed = count // settings.batch_size, settings.epochs, settings.seed
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, 100, epochs * steps))
    first, seconds = 0, 0.0
    if settings.resume and state.is_file():
        try:
            saved = torch.load(state, weights_only=True)
        except Exception:
            raise BundleError(f"{state}: not a readable training state; train again without --resume") from None
        if saved["made_with"] != made_with:
            raise BundleError(f"{state}: made with other settings; train again without --resume, or give the same options")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first, seconds = saved["epoch"], saved["seconds"]

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(title, total=epochs * steps, completed=first * steps, note="")
        for epoch in range(first, epochs):
            start, total = time.monotonic(), 0.0
            generator = Generator().manual_seed(seed * 1000 + epoch)
            torch.manual_seed(seed * 1000 + epoch)  # dropout
            for indices in batches(count, settings.batch_size, generator):
                optimizer.zero_grad(set_to_none=True)
                loss = loss_of(indices, generator, epoch)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_([p for parameters, _ in groups for p in parameters], 5.0)
                optimizer.step()
                schedule.step()
                total += loss.item()
                progress.update(bar, advance=1, note=f"loss {loss.item():.3f}")
            seconds += time.monotonic() - start
            console.print(f"{title}: epoch {epoch + 1}/{epochs}, loss {total / steps:.4f}, {seconds:.0f} s", highlight=False)
            saved = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "epoch": epoch + 1,
                "seconds": seconds,
                "made_with": made_with,
            }
            torch.save(saved, state.with_suffix(".partial"))
            state.with_suffix(".partial").replace(state)
    return seconds


def _warmup_cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, total - warmup)))))
