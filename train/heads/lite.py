"""pmclip-lite's head: low-rank bilinear fusion of both embeddings, answers conditioned on the kind of question."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def unit(x: Tensor) -> Tensor:
    """Rows scaled to entries of order 1, what the layers are initialised for."""
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


class LiteHead(nn.Module):
    """image (B, D) f32, text (B, D) f32 -> answer (B, A), kind (B, K), radiograph (B,) f32 logits.

    ``answer`` is a bilinear form of the two normalised embeddings (rank ``hidden``, after MLB, Kim et al. 2017) plus a term of
    the question alone and one of the image alone. ``kind`` sees the question alone. ``radiograph`` sees the image alone and
    tells whether it is a radiology image at all.
    """

    def __init__(self, embed_dim: int, answers: int, kinds: int, hidden: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.image = nn.Linear(embed_dim, hidden)
        self.text = nn.Linear(embed_dim, hidden)
        self.prior = nn.Sequential(nn.Linear(embed_dim, 256), nn.GELU(), nn.Linear(256, answers))
        self.look = nn.Linear(embed_dim, answers, bias=False)
        self.answer = nn.Linear(hidden, answers)
        self.kind = nn.Sequential(nn.Linear(embed_dim, 256), nn.GELU(), nn.Linear(256, kinds))
        self.radiograph = nn.Sequential(nn.Linear(embed_dim, 64), nn.GELU(), nn.Linear(64, 1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = unit(image), unit(text)
        fused = self.dropout(torch.relu(self.image(image)) * self.text(text))
        return self.answer(fused) + self.look(image) + self.prior(text), self.kind(text), self.radiograph(image).squeeze(-1)
