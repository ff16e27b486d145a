"""QCR's head (Zhan et al., ACM MM 2020) as PubMedCLIP uses it: separate open and closed branches, conditioned on the question."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.train.heads.bilinear import BAN, LATE_DROPOUT, classifier
from pmclip_deploy.train.heads.mevf import ALPHA, HIDDEN
from pmclip_deploy.train.heads.vision import ImageFeatures, features_of_width
from pmclip_deploy.train.heads.words import QuestionEmbedding, tables_like

GLIMPSES = 10  # QCR_PubMedCLIP/configs/*.yaml
CLOSED, OPEN = 0, 1  # columns of the type's logits


@dataclass(frozen=True)
class Recipe:
    """How PubMedCLIP trains QCR: Adamax at a constant rate without weight decay, BCE (QCR_PubMedCLIP/configs/*.yaml, main/train.py)."""

    epochs: int = 200
    learning_rate: float = 0.001
    batch_size: int = 16
    clip_norm: float = 0.25  # of all gradients together


@dataclass(frozen=True)
class TypeRecipe:
    """How the type classifier is trained before: Adam, cross-entropy, no clipping (QCR_PubMedCLIP/main/type_classifier.py)."""

    epochs: int = 200
    learning_rate: float = 1e-4
    batch_size: int = 32


class ConditionedQuestion(nn.Module):
    """tokens (B, 12) i64 -> (B, sizes[2]) f32: gated attention over a question's states, then three layers (QCR section 3).

    With two outputs it is the type classifier; with ``hidden`` outputs it gives what the branches' features are multiplied with. Its
    dropout is off in eval mode; in QCR's code it never is, so that answers there vary from run to run.
    """

    def __init__(self, table: Tensor, hidden: int, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        self.question = QuestionEmbedding([table], hidden)
        both = table.shape[1] + hidden
        self.value, self.gate = nn.Linear(both, hidden), nn.Linear(both, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)  # a bias would cancel in the softmax
        first, second, last = (nn.Linear(*pair) for pair in zip((hidden, *sizes), sizes, strict=False))
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.Dropout(LATE_DROPOUT), nn.ReLU(), last)
        for layer in (self.value, self.gate, self.score, first, second, last):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        words, states = self.question(tokens)
        both = torch.cat([words, states], dim=2)
        weights = torch.softmax(self.score(torch.tanh(self.value(both)) * torch.sigmoid(self.gate(both))), dim=1)  # (B, T, 1)
        out: Tensor = self.layers((weights * states).sum(1))
        return out


class Branch(nn.Module):
    """objects (B, V, I), states (B, T, Q), condition (B, Q), all f32 -> answer logits (B, A) f32."""

    def __init__(self, image_dim: int, hidden: int, answers: int, glimpses: int) -> None:
        super().__init__()
        self.attention = BAN(image_dim, hidden, glimpses)
        self.answer = classifier(hidden, answers)

    def forward(self, objects: Tensor, states: Tensor, condition: Tensor) -> Tensor:
        logits: Tensor = self.answer(self.attention(objects, states) * condition)
        return logits


class QCR(nn.Module):
    """clip (B, D) f32, autoencoder_pixels (B, 1, 128, 128) f32, maml_pixels (B, 1, 84, 84) f32, tokens (B, 12) i64
    -> open logits (B, O) f32, closed logits (B, C) f32, type logits (B, 2) f32 (closed, open), reconstruction (as the pixels) or None.

    Both branches answer every row; which to read, the type's logits say. An input that ``features`` does not need may be None.
    ``tables`` are word vectors, each (W, E), of which the first (GloVe) also starts the type classifier and the condition. ``kind``,
    the type classifier, is trained by itself and then frozen; ``by_type`` trains the rest.
    """

    def __init__(
        self,
        features: ImageFeatures,
        tables: Sequence[Tensor],
        open_answers: int,
        closed_answers: int,
        glimpses: int = GLIMPSES,
        hidden: int = HIDDEN,
    ) -> None:
        super().__init__()
        self.features = features
        self.question = QuestionEmbedding(tables, hidden)
        self.condition = ConditionedQuestion(tables[0], hidden, (2 * hidden, hidden, hidden))
        self.open = Branch(features.dim, hidden, open_answers, glimpses)
        self.closed = Branch(features.dim, hidden, closed_answers, glimpses)
        self.kind = ConditionedQuestion(tables[0], hidden, (256, 64, 2))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "QCR":
        """In eval mode, of whatever sizes the tensors have. Raises KeyError and RuntimeError."""
        name = "open.attention.pooling.{}.image.1.parametrizations.weight.original1"
        head = cls(
            features_of_width(tensors[name.format(0)].shape[1], "features.", tensors),
            tables_like("question.", tensors),
            len(tensors["open.answer.3.bias"]),
            len(tensors["closed.answer.3.bias"]),
            sum(name.format(i) in tensors for i in range(len(tensors))),
            tensors["question.recurrent.weight_hh_l0"].shape[1],
        )
        head.load_state_dict(tensors)
        return head.eval()

    def forward(
        self, clip: Tensor | None, autoencoder_pixels: Tensor | None, maml_pixels: Tensor | None, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        objects, reconstruction = self.features(clip, autoencoder_pixels, maml_pixels)
        joined = objects, self.question(tokens)[1], self.condition(tokens)
        return self.open(*joined), self.closed(*joined), self.kind(tokens), reconstruction

    def by_type(
        self,
        clip: Tensor | None,
        autoencoder_pixels: Tensor | None,
        maml_pixels: Tensor | None,
        tokens: Tensor,
        is_open: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """For training: ``is_open`` (B,) bool -> logits of the open rows (O', O), of the closed rows (C', C), reconstruction or None.

        Each branch computes its own rows only, and the type classifier none.
        """
        objects, reconstruction = self.features(clip, autoencoder_pixels, maml_pixels)
        joined = objects, self.question(tokens)[1], self.condition(tokens)
        return self.open(*(x[is_open] for x in joined)), self.closed(*(x[~is_open] for x in joined)), reconstruction


def qcr_loss(
    open_logits: Tensor,
    open_scores: Tensor,
    closed_logits: Tensor,
    closed_scores: Tensor,
    reconstruction: Tensor | None = None,
    pixels: Tensor | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mean BCE of the open rows' logits and scores, both (O', O) f32, plus that of the closed rows', both (C', C) f32, -> () f32.

    A branch without rows adds nothing. With a reconstruction, its mean squared error against ``pixels`` is added, times ``ALPHA``.
    ``rows``, (open (), closed ()) i64, are those of the whole batch where these are a part of it; the losses of the parts sum to its loss.
    """
    opened, closed = rows or (torch.tensor(len(open_logits)), torch.tensor(len(closed_logits)))
    loss = sum(
        F.binary_cross_entropy_with_logits(logits, scores, reduction="sum") / (count * logits.shape[1]).clamp(min=1)
        for logits, scores, count in ((open_logits, open_scores, opened), (closed_logits, closed_scores, closed))
    )
    if reconstruction is not None and pixels is not None:
        loss = loss + ALPHA * ((len(open_logits) + len(closed_logits)) / (opened + closed)) * F.mse_loss(reconstruction, pixels)
    return torch.as_tensor(loss)
