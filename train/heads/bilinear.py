"""Attention between objects of an image and words of a question: bilinear (BAN, Kim et al. 2018) and stacked (SAN, Yang et al. 2016)."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

DROPOUT = 0.2  # before each map into the rank space, as BAN, MEVF and QCR have it
WHOLE = -1  # weight_norm's name for one norm over all of a matrix
LATE_DROPOUT = 0.5  # before attention scores and in the classifier


def normed(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with weight normalisation, one norm for the whole matrix."""
    layer: nn.Linear = weight_norm(nn.Linear(inputs, outputs), dim=WHOLE)
    return layer


def classifier(hidden: int, answers: int) -> nn.Sequential:
    """(B, hidden) f32 -> (B, answers) f32 logits."""
    return nn.Sequential(normed(hidden, 2 * hidden), nn.ReLU(), nn.Dropout(LATE_DROPOUT), normed(2 * hidden, answers))


class LowRank(nn.Module):
    """The two maps of a low-rank bilinear form: ReLU of a linear map of an object and of a word, each into ``rank`` dimensions."""

    def __init__(self, image_dim: int, question_dim: int, rank: int) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Dropout(DROPOUT), normed(image_dim, rank), nn.ReLU())
        self.question = nn.Sequential(nn.Dropout(DROPOUT), normed(question_dim, rank), nn.ReLU())


class BilinearAttention(LowRank):
    """objects (B, V, I) f32, words (B, T, Q) f32 -> weights (B, G, V, T) f32, for each glimpse a softmax over all pairs.

    An object of zeros is padding and gets no weight, unless all of a row's are. BAN's bias per glimpse is left out: it is the same
    for all pairs, so the softmax cancels it. The rank is three times ``hidden``, as BAN's.
    """

    def __init__(self, image_dim: int, question_dim: int, hidden: int, glimpses: int) -> None:
        super().__init__(image_dim, question_dim, 3 * hidden)
        glimpse = nn.Linear(3 * hidden, glimpses, bias=False)
        nn.init.normal_(glimpse.weight)  # weight_norm takes its norm over: the scores' scale at the start
        self.glimpse: nn.Linear = weight_norm(glimpse, dim=WHOLE)
        self.dropout = nn.Dropout(LATE_DROPOUT)

    def forward(self, objects: Tensor, words: Tensor) -> Tensor:
        u = self.dropout(self.image(objects))[:, None] * self.glimpse.weight[:, None]  # (B, G, V, R)
        scores = u @ self.question(words)[:, None].transpose(2, 3)  # (B, G, V, T)
        padding = (objects == 0).all(2)[:, None, :, None]
        # A finite least value: rows of padding alone would otherwise give not-a-number.
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        return torch.softmax(scores.flatten(2), dim=-1).view_as(scores)


class BilinearPooling(LowRank):
    """objects (B, V, I), words (B, T, Q), weights (B, V, T) -> (B, rank) f32: the weighted sum over all pairs of their bilinear form."""

    def forward(self, objects: Tensor, words: Tensor, weights: Tensor) -> Tensor:
        pooled: Tensor = self.image(objects) * (weights @ self.question(words))
        return pooled.sum(1)


class BAN(nn.Module):
    """objects (B, V, I) f32, words (B, T, Q) f32 -> (B, Q) f32: residual glimpses of bilinear attention, summed over the words."""

    def __init__(self, image_dim: int, question_dim: int, glimpses: int) -> None:
        super().__init__()
        self.attention = BilinearAttention(image_dim, question_dim, question_dim, glimpses)
        self.pooling = nn.ModuleList(BilinearPooling(image_dim, question_dim, question_dim) for _ in range(glimpses))
        self.residual = nn.ModuleList(nn.Sequential(nn.Dropout(DROPOUT), normed(question_dim, question_dim)) for _ in range(glimpses))

    def forward(self, objects: Tensor, words: Tensor) -> Tensor:
        weights = self.attention(objects, words)
        for glimpse, (pooling, residual) in enumerate(zip(self.pooling, self.residual, strict=True)):
            words = words + residual(pooling(objects, words, weights[:, glimpse]))[:, None]
        return words.sum(1)


class Stack(nn.Module):
    """objects (B, V, I) f32, question (B, Q) f32 -> the question's map and the attended image, each (B, hidden) f32."""

    def __init__(self, image_dim: int, question_dim: int, hidden: int) -> None:
        super().__init__()
        self.question = nn.Linear(question_dim, hidden)
        self.image = nn.Linear(image_dim, hidden, bias=False)  # so that an object of zeros stays one
        self.score = nn.Linear(hidden, 1, bias=False)  # a bias would cancel in the softmax
        self.dropout = nn.Dropout(LATE_DROPOUT)

    def forward(self, objects: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        asked, seen = self.question(question), self.image(objects)
        scores = self.score(self.dropout(torch.tanh(asked[:, None] + seen)))  # (B, V, 1)
        scores = scores.masked_fill((objects == 0).all(2, keepdim=True), torch.finfo(scores.dtype).min)
        return asked, (seen * torch.softmax(scores, dim=1)).sum(1)


class SAN(nn.Module):
    """objects (B, V, I) f32, words (B, T, Q) f32 -> (B, Q) f32: stacks of attention over the objects, asked by the last word's state.

    Of a single object, which is what MEVF gives, the weight is one whatever the scores are: they are then not trained.
    """

    def __init__(self, image_dim: int, question_dim: int, stacks: int) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(Stack(image_dim, question_dim, question_dim) for _ in range(stacks))

    def forward(self, objects: Tensor, words: Tensor) -> Tensor:
        state: Tensor
        state, attended = self.stacks[0](objects, words[:, -1])
        state = state + attended
        for stack in list(self.stacks)[1:]:
            state = state + stack(objects, state)[1]
        return state
