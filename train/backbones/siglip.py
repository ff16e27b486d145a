"""SigLIP (Zhai et al. 2023), SigLIP 2 (Tschannen et al. 2025) and MedSigLIP (Sellergren et al. 2025): each pair is judged by itself.

The image tower has no class token: one query attends to all patches. The text tower reads 64 places, padding too, without a mask, and its
last place is projected. All were trained with the tanh form of GELU, as transformers computes them; open_clip computes most of the same
weights with the erf form. The sizes here are those whose graphs in fp32 stay under the 2 GiB that an ONNX file can hold.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from open_clip import CustomTextCLIP, get_model_config
from torch import Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.errors import UsageError
from pmclip_deploy.spec import Interpolation, Preprocess
from pmclip_deploy.train.backbones.base import Backbone, Tensors, Towers
from pmclip_deploy.train.backbones.configs import misfit_of_pixels, part_of, short
from pmclip_deploy.train.backbones.siglip_published import LATENT, POSITIONS, PROBE, open_clip_from_transformers, told_of_config
from pmclip_deploy.train.backbones.transformer import (
    activation_graph,
    attended_graph,
    layers_graph,
    layers_of_open_clip,
    layers_of_timm,
    patches_graph,
)
from pmclip_deploy.train.contrastive import sigmoid_loss, sigmoid_loss_of_processes
from pmclip_deploy.train.sentencepieces import tokenizer_from_folder

if TYPE_CHECKING:
    from onnx import ModelProto

    from pmclip_deploy.train.graph import Graph

GEMMA = 256000  # words
TELLING = (POSITIONS, "visual.trunk.patch_embed.proj.weight", "text.token_embedding.weight")  # their shapes tell the size


class SigLipTowers(CustomTextCLIP, Towers):  # type: ignore[misc]
    """open_clip's, same names and same weights. A text of any length gives what it gives padded to 64."""

    visual: Any
    text: Any
    context_length: int
    logit_bias: nn.Parameter  # () f32
    pad_id: int

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(B, T) i64 with T <= 64 -> (B, D), read at the last of 64 places."""
        out: Tensor = CustomTextCLIP.encode_text(self, F.pad(text, (0, self.context_length - text.shape[1]), value=self.pad_id), normalize)
        return out

    def scale_and_bias(self) -> tuple[Tensor, ...]:
        return self.logit_scale.exp(), self.logit_bias


@dataclass(frozen=True)
class SigLip(Backbone):
    """Both towers as open_clip's configuration of that name has them, which may be of another resolution."""

    importable = True
    anchors = (PROBE, LATENT)
    needs_anchor = True
    loss = staticmethod(sigmoid_loss)
    loss_of_processes = staticmethod(sigmoid_loss_of_processes)
    open_clip_name: str = ""
    patch: int = 16
    layers: int = 12  # of each tower

    def config(self) -> dict[str, Any]:
        return {key: value for key, value in get_model_config(self.open_clip_name).items() if key != "custom_text"}

    def build(self) -> SigLipTowers:
        config = self.config()
        config["text_cfg"]["layers"] = self.layers
        towers = SigLipTowers(**config)
        trunk, size = towers.visual.trunk, self.preprocess.size
        del trunk.blocks[self.layers :]
        if trunk.patch_embed.img_size != (size, size):
            trunk.patch_embed.set_input_size((size, size))
            trunk.pos_embed = nn.Parameter(0.02 * torch.randn(1, trunk.patch_embed.num_patches, self.embed_dim))
        for module in towers.modules():
            if isinstance(module, nn.GELU):
                module.approximate = "tanh"
        towers.pad_id = self.pad_id
        return towers

    def tokenizer_json(self) -> str:
        raise UsageError(f"no package has the tokenizer of backbone {self.name}", "give a checkpoint that `import` made")

    def tokenizer_beside(self, weights: Path) -> str:
        words = self.config()["text_cfg"]["vocab_size"]
        return tokenizer_from_folder(weights.parent, _is_of_open_clip(weights), words, words == GEMMA, self.name)

    # Published weights.

    def may_be(self, tensors: Tensors) -> bool:
        if LATENT not in tensors:
            return False
        grid, config = self.preprocess.size // self.patch, self.config()
        ours = (
            (1, grid**2, self.embed_dim),
            (self.embed_dim, 3, self.patch, self.patch),
            (config["text_cfg"]["vocab_size"], self.embed_dim),
        )
        return sum(name in tensors and tuple(tensors[name].shape) == shape for name, shape in zip(TELLING, ours, strict=True)) > 1

    def from_published(self, tensors: Tensors) -> tuple[str | None, Tensors] | None:
        """open_clip's names, or those of transformers' ``SiglipModel``."""
        if PROBE in tensors:
            kind, tensors = "Hugging Face SiglipModel", open_clip_from_transformers(tensors)
        elif LATENT in tensors:
            kind = "open_clip state dict"
        else:
            return None
        single = ("logit_scale", "logit_bias")
        return kind, {k: v.reshape(()) if k in single and v.numel() == 1 else v for k, v in tensors.items()}

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """Of a ``SiglipModel``, or of open_clip's open_clip_config.json."""
        if (told := told_of_config(config)) is None or isinstance(told, str):
            return told or "it is no SigLIP model"
        read = self.config()["text_cfg"]
        ours = {"image": self.preprocess.size, "patch": self.patch, "width": self.embed_dim, "layers": self.layers}
        if told != {**ours, "heads": read["heads"], "words": read["vocab_size"], "places": self.context_length}:
            said = ", ".join(f"{key} {short(value)}" for key, value in told.items())
            return f"it is a SigLIP model of {said}, which is not one that is read, or not the one in the weights"
        pixels = dict(part_of(config, "preprocess_cfg"))
        if (used := pixels.pop("interpolation", "bicubic")) not in ("bicubic", "bilinear"):
            return f"it scales pictures by {short(used)}, which is neither bicubic nor bilinear"
        return misfit_of_pixels({"preprocess_cfg": pixels}, self.preprocess, self.name)

    def as_told(self, config: Mapping[str, Any] | None) -> tuple[Backbone, dict[str, str]]:
        told = part_of(config or {}, "preprocess_cfg").get("interpolation")
        used = told or self.preprocess.interpolation
        other = used != self.preprocess.interpolation
        return RESAMPLED[self.name] if other else self, {
            "interpolation": used,
            "interpolation_from": "configuration" if told else "assumed",
        }

    # Graphs.

    def image_graph(self, towers: Towers, details: int = 0) -> "ModelProto":
        """Zhai et al. 2022, "Scaling vision transformers": a ViT without class token, and a head of one query."""
        from pmclip_deploy.train.graph import FLOAT, Graph

        visual: Any = towers.visual
        g, trunk, size = Graph(), visual.trunk, self.preprocess.size
        embed = trunk.patch_embed
        x = patches_graph(g, embed.proj.weight, trunk.pos_embed[0] + embed.proj.bias, embed.grid_size, size)
        x = g.norm("norm.after", layers_graph(g, x, layers_of_timm(trunk.blocks), None), trunk.norm)
        _pool(g, x, trunk.attn_pool)
        return g.model("image", {"pixels": (FLOAT, ["B", 3, size, size])}, {"embedding": ["B", self.embed_dim]})

    def text_graph(self, towers: Towers) -> "ModelProto":
        """With T <= 64: the graph pads, since padding is read."""
        from pmclip_deploy.train.graph import INT64, Graph

        text: Any = getattr(towers, "text")  # noqa: B009  # Towers does not say that it has one
        g, places = Graph(), self.context_length
        length = g.node("Shape", "length", "tokens", start=1, end=2)
        missing = g.node("Sub", "missing", g.ints("places", [places]), length)
        pads = g.node("Concat", "pads", g.ints("pads.begin", [0, 0, 0]), missing, axis=0)
        tokens = g.node("Pad", "tokens.padded", "tokens", pads, g.ints("pad_id", self.pad_id))
        words = g.node("Gather", "words", g.weight("words.weight", text.token_embedding.weight), tokens)
        x = g.node("Add", "embeddings", words, g.weight("places.weight", text.positional_embedding))

        def last(name: str, x: str) -> str:
            return g.node("Slice", name, x, g.ints("last", [places - 1]), g.ints("end", [places]), g.ints("tokens_axis", [1]))

        x = g.norm("norm", layers_graph(g, x, layers_of_open_clip(text.transformer), last), text.ln_final)
        g.linear("embedding", g.token(x), text.text_projection.weight, text.text_projection.bias)
        return g.model("text", {"tokens": (INT64, ["B", "T"])}, {"embedding": ["B", self.embed_dim]})


