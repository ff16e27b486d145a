"""One network: trained on the cached views of some films, and what it says to films that it has not seen."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.atomic import write_errors, written
from pmclip_deploy.errors import BundleError, UsageError
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.train.checkpoint import under
from pmclip_deploy.train.cpu import autocast, run_slow_convolutions_in_float
from pmclip_deploy.train.findings.films import FINDINGS, PREPROCESS, REGIONS, Film
from pmclip_deploy.train.findings.net import FindingsNet
from pmclip_deploy.train.findings.views import Views, tensor_of_features
from pmclip_deploy.train.loop import Averaged, Settings, fit

TRUNK = "clip.visual.trunk"
SMOOTH = (0.97, 0.01)  # a label's slope and floor: 0 -> 0.01, 1 -> 0.98
REGION_WEIGHT, BOX_WEIGHT, INSIDE, OUTSIDE = 0.3, 1.0, 0.5, 2.0  # of the losses
EVERY, DECAY = 4, 0.992  # steps between two updates of the averaged weights, and what an update keeps


@dataclass(frozen=True)
class Labels:
    """What is known of N films, as the losses need it."""

    finding: Tensor  # (N, F), NaN where unknown
    region: Tensor  # (N, R), NaN where unknown
    boxed: Tensor  # (N,): 1 where it is known where the first finding is
    weight: NDArray[np.float64]  # (N,)

    @classmethod
    def of_films(cls, films: Sequence[Film], device: torch.device) -> "Labels":
        def tensor(rows: list[tuple[bool | None, ...]]) -> Tensor:
            return torch.tensor([[math.nan if x is None else float(x) for x in row] for row in rows], device=device)

        finding, region = tensor([film.findings for film in films]), tensor([film.regions for film in films])
        boxed = torch.tensor([float(film.boxes is not None) for film in films], device=device)
        return cls(finding, region, boxed, np.array([film.weight for film in films]))


def new_net(tensors: dict[str, Tensor]) -> FindingsNet:
    """With the trunk of a checkpoint's image tower, and the rest untrained. Raises BundleError."""
    net = FindingsNet(len(FINDINGS), len(REGIONS))
    try:
        net.trunk.load_state_dict(under(tensors, TRUNK))
    except RuntimeError:
        raise BundleError("the checkpoint's image tower is no EfficientNet-Lite0", "give pmclip-lite's, as `train clip` makes it") from None
    net.boxed[0] = 1
    for module in (*net.locked(), *depthwise(net)):
        module.requires_grad_(False)
    return net


def depthwise(net: FindingsNet) -> list[nn.Module]:
    """The trunk's depthwise convolutions: few weights, and most of a step's time where they are trained."""
    return [m for m in net.trunk.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]


