"""Is it a radiology image? How the branch of pmclip-lite's head that tells is fitted to an image tower that stays as it is.

    python -m pmclip_deploy.train.radiograph --checkpoint DIR --data vqa-med-2019 --films fracatlas --films kermany-cxr \\
        --photographs photographs --output DIR

fits it anew in a finished checkpoint; `train vqa` does so at its end. ``--fold 0`` leaves out a fifth of the films' groups, and writes to
apart.txt which: what `benchmarks/trust.py` may measure it on.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.atomic import write, write_errors
from pmclip_deploy.console import print_error
from pmclip_deploy.errors import PmclipError
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.base import LiteTowers
from pmclip_deploy.train.checkpoint import save_checkpoint, towers_from_checkpoint, under
from pmclip_deploy.train.cpu import keep_freed_memory, mixed_precision
from pmclip_deploy.train.datasets.schema import lines_from_text
from pmclip_deploy.train.findings.gate import stratified_folds
from pmclip_deploy.train.findings.groups import KEPT_FOR_DEMO, group_of_row, kept_for_demo
from pmclip_deploy.train.heads.lite import LiteHead, radiograph_branch
from pmclip_deploy.train.nonradiographs import Photographs, filed, nonradiographs, photographs_from_folder
from pmclip_deploy.train.questions import questions_for_training

Rng = np.random.Generator
Pixels = NDArray[np.uint8]

KEPT = 0.99  # share that passes of the radiology kept aside: what is asked for, not what measured best
ASIDE = 5  # one part of so many is kept aside for the threshold
NEGATIVES = 4800  # or four for each picture of radiology, where these are few
SIDE = 400  # longest side at which a picture is varied
FOLDS = 5  # of --fold


@dataclass(frozen=True)
class Fitted:
    """What a refitted branch was made from, and how far it tells apart what was kept aside."""

    radiology: int  # pictures, each seen as it is and varied
    others: int  # drawings and crops of photographs
    photographs_sha256: str | None
    turned_away: float  # of the others that were kept aside, at the threshold


@torch.no_grad()
def train_radiograph(
    clip: LiteTowers, head: LiteHead, preprocess: Preprocess, sources: Sequence[Sequence[Path]], photographs: Photographs, seed: int
) -> Fitted:
    """Fits ``head.radiograph`` so that its logit is 0 at the threshold. Raises InputError.

    ``sources`` are datasets of radiology, each with as much say as the next whatever its size. One picture of five is kept aside, with its
    neighbours by name, since these may show the same patient: there the threshold lets ``KEPT`` pass, as they are and varied.
    """
    rng, generator = np.random.default_rng(seed), Generator().manual_seed(seed)
    given, sha256 = photographs

    width = head.image.in_features

    def embedded(pictures: Iterator[Pixels]) -> Tensor:
        tensors = (torch.from_numpy(tensor_from_pixels(pixels, preprocess)) for pixels in pictures)
        batches = iter(lambda: list(islice(tensors, 32)), [])
        with mixed_precision():
            stacks = (torch.stack(batch).contiguous(memory_format=torch.channels_last) for batch in batches)
            seen = torch.cat([clip.features_for_head(x, head.details > 0).float() for x in stacks])
        return head.evidence(seen[:, :width], seen[:, width:])

    x, weight, aside, real = list[Tensor](), list[Tensor](), list[Tensor](), 0
    for paths in sources:
        real += len(paths)
        fit = torch.arange(len(paths)) * ASIDE // max(1, len(paths)) != seed % ASIDE
        for view in (_as_it_is, varied):
            seen = embedded(view(picture_from_path(path).pixels, rng) for path in paths)
            x.append(seen[fit])
            aside.append(seen[~fit])
            weight.append(torch.full((int(fit.sum()),), 1 / max(1, int(fit.sum())) / len(sources) / 2))
    others = embedded(iter(nonradiographs(min(NEGATIVES, 4 * real), seed, given)))
    held = len(others) // ASIDE
    x.append(others[held:])
    weight.append(torch.full((len(others) - held,), 1 / (len(others) - held)))
    truth = torch.cat([torch.ones(sum(map(len, x[:-1]))), torch.zeros(len(others) - held)])
    head.radiograph = radiograph_branch(others.shape[1])
    _fit(head.radiograph, torch.cat(x), truth, torch.cat(weight), generator)

    passes = head.radiograph(torch.cat(aside)).squeeze(-1)
    last = head.radiograph[2]
    assert isinstance(last, nn.Linear)
    last.bias.sub_(torch.quantile(passes, 1 - KEPT))
    away = head.radiograph(others[:held]).squeeze(-1) < 0
    return Fitted(real, len(others), sha256, round(float(away.float().mean()), 4))


@torch.enable_grad()
def _fit(branch: nn.Sequential, x: Tensor, truth: Tensor, weight: Tensor, generator: Generator, steps: int = 1500) -> None:
    for module in branch:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
            nn.init.zeros_(module.bias)
    optimizer = torch.optim.AdamW(branch.parameters(), lr=1e-3, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.multinomial(weight, 256, replacement=True, generator=generator)
        noisy = x[chosen] + 0.3 * torch.randn(256, x.shape[1], generator=generator)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(branch(noisy).squeeze(-1), truth[chosen]).backward()
        optimizer.step()
        schedule.step()


def _as_it_is(pixels: Pixels, rng: Rng) -> Pixels:
    return pixels


def varied(pixels: Pixels, rng: Rng) -> Pixels:
    """Radiology as it may come: turned, cropped, lighter or darker, cut out round, small in black above a table, then ``filed``.

    Small slices in black, and brains without their skulls, are what a branch that sees none of them turns away.
    """
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE))
    if rng.random() < 0.5:
        angle = rng.uniform(-15, 15) if rng.random() < 0.7 else 90 * int(rng.integers(4))
        picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=bool(rng.integers(2)))
    if rng.random() < 0.6:
        w, h = (max(8, int(side * rng.uniform(0.6, 1))) for side in picture.size)
        x, y = int(rng.integers(max(1, picture.width - w + 1))), int(rng.integers(max(1, picture.height - h + 1)))
        picture = picture.crop((x, y, x + w, y + h))
    values = np.asarray(picture, np.float32)
    if rng.random() < 0.6:
        values = ((values / 255) ** np.exp(rng.uniform(-0.4, 0.4)) * rng.uniform(0.7, 1.25) + rng.uniform(-0.1, 0.1)) * 255
    if rng.random() < 0.35:
        v, u = np.mgrid[-1 : 1 : values.shape[0] * 1j, -1 : 1 : values.shape[1] * 1j]
        round_ = np.abs(u / rng.uniform(0.6, 1)) ** rng.uniform(2, 4) + np.abs(v / rng.uniform(0.6, 1)) ** rng.uniform(2, 4) < 1
        values = values * (round_ if values.ndim == 2 else round_[..., None])
    picture = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return np.asarray(filed(_small_in_black(picture, rng) if rng.random() < 0.5 else picture, rng))


def _small_in_black(picture: Image.Image, rng: Rng) -> Image.Image:
    """As a scanner's field of view has it; the table below in most: curved lines, bars of a cushion."""
    (width, height), scale = picture.size, rng.uniform(0.35, 1)
    w, h = max(8, int(width * scale)), max(8, int(height * scale * rng.uniform(0.8, 1)))
    x, y = int((width - w) * rng.uniform(0.4, 0.6)), int((height - h) * rng.uniform(0.2, 0.7))
    out = Image.new(picture.mode, picture.size)
    out.paste(picture.resize((w, h), Image.Resampling.BICUBIC), (x, y))
    draw, below = ImageDraw.Draw(out), y + h + rng.uniform(0.01, 0.06) * height
    for i in range(int(rng.integers(1, 4)) if rng.random() < 0.6 else 0):
        grey, down, wide = int(rng.integers(60, 256)), below + i * rng.uniform(0.03, 0.08) * height, rng.uniform(0.4, 1) * width
        fill = grey if picture.mode == "L" else (grey, grey, grey)
        if rng.random() < 0.35:
            for middle in (width / 2 - 0.3 * wide, width / 2 + 0.3 * wide):
                draw.rectangle((middle - 0.03 * width, down, middle + 0.03 * width, down + 0.03 * height), fill=fill)
        else:
            sag = rng.uniform(0, 0.15) * height
            curve = [((width + wide * t) / 2, down + sag * (1 - t * t)) for t in np.linspace(-1, 1, 21).tolist()]
            draw.line(curve, fill=fill, width=int(rng.integers(1, 4)))
    return out


