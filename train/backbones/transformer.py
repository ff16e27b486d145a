"""Graphs of vision transformers (Dosovitskiy et al. 2021), and of any transformer whose layers norm what they read."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from open_clip.transformer import Transformer
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
    activation: str  # of ACTIVATIONS, or "gelu_tanh"
    down: nn.Linear


def layers_of_timm(blocks: Iterable[Any]) -> list[Layer]:
    return [
        Layer(
            heads=block.attn.num_heads,
            norm_attention=block.norm1,
            qkv=(block.attn.qkv.weight, block.attn.qkv.bias),
            out=block.attn.proj,
            norm_mlp=block.norm2,
            up=block.mlp.fc1,
            activation=_activation(block.mlp.act),
            down=block.mlp.fc2,
        )
        for block in blocks
    ]


def layers_of_open_clip(tower: Transformer) -> list[Layer]:
    return [
        Layer(
            heads=block.attn.num_heads,
            norm_attention=block.ln_1,
            qkv=(block.attn.in_proj_weight, block.attn.in_proj_bias),
            out=block.attn.out_proj,
            norm_mlp=block.ln_2,
            up=block.mlp.c_fc,
            activation=_activation(block.mlp.gelu),
            down=block.mlp.c_proj,
        )
        for block in tower.resblocks
    ]


def _activation(module: nn.Module) -> str:
    if not isinstance(module, nn.GELU):
        return "quick_gelu"
    return "gelu" if module.approximate == "none" else "gelu_tanh"


def patches_graph(g: "Graph", weight: Tensor, places: Tensor, grid: tuple[int, int], size: int | None = None) -> str:
    """From "pixels": (B, 1 + R * C, W), the class token first. ``weight`` (W, 3, P, P) is of a convolution without overlap.

    The class token is a row of zeros put before the patches, if ``places`` (1 + R * C, W) has a row for it. ``places`` are added: the
    positions, with what the class token learned and the convolution's bias. Pixels at the right and below that fill no patch, which
    ``size``, the picture's side, tells of, are left out.
    """
    patch, (rows, columns), x = weight.shape[-1], grid, "pixels"
    if size is not None and (rows * patch, columns * patch) != (size, size):
        ends = g.ints("patches.ends", [rows * patch, columns * patch])
        x = g.node("Slice", "patches.whole", x, g.ints("patches.begins", [0, 0]), ends, g.ints("patches.sides", [2, 3]))
    x = g.node("Reshape", "patches.split", x, g.ints("patches.shape", [0, 3, rows, patch, columns, patch]))
    x = g.node("Transpose", "patches.turned", x, perm=[0, 2, 4, 1, 3, 5])
    x = g.node("Reshape", "patches.flat", x, g.ints("flat", [0, rows * columns, -1]))
    x = g.node("MatMul", "patches", x, g.weight("patches.weight", weight.flatten(1).T))
    if len(places) > rows * columns:
        x = g.node("Pad", "patches.class", x, g.ints("class", [0, 1, 0, 0, 0, 0]))
    return g.node("Add", "embeddings", x, g.weight("places", places))


def layers_graph(
    g: "Graph",
    x: str,
    layers: Sequence[Layer],
    pick: Callable[[str, str], str] | None,
    mask: str | None = None,
    picked_mask: str | None = None,
) -> str:
    """(B, T, W) -> (B, 1, W): of the last layer's tokens only the one that ``pick`` takes is read, so only that one is computed.

    Without ``pick`` all are: (B, T, W).
    """
    from pmclip_deploy.train.graph import scaled

    for i, layer in enumerate(layers):
        name, heads, width = f"layer.{i}", layer.heads, layer.out.in_features
        weight, bias = (scaled(of, heads) for of in layer.qkv)
        y = g.norm(f"{name}.norm.attention", x, layer.norm_attention)
        if pick is None or i < len(layers) - 1:
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
        y = activation_graph(g, name, y, layer.activation)
        x = g.node("Add", name, x, g.linear(f"{name}.down", y, layer.down.weight, layer.down.bias))
    return x


def activation_graph(g: "Graph", name: str, x: str, activation: str) -> str:
    """``activation`` of ACTIVATIONS, or "gelu_tanh"."""
    if activation == "quick_gelu":
        gate = g.node("Sigmoid", f"{name}.sigmoid", g.node("Mul", f"{name}.steeper", x, g.floats("quick", 1.702)))
        return g.node("Mul", f"{name}.gelu", x, gate)
    return g.node("Gelu", f"{name}.gelu", x, **({"approximate": "tanh"} if activation == "gelu_tanh" else {}))


def attended_graph(g: "Graph", scores: str, rows: str, value: Tensor, heads: int) -> str:
    """One query's attention: scores (B, H, T) of rows (B, T, W), and the values' weights (W, W) -> (B, W), without the values' bias.

    The rows are averaged before they meet the weights: one row of each head meets them then, instead of every row. The bias passes, since
    the softmax sums to 1: it belongs into what follows.
    """
    width = len(value)

    def turned(name: str, x: str) -> str:
        return g.node("Transpose", name, x, perm=[1, 0, 2])  # heads first, so that a batch shares the product with their weights

    seen = g.node("MatMul", "pool.seen", g.node("Softmax", "pool.softmax", scores, axis=-1), rows)  # (B, H, W)
    v = g.weight("pool.v.weight", value.reshape(heads, width // heads, width).transpose(1, 2))
    attended = turned("pool.v.turned", g.node("MatMul", "pool.v", turned("pool.seen.turned", seen), v))  # (B, H, W / H)
    return g.node("Reshape", "pool.joined", attended, g.ints("pool.joined_shape", [0, width]))
