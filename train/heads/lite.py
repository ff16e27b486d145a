"""pmclip-lite's head: low-rank bilinear fusion and a memory of training cases, answers conditioned on the kind of question."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TAU, TAU_DETAILS = 0.08, 0.05  # width of the memory's kernel, in cosine: of embeddings, of details
DETAILS = 192  # principal components that are kept of a picture's details
STRENGTH = 3.0  # of the memory against the trained logits


def unit(x: Tensor) -> Tensor:
    """Rows scaled to entries of order 1, what the layers are initialised for."""
    scaled: Tensor = F.normalize(x, dim=-1) * x.shape[-1] ** 0.5
    return scaled


class LiteHead(nn.Module):
    """image (B, D + E) f32, text (B, D) f32 -> answer (B, A), kind (B, K), radiograph (B,) f32 logits.

    There is one column in ``answer`` for each answer of each kind of question. For the first ones a bilinear form of the two
    normalised embeddings (rank ``hidden``, after MLB, Kim et al. 2017), a term of the question and one of the image are trained
    (what ``leave_to_memory`` names is forgotten afterwards). To all of them a memory of N training cases is added, as in Tip-Adapter
    (Zhang et al. 2022): the log of the kernel density of each answer at the image. ``kind`` sees the question alone. ``radiograph``
    sees the image alone and tells whether it is a radiology image.

    ``image`` is the embedding and, once ``remember`` was given them, E details of the picture (``LiteTowers``). The answers for which
    nothing is trained are those of the cases with the most similar details: they tell which case it is, embeddings what kind of picture.
    ``radiograph`` sees both, where train/radiograph.py fitted it to both.
    """

    cases: Tensor  # (N, D) f32, unit vectors
    slots: Tensor  # (N, S) i64, the columns that a case speaks for; A where it has none
    balance: Tensor  # (A,) f32, taken off the memory's logits: the log count of cases, for answers at even odds
    detail: nn.Linear | None  # E -> DETAILS, their whitened principal components; None where the head sees embeddings alone
    detail_cases: Tensor  # (N, DETAILS) f32, unit vectors

    def __init__(self, embed_dim: int, answers: int, trained: int, kinds: int, hidden: int, cases: int = 0, slots: int = 1) -> None:
        super().__init__()
        self.image = nn.Linear(embed_dim, hidden)
        self.text = nn.Linear(embed_dim, hidden)
        self.prior = nn.Sequential(nn.Linear(embed_dim, 256), nn.GELU(), nn.Linear(256, trained))
        self.look = nn.Linear(embed_dim, trained, bias=False)
        self.answer = nn.Linear(hidden, trained)
        self.kind = nn.Sequential(nn.Linear(embed_dim, 256), nn.GELU(), nn.Linear(256, kinds))
        self.radiograph = radiograph_branch(embed_dim)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("cases", torch.zeros(cases, embed_dim))
        self.register_buffer("slots", torch.full((cases, slots), answers))
        self.register_buffer("balance", torch.zeros(answers))
        self.detail = None

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "LiteHead":
        """In eval mode, of whatever sizes the tensors have. Raises KeyError and RuntimeError."""
        hidden, embed_dim = tensors["image.weight"].shape
        answers, trained, kinds = (len(tensors[name]) for name in ("balance", "answer.weight", "kind.2.weight"))
        cases, slots = tensors["slots"].shape
        head = cls(embed_dim, answers, trained, kinds, hidden, cases, slots)
        if "detail.weight" in tensors:
            kept, details = tensors["detail.weight"].shape
            head.detail = nn.Linear(details, kept)
            head.register_buffer("detail_cases", torch.zeros_like(tensors["detail_cases"]))
            head.radiograph = radiograph_branch(tensors["radiograph.0.weight"].shape[1])
        head.load_state_dict(tensors)
        return head.eval()

    @property
    def details(self) -> int:
        """How many details of a picture it sees beside the embedding."""
        return 0 if self.detail is None else self.detail.in_features

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, details = image[:, : self.image.in_features], image[:, self.image.in_features :]
        trained = F.pad(self.trained(image, text), (0, len(self.balance) - self.answer.out_features))
        radiograph = self.radiograph(self.evidence(image, details)[:, : self.radiograph[0].in_features]).squeeze(-1)
        return trained + STRENGTH * self.memory(image, details), self.kind(unit(text)), radiograph

    def trained(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, trained) f32 logits."""
        image, text = unit(image), unit(text)
        fused = self.dropout(torch.relu(self.image(image)) * self.text(text))
        logits: Tensor = self.answer(fused) + self.look(image) + self.prior(text)
        return logits

    def evidence(self, image: Tensor, details: Tensor) -> Tensor:
        """(B, D) or (B, D + DETAILS) f32: what ``radiograph`` may see."""
        return unit(image) if self.detail is None else torch.cat([unit(image), unit(self.detail(details))], 1)

    def memory(self, image: Tensor, details: Tensor) -> Tensor:
        """(B, A) f32 logits."""
        near = torch.softmax(F.normalize(image, dim=-1) @ self.cases.T / TAU, dim=-1)  # (B, N)
        spread = near.repeat_interleave(self.slots.shape[1], dim=1)  # (B, N * S)
        if self.detail is not None:
            like = torch.softmax(F.normalize(self.detail(details), dim=-1) @ self.detail_cases.T / TAU_DETAILS, dim=-1)
            untrained = self.slots.flatten() >= self.answer.out_features
            spread = torch.where(untrained, like.repeat_interleave(self.slots.shape[1], dim=1), spread)
        density = torch.zeros(len(image), len(self.balance) + 1).scatter_add(1, self.slots.flatten().expand(len(image), -1), spread)
        return torch.log(density[:, :-1] + 1e-6) - self.balance

    @torch.no_grad()
    def remember(self, seen: Tensor, slots: Tensor, balance: Tensor) -> None:
        """``seen`` is (N, D) or (N, D + E)."""
        embeddings, details = seen[:, : self.image.in_features], seen[:, self.image.in_features :]
        self.cases, self.slots, self.balance = F.normalize(embeddings, dim=-1), slots, balance
        if details.shape[1]:
            self.detail = whitening(details)
            self.register_buffer("detail_cases", F.normalize(self.detail(details), dim=-1))

    @torch.no_grad()
    def leave_to_memory(self, columns: list[int]) -> None:
        """Forgets what was trained for these columns."""
        for layer in (self.answer, self.prior[2], self.look):
            assert isinstance(layer, nn.Linear)
            layer.weight[columns] = 0
            if layer.bias is not None:
                layer.bias[columns] = 0


def radiograph_branch(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 1))


def whitening(x: Tensor) -> nn.Linear:
    """(N, E) -> E to at most DETAILS: the principal components of ``x``, each with mean 0 and variance 1 over its rows."""
    x, count = x.double(), min(DETAILS, len(x) - 1, x.shape[1])
    _, deviation, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    weight = axes[:count] * (len(x) ** 0.5 / deviation[:count].clamp(min=1e-6))[:, None]
    linear = nn.Linear(x.shape[1], count)
    linear.weight.copy_(weight)
    linear.bias.copy_(-weight @ x.mean(0))
    return linear
