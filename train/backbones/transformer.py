"""Graphs of vision transformers (Dosovitskiy et al. 2021), and of any transformer whose layers norm what they read."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from pmclip_deploy.train.graph import Graph


class Layer(NamedTuple):
    """Attention, then two matrices, each with a skip connection. ``qkv`` is stacked: (3W, W) and (3W,)."""

    heads: int
    norm_attention: nn.LayerNorm
    qkv: tuple[Tensor, Tensor]
    out: nn.Linear
    norm_mlp: nn.LayerNorm
    up: nn.Linear
    activation: str  # of ACTIVATIONS
    down: nn.Linear


def patches_graph(g: "Graph", weight: Tensor, places: Tensor, grid: tuple[int, int]) -> str:
    """From "pixels": (B, 1 + R * C, W), the class token first. ``weight`` (W, 3, P, P) is of a convolution without overlap.

    The class token is a row of zeros put before the patches. ``places`` (1 + R * C, W) are added: the positions, with what the class
    token learned and the convolution's bias.
    """
    patch, (rows, columns) = weight.shape[-1], grid
    x = g.node("Reshape", "patches.split", "pixels", g.ints("patches.shape", [0, 3, rows, patch, columns, patch]))
    x = g.node("Transpose", "patches.turned", x, perm=[0, 2, 4, 1, 3, 5])
    x = g.node("Reshape", "patches.flat", x, g.ints("flat", [0, rows * columns, -1]))
    x = g.node("MatMul", "patches", x, g.weight("patches.weight", weight.flatten(1).T))
    x = g.node("Pad", "patches.class", x, g.ints("class", [0, 1, 0, 0, 0, 0]))
    return g.node("Add", "embeddings", x, g.weight("places", places))


def layers_graph(
    g: "Graph",
    x: str,
    layers: Sequence[Layer],
    pick: Callable[[str, str], str],
    mask: str | None = None,
    picked_mask: str | None = None,
) -> str:
    """(B, T, W) -> (B, 1, W): of the last layer's tokens only the one that ``pick`` takes is read, so only that one is computed."""
    from pmclip_deploy.train.graph import scaled

    for i, layer in enumerate(layers):
        name, heads, width = f"layer.{i}", layer.heads, layer.out.in_features
        weight, bias = (scaled(of, heads) for of in layer.qkv)
        y = g.norm(f"{name}.norm.attention", x, layer.norm_attention)
        if i < len(layers) - 1:
            q, k, v = g.nodes("Split", [f"{name}.{p}" for p in "qkv"], g.linear(f"{name}.qkv", y, weight, bias), axis=-1, num_outputs=3)
        else:
            x, mask = pick(f"{name}.picked", x), picked_mask
            q = g.linear(f"{name}.q", pick(f"{name}.query", y), weight[:width], bias[:width])
            k, v = g.nodes(
                "Split", [f"{name}.k", f"{name}.v"], g.linear(f"{name}.kv", y, weight[width:], bias[width:]), axis=-1, num_outputs=2
            )
        attended = g.attention(name, q, k, v, heads, width, mask)
        x = g.node("Add", f"{name}.attention", x, g.linear(f"{name}.out", attended, layer.out.weight, layer.out.bias))
        y = g.linear(f"{name}.up", g.norm(f"{name}.norm.mlp", x, layer.norm_mlp), layer.up.weight, layer.up.bias)
        if layer.activation == "gelu":
            y = g.node("Gelu", f"{name}.gelu", y)
        else:  # QuickGELU
            gate = g.node("Sigmoid", f"{name}.sigmoid", g.node("Mul", f"{name}.steeper", y, g.floats("quick", 1.702)))
            y = g.node("Mul", f"{name}.gelu", y, gate)
        x = g.node("Add", name, x, g.linear(f"{name}.down", y, layer.down.weight, layer.down.bias))
    return x