def pictures_of_films(folders: Sequence[Path], fold: int | None = None) -> tuple[list[list[Path]], list[str]]:
    """(each dataset's pictures, lines "SET GROUP" of those that fold ``fold`` leaves out). Raises InputError."""
    sources, apart = list[list[Path]](), list[str]()
    for folder in folders:
        every = [json.loads(line) for _, line in lines_from_text(folder / "labels.jsonl")]
        rows = [row for row in every if not kept_for_demo(str(row["group"]))]
        groups = [group_of_row(row) for row in rows]
        of = stratified_folds(groups, [bool(row["labels"].get("fractured")) for row in rows], FOLDS)
        sources.append([folder / row["image"] for row, group in zip(rows, groups, strict=True) if of[group] != fold])
        apart += sorted({f"{folder.name} {group}" for group in groups if of[group] == fold})
    return sources, apart


def provenance(data: Sequence[Path], seed: int, fitted: Fitted) -> dict[str, Any]:
    """What checkpoint.json says of the branch."""
    return {"seed": seed, "data": [folder.name for folder in data], "kept_apart": list(KEPT_FOR_DEMO), **asdict(fitted)}


def refit(
    checkpoint: Path, data: Path, films: Sequence[Path], photographs: Path | None, output: Path, fold: int | None, seed: int
) -> dict[str, Any]:
    """Writes the checkpoint with a new branch to ``output``. Raises InputError, UsageError and BundleError."""
    keep_freed_memory()
    towers, meta, tensors = towers_from_checkpoint(checkpoint)
    towers.visual.to(memory_format=torch.channels_last)
    backbone = BACKBONES[meta["backbone"]]
    head = LiteHead.from_tensors(under(tensors, "head"))
    training, _ = questions_for_training([data])
    of_films, apart = pictures_of_films(films, fold)
    sources = [sorted({q.image for q in training}), *of_films]
    given = photographs_from_folder(photographs)
    fitted = train_radiograph(backbone.lite(towers), head, backbone.preprocess, sources, given, seed)
    tensors |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    meta["abstention"]["radiograph_threshold"] = 0.0
    meta["provenance"]["radiograph"] = {"fold": fold, **provenance([data, *films], seed, fitted)}
    with write_errors(f"{output}:", "make room, or give another --output"):
        save_checkpoint(output, tensors, meta, checkpoint / "tokenizer.json")
        write(output / "apart.txt", "".join(f"{line}\n" for line in apart))
    return asdict(fitted)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="questions: their training images are radiology")
    parser.add_argument("--films", type=Path, action="append", default=[], help="more radiology, with labels.jsonl; repeat for more")
    parser.add_argument("--photographs", type=Path, help="a folder with photographs, added to those of scikit-image")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--fold", type=int, choices=range(FOLDS), help="the fifth of each films' groups that is left out")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(refit(**vars(options)), indent=1))
    except PmclipError as error:
        print_error(str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
