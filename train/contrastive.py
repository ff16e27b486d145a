"""The symmetric contrastive loss and the sigmoid loss: of one batch, with gradients cached over pieces of it, and of several processes.

Memory grows with the batch, not with its square: B x B cosines are made BLOCK rows at a time, forwards and again backwards.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BLOCK = 1024  # rows of cosines


def scale_of(logit_scale: Tensor) -> Tensor:
    """Of the cosines, (): at most 100, as CLIP does."""
    return logit_scale.clamp(max=4.6052).exp()


def logits_of(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """What checkpoint.json says of published towers' logits. A sigmoid loss has a bias, and does not bound the scale."""
    if "logit_bias" not in tensors:
        return {"logit_scale": round(scale_of(tensors["logit_scale"]).item(), 4)}
    return {"logit_scale": round(tensors["logit_scale"].exp().item(), 4), "logit_bias": round(tensors["logit_bias"].item(), 4)}


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of every image among the batch's texts and of every text among its images, halved (CLIP, Radford et al. 2021).

    ``image`` and ``text`` are (B, D) of one float dtype, of any length, and row i of both is a pair; ``scale`` () multiplies their cosines.
    """
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return _loss_of_rows(image, text, image, text, scale, 0)


def contrastive_loss_of_processes(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """This process's part of the loss of the batch that all processes have together, B rows each.

    Its own rows stand against everybody's, so that the parts sum to the loss of one process with the whole batch, and the gradients,
    which reach every process's rows, to its gradients.
    """
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    if not dist.is_initialized():
        return _loss_of_rows(image, text, image, text, scale, 0)
    part = _loss_of_rows(image, text, rows_of_processes(image), rows_of_processes(text), scale, dist.get_rank() * len(image))
    return part / dist.get_world_size()


def _loss_of_rows(image: Tensor, text: Tensor, images: Tensor, texts: Tensor, scale: Tensor, first: int) -> Tensor:
    return (_cross_entropy(image, texts, scale, first) + _cross_entropy(text, images, scale, first)) / 2


def _cross_entropy(rows: Tensor, others: Tensor, scale: Tensor, first: int) -> Tensor:
    """Mean over ``rows`` (B, D); row i's pair is ``others[first + i]``."""
    if len(rows) <= BLOCK:
        return F.cross_entropy(scale * rows @ others.T, torch.arange(first, first + len(rows), device=rows.device))
    parts = [
        len(block) * checkpoint(_cross_entropy, block, others, scale, first + i * BLOCK, use_reentrant=False, preserve_rng_state=False)
        for i, block in enumerate(rows.split(BLOCK))
    ]
    return torch.stack(parts).sum() / len(rows)


def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The mean over images of -log sigmoid of every pair with its sign, all of the batch's texts summed up (SigLIP, Zhai et al. 2023).

    As ``contrastive_loss``; ``bias`` () is added to the scaled cosines.
    """
    return _sigmoid(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale, bias, 0)


def sigmoid_loss_of_processes(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """This process's images against everybody's texts; the parts sum to the loss of one process, as ``contrastive_loss_of_processes``."""
    if not dist.is_initialized():
        return sigmoid_loss(image, text, scale, bias)
    image, texts = F.normalize(image, dim=-1), rows_of_processes(F.normalize(text, dim=-1))
    return _sigmoid(image, texts, scale, bias, dist.get_rank() * len(image)) / dist.get_world_size()


def _sigmoid(rows: Tensor, others: Tensor, scale: Tensor, bias: Tensor, first: int) -> Tensor:
    """Mean over ``rows`` (B, D); row i's pair is ``others[first + i]``."""
    if len(rows) > BLOCK:
        parts = [
            len(block) * checkpoint(_sigmoid, block, others, scale, bias, first + i * BLOCK, use_reentrant=False, preserve_rng_state=False)
            for i, block in enumerate(rows.split(BLOCK))
        ]
        return torch.stack(parts).sum() / len(rows)
    logits = scale * rows @ others.T + bias
    own = logits.diagonal(first)[: len(rows)]
    return (F.softplus(logits).sum() - own.sum()) / len(rows)  # softplus(-x) = softplus(x) - x


def in_pieces(encode: Callable[[Tensor], Tensor], inputs: Tensor, size: int) -> Tensor:
    """``encode(inputs)``, (B, ...) -> (B, D), whose memory depends on ``size`` and not on B; 0 takes all at once.

    This is gradient caching (GradCache, Gao et al. 2021): the pieces are encoded without a graph; once the loss has given the
    embeddings' gradients, each piece is encoded again, with the random state it had, and takes its share back to the weights.
    """
    if not 0 < size < len(inputs):
        return encode(inputs)
    return torch.cat([checkpoint(encode, piece, use_reentrant=False) for piece in inputs.split(size)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # every process's part of the loss has a gradient for these rows
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def rows_of_processes(x: Tensor) -> Tensor:
    """(B, D) of each process -> (processes * B, D), in the processes' order; gradients find their way back."""
    out: Tensor = _Gather.apply(x) if dist.is_initialized() else x
    return out
