"""The training loop that every stage shares: AdamW, warm-up and cosine, progress, and resuming to the same weights."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor, nn

from pmclip_deploy.errors import BundleError
from pmclip_deploy.train.towers import batches

Groups = list[tuple[list[nn.Parameter], float]]  # (parameters, learning rate)


def fit(
    title: str,
    model: nn.Module,
    loss_of: Callable[[Tensor, Generator], Tensor],
    count: int,
    groups: Groups,
    *,
    epochs: int,
    batch_size: int,
    weight_decay: float,
    seed: int,
    state: Path,
    resume: bool,
    settings: dict[str, Any],
) -> float:
    """Trains ``model`` for ``epochs`` over ``count`` images; returns the seconds it took. Raises BundleError.

    ``loss_of(indices, generator)`` gives a batch's loss. Every random draw of an epoch comes from a generator seeded with
    (seed, epoch), and the state is written after each epoch: resuming gives the weights of an uninterrupted run.
    """
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if (p.ndim > 1) == decayed], "lr": rate, "weight_decay": weight_decay * decayed}
            for parameters, rate in groups
            for decayed in (True, False)
        ]
    )
    steps = count // batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, 100, epochs * steps))
    first, seconds = 0, 0.0
    if resume and state.is_file():
        try:
            saved = torch.load(state, weights_only=True)
        except Exception:
            raise BundleError(f"{state}: not a readable training state; train again without --resume") from None
        if saved["settings"] != settings:
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
            for indices in batches(count, batch_size, generator):
                optimizer.zero_grad(set_to_none=True)
                loss = loss_of(indices, generator)
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
                "settings": settings,
            }
            torch.save(saved, state.with_suffix(".partial"))
            state.with_suffix(".partial").replace(state)
    return seconds


def _warmup_cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, total - warmup)))))
