"""BiomedCLIP (Zhang et al. 2024): timm's ViT-B/16 and PubMedBERT, each read at its first token, as one open_clip model.

The image's token is projected by a matrix, the text's by two with a GELU between them. The published folder
(BiomedCLIP-PubMedBERT_256-vit_base_patch16_224) has the configuration, the weights and the tokenizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_clip import CustomTextCLIP

from pmclip_deploy.errors import UsageError
from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.backbones.base import Backbone, Tensors, Towers
from pmclip_deploy.train.backbones.bert import BASE, bert_text_graph, towers_from_config, wordpieces_beside
from pmclip_deploy.train.backbones.configs import misfit_of_pixels, part_of, short
from pmclip_deploy.train.backbones.transformer import layers_graph, layers_of_timm, patches_graph

if TYPE_CHECKING:
    from onnx import ModelProto

TRUNK = "visual.trunk.patch_embed.proj.weight"
WORDS = "text.transformer.embeddings.word_embeddings.weight"
POSITIONS = "text.transformer.embeddings.position_ids"  # counts from 0; files of older transformers have it


class BiomedClipTowers(CustomTextCLIP, Towers):  # type: ignore[misc]
    """open_clip's, same names and same weights. A text of its own length gives what it gives padded to 256: padding is masked."""

    visual: Any
    text: Any


@dataclass(frozen=True)
class BiomedClip(Backbone):
    importable = True
    anchors = (TRUNK,)
    layers: int = 12  # of each tower

    def build(self) -> BiomedClipTowers:
        towers = towers_from_config(BiomedClipTowers, self.config(), {**BASE, "num_hidden_layers": self.layers})
        del towers.visual.trunk.blocks[self.layers :]
        return towers

    def config(self) -> dict[str, Any]:
        """``model_cfg`` of the published open_clip_config.json, but for the names of the text tower and its tokenizer."""
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": {
                "timm_model_name": "vit_base_patch16_224",
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": self.preprocess.size,
            },
            "text_cfg": {
                "hf_proj_type": "mlp",
                "hf_pooler_type": "cls_last_hidden_state_pooler",
                "context_length": self.context_length,
            },
        }

    def tokenizer_json(self) -> str:
        raise UsageError(f"no package has the tokenizer of backbone {self.name}", "give a checkpoint that `import` made")

    def tokenizer_beside(self, weights: Path) -> str:
        return wordpieces_beside(weights, self.name, self.pad_id)

    def from_published(self, tensors: Tensors) -> tuple[str | None, Tensors] | None:
        """open_clip's names."""
        if TRUNK not in tensors or WORDS not in tensors:
            return None
        return "open_clip state dict", {name: tensor for name, tensor in tensors.items() if name != POSITIONS}

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """Of an open_clip_config.json. What it leaves out is as open_clip's CLIPVisionCfg and CLIPTextCfg have it."""
        if not (model := part_of(config, "model_cfg")):
            return f"{self.name} has an open_clip_config.json"
        seen = {"timm_model_name": None, "timm_pool": "avg", "timm_proj": "linear", **part_of(model, "vision_cfg")}
        read = {"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler", "context_length": 77, **part_of(model, "text_cfg")}
        ours = self.config()
        seen["timm_pool"] = seen["timm_pool"] if seen["timm_pool"] != "token" else ""  # timm's default for this trunk
        for told, wanted in ((seen, ours["vision_cfg"]), (read, ours["text_cfg"])):
            for key in wanted:
                if key in told and key != "timm_model_pretrained" and told[key] != wanted[key]:
                    return f"its {key} is {short(told[key])}, that of {self.name} {short(wanted[key]) or 'none'}"
        return misfit_of_pixels(config, self.preprocess, self.name)

    def image_graph(self, towers: Towers, details: int = 0) -> "ModelProto":
        """Dosovitskiy et al. 2021: ViT-B/16, the class token after the last norm, and a projection."""
        from pmclip_deploy.train.graph import FLOAT, Graph

        visual: Any = towers.visual
        g, trunk, size = Graph(), visual.trunk, self.preprocess.size
        places = trunk.pos_embed[0].clone()
        places[0] += trunk.cls_token[0, 0]
        places[1:] += trunk.patch_embed.proj.bias
        x = patches_graph(g, trunk.patch_embed.proj.weight, places, trunk.patch_embed.grid_size)
        x = g.norm("norm.after", layers_graph(g, x, layers_of_timm(trunk.blocks), g.first), trunk.norm)
        g.node("MatMul", "embedding", g.token(x), g.weight("proj.weight", visual.head.proj.weight.T))
        return g.model("image", {"pixels": (FLOAT, ["B", 3, size, size])}, {"embedding": ["B", self.embed_dim]})

    def text_graph(self, towers: Towers) -> "ModelProto":
        """With T <= 256, read at the first token."""
        model: Any = towers
        return bert_text_graph(model.text, self.context_length, self.embed_dim)


BACKBONES = [
    BiomedClip(
        name="BiomedCLIP",
        preprocess=Preprocess(
            size=224,
            resize="shortest",
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
        ),
        embed_dim=512,
        context_length=256,
        pad_id=0,
    )
]