def trained_net(
    title: str,
    rows: NDArray[np.int64],
    labels: Labels,
    views: Views,
    tensors: dict[str, Tensor],
    settings: Settings,
    made_with: dict[str, Any],
    state: Path,
    device: torch.device,
) -> tuple[FindingsNet, float]:
    """(in eval mode, the seconds it took), trained on the films ``rows``. Raises what ``fit`` raises."""
    torch.manual_seed(settings.seed)
    net = new_net(tensors).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = Averaged(net, EVERY, DECAY)
    run_slow_convolutions_in_float(net)
    per_epoch = int(labels.weight[rows].sum()) // settings.batch_size
    if not per_epoch:
        raise UsageError(f"{title}: its films do not fill a batch of {settings.batch_size}", "lower --batch-size, or raise --limit")

    def read(order: list[Tensor], epoch: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        return averaged.following(drawn_batches(rows, labels, views, settings, len(order), epoch), epoch * len(order))

    def loss_of(batch: tuple[NDArray[np.int64], NDArray[np.int64]], generator: Generator, epoch: int) -> Tensor:
        net.train()
        return loss_of_batch(net, labels, views, *batch, device)

    groups = [([p for p in net.parameters() if p.requires_grad], settings.learning_rate)]
    state.parent.mkdir(parents=True, exist_ok=True)
    seconds = fit(title, averaged, loss_of, per_epoch * settings.batch_size, groups, settings, made_with, state, read)
    averaged.settle()
    return net.eval(), seconds


def drawn_batches(
    rows: NDArray[np.int64], labels: Labels, views: Views, settings: Settings, count: int, epoch: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """``count`` batches of an epoch: (films, rows of their views), each (B,), in the order of the views' file.

    A film comes as often as its weight says: 2.5 is twice, and once more in half of the epochs.
    """
    rng = np.random.default_rng((settings.seed, epoch))
    whole = np.floor(labels.weight[rows])
    times = (whole + (rng.random(len(rows)) < labels.weight[rows] - whole)).astype(int)
    order = np.resize(rng.permutation(np.repeat(rows, times)), (count, settings.batch_size))
    for films in order:
        chosen = views.first[films] + rng.integers(views.count[films])
        along = np.argsort(chosen)
        yield films[along], chosen[along]


def loss_of_batch(
    net: FindingsNet, labels: Labels, views: Views, films: NDArray[np.int64], rows: NDArray[np.int64], device: torch.device
) -> Tensor:
    """Cross-entropy of what is known: the findings by all three logits, the regions, and the places of the first finding."""
    with autocast(device, True):
        pooled, local, places, region = net.parts(tensor_of_features(views.features[rows], device))
    pooled, local, region = pooled.float(), local.float(), region.float()
    index = torch.from_numpy(films).to(device)
    finding, mask = labels.finding[index], torch.from_numpy(views.masks[rows]).to(device).float() / 255
    target = finding * SMOOTH[0] + SMOOTH[1]
    of_findings = sum(_known_loss(logit, target) for logit in (pooled, local, (pooled + local) / 2))
    of_places = (_loss_of_places(places[:, 0], mask) * labels.boxed[index]).sum()
    of_regions = _known_loss(region, labels.region[index])
    return (of_findings + BOX_WEIGHT * of_places + REGION_WEIGHT * of_regions) / len(films)


def _known_loss(logit: Tensor, target: Tensor) -> Tensor:
    """Summed over what is not NaN."""
    known = ~target.isnan()
    return (F.binary_cross_entropy_with_logits(logit, target.nan_to_num(), reduction="none") * known).sum()


def _loss_of_places(places: Tensor, mask: Tensor) -> Tensor:
    """(B,) from logits and coverage by boxes, both (B, h, w): mean loss inside and outside; between them, around a box, none."""
    inside = (mask > 0.3).float()
    outside = (F.max_pool2d(mask[:, None], 3, 1, 1)[:, 0] < 0.05).float()
    within, beyond = ((F.softplus(sign * places) * of).sum((1, 2)) / (of.sum((1, 2)) + 1e-6) for sign, of in ((-1, inside), (1, outside)))
    return INSIDE * within + OUTSIDE * beyond


@torch.no_grad()
def said_to_films(net: FindingsNet, films: Sequence[Film], device: torch.device, title: str = "", size: int = 16) -> dict[str, Any]:
    """As the runtime asks, in fp32: logits (n, 2, F) and (n, 2, R) of the picture and its mirror image; maps, their mean (n, F, h, w) f16.

    Raises InputError.
    """
    said: list[tuple[Tensor, ...]] = []
    console = Console(stderr=True)
    torch.backends.cudnn.allow_tf32 = False  # a GPU's products would keep 10 bits
    for start in track(range(0, len(films), size), f"{title}: asking", console=console, disable=not console.is_terminal):
        x = torch.stack([torch.from_numpy(tensor_from_pixels(film.pixels(), PREPROCESS)) for film in films[start : start + size]]).to(
            device
        )
        (finding, region, places), (finding_mirrored, region_mirrored, places_mirrored) = net(x), net(x.flip(-1))
        maps = ((places + places_mirrored.flip(-1)) / 2).half()
        said.append((torch.stack([finding, finding_mirrored], 1), torch.stack([region, region_mirrored], 1), maps))
    return {name: torch.cat(of).cpu().numpy() for name, of in zip(("finding", "region", "places"), zip(*said, strict=True), strict=True)}


def write_result(folder: Path, name: str, net: FindingsNet, said: dict[str, Any], films: Sequence[Film], about: dict[str, Any]) -> None:
    """NAME.safetensors, then NAME.npz, each whole or as it was: where the second is, both are. Raises UsageError."""
    with write_errors(f"{folder}:", "make room and go on with --resume"):
        with written(folder / f"{name}.safetensors") as new:
            save_file({k: v.contiguous().cpu() for k, v in net.state_dict().items()}, new)
        with written(folder / f"{name}.npz") as new, new.open("wb") as file:
            np.savez(file, names=np.array([film.name for film in films]), about=np.array(json.dumps(about)), **said)


def read_result(file: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(what it was made with, names and logits). Raises BundleError."""
    try:
        with np.load(file, allow_pickle=False) as saved:
            arrays = dict(saved)
        return json.loads(str(arrays.pop("about"))), arrays
    except (OSError, ValueError, KeyError, EOFError):
        raise BundleError(f"{file}: not a readable result", "remove it and train again with --resume") from None
