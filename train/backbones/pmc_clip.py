"""PMC-CLIP (Lin et al. 2023): a CLIP ResNet-50 and PubMedBERT, read at its first token, each with a projection to 768 numbers.

It is published as two layouts, and its authors compute with them in two ways:

- `checkpoint.pt`, by their training code: the image's attention pool has 32 heads, and the text is BERT's last state of the first token;
- three files, by their notebook: 8 heads, and the text is what BERT's pooler makes of that state.

Both pad a text to 77 tokens and mask nothing, so the padding counts: a text of its own length would give another embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.errors import UsageError
from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.backbones.base import Backbone, Tensors, Towers
from pmclip_deploy.train.backbones.bert import BASE, bert_graph, wordpieces_beside
from pmclip_deploy.train.backbones.openai_clip import CLIP_MEAN, CLIP_STD, resnet_graph

if TYPE_CHECKING:
    from onnx import ModelProto

BERT = "text_encoder."
WORDS, POOLER = f"{BERT}embeddings.word_embeddings.weight", f"{BERT}pooler."
PARTS = {"image_encoder(resnet50).pth": "visual.", "text_encoder.pth": BERT, "text_projection_layer.pth": "text_projection"}
# What `checkpoint.pt` has for its other loss, masked language modelling with the image, and never uses for an embedding; the last counts
# from 0, and files of older transformers have it.
OTHERS = ("fusion_module.", "mlm_projection", "img_special_token", "positional_embedding", "ln_final.", f"{BERT}embeddings.position_ids")


class PmcClipTowers(Towers):
    """The authors' names and weights. ``visual`` is open_clip's ResNet, ``text_encoder`` transformers' ``BertModel``."""

    def __init__(self, of: "PmcClip") -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        self.visual = ModifiedResNet(of.image_layers, of.embed_dim, of.pool_heads, of.preprocess.size)
        self.text_encoder: Any = BertModel(BertConfig(**{**BASE, "num_hidden_layers": of.text_layers}), add_pooling_layer=of.pooled)
        self.text_projection = nn.Parameter(torch.randn(BASE["hidden_size"], of.embed_dim) * BASE["hidden_size"] ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(of.usual_logit_scale))
        self.context_length, self.pad_id = of.context_length, of.pad_id

    def encode_image(self, image: Tensor) -> Tensor:
        embedding: Tensor = self.visual(image)
        return embedding

    def encode_text(self, text: Tensor) -> Tensor:
        """(B, T) i64 with T <= 77 -> (B, 768)."""
        tokens = F.pad(text, (0, self.context_length - text.shape[1]), value=self.pad_id)
        out = self.text_encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        state: Tensor = out.last_hidden_state[:, 0] if out.pooler_output is None else out.pooler_output
        return state @ self.text_projection


@dataclass(frozen=True)
class PmcClip(Backbone):
    importable = True
    anchors = ("visual.conv1.weight",)
    parts = PARTS
    usual_logit_scale = 4.4292  # of the authors' notebook; the three files have none
    pool_heads: int = 32  # of the attention pool
    pooled: bool = False  # whether BERT's pooler is between its last state and the projection
    image_layers: tuple[int, ...] = (3, 4, 6, 3)
    text_layers: int = 12

    def build(self) -> PmcClipTowers:
        return PmcClipTowers(self)

    def tokenizer_json(self) -> str:
        raise UsageError(f"no package has the tokenizer of backbone {self.name}", "give a checkpoint that `import` made")

    def tokenizer_beside(self, weights: Path) -> str:
        return wordpieces_beside(weights, self.name, self.pad_id, cleaned=False)

    def from_published(self, tensors: Tensors) -> tuple[str | None, Tensors] | None:
        if WORDS not in tensors or "visual.conv1.weight" not in tensors:
            return None
        if "logit_scale" not in tensors:
            return "PMC-CLIP's three files", {k: v for k, v in tensors.items() if not k.startswith(OTHERS)}
        return "PMC-CLIP training checkpoint", {k: v for k, v in tensors.items() if not k.startswith((*OTHERS, POOLER))}

    def reads(self, name: str) -> bool:
        return self.pooled or not name.startswith(POOLER)

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        return f"{self.name} is read from its own files, which no config.json describes"

    def image_graph(self, towers: Towers, details: int = 0) -> "ModelProto":
        """As OpenAI's RN50."""
        from pmclip_deploy.train.graph import FLOAT, Graph

        g, size, visual = Graph(), self.preprocess.size, towers.visual
        assert isinstance(visual, ModifiedResNet)
        resnet_graph(g, visual)
        return g.model("image", {"pixels": (FLOAT, ["B", 3, size, size])}, {"embedding": ["B", self.embed_dim]})

    def text_graph(self, towers: Towers) -> "ModelProto":
        """With T <= 77, padded to 77 in the graph."""
        from pmclip_deploy.train.graph import INT64, Graph

        model: Any = towers
        g, bert = Graph(), model.text_encoder
        x, _ = bert_graph(g, bert, self.context_length, first_only=True, padding_counts=True)
        x = g.token(x)
        if self.pooled:
            x = g.node("Tanh", "pooler", g.linear("pooler.dense", x, bert.pooler.dense.weight, bert.pooler.dense.bias))
        g.node("MatMul", "embedding", x, g.weight("proj.weight", model.text_projection))
        return g.model("text", {"tokens": (INT64, ["B", "T"])}, {"embedding": ["B", self.embed_dim]})


SIZES: dict[str, Any] = {
    "preprocess": Preprocess(size=224, resize="shortest", mean=CLIP_MEAN, std=CLIP_STD),
    "embed_dim": 768,
    "context_length": 77,
    "pad_id": 0,
}
# The files without a logit scale fit both rows, and are read as the first: as the notebook that comes with them reads them.
BACKBONES = [PmcClip("PMC-CLIP-parts", **SIZES, pool_heads=8, pooled=True), PmcClip("PMC-CLIP", **SIZES)]
