"""MEVF's head (Nguyen et al., MICCAI 2019) as PubMedCLIP uses it: image features, question states, BAN or SAN, one answer classifier."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.train.heads.bilinear import BAN, SAN, classifier
from pmclip_deploy.train.heads.vision import ImageFeatures, features_of_width
from pmclip_deploy.train.heads.words import QuestionEmbedding, tables_like

HIDDEN = 1024  # of the question's states and the joint space (MEVF section 3, PubMedCLIP's main.py)
GLIMPSES = 2  # BAN's (main.py, --gamma)
STACKS = 2  # SAN's (main.py, --num_stacks)
ALPHA = 0.001  # weight of the reconstruction's loss (main.py, --ae_alpha)


@dataclass(frozen=True)
class Recipe:
    """How PubMedCLIP trains MEVF: Adamax (PyTorch's defaults) without weight decay, BCE on the answers' scores.

    From PubMedCLIP's run_pubmedclip.sh (rate, batch; 16 for RN50x4) and main.py (the rest). MEVF's own rate is 0.005.
    """

    epochs: int = 20
    learning_rate: float = 0.002
    batch_size: int = 32
    clip_norm: float = 0.25  # of all gradients together


def schedule(epoch: int) -> float:
    """What the learning rate is multiplied with in an epoch, counted from 0: 0.5, 1, 1.5, 2, then 2, times 0.75 at 10, 12, ..., 18."""
    return 0.5 * (epoch + 1) if epoch < 4 else 2 * 0.75 ** min(max(0, epoch // 2 - 4), 5)


class MEVF(nn.Module):
    """clip (B, D) f32, autoencoder_pixels (B, 1, 128, 128) f32, maml_pixels (B, 1, 84, 84) f32, tokens (B, 12) i64
    -> answer logits (B, A) f32, reconstruction (B, 1, 128, 128) f32 or None.

    An input that ``features`` does not need may be None. ``tables`` are word vectors, each (W, E); the padding's number is W.
    PubMedCLIP's MEVF has BAN ("BAN" with 2 glimpses, or "SAN" with 2 stacks), and an LSTM ("LSTM", main.py's --rnn).
    """

    def __init__(
        self,
        features: ImageFeatures,
        tables: Sequence[Tensor],
        answers: int,
        attention: str = "BAN",
        depth: int = GLIMPSES,
        hidden: int = HIDDEN,
        recurrent: str = "GRU",
    ) -> None:
        super().__init__()
        self.features = features
        self.question = QuestionEmbedding(tables, hidden, recurrent)
        kinds: dict[str, type[BAN] | type[SAN]] = {"BAN": BAN, "SAN": SAN}
        self.attention = kinds[attention](features.dim, hidden, depth)
        self.answer = classifier(hidden, answers)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "MEVF":
        """In eval mode, of whatever sizes the tensors have. Raises KeyError and RuntimeError."""
        attention = "SAN" if "attention.stacks.0.image.weight" in tensors else "BAN"
        layer, norm = ("pooling.{}.image.1", "parametrizations.weight.original1") if attention == "BAN" else ("stacks.{}.image", "weight")
        name = f"attention.{layer}.{norm}"
        depth = sum(name.format(i) in tensors for i in range(len(tensors)))
        rows, hidden = tensors["question.recurrent.weight_hh_l0"].shape
        head = cls(
            features_of_width(tensors[name.format(0)].shape[1], "features.", tensors),
            tables_like("question.", tensors),
            len(tensors["answer.3.bias"]),
            attention,
            depth,
            hidden,
            "GRU" if rows == 3 * hidden else "LSTM",
        )
        head.load_state_dict(tensors)
        return head.eval()

    def forward(
        self, clip: Tensor | None, autoencoder_pixels: Tensor | None, maml_pixels: Tensor | None, tokens: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        objects, reconstruction = self.features(clip, autoencoder_pixels, maml_pixels)
        return self.answer(self.attention(objects, self.question(tokens)[1])), reconstruction


def mevf_loss(
    logits: Tensor, scores: Tensor, reconstruction: Tensor | None = None, pixels: Tensor | None = None, rows: int | None = None
) -> Tensor:
    """Mean over the rows of the summed BCE of ``logits`` against ``scores`` in 0..1, both (B, A) f32, -> () f32.

    With a reconstruction, its mean squared error against ``pixels`` is added, times ``ALPHA`` and, as in MEVF's code, over B.
    ``rows`` are those of the whole batch where these are a part of it; the losses of the parts sum to its loss.
    """
    rows = rows or len(logits)
    loss = F.binary_cross_entropy_with_logits(logits, scores, reduction="sum")
    if reconstruction is not None and pixels is not None:
        loss = loss + ALPHA * (len(logits) / rows) * F.mse_loss(reconstruction, pixels)
    return loss / rows