class Resampled(SigLip):
    """The same weights, for pictures that are scaled by the other filter: `import` takes it if the configuration says so."""

    importable = False


def _pool(g: "Graph", x: str, pool: Any) -> None:
    """From the norm's output (B, T, W). The query is the same for all pictures, so its product with the keys' weights is a matrix.

    The keys' bias adds the same to all scores of a head, which the softmax takes out.
    """
    heads, width = pool.num_heads, pool.latent.shape[-1]
    side = width // heads
    query = (pool.q(pool.latent)[0, 0] * side**-0.5).reshape(heads, side)
    asked = torch.einsum("hs,hsw->wh", query, pool.kv.weight[:width].reshape(heads, side, width))
    scores = g.node("MatMul", "pool.scores.patches", x, g.weight("pool.query.weight", asked))  # (B, T, H)
    joined = attended_graph(g, g.node("Transpose", "pool.scores", scores, perm=[0, 2, 1]), x, pool.kv.weight[width:], heads)
    x = g.linear("pool.out", joined, pool.proj.weight, pool.proj.bias + pool.proj.weight @ pool.kv.bias[width:])
    up = g.linear("pool.up", g.norm("pool.norm", x, pool.norm), pool.mlp.fc1.weight, pool.mlp.fc1.bias)
    up = activation_graph(g, "pool", up, "gelu_tanh")
    g.node("Add", "embedding", x, g.linear("pool.down", up, pool.mlp.fc2.weight, pool.mlp.fc2.bias))


