"""The network that looks for findings: EfficientNet-Lite0, and a fine map of places beside what it sees as a whole."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.train.backbones import efficientnet

LOCKED = 3  # stages of the trunk, after its stem, that are not trained: what they give is computed once for each view of an image
WIDTH = 128  # channels of the map
MIDDLE = 4  # the stage whose output has a place for each 16 x 16 pixels
PLACES = 4.0  # places that a finding takes, about: the scale of their log-sum-exp


class FindingsNet(nn.Module):
    """pixels (B, 3, S, S) f32 -> finding (B, F), region (B, R), places (B, F, S / 16, S / 16) f32 logits.

    A finding's logit is the mean of two: one of the pooled features, one the log-sum-exp over the places; that of the highest place is
    added where boxes have taught the places. They are upsampled deep features plus those of a middle stage (a feature pyramid, Lin et al.
    2017), so that a fracture of 20 pixels has a place of its own.
    """

    boxed: Tensor  # (F,) f32: 1 for a finding whose places boxes have taught, else 0

    def __init__(self, findings: int, regions: int) -> None:
        super().__init__()
        self.trunk = efficientnet.new_trunk()
        deep, middle = self.trunk.num_features, self.trunk.feature_info[-2]["num_chs"]
        self.deep, self.fine = nn.Conv2d(deep, WIDTH, 1), nn.Conv2d(middle, WIDTH, 1)
        self.depth = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.depth_norm = nn.BatchNorm2d(WIDTH)
        self.point = nn.Conv2d(WIDTH, WIDTH, 1)
        self.point_norm = nn.BatchNorm2d(WIDTH)
        self.place = nn.Conv2d(WIDTH, findings, 1)
        self.pool = nn.Linear(deep, findings)
        self.region = nn.Linear(deep, regions)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("boxed", torch.zeros(findings))
        assert self.place.bias is not None
        nn.init.constant_(self.place.bias, -3.0)  # most places hold nothing

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled, local, places, region = self.parts(self.stem(pixels))
        return (pooled + local) / 2 + self.boxed * places.amax((2, 3)), region, places

    def stem(self, pixels: Tensor) -> Tensor:
        """The locked part: (B, 3, S, S) -> (B, C, S / 8, S / 8)."""
        x: Tensor = self.trunk.bn1(self.trunk.conv_stem(pixels))
        for stage in self.trunk.blocks[:LOCKED]:
            x = stage(x)
        return x

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rest, from what ``stem`` gives: (pooled (B, F), local (B, F), places (B, F, h, w), region (B, R)), all f32."""
        for i, stage in enumerate(self.trunk.blocks[LOCKED:], LOCKED):
            x = stage(x)
            if i == MIDDLE:
                middle = x
        x = self.trunk.bn2(self.trunk.conv_head(x))
        fused = F.relu(F.interpolate(self.deep(x), scale_factor=2, mode="nearest") + self.fine(middle))
        fused = F.relu(self.point_norm(self.point(F.relu(self.depth_norm(self.depth(fused))))))
        places = self.place(fused).float()
        seen = self.dropout(x.float().mean((2, 3)))
        local = torch.logsumexp(places.flatten(2), dim=-1) - math.log(PLACES)
        return self.pool(seen), local, places, self.region(seen)

    def locked(self) -> list[nn.Module]:
        """What is not trained and stays in eval mode."""
        return efficientnet.first_stages(self.trunk, LOCKED)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "FindingsNet":
        """In eval mode, of whatever sizes the tensors have. Raises KeyError and RuntimeError."""
        net = cls(len(tensors["place.weight"]), len(tensors["region.weight"]))
        net.load_state_dict({"boxed": net.boxed, **tensors})  # weights from before it have none
        return net.eval()
