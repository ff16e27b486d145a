"""A backbone in one file, as CONTRIBUTING says; tests/train/test_backbones.py puts it into a copy of ``train/backbones/``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.backbones.base import Backbone, Tensors, Towers

if TYPE_CHECKING:
    from onnx import ModelProto

WORDS = ("[PAD]", "[UNK]", "black", "dark", "light", "grey", "white", "bright", "half", "a", "picture", "with", "number")
WIDTH = 16


class ToyTowers(Towers):
    """Patches and words, each averaged and projected."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        pooled = nn.Conv2d(3, WIDTH, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.visual = nn.Sequential(*pooled, nn.Linear(WIDTH, embed_dim))
        self.words, self.project = nn.Embedding(len(WORDS), WIDTH), nn.Linear(WIDTH, embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(2.6))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image)  # type: ignore[no-any-return]

    def encode_text(self, text: Tensor) -> Tensor:
        there = (text != 0).float()[..., None]
        return self.project((self.words(text) * there).sum(1) / there.sum(1).clamp(min=1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Toy(Backbone):
    importable = True

    @staticmethod
    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """Each pair against all others, by a sigmoid (Zhai et al. 2023)."""
        cosines = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        return -F.logsigmoid((2 * torch.eye(len(cosines)) - 1) * scale * cosines).sum(1).mean()

    loss_of_processes = loss

    def build(self) -> ToyTowers:
        return ToyTowers(self.embed_dim)

    def tokenizer_json(self) -> str:
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        return tokenizer.to_str()

    def from_published(self, tensors: Tensors) -> tuple[str | None, Tensors] | None:
        if "toy.logit_scale" not in tensors:
            return None
        return "toy", {name.removeprefix("toy."): tensor for name, tensor in tensors.items()}

    def image_graph(self, towers: Any, details: int = 0) -> "ModelProto":
        from pmclip_deploy.train.graph import FLOAT, Graph

        g, size, (patches, *_, last) = Graph(), self.preprocess.size, towers.visual
        x = g.node("Relu", "relu", g.kernel("patches", "pixels", patches, patches.weight, patches.bias, (0, 0)))
        g.linear("embedding", g.node("Flatten", "flat", g.node("GlobalAveragePool", "mean", x)), last.weight, last.bias)
        return g.model("image", {"pixels": (FLOAT, ["B", 3, size, size])}, {"embedding": ["B", self.embed_dim]})

    def text_graph(self, towers: Any) -> "ModelProto":
        from pmclip_deploy.train.graph import FLOAT, INT64, Graph

        g = Graph()
        known = g.node("Cast", "there", g.node("Not", "known", g.node("Equal", "padding", "tokens", g.ints("pad", 0))), to=FLOAT)
        there = g.node("Unsqueeze", "there.column", known, g.ints("last", [-1]))
        words = g.node("Mul", "words.there", g.node("Gather", "words", g.weight("words.weight", towers.words.weight), "tokens"), there)
        total, count = (g.node("ReduceSum", f"{x}.sum", x, g.ints("tokens_axis", [1]), keepdims=0) for x in (words, there))
        count = g.node("Max", "count", count, g.floats("one", 1))
        g.linear("embedding", g.node("Div", "mean", total, count), towers.project.weight, towers.project.bias)
        return g.model("text", {"tokens": (INT64, ["B", "T"])}, {"embedding": ["B", self.embed_dim]})


BACKBONES = [Toy("toy", Preprocess(32, "shortest", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), embed_dim=12, context_length=20, pad_id=0)]
