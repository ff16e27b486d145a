"""OpenAI's CLIP (Radford et al. 2021): what PubMedCLIP fine-tuned. ViT and ResNet image towers, and a causal text tower.

OpenAI's own weights compute with QuickGELU. Those that open_clip trained on LAION and DataComp compute with GELU (Hendrycks and
Gimpel 2016).

In the graphs, integers are only token ids, positions and shapes, int64 as ONNX asks: "tokens" goes into a Gather and an ArgMax, the end
mark's position into a GatherND and a Gather; Shape gives T, to cut two constants. None enters arithmetic, so TensorRT may hold them in 32
bits.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from open_clip import CLIP, get_model_config
from open_clip.modified_resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from open_clip.transformer import Transformer, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.backbones.base import ACTIVATIONS, Backbone, Tensors, Towers
from pmclip_deploy.train.backbones.configs import misfit_of_pixels, part_of, refusal_of_towers, short
from pmclip_deploy.train.backbones.transformer import attended_graph, layers_graph, layers_of_open_clip, patches_graph
from pmclip_deploy.train.bpe import clip_tokenizer_json

if TYPE_CHECKING:
    from onnx import ModelProto

    from pmclip_deploy.train.graph import Graph


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of pictures in 0..1


class ClipTowers(CLIP, Towers):  # type: ignore[misc]
    """open_clip's CLIP, same names and same weights, for texts of their own length: a causal tower needs no padding to 77.

    With a question of 12 tokens the text tower computes a sixth of what it would at 77.
    """

    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: Transformer
    attn_mask: Tensor
    ln_final: nn.LayerNorm
    text_projection: nn.Parameter

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(B, T) i64 with T <= 77 -> (B, D), read at the end mark, which has the vocabulary's highest id."""
        length = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:length]
        x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
        end = text.argmax(dim=-1)
        x = self.ln_final(x[torch.arange(len(text), device=text.device), end]) @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x