# Published weights.


def _is_of_open_clip(weights: Path) -> bool:
    """Whether a file is laid out as open_clip has it, so that open_clip's tokenizer is meant."""
    beside = {name for name in ("config.json", "open_clip_config.json") if weights.with_name(name).is_file()}
    return weights.name.startswith("open_clip") or beside == {"open_clip_config.json"}


def _siglip(name: str, of_open_clip: str, size: int, patch: int, interpolation: Interpolation) -> SigLip:
    config = get_model_config(of_open_clip)
    text, half = config["text_cfg"], (0.5, 0.5, 0.5)
    preprocess, pad_id = Preprocess(size, "squash", half, half, interpolation=interpolation), 0 if text["vocab_size"] == GEMMA else 1
    places, family = text["context_length"], name.partition("-")[0]
    return SigLip(
        name, preprocess, config["embed_dim"], places, pad_id, of_open_clip, family=family, patch=patch, layers=text["layers"]
    )  # fmt: skip


# Name: open_clip's configuration, side of the picture, side of a patch, and the filter of the folder that transformers reads.
SIZES: dict[str, tuple[str, int, int, Interpolation]] = {
    "SigLIP-B/16@224": ("ViT-B-16-SigLIP", 224, 16, "bicubic"),
    "SigLIP-B/16@256": ("ViT-B-16-SigLIP-256", 256, 16, "bicubic"),
    "SigLIP-B/16@384": ("ViT-B-16-SigLIP-384", 384, 16, "bicubic"),
    "SigLIP-B/16@512": ("ViT-B-16-SigLIP-512", 512, 16, "bicubic"),
    "SigLIP-B/16@256-multilingual": ("ViT-B-16-SigLIP-i18n-256", 256, 16, "bicubic"),
    "SigLIP-L/16@256": ("ViT-L-16-SigLIP-256", 256, 16, "bicubic"),
    "SigLIP-L/16@384": ("ViT-L-16-SigLIP-384", 384, 16, "bicubic"),
    "SigLIP-so400m/14@224": ("ViT-SO400M-14-SigLIP", 224, 14, "bicubic"),
    "SigLIP-so400m/14@384": ("ViT-SO400M-14-SigLIP-384", 384, 14, "bicubic"),
    "MedSigLIP": ("ViT-SO400M-14-SigLIP-384", 448, 14, "bilinear"),
    "SigLIP2-B/32@256": ("ViT-B-32-SigLIP2-256", 256, 32, "bilinear"),
    "SigLIP2-B/16@224": ("ViT-B-16-SigLIP2", 224, 16, "bilinear"),
    "SigLIP2-B/16@256": ("ViT-B-16-SigLIP2-256", 256, 16, "bilinear"),
    "SigLIP2-B/16@384": ("ViT-B-16-SigLIP2-384", 384, 16, "bilinear"),
    "SigLIP2-B/16@512": ("ViT-B-16-SigLIP2-512", 512, 16, "bilinear"),
}


def _resampled(of: SigLip) -> Resampled:
    other: Interpolation = "bilinear" if of.preprocess.interpolation == "bicubic" else "bicubic"
    fields = {**vars(of), "name": f"{of.name}-{other}", "preprocess": replace(of.preprocess, interpolation=other)}
    return Resampled(**fields)


IMPORTED = [_siglip(name, *of) for name, of in SIZES.items()]
RESAMPLED = {of.name: _resampled(of) for of in IMPORTED}
BACKBONES = [*IMPORTED, *RESAMPLED.values()]
