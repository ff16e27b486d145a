"""Quantisation-aware training: an image tower that computes with the INT8 graph's roundings while it trains."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class RoundedTower:
    """``tower(x)``; once ``on``, with what INT8 rounds rounded: what ``inputs`` take, what ``outputs`` give and the weights.

    Gradients are straight-through. Activations: uint8 per tensor, over the range of the batch. Weights: int8 per output channel, which is
    the same before and after a batch norm is folded into them. The locked modules stay in float, as the first convolutions of the INT8
    graph do.
    """

    def __init__(self, tower: nn.Module, inputs: list[nn.Module], outputs: list[nn.Module], locked: list[nn.Module]) -> None:
        self.tower = tower
        self.on = False
        for module in inputs:
            module.register_forward_pre_hook(lambda _, args: (self._activation(args[0]), *args[1:]))
        for module in outputs:
            module.register_forward_hook(lambda _module, _args, out: self._activation(out))
        held = {id(p) for module in locked for p in module.parameters()}
        self._weights = [name for name, p in tower.named_parameters() if p.ndim > 1 and id(p) not in held]

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor
        if not self.on:
            out = self.tower(x)
            return out
        parameters = dict(self.tower.named_parameters())
        out = functional_call(self.tower, {name: _int8_rows(parameters[name]) for name in self._weights}, (x,))
        return out

    def _activation(self, x: Tensor) -> Tensor:
        if not self.on:
            return x
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        scale = max(max(high, 0.0) - min(low, 0.0), 1e-8) / 255
        rounded: Tensor = _StraightThrough.apply(x, scale)
        return rounded


def _int8_rows(weight: Tensor) -> Tensor:
    scale = weight.detach().flatten(1).abs().amax(1).clamp(min=1e-12) / 127
    rounded: Tensor = _StraightThrough.apply(weight, scale.view(-1, *[1] * (weight.ndim - 1)))
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Any) -> Tensor:
        rounded: Tensor = (x / scale).round_().mul_(scale)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
