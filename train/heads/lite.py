"""pmclip-lite's head: low-rank bilinear fusion of both embeddings, answers conditioned on the kind of question."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LiteHead(nn.Module):
    """image (B, D) f32, text (B, D) f32 -> answer (B, A), kind (B, K), radiograph (B,) f32 logits.

    ``answer`` is a bilinear form of the two normalised embeddings (rank ``hidden``, after MLB, Kim et al. 2017) plus a term of
    the question alone. ``kind`` sees the question alone. ``radiograph`` sees the image alone and tells whether it is a
    radiology image at all.
    """

    def __init__(self, embed_dim: int, answers: int, kinds: int, hidden: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.image = nn.Linear(embed_dim, hidden)
        self.text = nn.Linear(embed_dim, hidden)
        self.prior = nn.Sequential(nn.Linear(embed_dim, 256), nn.GELU(), nn.Linear(256, answers))
        self.answer = nn.Linear(hidden, answers)
        self.kind = nn.Sequential(nn.Linear(embed_dim, 256), nn.GELU(), nn.Linear(256, kinds))
        self.radiograph = nn.Sequential(nn.Linear(embed_dim, 64), nn.GELU(), nn.Linear(64, 1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The scale brings a unit vector's entries to order 1, where the layers are initialised for.
        scale = image.shape[-1] ** 0.5
        image, text = F.normalize(image, dim=-1) * scale, F.normalize(text, dim=-1) * scale
        fused = self.dropout(torch.relu(self.image(image)) * self.text(text))
        return self.answer(fused) + self.prior(text), self.kind(text), self.radiograph(image).squeeze(-1)