@dataclass(frozen=True)
class OpenAIClip(Backbone):
    """Both towers as open_clip's configuration of that name has them."""

    importable = True
    anchors = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
    open_clip_name: str = ""
    activation: str = ACTIVATIONS[0]

    def build(self) -> ClipTowers:
        return ClipTowers(**get_model_config(self.open_clip_name))

    def tokenizer_json(self) -> str:
        return clip_tokenizer_json()

    def from_published(self, tensors: Tensors) -> tuple[str | None, Tensors] | None:
        """OpenAI's own names, which open_clip and PubMedCLIP keep, or Hugging Face's."""
        if "logit_bias" in tensors:  # of a sigmoid loss, which CLIP has not
            return None
        if "text.token_embedding.weight" in tensors:  # open_clip's CustomTextCLIP
            tensors = {k.removeprefix("text."): v for k, v in tensors.items()}
        if not any(k.startswith(("visual.", "transformer.", "token_embedding.", "vision_model.", "text_model.")) for k in tensors):
            return None
        kind = None
        if any(k.startswith(("text_model.", "vision_model.")) for k in tensors):
            kind, tensors = "Hugging Face CLIPModel", openai_from_hugging_face(tensors)
        return kind, {k: v for k, v in tensors.items() if not _is_constant(k)}

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """Of a ``CLIPModel``, or of open_clip's open_clip_config.json: heads, which no tensor's shape tells, and normalisation."""
        ours = get_model_config(self.open_clip_name)
        vision = ours["vision_cfg"]
        is_vit = "patch_size" in vision
        heads = {"text_config": ours["text_cfg"]["heads"], "vision_config": vision["width"] // vision.get("head_width", 64)}
        if isinstance(model := config.get("model_cfg"), dict):
            text, seen = part_of(model, "text_cfg"), part_of(model, "vision_cfg")
            if foreign := text.get("hf_model_name") or seen.get("timm_model_name"):
                return f"it has the tower {short(foreign)}, which is none of CLIP's own"
            if said := refusal_of_towers(config):
                return said
            told = {"text_config": text.get("heads", 8)}
            if is_vit:
                told["vision_config"] = heads["vision_config"] if seen.get("head_width", 64) == 64 else "other"
        elif config.get("model_type") != "clip":
            return f"its model_type is not clip but {short(config.get('model_type'))}; only CLIPModel is read"
        elif not is_vit:
            return f"a CLIPModel sees by a vision transformer, {self.name} by a ResNet"
        else:  # CLIPConfig's defaults
            usual = {"text_config": 8, "vision_config": 12}
            told = {tower: part_of(config, tower).get("num_attention_heads", of) for tower, of in usual.items()}
        for tower, count in told.items():
            if count != heads[tower]:
                return f"{tower} has {short(count)} heads, OpenAI's {self.name} {heads[tower]}"
        return misfit_of_pixels(config, self.preprocess, f"OpenAI's {self.name}")

    def activation_of(self, config: Mapping[str, Any]) -> str | None:
        """``hidden_act`` of a ``CLIPModel``, ``quick_gelu`` of open_clip's open_clip_config.json; each has a default."""
        if isinstance(model := config.get("model_cfg"), dict):
            return "quick_gelu" if model.get("quick_gelu") else "gelu"
        told = {tower: str(part_of(config, tower).get("hidden_act", "quick_gelu")) for tower in ("text_config", "vision_config")}
        if len(set(told.values())) > 1 or not set(told.values()) <= set(ACTIVATIONS):
            named = " and ".join(f"{tower} has {short(of)}" for tower, of in told.items())
            raise ValueError(f"{named}; both towers must have {' or '.join(ACTIVATIONS)}")
        return told["text_config"]

    def with_activation(self, activation: str) -> Backbone:
        if activation == self.activation:
            return self
        return next(b for b in BACKBONES if b.activation == activation and b.name.removesuffix("-gelu") == self.name.removesuffix("-gelu"))

    def image_graph(self, towers: Towers, details: int = 0) -> "ModelProto":
        """Radford et al. 2021, section 2.4."""
        from pmclip_deploy.train.graph import FLOAT, Graph

        g, tower, size = Graph(), towers.visual, self.preprocess.size
        if isinstance(tower, ModifiedResNet):
            resnet_graph(g, tower)
        else:
            _vision_transformer(g, tower)
        return g.model("image", {"pixels": (FLOAT, ["B", 3, size, size])}, {"embedding": ["B", self.embed_dim]})

    def text_graph(self, towers: Towers) -> "ModelProto":
        """With T <= 77, read at the end mark: the vocabulary's highest id."""
        from pmclip_deploy.train.graph import INT64, Graph

        clip: Any = towers
        g, limit = Graph(), self.context_length
        length, first = g.node("Shape", "length", "tokens", start=1, end=2), g.ints("first", [0])
        places = g.node("Slice", "places", g.weight("places.weight", clip.positional_embedding), first, length, first)
        x = g.node("Add", "embeddings", g.node("Gather", "words", g.weight("words.weight", clip.token_embedding.weight), "tokens"), places)
        # -1e4 where the key comes later: its weight after the softmax is exactly 0 in fp32, and fp16 holds it.
        mask = g.weight("later", torch.full((limit, limit), -1e4).triu(1))
        square = g.node("Concat", "square", length, length, axis=0)
        mask = g.node("Slice", "mask", mask, g.ints("corner", [0, 0]), square)  # (T, T)
        end = g.node("Unsqueeze", "end", g.node("ArgMax", "end.position", "tokens", axis=1), g.ints("last", [-1]))  # (B, 1, 1)

        def at_end(name: str, x: str) -> str:
            return g.node("GatherND", name, x, end, batch_dims=1)  # (B, T, W) -> (B, 1, W)

        mask_at_end = g.node("Gather", "mask.end", mask, end, axis=0)  # (B, 1, 1, T)
        x = layers_graph(g, x, layers_of_open_clip(clip.transformer), at_end, mask, mask_at_end)
        _projected(g, g.norm("norm", x, clip.ln_final), clip.text_projection)
        return g.model("text", {"tokens": (INT64, ["B", "T"])}, {"embedding": ["B", self.embed_dim]})


# Graphs.


def _vision_transformer(g: "Graph", tower: VisionTransformer) -> None:
    places = tower.positional_embedding.clone()
    places[0] += tower.class_embedding
    x = patches_graph(g, tower.conv1.weight, places, tower.grid_size)
    if isinstance(tower.ln_pre, nn.LayerNorm):  # which a configuration may leave out
        x = g.norm("norm.before", x, tower.ln_pre)
    x = layers_graph(g, x, layers_of_open_clip(tower.transformer), g.first)
    _projected(g, g.norm("norm.after", x, tower.ln_post), tower.proj)


def resnet_graph(g: "Graph", tower: ModifiedResNet) -> None:
    """From "pixels" to "embedding". Three convolutions as stem, and strides that are average pools (Radford et al. 2021, section 2.4)."""
    x = "pixels"
    for i in (1, 2, 3):
        x = _activated(g, f"stem.{i}", x, getattr(tower, f"conv{i}"), getattr(tower, f"bn{i}"))
    x = _pooled(g, "stem.pool", x, tower.avgpool)
    for i, stage in enumerate((tower.layer1, tower.layer2, tower.layer3, tower.layer4)):
        for j, block in enumerate(stage):
            x = _bottleneck(g, f"stage.{i}.{j}", x, block)
    _attention_pool(g, x, tower.attnpool)


def _bottleneck(g: "Graph", name: str, x: str, block: Bottleneck) -> str:
    y = _activated(g, f"{name}.1", x, block.conv1, block.bn1)
    y = _pooled(g, f"{name}.pool", _activated(g, f"{name}.2", y, block.conv2, block.bn2), block.avgpool)
    y = g.convolution(f"{name}.3", y, block.conv3, block.bn3, (0, 0))
    if block.downsample is not None:
        pool, conv, norm = block.downsample
        x = g.convolution(f"{name}.skip", _pooled(g, f"{name}.skip.pool", x, pool), conv, norm, (0, 0))
    return g.node("Relu", name, g.node("Add", f"{name}.add", y, x))


def _activated(g: "Graph", name: str, x: str, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> str:
    from pmclip_deploy.train.graph import padding_of

    return g.node("Relu", f"{name}.relu", g.convolution(name, x, conv, norm, padding_of(conv)))


def _pooled(g: "Graph", name: str, x: str, pool: nn.AvgPool2d | nn.Identity) -> str:
    """A block of stride 1 has nn.Identity here, its skip connection an nn.AvgPool2d of one pixel."""
    side = getattr(pool, "kernel_size", 1)
    return x if side == 1 else g.node("AveragePool", name, x, kernel_shape=[side] * 2, strides=[side] * 2)


def _attention_pool(g: "Graph", x: str, pool: AttentionPool2d) -> None:
    """One layer of attention over the pixels and their mean, which is the only query.

    With one query a, exactly: a (x K)^T = (a K^T) x^T, so key and value weights meet one row of each head instead of every pixel.
    The key's bias adds the same to all of a head's scores, which the softmax takes out; the value's bias passes: the weights sum to 1.
    """
    heads, width = pool.num_heads, pool.c_proj.in_features
    side, flat = width // heads, g.ints("flat", [0, width, -1])

    def turned(name: str, x: str) -> str:
        return g.node("Transpose", name, x, perm=[1, 0, 2])  # heads first, so that a batch shares the product with their weights

    mean = g.node("Reshape", "mean.flat", g.node("GlobalAveragePool", "mean", x), flat)
    x = g.node("Concat", "pixels.mean", mean, g.node("Reshape", "pixels.flat", x, flat), axis=2)
    x = g.node("Add", "pixels.placed", x, g.weight("places", pool.positional_embedding.T))  # (B, W, T)
    rows = g.node("Transpose", "pixels.tokens", x, perm=[0, 2, 1])
    scale, weight, bias = side**-0.5, pool.q_proj.weight, pool.q_proj.bias
    q = g.linear("pool.q", g.first("pool.query", rows), weight * scale, bias * scale)
    q = turned("pool.q.turned", g.node("Reshape", "pool.q.heads", q, g.ints("heads_shape", [0, heads, side])))
    k = g.weight("pool.k.weight", pool.k_proj.weight.reshape(heads, side, width))
    scores = g.node("MatMul", "pool.scores", turned("pool.k.turned", g.node("MatMul", "pool.k", q, k)), x)  # (B, H, T)
    joined = attended_graph(g, scores, rows, pool.v_proj.weight, heads)
    out = pool.c_proj
    g.linear("embedding", joined, out.weight, out.bias + out.weight @ pool.v_proj.bias)


def _projected(g: "Graph", x: str, weight: Tensor) -> None:
    g.node("MatMul", "embedding", g.token(x), g.weight("proj.weight", weight))


# Published weights.


def _is_constant(name: str) -> bool:
    """What old files carry beside the weights: sizes, and masks that the model makes itself."""
    return name in ("input_resolution", "context_length", "vocab_size") or name.split(".")[-1] in ("attn_mask", "position_ids")


HUGGING_FACE = [  # their names, and OpenAI's
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]


def openai_from_hugging_face(tensors: Tensors) -> Tensors:
    """Renamed; projections transposed; queries, keys and values as one. What has no counterpart keeps its name, to be reported."""
    out, parts = {}, dict(tensors)
    for query in [k for k in tensors if ".self_attn.q_proj." in k]:
        names = [query.replace(".q_proj.", f".{p}_proj.") for p in "qkv"]
        small = tensors[query].numel() < 2**24  # of any CLIP; strides can declare more than a file holds, and this makes it real
        if small and all(n in parts and parts[n].shape == parts[query].shape for n in names):
            parts[query.replace(".self_attn.q_proj.", ".attn.in_proj_")] = torch.cat([parts.pop(n) for n in names])
    for name, value in parts.items():
        for pattern, new in HUGGING_FACE:
            name = re.sub(pattern, new, name)
        out[name] = value.T if name in ("text_projection", "visual.proj") and value.ndim == 2 else value
    return out


def _openai(name: str, size: int, embed_dim: int, activation: str) -> OpenAIClip:
    preprocess, quick = Preprocess(size, "shortest", CLIP_MEAN, CLIP_STD), activation == "quick_gelu"
    of_open_clip = name.replace("/", "-").replace("@", "-") + ("-quickgelu" if quick else "")
    return OpenAIClip(name if quick else f"{name}-gelu", preprocess, embed_dim, 77, 0, of_open_clip, activation)


SIZES = {
    "ViT-B/32": (224, 512),
    "ViT-B/16": (224, 512),
    "ViT-L/14": (224, 768),
    "ViT-L/14@336": (336, 768),
    "RN50": (224, 1024),
    "RN50x4": (288, 640),
}
BACKBONES = [_openai(name, *sizes, activation) for activation in ACTIVATIONS for name, sizes in SIZES.items()]
