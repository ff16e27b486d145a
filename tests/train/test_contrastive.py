"""The contrastive loss against a plain N x N computation, and its cached and distributed forms against it."""

import math
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pmclip_deploy.train import contrastive
from pmclip_deploy.train.contrastive import (
    contrastive_loss,
    contrastive_loss_of_processes,
    in_pieces,
    sigmoid_loss,
    sigmoid_loss_of_processes,
)


def plain(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Every cosine, every softmax, one after the other."""
    n = len(image)
    cosine = [[(image[i] * text[j]).sum() / (image[i].square().sum() * text[j].square().sum()).sqrt() for j in range(n)] for i in range(n)]
    total = torch.zeros((), dtype=image.dtype)
    for i in range(n):
        total = total - (scale * cosine[i][i]) + torch.stack([(scale * cosine[i][j]) for j in range(n)]).exp().sum().log()
        total = total - (scale * cosine[i][i]) + torch.stack([(scale * cosine[j][i]) for j in range(n)]).exp().sum().log()
    return total / (2 * n)


@pytest.mark.parametrize(("n", "scale"), [(1, 1.0), (2, 14.3), (7, 1 / 0.07), (12, 100.0)])
def test_loss_and_gradients_equal_the_plain_computation(n: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(n)
    inputs = [torch.randn(n, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs.append(torch.tensor(scale, dtype=torch.float64, requires_grad=True))
    ours, expected = contrastive_loss(*inputs), plain(*inputs)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("block", [1, 3, 11, 12])
def test_loss_and_gradients_do_not_depend_on_the_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [torch.randn(12, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs.append(torch.tensor(100.0, dtype=torch.float64, requires_grad=True))
    expected = contrastive_loss(*inputs)
    gradients = torch.autograd.grad(expected, inputs)
    monkeypatch.setattr(contrastive, "BLOCK", block)
    ours = contrastive_loss(*inputs)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def plain_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Every pair of the batch by itself (SigLIP, Zhai et al. 2023, algorithm 1)."""
    n = len(image)
    total = torch.zeros((), dtype=image.dtype)
    for i in range(n):
        for j in range(n):
            logit = scale * torch.cosine_similarity(image[i], text[j], dim=0) + bias
            total = total - torch.nn.functional.logsigmoid(logit if i == j else -logit)
    return total / n


@pytest.mark.parametrize(("n", "scale", "bias", "block"), [(1, 1.0, 0.0, 8), (7, 117.3, -12.9, 8), (12, 10.0, -10.0, 5)])
def test_the_sigmoid_loss_and_its_gradients_equal_the_plain_computation(
    n: int, scale: float, bias: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(n)
    inputs = [torch.randn(n, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (scale, bias)]
    monkeypatch.setattr(contrastive, "BLOCK", block)
    expected = plain_sigmoid(*inputs)
    for ours in (sigmoid_loss(*inputs), sigmoid_loss_of_processes(*inputs)):  # without processes they are the same
        assert ours.item() == pytest.approx(expected.item(), rel=1e-10)
        for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_no_tensor_is_as_large_as_the_square_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor))
            return out

    def largest(block: int) -> int:
        monkeypatch.setattr(contrastive, "BLOCK", block)
        made.clear()
        image, text = (torch.randn(96, 5, requires_grad=True) for _ in range(2))
        with Watch():
            contrastive_loss(image, text, torch.tensor(100.0)).backward()
        assert image.grad is not None
        return max(made)

    assert largest(96) == 96 * 96
    assert largest(8) == 8 * 96


def test_pairs_that_all_look_alike_lose_the_logarithm_of_their_number() -> None:
    same = torch.ones(8, 3)
    assert contrastive_loss(same, same, torch.tensor(50.0)).item() == pytest.approx(math.log(8), abs=1e-5)


def towers(dropout: float) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    image, text = (nn.Sequential(nn.Linear(n, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 4)) for n in (6, 3))
    return image, text


def gradients(image: nn.Module, text: nn.Module, x: Tensor, y: Tensor, cached: bool, size: int, mixed: bool = False) -> list[Tensor]:
    """Of the loss; the pieces are the same and in the same order, cached or not, and so are the masks of dropout."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        if cached:
            a, b = in_pieces(image, x, size), in_pieces(text, y, size)
        else:
            a, b = torch.cat([image(piece) for piece in x.split(size)]), torch.cat([text(piece) for piece in y.split(size)])
    loss = contrastive_loss(a.float(), b.float(), torch.tensor(20.0))
    return [loss.detach(), *torch.autograd.grad(loss, [*image.parameters(), *text.parameters()])]


@pytest.mark.parametrize("size", [1, 3, 8, 9])
@pytest.mark.parametrize(("dropout", "mixed"), [(0.0, False), (0.5, False), (0.0, True)])
def test_cached_gradients_equal_uncached_ones(size: int, dropout: float, mixed: bool) -> None:
    image, text = towers(dropout)
    x, y = torch.randn(9, 6), torch.randn(9, 3)
    expected = gradients(image, text, x, y, False, size, mixed)
    for ours, theirs in zip(gradients(image, text, x, y, True, size, mixed), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if not dropout and not mixed:  # without noise the pieces themselves do not matter
        for ours, theirs in zip(expected, gradients(image, text, x, y, False, 9), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_caching_encodes_each_piece_twice_and_keeps_no_activation_in_between() -> None:
    image, _ = towers(0.0)
    calls: list[tuple[int, bool]] = []

    def encode(x: Tensor) -> Tensor:
        calls.append((len(x), going_back))
        out: Tensor = image(x)
        return out

    going_back, kept = False, 0

    def keep(x: Tensor) -> Tensor:
        nonlocal kept
        kept = max(kept, x.shape[0]) if x.dim() == 2 and x.shape[1] == 16 and not isinstance(x, nn.Parameter) else kept
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = in_pieces(encode, torch.randn(10, 6), 4).square().sum()
    assert kept == 0  # a hidden activation is (B, 16)
    going_back = True
    loss.backward()
    assert [n for n, back in calls if not back] == [4, 4, 2]
    assert sorted(n for n, back in calls if back) == [2, 4, 4]


PROCESSES = [("softmax", contrastive_loss_of_processes, ()), ("sigmoid", sigmoid_loss_of_processes, (torch.tensor(-4.0).double(),))]


def of_one_process(rank: int, folder: str) -> None:
    """Three rows of six each: writes the loss and the gradients that this process has."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    everything = inputs_of_processes()
    mine = [x[3 * rank : 3 * rank + 3] for x in everything[:2]]
    weight, scale = everything[2:]
    for name, loss_of, more in PROCESSES:
        loss = loss_of(in_pieces(lambda x: x @ weight, mine[0], 1), mine[1] @ weight, scale, *more)
        torch.save([loss.detach(), *torch.autograd.grad(loss, [weight, scale])], Path(folder, f"{name}{rank}.pt"))
    dist.barrier()  # gloo may abort a process whose peer is gone before it
    dist.destroy_process_group()


def inputs_of_processes() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    image, text = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    return [image, text, weight, torch.tensor(9.0, dtype=torch.float64, requires_grad=True)]


def test_the_parts_of_several_processes_sum_to_the_whole(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(of_one_process, (str(tmp_path),), nprocs=2)
    image, text, weight, scale = inputs_of_processes()
    for (name, _, more), whole in zip(PROCESSES, (contrastive_loss, sigmoid_loss), strict=True):
        loss = whole(image @ weight, text @ weight, scale, *more)
        parts = [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2)]
        for expected, *found in zip([loss.detach(), *torch.autograd.grad(loss, [weight, scale])], *parts, strict=True):
            torch.testing.assert_close(sum(found), expected, rtol=1e-10, atol=1e-12)
